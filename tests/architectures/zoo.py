"""A tiny random instance of every causal-LM architecture that transformers can build from a configuration."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 4
VOCAB = 64
# Fields that many configurations share, and the size that makes them tiny. A field is set where the class has it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "decoder_vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "emb_dim": 32,
    "dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,  # some read the depth of a decoder's cache from here
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "d_head": 8,
    "rotary_dim": 8,
    "intermediate_size": 48,
    "n_inner": 48,
    "dff": 48,
    "d_inner": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_target_positions": 128,
    "max_source_positions": 32,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "window_size": 8,
    "attention_window_size": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_topk": 128,  # fewer make these bases differ from themselves: cached and uncached pick other blocks
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "lru_width": 32,
    "laurel_rank": 8,
    "time_step_rank": 4,
    "router_hidden_size": 16,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
}
# What a class needs beyond that to be a valid small model.
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "nemotron_h": {"n_groups": 2, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"head_dim": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_chunk_size": 16,
        "mamba_n_groups": 2,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 16, "mamba_n_heads": 4, "mamba_chunk_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 16, "mamba_n_heads": 4},
}
# Whose configuration only describes other models' parts, or whose forward needs pictures or sound.
MULTIMODAL = [
    "blt",
    "dots3_note",
    "emu3",
    "fuyu",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_assistant",
    "gemma4_unified",
    "gemma4_unified_assistant",
    "git",
    "got_ocr2",
    "llama4",
    "mllama",
    "moshi",
    "moss_transcribe_diarize",
    "musicgen",
    "musicgen_melody",
    "phi4_multimodal",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen4_exp",
]
# Classes of encoder or encoder-decoder families that can also be built as a decoder.
ENCODER_FAMILIES = [
    "bart",
    "bert",
    "bert-generation",
    "big_bird",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "marian",
    "mbart",
    "megatron-bert",
    "mvp",
    "pegasus",
    "plbart",
    "prophetnet",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xlnet",
    "xmod",
]
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def decoders() -> list[str]:
    """The model types of ``MODEL_FOR_CAUSAL_LM_MAPPING`` that are language models and decoders."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MULTIMODAL) - set(ENCODER_FAMILIES))


def encoder_families() -> list[str]:
    """The model types of the mapping that are encoders or encoder-decoders at home and can be built as decoders."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(ENCODER_FAMILIES))


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The tiny configuration of the architecture ``name``."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    fields = {key: value for key, value in SIZES.items() if _has(default, key)}
    types = getattr(default, "layer_types", None)
    stored = getattr(kind, "attribute_map", {}).get("layer_types", "layer_types")
    if types and not isinstance(getattr(kind, stored, None), property):
        kinds = list(dict.fromkeys(types))
        fields["layer_types"] = (kinds * LAYERS)[: max(LAYERS, len(kinds))]
    fields.update(TOKENS)
    if "is_decoder" in vars(default):
        fields["is_decoder"] = True
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = 4  # multi-head latent attention
    fields.update(SPECIAL.get(name, {}))
    fields.update(overrides)
    return kind(**fields)


def _has(default: PreTrainedConfig, key: str) -> bool:
    if key in getattr(default, "attribute_map", {}):
        return False
    return key in vars(default) or key in getattr(type(default), "__dataclass_fields__", {})


def build(name: str, **overrides: Any) -> Any:
    """A tiny random model of the architecture ``name`` in eval mode."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config(name, **overrides)).eval()

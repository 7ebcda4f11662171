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
# Keys of public config.json files; sizes are replaced by small ones.
PUBLISHED: dict[str, dict[str, Any]] = {
    "codegen": {  # Salesforce/codegen-350M-mono: no pad token
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "gradient_checkpointing": False,
        "layer_norm_epsilon": 1e-05,
        "resid_pdrop": 0.0,
        "scale_attn_weights": True,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
        "tie_word_embeddings": False,
        "tokenizer_class": "GPT2Tokenizer",
        "use_cache": True,
    },
    "gemma3n_text": {"num_hidden_layers": 12},  # the class's own cycle of layer types needs more than four
    "gpt2": {  # openai-community/gpt2
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-05,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "falcon": {  # tiiuae/falcon-7b
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0,
        "bias": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
    },
    "phi": {  # microsoft/phi-2
        "architectures": ["PhiForCausalLM"],
        "bos_token_id": 50256,
        "embd_pdrop": 0.0,
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "hidden_size": 40,  # so that 0.4 of a head's width is even
        "layer_norm_eps": 1e-05,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "gemma": {  # google/gemma-2b
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "olmo": {  # allenai/OLMo-1B-hf
        "architectures": ["OlmoForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "pad_token_id": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "zaya": {  # Zyphra/ZAYA1-8B: layers of one special type, a rotary base for each type
        "attention_bias": False,
        "bos_token_id": 2,
        "eos_token_id": 106,
        "lm_head_bias": False,
        "pad_token_id": 0,
        "rope_parameters": {
            "hybrid": {"rope_type": "default", "rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5},
            "hybrid_sliding": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
    },
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


def published(name: str) -> PreTrainedConfig:
    """The configuration of ``name`` as a checkpoint has it, made small: sizes are set, nothing else.

    Token ids and layer types are the class's own or those of :data:`PUBLISHED`; a field that neither has stays absent.
    """
    kind = CONFIG_MAPPING[name]
    given = PUBLISHED.get(name, {})
    default = kind(**given)
    fields = {key: value for key, value in SIZES.items() if _has(default, key) and key not in given}
    if "kv_lora_rank" in fields:
        fields["num_key_value_heads"] = 4
    if "is_decoder" in vars(default):
        fields["is_decoder"] = True
    fields.update({key: value for key, value in SPECIAL.get(name, {}).items() if key not in given})
    if getattr(default, "layer_types", None):
        fields.pop("layer_types", None)
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(default, token, None)
        if isinstance(value, int) and value >= VOCAB:
            fields[token] = value % VOCAB  # the small vocabulary has no such row
        elif isinstance(value, list):
            fields[token] = [one % VOCAB for one in value]
    return kind(**{**given, **fields})


def _has(default: PreTrainedConfig, key: str) -> bool:
    if key in getattr(default, "attribute_map", {}):
        return False
    return key in vars(default) or key in getattr(type(default), "__dataclass_fields__", {})


def build(name: str, **overrides: Any) -> Any:
    """A tiny random model of the architecture ``name`` in eval mode."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config(name, **overrides)).eval()


def build_published(name: str) -> Any:
    """The same from :func:`published`."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(published(name)).eval()

"""Tiny random models of several architectures, and adapters on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from shadowpeft import ShadowPeftConfig

V = 61
PAD = 0
WINDOW = 6
_SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that every layer matters and greedy choices are clear
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of the tiny model ``name``."""
    shape = {**_SHAPE, **overrides}
    if name == "llama":
        return LlamaConfig(**shape)
    if name == "llama_tied":
        return LlamaConfig(**{"tie_word_embeddings": True, **shape})
    if name == "qwen3":
        return Qwen3Config(**{"head_dim": 8, **shape})
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 16
        own = {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": kinds[: shape["num_hidden_layers"]],
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": False,  # tied, a tiny random Gemma repeats its input token for ever
        }
        return Gemma3TextConfig(**{**own, **shape})
    if name == "mistral":
        return MistralConfig(**{"head_dim": 8, "sliding_window": WINDOW, **shape})
    if name == "gpt2":
        return GPT2Config(
            vocab_size=V,
            n_embd=shape["hidden_size"],
            n_layer=shape["num_hidden_layers"],
            n_head=4,
            n_inner=48,
            n_positions=256,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=None,
            **overrides.get("extra", {}),
        )
    if name == "mixtral":
        return MixtralConfig(**{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, **shape})
    if name == "qwen3_next":
        own = {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
        return Qwen3NextConfig(**{**own, **shape})
    raise KeyError(name)


ARCHITECTURES = ("llama", "qwen3", "gemma3", "mistral", "gpt2")


def base(name: str = "llama", *, task: str = "CAUSAL_LM", seed: int = 1, labels: int = 3, **overrides: Any) -> Any:
    """A tiny random model in eval mode."""
    torch.manual_seed(seed)
    made = config(name, **overrides)
    if task == "SEQ_CLS":
        made.num_labels = labels
        model = AutoModelForSequenceClassification.from_config(made)
    else:
        model = AutoModelForCausalLM.from_config(made)
    return model.eval()


def small_llama(seed: int = 2, **overrides: Any) -> Any:
    """An explicit shadow of another width, with its own embeddings."""
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return base("llama", seed=seed, **{**shape, **overrides})


KINDS: dict[str, dict[str, Any]] = {
    "mirror": {},
    "narrow": {
        "shadow_num_hidden_layers": 2,
        "shadow_intermediate_size": 24,
    },
    "explicit": {"shadow_model": "small_llama"},
}


def adapter_config(**fields: Any) -> ShadowPeftConfig:
    """A configuration with dropout off and a strong injection, unless told otherwise."""
    fields = {"task_type": "CAUSAL_LM", "r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0, **fields}
    if fields.get("shadow_model") == "small_llama":
        fields["shadow_model"] = small_llama()
    return ShadowPeftConfig(**fields)


def adapt(model: nn.Module, *, copy_base: bool = True, trained: bool = True, **fields: Any) -> Any:
    """``model`` (a copy of it) with an adapter whose weights, if ``trained``, are random instead of the start's."""
    model = copy.deepcopy(model) if copy_base else model
    mode = model.training
    wanted = adapter_config(**fields)
    torch.manual_seed(5)
    adapted = get_peft_model(model, wanted)
    adapted.train(mode)
    if trained:
        randomise(adapted)
    return adapted


def randomise(model: nn.Module, seed: int = 7, scale: float = 0.15) -> None:
    """Draw every trainable tensor anew, so that nothing is zero and no two tensors are related."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(noise.to(parameter) * scale)


def tokens(rows: int = 3, length: int = 10, seed: int = 3) -> Tensor:
    """Random token ids without padding."""
    return torch.randint(2, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, counts: list[int], side: str = "right") -> tuple[Tensor, Tensor]:
    """``ids`` with ``counts[i]`` padding tokens in row ``i``, and the attention mask."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    for row, count in enumerate(counts):
        if count:
            part = slice(-count, None) if side == "right" else slice(None, count)
            ids[row, part], mask[row, part] = PAD, 0
    return ids, mask


def tokenizer() -> Any:
    """Whitespace tokenizer over ``w2 .. w60`` with the special tokens of :func:`config`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<bos>": 1, **{f"w{i}": i for i in range(2, V)}}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<bos>", unk_token="w2"
    )


def skip_reentrant(reentrant: bool | None) -> None:
    """Skip a test of reentrant checkpoints where they hold a layer's hooks too: those are refused, as another test sees."""
    if reentrant and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"transformers {transformers.__version__} checkpoints a layer with its hooks; 5.23 does not")

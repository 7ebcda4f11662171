"""Bases that vLLM can run on a CPU (heads of width 32) with adapters of every kind, and what shadowpeft's model says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from shadowpeft import ShadowPeftConfig
from tiny import base, config, randomise

V = 256
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def make_base(name: str, seed: int = 1) -> Any:
    """A random base of a family, in eval mode."""
    torch.manual_seed(seed)
    if name == "qwen2":  # without a head_dim: vLLM's class takes d / heads
        shape = {k: v for k, v in SHAPE.items() if k != "head_dim"}
        made: Any = Qwen2Config(**{**shape, "hidden_size": 128})
    elif name == "qwen3_moe":
        made = Qwen3MoeConfig(**{**SHAPE, **EXPERTS})
    else:
        own = GEMMA if name == "gemma3" else {"sliding_window": 16} if name == "mistral" else {}
        made = config(name, **{**SHAPE, **own})
    return AutoModelForCausalLM.from_config(made).eval()


def small_shadow(name: str) -> Any:
    """An explicit shadow of the family of ``name``, narrower than the base and with a token table of its own."""
    own = {"sliding_window": 16} if name == "mistral" else {}
    return base(name, seed=2, **{**SHAPE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **own})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-two-layers": (
        "llama_tied",
        {"shadow_num_hidden_layers": 2, "shadow_intermediate_size": 32, "update_hidden_size": 6},
    ),
    "llama-last-layers": ("llama", {"refined_layers": [2, 3]}),
    "llama-one-layer": ("llama", {"refined_layers": [0, 0]}),
    "llama-no-update": ("llama", {"use_update": False}),
    "llama-scaled": ("llama", {"variant": "scaled"}),
    "llama-peft": ("llama", {"variant": "peft"}),
    "llama-explicit": ("llama", {"shadow_model": "small"}),
    "llama-narrow": (
        "llama",
        {
            "share_embeddings": False,
            "shadow_hidden_size": 32,
            "shadow_num_attention_heads": 2,
            "shadow_num_key_value_heads": 1,
        },
    ),
    "llama-own-head": ("llama", {"own_shadow_head": True}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"shadow_num_hidden_layers": 2}),
    "qwen3-explicit": ("qwen3", {"shadow_model": "small"}),
    "mistral": ("mistral", {}),
    "gemma3": ("gemma3", {}),
    "gemma3-explicit": ("gemma3", {"shadow_model": "small"}),
    "qwen3_moe": ("qwen3_moe", {}),
}
"""name -> base, settings of the adapter."""


def make_case(name: str, folder: Path, seed: int = 7) -> tuple[Any, Path, Path]:
    """The attached model of a case, and the folders of its base and its adapter."""
    kind, fields = CASES[name]
    if fields.get("shadow_model") == "small":
        small = small_shadow(kind)
        if kind == "gemma3":
            small.config.layer_types = small.model.config.layer_types = ["full_attention"] * 2
        fields = {**fields, "shadow_model": small}
    model = make_base(kind)
    at = folder / kind
    if not at.exists():
        model.save_pretrained(at)
    model.name_or_path = str(at)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0, **fields}
    adapted: Any = get_peft_model(model, ShadowPeftConfig(**settings))
    randomise(adapted.eval(), seed=seed)
    adapter = folder / f"{name}-{seed}"
    adapted.save_pretrained(adapter)
    return adapted, at, adapter


def prompts(rows: int = 8, longest: int = 60) -> list[list[int]]:
    """Random prompts of different lengths; the last two begin alike, for as many tokens as a block of the cache has."""
    generator = torch.Generator().manual_seed(3)
    made = [torch.randint(2, V, (3 + i * longest // rows,), generator=generator).tolist() for i in range(rows)]
    made[-2] = [*made[-1][:40], *made[-2][:5]]
    return made


@torch.inference_mode()
def expected(model: PeftModel, rows: list[list[int]], new: int) -> list[dict[str, Any]]:
    """Greedy tokens and their log-probabilities by ``model.generate``, a prompt at a time, and the gap to the second best."""
    answers = []
    for row in rows:
        out = model.generate(
            input_ids=torch.tensor([row]),
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(out.logits, 1)[0].float().log_softmax(-1)
        best = logits.topk(2, -1).values
        chosen = out.sequences[0, len(row) :]
        answers.append(
            {
                "tokens": chosen.tolist(),
                "logprobs": logits.gather(-1, chosen[:, None])[:, 0].tolist(),
                "gap": float((best[:, 0] - best[:, 1]).min()),
            }
        )
    return answers


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

"""Three implementations behind one set of functions: this package, PEFT's ``Shadow``, the authors' ``shadow-peft``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import shadow_peft as authors_package
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import shadowpeft
import tiny

NEW, CLOSE = 8, 1e-4
"""Greedy tokens; largest absolute gap between logits of order 1 that counts as equal (attention in another order)."""
KINDS = {"ours": "shadowpeft", "peft": "PEFT's Shadow", "authors": "authors' shadow-peft"}
SHADOWS = ("shadowpeft_backbone", "shadow_backbone", "shadow_model")
"""Names of the shadow backbone in the three."""
NONE = "has none"
"""Outcome where an implementation does not have what a row asks about."""

Outcome = bool | str


@dataclass(frozen=True)
class Row:
    """One question to every implementation: it says yes, no, a number, or how it raised."""

    label: str
    ask: Callable[[str], Outcome]
    defects: tuple[int, ...] = ()
    """Numbers in docs/defects.md that the row measures."""


def attach(
    kind: str, base: Any, trained: bool = True, weight: float = 0.05, task: str = "CAUSAL_LM", **fields: Any
) -> Any:
    """The base with a one-layer shadow, r = m = 4, alpha 0.7, no dropout; random weights if ``trained``."""
    torch.manual_seed(5)
    if kind == "authors":
        own = {"injection_hidden_size": 4, "gate_hidden_size": 4, "alpha": 0.7, "dropout": 0.0, **fields}
        inner = authors_package.get_shadow_model(base, authors_package.ShadowConfig(**own))
        model: Any = (
            authors_package.ShadowForCausalLM(inner, shadow_loss_weight=weight)
            if task == "CAUSAL_LM"
            else authors_package.ShadowForSequenceClassification(inner)
        )
    else:
        own = {"task_type": task, "r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0, **fields}
        kinds: dict[str, Any] = {"ours": shadowpeft.ShadowPeftConfig, "peft": peft.ShadowConfig}
        model = get_peft_model(base, kinds[kind](**own, auxiliary_loss_weight=weight))
    model.eval()
    if trained:
        tiny.randomise(model)
    return model


def detach(kind: str, model: Any) -> Any:
    """The shadow alone."""
    if kind == "ours":
        return shadowpeft.detach(model).eval()
    alone = model.base_model.unload_shadow(copy=True) if kind == "peft" else model.peft_model.export_shadow()
    return alone.eval()


def save(kind: str, model: Any, folder: str | Path) -> None:
    """The adapter's files."""
    (model.peft_model if kind == "authors" else model).save_pretrained(str(folder))


def load(kind: str, base: Any, folder: str | Path) -> Any:
    """The adapter of a folder on a base."""
    loader = authors_package.ShadowPeftModel if kind == "authors" else PeftModel
    return loader.from_pretrained(base, str(folder))


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Logits ``(B, T, V)`` of one forward."""
    with torch.no_grad():
        return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """``NEW`` greedy tokens, unless ``options`` say otherwise."""
    with torch.no_grad():
        settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
        return model.generate(ids, **settings)  # type: ignore[no-any-return]


def greedy(model: Any, ids: Tensor) -> Tensor:
    """Greedy tokens by whole forwards, without any generation code."""
    for _ in range(NEW):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids

"""A tiny base with several adapters that differ in everything an adapter can differ in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny import adapt, adapter_config, base, randomise

BASE = "__base__"
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {},
    "explicit": {"r": 2, "shadow_model": "small_llama", "use_update": False, "shadow_alpha": 0.4},
    "late": {"variant": "peft", "refined_layers": [2, 3], "shadow_alpha": 0.9, "update_hidden_size": 3},
    "deep": {"variant": "authors", "r": 3, "shadow_num_hidden_layers": 2, "shadow_intermediate_size": 24},
    "early": {"variant": "peft", "shadow_alpha": -0.3},
}
HEADED = {**ADAPTERS, "deep": {**ADAPTERS["deep"], "own_shadow_head": True}}
NAMES = ["deep", BASE, "default", "explicit", "late", "default", "early", BASE]


def several(plain: Any, adapters: dict[str, dict[str, Any]] = ADAPTERS, **common: Any) -> Any:
    """A copy of ``plain`` with ``adapters``, of which the first must be called ``default``; all weights random."""
    fields = list(adapters.values())
    model = adapt(plain, **{**common, **fields[0]})
    for i, (name, own) in enumerate(list(adapters.items())[1:]):
        torch.manual_seed(20 + i)
        model.add_adapter(name, adapter_config(**{**common, **own}))
        model.set_adapter(name)
        randomise(model, seed=30 + i)
    model.set_adapter("default")
    return model.eval()


def classifiers() -> tuple[Any, Any]:
    """A tiny classifier and the same with several adapters."""
    plain = base("llama", task="SEQ_CLS")
    return plain, several(plain, task_type="SEQ_CLS")


@torch.no_grad()
def each_alone(model: Any, plain: Any, names: list[str], **inputs: Any) -> dict[str, Any]:
    """The output of the whole batch with each adapter in ``names`` alone, and with the base."""
    active = model.active_adapter
    found = {}
    for name in dict.fromkeys(names):
        if name == BASE:
            found[name] = plain(**{k: v for k, v in inputs.items() if k != "return_shadow"})
        else:
            model.set_adapter(name)
            found[name] = model(**inputs)
    model.set_adapter(active)
    return found


def rows_of(found: dict[str, Any], names: list[str], field: str = "logits") -> Tensor:
    """Row ``i`` of the adapter ``names[i]``."""
    return torch.stack([getattr(found[name], field)[i] for i, name in enumerate(names)])

"""How a recurrent shadow goes on behind what it has read: by several tokens at once, one by one, or not at all.

Architectures differ here, beyond what their signatures say: some start their state anew with each piece of a prompt, some let
padding into it where a single token comes. So each backbone is tried once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from shadowpeft.errors import UnsupportedModelError
from shadowpeft.hf.base.signature import Signature, trial_mode
from shadowpeft.hf.base.weights import device_of
from shadowpeft.hf.files.reading import BUILD_ERRORS

_SLACK = 1e-3
_found: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def goes_on(backbone: nn.Module, run: Callable[..., Tensor], new: int, passed: dict[str, Any], view: Any) -> Tensor:
    """The states ``(B, T, d_s)`` of ``new`` tokens behind a cache with a recurrent state.

    Args:
        run: from a slice of the new tokens, and arguments of the backbone, to their states. passed: those arguments.

    Raises:
        UnsupportedModelError: if the architecture goes on by several tokens in no way.
    """
    way = _way(backbone)
    if way == "pieces" or (way == "none" and new == 1):
        return run(slice(None), **passed)
    if way == "none":
        raise UnsupportedModelError(
            f"the shadow {type(backbone).__name__} is recurrent and cannot read {new} tokens behind a cache; leave out "
            "prefill_chunk_size, speculative, assistant_model and prompt_lookup_num_tokens"
        )
    return _one_by_one(run, new, passed, view)


def _one_by_one(run: Callable[..., Tensor], new: int, passed: dict[str, Any], view: Any) -> Tensor:
    """Each token in a pass of its own; a mask is that of the token, unless a layer attends to what was read before."""
    mask, positions = passed.get("attention_mask"), passed.get("position_ids")
    attends = any(isinstance(layer, (DynamicLayer, StaticLayer)) for layer in view.layers)
    states = []
    for t in range(new):
        own = dict(passed)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            shown = mask.shape[1] - new + t + 1
            own["attention_mask"] = mask[:, :shown] if attends else mask[:, shown - 1 : shown]
        if positions is not None:
            own["position_ids"] = positions[..., t : t + 1]
        states.append(run(slice(t, t + 1), **own))
    return torch.cat(states, 1)


def _way(backbone: nn.Module) -> str:
    """``pieces``, ``singly`` or ``none``; of the rows that are tried, one begins with more padding than the first piece."""
    if backbone not in _found:
        _found[backbone] = next((way for way in ("pieces", "singly") if _is_exact(backbone, way)), "none")
    return _found[backbone]


@torch.no_grad()
def _is_exact(backbone: Any, way: str) -> bool:
    device, takes = device_of(backbone), Signature(backbone)
    if device.type == "meta":
        return way == "pieces"
    weight = next(backbone.parameters())
    embeds = torch.randn(3, 9, int(backbone.config.hidden_size), generator=torch.Generator().manual_seed(0))
    embeds, mask = embeds.to(device, weight.dtype), torch.ones(3, 9, dtype=torch.long, device=device)
    mask[1, :3], mask[2, :6] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run(part: slice, rows: Tensor = embeds, **given: Any) -> Tensor:
        states: Tensor = backbone(inputs_embeds=rows[:, part], **given).last_hidden_state
        return states

    def about(start: int, end: int) -> dict[str, Any]:
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
        return {name: value for name, value in given.items() if takes.accepts(name)}

    try:
        with trial_mode(backbone):
            whole = run(slice(None), **about(0, 9), use_cache=False)
            cache = DynamicCache(config=backbone.config)
            through: dict[str, Any] = {takes.cache: cache, "use_cache": True}
            first = run(slice(4), **about(0, 4), **through)
            rest = {**about(4, 9), **through}
            if way == "pieces":
                second = run(slice(4, None), **rest)
            else:
                second = _one_by_one(lambda part, **given: run(part, embeds[:, 4:], **given), 5, rest, cache)
    except BUILD_ERRORS:
        return False
    found = torch.cat([first, second], 1)
    wrong = (found - whole).abs()[mask.bool()].max()
    return bool(wrong <= _SLACK * whole.abs().max().clamp(min=1))

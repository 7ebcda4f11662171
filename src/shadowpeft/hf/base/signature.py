"""What the forward of a transformers module takes: names differ between architectures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import LinearAttentionLayer

CACHE_NAMES = ("past_key_values", "cache_params")
"""What architectures call their key-value cache or recurrent state."""


class Signature:
    """The parameters of one module's forward."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(type(module).forward).parameters
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.names = tuple(n for n, p in parameters.items() if p.kind not in kinds)[1:]
        self.passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        """Whether it takes keyword arguments that it does not name."""
        self.cache = next((name for name in CACHE_NAMES if name in self.names), CACHE_NAMES[0])
        """The name of its key-value cache."""

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments turned into keyword arguments."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def accepts(self, name: str) -> bool:
        """Whether the forward takes a keyword argument of this name."""
        return name in self.names or self.passes_on


def keeps_state(cache: Any) -> bool:
    """Whether a cache holds a recurrent state of something that it has read."""
    return any(isinstance(layer, LinearAttentionLayer) and any(layer.has_previous_state.values()) for layer in cache.layers)


@contextmanager
def trial_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a trial run, whose dropout would use up random numbers; then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


class _ArrivedError(Exception):
    """Ends a trial forward: what was looked for has been seen."""


@torch.no_grad()
def hands_down(model: nn.Module, layer: nn.Module, name: str, device: torch.device) -> bool:
    """Whether a keyword argument ``name`` that ``model`` does not know reaches its decoder layer ``layer``.

    Signatures do not tell: some architectures take further keyword arguments everywhere and drop them on the way. One token is
    sent on its way and stopped at ``layer``, so nothing behind it runs. A model without weights is taken to hand it down; so is
    a quantised one, which a forward may change (bitsandbytes packs 4-bit weights for inference).
    """
    if device.type == "meta" or any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return True
    marker, seen = object(), []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get(name) is marker)
        raise _ArrivedError

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with trial_mode(model), suppress(_ArrivedError):
            model(input_ids=torch.ones(1, 1, dtype=torch.long, device=device), use_cache=False, **{name: marker})
    finally:
        handle.remove()
    return seen == [True]

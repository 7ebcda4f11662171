"""Several adapters in one batch: who has which rows, and the base's trained modules (``modules_to_save``) row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.weights import module_for_adapter
from shadowpeft.hf.forward.call import (
    AdapterWeights,
    Part,
    Scope,
    ShadowCall,
    current,
    enter,
    leave,
    read_weights,
    scope,
)
from shadowpeft.hf.layer import STRUCTURE, ShadowHub, ShadowLink
from shadowpeft.messages import did_you_mean

BASE = "__base__"
"""The name of a row that the base answers alone (PEFT's own)."""


class SavedModule(ModulesToSaveWrapper):
    """PEFT's wrapper around a trained module of the base; takes the adapter of each row from the running forward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = None if torch.compiler.is_compiling() else current()
        if call is None or any(self not in part.weights.saved for part in call.parts):
            return super().forward(*args, **kwargs)
        if len(call.parts) == 1 and call.parts[0].rows is None:
            return call.parts[0].weights.saved[self](*args, **kwargs)
        chosen = [(part, part.weights.saved[self]) for part in call.parts]
        chosen = [(part, module) for part, module in chosen if module is not self.original_module]
        alone = sum(len(part.rows or ()) for part, _ in chosen) == len(call.names or ())
        if not chosen:
            return self.original_module(*args, **kwargs)
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.shape[0] != len(call.names or ()):
            raise UnsupportedModelError(
                f"a trained module of the base ({type(self.original_module).__name__} in modules_to_save) is not called with "
                f"one row per entry of adapter_names ({len(call.names or ())}); run one batch per adapter"
            )
        # the rows of an adapter go through its copy, all others through the base's own module
        whole = None if alone else self.original_module(*args, **kwargs).clone()
        for part, module in chosen:
            out = module(part.pick(x), *args[1:], **kwargs)
            if whole is None:
                whole = out.new_empty((x.shape[0], *out.shape[1:]))
            whole = whole.index_copy(0, part.index(out.device), out.to(whole.dtype))
        return whole


def weights_of(hub: ShadowHub, model: nn.Module, adapter: str) -> AdapterWeights:
    """Everything of ``adapter`` that a forward pass of ``model`` uses, as one object; made once and kept by the hub.

    A pass that holds the object is not touched by a later :func:`shadowpeft.swap`: it ends with the weights it began with.
    """
    if torch.compiler.is_compiling():
        return read_weights(hub, adapter)
    weights = hub.records.get(adapter)
    if weights is not None and weights.backbone is hub.shadowpeft_backbone._modules.get(adapter):
        return weights
    with STRUCTURE:
        weights = hub.records.get(adapter)
        if weights is None or weights.backbone is not hub.shadowpeft_backbone._modules.get(adapter):
            weights = hub.records[adapter] = collect(hub, model, adapter)
        return weights


def collect(hub: ShadowHub, model: nn.Module, adapter: str) -> AdapterWeights:
    """Read the weights of one adapter from all over ``model``."""
    weights = read_weights(hub, adapter)
    weights.collected = True
    for module in model.modules():
        if isinstance(module, ShadowLink):
            step = module.step(adapter)
            if step is not None:
                weights.steps[module.layer] = step
        elif isinstance(module, ModulesToSaveWrapper):
            if type(module) is ModulesToSaveWrapper:
                module.__class__ = SavedModule
            weights.saved[module] = module_for_adapter(module, adapter)
    return weights


def check_names(names: Any, hub: ShadowHub) -> tuple[str, ...]:
    """``adapter_names`` as a tuple.

    Raises:
        ConfigError: if it is no list of strings, or names an adapter that is not loaded.
    """
    if isinstance(names, str) or not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"adapter_names is {names!r} but must be a list with the name of an adapter for each row")
    known = [*hub.configs, BASE]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"adapter_names has '{name}', which is not loaded{did_you_mean(name, known)}; loaded are {sorted(known)}"
            )
    return tuple(names)


def check_length(names: tuple[str, ...], rows: int | None, *, repeats: bool = False) -> tuple[str, ...]:
    """``names`` with one entry per row of a batch of ``rows``.

    Raises:
        ConfigError: if there are more or fewer; with ``repeats`` each name may stand for equally many adjacent rows.
    """
    if rows is None or rows == len(names):
        return names
    if repeats and names and rows % len(names) == 0:
        return tuple(name for name in names for _ in range(rows // len(names)))
    raise ConfigError(f"adapter_names has {len(names)} entries but the batch has {rows} rows; give one name per row")


def row_names(model: nn.Module, rows: int) -> tuple[str, ...] | None:
    """The adapter of each row of a running generation of ``model`` with ``adapter_names``; None if one adapter has all."""
    entered = scope.get()
    if entered is None or entered.model is not model or entered.names is None:
        return None
    return check_length(entered.names, rows, repeats=entered.repeats)


def check_mode(model: nn.Module) -> None:
    """Names by row are for inference.

    Raises:
        ConfigError: in training mode, as PEFT does: the optimiser steps of one adapter would depend on its neighbours' rows.
    """
    if model.training:
        raise ConfigError(
            "adapter_names was passed in training mode, where one adapter is trained at a time; call model.eval(), or "
            "set_adapter and train one batch per adapter"
        )


def batch_rows(kwargs: dict[str, Any]) -> int | None:
    """Number of rows of the batch in a forward's arguments, or None if it cannot be told."""
    for name in ("input_ids", "inputs", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            return int(value.shape[0])
    return None


def mixed_call(hub: ShadowHub, model: nn.Module, names: tuple[str, ...], held: dict[str, AdapterWeights]) -> ShadowCall:
    """The call of a batch in which row ``i`` belongs to ``names[i]``; the ordinary call if all rows have one adapter.

    Args:
        held: weights that the running generation has used already; extended in place.
    """
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name != BASE:
            groups.setdefault(name, []).append(row)
    parts = []
    for adapter, rows in groups.items():
        weights = held.setdefault(adapter, weights_of(hub, model, adapter))
        parts.append(Part(weights, None if len(rows) == len(names) else rows))
    if not parts:
        weights_of(hub, model, next(iter(hub.configs)))  # so that the base's trained modules know of calls
    uniform = len(parts) == 1 and parts[0].rows is None
    return ShadowCall(parts, None if uniform else names)


@contextmanager
def as_only_adapter(part: Part) -> Iterator[None]:
    """Inside, the base's modules are those of ``part``'s adapter, for whatever number of rows."""
    if torch.compiler.is_compiling():
        yield
        return
    call = ShadowCall([Part(part.weights)])
    enter(call)
    try:
        yield
    finally:
        leave()


def assemble(parts: list[Part], pieces: list[Tensor], rows: int) -> Tensor:
    """Put the pieces ``(B_part, ...)`` of the parts, which together have all ``rows`` rows, in the order of the batch."""
    if parts[0].rows is None:
        return pieces[0]
    first = pieces[0]
    whole = first.new_empty((rows, *first.shape[1:]))
    for part, piece in zip(parts, pieces, strict=True):
        whole = whole.index_copy(0, part.index(first.device), piece.to(first))
    return whole


def held_weights(hub: ShadowHub, model: nn.Module, adapter: str, entered: Scope | None) -> AdapterWeights:
    """The weights of ``adapter`` for this pass: those that a running generation of ``model`` holds, or the present ones."""
    if entered is None:
        return weights_of(hub, model, adapter)
    if adapter not in entered.held:
        entered.held[adapter] = weights_of(hub, model, adapter)
    return entered.held[adapter]


def check_not_compiled(model: Any, kwargs: dict[str, Any]) -> None:
    """transformers' ``generate`` compiles the forward pass by itself for a static cache, and compiled code sees no names.

    Raises:
        ConfigError: if it would.
    """
    settings = kwargs.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)

    cache = kwargs.get("past_key_values")
    static = "static" in str(setting("cache_implementation") or "") or bool(getattr(cache, "is_compileable", False))
    compiles = model.device.type != "cpu" or setting("compile_config") is not None
    if static and compiles and not setting("disable_compile"):
        raise ConfigError(
            "adapter_names was passed with a static cache, for which generate compiles the model; pass disable_compile=True"
        )

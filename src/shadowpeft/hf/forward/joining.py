"""Batches that come together and apart between two forward passes: their caches, row by row and column by column.

A column is a position of the batch, the same for base and shadow; rows that are shorter have padding on the left, which the
attention mask hides and positions do not count. So columns of padding may be added or dropped on the left at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    QuantizedLayer,
)

from shadowpeft.errors import CacheMismatchError, UnsupportedModelError
from shadowpeft.hf.forward.cache import _NAMES, _OWNER, _VERSION, _divide

_STATES = ("conv_states", "recurrent_states")
_DUMMY: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
"""The layer that holds nothing; transformers 5.20 has none."""


def can_join(cache: Cache) -> bool:
    """Whether rows and columns of ``cache`` can be added: all its layers are of kinds that are known here."""
    return all(_is_known(layer) for layer in cache.layers)


def can_continue(cache: Cache) -> bool:
    """Whether a prompt may be read in pieces: recurrent layers of some architectures start anew with each piece."""
    return can_join(cache) and not any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)


def select_rows(cache: Cache, rows: list[int]) -> None:
    """Go on with these rows of the batch only."""
    indices: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}  # copied to the device once, not for each layer
    for layer in cache.layers:
        names: tuple[str, ...] | None = getattr(layer, _NAMES, None)
        local = rows if names is None else layer._local(rows, names)

        def pick(x: Tensor, local: tuple[int, ...] = tuple(local)) -> Tensor:
            key = x.device, local
            if key not in indices:
                indices[key] = torch.tensor(local, dtype=torch.long, device=x.device)
            return x[indices[key]]

        _replace(layer, pick)
        if names is not None:
            setattr(layer, _NAMES, tuple(names[row] for row in rows))


def shift(cache: Cache, columns: int) -> None:
    """Add so many columns of padding on the left; with a negative number, drop as many columns, which no row may need."""
    if columns == 0:
        return
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
            continue
        length = layer.keys.shape[-2] + columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length += columns
            length = min(layer.cumulative_length, layer.sliding_window - 1)
        layer.keys, layer.values = (F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in (layer.keys, layer.values))


def can_take_back(cache: Cache, columns: int) -> bool:
    """Whether rows may each lose some of the next ``columns`` columns: full attention, or windows that do not fill up."""

    def can(layer: Any) -> bool:
        if isinstance(layer, DynamicSlidingWindowLayer):
            return bool(layer.cumulative_length + columns < layer.sliding_window)
        return not isinstance(layer, LinearAttentionLayer)

    return all(_is_known(layer) and can(layer) for layer in cache.layers)


def move_right(cache: Cache, columns: list[int]) -> None:
    """Move row ``i`` by ``columns[i]`` columns, over its last ones; what comes in on the left is padding.

    The cache is one that :func:`check_movable` lets pass.
    """
    for layer in cache.layers:
        if not getattr(layer, "is_initialized", False):
            continue
        names: tuple[str, ...] | None = getattr(layer, _NAMES, None)
        own = columns
        if names is not None:
            own = [n for n, name in zip(columns, names, strict=True) if name == getattr(layer, _OWNER)]
        layer.keys, layer.values = (moved_right(x, own, axis=2) for x in (layer.keys, layer.values))


def check_movable(cache: Cache) -> None:
    """Raises:
    UnsupportedModelError: if the rows of a cache, which records its past, cannot be moved by different numbers of columns.
    """
    strange: list[Any] = [cache] if hasattr(cache, "_shadowpeft_pair") else []
    strange += [each for each in cache.layers if not _is_plain(each) or isinstance(each, LinearAttentionLayer)]
    if strange:
        raise UnsupportedModelError(
            f"the cache has a {type(strange[0]).__name__}, whose rows cannot lose different numbers of tokens; draft for one "
            "row at a time"
        )


def moved_right(x: Tensor, columns: list[int], axis: int) -> Tensor:
    """``x`` with row ``i`` (axis 0) moved by ``columns[i]`` along ``axis``; zeros come in on the left."""
    length = x.shape[axis]
    by = torch.tensor(columns, device=x.device).view(-1, *[1] * (x.dim() - 1))
    shape = [1] * x.dim()
    shape[axis] = length
    source = torch.arange(length, device=x.device).view(shape) - by
    moved = x.gather(axis, source.clamp(min=0).expand(x.shape))
    return moved.masked_fill(source < 0, 0)


def join_caches(cache: Cache, other: Cache, names: tuple[str, ...] | None) -> None:
    """Put the rows of ``other``, which has as many columns, after those of ``cache``.

    Args:
        names: the adapter of each row of the joined batch, the base's name for its rows; None: there are no shadows.

    Raises:
        CacheMismatchError: if rows of one adapter were read with different weights.
    """
    shared = [[layer for layer in c.layers if not hasattr(layer, _OWNER)] for c in (cache, other)]
    layers = [_joined(one, two) for one, two in zip(*shared, strict=True)]
    first, second = _by_owner(cache), _by_owner(other)
    for owner in {**first, **second}:
        own = [first.get(owner, []), second.get(owner, [])]
        joined = [_joined(one, two) for one, two in zip(*own, strict=True)] if all(own) else own[0] or own[1]
        assert names is not None
        for layer in joined:
            if hasattr(layer, _NAMES):
                setattr(layer, _NAMES, names)
            layers.append(layer if hasattr(layer, _NAMES) else _divide(layer, names))
    cache.layers = layers


def _is_known(layer: Any) -> bool:
    return _is_plain(layer) and not getattr(layer, "record_past", False)


def _is_plain(layer: Any) -> bool:
    """Whether all that a layer holds has rows, and columns where it has keys."""
    kinds = (DynamicLayer, LinearAttentionLayer, *_DUMMY)
    return isinstance(layer, kinds) and not isinstance(layer, (DynamicIndexedLayer, QuantizedLayer))


def _by_owner(cache: Cache) -> dict[str, list[Any]]:
    """The layers of each shadow that has rows."""
    layers: dict[str, list[Any]] = {}
    for layer in cache.layers:
        owner = getattr(layer, _OWNER, None)
        if owner is not None and owner in getattr(layer, _NAMES, (owner,)):
            layers.setdefault(owner, []).append(layer)
    return layers


def _joined(one: Any, two: Any) -> Any:
    if getattr(one, _VERSION, None) != getattr(two, _VERSION, None):
        raise CacheMismatchError(
            f"two batches were read with different weights of adapter '{getattr(one, _OWNER)}' and cannot be joined; finish "
            "one before the other"
        )
    _replace(one, lambda x, y: torch.cat([x, y]), two)
    return one


def _replace(layer: Any, change: Any, *others: Any) -> None:
    """Put ``change(x, ...)`` in the place of every tensor ``x`` of a layer that has rows; ``...`` are those of ``others``."""
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        layer.keys = change(layer.keys, *(other.keys for other in others))
        layer.values = change(layer.values, *(other.values for other in others))
    if isinstance(layer, LinearAttentionLayer):
        for kind in _STATES:
            states = getattr(layer, kind)
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state, *(getattr(other, kind)[index] for other in others))

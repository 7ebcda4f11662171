"""The shadow's key-value layers, carried inside the base's own ``Cache``.

The shadow's layers are appended to the list of layers of the base's cache, so everything that transformers does to a
cache (reorder, crop, repeat, select, copy, reset, record the past) reaches them too, in every generation mode. The shadow
sees a view that holds just those layers.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from shadowpeft.errors import CacheMismatchError, UnsupportedModelError
from shadowpeft.hf.forward.call import ShadowCall

_OWNER = "_shadowpeft_adapter"
_VERSION = "_shadowpeft_version"
_NAMES = "_shadowpeft_names"


def shadow_views(
    cache: Cache, base_layers: int, base_config: PreTrainedConfig, call: ShadowCall, ahead: int | None = 0
) -> list[Cache]:
    """The shadows' parts of ``cache``, one for each part of ``call``, appended at the first call.

    In a mixed batch each adapter has layers of its own that hold its rows only; rows of the base have none.

    Args:
        cache: the base's cache, whose list of layers is extended in place.
        base_layers: number of layers of the base.
        ahead: how many tokens the shadows have read that the base has not; None: any number.

    Raises:
        CacheMismatchError: if the cache already holds tokens that the shadows of ``call`` have not read.
    """
    if not call.parts:
        return []
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"past_key_values is a {type(cache).__name__}; a shadow needs a transformers Cache for decoder-only models"
        )
    if call.names is not None and not _is_stock(cache):
        raise UnsupportedModelError(
            f"past_key_values is a {type(cache).__name__}, which cannot hold several shadows; pass use_cache=False or run one "
            "batch per adapter"
        )
    own = _shadow_layers(cache)
    if (
        own
        and _owners(own) != _wanted(call)
        and not any(_used(layer) for layer in _all_layers(cache))
        and _is_stock(cache)
    ):
        cache.layers = [
            layer for layer in cache.layers if not hasattr(layer, _OWNER)
        ]  # empty after reset(): start anew
        own = []
    if not own:
        if any(_used(layer) for layer in cache.layers):
            raise CacheMismatchError(
                "the cache already holds tokens that were read without the shadow; start from an empty cache with the "
                "adapter enabled"
            )
        if _is_stock(cache):
            _complete(cache, base_layers, base_config)
        for part in call.parts:
            layers = _new_layers(cache, part.weights.backbone.config)
            for layer in layers:
                setattr(layer, _OWNER, part.adapter)
                setattr(layer, _VERSION, part.weights.version)
            own.extend(layers if part.rows is None else [_divide(layer, call.names or ()) for layer in layers])
        if _is_stock(cache):
            cache.layers.extend(own)
        else:
            _pair(cache, own)
    _check_owners(own, call)
    views = []
    for part in call.parts:
        layers = [layer for layer in own if getattr(layer, _OWNER) == part.adapter]
        view = Cache(layers=layers) if _is_stock(cache) else cache._shadowpeft_pair  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():
            base_length, shadow_length = _length(cache), _length(view)
            if base_length is not None and shadow_length is not None and ahead is not None:
                _check_lengths(base_length, shadow_length, ahead)
        views.append(view)
    return views


def _check_lengths(base: int, shadow: int, ahead: int) -> None:
    if base + ahead == shadow:
        return
    if ahead:
        raise CacheMismatchError(
            f"shadow_state has {ahead} tokens, but the cache holds {base} tokens of the base and {shadow} of the shadow; pass "
            "the states of all tokens that the shadow is ahead"
        )
    instead = ", or if the shadow keeps no cache, pass use_cache=False" if not shadow else ""
    raise CacheMismatchError(
        f"the cache holds {base} tokens of the base and {shadow} of the shadow; some were read with the adapter disabled, "
        f"start from an empty cache{instead}"
    )


def check_untouched(cache: Any) -> None:
    """What the base answers alone, in every row of a batch or since adapters are disabled, continues no cache that shadows have
    filled.

    Raises:
        CacheMismatchError: if one has.
    """
    own = _shadow_layers(cache) if isinstance(cache, Cache) else []
    if owners := _owners([layer for layer in own if _used(layer)]):
        raise CacheMismatchError(
            f"the cache was filled with {_say(owners)} but now the base answers alone (adapters are disabled, or every row of "
            "adapter_names is '__base__'); start from an empty cache"
        )


def _shadow_layers(cache: Cache) -> list[Any]:
    return [layer for layer in _all_layers(cache) if getattr(layer, _OWNER, None) is not None]


def _owners(layers: list[Any]) -> dict[str, list[int] | None]:
    """Which rows each adapter's layers hold (None: all rows there are); adapters whose rows were all taken out are not
    listed."""
    owners: dict[str, list[int] | None] = {}
    for layer in layers:
        names = getattr(layer, _NAMES, None)
        if names is None or all(name == getattr(layer, _OWNER) for name in names):
            owners[getattr(layer, _OWNER)] = None
        elif getattr(layer, _OWNER) in names:
            owners[getattr(layer, _OWNER)] = [i for i, name in enumerate(names) if name == getattr(layer, _OWNER)]
    return owners


def _wanted(call: ShadowCall) -> dict[str, list[int] | None]:
    return {part.adapter: part.rows for part in call.parts}


def _say(owners: dict[str, list[int] | None]) -> str:
    return ", ".join(
        f"adapter '{name}'" + ("" if rows is None else f" in rows {rows}") for name, rows in owners.items()
    )


def _check_owners(layers: list[Any], call: ShadowCall) -> None:
    owners, wanted = _owners(layers), _wanted(call)
    if owners != wanted:
        raise CacheMismatchError(
            f"the cache was filled with {_say(owners)} but {_say(wanted)} is active; start from an empty cache"
        )
    for part in call.parts:
        for layer in layers:
            versions = {0, getattr(layer, _VERSION), part.weights.version}
            if getattr(layer, _OWNER) == part.adapter and not torch.compiler.is_compiling() and len(versions) == 3:
                raise CacheMismatchError(
                    f"the weights of adapter '{part.adapter}' were replaced after this cache was filled; start from an empty "
                    "cache"
                )


class _Divided:
    """Mixed into the class of a cache layer that holds the rows of one adapter: indices are those of the whole batch."""

    def _local(self, source: list[int], names: tuple[str, ...]) -> list[int]:
        """Which of the layer's own rows the rows of the new batch come from; row ``i`` is the old row ``source[i]``."""
        mine = [i for i, name in enumerate(names) if name == getattr(self, _OWNER)]
        place = {row: position for position, row in enumerate(mine)}
        return [place[row] for row in source if row in place]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        names: tuple[str, ...] = getattr(self, _NAMES)
        source = beam_idx.tolist()
        moved = [(i, row) for i, row in enumerate(source) if names[i] != names[row]]
        if moved:
            i, row = moved[0]
            raise CacheMismatchError(
                f"row {i} of adapter '{names[i]}' was to continue row {row} of adapter '{names[row]}'; rows may only change "
                "places within an adapter"
            )
        local = torch.tensor(self._local(source, names), dtype=torch.long, device=beam_idx.device)
        super().reorder_cache(local)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        setattr(self, _NAMES, tuple(name for name in getattr(self, _NAMES) for _ in range(repeats)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        names: tuple[str, ...] = getattr(self, _NAMES)
        source = (indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist()
        local = torch.tensor(self._local(source, names), dtype=torch.long, device=indices.device)
        super().batch_select_indices(local)  # type: ignore[misc]
        setattr(self, _NAMES, tuple(names[row] for row in source))


class _Recurrent:
    """Mixed into the class of a recurrent layer, whose state cannot go back; transformers takes back its convolution alone."""

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and any(self.is_recurrent_states_initialized.values()):  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                f"{abs(tokens_to_remove)} tokens were to be cropped from the cache of a recurrent shadow, whose state cannot "
                "do that; generate without drafts (speculative, assistant_model, prompt_lookup_num_tokens)"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]


@functools.cache
def _mixed_with(mixin: Any, kind: Any) -> Any:
    """The class ``kind`` with ``mixin`` before it, under its own name; one for each pair."""
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


@torch.compiler.disable  # a compiler that starts again must not find the class made already
def _with(mixin: Any, layer: Any, **more: Any) -> Any:
    """``layer``, not yet used, with ``mixin`` before its class, and more attributes."""
    kind = _mixed_with(mixin, type(layer))  # type: ignore[arg-type]
    made = kind.__new__(kind)
    made.__dict__.update(vars(layer), **more)
    return made


def _divide(layer: Any, names: tuple[str, ...]) -> Any:
    """``layer``, not yet used, as one that holds the rows of its owner in a batch whose rows belong to ``names``."""
    return _with(_Divided, layer, **{_NAMES: names})


def own_cache(backbone: Any) -> Cache:
    """The empty cache that an architecture makes for itself: a class of its own where its module has one."""
    for value in vars(sys.modules[type(backbone).__module__]).values():
        if isinstance(value, type) and issubclass(value, Cache) and value.__module__ == type(backbone).__module__:
            return value()
    return DynamicCache(config=backbone.config)


def _is_stock(cache: Cache) -> bool:
    """Whether all of ``cache`` is in its list of layers. An architecture's own class may count its layers otherwise."""
    return type(cache).__module__ == Cache.__module__


def _all_layers(cache: Cache) -> list[Any]:
    pair = getattr(cache, "_shadowpeft_pair", None)
    return list(cache.layers) + ([] if pair is None else list(pair.layers))


class _Paired:
    """Mixed into the class of an architecture's own cache: what happens to it happens to the shadow's cache beside it."""

    _shadowpeft_pair: Cache

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._shadowpeft_pair.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._shadowpeft_pair.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._shadowpeft_pair.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self._shadowpeft_pair.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._shadowpeft_pair.reset()


def _pair(cache: Cache, layers: list[Any]) -> None:
    """Put the shadow's layers beside ``cache``, in an empty cache of the same class, and make the two change together."""
    pair = copy.deepcopy(cache)
    pair.layers = layers
    cache._shadowpeft_pair = pair  # type: ignore[attr-defined]
    cache.__class__ = _mixed_with(_Paired, type(cache))  # type: ignore[arg-type]


def _length(cache_or_layer: Any) -> int | None:
    """Tokens held, or None where that is not defined (recurrent layers)."""
    if isinstance(cache_or_layer, Cache):
        layers = [layer for layer in cache_or_layer.layers if not hasattr(layer, _OWNER)] or cache_or_layer.layers
        lengths = [_length(layer) for layer in layers]
        return max((n for n in lengths if n is not None), default=None)  # linear layers may hold an empty place
    if not hasattr(cache_or_layer, "get_seq_length"):
        return None
    length = cache_or_layer.get_seq_length()
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return None  # reading a tensor would break the graph; eager calls do the check
    return int(length)


def _used(layer: Any) -> bool:
    """Whether a layer of a cache has read anything."""
    return bool(_length(layer)) or any(getattr(layer, "has_previous_state", {}).values())


def _complete(cache: Cache, base_layers: int, base_config: PreTrainedConfig) -> None:
    """Give a lazily built cache (``DynamicCache()``) its base layers now, so that the shadow's come after them."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < base_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    elif not cache.layers:
        cache.layers.extend(DynamicCache(config=base_config).layers)


def _new_layers(cache: Cache, shadow_config: PreTrainedConfig) -> list[Any]:
    static = [layer for layer in cache.layers if getattr(layer, "max_cache_len", None) is not None]
    if isinstance(cache, StaticCache) or static:
        full = [layer for layer in static if not layer.is_sliding]
        longest = max(int(layer.max_cache_len) for layer in (full or static))
        window = getattr(shadow_config, "sliding_window", None)
        if not full and (window is None or longest < window):
            raise UnsupportedModelError(
                "the base's static cache holds only a sliding window but the shadow attends to everything; use a dynamic "
                "cache"
            )
        layers = StaticCache(config=shadow_config, max_cache_len=longest).layers
    else:
        layers = DynamicCache(config=shadow_config).layers
        if (lazy := cache.layer_class_to_replicate) is not None:
            # The base sizes a sliding mask by the first sliding layer of the whole cache. In a lazily built one none of
            # its own is, so none of the shadow's may be; the mask still restricts attention to the window.
            layers = [lazy() if layer.is_sliding else layer for layer in layers]
    # Recording of the past is switched on for a whole cache when it is made, before these layers exist. If no base
    # layer can tell whether it was, record: that is always correct and costs memory only for sliding windows.
    recorders = [layer.record_past for layer in cache.layers if hasattr(layer, "record_past")]
    if any(recorders) or not recorders:
        for layer in layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
    return [_with(_Recurrent, layer) if isinstance(layer, LinearAttentionLayer) else layer for layer in layers]

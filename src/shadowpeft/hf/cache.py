"""The shadow's key-value layers, carried inside the base's own ``Cache``.

The shadow's layers are appended to the list of layers of the base's cache, so everything that transformers does to a
cache (reorder, crop, repeat, select, copy, reset, record the past) reaches them too, in every generation mode. The shadow
sees a view that holds just those layers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig, StaticCache

from shadowpeft.errors import CacheMismatchError, UnsupportedModelError

_OWNER = "_shadowpeft_adapter"


def shadow_view(
    cache: Cache, base_layers: int, base_config: PreTrainedConfig, shadow_config: PreTrainedConfig, adapter: str
) -> Cache:
    """The shadow's part of ``cache``, appended at the first call.

    Args:
        cache: the base's cache, whose list of layers is extended in place.
        base_layers: number of layers of the base. adapter: name of the active adapter.

    Raises:
        CacheMismatchError: if the cache already holds tokens that the active adapter's shadow has not read.
    """
    if isinstance(cache, EncoderDecoderCache) or not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"past_key_values is a {type(cache).__name__}; a shadow needs a transformers Cache for decoder-only models"
        )
    own = [layer for layer in cache.layers if getattr(layer, _OWNER, None) is not None]
    if not own:
        if any(_length(layer) for layer in cache.layers):
            raise CacheMismatchError(
                "the cache already holds tokens that were read without the shadow; start from an empty cache with the "
                "adapter enabled"
            )
        _complete(cache, base_layers, base_config)
        own = _new_layers(cache, shadow_config)
        for layer in own:
            setattr(layer, _OWNER, adapter)
        cache.layers.extend(own)
    elif getattr(own[0], _OWNER) != adapter:
        raise CacheMismatchError(
            f"the cache was filled with adapter '{getattr(own[0], _OWNER)}' but '{adapter}' is active; start from an empty "
            "cache"
        )
    view = Cache(layers=own)
    if not torch.compiler.is_compiling():
        base_length, shadow_length = _length(cache), _length(view)
        if base_length is not None and shadow_length is not None and base_length != shadow_length:
            raise CacheMismatchError(
                f"the cache holds {base_length} tokens of the base and {shadow_length} of the shadow; some were read with "
                "the adapter disabled, start from an empty cache"
            )
    return view


def _length(cache_or_layer: Any) -> int | None:
    """Tokens held, or None where that is not defined (recurrent layers)."""
    if isinstance(cache_or_layer, Cache):
        lengths = [_length(layer) for layer in cache_or_layer.layers]
        return next((n for n in lengths if n is not None), None)
    if not hasattr(cache_or_layer, "get_seq_length"):
        return None
    length = cache_or_layer.get_seq_length()
    if isinstance(length, torch.Tensor) and torch.compiler.is_compiling():
        return None  # reading a tensor would break the graph; eager calls do the check
    return int(length)


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
    return list(layers)

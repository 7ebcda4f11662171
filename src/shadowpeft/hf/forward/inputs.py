"""A forward pass's inputs as a shadow needs them: masks, the rows of one adapter, residual streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from shadowpeft.errors import UnsupportedModelError
from shadowpeft.hf.forward.call import Part

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def pick_argument(part: Part, name: str, value: Any, rows: int | None) -> Any:
    """The part's rows of an argument of the backbone, in a batch of ``rows`` (None: the part has all)."""
    if rows is None or value is None:
        return value
    if isinstance(value, dict):
        return {key: pick_argument(part, name, each, rows) for key, each in value.items()}
    if isinstance(value, Tensor) and name not in PACKED:
        axis = 1 if name == "position_ids" and value.dim() == 3 else 0  # several kinds of positions come first
        if value.shape[axis] == 1:
            return value
        if value.shape[axis] == rows:
            return part.pick(value, axis)
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UnsupportedModelError(
        f"{name} is {shape}, which cannot be divided by the {rows} rows of adapter_names; run one batch per adapter"
    )


def shadow_mask(mask: Any, base: PreTrainedConfig, shadow: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The mask for a shadow that computes in ``dtype``. Masks that generation or the caller has prepared for the base (4D, or
    one per layer type) fit a shadow whose layers attend as the base's do; anything else is refused."""
    if not isinstance(mask, dict) and (mask is None or mask.dim() == 2):
        return mask
    mask = _in_dtype(mask, dtype)
    types = set(getattr(shadow, "layer_types", None) or [_only_type(shadow)])
    if isinstance(mask, dict):
        if not types <= set(mask):
            raise UnsupportedModelError(
                f"the prepared masks cover {sorted(mask)} but the shadow attends as {sorted(types)}; pass a 2D "
                "attention_mask or use a dynamic cache"
            )
        return mask if getattr(shadow, "layer_types", None) and len(mask) > 1 else mask[next(iter(types))]
    if types != {_only_type(base)} and not set(getattr(base, "layer_types", None) or ()) >= types:
        raise UnsupportedModelError(
            f"the prepared mask is for {_only_type(base)} but the shadow attends as {sorted(types)}; pass a 2D "
            "attention_mask or use a dynamic cache"
        )
    return mask


def _in_dtype(mask: Any, dtype: torch.dtype) -> Any:
    """Masks that are added to scores, in the dtype of these scores; others as they are."""
    if isinstance(mask, dict):
        return {key: _in_dtype(each, dtype) for key, each in mask.items()}
    return mask.to(dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask


def _only_type(config: PreTrainedConfig) -> str:
    return "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"


def streams_axis(h: Tensor, shape: tuple[int, ...], streams_first: bool) -> int:
    """The axis of ``h`` that counts residual streams, next to batch, tokens and width (``shape``)."""
    first, last = tuple(h.shape[1:]) == shape, (*h.shape[:2], h.shape[-1]) == shape
    if h.dim() != len(shape) + 1 or not (first or last):
        raise UnsupportedModelError(
            f"a decoder layer gets hidden states of shape {tuple(h.shape)} but (batch, tokens, width) or one more axis of "
            f"streams was expected for a shadow state of {shape}; this architecture is not supported"
        )
    return 0 if first and (streams_first or not last) else 2

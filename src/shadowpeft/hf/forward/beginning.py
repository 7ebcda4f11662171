"""What all rows of a batch begin with (a system message, the tools of an agent): run once in training, in the same graph.

The keys and values of the shared tokens are computed for one row and handed to all, so gradients are those of whole rows.
Dropout, where there is any, is drawn once for these tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from shadowpeft.core.losses import IGNORE
from shadowpeft.hf.base.rotary import turns_by_length
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.forward.call import AdapterWeights, checkpoints
from shadowpeft.hf.forward.rows import weights_of
from shadowpeft.hf.layer import ShadowHub

WORTH_SHARING = 8
"""Tokens that all rows must begin with, for them to run once."""
_ROWS = ("input_ids", "attention_mask", "labels", "shadow_labels")
_OTHERS = ("num_items_in_batch", "shadow_num_items_in_batch", "loss_alone")


def shared_tokens(ids: Tensor, mask: Tensor | None, *targets: Tensor | None) -> int:
    """How many tokens ``(B, T)`` all rows begin with, before any target; 0 if too few for it to pay.

    Args:
        mask: ``(B, T)``, 0 for padding. targets: ``(B, T)`` each, the target at every position.
    """
    if len(ids) < 2 or (mask is not None and mask.dim() != 2):
        return 0
    same = (ids == ids[:1]).all(0)
    for each in targets:
        if each is not None:
            same &= (each == IGNORE).all(0)
    if mask is not None:
        same &= mask.all(0)
    shared = int(same.long().cumprod(0).sum())
    return shared if WORTH_SHARING <= shared < ids.shape[1] else 0


def caches_in_graph(backbone: Any) -> bool:
    """Whether keys and values can be carried on within a graph: full attention, rotary positions, no checkpoints.

    Other caches write in place, and other positions are counted in ways of their own. Frequencies that depend on a text's
    length would be others for the beginning alone.
    """
    return (
        not checkpoints(backbone)
        and not turns_by_length(backbone.config)
        and any("rotary" in name for name, _ in backbone.named_children())
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=backbone.config).layers)
    )


def shadow_caches_in_graph(weights: AdapterWeights) -> bool:
    """:func:`caches_in_graph`, of a shadow."""
    return weights.signature.accepts(weights.signature.cache) and caches_in_graph(weights.backbone)


def after_beginning(model: Any, hub: ShadowHub, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a training pass without the tokens that all rows begin with, and a cache in which those were read.

    Args:
        model: the transformers model that carries the active adapter. inputs: of a whole pass: ``input_ids`` and
            ``attention_mask`` ``(B, T)``, padded on the right, ``labels`` and ``shadow_labels``.

    Returns:
        ``inputs`` themselves where nothing can be shared.
    """
    adapter, ids, labels = hub.active_name(), inputs.get("input_ids"), inputs.get("labels")
    known = all(key in (*_ROWS, *_OTHERS) for key in inputs)
    if (
        adapter is None
        or not (known and isinstance(ids, Tensor) and isinstance(labels, Tensor))
        or not hub.facts.label_shift
    ):
        return inputs
    weights, backbone = weights_of(hub, model, adapter), find_decoder(model).backbone
    routers = getattr(model.config, "output_router_logits", False)
    if routers or weights.is_classifier or not (caches_in_graph(backbone) and shadow_caches_in_graph(weights)):
        return inputs
    # the target at a position is the label of the next one
    goals = [None if each is None else each[:, 1:] for each in (labels, inputs.get("shadow_labels"))]
    mask = inputs.get("attention_mask")
    shared = shared_tokens(ids[:, :-1], None if mask is None else mask[:, :-1], *goals)
    if not shared:
        return inputs
    cache = DynamicCache(config=backbone.config)  # type: ignore[arg-type]
    backbone(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(ids))
    rest = {key: inputs[key][:, shared:] for key in _ROWS if isinstance(inputs.get(key), Tensor)}
    whole = {"attention_mask": mask} if isinstance(mask, Tensor) else {}
    return {**inputs, **rest, **whole, "past_key_values": cache, "use_cache": True}

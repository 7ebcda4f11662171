"""Trial runs of a shadow backbone: what it reads, what can learn, whether it caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

from shadowpeft.hf.base.signature import CACHE_NAMES, Signature, keeps_state, trial_mode
from shadowpeft.hf.base.weights import device_of
from shadowpeft.hf.files.reading import BUILD_ERRORS


def _probe(backbone: PreTrainedModel, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = int(backbone.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    ids = torch.randint(0, rows, (1, tokens), generator=generator)
    ids[0, 0] = rows - 1  # something else than padding
    return ids.to(device_of(backbone))


def runs_from_embeddings(backbone: PreTrainedModel) -> bool:
    """Whether tokens and their embeddings give the same result (a backbone may read its tokens a second time)."""
    ids = _probe(backbone, 4)
    closed = [p for p in backbone.parameters() if not bool(p.any())]  # a closed gate hides what it lets in later
    with torch.no_grad(), trial_mode(backbone):
        for parameter in closed:
            parameter.fill_(0.1)
        try:
            embeds = backbone.get_input_embeddings()(ids)  # type: ignore[operator]
            fed = backbone(inputs_embeds=embeds).last_hidden_state
            read = backbone(input_ids=ids).last_hidden_state
            backbone(inputs_embeds=embeds + 1.0)  # Gemma 4 looks up whose embedding it was given
        except BUILD_ERRORS:
            return False
        finally:
            for parameter in closed:
                parameter.zero_()
    return bool(torch.allclose(fed, read, rtol=0, atol=0, equal_nan=True))


def unreached(backbone: PreTrainedModel, reads_tokens: bool) -> list[str]:
    """Names of the tensors whose gradient never arrives: an indexer's choice, attention to an encoder that is not there.

    Tried with a few tokens and, if that leaves any, with many, so that each expert and each compressed block takes part.
    """
    if device_of(backbone).type == "meta":  # nothing to try
        return []
    table = backbone.get_input_embeddings()
    own = {id(p) for p in table.parameters()}  # type: ignore[operator]
    fixed = [n for n, p in backbone.named_parameters() if not p.requires_grad]  # sinusoidal positions
    names = [n for n, p in backbone.named_parameters() if id(p) not in own and p.requires_grad]
    left = names
    for tokens in (8, 512):
        most = [getattr(backbone.config, name, None) for name in ("max_position_embeddings", "max_target_positions")]
        ids = _probe(backbone, min([tokens, *(int(n) for n in most if n)]))
        given: dict[str, Any] = {"input_ids": ids}
        if not reads_tokens:
            width = int(backbone.config.hidden_size)
            noise = torch.randn(1, ids.shape[1], width, generator=torch.Generator().manual_seed(0))
            given = {"inputs_embeds": noise.to(device_of(backbone)).requires_grad_(True) * 1.0}  # CTRL scales in place
        with torch.enable_grad(), trial_mode(backbone):
            out = backbone(**given, use_cache=False).last_hidden_state
            values = dict(backbone.named_parameters())
            gradients = torch.autograd.grad(out.sum(), [values[n] for n in names], allow_unused=True)
        left = [n for n, gradient in zip(names, gradients, strict=True) if gradient is None]
        if not left:
            break
    return fixed + left


def hides_its_state(backbone: PreTrainedModel) -> bool:
    """Whether a recurrent class keeps its state in its modules (RecurrentGemma) and not in the cache that it is given."""
    ids = _probe(backbone, 2)
    cache = DynamicCache(config=backbone.config)
    if ids.device.type == "meta" or not any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers):
        return False
    with torch.no_grad(), trial_mode(backbone):
        backbone(input_ids=ids, use_cache=True, **{Signature(backbone).cache: cache})
    return not keeps_state(cache)


def caches_exactly(backbone: PreTrainedModel) -> bool:
    """Whether a token that follows a cached prompt gives what the whole gives; so too if the class has no cache."""
    ids = _probe(backbone, 4)
    if ids.device.type == "meta":
        return True
    with torch.no_grad(), trial_mode(backbone):
        out = backbone(input_ids=ids[:, :3], use_cache=True)
        cache = {name: out[name] for name in CACHE_NAMES if out.get(name) is not None}
        if not cache:
            return True
        last = backbone(input_ids=ids[:, 3:], use_cache=True, **cache).last_hidden_state[:, -1]
        whole = backbone(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    return bool((last - whole).abs().max() <= 1e-3 * whole.abs().max().clamp(min=1))

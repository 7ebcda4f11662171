"""Where an explicit shadow comes from: a model, a projected checkpoint, and the start of its projection (Eq. 12)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import ProjectionSolution, solve_projection
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.load import load_whole
from shadowpeft.hf.base.structure import DecoderParts
from shadowpeft.hf.base.vocabulary import align_embedding, common_rows
from shadowpeft.hf.base.weights import dense_weight
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.locate import CONFIG
from shadowpeft.hf.files.projected import Projected, is_projected, read_projected
from shadowpeft.hf.shadow.probe import hides_its_state


def as_projected(module: nn.Module) -> Projected | None:
    """The parts of a projected model that is already in memory, recognised by its parts; None for any other module."""
    projection, backbone = getattr(module, "shadow_hidden_projection", None), getattr(module, "shadow_model", None)
    head = getattr(module, "lm_head", None)
    if (
        not isinstance(projection, nn.Linear)
        or not isinstance(backbone, PreTrainedModel)
        or not isinstance(head, nn.Linear)
    ):
        return None
    return Projected(backbone, projection.weight.detach().float(), head.weight.detach().float())


def given_projected(shadow_model: Any) -> Projected | None:
    """``shadow_model`` of a configuration as a projected checkpoint, or None if it is something else."""
    if isinstance(shadow_model, nn.Module):
        return as_projected(shadow_model)
    return read_projected(shadow_model) if is_projected(shadow_model) else None


def start_projection(projected: Projected, model: nn.Module, d: int) -> Tensor | None:
    """The trained ``W_p`` as the start of a shadow's projection onto a base of width ``d``; None for the identity.

    Raises:
        ConfigError: if it was trained for another width, or is not the identity where none is needed.
    """
    width, d_s = projected.projection.shape
    if width != d:
        raise ConfigError(
            f"the projected checkpoint was made for a base of width {width} but this base has width {d}; use the base it "
            "was pretrained for"
        )
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if isinstance(head, Tensor) and head.is_floating_point() and head.device.type != "meta":
        distance = 2.0
        if head.shape == projected.head.shape:
            theirs = projected.head.to(head.device)
            distance = float((head.detach().float() - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if distance > 0.02:  # bfloat16 rounding is at most 0.004
            warnings.warn(
                f"the projected checkpoint was trained for an LM head that differs from this base's by {distance:.2g} "
                "(relative); its projection is only a rough start here",
                stacklevel=2,
            )
    if d_s == d:
        if not torch.equal(projected.projection, torch.eye(d)):
            raise ConfigError(
                f"the projected checkpoint has a projection between equal widths ({d}), and a shadow of the base's width has "
                "none; use a plain checkpoint of the backbone"
            )
        return None
    return projected.projection


@dataclass
class ShadowSource:
    """What an explicit shadow starts from."""

    backbone: PreTrainedModel
    """A copy with its token embedding, which has as many rows as the base's where it is kept."""
    projection: Tensor | None
    """A start for ``W_p`` ``(d, d_s)``, or None for the default."""


def resolve(config: ShadowPeftConfig, parts: DecoderParts, model: nn.Module) -> ShadowSource | None:
    """The explicit shadow that ``config`` names for the base ``model``; None for a mirrored one and for one that was recorded.

    Raises:
        ConfigError: if vocabulary or widths do not fit the base, or two starts of the projection are given.
        UnsupportedModelError: if it is not a decoder, or is quantised.
    """
    if config.is_mirror or config.is_recorded:
        return None
    projected = given_projected(config.shadow_model)
    backbone = _trainable_copy(_explicit_backbone(config.shadow_model) if projected is None else projected.backbone)
    if projected is None and not config.shares_embeddings:
        rows = (int(parts.config.vocab_size), int(backbone.config.get_text_config(decoder=True).vocab_size))
        common_rows(model, backbone, rows)  # refuses other tokens
        if rows[0] != rows[1]:
            align_embedding(backbone, rows[0])
    if hides_its_state(backbone):
        raise UnsupportedModelError(
            f"shadow_model is a {type(backbone).__name__}, which keeps its recurrent state in its modules and not in a cache, "
            "so a base's cache cannot carry it; use another class of shadow"
        )
    text = backbone.config.get_text_config(decoder=True)
    check_widths(parts.config, text, config)
    projection = None
    if projected is not None:
        if config.projection_init != "random":
            raise ConfigError(
                f"projection_init='{config.projection_init}' was given but the projected checkpoint brings its own "
                "projection; remove projection_init"
            )
        projection = start_projection(projected, model, parts.hidden_size)
    elif config.projection_init == "pseudo_inverse" and text.hidden_size != parts.hidden_size:
        small = config.shadow_model
        small = load_source(AutoModelForCausalLM, small) if isinstance(small, str) else small
        projection = projection_start(model, small).weight
    return ShadowSource(backbone, projection)


def _explicit_backbone(source: Any) -> PreTrainedModel:
    """The backbone of the explicit shadow: a PreTrainedModel with token embedding, its head left behind."""
    if isinstance(source, str):
        source = load_source(AutoModel, source)
    if not isinstance(source, PreTrainedModel):
        raise UnsupportedModelError(
            f"shadow_model is a {type(source).__name__}; pass a transformers model, a folder or a Hub id"
        )
    if getattr(source.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"shadow_model is a {type(source).__name__}; a shadow must be decoder-only")
    body = source.base_model
    if not isinstance(body, PreTrainedModel):
        raise UnsupportedModelError(f"shadow_model {type(source).__name__} has no backbone that can run alone")
    return body


def load_source(auto: Any, source: str) -> PreTrainedModel:
    if (Path(source) / CONFIG).is_file():
        raise ConfigError(
            f"shadow_model '{source}' is an adapter; pass the folder of a whole model, such as shadowpeft detach makes of it"
        )
    # a pooler is no part of a decoder, and checkpoints of language models have none
    return load_whole(auto, source, f"shadow_model '{source}'", new=("pooler",), dtype=torch.float32)


def _trainable_copy(source: PreTrainedModel) -> PreTrainedModel:
    if any(type(p).__name__ not in ("Parameter", "Tensor") for p in source.parameters()):
        raise UnsupportedModelError("the shadow model is quantised; load it unquantised, it is trained in float32")
    return copy.deepcopy(source)


def check_widths(base: PreTrainedConfig, shadow: PreTrainedConfig, config: ShadowPeftConfig) -> None:
    if config.shares_embeddings and shadow.hidden_size != base.hidden_size:
        raise ConfigError(
            f"the shadow has width {shadow.hidden_size} and the base {base.hidden_size}, so they cannot share embeddings; "
            "set share_embeddings=False or use equal widths"
        )
    if not config.shares_embeddings and shadow.vocab_size != base.vocab_size:
        raise ConfigError(
            f"the shadow has a vocabulary of {shadow.vocab_size} and the base of {base.vocab_size}; use a shadow with the "
            "base's tokenizer"
        )


def projection_start(
    base: nn.Module,
    small: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProjectionSolution:
    """``W_p*`` of Eq. 12 from the LM heads of two models, which may have other numbers of padding rows.

    With equal numbers of rows all of them count, as in Eq. 12; otherwise those of the tokenizer's tokens.

    Args:
        dtype: of the solution; None: that of the small model's head. progress: see
            :func:`shadowpeft.core.solve_projection`.

    Raises:
        ConfigError: if a model has no head or one that is not finite, or the two have other tokens.
    """
    large_head, small_head = (model.get_output_embeddings() for model in (base, small))  # type: ignore[operator]
    if large_head is None or small_head is None:
        raise ConfigError("projection_init='pseudo_inverse' needs the LM heads of shadow and base; one has none")
    with dense_weight(large_head) as wide, dense_weight(small_head) as narrow:
        rows = common_rows(base, small, (len(wide), len(narrow)))
        return solve_projection(wide, narrow, rows=rows, dtype=dtype, progress=progress)

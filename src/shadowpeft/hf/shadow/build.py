"""Building the shadow backbone that a configuration describes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.structure import DecoderParts, decoder_layers, name_of
from shadowpeft.hf.base.weights import device_of
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.reading import BUILD_ERRORS
from shadowpeft.hf.files.records import config_from_record, record_of
from shadowpeft.hf.shadow.mirror import copied_layers, copy_base_layers, layer_choices, mirror_config
from shadowpeft.hf.shadow.probe import caches_exactly, runs_from_embeddings, unreached
from shadowpeft.hf.shadow.source import ShadowSource, check_widths
from shadowpeft.messages import quote, shorten
from shadowpeft.settings import WIDTHS


class BorrowedEmbedding(nn.Module):
    """Stands in a shadow backbone that reads the tokens themselves (per-layer embeddings, hash routing) and looks them up
    in the base's embedding. It has no parameters; the base's backbone is referred to, not owned."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, so that the base does not become a child

    def forward(self, input_ids: Tensor) -> Tensor:
        """``(B, T)`` tokens to float32 embeddings ``(B, T, d)``."""
        embeds: Tensor = self._base[0].get_input_embeddings()(input_ids)  # type: ignore[operator]
        return embeds.float()


def replace_embeddings(backbone: PreTrainedModel, replacement: nn.Module | None) -> nn.Module:
    """Put ``replacement`` in place of a backbone's token embedding and return that; with None the backbone is fed with
    ``inputs_embeds``."""
    embedding = backbone.get_input_embeddings()
    parent, _, child = name_of(backbone, embedding).rpartition(".")
    setattr(backbone.get_submodule(parent), child, replacement)
    return embedding


@dataclass
class ShadowParts:
    """What :func:`build_shadow` makes."""

    backbone: PreTrainedModel
    """Float32, without token embedding."""
    embedding: nn.Module | None
    """The shadow's own token embedding, or None if the base's is shared."""
    projection: Tensor | None
    """A start for ``W_p`` ``(d, d_s)``, or None for the default."""


def build_shadow(parts: DecoderParts, config: ShadowPeftConfig, source: ShadowSource | None = None) -> ShadowParts:
    """Make the shadow backbone that ``config`` describes for a base.

    Sets ``config.shadow_backbone_config``. A configuration that was read from a file is rebuilt from that record, so an
    adapter needs neither the shadow's source nor the rules by which it was derived.

    Args:
        source: what an explicit shadow starts from (:func:`~shadowpeft.hf.shadow.source.resolve`); None for any other.

    Raises:
        ConfigError: if vocabulary or widths do not fit the base.
    """
    reads_tokens, frozen = False, None
    backbone: Any
    if source is not None:
        backbone = source.backbone
        backbone.set_attn_implementation(attention_for(parts, type(backbone)))  # as it will be when it is loaded
        shadow_config = backbone.config.get_text_config(decoder=True)
    elif config.is_recorded:
        mirror = config.is_mirror
        shadow_config = config_from_record(config.shadow_backbone_config, type(parts.config) if mirror else None)
        shadow_class: Any = type(parts.backbone) if mirror else MODEL_MAPPING[type(shadow_config)]
        _check_record(config, shadow_config)
        check_widths(parts.config, shadow_config, config)
        backbone = _make(parts, config, shadow_class, shadow_config, whole=mirror and config.shadow_reads_tokens)
    else:
        shadow_config, backbone, reads_tokens, frozen = _first_that_runs(parts, config, type(parts.backbone))
    if source is None and config.copies_layers and device_of(backbone).type != "meta":
        chosen = copied_layers(parts.config, len(decoder_layers(backbone)), config.shadow_init)
        try:
            copy_base_layers(parts, backbone, chosen)
        except ConfigError:
            # a recorded shadow is copied too, since an adapter that starts anew may have a saved configuration; one that is
            # loaded gets its weights from the file, on a quantised base as well
            if not config.is_recorded:
                raise
    if not config.is_recorded:
        config.shadow_reads_tokens = config.shares_embeddings and reads_tokens
        config.shadow_frozen = unreached(backbone, reads_tokens) if frozen is None else frozen
    strange = sorted(set(config.shadow_frozen or ()) - {name for name, _ in backbone.named_parameters()})
    if strange:
        raise ConfigError(f"shadow_frozen names {quote(strange[0])}, which the shadow backbone does not have")
    own = replace_embeddings(backbone, BorrowedEmbedding(parts.backbone) if config.shadow_reads_tokens else None)
    backbone.to(dtype=torch.float32)
    if "meta" not in (device_of(parts.backbone).type, device_of(backbone).type):  # PEFT may load with low_cpu_mem_usage
        backbone.to(device_of(parts.backbone))
    backbone.train(parts.backbone.training)
    config.shadow_backbone_config = record_of(shadow_config)
    embedding = None if config.shares_embeddings else own
    return ShadowParts(backbone, embedding, None if source is None else source.projection)


def _check_record(config: ShadowPeftConfig, recorded: PreTrainedConfig) -> None:
    """Refuse settings of the shadow's shape that were changed after it was recorded.

    Raises:
        ConfigError: naming the setting.
    """
    for setting, names in {"shadow_num_hidden_layers": ("num_hidden_layers",), **WIDTHS}.items():
        asked = getattr(config, setting)
        held = [size for size in (getattr(recorded, name, None) for name in names) if isinstance(size, int)]
        if asked is not None and held and asked not in held:
            raise ConfigError(
                f"{setting} is {asked} but the configuration records a shadow with {held[0]}; for another shadow make a "
                f"configuration of its own: dataclasses.replace(config, {setting}={asked})"
            )


def attention_for(parts: DecoderParts, kind: Any) -> str:
    """How a shadow of class ``kind`` attends: as the base does, where its class can and its weights, in float32, allow it."""
    attention = getattr(parts.config, "_attn_implementation", None) or "eager"
    if "flash" in attention or (attention == "flex_attention" and not kind._supports_flex_attn):
        attention = "sdpa"
    return "eager" if attention == "sdpa" and not kind._supports_sdpa else attention


def _make(
    parts: DecoderParts, config: ShadowPeftConfig, kind: Any, shadow: PreTrainedConfig, *, whole: bool = False
) -> PreTrainedModel:
    """A random backbone of class ``kind`` in float32 beside the base; ``whole``: with its full token embedding."""
    attention = attention_for(parts, kind)
    built = copy.deepcopy(shadow)
    if config.shares_embeddings and not whole:
        # the table is taken out again; do not allocate vocabulary x width for it (two rows: the padding's and another)
        built.vocab_size, built.pad_token_id = 2, 0
    with torch.device(device_of(parts.backbone)):
        backbone: PreTrainedModel = kind._from_config(built, attn_implementation=attention, dtype=torch.float32)
    backbone.config.vocab_size = shadow.vocab_size
    backbone.config.pad_token_id = getattr(shadow, "pad_token_id", None)  # CodeGen's class has no such field
    return backbone


def _new_backbone(
    parts: DecoderParts, config: ShadowPeftConfig, kind: Any, shadow: PreTrainedConfig
) -> tuple[PreTrainedModel, bool]:
    """A random backbone and whether it must be run from tokens, since its layers read them."""
    state = torch.get_rng_state()
    backbone = _make(parts, config, kind, shadow)
    if device_of(backbone).type == "meta" or not config.shares_embeddings or runs_from_embeddings(backbone):
        return backbone, False
    torch.set_rng_state(state)
    return _make(parts, config, kind, shadow, whole=True), True


def _first_that_runs(
    parts: DecoderParts, config: ShadowPeftConfig, kind: Any
) -> tuple[PreTrainedConfig, PreTrainedModel, bool, list[str]]:
    """Configuration and backbone of a mirrored shadow: the first of :func:`layer_choices` that its own class accepts,
    preferably one of which every tensor can learn; whether it reads tokens; and what cannot learn.

    Raises:
        UnsupportedModelError: if none can be built.
    """
    refusals, partly = [], None
    for choice in layer_choices(parts.config, config):
        state = torch.get_rng_state()
        try:
            shadow = mirror_config(parts.config, config, choice)
            check_widths(parts.config, shadow, config)
        except ConfigError:
            raise  # what was asked for is impossible, whatever the layer
        except BUILD_ERRORS as error:
            refusals.append(shorten(error))
            continue
        try:
            shadow = config_from_record(record_of(shadow), type(parts.config))
            backbone, reads_tokens = _new_backbone(parts, config, kind, shadow)
            left = unreached(backbone, reads_tokens)
            if not caches_exactly(backbone):
                raise UnsupportedModelError("cached and uncached states differ")
        except BUILD_ERRORS as error:
            torch.set_rng_state(state)
            refusals.append(shorten(error))
            continue
        if not left:
            return shadow, backbone, reads_tokens, []
        torch.set_rng_state(state)
        partly = partly or (shadow, backbone, reads_tokens, left)
    if partly is None:
        raise UnsupportedModelError(
            f"no layer of {kind.__name__} can be built alone as a shadow ({refusals[0]}); pass shadow_model, a small model "
            "with the base's tokenizer"
        )
    return partly

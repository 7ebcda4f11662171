"""What a mirrored shadow is modelled on: layers of the base, their widths, and copies of their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.structure import DecoderParts, decoder_layers, num_decoder_layers
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.settings import WIDTHS

_ORDINARY_TYPES = ("full_attention", "sliding_attention")


_LINEAR_TYPES = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class LayerChoice:
    """Which layers of the base the layers of a mirrored shadow are modelled on."""

    indices: list[int]
    """For each layer of the shadow the layer of the base whose entries in per-layer lists it takes."""
    kind: str | None = None
    """An attention type that the base's own layers do not have, or None for that of ``indices``."""


def layer_choices(base: PreTrainedConfig, config: ShadowPeftConfig) -> list[LayerChoice]:
    """What a mirrored shadow may be modelled on, best first.

    The first full-attention layer, else one with a sliding window, else the first that is not recurrent, else the first.
    Some architectures refuse or cannot run some type alone: then each other type in turn, and at last, if no depth is
    asked for, one layer of each type. A shadow that copies layers of the base: those only.
    """
    depth = config.shadow_num_hidden_layers or 1
    if config.copies_layers:
        return [LayerChoice(copied_layers(base, depth, config.shadow_init))]
    types = list(getattr(base, "layer_types", None) or [])
    ordinary = [kind for kind in _ORDINARY_TYPES if kind in types]
    order = [types.index(kind) for kind in ordinary]
    order += [i for i, kind in enumerate(types) if kind not in _LINEAR_TYPES]
    order += list(range(num_decoder_layers(base)))
    lists = [value for value in _per_layer(base).values() if len(value) == num_decoder_layers(base)]
    kinds: dict[str, int] = {}
    for index in order:
        kinds.setdefault(repr([value[index] for value in lists]), index)
    choices = [LayerChoice([index] * depth) for index in kinds.values()]
    if "layer_types" in vars(base) and not ordinary:
        # every layer is of a special type (compressed, indexed); an ordinary one does for a shadow, where it is allowed
        choices = [LayerChoice([index] * depth, kind) for kind in _ORDINARY_TYPES for index in kinds.values()] + choices
    if config.shadow_num_hidden_layers is None and len(kinds) > 1:
        choices.append(LayerChoice(sorted(kinds.values())))
    return choices


def _per_layer(base: PreTrainedConfig) -> dict[str, Any]:
    """The stored fields of a configuration that say something of each layer, or name a cycle of layer types."""
    length = num_decoder_layers(base)
    fields = {}
    for key, value in vars(base).items():
        if isinstance(value, (list, tuple)) and value and not key.startswith("_"):
            cycle = key.endswith("_types") and all(isinstance(kind, str) for kind in value) and len(value) < length
            if len(value) == length or cycle:
                fields[key] = value
    return fields


def mirror_config(
    base: PreTrainedConfig, config: ShadowPeftConfig, choice: LayerChoice | None = None
) -> PreTrainedConfig:
    """The base's configuration with fewer and, where asked, narrower layers.

    Args:
        choice: the layers whose entries in per-layer lists it takes; None: the first of :func:`layer_choices`.

    Raises:
        ConfigError: if a width is asked for that the architecture does not have or that does not divide.
    """
    choice = layer_choices(base, config)[0] if choice is None else choice
    varied = getattr(base, "is_heterogeneous", False)  # widths of its own in each layer: take those of the chosen one
    new = copy.deepcopy(base.per_layer_config[choice.indices[0]] if varied else base)
    depth = len(choice.indices)
    for key, value in _per_layer(base).items():
        setattr(new, key, [value[i % len(value)] for i in choice.indices])
    for key, value in vars(base).items():
        if key.endswith(("layer_indices", "_attn_idxs")) and value:  # Bamba: the numbers of its attention layers
            setattr(new, key, [place for place, index in enumerate(choice.indices) if index in value])
    if choice.kind is not None:
        new.layer_types = [choice.kind] * depth
    new.num_hidden_layers = depth
    for name in ("decoder_layers", "encoder_layers"):
        if hasattr(new, name):
            setattr(new, name, depth)
    for counter, most in (("max_window_layers", depth), ("num_kv_shared_layers", 0)):
        if getattr(new, counter, None) is not None:
            setattr(new, counter, min(getattr(new, counter), most))
    set_widths(new, {setting: getattr(config, setting) for setting in WIDTHS})
    heads, kv_heads = getattr(new, "num_attention_heads", None), getattr(new, "num_key_value_heads", None)
    if heads is not None and kv_heads is not None:
        if config.shadow_num_key_value_heads is None and kv_heads > heads:
            new.num_key_value_heads = kv_heads = heads
        if heads % kv_heads:
            raise ConfigError(
                f"the shadow has {heads} attention heads and {kv_heads} key-value heads, which does not divide; set "
                "shadow_num_key_value_heads"
            )
    if heads is not None and getattr(new, "head_dim", None) is None and new.hidden_size % heads:
        raise ConfigError(f"{heads} attention heads do not divide the shadow's width {new.hidden_size}")
    new.tie_word_embeddings = bool(getattr(base, "tie_word_embeddings", False))
    return new


def width_name(config: PreTrainedConfig, setting: str) -> str | None:
    """What an architecture calls the width that our ``setting`` changes; None if it has no such width."""
    return next((name for name in WIDTHS[setting] if hasattr(config, name)), None)


def set_widths(config: PreTrainedConfig, widths: Mapping[str, int | None]) -> None:
    """Set the widths, by our setting, that are not None.

    Raises:
        ConfigError: if the architecture does not have one.
    """
    for setting, value in widths.items():
        if value is not None:
            name = width_name(config, setting)
            if name is None:
                raise ConfigError(f"{setting}={value} was given but {config.model_type} has no such width; remove it")
            setattr(config, name, value)


def copied_layers(base: PreTrainedConfig, depth: int, init: str = "base_layers") -> list[int]:
    """Indices of ``depth`` of the base's ``n`` attention layers: its first ones for "base_layers"; from the first to the last
    at equal distances, ``round(i (n - 1) / (depth - 1))``, for "base_layers_spread" (the first, if it is one only).

    Layers of a recurrent kind are passed over: a base reads its own recurrent state through the shared cache.

    Raises:
        ConfigError: if the base has fewer.
    """
    types = getattr(base, "layer_types", None) or ["full_attention"] * int(base.num_hidden_layers)
    copyable = [i for i, kind in enumerate(types) if kind not in _LINEAR_TYPES]
    if len(copyable) < depth:
        raise ConfigError(
            f"a shadow of {depth} layers of the base was asked for but the base has {len(copyable)} attention layers to copy; "
            "ask for fewer"
        )
    if init == "base_layers" or depth == 1:
        return copyable[:depth]
    return [copyable[round(i * (len(copyable) - 1) / (depth - 1))] for i in range(depth)]


def copy_base_layers(parts: DecoderParts, backbone: PreTrainedModel, chosen: list[int]) -> None:
    """A shadow that starts from the base: everything but the token embedding becomes a copy of the base's own."""
    mine, theirs = decoder_layers(backbone), parts.layers
    with torch.no_grad():
        for layer, index in zip(mine, chosen, strict=True):
            _copy_into(layer, theirs[index])
        for name, child in backbone.named_children():
            if child is not mine and child is not backbone.get_input_embeddings():
                _copy_into(child, parts.backbone.get_submodule(name))


def _copy_into(target: nn.Module, source: nn.Module) -> None:
    state = {k: v for k, v in source.state_dict().items() if "shadow_link" not in k}
    for key, value in target.state_dict().items():
        fits = key in state and state[key].shape == value.shape and type(state[key]) is Tensor
        fits = fits and state[key].is_floating_point() == value.is_floating_point()
        if not fits or (state[key].is_meta and not value.is_meta):
            present = f"{tuple(state[key].shape)}, {state[key].dtype}" if key in state else "nothing"
            raise ConfigError(
                f"a shadow that copies layers needs a base tensor of shape {tuple(value.shape)} for '{key}' but has "
                f"{present}; a quantised or offloaded base cannot be copied, use shadow_init='random'"
            )
        value.copy_(state[key])

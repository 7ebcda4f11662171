"""Where things are inside a transformers model, and how a shadow backbone is made for it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import pseudo_inverse_projection
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.weights import device_of, real_weight

_WIDTH_FIELDS = {
    "shadow_intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "shadow_num_attention_heads": ("num_attention_heads",),
    "shadow_num_key_value_heads": ("num_key_value_heads",),
    "shadow_head_dim": ("head_dim",),
    "shadow_hidden_size": ("hidden_size",),
}
_LINEAR_TYPES = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder-only model that the method needs."""

    backbone: nn.Module
    """The module that owns the decoder layers, such as ``LlamaModel``."""
    backbone_name: str
    """Its name inside the whole model; empty if it is the whole model."""
    layers: nn.ModuleList
    layers_name: str
    """Name of the list of layers inside the whole model."""
    config: PreTrainedConfig
    """The text configuration."""

    @property
    def hidden_size(self) -> int:
        """``d``."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """``L``."""
        return len(self.layers)


def anatomy(model: nn.Module) -> Anatomy:
    """Find backbone and decoder layers of ``model``.

    Raises:
        UnsupportedModelError: for encoder-decoder models, models without decoder layers, and models with one layer.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"the base is a {type(model).__name__} without a transformers configuration; pass a transformers model"
        )
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; a shadow needs a decoder-only model"
        )
    length = int(text.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == length and _is_layer_list(name):
            parent = name.rpartition(".")[0]
            if length < 2:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has one decoder layer; a shadow corrects layers 1 to L-1 and needs two"
                )
            backbone = model.get_submodule(parent)
            if not isinstance(backbone, PreTrainedModel):
                raise UnsupportedModelError(
                    f"the decoder layers of {type(model).__name__} belong to a {type(backbone).__name__}, which is no model "
                    "by itself; a shadow needs a decoder-only transformers model"
                )
            return Anatomy(backbone, parent, module, name, text)
    raise UnsupportedModelError(
        f"no list of {length} decoder layers was found in {type(model).__name__}; only decoder-only transformers models "
        "are supported"
    )


def _is_layer_list(name: str) -> bool:
    return name.rpartition(".")[2] in ("layers", "h", "blocks", "layer", "block") and "shadow_hub" not in name


def mirror_config(base: PreTrainedConfig, config: ShadowPeftConfig) -> PreTrainedConfig:
    """The base's configuration with fewer and, where asked, narrower layers.

    Per-layer lists (layer types and the like) repeat the entry of the base's first full-attention layer; with
    ``shadow_init="base_layers"`` they keep those of the layers that are copied.

    Raises:
        ConfigError: if a width is asked for that the architecture does not have or that does not divide.
    """
    new = copy.deepcopy(base)
    length = int(base.num_hidden_layers)
    depth = config.shadow_num_hidden_layers or 1
    if config.shadow_init == "base_layers":
        chosen = copied_layers(base, depth)
    else:
        types = list(getattr(base, "layer_types", None) or [])
        chosen = [types.index("full_attention") if "full_attention" in types else 0] * depth
    for key, value in list(vars(base).items()):
        if isinstance(value, (list, tuple)) and len(value) == length and not key.startswith("_"):
            setattr(new, key, [value[i] for i in chosen])
    new.num_hidden_layers = depth
    for ours, theirs in _WIDTH_FIELDS.items():
        wanted = getattr(config, ours)
        if wanted is None:
            continue
        name = next((n for n in theirs if hasattr(new, n)), None)
        if name is None:
            raise ConfigError(f"{ours}={wanted} was given but {base.model_type} has no such width; remove it")
        setattr(new, name, wanted)
    heads, kv_heads = new.num_attention_heads, getattr(new, "num_key_value_heads", None)
    if kv_heads is not None:
        if config.shadow_num_key_value_heads is None and kv_heads > heads:
            new.num_key_value_heads = kv_heads = heads
        if heads % kv_heads:
            raise ConfigError(
                f"the shadow has {heads} attention heads and {kv_heads} key-value heads, which does not divide; set "
                "shadow_num_key_value_heads"
            )
    if getattr(new, "head_dim", None) is None and new.hidden_size % heads:
        raise ConfigError(f"{heads} attention heads do not divide the shadow's width {new.hidden_size}")
    if getattr(new, "max_window_layers", None) is not None:
        new.max_window_layers = min(new.max_window_layers, depth)
    new.tie_word_embeddings = bool(getattr(base, "tie_word_embeddings", False))
    return new


def copied_layers(base: PreTrainedConfig, depth: int) -> list[int]:
    """Indices of the base's first ``depth`` attention layers, for ``shadow_init="base_layers"``.

    Layers of a recurrent kind are passed over: a base reads its own recurrent state through the shared cache.
    """
    types = getattr(base, "layer_types", None) or ["full_attention"] * int(base.num_hidden_layers)
    chosen = [i for i, kind in enumerate(types) if kind not in _LINEAR_TYPES][:depth]
    if len(chosen) < depth:
        raise ConfigError(
            f"shadow_init='base_layers' with {depth} layers was asked for but the base has {len(chosen)} attention "
            "layers to copy; lower shadow_num_hidden_layers"
        )
    return chosen


def split_embeddings(backbone: PreTrainedModel) -> nn.Module:
    """Take the token embedding out of a backbone and return it; the backbone is then fed with ``inputs_embeds``."""
    embedding = backbone.get_input_embeddings()
    for name, module in backbone.named_modules():
        if module is embedding:
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, None)
            return embedding
    raise UnsupportedModelError(f"the token embedding of {type(backbone).__name__} is not part of its backbone")


@dataclass
class ShadowParts:
    """What :func:`build_shadow` makes."""

    backbone: PreTrainedModel
    """Float32, without token embedding."""
    embedding: nn.Module | None
    """The shadow's own token embedding, or None if the base's is shared."""
    projection: Tensor | None
    """A start for ``W_p`` ``(d, d_s)``, or None for the default."""


def build_shadow(parts: Anatomy, config: ShadowPeftConfig, model: nn.Module) -> ShadowParts:
    """Make the shadow backbone that ``config`` describes for the base ``model``.

    Sets ``config.shadow_backbone_config``. A configuration that was read from a file is rebuilt from that record, so an
    adapter needs neither the shadow's source nor the rules by which it was derived.

    Raises:
        ConfigError: if vocabulary or widths do not fit the base.
        UnsupportedModelError: if the given module is not a decoder.
    """
    loaded = config._loaded and config.shadow_backbone_config is not None
    embedding: nn.Module | None
    source: PreTrainedModel | None = None
    if config.is_mirror:
        shadow_config = (
            _config_from_record(config.shadow_backbone_config, type(parts.config))
            if loaded
            else mirror_config(parts.config, config)
        )
        shadow_class: Any = type(parts.backbone)
    else:
        if loaded:
            shadow_config = _config_from_record(config.shadow_backbone_config, None)
            shadow_class = type(AutoModel.from_config(_tiny(shadow_config)))
        else:
            source = _explicit_source(config)
            shadow_config = source.config.get_text_config(decoder=True)
            shadow_class = type(source)
    _check_fits(parts.config, shadow_config, config)
    if source is not None:
        backbone = _plain_copy(source)
    else:
        attention = getattr(parts.config, "_attn_implementation", None) or "eager"
        attention = "sdpa" if "flash" in attention else attention  # the shadow's weights are float32
        built = copy.deepcopy(shadow_config)
        if config.shares_embeddings:
            # the table is taken out again below; do not allocate vocabulary x width for it
            built.vocab_size, built.pad_token_id = 1, None
        with torch.device(device_of(parts.backbone)):
            backbone = shadow_class._from_config(built, attn_implementation=attention, dtype=torch.float32)
        backbone.config.vocab_size = shadow_config.vocab_size
        backbone.config.pad_token_id = shadow_config.pad_token_id
    if config.shadow_init == "base_layers" and not loaded:
        _copy_base_layers(parts, backbone, copied_layers(parts.config, len(anatomy_of_backbone(backbone))))
    own = split_embeddings(backbone)
    embedding = None if config.shares_embeddings else own
    backbone.to(dtype=torch.float32)
    if "meta" not in (device_of(parts.backbone).type, device_of(backbone).type):  # PEFT may load with low_cpu_mem_usage
        backbone.to(device_of(parts.backbone))
    projection = None
    if config.projection_init == "pseudo_inverse" and not loaded and shadow_config.hidden_size != parts.hidden_size:
        projection = _projection_start(config, model)
    backbone.train(parts.backbone.training)
    config.shadow_backbone_config = json.loads(shadow_config.to_json_string(use_diff=False))
    return ShadowParts(backbone, embedding, projection)


def anatomy_of_backbone(backbone: nn.Module) -> nn.ModuleList:
    """The decoder layers of a bare backbone, of any length."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and _is_layer_list(name):
            return module
    raise UnsupportedModelError(f"no decoder layers were found in {type(backbone).__name__}")


def _plain_copy(source: PreTrainedModel) -> PreTrainedModel:
    if any(type(p).__name__ not in ("Parameter", "Tensor") for p in source.parameters()):
        raise UnsupportedModelError("the shadow model is quantised; load it unquantised, it is trained in float32")
    return copy.deepcopy(source)


def _config_from_record(record: dict[str, Any] | None, config_class: type[PreTrainedConfig] | None) -> PreTrainedConfig:
    if not isinstance(record, dict) or not isinstance(record.get("model_type"), str):
        raise ConfigError("shadow_backbone_config must be the JSON object of a transformers configuration")
    values = dict(record)
    kind = values.pop("model_type")
    for drop in ("transformers_version", "architectures", "auto_map", "_name_or_path", "quantization_config"):
        values.pop(drop, None)
    try:
        if config_class is not None and config_class.model_type == kind:
            return config_class(**values)
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(f"shadow_backbone_config describes no {kind} model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _pretrained(auto: Any, source: str) -> PreTrainedModel:
    try:
        return auto.from_pretrained(source, dtype=torch.float32)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ConfigError(f"shadow_model '{source}' could not be loaded: {_first_line(error)}") from error


def _tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    new = copy.deepcopy(config)
    new.vocab_size, new.pad_token_id = 1, None
    return new


def _explicit_source(config: ShadowPeftConfig) -> PreTrainedModel:
    """The backbone of the explicit shadow: a PreTrainedModel with token embedding, its head left behind."""
    source = config.shadow_model
    if isinstance(source, str):
        source = _pretrained(AutoModel, source)
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


def _check_fits(base: PreTrainedConfig, shadow: PreTrainedConfig, config: ShadowPeftConfig) -> None:
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


def _copy_base_layers(parts: Anatomy, backbone: PreTrainedModel, chosen: list[int]) -> None:
    """``shadow_init="base_layers"``: everything but the token embedding becomes a copy of the base's own."""
    mine, theirs = anatomy_of_backbone(backbone), parts.layers
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
            found = f"{tuple(state[key].shape)}, {state[key].dtype}" if key in state else "nothing"
            raise ConfigError(
                f"shadow_init='base_layers' needs a base tensor of shape {tuple(value.shape)} for '{key}' but found "
                f"{found}; a quantised or offloaded base cannot be copied, use shadow_init='random'"
            )
        value.copy_(state[key])


def _projection_start(config: ShadowPeftConfig, model: nn.Module) -> Tensor:
    source = config.shadow_model
    if isinstance(source, str):
        source = _pretrained(AutoModelForCausalLM, source)
    small = source.get_output_embeddings()
    large = model.get_output_embeddings()  # type: ignore[operator]
    if small is None or large is None:
        raise ConfigError("projection_init='pseudo_inverse' needs the LM heads of shadow and base; one has none")
    with real_weight(large) as wide, real_weight(small) as narrow:
        return pseudo_inverse_projection(wide, narrow)

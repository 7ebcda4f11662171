"""What the readers and writers of other packages' adapters share: names, tensors, and the shadow backbone they mean."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.head import logit_scale, soft_cap
from shadowpeft.hf.base.structure import DecoderParts, find_decoder
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.projected import is_projected, projected_config
from shadowpeft.hf.files.reading import BUILD_ERRORS
from shadowpeft.hf.layer import find_hub
from shadowpeft.hf.shadow.source import as_projected
from shadowpeft.messages import did_you_mean, shorten
from shadowpeft.settings import WIDTHS

_ROOT = "base_model.model."
# keys of a configuration that say nothing about what the backbone computes
_IRRELEVANT = {
    "use_cache",
    "dtype",
    "torch_dtype",
    "architectures",
    "_name_or_path",
    "transformers_version",
    "tie_word_embeddings",
    "num_labels",
    "id2label",
    "label2id",
    "problem_type",
}


@dataclass
class Translation:
    """Another package's adapter in this package's terms."""

    config: ShadowPeftConfig
    state: dict[str, Tensor]
    """Float32 tensors under the names of this package's adapter files."""
    dropped: list[str] = field(default_factory=list)
    """What the file holds and nothing reads, each with the reason."""
    notes: list[str] = field(default_factory=list)
    """What the file does not say or this package does differently."""


def head_notes(config: PreTrainedConfig) -> list[str]:
    """Both packages read ``s^(0)`` with the bare matrix of the base's head; here the shadow has the complete head."""
    if (logit_scale(config), soft_cap(config)) == (1.0, None):
        return []
    return [
        "the base scales or soft-caps its logits; the producer left that out on the shadow's path, so shadow logits and "
        "shadow loss differ here (the adapted model's do not)"
    ]


# ---------------------------------------------------------------------------------------------------------------- names


def hub_name(parts: DecoderParts, what: str) -> str:
    """Name of a tensor of the hub in an adapter file, such as ``norm.weight``."""
    return f"{_ROOT}{parts.backbone_name}.shadow_hub.shadowpeft_{what}"


def link_name(parts: DecoderParts, layer: int, what: str) -> str:
    """Name of a tensor of the link before base layer ``layer``, such as ``injection.w_down``."""
    return f"{_ROOT}{parts.layers_name}.{layer}.shadow_link.shadowpeft_{what}"


def base_name(module: str) -> str:
    """Name of a tensor of a saved base module (``modules_to_save``), such as ``score.weight``."""
    return _ROOT + module


def name_of(model: nn.Module, part: nn.Module) -> str:
    """The name of ``part`` inside ``model``.

    Raises:
        UnsupportedModelError: if it is no part of it.
    """
    for name, module in model.named_modules():
        if module is part:
            return name
    raise UnsupportedModelError(
        f"a {type(part).__name__} is no part of {type(model).__name__}; pass an unmodified base"
    )


# -------------------------------------------------------------------------------------------------------------- tensors


def fuse_update(tensors: Mapping[str, Tensor], t_in: str, t_out: str, g_in: str, g_out: str) -> dict[str, Tensor]:
    """Two nets of two layers each to ``w_in`` ``(2m, d)``, ``w_out`` ``(2, d, m)`` and, with biases, ``b_in``, ``b_out``.

    Args:
        t_in, t_out: names of the candidate's layers, ``W_1`` and ``W_2`` (Eq. 13). g_in, g_out: the gate's, ``W_3`` and
            ``W_4`` (Eq. 14).
    """
    fused = {
        "w_in": torch.cat([tensors[f"{t_in}.weight"], tensors[f"{g_in}.weight"]]),
        "w_out": torch.stack([tensors[f"{t_out}.weight"], tensors[f"{g_out}.weight"]]),
    }
    if f"{t_in}.bias" in tensors:
        fused["b_in"] = torch.cat([tensors[f"{t_in}.bias"], tensors[f"{g_in}.bias"]])
        fused["b_out"] = torch.stack([tensors[f"{t_out}.bias"], tensors[f"{g_out}.bias"]])
    return fused


def split_update(fused: Mapping[str, Tensor], t_in: str, t_out: str, g_in: str, g_out: str) -> dict[str, Tensor]:
    """The inverse of :func:`fuse_update`."""
    m = fused["w_in"].shape[0] // 2
    split = {
        f"{t_in}.weight": fused["w_in"][:m],
        f"{g_in}.weight": fused["w_in"][m:],
        f"{t_out}.weight": fused["w_out"][0],
        f"{g_out}.weight": fused["w_out"][1],
    }
    if "b_in" in fused:
        split[f"{t_in}.bias"], split[f"{g_in}.bias"] = fused["b_in"][:m], fused["b_in"][m:]
        split[f"{t_out}.bias"], split[f"{g_out}.bias"] = fused["b_out"][0], fused["b_out"][1]
    return split


# ------------------------------------------------------------------------------------------------------------- backbone


@dataclass(frozen=True)
class ShadowLayout:
    """The shadow backbone as the other packages keep it: whole, with or without its token table."""

    config: PreTrainedConfig
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tensors in the file, by name inside the backbone."""
    table: str
    """Name of the token table, such as ``embed_tokens.weight``."""
    shared: bool
    """Whether the base's embedding feeds the shadow."""
    trained: bool
    """Whether the shadow's own table is trained (a mirrored shadow's) or frozen (a pretrained one's)."""

    @property
    def width(self) -> int:
        """``d_s``."""
        return int(self.config.hidden_size)

    @property
    def record(self) -> dict[str, Any]:
        """For ``shadow_backbone_config``."""
        record: dict[str, Any] = json.loads(self.config.to_json_string(use_diff=False))
        return record

    def dead_table(self) -> bool:
        """Whether the file holds a token table that is never read: both packages take out only an ``embed_tokens``."""
        return self.shared and self.table in self.shapes


def layout(parts: DecoderParts, config: PreTrainedConfig, *, mirror: bool, shared: bool) -> ShadowLayout:
    """Names and shapes of a shadow backbone, without allocating it.

    Raises:
        ConfigError: if the configuration describes no model.
    """
    try:
        with torch.device("meta"):
            backbone: Any = type(parts.backbone)(copy.deepcopy(config)) if mirror else AutoModel.from_config(config)
    except BUILD_ERRORS as error:
        raise ConfigError(
            f"the sizes in the adapter's configuration describe no {config.model_type} model ({shorten(error)}); it is damaged"
        ) from error
    shapes = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
    table = name_of(backbone, backbone.get_input_embeddings()) + ".weight"
    if shared and table == "embed_tokens.weight":
        del shapes[table]
    return ShadowLayout(config, shapes, table, shared, trained=mirror)


def mirrored(base: PreTrainedConfig, depth: int, sizes: Mapping[str, int | None]) -> PreTrainedConfig:
    """The base's configuration cut to ``depth`` layers, as both packages do: per-layer lists keep their first entries.

    Raises:
        ConfigError: if a size is given that the architecture does not have.
    """
    new = copy.deepcopy(base)
    length = int(base.num_hidden_layers)
    for key, value in list(vars(base).items()):
        if isinstance(value, (list, tuple)) and len(value) == length and not key.startswith("_"):
            setattr(new, key, [*value, *[value[-1]] * (depth - length)][:depth])
    new.num_hidden_layers = depth
    for ours, names in WIDTHS.items():
        if sizes.get(ours) is not None:
            name = next((n for n in names if hasattr(new, n)), None)
            if name is None:
                raise ConfigError(f"{ours}={sizes[ours]} is set but {base.model_type} has no such size; check the base")
            setattr(new, name, sizes[ours])
    if getattr(new, "max_window_layers", None) is not None:
        new.max_window_layers = min(new.max_window_layers, depth)
    return new


def sizes_of(base: PreTrainedConfig, shadow: PreTrainedConfig, known: tuple[str, ...]) -> dict[str, int]:
    """The sizes among ``known`` in which a mirrored shadow differs from its base.

    Raises:
        ConfigError: if those do not describe it, naming what else differs.
    """
    sizes = {}
    for ours in known:
        name = next((n for n in WIDTHS[ours] if hasattr(base, n)), None)
        if name is not None and getattr(shadow, name, None) != getattr(base, name):
            sizes[ours] = int(getattr(shadow, name))
    meant = json.loads(mirrored(base, int(shadow.num_hidden_layers), sizes).to_json_string(use_diff=False))
    given = json.loads(shadow.to_json_string(use_diff=False))
    differing = sorted(
        key for key in set(meant) | set(given) if key not in _IRRELEVANT and meant.get(key) != given.get(key)
    )
    if differing:
        raise ConfigError(
            f"the format describes a mirrored shadow by its depth and {', '.join(known)} alone, but this one also differs "
            f"from the base in {', '.join(differing)}; keep shadowpeft's own format"
        )
    return sizes


def explicit_config(shadow_model: Any) -> tuple[PreTrainedConfig, str]:
    """Configuration and name of a shadow given as a module, a folder or a Hub id; projected checkpoints included.

    Raises:
        ConfigError: if it cannot be read.
    """
    if isinstance(shadow_model, nn.Module):
        projected = as_projected(shadow_model)
        body = shadow_model.base_model if projected is None else projected.backbone
        config = getattr(body, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(
                f"shadow_model is a {type(shadow_model).__name__}; pass a transformers model, folder or Hub id"
            )
        return config.get_text_config(decoder=True), str(getattr(shadow_model, "name_or_path", "") or "custom")
    name = str(shadow_model)
    if is_projected(name):
        return projected_config(name), name
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config(decoder=True), name
    except (OSError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"the shadow model '{name}' could not be read ({first}); pass shadow_model=") from error


def backbone_to_ours(parts: DecoderParts, shadow: ShadowLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's tensors under this package's names; a token table that is never read is left out."""
    state = {}
    for name, value in tensors.items():
        if name != shadow.table:
            state[hub_name(parts, f"backbone.{name}")] = value
        elif not shadow.shared:
            place = "backbone.shadow_embedding.weight" if shadow.trained else "embedding.weight"
            state[hub_name(parts, place)] = value
    return state


def backbone_from_ours(parts: DecoderParts, shadow: ShadowLayout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`backbone_to_ours`; a token table that is never read becomes zeros."""
    place = "backbone.shadow_embedding.weight" if shadow.trained else "embedding.weight"
    tensors = {}
    for name, shape in shadow.shapes.items():
        if name != shadow.table:
            tensors[name] = state[hub_name(parts, f"backbone.{name}")]
        else:
            tensors[name] = torch.zeros(shape) if shadow.shared else state[hub_name(parts, place)]
    return tensors


# -------------------------------------------------------------------------------------------------------- configuration


def check_keys(content: Mapping[str, Any], known: set[str], required: set[str], path: Path) -> None:
    """Every key is known, none that is required is missing.

    Raises:
        ConfigError: naming the first offender.
    """
    for key in content:
        if key not in known:
            raise ConfigError(
                f"unknown key '{key}' in {path}{did_you_mean(key, sorted(known))}; nothing is dropped unseen"
            )
    missing = sorted(required - set(content))
    if missing:
        raise ConfigError(f"{path} lacks the keys {missing}; take them from the run that made the adapter")


def make_config(path: Path, **fields: Any) -> ShadowPeftConfig:
    """A configuration from another package's values.

    Raises:
        ConfigError: if a value is impossible, naming the file.
    """
    try:
        return ShadowPeftConfig(**fields)
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Adapted:
    """A model with an adapter, taken apart for a writer."""

    base: PreTrainedModel
    parts: DecoderParts
    config: ShadowPeftConfig
    state: dict[str, Tensor]
    """The adapter's tensors under the names of this package's files, float32, on the CPU."""
    shadow: ShadowLayout


def take_apart(model: PeftModel, adapter_name: str | None = None) -> Adapted:
    """What a writer needs of an adapted model.

    Raises:
        ConfigError: if it has no such adapter.
    """
    hub = find_hub(model)
    name = adapter_name or model.active_adapter
    if name not in hub.shadowpeft_backbone:
        raise ConfigError(f"there is no adapter '{name}'; the model has {sorted(hub.shadowpeft_backbone)}")
    base: Any = model.get_base_model()
    parts = find_decoder(base)
    config = hub.configs[name]
    state = {
        key: value.detach().float().cpu().contiguous()
        for key, value in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()
    }
    shadow = layout(
        parts,
        copy.deepcopy(hub.shadowpeft_backbone[name].config),
        mirror=config.is_mirror,
        shared=config.shares_embeddings,
    )
    return Adapted(base, parts, config, state, shadow)

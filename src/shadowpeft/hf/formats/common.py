"""What the readers and writers of other packages' adapters share: the files, the shadow backbone they mean, the settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.head import scales_or_caps
from shadowpeft.hf.base.structure import DecoderParts, find_decoder, name_of
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.locate import find_file
from shadowpeft.hf.files.projected import is_projected, projected_config
from shadowpeft.hf.files.reading import BUILD_ERRORS, check_tensors, read_json, read_tensors
from shadowpeft.hf.files.records import check_numbers, record_of
from shadowpeft.hf.formats.table import Piece, Shape, expected_shapes, from_ours, hub_name, to_ours, unread
from shadowpeft.hf.layer import find_hub
from shadowpeft.hf.shadow.mirror import set_widths, width_name
from shadowpeft.hf.shadow.source import as_projected
from shadowpeft.messages import did_you_mean, quote, shorten
from shadowpeft.settings import explain

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
"""Keys of a configuration that say nothing about what the backbone computes."""


# -------------------------------------------------------------------------------------------------------------- reading


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


@dataclass
class ForeignAdapter:
    """An adapter of another package, read but not yet fitted to a base."""

    name: str
    """As given: folder or Hub id."""
    path: Path
    """Its configuration file."""
    settings: Any
    """Its content: an instance of the format's model."""
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of trained heads that have a file of their own, such as ``classifier_head.weight``."""
    task_type: str | None = None
    """None where the files do not tell."""
    num_labels: int | None = None
    """Classes of the heads in the files."""
    base: str | None = None
    revision: str | None = None

    @classmethod
    def read(cls, adapter: str | Path, config: str, weights: str, model: type[BaseModel]) -> ForeignAdapter:
        """Read the two files of an adapter and check what can be checked without its base.

        Args:
            config, weights: names of the files. model: the settings in ``config``.

        Raises:
            AdapterFileError: a file is missing or damaged.
            ConfigError: a key is unknown or missing, or has an impossible value.
        """
        path = find_file(adapter, config)
        content = read_json(path)
        try:
            settings = model.model_validate(content)
        except ValidationError as error:
            raise ConfigError(f"{path} {_problem(error.errors(), content, sorted(model.model_fields))}") from None
        tensors = read_tensors(find_file(adapter, weights))
        check_numbers(content, len(tensors), str(path))
        return cls(str(adapter), path, settings, tensors)

    def translate(
        self,
        parts: DecoderParts,
        shadow: ShadowLayout,
        table: Callable[[ShadowPeftConfig], list[Piece]],
        advice: str = "",
        **fields: Any,
    ) -> Translation:
        """The adapter for a base: ``fields`` are the settings here, ``table`` is the format's.

        Raises:
            AdapterFileError: if tensors are missing, unknown, or of other shapes than the table says.
            ConfigError: if a setting is impossible, naming the file.
        """
        try:
            config = ShadowPeftConfig(**fields)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"{self.path}: {error}") from error
        config.shadow_backbone_config = shadow.record
        rows = table(config)
        advice = f"base, configuration and weights do not belong together{advice}"
        check_tensors(self.tensors, expected_shapes(rows), f"'{self.name}'", advice)
        translation = Translation(config, to_ours(rows, self.tensors), unread(rows))
        if config.task_type == "CAUSAL_LM" and scales_or_caps(parts.config):
            # both packages read s^(0) with the bare matrix of the base's head; here the shadow has the complete head
            translation.notes.append(
                "the base scales or soft-caps its logits; the producer left that out on the shadow's path, so shadow logits "
                "and shadow loss differ here (the adapted model's do not)"
            )
        return translation


def _problem(problems: list[ErrorDetails], content: dict[str, Any], known: list[str]) -> str:
    keys: dict[str, list[str]] = {}
    for problem in problems:
        keys.setdefault(problem["type"], []).append(str(problem["loc"][0]))
    if "extra_forbidden" in keys:
        key = keys["extra_forbidden"][0]
        return f"has the unknown key {quote(key)}{did_you_mean(key[:99], known)}; nothing is dropped unseen"
    if "missing" in keys:
        return f"lacks the keys {keys['missing']}; take them from the run that made the adapter"
    key = str(problems[0]["loc"][0])
    return f"says that {explain(problems[0], key, content[key])}; take it from the run that made the adapter"


# ------------------------------------------------------------------------------------------------------------- backbone


@dataclass(frozen=True)
class ShadowLayout:
    """The shadow backbone as the other packages keep it: whole, with or without its token table."""

    config: PreTrainedConfig
    shapes: dict[str, Shape]
    """Shapes of the tensors in the file, by name inside the backbone."""
    table: str
    """Name of the token table, such as ``embed_tokens.weight``."""
    shared: bool
    """Whether the base's embedding feeds the shadow."""
    trained: bool
    """Whether the shadow's own table is trained (a mirrored shadow's) or frozen (a pretrained one's)."""

    @classmethod
    def of(cls, parts: DecoderParts, config: PreTrainedConfig, *, mirror: bool, shared: bool) -> ShadowLayout:
        """Names and shapes of a shadow backbone, without allocating it.

        Raises:
            ConfigError: if the configuration describes no model.
        """
        try:
            with torch.device("meta"):
                backbone: Any = type(parts.backbone)(copy.deepcopy(config)) if mirror else AutoModel.from_config(config)
        except BUILD_ERRORS as error:
            raise ConfigError(
                f"no {config.model_type} model has the sizes in the adapter's configuration ({shorten(error)}); it is "
                "damaged"
            ) from error
        shapes = {name: tuple(value.shape) for name, value in backbone.state_dict().items()}
        table = name_of(backbone, backbone.get_input_embeddings()) + ".weight"
        if shared and table == "embed_tokens.weight":
            del shapes[table]
        return cls(config, shapes, table, shared, trained=mirror)

    @property
    def width(self) -> int:
        """``d_s``."""
        return int(self.config.hidden_size)

    @property
    def record(self) -> dict[str, Any]:
        """For ``shadow_backbone_config``."""
        return record_of(self.config)

    def rows(self, parts: DecoderParts, prefix: str, projection: str) -> list[Piece]:
        """The backbone and its projection to the base's width, in a format that calls them ``prefix`` and ``projection``."""
        rows = []
        for name, shape in self.shapes.items():
            ours = f"backbone.{name}"
            if name == self.table:
                ours = "backbone.shadow_embedding.weight" if self.trained else "embedding.weight"
                if self.shared:  # both packages take out an ``embed_tokens`` only
                    reason = f"{prefix}{name}: the base's embedding feeds the shadow"
                    rows.append(Piece(prefix + name, shape, unread=reason))
                    continue
            rows.append(Piece(prefix + name, shape, hub_name(parts, ours)))
        if self.width != parts.hidden_size:
            rows.append(Piece(projection, (parts.hidden_size, self.width), hub_name(parts, "projection.weight")))
        return rows


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
    set_widths(new, sizes)
    if getattr(new, "max_window_layers", None) is not None:
        new.max_window_layers = min(new.max_window_layers, depth)
    return new


def sizes_of(base: PreTrainedConfig, shadow: PreTrainedConfig, known: tuple[str, ...]) -> dict[str, int]:
    """The sizes among ``known`` in which a mirrored shadow differs from its base.

    Raises:
        ConfigError: if those do not describe it, naming what else differs.
    """
    sizes = {}
    for setting in known:
        name = width_name(base, setting)
        if name is not None and getattr(shadow, name, None) != getattr(base, name):
            sizes[setting] = int(getattr(shadow, name))
    described, given = record_of(mirrored(base, int(shadow.num_hidden_layers), sizes)), record_of(shadow)
    differing = sorted(key for key in {*described, *given} - _IRRELEVANT if described.get(key) != given.get(key))
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
        raise ConfigError(
            f"the shadow model '{name}' could not be read ({shorten(error)}); pass shadow_model="
        ) from error


# -------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Adapted:
    """A model with an adapter, taken apart for a writer."""

    base: PreTrainedModel
    parts: DecoderParts
    config: ShadowPeftConfig
    state: dict[str, Tensor]
    """The adapter's tensors under the names of this package's files, float32, on the CPU."""
    shadow: ShadowLayout

    @classmethod
    def of(cls, model: PeftModel, adapter_name: str | None = None) -> Adapted:
        """Take a model apart.

        Raises:
            ConfigError: if it has no such adapter.
        """
        hub = find_hub(model)
        name = adapter_name or model.active_adapter
        if name not in hub.shadowpeft_backbone:
            raise ConfigError(f"there is no adapter '{name}'; the model has {sorted(hub.shadowpeft_backbone)}")
        base: Any = model.get_base_model()
        parts, config = find_decoder(base), hub.configs[name]
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        state = {key: value.detach().float().cpu().contiguous() for key, value in state.items()}
        backbone = copy.deepcopy(hub.shadowpeft_backbone[name].config)
        shadow = ShadowLayout.of(parts, backbone, mirror=config.is_mirror, shared=config.shares_embeddings)
        return cls(base, parts, config, state, shadow)

    def refuse(self, format_name: str, reasons: Mapping[str, bool]) -> None:
        """Refuse what a format cannot express.

        Raises:
            ConfigError: naming every setting of ``reasons`` that is true.
        """
        settings = [setting for setting, true in reasons.items() if true]
        if settings:
            raise ConfigError(f"{format_name} format cannot express {', '.join(settings)}; keep shadowpeft's own")

    def write(self, table: list[Piece], path: Path, metadata: dict[str, str] | None = None) -> list[str]:
        """Write the tensors by a format's table; returns notes on what was filled in."""
        save_tensors(from_ours(table, self.state), path, metadata)
        return [f"filled with zeros: {line}" for line in unread(table)]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and the folder it is in; tensors may share memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path, metadata=metadata)

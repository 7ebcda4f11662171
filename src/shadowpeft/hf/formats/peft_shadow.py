"""Adapters of PEFT's own ``SHADOW`` method (PEFT 0.21): variant ``peft``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import peft
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.structure import DecoderParts, classifier_of, find_decoder
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.locate import CONFIG, WEIGHTS
from shadowpeft.hf.formats.common import (
    Adapted,
    ForeignAdapter,
    ShadowLayout,
    Translation,
    explicit_config,
    mirrored,
    sizes_of,
)
from shadowpeft.hf.formats.table import Piece, base_name, hub_name, is_base_name, link_name, update_rows
from shadowpeft.messages import quote
from shadowpeft.settings import STRICT, WIDTHS, Count

_COVERAGE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_VALUES = ("r", "shadow_alpha", "shadow_dropout", "auxiliary_loss_weight")


class PeftSettings(BaseModel):
    """``adapter_config.json``; what has a default is missing in some files."""

    model_config = STRICT
    peft_type: str
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"]
    r: int
    shadow_alpha: float
    shadow_dropout: float
    auxiliary_loss_weight: float
    update_hidden_size: int | None
    shadow_model: str
    share_embeddings: bool
    target_modules: Any
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    shadow_num_hidden_layers: Count | None = None
    shadow_hidden_size: Count | None = None
    shadow_intermediate_size: Count | None = None
    shadow_num_attention_heads: Count | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    init_weights: Any = None
    auto_mapping: Any = None
    inference_mode: Any = None
    peft_version: Any = None


_SIZES = tuple(name for name in WIDTHS if name in PeftSettings.model_fields)
_BACKBONE, _PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"
_HEAD = "base_model.shadow_head.default."


def tensor_table(
    base: PreTrainedModel,
    parts: DecoderParts,
    shadow: ShadowLayout,
    saved: Mapping[str, Tensor],
    config: ShadowPeftConfig,
) -> list[Piece]:
    """All tensors of ``adapter_model.safetensors``; ``saved``: those of ``modules_to_save``, whose names are the same here."""
    layers, d, r, m = config.refined(parts.num_layers), parts.hidden_size, config.r, config.update_width
    rows = shadow.rows(parts, _BACKBONE, _PROJECTION)
    for layer in layers:
        here = base_name(f"{parts.layers_name}.{layer}.shadow_")
        rows.append(Piece(f"{here}down.default.weight", (r, d), link_name(parts, layer, "injection.w_down")))
        rows.append(Piece(f"{here}up.default.weight", (d, r), link_name(parts, layer, "injection.w_up")))
        transform, gate = (
            (f"{here}update_{net}.default.0", f"{here}update_{net}.default.2") for net in ("transform", "gate")
        )
        link = "" if layer == layers[-1] else link_name(parts, layer + 1, "update.")
        reason = f"{here}update_*: nothing reads the last update"
        rows += update_rows(transform, gate, link, d, m, biases=True, unread=reason)
    if config.task_type == "SEQ_CLS":
        for key, value in classifier_of(base).state_dict().items():
            rows.append(Piece(_HEAD + key, tuple(value.shape), hub_name(parts, f"head.{key}")))
    return rows + [Piece(name, tuple(value.shape), name) for name, value in saved.items()]


# -------------------------------------------------------------------------------------------------------------- reading


def open_adapter(adapter: str | Path) -> ForeignAdapter:
    """Read the files of an adapter and check what can be checked without its base.

    Raises:
        AdapterFileError: a file is missing or damaged.
        ConfigError: a key is unknown or missing, or the task is none of ours.
    """
    opened = ForeignAdapter.read(adapter, CONFIG, WEIGHTS, PeftSettings)
    settings = opened.settings
    opened.task_type, opened.revision = settings.task_type, settings.revision or None
    opened.base = settings.base_model_name_or_path or None
    head = opened.tensors.get(_HEAD + "weight")
    opened.num_labels = len(head) if head is not None and head.dim() else None
    return opened


def translate(adapter: ForeignAdapter, base: PreTrainedModel, task_type: str, shadow_model: Any = None) -> Translation:
    """The adapter in this package's terms, for its base.

    Args:
        shadow_model: for an explicit shadow, in place of the ``shadow_model`` that the configuration names: the adapter's
            files do not hold its configuration. Its weights come from the adapter.

    Raises:
        AdapterFileError: if tensors are missing, unknown, or of other shapes than configuration and base say.
        ConfigError: if a setting is impossible here.
    """
    settings, parts = adapter.settings, find_decoder(base)
    depth, sizes = settings.shadow_num_hidden_layers, {key: getattr(settings, key) for key in _SIZES}
    fields: dict[str, Any] = {"shadow_num_hidden_layers": depth, **sizes}
    mirror, shared = settings.shadow_model == "mirror", False
    if mirror:
        if shadow_model is not None:
            raise ConfigError(f"'{adapter.name}' has a mirrored shadow, built from the base; leave shadow_model out")
        shadow_config = mirrored(parts.config, depth or 1, sizes)
        # theirs shares only between equal widths, without a word
        shared = settings.share_embeddings and int(shadow_config.hidden_size) == parts.hidden_size
    else:
        if any(value is not None for value in fields.values()):
            raise ConfigError(
                f"{adapter.path} sizes a mirrored shadow but names shadow_model = {quote(settings.shadow_model)}; remove one"
            )
        shadow_config, name = explicit_config(settings.shadow_model if shadow_model is None else shadow_model)
        fields = {"shadow_model": name}  # theirs never shares with an explicit shadow, whatever the file says
    shadow = ShadowLayout.of(parts, shadow_config, mirror=mirror, shared=shared)
    layers = _adapted_layers(adapter, parts)
    if _PROJECTION in adapter.tensors and shadow.width == parts.hidden_size:
        raise ConfigError(
            f"'{adapter.name}' has a projection between equal widths ({shadow.width}); a shadow of the base's width has none "
            "here, so it cannot be carried"
        )
    saved = _saved_modules(adapter, base)
    translation = adapter.translate(
        parts,
        shadow,
        partial(tensor_table, base, parts, shadow, saved),
        task_type=task_type,
        update_hidden_size=settings.update_hidden_size or None,
        variant="peft",
        share_embeddings=shared,
        refined_layers=None if layers == range(parts.num_layers) else [layers[0], layers[-1]],
        modules_to_save=sorted({key.removeprefix(base_name("")).rpartition(".")[0] for key in saved}) or None,
        **{key: getattr(settings, key) for key in _VALUES},
        **fields,
    )
    if settings.init_weights is False:
        translation.dropped.append("init_weights: it is about the start of training")
    if settings.share_embeddings and not shared:
        translation.notes.append(
            "share_embeddings is true in the file but PEFT does not share here, and neither does this adapter"
        )
    return translation


def _adapted_layers(adapter: ForeignAdapter, parts: DecoderParts) -> range:
    """The layers that carry tensors; they must be the ones that the file's patterns choose, without a gap."""
    pattern = re.compile(re.escape(base_name(parts.layers_name)) + r"\.(\d+)\.shadow_down\.default\.weight")
    layers = sorted(int(match[1]) for name in adapter.tensors if (match := pattern.fullmatch(name)))
    try:
        rule = peft.ShadowConfig(**{key: getattr(adapter.settings, key) for key in _COVERAGE})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{adapter.path} has target modules that PEFT refuses ({error})") from error
    names = {layer: f"{parts.layers_name}.{layer}" for layer in range(parts.num_layers)}
    chosen = [i for i, name in names.items() if rule.target_modules is None or check_target_module_exists(rule, name)]
    if not layers or layers != chosen or layers != list(range(layers[0], layers[-1] + 1)):
        raise AdapterFileError(
            f"'{adapter.name}' holds tensors for the layers {layers} of {parts.layers_name}, its target_modules choose "
            f"{chosen} of this base's {parts.num_layers}; they must agree and have no gap, so pass the base it was trained on"
        )
    if layers[0] == 0 and layers[-1] < parts.num_layers - 1:
        warnings.warn(
            f"'{adapter.name}' adapts layers 0 to {layers[-1]} of {parts.num_layers}; PEFT adapts all unless told otherwise, "
            f"so check that it was not trained on a base of {layers[-1] + 1} layers",
            stacklevel=2,
        )
    return range(layers[0], layers[-1] + 1)


def _saved_modules(adapter: ForeignAdapter, base: PreTrainedModel) -> dict[str, Tensor]:
    """The base's own values of the modules that the adapter saves, by their name in the file."""
    names = adapter.settings.modules_to_save or []
    chosen = [name for name, _ in base.named_modules() if any(name == n or name.endswith("." + n) for n in names)]
    if not chosen and names and adapter.task_type != "SEQ_CLS":
        raise AdapterFileError(f"'{adapter.name}' saves the modules {quote(names)}, which this base does not have")
    return {
        base_name(f"{module}.{key}"): value
        for module in chosen
        for key, value in base.get_submodule(module).state_dict().items()
    }


# -------------------------------------------------------------------------------------------------------------- writing


def write(model: PeftModel, folder: Path, adapter_name: str | None = None) -> list[str]:
    """Write an adapter of variant ``peft`` in PEFT's format; returns what the format leaves unsaid.

    Raises:
        ConfigError: naming what the format cannot express.
    """
    own = Adapted.of(model, adapter_name)
    config, parts, shadow = own.config, own.parts, own.shadow
    own.refuse(
        "PEFT's",
        {
            f"variant={config.variant!r} (its mathematics is 'peft')": config.variant != "peft",
            "use_update=False": not config.use_update,
            "own_shadow_head=True": config.own_shadow_head,
            "share_embeddings=True with an explicit shadow": not config.is_mirror and config.shares_embeddings,
        },
    )
    notes: list[str] = []
    sizes: dict[str, int] = {}
    if config.is_mirror:
        shadow_model = "mirror"
        sizes = sizes_of(parts.config, shadow.config, _SIZES)
        sizes["shadow_num_hidden_layers"] = shadow.config.num_hidden_layers
    else:
        shadow_model = _origin(config.shadow_model, shadow)
        notes.append(f"PEFT takes the shadow's configuration from '{shadow_model}', which must stay where it is")
    saved = {name: value for name, value in own.state.items() if is_base_name(name)}
    peft.ShadowConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        target_modules=sorted(f"{parts.layers_name}.{layer}" for layer in config.refined(parts.num_layers)),
        shadow_model=shadow_model,
        share_embeddings=config.shares_embeddings,
        update_hidden_size=config.update_width,
        modules_to_save=config.modules_to_save,
        **{key: getattr(config, key) for key in _VALUES},
        **sizes,
    ).save_pretrained(str(folder))
    table = tensor_table(own.base, parts, shadow, saved, config)
    notes += own.write(table, folder / WEIGHTS, {"format": "pt"})
    return notes


_SHAPE = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}


def _origin(shadow_model: Any, shadow: ShadowLayout) -> str:
    """The folder or Hub id that PEFT can take the shadow's configuration from."""
    if not isinstance(shadow_model, str) or shadow_model == "custom":
        raise ConfigError(
            "PEFT's format holds no configuration of an explicit shadow but the folder or Hub id it came from, and this one "
            "was given as a module; keep shadowpeft's own format"
        )
    config, _ = explicit_config(shadow_model)
    differing = sorted(k for k, v in shadow.record.items() if k in _SHAPE and getattr(config, k, None) != v)
    if differing:
        raise ConfigError(
            f"the shadow differs from '{shadow_model}' in {', '.join(differing)}; keep shadowpeft's own format"
        )
    return str(Path(shadow_model).resolve()) if Path(shadow_model).is_dir() else shadow_model

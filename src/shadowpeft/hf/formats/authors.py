"""The authors' adapters (package ``shadow-peft``): ``shadow_config.json``, ``shadow_adapter.safetensors`` and, where heads
were trained, ``shadow_modules.safetensors``.

:func:`tensor_table` says where each tensor belongs. What the format leaves unsaid is stated in the notes of a translation:
the base, the task, lambda (an argument of their task classes), and whether the shadow was built from the base (implicit) or
given (explicit).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.structure import DecoderParts, classifier_of, find_decoder, name_of
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.locate import find_file
from shadowpeft.hf.files.reading import check_tensors, read_tensors
from shadowpeft.hf.formats.common import (
    Adapted,
    ForeignAdapter,
    ShadowLayout,
    Translation,
    explicit_config,
    mirrored,
    save_tensors,
    sizes_of,
)
from shadowpeft.hf.formats.table import Piece, base_name, hub_name, is_base_name, link_name, update_rows
from shadowpeft.messages import quote
from shadowpeft.settings import STRICT, WIDTHS, Count

CONFIG = "shadow_config.json"
WEIGHTS = "shadow_adapter.safetensors"
MODULES = "shadow_modules.safetensors"
DEFAULT_WEIGHT = 0.05
"""lambda where their task classes are not told another."""


class AuthorsSettings(BaseModel):
    """``shadow_config.json``."""

    model_config = STRICT
    alpha: float
    dropout: float
    injection_hidden_size: int
    gate_hidden_size: int
    num_shadow_layers: Count
    shadow_intermediate_size: Count | None = None
    shadow_num_attention_heads: Count | None = None
    shadow_num_key_value_heads: Count | None = None
    shadow_head_dim: Count | None = None
    modules_to_save: list[str] | None = None


_SIZES = tuple(name for name in WIDTHS if name in AuthorsSettings.model_fields)
_HEADS = {"CAUSAL_LM": ("lm_head", "shadow_lm_head"), "SEQ_CLS": ("classifier_head", "shadow_classifier_head")}
"""The base's head and the shadow's."""
_PROJECTION, _BACKBONE, _NORM = "shadow_hidden_projection.weight", "shadow_model.", "shadow_update_model.hidden_norm"


def tensor_table(parts: DecoderParts, shadow: ShadowLayout, config: ShadowPeftConfig) -> list[Piece]:
    """All tensors of ``shadow_adapter.safetensors``; index ``i`` there is the base layer ``i + 1``."""
    d, r, m, last = parts.hidden_size, config.r, config.update_width, parts.num_layers - 2
    rows = shadow.rows(parts, _BACKBONE, _PROJECTION)
    for i in range(last + 1):
        for what, shape in (("down", (d, r)), ("up", (r, d))):
            ours = link_name(parts, i + 1, f"injection.w_{what}")
            rows.append(
                Piece(f"shadow_injection_model.injection_{what}s", (1, *shape), ours, shape[::-1], transposed=True)
            )
        transform, gate = (f"shadow_update_model.update_{net}.{i}" for net in ("transforms", "gates"))
        link = link_name(parts, i + 2, "update.") if i < last else ""
        layers = (f"{transform}.0", f"{transform}.3"), (f"{gate}.0", f"{gate}.2")
        reason = f"shadow_update_model.update_*.{i}: nothing reads the last update"
        rows += update_rows(*layers, link, d, m, biases=False, unread=reason)
    for key in ("weight", "bias"):
        ours = hub_name(parts, f"norm.{key}") if last else ""
        rows.append(Piece(f"{_NORM}.{key}", (d,), ours, unread=f"{_NORM}: only the last update reads it"))
    return rows


# -------------------------------------------------------------------------------------------------------------- reading


def open_adapter(adapter: str | Path) -> ForeignAdapter:
    """Read the files of an adapter and check what can be checked without its base.

    Raises:
        AdapterFileError: a file is missing or damaged, or the heads in it are not those its configuration lists.
        ConfigError: a key is unknown or missing.
    """
    opened = ForeignAdapter.read(adapter, CONFIG, WEIGHTS, AuthorsSettings)
    opened.heads = _read_heads(adapter)
    stored, listed = {name.partition(".")[0] for name in opened.heads}, set(opened.settings.modules_to_save or [])
    tasks = [task for task, heads in _HEADS.items() if {*heads} & (stored | listed)]
    if (stored | listed) - {head for heads in _HEADS.values() for head in heads} or len(tasks) > 1:
        raise AdapterFileError(
            f"'{adapter}' holds the modules {quote(sorted(stored))} and lists {quote(sorted(listed))}, but the format knows "
            f"{' and '.join(_HEADS['CAUSAL_LM'])}, or {' and '.join(_HEADS['SEQ_CLS'])}; nothing else can be carried"
        )
    if listed and stored != listed:
        raise AdapterFileError(
            f"'{adapter}' lists modules_to_save = {quote(sorted(listed))} but {MODULES} holds {quote(sorted(stored))}: trained "
            "heads are missing; save it with the task model's save_pretrained"
        )
    opened.task_type = tasks[0] if tasks else None
    opened.num_labels = next(
        (len(v) for k, v in opened.heads.items() if "classifier_head.weight" in k and v.dim()), None
    )
    return opened


def _read_heads(adapter: str | Path) -> dict[str, Tensor]:
    try:
        return read_tensors(find_file(adapter, MODULES))
    except AdapterFileError as error:
        on_hub = isinstance(error.__cause__, EntryNotFoundError)
        offline = isinstance(error.__cause__, LocalEntryNotFoundError)
        if (on_hub and not offline) or (Path(adapter).is_dir() and not (Path(adapter) / MODULES).is_file()):
            return {}
        raise


def translate(adapter: ForeignAdapter, base: PreTrainedModel, task_type: str, shadow_model: Any = None) -> Translation:
    """The adapter in this package's terms, for its base.

    Args:
        shadow_model: for an explicit shadow, the model (module, folder or Hub id) that the adapter was trained with: the
            format does not hold its configuration. Its weights come from the adapter.

    Raises:
        AdapterFileError: if tensors are missing, unknown, or of other shapes than configuration and base say.
        ConfigError: if a setting is impossible here.
    """
    settings, parts = adapter.settings, find_decoder(base)
    depth, sizes = settings.num_shadow_layers, {key: getattr(settings, key) for key in _SIZES}
    advice = ""
    fields: dict[str, Any]
    if shadow_model is None:
        if _BACKBONE + "embed_tokens.weight" in adapter.tensors or _PROJECTION in adapter.tensors:
            raise ConfigError(
                f"'{adapter.name}' was trained with an explicit shadow, whose configuration the format does not hold; pass "
                "shadow_model= (on the command line --shadow-model), the model it was trained with"
            )
        shadow = ShadowLayout.of(parts, mirrored(parts.config, depth, sizes), mirror=True, shared=True)
        fields = {"shadow_num_hidden_layers": depth, **sizes}
        advice = ", or the shadow was explicit: then pass shadow_model="
    else:
        config, name = explicit_config(shadow_model)
        shadow = ShadowLayout.of(parts, config, mirror=False, shared=False)
        if _BACKBONE + shadow.table not in adapter.tensors:
            shadow = ShadowLayout.of(parts, config, mirror=False, shared=True)
        fields = {
            "shadow_model": name if isinstance(shadow_model, str) else "custom",
            "share_embeddings": shadow.shared,
        }
    translation = adapter.translate(
        parts,
        shadow,
        partial(tensor_table, parts, shadow),
        advice,
        task_type=task_type,
        r=settings.injection_hidden_size,
        shadow_alpha=settings.alpha,
        shadow_dropout=settings.dropout,
        update_hidden_size=settings.gate_hidden_size,
        auxiliary_loss_weight=DEFAULT_WEIGHT,
        variant="authors",
        **fields,
    )
    translation.notes.append(f"lambda is not in the file; auxiliary_loss_weight is {DEFAULT_WEIGHT}, their default")
    _read_trained_heads(adapter, base, parts, translation)
    return translation


def _read_trained_heads(
    adapter: ForeignAdapter, base: PreTrainedModel, parts: DecoderParts, translation: Translation
) -> None:
    """A trained head of the base becomes a saved module, a trained head of the shadow the shadow's own.

    A classifier has both (Eq. 9); one that was not trained is a copy of the base's.
    """
    config, classifier = translation.config, translation.config.task_type == "SEQ_CLS"
    if classifier and not adapter.heads:
        raise AdapterFileError(
            f"'{adapter.name}' has no {MODULES}, so its trained classifier heads are missing; save it with the task model's "
            "save_pretrained"
        )
    head: Any = classifier_of(base) if classifier else base.get_output_embeddings()
    own, names = _values(head), _HEADS["SEQ_CLS" if classifier else "CAUSAL_LM"]
    main, shadow = (_stored(adapter, name, own) for name in names)
    if not classifier:
        for name, values in zip(names, (main, shadow), strict=True):
            if values and all(torch.equal(values[key], own[key]) for key in own):
                translation.dropped.append(f"{name}: equal to the base's")
                values.clear()
        table: Any = base.get_input_embeddings()
        if main and head.weight.data_ptr() == table.weight.data_ptr():
            raise ConfigError(
                f"'{adapter.name}' holds a trained lm_head for a base whose LM head is its token table; their package changes "
                "both at once, which cannot be expressed here"
            )
        config.own_shadow_head = bool(main or shadow)
        config.modules_to_save = [name_of(base, head)] if main else None
    places = base_name(name_of(base, head) + "."), hub_name(parts, "head.")
    carried = classifier or bool(main), classifier or config.own_shadow_head
    for name, values, place, is_carried in zip(names, (main, shadow), places, carried, strict=True):
        if is_carried:
            translation.state.update({place + key: value for key, value in (values or own).items()})
            if not values:
                translation.notes.append(
                    f"{name} was not trained; a copy of the base's is used, and trains from here on"
                )


def _values(head: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().float().cpu() for key, value in head.state_dict().items()}


def _stored(adapter: ForeignAdapter, name: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    values = {key[len(name) + 1 :]: value for key, value in adapter.heads.items() if key.startswith(name + ".")}
    if values:
        check_tensors(values, own, f"{name} of '{adapter.name}'", "pass its own base")
    return values


# -------------------------------------------------------------------------------------------------------------- writing


def write(model: PeftModel, folder: Path, adapter_name: str | None = None) -> list[str]:
    """Write an adapter in the authors' format; returns what the format leaves unsaid.

    Raises:
        ConfigError: naming what the format cannot express.
    """
    own = Adapted.of(model, adapter_name)
    config, parts, shadow = own.config, own.parts, own.shadow
    own.refuse(
        "the authors'",
        {
            f"variant={config.variant!r}": config.variant in ("peft", "scaled"),
            "use_update=False": not config.use_update,
            f"refined_layers={config.refined_layers}": config.refined(parts.num_layers) != range(1, parts.num_layers),
            f"update_hidden_size={config.update_width} (it needs 2 or more)": config.update_width < 2,
        },
    )
    sizes: dict[str, Any] = {}
    notes = [
        f"lambda is not part of the format; pass shadow_loss_weight={config.auxiliary_loss_weight} when loading it"
    ]
    if config.is_mirror and shadow.shared:
        sizes = sizes_of(parts.config, shadow.config, _SIZES)
    else:
        notes.append(
            f"the shadow is explicit; pass shadow_model=, a {shadow.config.model_type} of {shadow.config.num_hidden_layers} "
            f"layers and width {shadow.width}" + (" without its token table" if shadow.shared else "")
        )
    heads = _heads_to_write(own)
    settings = AuthorsSettings(
        alpha=config.shadow_alpha,
        dropout=config.shadow_dropout,
        injection_hidden_size=config.r,
        gate_hidden_size=config.update_width,
        num_shadow_layers=shadow.config.num_hidden_layers,
        modules_to_save=sorted({name.partition(".")[0] for name in heads}),
        **sizes,
    )
    notes += own.write(tensor_table(parts, shadow, config), folder / WEIGHTS)
    if heads:
        save_tensors(heads, folder / MODULES)
    (folder / CONFIG).write_text(json.dumps(settings.model_dump(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return notes


def _heads_to_write(own: Adapted) -> dict[str, Tensor]:
    """``shadow_modules.safetensors``; their loader reads what ``modules_to_save`` lists, so both or none are listed."""
    base, state = own.base, own.state
    classifier = own.config.task_type == "SEQ_CLS"
    head: Any = classifier_of(base) if classifier else base.get_output_embeddings()
    places = base_name(name_of(base, head).removesuffix(".original_module")) + ".", hub_name(own.parts, "head.")
    main, shadow = (
        {key.removeprefix(place): value for key, value in state.items() if key.startswith(place)} for place in places
    )
    others = [key for key in state if is_base_name(key) and not key.startswith(places[0])]
    if others:
        raise ConfigError(f"the authors' format saves no further modules of the base, and the adapter has {others[:2]}")
    if not main and classifier:
        main = _values(getattr(head, "original_module", head))
    if not shadow:
        shadow = main  # without a head of its own, the shadow reads the trained one
    names = _HEADS["SEQ_CLS" if classifier else "CAUSAL_LM"]
    return {
        f"{name}.{key}": value
        for name, values in zip(names, (main, shadow), strict=True)
        for key, value in values.items()
    }

"""The authors' adapters (package ``shadow-peft``): ``shadow_config.json``, ``shadow_adapter.safetensors`` and, where heads
were trained, ``shadow_modules.safetensors``.

What the format leaves unsaid is stated in the notes of a translation: the base, the task, lambda (an argument of their task
classes), and whether the shadow was built from the base (implicit) or given (explicit).

=============================================  ==============================================================
their tensor (``i`` = base layer - 1)          here
=============================================  ==============================================================
``shadow_injection_model.injection_downs[i]``  ``injection.w_down`` of layer ``i + 1``, transposed
``shadow_injection_model.injection_ups[i]``    ``injection.w_up`` of layer ``i + 1``, transposed
``..update_transforms.i.{0,3}``, ``W_1, W_2``  ``update.w_in[:m]``, ``update.w_out[0]`` of layer ``i + 2``
``..update_gates.i.{0,2}``, ``W_3, W_4``       ``update.w_in[m:]``, ``update.w_out[1]`` of layer ``i + 2``
``shadow_update_model.hidden_norm``            ``norm``
``shadow_model``                               ``backbone``; its token table: ``embedding``
``shadow_hidden_projection``                   ``projection``
=============================================  ==============================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.structure import DecoderParts, classifier_of, find_decoder
from shadowpeft.hf.files.locate import find_file
from shadowpeft.hf.files.reading import check_tensors, read_json, read_tensors
from shadowpeft.hf.files.records import check_numbers
from shadowpeft.hf.formats.common import (
    Adapted,
    ShadowLayout,
    Translation,
    backbone_from_ours,
    backbone_to_ours,
    base_name,
    check_keys,
    explicit_config,
    fuse_update,
    head_notes,
    hub_name,
    layout,
    link_name,
    make_config,
    mirrored,
    name_of,
    sizes_of,
    split_update,
    take_apart,
)
from shadowpeft.messages import quote

CONFIG = "shadow_config.json"
WEIGHTS = "shadow_adapter.safetensors"
MODULES = "shadow_modules.safetensors"
DEFAULT_WEIGHT = 0.05
"""lambda where their task classes are not told another."""

_SIZES = (
    "shadow_intermediate_size",
    "shadow_num_attention_heads",
    "shadow_num_key_value_heads",
    "shadow_head_dim",
)
_REQUIRED = {"alpha", "dropout", "gate_hidden_size", "injection_hidden_size", "num_shadow_layers"}
_HEADS = {"CAUSAL_LM": ("lm_head", "shadow_lm_head"), "SEQ_CLS": ("classifier_head", "shadow_classifier_head")}
_DOWN, _UP = "shadow_injection_model.injection_downs", "shadow_injection_model.injection_ups"
_NORM, _PROJECTION, _BACKBONE = "shadow_update_model.hidden_norm.", "shadow_hidden_projection.weight", "shadow_model."


def _update(i: int) -> tuple[str, str, str, str]:
    t, g = f"shadow_update_model.update_transforms.{i}", f"shadow_update_model.update_gates.{i}"
    return f"{t}.0", f"{t}.3", f"{g}.0", f"{g}.2"


@dataclass
class Source:
    """An adapter in the authors' format, read but not yet fitted to a base."""

    name: str
    path: Path
    content: dict[str, Any]
    tensors: dict[str, Tensor]
    heads: dict[str, Tensor]
    """Tensors of trained heads, such as ``classifier_head.weight``."""
    task_type: str | None
    """None where neither heads nor configuration tell."""

    base: str | None = None
    """The format does not name its base."""
    revision: str | None = None

    @property
    def num_labels(self) -> int | None:
        """Classes of the classifier heads in the file."""
        sizes = [int(v.shape[0]) for k, v in self.heads.items() if "classifier_head.weight" in k]
        return sizes[0] if sizes else None


def open_source(adapter: str | Path) -> Source:
    """Read the files of an adapter and check what can be checked without its base.

    Raises:
        AdapterFileError: a file is missing or damaged, or the heads in it are not those its configuration lists.
        ConfigError: a key is unknown or missing.
    """
    path = find_file(adapter, CONFIG)
    content = read_json(path)
    check_keys(content, _REQUIRED | set(_SIZES) | {"modules_to_save"}, _REQUIRED, path)
    requested = content.get("modules_to_save") or []
    if not isinstance(requested, list) or not all(isinstance(name, str) for name in requested):
        raise ConfigError(f"{path} has modules_to_save = {quote(requested)} but needs a list of names")
    tensors = read_tensors(find_file(adapter, WEIGHTS))
    check_numbers(content, len(tensors), str(path))
    heads = read_tensors(found) if (found := _optional(adapter, MODULES)) is not None else {}
    stored = {name.partition(".")[0] for name in heads}
    known = {name for pair in _HEADS.values() for name in pair}
    tasks = [task for task, pair in _HEADS.items() if set(pair) & (stored | set(requested))]
    if stored - known or set(requested) - known or len(tasks) > 1:
        raise AdapterFileError(
            f"'{adapter}' holds the modules {quote(sorted(stored))} and lists {quote(requested)}, but the format knows "
            f"{' and '.join(_HEADS['CAUSAL_LM'])}, or {' and '.join(_HEADS['SEQ_CLS'])}; nothing else can be carried"
        )
    if requested and stored != set(requested):
        raise AdapterFileError(
            f"'{adapter}' lists modules_to_save = {quote(requested)} but {MODULES} holds {quote(sorted(stored))}: "
            "trained heads "
            "are missing; save it with the task model's save_pretrained"
        )
    return Source(str(adapter), path, content, tensors, heads, tasks[0] if tasks else None)


def _optional(adapter: str | Path, name: str) -> Path | None:
    if Path(adapter).is_dir():
        return Path(adapter) / name if (Path(adapter) / name).is_file() else None
    try:
        return find_file(adapter, name)
    except AdapterFileError as error:
        absent = isinstance(error.__cause__, EntryNotFoundError)
        if absent and not isinstance(error.__cause__, LocalEntryNotFoundError):  # the latter: no network
            return None
        raise


# -------------------------------------------------------------------------------------------------------------- reading


def translate(source: Source, base: PreTrainedModel, task_type: str, shadow_model: Any = None) -> Translation:
    """The adapter in this package's terms, for its base.

    Args:
        shadow_model: for an explicit shadow, the model (module, folder or Hub id) that the adapter was trained with: the
            format does not hold its configuration. Its weights come from the adapter.

    Raises:
        AdapterFileError: if tensors are missing, unknown, or of other shapes than configuration and base say.
        ConfigError: if a setting is impossible here.
    """
    content, parts = source.content, find_decoder(base)
    depth = content["num_shadow_layers"]
    sizes = {key: content.get(key) for key in _SIZES}
    for key, value in {"num_shadow_layers": depth, **sizes}.items():
        if (value is not None or key == "num_shadow_layers") and (type(value) is not int or value < 1):
            raise ConfigError(f"{source.path} has {key} = {quote(value)} but needs a whole number of at least 1")
    fields: dict[str, Any] = {}
    if shadow_model is None:
        if _BACKBONE + "embed_tokens.weight" in source.tensors or _PROJECTION in source.tensors:
            raise ConfigError(
                f"'{source.name}' was trained with an explicit shadow, whose configuration the format does not hold; pass "
                "shadow_model= (on the command line --shadow-model), the model it was trained with"
            )
        shadow = layout(parts, mirrored(parts.config, depth, sizes), mirror=True, shared=True)
        fields = {"shadow_num_hidden_layers": depth, **sizes}
    else:
        config, name = explicit_config(shadow_model)
        shadow = layout(parts, config, mirror=False, shared=False)
        if _BACKBONE + shadow.table not in source.tensors:
            shadow = layout(parts, config, mirror=False, shared=True)
        fields = {
            "shadow_model": name if isinstance(shadow_model, str) else "custom",
            "share_embeddings": shadow.shared,
        }
    r, m = content["injection_hidden_size"], content["gate_hidden_size"]
    config = make_config(
        source.path,
        task_type=task_type,
        r=r,
        shadow_alpha=content["alpha"],
        shadow_dropout=content["dropout"],
        update_hidden_size=m,
        auxiliary_loss_weight=DEFAULT_WEIGHT,
        variant="authors",
        **fields,
    )
    config.shadow_backbone_config = shadow.record
    advice = "base, configuration and weights do not belong together"
    if shadow_model is None:
        advice += ", or the shadow was explicit: then pass shadow_model="
    check_tensors(source.tensors, expected(parts, shadow, r, m), f"'{source.name}'", advice)
    done = Translation(config, to_ours(source.tensors, parts, shadow))
    last = parts.num_layers - 2
    done.dropped.append(f"shadow_update_model.update_*.{last}: nothing reads the last update")
    if last == 0:
        done.dropped.append("shadow_update_model.hidden_norm: only the last update reads it")
    if shadow.dead_table():
        done.dropped.append(f"{_BACKBONE}{shadow.table}: the base's embedding feeds the shadow")
    done.notes.append(f"lambda is not in the file; auxiliary_loss_weight is {DEFAULT_WEIGHT}, their default")
    if task_type == "CAUSAL_LM":
        done.notes += head_notes(parts.config)
    (_classifier_heads if task_type == "SEQ_CLS" else _lm_heads)(source, base, done)
    return done


def expected(parts: DecoderParts, shadow: ShadowLayout, r: int, m: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in ``shadow_adapter.safetensors``."""
    d, steps = parts.hidden_size, parts.num_layers - 1
    shapes: dict[str, tuple[int, ...]] = {_BACKBONE + k: v for k, v in shadow.shapes.items()}
    shapes.update({_DOWN: (steps, d, r), _UP: (steps, r, d), _NORM + "weight": (d,), _NORM + "bias": (d,)})
    if shadow.width != d:
        shapes[_PROJECTION] = (d, shadow.width)
    for i in range(steps):
        t_in, t_out, g_in, g_out = (f"{n}.weight" for n in _update(i))
        shapes.update({t_in: (m, d), t_out: (d, m), g_in: (m, d), g_out: (d, m)})
    return shapes


def to_ours(tensors: Mapping[str, Tensor], parts: DecoderParts, shadow: ShadowLayout) -> dict[str, Tensor]:
    """Their tensors under this package's names; a linear map, so it takes gradients to gradients. Heads: see the table."""
    state = backbone_to_ours(
        parts, shadow, {k[len(_BACKBONE) :]: v for k, v in tensors.items() if k.startswith(_BACKBONE)}
    )
    steps = parts.num_layers - 1
    for i in range(steps):
        state[link_name(parts, i + 1, "injection.w_down")] = tensors[_DOWN][i].T.contiguous()
        state[link_name(parts, i + 1, "injection.w_up")] = tensors[_UP][i].T.contiguous()
        if i < steps - 1:
            for key, value in fuse_update(tensors, *_update(i)).items():
                state[link_name(parts, i + 2, f"update.{key}")] = value
    if steps > 1:
        for key in ("weight", "bias"):
            state[hub_name(parts, f"norm.{key}")] = tensors[_NORM + key]
    if _PROJECTION in tensors:
        state[hub_name(parts, "projection.weight")] = tensors[_PROJECTION]
    return state


def _values(head: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().float().cpu() for k, v in head.state_dict().items()}


def _stored(source: Source, name: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {k[len(name) + 1 :]: v for k, v in source.heads.items() if k.startswith(name + ".")}
    if found:
        check_tensors(
            found, {k: tuple(v.shape) for k, v in own.items()}, f"{name} of '{source.name}'", "pass its own base"
        )
    return found


def _classifier_heads(source: Source, base: PreTrainedModel, done: Translation) -> None:
    """Both heads (Eq. 9); one that was not trained is the base's."""
    if not source.heads:
        raise AdapterFileError(
            f"'{source.name}' has no {MODULES}, so its trained classifier heads are missing; save it with the task model's "
            "save_pretrained"
        )
    head = classifier_of(base)
    own, place = _values(head), name_of(base, head)
    for name, prefix in (("classifier_head", base_name(place)), ("shadow_classifier_head", None)):
        found = _stored(source, name, own)
        if not found:
            done.notes.append(f"{name} was not trained; the base's own is used, and would train from here on")
        for key, value in (found or own).items():
            done.state[hub_name(find_decoder(base), f"head.{key}") if prefix is None else f"{prefix}.{key}"] = value


def _lm_heads(source: Source, base: PreTrainedModel, done: Translation) -> None:
    """A trained LM head becomes a saved module of the base, a trained shadow head the shadow's own."""
    head: Any = base.get_output_embeddings()
    own = _values(head)
    main, shadow = _stored(source, "lm_head", own), _stored(source, "shadow_lm_head", own)
    for name, found in (("lm_head", main), ("shadow_lm_head", shadow)):
        if found and all(torch.equal(found[k], own[k]) for k in own):
            done.dropped.append(f"{name}: equal to the base's")
            found.clear()
    table: Any = base.get_input_embeddings()
    if main and head.weight.data_ptr() == table.weight.data_ptr():
        raise ConfigError(
            f"'{source.name}' holds a trained lm_head for a base whose LM head is its token table; their package changes both "
            "at once, which cannot be expressed here"
        )
    if main:
        place = name_of(base, head)
        done.config.modules_to_save = [place]
        done.state.update({base_name(f"{place}.{k}"): v for k, v in main.items()})
    if main or shadow:
        done.config.own_shadow_head = True
        done.state.update({hub_name(find_decoder(base), f"head.{k}"): v for k, v in (shadow or own).items()})
        if not shadow:
            done.notes.append(
                "shadow_lm_head was not trained; the shadow keeps a copy of the base's, and would train it"
            )


# -------------------------------------------------------------------------------------------------------------- writing


def write(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> list[str]:
    """Write an adapter in the authors' format; returns what the format leaves unsaid.

    Raises:
        ConfigError: naming what the format cannot express.
    """
    own = take_apart(model, adapter_name)
    config, parts, shadow = own.config, own.parts, own.shadow
    d = parts.hidden_size
    refused = {
        f"variant={config.variant!r}": config.variant == "peft",
        "use_update=False": not config.use_update,
        f"refined_layers={config.refined_layers}": list(config.refined(parts.num_layers))
        != list(range(1, parts.num_layers)),
        f"update_hidden_size={config.update_width} (it needs 2 or more)": config.update_width < 2,
    }
    if any(refused.values()):
        raise ConfigError(
            f"the authors' format cannot express {', '.join(k for k, no in refused.items() if no)}; keep shadowpeft's own"
        )
    sizes: dict[str, int] = {}
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
    tensors = from_ours(own.state, parts, shadow, config.r, config.update_width)
    filled = sorted(set(tensors) - set(from_ours(own.state, parts, shadow, config.r, config.update_width, fill=False)))
    if filled:
        notes.append(f"filled with zeros, since nothing reads them: {', '.join(filled)}")
    content = {
        "alpha": config.shadow_alpha,
        "dropout": config.shadow_dropout,
        "gate_hidden_size": config.update_width,
        "injection_hidden_size": config.r,
        "modules_to_save": sorted({name.partition(".")[0] for name in heads}),
        "num_shadow_layers": int(shadow.config.num_hidden_layers),
        **{key: sizes.get(key) for key in _SIZES},
    }
    check_tensors(
        tensors, expected(parts, shadow, config.r, config.update_width), "the adapter", f"the base has width {d}"
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / WEIGHTS)
    if heads:
        save_file({k: v.contiguous().clone() for k, v in heads.items()}, folder / MODULES)
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return notes


def from_ours(
    state: Mapping[str, Tensor], parts: DecoderParts, shadow: ShadowLayout, r: int, m: int, *, fill: bool = True
) -> dict[str, Tensor]:
    """The inverse of :func:`to_ours`; what nothing reads is zeros, or left out without ``fill``."""
    d, steps = parts.hidden_size, parts.num_layers - 1
    tensors = {_BACKBONE + k: v for k, v in backbone_from_ours(parts, shadow, state).items()}
    if not fill and shadow.dead_table():
        del tensors[_BACKBONE + shadow.table]
    layers = range(1, steps + 1)
    tensors[_DOWN] = torch.stack([state[link_name(parts, layer, "injection.w_down")].T for layer in layers])
    tensors[_UP] = torch.stack([state[link_name(parts, layer, "injection.w_up")].T for layer in layers])
    for i in range(steps - 1):
        fused = {key: state[link_name(parts, i + 2, f"update.{key}")] for key in ("w_in", "w_out")}
        tensors.update(split_update(fused, *_update(i)))
    for key in ("weight", "bias"):
        if steps > 1:
            tensors[_NORM + key] = state[hub_name(parts, f"norm.{key}")]
    if shadow.width != d:
        tensors[_PROJECTION] = state[hub_name(parts, "projection.weight")]
    if fill:
        for name, shape in expected(parts, shadow, r, m).items():
            tensors.setdefault(name, torch.zeros(shape))
    return tensors


def _heads_to_write(own: Adapted) -> dict[str, Tensor]:
    """``shadow_modules.safetensors``; their loader reads what ``modules_to_save`` lists, so both or none are listed."""
    base, state, parts = own.base, own.state, own.parts
    prefix = hub_name(parts, "head.")
    shadow = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    ours = {k for k in state if "shadow_hub." in k or "shadow_link." in k}
    if own.config.task_type == "SEQ_CLS":
        head, (main_name, shadow_name) = classifier_of(base), _HEADS["SEQ_CLS"]
    else:
        head, (main_name, shadow_name) = base.get_output_embeddings(), _HEADS["CAUSAL_LM"]
    place = base_name(name_of(base, head).removesuffix(".original_module")) + "."
    main = {k[len(place) :]: v for k, v in state.items() if k.startswith(place)}
    others = sorted(set(state) - ours - {place + k for k in main})
    if others:
        raise ConfigError(f"the authors' format saves no further modules of the base, and the adapter has {others[:2]}")
    if not main and not shadow:
        return {}
    original = _values(getattr(head, "original_module", head))
    if main and not shadow:
        shadow = main  # without a head of its own, the shadow reads the trained one
    heads = (
        {f"{main_name}.{k}": v for k, v in (main or original).items()}
        if main or own.config.task_type == "SEQ_CLS"
        else {}
    )
    return {**heads, **{f"{shadow_name}.{k}": v for k, v in shadow.items()}}

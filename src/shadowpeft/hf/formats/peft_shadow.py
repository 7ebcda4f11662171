"""Adapters of PEFT's own ``SHADOW`` method (PEFT 0.21): variant ``peft``.

==========================================================  ===========================================================
their tensor (``l`` = base layer)                           here
==========================================================  ===========================================================
``<layers>.l.shadow_down.default.weight``                   ``injection.w_down`` of layer ``l``
``<layers>.l.shadow_up.default.weight``                     ``injection.w_up`` of layer ``l``
``<layers>.l.shadow_update_transform.default.{0,2}``        ``update.{w,b}_in[:m]``, ``update.{w,b}_out[0]`` of ``l + 1``
``<layers>.l.shadow_update_gate.default.{0,2}``             ``update.{w,b}_in[m:]``, ``update.{w,b}_out[1]`` of ``l + 1``
``shadow_backbone.default``                                 ``backbone``; a pretrained one's token table: ``embedding``
``shadow_projection.default``, ``shadow_head.default``      ``projection``, ``head``
==========================================================  ===========================================================
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.structure import DecoderParts, classifier_of, find_decoder
from shadowpeft.hf.config import CONFIG, WEIGHTS
from shadowpeft.hf.files.locate import find_file
from shadowpeft.hf.files.reading import check_tensors, read_json, read_tensors
from shadowpeft.hf.files.records import check_numbers
from shadowpeft.hf.formats.common import (
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
    sizes_of,
    split_update,
    take_apart,
)
from shadowpeft.messages import quote

_SIZES = ("shadow_hidden_size", "shadow_intermediate_size", "shadow_num_attention_heads")
_COVERAGE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_VALUES = ("r", "shadow_alpha", "shadow_dropout", "auxiliary_loss_weight")
_GENERAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
_REQUIRED = {
    *_VALUES,
    "peft_type",
    "task_type",
    "shadow_model",
    "share_embeddings",
    "update_hidden_size",
    "target_modules",
}
_KNOWN = {*_GENERAL, *_REQUIRED, *_SIZES, *_COVERAGE, "shadow_num_hidden_layers", "modules_to_save", "init_weights"}
_BACKBONE, _PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"
_HEAD = "base_model.shadow_head.default."


def _at(parts: DecoderParts, layer: int, what: str) -> str:
    return f"base_model.model.{parts.layers_name}.{layer}.{what}"


def _update(parts: DecoderParts, layer: int) -> tuple[str, str, str, str]:
    t, g = (_at(parts, layer, f"shadow_update_{net}.default") for net in ("transform", "gate"))
    return f"{t}.0", f"{t}.2", f"{g}.0", f"{g}.2"


@dataclass
class Source:
    """An adapter in PEFT's format, read but not yet fitted to a base."""

    name: str
    path: Path
    content: dict[str, Any]
    tensors: dict[str, Tensor]
    task_type: str
    base: str | None
    revision: str | None

    @property
    def num_labels(self) -> int | None:
        """Classes of the shadow's classifier."""
        head = self.tensors.get(_HEAD + "weight")
        return None if head is None else int(head.shape[0])


def open_source(adapter: str | Path) -> Source:
    """Read the files of an adapter and check what can be checked without its base.

    Raises:
        AdapterFileError: a file is missing or damaged.
        ConfigError: a key is unknown or missing, or the task is none of ours.
    """
    path = find_file(adapter, CONFIG)
    content = read_json(path)
    check_keys(content, _KNOWN, _REQUIRED, path)
    if content["task_type"] not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ConfigError(
            f"{path} has task_type {quote(content['task_type'])}; a shadow supports CAUSAL_LM and SEQ_CLS"
        )
    if not isinstance(content["shadow_model"], str) or type(content["share_embeddings"]) is not bool:
        raise ConfigError(
            f"{path} has shadow_model = {quote(content['shadow_model'])} and share_embeddings = "
            f"{quote(content['share_embeddings'])} but needs a string and true or false"
        )
    base, revision = (content.get(key) for key in ("base_model_name_or_path", "revision"))
    if not isinstance(base, (str, type(None))) or not isinstance(revision, (str, type(None))):
        raise ConfigError(
            f"{path} has base_model_name_or_path = {quote(base)} and revision = {quote(revision)} but needs strings or "
            "null"
        )
    tensors = read_tensors(find_file(adapter, WEIGHTS))
    check_numbers(content, len(tensors), str(path))
    return Source(str(adapter), path, content, tensors, content["task_type"], base or None, revision or None)


# -------------------------------------------------------------------------------------------------------------- reading


def translate(source: Source, base: PreTrainedModel, task_type: str, shadow_model: Any = None) -> Translation:
    """The adapter in this package's terms, for its base.

    Args:
        shadow_model: for an explicit shadow, in place of the ``shadow_model`` that the configuration names: the adapter's
            files do not hold its configuration. Its weights come from the adapter.

    Raises:
        AdapterFileError: if tensors are missing, unknown, or of other shapes than configuration and base say.
        ConfigError: if a setting is impossible here.
    """
    content, parts = source.content, find_decoder(base)
    depth, sizes = content.get("shadow_num_hidden_layers"), {key: content.get(key) for key in _SIZES}
    for key, value in {"shadow_num_hidden_layers": depth, **sizes}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(
                f"{source.path} has {key} = {quote(value)} but needs a whole number of at least 1, or null"
            )
    mirror = content["shadow_model"] == "mirror"
    fields: dict[str, Any]
    if mirror:
        if shadow_model is not None:
            raise ConfigError(f"'{source.name}' has a mirrored shadow, built from the base; leave shadow_model out")
        shadow_config = mirrored(parts.config, depth or 1, sizes)
        # theirs shares only between equal widths, without a word
        shared = content["share_embeddings"] and int(shadow_config.hidden_size) == parts.hidden_size
        fields = {"shadow_num_hidden_layers": depth, **sizes, "share_embeddings": shared}
    else:
        if depth is not None or any(v is not None for v in sizes.values()):
            raise ConfigError(
                f"{source.path} sizes a mirrored shadow but names shadow_model = '{content['shadow_model']}'"
            )
        shadow_config, name = explicit_config(content["shadow_model"] if shadow_model is None else shadow_model)
        shared = False  # theirs never shares with an explicit shadow, whatever the file says
        fields = {"shadow_model": name, "share_embeddings": False}
    shadow = layout(parts, shadow_config, mirror=mirror, shared=shared)
    layers = _coverage(source, parts)
    whole = layers == range(parts.num_layers)
    config = make_config(
        source.path,
        task_type=task_type,
        update_hidden_size=content["update_hidden_size"] or None,
        variant="peft",
        refined_layers=None if whole else [layers[0], layers[-1]],
        **{key: content[key] for key in _VALUES},
        **fields,
    )
    config.shadow_backbone_config = shadow.record
    saved = _saved_modules(source, base)
    expected_shapes = expected(parts, shadow, layers, config.r, config.update_width)
    if _PROJECTION in source.tensors and shadow.width == parts.hidden_size:
        raise ConfigError(
            f"'{source.name}' has a projection between equal widths ({shadow.width}); a shadow of the base's width has none "
            "here, so it cannot be carried"
        )
    if task_type == "SEQ_CLS":
        expected_shapes.update({_HEAD + k: tuple(v.shape) for k, v in classifier_of(base).state_dict().items()})
    expected_shapes.update({key: tuple(value.shape) for key, value in saved.items()})
    advice = "base, configuration and weights do not belong together"
    check_tensors(source.tensors, expected_shapes, f"'{source.name}'", advice)
    if saved:
        modules = {key.removeprefix(base_name("")).rpartition(".")[0] for key in saved}
        config.modules_to_save = sorted(modules)
    done = Translation(config, to_ours(source.tensors, parts, shadow, layers))
    done.state.update({key: source.tensors[key] for key in saved})
    done.dropped.append(f"{_at(parts, layers[-1], 'shadow_update_*')}: nothing reads the last update")
    if shadow.dead_table():
        done.dropped.append(f"{_BACKBONE}{shadow.table}: the base's embedding feeds the shadow")
    if content.get("init_weights") is False:
        done.dropped.append("init_weights: it is about the start of training")
    if task_type == "CAUSAL_LM":
        done.notes += head_notes(parts.config)
    if content["share_embeddings"] and not shared:
        done.notes.append(
            "share_embeddings is true in the file but PEFT does not share here, and neither does this adapter"
        )
    return done


def _coverage(source: Source, parts: DecoderParts) -> range:
    """The layers that carry tensors; they must be the ones that the file's patterns choose, without a gap."""
    pattern = re.compile(re.escape(_at(parts, 0, "shadow_down")).replace(r"\.0\.", r"\.(\d+)\.") + r"\.default\.weight")
    found = sorted(int(match[1]) for name in source.tensors if (match := pattern.fullmatch(name)))
    try:
        rule = peft.ShadowConfig(**{key: source.content.get(key) for key in _COVERAGE})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source.path} has target modules that PEFT refuses ({error})") from error
    names = {layer: f"{parts.layers_name}.{layer}" for layer in range(parts.num_layers)}
    chosen = [i for i, name in names.items() if rule.target_modules is None or check_target_module_exists(rule, name)]
    if not found or found != chosen or found != list(range(found[0], found[-1] + 1)):
        raise AdapterFileError(
            f"'{source.name}' holds tensors for the layers {found} of {parts.layers_name}, its target_modules choose {chosen} "
            f"of this base's {parts.num_layers}; they must agree and have no gap, so pass the base it was trained on"
        )
    if found[0] == 0 and found[-1] < parts.num_layers - 1:
        warnings.warn(
            f"'{source.name}' adapts layers 0 to {found[-1]} of {parts.num_layers}; PEFT adapts all unless told otherwise, so "
            f"check that it was not trained on a base of {found[-1] + 1} layers",
            stacklevel=2,
        )
    return range(found[0], found[-1] + 1)


def _saved_modules(source: Source, base: PreTrainedModel) -> dict[str, Tensor]:
    """Tensors of ``modules_to_save``, by their name in the file, with the base's own values for their shapes."""
    names = source.content.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{source.path} has modules_to_save = {quote(names)} but needs a list of names")
    chosen = [name for name, _ in base.named_modules() if any(name == n or name.endswith("." + n) for n in names)]
    if not chosen and names and source.task_type != "SEQ_CLS":
        raise AdapterFileError(f"'{source.name}' saves the modules {quote(names)}, which this base does not have")
    return {
        base_name(f"{module}.{key}"): value
        for module in chosen
        for key, value in base.get_submodule(module).state_dict().items()
    }


def expected(parts: DecoderParts, shadow: ShadowLayout, layers: range, r: int, m: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the method in ``adapter_model.safetensors``, heads and saved modules aside."""
    d = parts.hidden_size
    shapes: dict[str, tuple[int, ...]] = {_BACKBONE + k: v for k, v in shadow.shapes.items()}
    if shadow.width != d:
        shapes[_PROJECTION] = (d, shadow.width)
    for layer in layers:
        shapes[_at(parts, layer, "shadow_down.default.weight")] = (r, d)
        shapes[_at(parts, layer, "shadow_up.default.weight")] = (d, r)
        t_in, t_out, g_in, g_out = _update(parts, layer)
        for first, second in ((t_in, t_out), (g_in, g_out)):
            shapes.update({f"{first}.weight": (m, d), f"{first}.bias": (m,)})
            shapes.update({f"{second}.weight": (d, m), f"{second}.bias": (d,)})
    return shapes


def to_ours(
    tensors: Mapping[str, Tensor], parts: DecoderParts, shadow: ShadowLayout, layers: range
) -> dict[str, Tensor]:
    """Their tensors under this package's names; a linear map, so it takes gradients to gradients. Saved modules aside."""
    state = backbone_to_ours(
        parts, shadow, {k[len(_BACKBONE) :]: v for k, v in tensors.items() if k.startswith(_BACKBONE)}
    )
    for layer in layers:
        state[link_name(parts, layer, "injection.w_down")] = tensors[_at(parts, layer, "shadow_down.default.weight")]
        state[link_name(parts, layer, "injection.w_up")] = tensors[_at(parts, layer, "shadow_up.default.weight")]
        if layer != layers[-1]:
            for key, value in fuse_update(tensors, *_update(parts, layer)).items():
                state[link_name(parts, layer + 1, f"update.{key}")] = value
    if _PROJECTION in tensors:
        state[hub_name(parts, "projection.weight")] = tensors[_PROJECTION]
    state.update({hub_name(parts, f"head.{k[len(_HEAD) :]}"): v for k, v in tensors.items() if k.startswith(_HEAD)})
    return state


# -------------------------------------------------------------------------------------------------------------- writing


def write(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> list[str]:
    """Write an adapter of variant ``peft`` in PEFT's format; returns what the format leaves unsaid.

    Raises:
        ConfigError: naming what the format cannot express.
    """
    own = take_apart(model, adapter_name)
    config, parts, shadow = own.config, own.parts, own.shadow
    refused = {
        f"variant={config.variant!r} (its mathematics is 'peft')": config.variant != "peft",
        "use_update=False": not config.use_update,
        "own_shadow_head=True": config.own_shadow_head,
        "share_embeddings=True with an explicit shadow": not config.is_mirror and config.shares_embeddings,
    }
    if any(refused.values()):
        raise ConfigError(
            f"PEFT's format cannot express {', '.join(k for k, no in refused.items() if no)}; keep shadowpeft's own"
        )
    layers, notes = config.refined(parts.num_layers), []
    sizes: dict[str, Any] = {}
    if config.is_mirror:
        sizes = {
            **sizes_of(parts.config, shadow.config, _SIZES),
            "shadow_num_hidden_layers": shadow.config.num_hidden_layers,
        }
        shadow_model = "mirror"
    else:
        shadow_model = _source_of_shadow(config.shadow_model, shadow)
        notes.append(f"PEFT takes the shadow's configuration from '{shadow_model}', which must stay where it is")
    tensors = {_BACKBONE + k: v for k, v in backbone_from_ours(parts, shadow, own.state).items()}
    if shadow.dead_table():
        notes.append(f"filled with zeros, since nothing reads it: {_BACKBONE}{shadow.table}")
    if shadow.width != parts.hidden_size:
        tensors[_PROJECTION] = own.state[hub_name(parts, "projection.weight")]
    for layer in layers:
        for what in ("down", "up"):
            tensors[_at(parts, layer, f"shadow_{what}.default.weight")] = own.state[
                link_name(parts, layer, f"injection.w_{what}")
            ]
        if layer != layers[-1]:
            fused = {
                k: own.state[link_name(parts, layer + 1, f"update.{k}")] for k in ("w_in", "w_out", "b_in", "b_out")
            }
            tensors.update(split_update(fused, *_update(parts, layer)))
    shapes = expected(parts, shadow, layers, config.r, config.update_width)
    tensors.update({name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors})
    notes.append(f"filled with zeros, since nothing reads them: {_at(parts, layers[-1], 'shadow_update_*')}")
    prefix = hub_name(parts, "head.")
    for key, value in own.state.items():
        if key.startswith(prefix):
            tensors[_HEAD + key[len(prefix) :]] = value
        elif "shadow_hub." not in key and "shadow_link." not in key:
            tensors[key] = value  # modules_to_save, which PEFT writes the same way for every method
    foreign = peft.ShadowConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        target_modules=sorted(f"{parts.layers_name}.{layer}" for layer in layers),
        shadow_model=shadow_model,
        share_embeddings=config.shares_embeddings,
        update_hidden_size=config.update_width,
        modules_to_save=config.modules_to_save,
        **{key: getattr(config, key) for key in _VALUES},
        **sizes,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    foreign.save_pretrained(str(folder))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return notes


def _source_of_shadow(shadow_model: Any, shadow: ShadowLayout) -> str:
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


_SHAPE = {"model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}

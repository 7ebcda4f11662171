"""Adapters of other packages: which format a folder or Hub id holds, reading it onto a base, and writing it.

One file per format: :mod:`~shadowpeft.hf.formats.authors` (package ``shadow-peft``) and
:mod:`~shadowpeft.hf.formats.peft_shadow` (PEFT's ``SHADOW``). A reader gives a :class:`~.common.Translation`: this package's
configuration and tensors, and what was dropped or left unsaid. Projected checkpoints are models, not adapters; they are in
:mod:`shadowpeft.hf.files.projected`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.aliases import is_alias
from shadowpeft.hf.base.fingerprint import fingerprint
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.files.locate import CONFIG, check_not_missing, find_file
from shadowpeft.hf.files.projected import is_projected
from shadowpeft.hf.files.reading import read_json
from shadowpeft.hf.formats import authors, peft_shadow
from shadowpeft.hf.formats.common import ForeignAdapter, Translation
from shadowpeft.hf.layer import clean_on_failure

OURS, AUTHORS, PEFT, PROJECTED = "shadowpeft", "authors", "peft", "projected"

_FORMATS: dict[str, Any] = {AUTHORS: authors, PEFT: peft_shadow}

_log = logging.getLogger(__name__)

__all__ = ["AUTHORS", "OURS", "PEFT", "PROJECTED", "Translation", "detect", "load", "write"]


def detect(adapter: str | Path) -> str:
    """Which format a folder or Hub id holds: ``shadowpeft``, ``authors``, ``peft`` or ``projected``.

    An unreadable or foreign ``adapter_config.json`` counts as this package's format, whose reader says what is wrong.

    Raises:
        AdapterFileError: if it holds two formats, or none.
    """
    check_not_missing(Path(adapter))
    own, theirs = (_path(adapter, name) for name in (CONFIG, authors.CONFIG))
    if own and theirs:
        raise AdapterFileError(f"'{adapter}' has both {CONFIG} and {authors.CONFIG}; give a folder with one adapter")
    if theirs:
        return AUTHORS
    if own is None and is_projected(adapter):
        return PROJECTED
    own = own or find_file(adapter, CONFIG)  # raises, and says why there is none
    return PEFT if read_json(own).get("peft_type") == "SHADOW" else OURS


def _path(adapter: str | Path, name: str) -> Path | None:
    try:
        return find_file(adapter, name)
    except AdapterFileError:
        return None


def load(
    adapter: str | Path,
    kind: str,
    base: nn.Module | str | Path | None = None,
    *,
    shadow_model: Any = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> tuple[PeftModel, Translation]:
    """Load an adapter of another package onto its base; arguments and errors as :func:`shadowpeft.load`.

    Args:
        kind: what :func:`detect` said.

    Returns:
        the adapted model and the translation, whose tensors are in the model.
    """
    if kind == PROJECTED:
        raise AdapterFileError(
            f"'{adapter}' is a projected checkpoint, a model and not an adapter; use it as shadow_model=, or turn it into a "
            "stock model with: shadowpeft convert"
        )
    reader = _FORMATS[kind]
    opened = reader.open_adapter(adapter)
    named = opened.base if base is None else base
    if named is None:
        raise ConfigError(f"'{adapter}' does not name its base; pass base= (on the command line --base)")
    model = named if isinstance(named, nn.Module) else _load_base(opened, named, base is None)
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"base is a {type(model).__name__} but must be a transformers model without an adapter, or a name"
        )
    task = "SEQ_CLS" if model.get_output_embeddings() is None else "CAUSAL_LM"
    if opened.task_type not in (None, task):
        raise ConfigError(f"'{adapter}' is a {opened.task_type} adapter but the base is a {type(model).__name__}")
    with clean_on_failure(model):
        translation: Translation = reader.translate(opened, model, task, shadow_model)
        config = translation.config
        config.base_fingerprint = fingerprint(model, find_decoder(model))
        config._loaded = True
        config.inference_mode = not is_trainable
        if not isinstance(named, nn.Module) and is_alias(str(named)):
            config.base_alias = str(named)
        mode = model.training
        adapted = get_peft_model(model, config, adapter_name=adapter_name)
        set_peft_model_state_dict(adapted, translation.state, adapter_name=adapter_name)
        adapted.train(mode if is_trainable else False)
    for line in (*(f"dropped {line}" for line in translation.dropped), *translation.notes):
        _log.info("'%s': %s", adapter, line)
    return adapted, translation


def _load_base(adapter: ForeignAdapter, name: str | Path, recorded: bool) -> PreTrainedModel:
    """The base ``name``; at the adapter's revision if the adapter names it (``recorded``)."""
    task = adapter.task_type or _task_of(str(name))
    options = {
        "num_labels": adapter.num_labels if task == "SEQ_CLS" else None,
        "revision": adapter.revision if recorded else None,
    }
    return load_base(name, task, **{key: value for key, value in options.items() if value is not None})


def _task_of(base: str) -> str:
    if is_alias(base):
        return "CAUSAL_LM"
    try:
        architectures = getattr(AutoConfig.from_pretrained(base, trust_remote_code=False), "architectures", None) or []
    except (OSError, ValueError):
        return "CAUSAL_LM"  # load_base says why it cannot be read
    return "SEQ_CLS" if any(name.endswith("ForSequenceClassification") for name in architectures) else "CAUSAL_LM"


def write(model: PeftModel, folder: str | Path, kind: str, adapter_name: str | None = None) -> list[str]:
    """Write an adapter in the format ``authors`` or ``peft``; returns what the format leaves unsaid.

    Raises:
        ConfigError: naming what the format cannot express.
    """
    notes: list[str] = _FORMATS[kind].write(model, Path(folder), adapter_name)
    return notes

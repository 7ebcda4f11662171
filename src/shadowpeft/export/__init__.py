"""The edge model as files of other runtimes: one format a module, each with ``write`` and ``read``.

``write(model, tokenizer, path, dtype)`` writes a causal language model and returns what there is to say about the file;
``read(path)`` loads it back as something that is called with ``input_ids`` ``(B, T)`` and ``attention_mask`` ``(B, T)`` and
gives ``.logits`` ``(B, T, V)``. :mod:`~shadowpeft.export.vocab` makes the vocabulary smaller before,
:mod:`~shadowpeft.export.verify` compares after.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowpeft.errors import ConfigError

__all__ = ["FORMATS", "Format", "read", "write"]


@dataclass(frozen=True)
class Format:
    """One target of ``shadowpeft export``."""

    module: str
    """Module of this package that writes and reads it."""
    agreement: dict[str, float]
    """Number type -> the share of the source's greedy tokens that a good file must agree with; the first is the default.

    1 where nothing but the order of additions changes. A type that rounds weights flips near ties: the floors are far above
    what a wrong file reaches (a wrong permutation of the heads: below 0.3) and below what was measured (docs/export.md).
    """
    suffix: str = ""
    """How the file is called; empty: a folder."""
    generates: bool = True
    """Whether what ``read`` gives is a transformers model, which a task can be evaluated with."""


FORMATS = {
    "hf": Format("hf", {"f32": 1.0, "f16": 0.95, "bf16": 0.85}),
    "gguf": Format("gguf", {"f16": 0.95, "q8_0": 0.85, "q4_0": 0.4, "f32": 1.0}, suffix=".gguf"),
    "onnx": Format("onnx", {"f32": 1.0}, generates=False),
    "int8": Format("quantize", {"int8": 0.85}),
    "int4": Format("quantize", {"int4": 0.4}),
}


def find(name: str, dtype: str | None = None) -> tuple[Format, str]:
    """The format of this name and the number type, the default for None.

    Raises:
        ConfigError: if there is no such format or it has no such number type.
    """
    if name not in FORMATS:
        raise ConfigError(f"the format is '{name}' but must be one of {', '.join(FORMATS)}")
    known = FORMATS[name].agreement
    if dtype is not None and dtype not in known:
        raise ConfigError(f"dtype is '{dtype}' but the format '{name}' has {', '.join(known)}")
    return FORMATS[name], dtype or next(iter(known))


def write(name: str, model: Any, tokenizer: Any, path: Path, dtype: str) -> dict[str, Any]:
    """Write ``model`` and ``tokenizer`` in the format ``name``; returns what the format's module has to say.

    Raises:
        ConfigError: if the packages of the format are missing.
        UnsupportedModelError: if the format cannot express the model or the tokenizer, naming why.
    """
    return dict(_module(name).write(model, tokenizer, path, dtype))


def read(name: str, path: Path) -> Any:
    """What :func:`write` wrote, loaded back."""
    return _module(name).read(path)


def _module(name: str) -> Any:
    return importlib.import_module(f"shadowpeft.export.{FORMATS[name].module}")

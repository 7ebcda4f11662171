"""The edge model as files of other runtimes: one format a module, each with ``write`` and ``read``.

``write(model, tokenizer, path, dtype)`` writes a causal language model and returns what there is to say about the file;
``read(path)`` loads it back as something that is called with ``input_ids`` ``(B, T)`` and ``attention_mask`` ``(B, T)`` and
gives ``.logits`` ``(B, T, V)``. :mod:`~shadowpeft.export.vocab` makes the vocabulary smaller before,
:mod:`~shadowpeft.export.verify` compares after.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowpeft.errors import ConfigError

__all__ = ["FORMATS", "Format", "find", "read", "write"]


@dataclass(frozen=True)
class Tolerance:
    """What a number type may cost; a file that costs more is wrong.

    Rounded weights flip near ties, and small models with formulaic answers flip few: with the rows of W_q and W_k in the wrong
    order the demo's model still chose 99 of 128 tokens right (its q4_0: docs/export.md). So the matrices are compared too.
    """

    agreement: float
    """Least share of the source's greedy tokens; 1 where nothing but the order of additions changes."""
    error: float
    """Largest ``||W' - W|| / ||W||`` of a matrix: twice and more of what rounding makes of normal weights, and far below the
    sqrt(2) of a matrix whose rows are mixed up."""


@dataclass(frozen=True)
class Format:
    """One target of ``shadowpeft export``."""

    module: str
    """Module of this package that writes and reads it."""
    limits: dict[str, Tolerance]
    """Number type -> what a good file keeps to; the first is the default."""
    packages: tuple[str, ...] = ()
    """Modules beyond transformers that it needs; ``pip install 'shadowpeft[export]'`` brings them."""
    suffix: str = ""
    """How the file is called; empty: a folder."""
    generates: bool = True
    """Whether what ``read`` gives is a transformers model, which a task can be evaluated with."""


FORMATS = {
    "hf": Format("hf", {"f32": Tolerance(1.0, 0.0), "f16": Tolerance(0.95, 1e-3), "bf16": Tolerance(0.85, 8e-3)}),
    "vllm": Format("vllm", {"f32": Tolerance(1.0, 0.0), "f16": Tolerance(0.95, 1e-3), "bf16": Tolerance(0.85, 8e-3)}),
    "gguf": Format(
        "gguf",
        {"f16": Tolerance(0.95, 1e-3), "q8_0": Tolerance(0.85, 0.02), "q4_0": Tolerance(0.4, 0.2), "f32": Tolerance(1.0, 0.0)},
        packages=("gguf",),
        suffix=".gguf",
    ),
    "onnx": Format("onnx", {"f32": Tolerance(1.0, 0.0)}, packages=("onnx", "onnxruntime", "onnxscript"), generates=False),
    "onnx-genai": Format(
        "genai", {"f32": Tolerance(1.0, 0.0)}, packages=("onnxruntime_genai", "onnxruntime"), generates=False
    ),
    "int8": Format("quantize", {"int8": Tolerance(0.85, 0.05)}, packages=("torchao",)),
    "int4": Format("quantize", {"int4": Tolerance(0.4, 0.25)}, packages=("torchao",)),
}


_SPELLINGS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def find(name: str, dtype: str | None = None) -> tuple[Format, str]:
    """The format of this name and the number type, the default for None.

    Raises:
        ConfigError: if there is no such format, it has no such number type, or a package that it needs is missing.
    """
    if name not in FORMATS:
        raise ConfigError(f"the format is '{name}' but must be one of {', '.join(FORMATS)}")
    target = FORMATS[name]
    given = dtype
    if dtype is not None:  # also as torch and llama.cpp write them
        dtype = _SPELLINGS.get(dtype.lower(), dtype.lower())
    if dtype is not None and dtype not in target.limits:
        raise ConfigError(f"dtype is '{given}' but the format '{name}' only has {', '.join(target.limits)}")
    for package in target.packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the format '{name}' needs the package {package}; run: pip install 'shadowpeft[export]'")
    return target, dtype or next(iter(target.limits))


def write(name: str, model: Any, tokenizer: Any, path: Path, dtype: str) -> dict[str, Any]:
    """Write ``model`` and ``tokenizer`` in the format ``name``; returns what the format's module has to say.

    Raises:
        UnsupportedModelError: if the format cannot express the model or the tokenizer, naming why.
    """
    notes = dict(_module(name).write(model, tokenizer, path, dtype))
    if not FORMATS[name].suffix:
        from shadowpeft.hf.files.digests import write_sums  # torch: --help must not wait for it

        write_sums(path)
    return notes


def read(name: str, path: Path) -> Any:
    """What :func:`write` wrote, loaded back.

    Raises:
        ConfigError: if a file of the folder is not the one that was written.
    """
    from shadowpeft.hf.files.digests import check_sums

    check_sums(path, f"the export '{path}'")
    return _module(name).read(path)


def _module(name: str) -> Any:
    return importlib.import_module(f"shadowpeft.export.{FORMATS[name].module}")

"""Reading tensors of other packages' files: whole, finite, all there, and of the right shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shadowpeft.errors import AdapterFileError
from shadowpeft.hf.files import check_dtypes, check_values, quote, read_header, shorten


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float32.

    Raises:
        AdapterFileError: if it is truncated or empty, or a tensor is no floating point, not finite, or more than float32.
    """
    check_dtypes(path, header := read_header(path))
    check_values(path, header, {})
    try:
        return {name: value.float() for name, value in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise AdapterFileError(f"{path} could not be read ({shorten(error)}); it is damaged or too large") from error


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str, advice: str) -> None:
    """Every expected tensor is there with its shape, and no other.

    Raises:
        AdapterFileError: naming the first tensor that is missing, unknown or of another shape.
    """
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        shown = ", ".join(quote(name) for name in (*missing[:2], *unknown[:2]))
        raise AdapterFileError(
            f"{what}: {len(missing)} tensors are missing and {len(unknown)} are unknown ({shown}); {advice}"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise AdapterFileError(
                f"{what}: tensor {quote(name)} has shape {tuple(found[name].shape)} but needs {shape}; {advice}"
            )

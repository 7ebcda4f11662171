"""Reading tensors of other packages' files: whole, finite, all there, and of the right shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shadowpeft.errors import AdapterFileError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float32.

    Raises:
        AdapterFileError: if it is truncated or empty, or a tensor is no floating point or not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file ({error}); it is truncated or damaged"
        ) from error
    if not tensors:
        raise AdapterFileError(f"{path} holds no tensors; the adapter was not saved completely")
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise AdapterFileError(f"tensor {name} is {value.dtype} in {path} but must be floating point")
        if not bool(torch.isfinite(value).all()):
            raise AdapterFileError(f"tensor {name} in {path} holds NaN or infinite values; the adapter is damaged")
    return {name: value.float() for name, value in tensors.items()}


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str, advice: str) -> None:
    """Every expected tensor is there with its shape, and no other.

    Raises:
        AdapterFileError: naming the first tensor that is missing, unknown or of another shape.
    """
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise AdapterFileError(
            f"{what}: {len(missing)} tensors are missing {missing[:2]}, {len(unknown)} are unknown {unknown[:2]}; {advice}"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise AdapterFileError(
                f"{what}: tensor {name} has shape {tuple(found[name].shape)} but needs {shape}; {advice}"
            )

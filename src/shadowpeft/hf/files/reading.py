"""Files that came from somewhere else: JSON and safetensors, judged before anything is built or allocated by them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shadowpeft.errors import AdapterFileError
from shadowpeft.hf.files.locate import find_file
from shadowpeft.messages import quote, shorten

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a model in one file, and the list of its files where there are several."""
MAX_CONFIG_BYTES = 4 * 2**20
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""dtypes of adapter tensors, as a safetensors header names them; float8 has no infinity and cannot be trained in."""

BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers' configurations and classes raise for values that describe no model: they judge few of them."""


class Declared(NamedTuple):
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        AdapterFileError: if it cannot be read, is too large, not JSON, names a key twice, or is not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise AdapterFileError(f"{path} has {size} bytes but a configuration has a few thousand; it is damaged")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=_constant)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair can be neither printed nor saved again
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read ({error.strerror}); check the file") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, 10,000 brackets
        raise AdapterFileError(f"{path} is not valid JSON ({shorten(error)}); it is truncated or damaged") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} holds a JSON {type(content).__name__} but must hold an object")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quote(twice)} is given twice")
    return content


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no value of a setting")
    return float(name)


def read_header(path: Path) -> dict[str, Declared]:
    """Names, dtypes and shapes in a safetensors file; no tensor is read.

    safetensors itself refuses headers whose offsets overlap, leave holes or do not match the shapes and the file's size.

    Raises:
        AdapterFileError: if the file is truncated, damaged, not safetensors, or holds no tensors.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            header = {}
            for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
                part = handle.get_slice(name)
                header[name] = Declared(part.get_dtype(), tuple(part.get_shape()))
    except MemoryError as error:
        raise AdapterFileError(
            f"{path} with {path.stat().st_size:,} bytes does not fit into memory; it is no adapter, or free some memory"
        ) from error
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise AdapterFileError(
            f"{path} is not a whole safetensors file ({shorten(error)}); it is truncated or damaged"
        ) from error
    for name, (_, shape) in header.items():
        if any(size >= 2**62 for size in shape):  # an empty tensor may declare any number beside its zero
            raise AdapterFileError(
                f"tensor {quote(name)} in {path} declares a size of {max(shape):,}; the file is damaged"
            )
    if not header:
        raise AdapterFileError(f"{path} holds no tensors; the adapter was not saved completely")
    return header


def weight_files(source: str | Path) -> dict[str, str]:
    """The file of each tensor of a model, in a folder or on the Hub, saved in one piece or in shards.

    Raises:
        AdapterFileError: if it has no safetensors files, or the file or the index of the shards is damaged.
    """
    try:
        whole = find_file(source, WHOLE)
    except AdapterFileError as error:
        try:
            shards: Any = read_json(find_file(source, INDEX)).get("weight_map")
        except AdapterFileError:
            raise error from None
        files: dict[str, str] = shards if isinstance(shards, dict) else {}
        if not files or any(not isinstance(file, str) or Path(file).name != file for file in files.values()):
            raise AdapterFileError(f"{INDEX} of '{source}' names no files beside it; it is damaged") from error
        return files
    return dict.fromkeys(read_header(whole), WHOLE)


def check_dtypes(path: Path, header: dict[str, Declared]) -> None:
    """Every tensor is a floating-point number that a model can train with.

    Raises:
        AdapterFileError: naming the first that is not.
    """
    for name, (dtype, _) in header.items():
        if dtype not in FLOATS:
            raise AdapterFileError(
                f"tensor {quote(name)} in {path} is {_torch_name(dtype)} but must be floating point ({', '.join(FLOATS)}); "
                "the file is damaged or of another program"
            )


def _torch_name(dtype: str) -> str:
    return re.sub(r"^I(\d+)$", r"int\1", dtype)


def check_values(path: Path, header: dict[str, Declared], wanted: Mapping[str, Tensor]) -> None:
    """Every tensor is finite in the file and in the dtype of the model's own (``wanted``, by name); read one by one.

    Raises:
        AdapterFileError: naming the first that is not.
    """
    for name, value in read_values(path, header):
        check_value(name, value, wanted[name].dtype if name in wanted else torch.float32, str(path))


def read_values(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a safetensors file in their own dtypes, one by one.

    Raises:
        AdapterFileError: if one cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            for name in names:
                yield name, handle.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise AdapterFileError(f"{path} could not be read ({shorten(error)}); it is damaged or too large") from error


def check_value(name: str, value: Tensor, dtype: torch.dtype, where: str) -> None:
    """One tensor of a file is finite, and a float64 one loses nothing in the ``dtype`` of the model.

    Raises:
        AdapterFileError: if not; what was loaded would not be what the file says.
    """
    if not bool(torch.isfinite(value).all()):
        raise AdapterFileError(f"tensor {quote(name)} in {where} holds NaN or infinite values; the adapter is damaged")
    narrow = dtype if dtype.is_floating_point else torch.float32
    if value.dtype == torch.float64 and not torch.equal(value.to(narrow).double(), value):
        raise AdapterFileError(
            f"tensor {quote(name)} is float64 in {where} but {str(narrow).removeprefix('torch.')} in the model, which cannot "
            "hold its values; save the adapter from a model of its own dtype"
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float32.

    Raises:
        AdapterFileError: if it is truncated or empty, or a tensor is no floating point, not finite, or more than float32.
    """
    check_dtypes(path, header := read_header(path))
    check_values(path, header, {})
    return {name: value.float() for name, value in read_values(path, header)}


def check_tensors(given: Mapping[str, Any], expected: Mapping[str, Any], what: str, advice: str) -> None:
    """Every expected tensor is there with its shape, and no other.

    Args:
        given: tensors, or what a header declares, by name. expected: shapes, or anything that has one, by name.

    Raises:
        AdapterFileError: naming the first tensor that is missing, unknown or of another shape.
    """
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        shown = ", ".join(quote(name) for name in (*missing[:2], *unknown[:2]))
        raise AdapterFileError(
            f"{what}: {len(missing)} tensors are missing and {len(unknown)} are unknown ({shown}); {advice}"
        )
    for name, want in expected.items():
        shape = tuple(getattr(want, "shape", want))
        if tuple(given[name].shape) != shape:
            raise AdapterFileError(
                f"{what}: tensor {quote(name)} has shape {tuple(given[name].shape)} but needs {shape}; {advice}"
            )

"""Versions of weights: folders that others may write to, link anew or delete at any time, also while they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from shadowpeft.errors import AdapterFileError, ShadowPeftError

_TEMPLATES = ("chat_templates", "additional_chat_templates")
_ATTEMPTS = 3
DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What libraries raise on files that are not what they say; a server must survive all of it."""


@dataclass(frozen=True)
class Version:
    """Weights that a name had: where they came from, and what they were."""

    folder: str
    """Links resolved; or a Hub id."""
    digest: str | None = None
    """Of all files; None: not known."""

    @staticmethod
    def of(folder: str) -> Version:
        """The version that a folder holds now."""
        path = Path(folder)
        if not path.is_dir():
            return Version(folder)
        source = path.resolve()
        return Version(str(source), _digest([(name, source / name) for name in _files(source)]))

    @property
    def name(self) -> str:
        """What clients call it."""
        return Path(self.folder).name


@contextmanager
def snapshot(folder: str) -> Iterator[tuple[Path, Version]]:
    """A private copy of a folder, all from one moment, and which version it is; the copy is deleted at the end.

    A link in its path is followed once. What the loaders raise inside about files that are damaged becomes one kind of error,
    which names the folder and not the copy.

    Raises:
        AdapterFileError: if it cannot be read, keeps changing while it is read, or is damaged.
    """
    try:
        source = Path(folder).resolve(strict=True)
        with tempfile.TemporaryDirectory(prefix="shadowpeft-") as private:
            copy = Path(private) / source.name
            digest = _copy(source, copy)
            try:
                yield copy, Version(str(source), digest)
            except (*DAMAGE, ShadowPeftError) as error:
                text = str(error).replace(str(copy), str(source))
                if isinstance(error, ShadowPeftError):
                    error.args = (text,)
                    raise
                raise AdapterFileError(
                    f"'{source}' could not be loaded ({type(error).__name__}: {text[:300]}); save or fetch it again"
                ) from error
    except OSError as error:
        raise AdapterFileError(f"'{folder}' could not be read ({error.strerror or error}); check it") from error


def own_memory(model: nn.Module) -> Any:
    """``model`` with all tensors on the CPU in memory of its own: those of a mapped file change with it, and end the process
    if it is cut short."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and type(tensor.data) is torch.Tensor:
            tensor.data = tensor.data.clone()
    return model


def _files(folder: Path) -> list[str]:
    """The files of a version, without what a training run leaves beside them (checkpoints are folders)."""
    inside = [folder, *(folder / name for name in _TEMPLATES)]
    return sorted(str(f.relative_to(folder)) for part in inside if part.is_dir() for f in part.iterdir() if f.is_file())


def _copy(source: Path, target: Path) -> str:
    """Copy the files as they are at one moment; the digest of the copy."""
    for _ in range(_ATTEMPTS):
        before = _state(source)
        shutil.rmtree(target, ignore_errors=True)
        for name in before:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        target.mkdir(exist_ok=True)
        if _state(source) == before:
            return _digest([(name, target / name) for name in before])
    raise AdapterFileError(f"'{source}' changes while it is read; write a new version into a folder of its own")


def _state(folder: Path) -> dict[str, tuple[int, ...]]:
    """What changes when a file is written or replaced."""
    statuses = {name: os.stat(folder / name) for name in _files(folder)}
    return {name: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in statuses.items()}


def _digest(files: list[tuple[str, Path]]) -> str:
    whole = hashlib.sha256()
    for name, path in files:
        whole.update(f"{name}\0{path.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()

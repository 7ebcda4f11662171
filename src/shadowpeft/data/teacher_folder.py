"""The folder of a teacher cache: its index, its shards, and where a sequence is.

::

    teacher.json            format_version, k, temperature, length, base (fingerprint), data, sequences (once complete)
    shard-00000.safetensors tokens int32 (n, T); ids int32 (n, T, k); log_probs float16 (n, T, k)
    shard-00001.safetensors ...

A shard is written beside and renamed, so a killed build leaves whole shards only and continues after them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shadowpeft.errors import AdapterFileError, BaseMismatchError, DataError
from shadowpeft.hf.base.fingerprint import check_fingerprint, fingerprint
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.files.reading import read_json
from shadowpeft.messages import quote, shorten
from shadowpeft.storage import is_temporary, whole, write_text

INDEX = "teacher.json"
FORMAT_VERSION = 1
_KEYS = ("format_version", "k", "temperature", "length", "base", "data")

BaseIdentity = nn.Module | dict[str, Any]
"""A model, or its fingerprint."""


class CacheFolder:
    """A folder with an index. The shards are looked at by :meth:`find_shards`, and before any sequence is read.

    Raises:
        DataError: if there is no index, or a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards: list[Path] = []
        self.ends: list[int] = []
        """For each shard the number of sequences up to its end."""
        if not (path / INDEX).is_file():
            raise DataError(f"'{path}' has no {INDEX}, so it is no teacher cache; make one with TeacherCache.build")
        try:
            self.record = read_json(path / INDEX)
        except AdapterFileError as error:
            raise DataError(str(error)) from error
        missing = [key for key in _KEYS if key not in self.record]
        if missing or self.record["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{path / INDEX} has format version {quote(self.record.get('format_version'))} and lacks {missing}; this "
                f"shadowpeft reads version {FORMAT_VERSION}, build the cache anew"
            )

    @classmethod
    def look(cls, path: Path, model: BaseIdentity, data: str, k: int, temperature: float) -> CacheFolder | None:
        """The folder of a build with these arguments, or None if it is empty or not there.

        Raises:
            DataError, BaseMismatchError: if it holds anything else.
        """
        if (path / INDEX).is_file():
            folder = cls(path)
            folder.compare(model, data, k)
            if folder.record["temperature"] != temperature:
                raise DataError(
                    f"the teacher cache '{path}' has temperature {folder.record['temperature']}, not {temperature}; build into "
                    "another folder"
                )
            return folder
        # another process may have made the index since the line above looked
        if path.exists() and (
            not path.is_dir() or any(p.name != INDEX and not is_temporary(p.name) for p in path.iterdir())
        ):
            raise DataError(f"'{path}' is no teacher cache and not empty; choose another folder")
        return None

    @classmethod
    def begin(cls, path: Path, model: nn.Module, data: str, k: int, temperature: float) -> CacheFolder:
        """The folder of a build that is continued, or of a new one."""
        folder = cls.look(path, model, data, k, temperature)
        if folder is None:
            path.mkdir(parents=True, exist_ok=True)
            base = fingerprint(model, find_decoder(model))
            record = {"k": k, "temperature": temperature, "length": None, "base": base, "data": data}
            _write_index(path, {"format_version": FORMAT_VERSION, **record})
            folder = cls(path)
        folder.find_shards()
        return folder

    @property
    def is_finished(self) -> bool:
        """Whether the build has come to its end."""
        return type(self.record.get("sequences")) is int

    @property
    def count(self) -> int:
        """Number of sequences in the shards."""
        return self.ends[-1] if self.ends else 0

    def compare(self, model: BaseIdentity | None, data: str | None, k: int | None) -> None:
        """Raise if the index names another base, other data or another ``k``; None is not compared."""
        for name, value in (("data", data), ("k", k)):
            if value is not None and self.record[name] != value:
                raise DataError(
                    f"the teacher cache '{self.path}' has {name} = {quote(self.record[name])}, not {quote(value)}; use another "
                    "folder"
                )
        if model is not None:
            identity = model if isinstance(model, dict) else fingerprint(model, find_decoder(model))
            try:
                check_fingerprint(self.record["base"], identity)
            except BaseMismatchError as error:
                raise BaseMismatchError(
                    f"the teacher cache '{self.path}' is of another base: {str(error).partition(';')[0]}; use another folder"
                ) from error

    def find_shards(self) -> None:
        """Find the whole shards, in order (a gap ends them); every header must say what the index says."""
        length, k = self.record["length"], self.record["k"]
        while (path := self._shard(len(self.shards))).is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise _unreadable(path, error) from error
            rows = shapes.get("tokens", (0,))[0]
            if shapes != {"tokens": (rows, length), "ids": (rows, length, k), "log_probs": (rows, length, k)}:
                raise DataError(f"{path} holds {shapes}, not {length} tokens with {k} each; build the cache anew")
            self.shards.append(path)
            self.ends.append(self.count + rows)

    def place(self, index: int) -> tuple[int, int]:
        """Shard, and row in it, of sequence ``index``."""
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)

    def read(self, index: int, *names: str) -> list[Tensor]:
        """One row of each of the tensors ``names``."""
        shard, row = self.place(index)
        try:
            with safe_open(self.shards[shard], framework="pt") as file:  # only the row is read
                return [file.get_slice(name)[row] for name in names]
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.shards[shard], error) from error

    def check_same(self, index: int, known: Tensor, tokens: Tensor) -> None:
        """Raise if the tokens ``known`` of sequence ``index`` are not ``tokens``."""
        if not torch.equal(known.long(), tokens.cpu().long()):
            raise DataError(
                f"sequence {index} of the stream differs from the one in the teacher cache '{self.path}'; build other data "
                "into another folder"
            )

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Write the next shard."""
        path = self._shard(len(self.shards))
        with whole(path) as beside:
            save_file({name: value.contiguous() for name, value in tensors.items()}, beside)
        self.shards.append(path)
        self.ends.append(self.count + len(tensors["tokens"]))

    def note(self, **values: Any) -> None:
        """Write ``values`` into the index."""
        self.record.update(values)
        _write_index(self.path, self.record)

    def _shard(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"


def _write_index(path: Path, record: dict[str, Any]) -> None:
    write_text(path / INDEX, json.dumps(record, indent=2, sort_keys=True) + "\n")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({shorten(error)}); build the cache anew in another folder")

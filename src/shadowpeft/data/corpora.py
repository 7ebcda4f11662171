"""Text for pretraining, document by document: files of JSON lines, plain text or parquet, and data sets of the Hub.

The readers of files are our own. Those of datasets 5.2 gave no document and no error for a file with brackets in its name, lost
up to 10 MB before the damage in a cut gzip file, and name neither file nor line of a bad row.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from shadowpeft.data.tasks.source import data_folder
from shadowpeft.errors import ConfigError, DataError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".txt": "text",
    ".txt.gz": "text",
    ".parquet": "parquet",
}
BUILTIN = ("en_corpus", "zh_corpus")
"""Corpora in the data folder (``SHADOWPEFT_DATA``)."""


class Origin(NamedTuple):
    """Where a document came from."""

    corpus: int
    shard: int
    """Index among the corpus's shards by name."""
    row: int
    """Line (first line, for plain text) or row, from 1."""


# ------------------------------------------------------------------------------------------------------ one file of text


class _Place(NamedTuple):
    """A place between two documents of a shard: a byte offset (uncompressed), a line (gzip) or a row group, and the rows
    before it."""

    at: int
    row: int


class _Damaged(Exception):
    """A shard cannot be read on."""


def _lines(path: Path, place: _Place) -> Iterator[tuple[str, int, _Place]]:
    """Lines from ``place`` on, each with its number (from 1) and the place after it."""
    packed = path.suffix == ".gz"
    row = place.row
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            if packed:
                for _ in range(place.at):
                    handle.readline()
            else:
                handle.seek(place.at)
            while raw := handle.readline():
                row += 1
                yield raw.decode("utf-8"), row, _Place(row if packed else handle.tell(), row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _Damaged(f"after line {row}: {_short(error)}") from error


def _read_jsonl(path: Path, field: str, place: _Place) -> Iterator[tuple[str, int, _Place]]:
    for line, row, after in _lines(path, place):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise _Damaged(f"line {row} is not JSON ({_short(error)})") from error
        text = content.get(field) if isinstance(content, dict) else None
        if not isinstance(text, str):
            known = ", ".join(content) if isinstance(content, dict) else type(content).__name__
            raise _Damaged(f"line {row} has no text under '{field}' (it has: {known})")
        yield text, row, after


def _read_text(path: Path, field: str, place: _Place) -> Iterator[tuple[str, int, _Place]]:
    """Documents are separated by empty lines."""
    parts: list[str] = []
    first, after = place.row + 1, place
    for line, row, after in _lines(path, place):
        if line.strip():
            if not parts:
                first = row
            parts.append(line)
        elif parts:
            yield "".join(parts).strip(), first, after
            parts = []
    if parts:
        yield "".join(parts).strip(), first, after


def _read_parquet(path: Path, field: str, place: _Place) -> Iterator[tuple[str, int, _Place]]:
    """One row group at a time; a resumed stream reads only the group in which it stopped and those after it."""
    import pyarrow
    from pyarrow import parquet

    row = place.row
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _Damaged(f"there is no column '{field}' (it has: {', '.join(file.schema_arrow.names)})")
            before = sum(file.metadata.row_group(i).num_rows for i in range(place.at))
            for group in range(place.at, file.num_row_groups):
                texts = file.read_row_group(group, columns=[field]).column(0)
                for index in range(row - before, len(texts)):
                    text = texts[index].as_py()
                    row += 1
                    if text is not None and not isinstance(text, str):
                        raise _Damaged(f"column '{field}' holds {type(text).__name__}, not text")
                    yield text or "", row, _Place(group, row)
                before += len(texts)
    except (OSError, pyarrow.ArrowException) as error:
        raise _Damaged(f"after row {row}: {_short(error)}") from error


_READERS = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_parquet}


def _short(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160]


# ---------------------------------------------------------------------------------------------------------- one corpus


class TextSource(Protocol):
    """A corpus that is read document by document, pass by pass."""

    name: str

    def next(self) -> tuple[str, int, int] | None:
        """Text, shard and row of the next document; None once at the end of each pass."""

    def where(self, shard: int, row: int) -> str:
        """A place in words."""

    def state(self) -> dict[str, Any]:
        """Where the source stands, as JSON."""

    def load(self, state: dict[str, Any]) -> None:
        """Stand there again."""


@dataclass
class Skipped:
    """A shard that was left, wholly or from some line on."""

    shard: str
    reason: str


class FileSource:
    """Files of JSON lines, plain text or parquet, in an order that seed and pass decide.

    Args:
        name: in messages. files: the shards. format: ``jsonl``, ``text``, ``parquet``, or None: by each file's name.
        field: key or column that holds the text. on_bad_shard: ``stop`` raises, ``skip`` goes on with the next shard and
            tells ``warn``.
        shuffle: whether the shards come in another order in each pass.

    Raises:
        ConfigError: if a file's format is unknown.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        *,
        format: str | None = None,
        field: str = "text",
        on_bad_shard: str = "stop",
        shuffle: bool = True,
        seed: int = 0,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self.files = list(files)
        self.formats = [format or format_of(file) for file in self.files]
        self.field, self.on_bad_shard, self.shuffle, self.seed = field, on_bad_shard, shuffle, seed
        self.warn = warn or (lambda message: None)
        self.turn, self.place = 0, _Place(0, 0)
        self.skipped: list[Skipped] = []
        self._open: Iterator[tuple[str, int, _Place]] | None = None
        self._begin(0)

    def _begin(self, number: int) -> None:
        """The order of the shards in a pass, as indices of :attr:`files`."""
        self.passes, self._order = number, list(range(len(self.files)))
        if self.shuffle:
            self._order.sort(key=lambda shard: stable_hash(self.seed, number, shard))

    def next(self) -> tuple[str, int, int] | None:
        """Text, shard and row of the next document; None at the end of a pass (the call after it begins the next).

        Raises:
            DataError: naming the shard that cannot be read, if ``on_bad_shard`` is ``stop``.
        """
        while self.turn < len(self.files):
            shard = self._order[self.turn]
            file = self.files[shard]
            if self._open is None:
                self._open = _READERS[self.formats[shard]](file, self.field, self.place)
            try:
                text, row, self.place = next(self._open)
                return text, shard, row
            except StopIteration:
                pass
            except _Damaged as error:
                if self.on_bad_shard != "skip":
                    raise DataError(
                        f"corpus '{self.name}': shard '{file}' cannot be read ({error}); mend or remove it, or set "
                        "on_bad_shard: skip"
                    ) from error
                if all(known.shard != str(file) for known in self.skipped):  # once, not in every pass
                    self.skipped.append(Skipped(str(file), str(error)))
                    self.warn(f"corpus '{self.name}': the rest of shard '{file}' is skipped ({error})")
            self.turn, self.place, self._open = self.turn + 1, _Place(0, 0), None
        self.turn = 0
        self._begin(self.passes + 1)
        return None

    def where(self, shard: int, row: int) -> str:
        """``'FILE', row N``."""
        return f"'{self.files[shard]}', row {row}"

    def state(self) -> dict[str, Any]:
        """Pass, shard, place in it, and what was skipped."""
        return {
            "passes": self.passes,
            "turn": self.turn,
            "place": list(self.place),
            "skipped": [[s.shard, s.reason] for s in self.skipped],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go to a place that :meth:`state` gave: one seek (for gzip: the lines before it are decompressed)."""
        self._begin(state["passes"])
        self.turn, self.place = state["turn"], _Place(*state["place"])
        self.skipped = [Skipped(*each) for each in state["skipped"]]
        self._open = None


class HubSource:
    """A data set that the ``datasets`` library streams: a Hub id, or a folder in one of its layouts.

    Its own position (shard and row) is what is saved, so a resumed run fetches one shard anew, not the whole.

    Raises:
        DataError: if it cannot be opened.
    """

    def __init__(
        self, name: str, repository: str, *, config: str | None = None, split: str = "train", field: str = "text"
    ) -> None:
        import datasets

        self.name, self.field = name, field
        try:
            self.stream = datasets.load_dataset(repository, config, split=split, streaming=True)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"corpus '{name}': the data set '{repository}' cannot be opened ({_short(error)}); check its name, config "
                "and split, and the network"
            ) from error
        self._start = self.stream.state_dict()
        self.passes, self.row = 0, 0
        self._rows: Iterator[dict[str, Any]] | None = None

    def next(self) -> tuple[str, int, int] | None:
        """Text, 0 and number of the next document; None at the end of a pass.

        Raises:
            DataError: if a row has no text, or the data set cannot be read on.
        """
        if self._rows is None:
            self._rows = iter(self.stream)
        try:
            content = next(self._rows)
        except StopIteration:
            self.stream.load_state_dict(self._start)
            self.passes, self.row, self._rows = self.passes + 1, 0, None
            return None
        except (OSError, ValueError) as error:
            raise DataError(
                f"corpus '{self.name}' cannot be read after row {self.row} ({_short(error)}); check the network and resume"
            ) from error
        self.row += 1
        text = content.get(self.field)
        if (text is not None and not isinstance(text, str)) or self.field not in content:
            raise DataError(
                f"corpus '{self.name}': row {self.row} has no text under '{self.field}'; its fields are "
                f"{', '.join(content)}, set field to one of them"
            )
        return text or "", 0, self.row

    def where(self, shard: int, row: int) -> str:
        """``row N``."""
        return f"row {row}"

    def state(self) -> dict[str, Any]:
        """Pass, row, and the stream's own state."""
        return {"passes": self.passes, "row": self.row, "stream": self.stream.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go to a place that :meth:`state` gave."""
        self.passes, self.row = state["passes"], state["row"]
        self.stream.load_state_dict(state["stream"])
        self._rows = None


def find_shards(path: str | None, builtin: str | None, split: str) -> list[Path]:
    """The files of a corpus: of one file, a folder (all known formats below it), a pattern, or a packaged name.

    Raises:
        DataError: if there are none.
    """
    if builtin is not None:
        folder = data_folder() / builtin
        found = sorted(folder.glob(f"{split}.jsonl*"))
        advice = f"set SHADOWPEFT_DATA to a folder that holds {builtin}/{split}.jsonl.gz"
        path = str(folder)
    else:
        assert path is not None
        whole = Path(path)
        if whole.is_dir():
            found = sorted(f for f in whole.rglob("*") if f.is_file() and _suffix(f) in FORMATS)
        else:
            found = [whole] if whole.is_file() else sorted(Path(f) for f in glob.glob(path, recursive=True))
        advice = f"give a file, a folder or a pattern; known endings are {', '.join(FORMATS)}"
    if not found:
        raise DataError(f"the corpus '{path}' has no files; {advice}")
    return found


def _suffix(file: Path) -> str:
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def format_of(file: Path) -> str:
    """``jsonl``, ``text`` or ``parquet`` by a file's name.

    Raises:
        ConfigError: for another ending.
    """
    kind = FORMATS.get(_suffix(file))
    if kind is None:
        raise ConfigError(
            f"'{file}' has an unknown ending; say its format (jsonl, text or parquet), or use one of {', '.join(FORMATS)}"
        )
    return kind


def shard_record(source: TextSource) -> dict[str, Any]:
    """What a run notes of a corpus, to refuse being resumed with other data: names and sizes of its shards."""
    if isinstance(source, FileSource):
        return {"name": source.name, "shards": [[str(f), os.stat(f).st_size] for f in source.files]}
    return {"name": source.name}


def stable_hash(*numbers: int) -> int:
    """A number of 64 bits that depends on ``numbers`` alone, on every machine."""
    digest = hashlib.blake2b(b",".join(str(n).encode() for n in numbers), digest_size=8).digest()
    return int.from_bytes(digest, "big")

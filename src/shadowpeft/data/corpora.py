"""Text for pretraining, document by document: files of JSON lines, plain text or parquet, and data sets of the Hub.

The readers of files are our own. Those of datasets 5.2 gave no document and no error for a file with brackets in its name, lost
up to 10 MB before the damage in a cut gzip file, and name neither file nor line of a bad row.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shadowpeft.data.tasks.source import data_folder
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.json_text import once_each, parse_json
from shadowpeft.messages import shorten

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


Read = Iterator[tuple[str, int, int]]
"""Texts, each with its first and its last row."""


class _Damaged(Exception):
    """A shard cannot be read on."""


def _lines(path: Path, after: int) -> Iterator[tuple[str, int]]:
    """Lines after line ``after``, each with its number (from 1); a byte-order mark before the first is no text."""
    row = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as handle:
            for row, line in enumerate(handle, 1):
                if row > after:
                    yield line.decode("utf-8-sig" if row == 1 else "utf-8"), row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _Damaged(f"after line {row}: {shorten(error)}") from error


def _read_jsonl(path: Path, field: str, after: int) -> Read:
    for line, row in _lines(path, after):
        if not line.strip():
            continue
        try:
            content = parse_json(line, object_pairs_hook=once_each)
        except ValueError as error:
            raise _Damaged(f"line {row} {error}") from error
        if not isinstance(content, dict) or field not in content:
            known = ", ".join(content) if isinstance(content, dict) else type(content).__name__
            raise _Damaged(f"line {row} has no text under '{field}' (it has: {known})")
        text = content[field]
        if text is not None and not isinstance(text, str):
            raise _Damaged(f"line {row} holds {type(text).__name__} under '{field}', not text")
        yield text or "", row, row  # null is an empty document, as in parquet files


def _read_text(path: Path, field: str, after: int) -> Read:
    """Documents are separated by empty lines."""
    parts: list[str] = []
    first = row = after + 1
    for line, row in _lines(path, after):
        if line.strip():
            first = first if parts else row
            parts.append(line)
        elif parts:
            yield "".join(parts).strip(), first, row
            parts = []
    if parts:
        yield "".join(parts).strip(), first, row


def _read_parquet(path: Path, field: str, after: int) -> Read:
    """One row group at a time; those before row ``after`` are not read."""
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise _Damaged(f"there is no column '{field}' (it has: {', '.join(file.schema_arrow.names)})")
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if row + count <= after:
                    row += count
                    continue
                for text in file.read_row_group(group, columns=[field]).column(0).to_pylist():
                    row += 1
                    if text is not None and not isinstance(text, str):
                        raise _Damaged(f"column '{field}' holds {type(text).__name__}, not text")
                    if row > after:
                        yield text or "", row, row
    except (OSError, pyarrow.ArrowException) as error:
        raise _Damaged(f"after row {row}: {shorten(error)}") from error


_READERS = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_parquet}


# ---------------------------------------------------------------------------------------------------------- one corpus


class FileSource:
    """Files of JSON lines, plain text or parquet, read document by document in an order that seed and pass decide.

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
        self.turn, self.row = 0, 0
        self.skipped: dict[str, str] = {}
        """Shards that were left, wholly or from some row on, and why."""
        self._open: Read | None = None
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
                self._open = _READERS[self.formats[shard]](file, self.field, self.row)
            try:
                text, first, self.row = next(self._open)
                return text, shard, first
            except StopIteration:
                pass
            except _Damaged as error:
                if self.on_bad_shard != "skip":
                    raise DataError(
                        f"corpus '{self.name}': shard '{file}' cannot be read ({error}); mend or remove it, or set "
                        "on_bad_shard: skip"
                    ) from error
                if str(file) not in self.skipped:  # once, not in every pass
                    self.skipped[str(file)] = str(error)
                    self.warn(f"corpus '{self.name}': the rest of shard '{file}' is skipped ({error})")
            self.turn, self.row, self._open = self.turn + 1, 0, None
        self.turn = 0
        self._begin(self.passes + 1)
        return None

    def where(self, shard: int, row: int) -> str:
        """``'FILE', row N``."""
        return f"'{self.files[shard]}', row {row}"

    def state(self) -> dict[str, Any]:
        """Pass, shard, rows of it that were read, and what was skipped."""
        skipped = [list(each) for each in self.skipped.items()]
        return {"passes": self.passes, "turn": self.turn, "row": self.row, "skipped": skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Go to a place that :meth:`state` gave; the rows before it are passed over unparsed."""
        self._begin(state["passes"])
        self.turn, self.row = state["turn"], state["row"] if "row" in state else state["place"][1]  # older checkpoints
        self.skipped, self._open = dict(state["skipped"]), None


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
                f"corpus '{name}': the data set '{repository}' cannot be opened ({shorten(error)}); check its name, config "
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
                f"corpus '{self.name}' cannot be read after row {self.row} ({shorten(error)}); check the network and resume"
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


TextSource = FileSource | HubSource


def find_shards(path: str | None, builtin: str | None, split: str) -> list[Path]:
    """The files of a corpus: of one file, a folder (known formats below it, nothing hidden), a pattern, or a packaged name.

    Raises:
        DataError: if there are none.
    """
    if builtin is not None:
        folder = data_folder() / builtin
        files = sorted(folder.glob(f"{split}.jsonl*"))
        advice = f"set SHADOWPEFT_DATA to a folder that holds {builtin}/{split}.jsonl.gz"
        path = str(folder)
    else:
        assert path is not None
        whole = Path(path)
        if whole.is_dir():
            found = (f for f in whole.rglob("*") if f.is_file() and _suffix(f) in FORMATS)
            files = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(whole).parts))
        else:
            files = [whole] if whole.is_file() else sorted(Path(f) for f in glob.glob(path, recursive=True))
        advice = f"give a file, a folder or a pattern; known endings are {', '.join(FORMATS)}"
    if not files:
        raise DataError(f"the corpus '{path}' has no files; {advice}")
    return files


def _suffix(file: Path) -> str:
    ending = "".join(file.suffixes[-2:]) if file.suffix.lower() == ".gz" else file.suffix
    return ending.lower()


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

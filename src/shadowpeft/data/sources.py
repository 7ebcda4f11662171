"""Rows wherever they are: a file, or a folder or Hub id that the ``datasets`` library reads, whatever columns are called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shadowpeft.data.forms import rows_in
from shadowpeft.errors import DataError
from shadowpeft.messages import did_you_mean, shorten


@dataclass(frozen=True)
class Source:
    """Where rows come from."""

    path: str | None = None
    """A file (:func:`~shadowpeft.data.forms.rows_in`), or a folder in a layout of ``datasets``."""
    hub: str | None = None
    """A data set on the Hub."""
    config: str | None = None
    """One of its configurations."""
    split: str = "train"
    """One of its splits or a part of one, as ``datasets`` writes it; all rows of a single file are of ``train``."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns and theirs; if there are any, no other column is read."""

    def __str__(self) -> str:
        name = self.path or self.hub or ""
        revision = f"@{self.revision}" if self.revision else ""
        parts = [part for part in (self.config, self.split) if part]
        return name if self.is_file and self.split == "train" else f"{name}{revision} ({', '.join(parts)})"

    @property
    def is_file(self) -> bool:
        """Whether it is a single file."""
        return self.path is not None and not Path(self.path).is_dir()


def rows_of(source: Source, *, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """Every row, and where it stands.

    Args:
        streaming: read a data set as it comes and not into the cache first. Files are always read row by row (a JSON list is
            not).

    Raises:
        DataError: if the source is missing, cannot be reached or lacks the split or a column.
    """
    if source.path is not None and re.fullmatch(r"[\w-]+/[\w-]+", source.path) and not Path(source.path).exists():
        raise DataError(
            f"data file '{source.path}' does not exist; check the path, or if it is a data set on the Hub, write data.train: "
            f"{{hub: {source.path}}}"
        )
    rows = _rows_of_file(source, streaming) if source.is_file else _rows_of_datasets(source, streaming)
    if not source.columns:
        yield from rows
        return
    for where, row in rows:
        for theirs in source.columns.values():
            if not isinstance(row, dict) or theirs not in row:
                there = sorted(row) if isinstance(row, dict) else []
                raise DataError(
                    f"{where} has no column '{theirs}'{did_you_mean(theirs, there)}; there are {', '.join(there)}, correct "
                    "data's 'columns'"
                )
        yield where, {ours: row[theirs] for ours, theirs in source.columns.items()}


def _rows_of_file(source: Source, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Rows of a single file, or of the part of them that the split names."""
    rows = rows_in(str(source.path))
    return rows if source.split == "train" else _part(source, rows, streaming)


def _part(source: Source, rows: Iterator[tuple[str, Any]], streaming: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    if streaming:
        raise DataError(
            f"data.streaming reads '{source.path}' from its beginning to its end but its split is '{source.split}'; leave "
            "split out, or make a file of each part"
        )
    found = list(rows)
    try:
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute({"train": len(found)})
    except ValueError as error:
        raise DataError(
            f"'{source.path}' is a single file, all {len(found)} rows of which are the split 'train', but its split is "
            f"'{source.split}' ({shorten(error)}); leave it out or write a part such as train[:75%]"
        ) from error
    for part in parts:
        yield from found[part.from_ : part.to]


def _rows_of_datasets(source: Source, streaming: bool) -> Iterator[tuple[str, Any]]:
    """Rows of a data set; where a column has named classes, their names and not their numbers."""
    found = load(source, streaming)
    names = {
        column: feature.names for column, feature in (found.features or {}).items() if type(feature).__name__ == "ClassLabel"
    }
    number = 0
    try:
        for row in found:
            number += 1
            named = {c: kinds[row[c]] for c, kinds in names.items() if isinstance(row[c], int) and row[c] >= 0}
            yield f"{source}, row {number}", {**row, **named}
    except OSError as error:
        raise DataError(
            f"{source} cannot be read after row {number} ({shorten(error)}); check the network and resume"
        ) from error


def load(source: Source, streaming: bool) -> Any:
    """The ``datasets`` object of a source.

    Raises:
        DataError: if there is none of that name, configuration, split or revision, or it can neither be reached nor is in the
            cache.
    """
    import datasets

    name = str(source.hub or source.path)
    try:
        return datasets.load_dataset(
            name, source.config, split=source.split, revision=source.revision, streaming=streaming
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        offline = datasets.config.HF_HUB_OFFLINE
        if source.hub is not None and (offline or isinstance(error, ConnectionError)):
            raise DataError(
                f"the data set '{name}' is not in the cache of this machine and the Hub "
                f"{'may not be asked (HF_HUB_OFFLINE is set)' if offline else 'cannot be reached'}: {shorten(error)}; fetch it "
                "once with the network, or give files as data.train"
            ) from error
        raise DataError(
            f"the data set '{name}' cannot be opened with config {source.config!r}, split {source.split!r} and revision "
            f"{source.revision!r} ({shorten(error)}); correct them"
        ) from error

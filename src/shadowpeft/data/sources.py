"""Rows wherever they are: a file, or a folder or Hub id that the ``datasets`` library reads, whatever columns are called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shadowpeft.data.forms import check_kind, rows_in
from shadowpeft.errors import DataError
from shadowpeft.messages import did_you_mean, shorten

OPTIONAL = ("shadow_response", "path", "tools", "input", "system", "history")
"""Our columns that a row may be without."""
COLUMNS = (
    *("messages", "prompt", "response", "completion", "instruction", "output", "conversations", "text", "label"),
    *OPTIONAL,
)
"""Every column of ours."""


_BY_ROWS = (".jsonl", ".csv", ".json")
"""Kinds of file that a folder may hold to be read as its files are."""
_ROWS = (*_BY_ROWS, ".parquet")
"""Kinds that a file may have; several of them in a folder are read as its files are too, since ``datasets`` reads one kind."""
_OTHER_ROWS = (
    *(".ndjson", ".tsv", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".geoparquet", ".gpq", ".xml", ".h5", ".hdf5"),
    *(".gz", ".zip", ".zst", ".xz", ".bz2", ".lz4", ".tar", ".7z", ".rar"),
)
"""Kinds that hold rows too, but are not read beside others."""
_TYPED = (".arrow", ".feather")
"""Kinds that are not read as single files; of a folder of them ``datasets`` reads what they say and guesses nothing."""
_NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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


def rows_of(source: Source, *, streaming: bool = False, keep_damaged: bool = False) -> Iterator[tuple[str, Any]]:
    """Every row, and where it stands.

    Args:
        streaming: read a data set as it comes and not into the cache first. Files are always read row by row (a JSON list is
            not).
        keep_damaged: give the error in place of a row that cannot be read, and go on.

    Raises:
        DataError: if the source is missing, cannot be reached or lacks the split or a column.
    """
    if source.path is not None and re.match(r"[a-z0-9]+://", source.path):
        raise DataError(f"'{source.path}' is an address but rows are read from files; download it, and give the file")
    if source.path is not None and re.fullmatch(r"[\w-]+/[\w-]+", source.path) and not Path(source.path).exists():
        raise DataError(
            f"data file '{source.path}' does not exist; check the path, or if it is a data set on the Hub, write "
            f"{{hub: {source.path}}} in its place"
        )
    splits = {"train": [Path(str(source.path))]} if source.is_file else _splits_of_folder(source)
    rows = _rows_of_datasets(source, streaming) if splits is None else _rows_of_files(splits, source, streaming, keep_damaged)
    return _with_columns(source, rows, keep_damaged) if source.columns else rows


def _with_columns(source: Source, rows: Iterator[tuple[str, Any]], keep_damaged: bool) -> Iterator[tuple[str, Any]]:
    """Rows with our names of columns; what may be absent from a row may be absent from some rows, but not from all."""
    never = {theirs for ours, theirs in source.columns.items() if ours in OPTIONAL}
    there: set[str] = set()
    table = source.is_file and Path(str(source.path)).suffix.lower() in (".csv", ".parquet")  # every row has every column
    count = 0
    for where, row in rows:
        if not isinstance(row, dict):  # the error of a line that cannot be read, or what is refused as no row
            yield where, row
            continue
        count += 1
        has = row.keys()
        never -= has
        there |= has
        missing = [
            theirs for ours, theirs in source.columns.items() if theirs not in has and (table or ours not in OPTIONAL)
        ]
        if missing:
            problem = DataError(f"{where} has {_no_column(missing[0], has)}")
            if not keep_damaged:
                raise problem
            yield where, problem
            continue
        yield where, {ours: row[theirs] for ours, theirs in source.columns.items() if theirs in has}
    if count and never:
        raise DataError(f"{source} has {_no_column(min(never), there)}")


def _no_column(theirs: str, there: Collection[str]) -> str:
    known = sorted(there)
    return f"no column '{theirs}'{did_you_mean(theirs, known)}; there are {', '.join(known)}, correct data's 'columns'"


def _splits_of_folder(source: Source) -> dict[str, list[Path]] | None:
    """The files of each split, if a folder holds JSON and CSV, or several kinds; None: the ``datasets`` library reads it.

    It would guess the types of cells, and read files of one kind alone. The splits are those that it sees in the names.

    Raises:
        DataError: if a file belongs to no split, or is of a kind that is not read beside the others.
    """
    if source.path is None or source.config is not None:
        return None
    folder = Path(source.path)
    inside = [file for file in folder.rglob("*") if file.is_file()]
    found = {f for f in inside if not any(part[0] in "._" for part in f.relative_to(folder).parts)}
    card = folder / "README.md"
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        return None  # it says which files there are
    found = {file for file in found if file.name not in _NO_ROWS and file.suffix.lower() in {*_ROWS, *_OTHER_ROWS}}
    kinds = {file.suffix.lower() for file in found}
    beside = min((file for file in found if file.suffix.lower() in _OTHER_ROWS), default=None)
    if beside is not None and kinds & {*_ROWS}:
        raise DataError(
            f"'{folder}' has files of the kinds {', '.join(sorted(kinds))}, and '{beside.relative_to(folder)}' cannot be read "
            "beside the others; give it a folder of its own, or move it out if it holds no rows"
        )
    if not kinds & {*_ROWS}:
        for file in sorted(found):
            if file.suffix.lower() not in _TYPED:
                check_kind(file)
    if not kinds & {*_ROWS} or (len(kinds) == 1 and not kinds <= {*_BY_ROWS}):
        return None
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        known = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except EmptyDatasetError:
        return None
    ours = {file.resolve() for file in found}
    splits = {str(name): [Path(file) for file in files if Path(file).resolve() in ours] for name, files in known.items()}
    splits = {name: files for name, files in splits.items() if files}
    listed = {file.resolve() for files in splits.values() for file in files}
    lost = min((file for file in found if file.resolve() not in listed), default=None)
    if lost is not None:
        raise DataError(
            f"'{folder}' has the file '{lost.relative_to(folder)}', which is of none of the splits that the other names say "
            f"({', '.join(sorted(splits))}); name it for one, such as train-2{lost.suffix}, or give single files"
        )
    return splits


def _rows_of_files(
    splits: dict[str, list[Path]], source: Source, streaming: bool, keep_damaged: bool
) -> Iterator[tuple[str, Any]]:
    """Rows of the split, or of the parts of splits, that the source names."""

    def rows(name: str) -> Iterator[tuple[str, Any]]:
        return itertools.chain.from_iterable(rows_in(file, keep_damaged=keep_damaged) for file in splits[name])

    return rows(source.split) if source.split in splits else _parts(source, {name: rows(name) for name in splits}, streaming)


def _parts(source: Source, splits: dict[str, Iterator[tuple[str, Any]]], streaming: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    if streaming:
        raise DataError(
            f"data.streaming reads '{source.path}' from its beginning to its end but its split is '{source.split}'; leave "
            "split out, or make a file of each part"
        )
    found = {name: list(rows) for name, rows in splits.items()}
    try:
        lengths = {name: len(rows) for name, rows in found.items()}
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except ValueError as error:
        there = "a single file, all" if source.is_file else "a folder,"
        named = "of which are the split 'train'" if source.is_file else f"of which are the splits {', '.join(sorted(found))}"
        raise DataError(
            f"'{source.path}' is {there} {sum(lengths.values())} rows {named}, but its split is '{source.split}' "
            f"({shorten(error).rstrip('.')}); leave it out or write a part such as {min(found)}[:75%]"
        ) from error
    for part in parts:
        yield from found[part.splitname][part.from_ : part.to]


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
    if source.path is not None and (Path(source.path) / "state.json").is_file():
        raise DataError(
            f"'{name}' was written by save_to_disk, which keeps no splits; write it with to_json or to_parquet, or save a "
            "DatasetDict"
        )
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
        why = error.__cause__ or error
        raise DataError(
            f"the data set '{name}' cannot be opened with config {source.config!r}, split {source.split!r} and revision "
            f"{source.revision!r} ({shorten(why)}); correct them, or the files"
        ) from error

"""Where a task's rows come from: a folder of compressed JSONL files if one is named, else the Hub."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shadowpeft.data.chat import rows_digest
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.json_text import parse_json
from shadowpeft.messages import shorten

FOLDER = "SHADOWPEFT_DATA"
CHOICE = "SHADOWPEFT_DATA_FROM"


@dataclass(frozen=True)
class SplitPart:
    """One split of a data set, on the Hub and in the folder."""

    files: tuple[str, ...]
    """Files below the data folder, read in this order."""
    hub: tuple[str, str | None, str] | None = None
    """Hub data set, configuration, split."""
    partial: str = ""
    """What the files lack of the published split; empty: nothing. The Hub's are whole."""
    names: tuple[str, ...] = ()
    """Columns that the Hub stores as class numbers and the files as class names."""
    fields: dict[str, str] = field(default_factory=dict)
    """Hub column -> our column, where they differ."""


Parts = dict[str, tuple[SplitPart, ...]]
"""Split -> its parts."""


def data_folder() -> Path:
    """The folder that ``SHADOWPEFT_DATA`` names.

    Raises:
        DataError: if it names none.
    """
    chosen = os.environ.get(FOLDER)
    if not chosen:
        raise DataError(f"no data folder is named; set {FOLDER} to one that holds what docs/data.md lists")
    return Path(chosen)


def use_hub() -> bool:
    """Whether to read from the Hub: what ``SHADOWPEFT_DATA_FROM`` says ("hub", "folder"), else where no folder is named.

    Raises:
        ConfigError: if ``SHADOWPEFT_DATA_FROM`` is something else. DataError: if nothing says it and the Hub is switched off.
    """
    from huggingface_hub import constants

    choice = os.environ.get(CHOICE)
    if choice not in (None, "hub", "folder"):
        raise ConfigError(f"{CHOICE} is '{choice}' but must be hub or folder; unset it to read the folder in {FOLDER}")
    if choice is None and os.environ.get(FOLDER):
        return False
    if choice is None and constants.HF_HUB_OFFLINE:
        raise DataError(f"HF_HUB_OFFLINE is set and no data folder is named; set {FOLDER}, or unset HF_HUB_OFFLINE")
    return choice != "folder"


def read(parts: Iterable[SplitPart]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the parts, one after the other, and their source: from, name or path, fingerprint, partial.

    Raises:
        DataError: if no folder is named and the Hub is off, or a file is missing or damaged.
    """
    parts = list(parts)
    hub = [part.hub for part in parts]
    if None not in hub and use_hub():
        rows = [row for part in parts for row in _from_hub(part)]
        origin: dict[str, Any] = {"from": "hub", "name": [":".join(p or "default" for p in h) for h in hub if h]}
        lacks: list[str] = []
    else:
        files = [data_folder() / file for part in parts for file in part.files]
        rows = [row for file in files for row in read_gzip(file)]
        origin = {"from": "folder", "path": [f for part in parts for f in part.files]}
        lacks = [part.partial for part in parts if part.partial]
    return rows, {**origin, "fingerprint": rows_digest(rows), "partial": bool(lacks), "lacks": "; ".join(lacks)}


def read_gzip(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a gzip-compressed JSONL file; only a line feed ends a row, other separators belong to the texts.

    Raises:
        DataError: naming the file (and line), if it is missing or damaged.
    """
    if not file.is_file():
        raise DataError(
            f"'{file}' does not exist; set {FOLDER} to a folder that holds this file, or {CHOICE} to hub to read the Hub"
        )
    whole = 0
    try:
        with gzip.open(file) as handle:
            for line in handle:
                if line.strip():
                    yield parse_json(line)
                whole += 1
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise DataError(f"'{file}' is damaged after line {whole} ({error}); fetch it anew") from error


def _from_hub(part: SplitPart) -> Iterator[dict[str, Any]]:
    import datasets

    assert part.hub is not None
    name, configuration, split = part.hub
    try:
        table = datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the data set '{name}' cannot be read from the Hub ({shorten(error)}); check the network, or set {FOLDER}"
        ) from error
    named = {c: table.features[c].int2str for c in part.names if hasattr(table.features[c], "int2str")}
    for row in table:
        row = {part.fields.get(key, key): value for key, value in row.items()}
        yield {key: named[key](value) if key in named else value for key, value in row.items()}

"""Where a task's rows come from: the Hub when it can be reached, else a folder of compressed JSONL files."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shadowpeft.data.chat import fingerprint
from shadowpeft.errors import ConfigError, DataError

FOLDER = "SHADOWPEFT_DATA"
CHOICE = "SHADOWPEFT_DATA_FROM"
_TIMEOUT = 5.0
"""Seconds to wait for the Hub before the folder is taken."""


@dataclass(frozen=True)
class Part:
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


Parts = dict[str, tuple[Part, ...]]
"""Split -> its parts."""


def data_folder() -> Path:
    """The folder of ``SHADOWPEFT_DATA``, else ``../shared/data`` beside the repository."""
    chosen = os.environ.get(FOLDER)
    return Path(chosen) if chosen else Path(__file__).resolve().parents[4].parent / "shared" / "data"


def use_hub() -> bool:
    """Whether to read from the Hub: what ``SHADOWPEFT_DATA_FROM`` says ("hub", "folder"), else whether it can be reached.

    Raises:
        ConfigError: if ``SHADOWPEFT_DATA_FROM`` is something else.
    """
    choice = os.environ.get(CHOICE)
    if choice is not None:
        if choice not in ("hub", "folder"):
            raise ConfigError(f"{CHOICE} is '{choice}' but must be hub or folder; unset it to try the Hub first")
        return choice == "hub"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((str(address.hostname), address.port or 443), timeout=_TIMEOUT).close()
    except OSError:
        return False
    return True


def read(parts: Iterable[Part]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the parts, one after the other, and their source: from, name or path, fingerprint, partial.

    Raises:
        DataError: if there is neither network nor file, or a file is damaged.
    """
    parts = list(parts)
    hub = [part.hub for part in parts]
    if hub[0] is not None and None not in hub and use_hub():
        rows = [row for part in parts for row in _from_hub(part)]
        origin: dict[str, Any] = {"from": "hub", "name": [":".join(p or "default" for p in h) for h in hub if h]}
        lacks: list[str] = []
    else:
        files = [data_folder() / file for part in parts for file in part.files]
        rows = [row for file in files for row in read_gzip(file)]
        origin = {"from": "folder", "path": [f for part in parts for f in part.files]}
        lacks = [part.partial for part in parts if part.partial]
    return rows, {**origin, "fingerprint": fingerprint(rows), "partial": bool(lacks), "lacks": "; ".join(lacks)}


def read_gzip(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a gzip-compressed JSONL file; only a line feed ends a row, other separators belong to the texts.

    Raises:
        DataError: naming the file (and line), if it is missing or damaged.
    """
    if not file.is_file():
        raise DataError(
            f"'{file}' does not exist and the Hub is not used (offline, or it does not answer); set {FOLDER} to a folder "
            "that holds this file, or connect to the network"
        )
    whole = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8", newline="\n") as handle:
            for line in handle:
                if line.strip():
                    yield json.loads(line)
                whole += 1
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"'{file}' is damaged after line {whole} ({error}); fetch it anew") from error


def _from_hub(part: Part) -> Iterator[dict[str, Any]]:
    import datasets

    assert part.hub is not None
    name, configuration, split = part.hub
    table = datasets.load_dataset(name, configuration, split=split)
    named = {c: table.features[c].int2str for c in part.names if hasattr(table.features[c], "int2str")}
    for row in table:
        row = {part.fields.get(key, key): value for key, value in row.items()}
        yield {key: named[key](value) if key in named else value for key, value in row.items()}

"""Files that are whole or not there: written beside, on disk, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes the name ``path``."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path, content: str) -> None:
    """Text, written beside, on disk, and renamed: whoever reads sees the old or the new text."""
    partial_of(path).write_text(content, encoding="utf-8")
    replace(partial_of(path), path)


def replace(beside: Path, path: Path) -> None:
    """Rename a written file to its name; file and name are on disk afterwards."""
    sync_names(beside)
    os.replace(beside, path)
    sync_names(path.parent)


def write_json(path: Path, content: Any) -> None:
    """JSON, in the same way."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def between(text: str, marks: tuple[str, str], content: str) -> str | None:
    """``text`` with ``content`` as the lines between its two marks; None if it does not have them."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    return f"{before}{begin}\n{content}\n{end}{after}" if begin and end else None


def sync(folder: Path) -> None:
    """Ask the system to have the files of ``folder`` on disk before it is renamed."""
    for path in [*folder.rglob("*"), folder]:
        sync_names(path)


def sync_names(path: Path) -> None:
    """The same for one file, or for the names in one folder: after a rename, the new name is on disk too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

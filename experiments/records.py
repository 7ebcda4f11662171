"""Records of cells as files: small, committed, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.spec import RECORDS, Cell
from shadowpeft.errors import ConfigError
from shadowpeft.storage import write_json


def record_file(identity: str, records: Path = RECORDS) -> Path:
    """The file of a record's id."""
    return records / f"{identity}.json"


def read_record(cell: Cell, records: Path = RECORDS) -> dict[str, Any] | None:
    """The record of a cell, or None if it was not run."""
    return read_file(f"{cell.spec}/{cell.id}", records)


def read_file(identity: str, records: Path = RECORDS) -> dict[str, Any] | None:
    """The record of that id, or None."""
    file = record_file(identity, records)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Every record of a folder, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def write_record(record: dict[str, Any], records: Path) -> None:
    """Write a record beside and rename it: a record that is there is whole."""
    file = record_file(record["id"], records)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def check_settings(record: dict[str, Any], settings: dict[str, Any], settings_sha256: str) -> None:
    """Refuse a record that was made with other settings than a cell has now.

    Raises:
        ConfigError: with the names of the settings that differ.
    """
    if record["settings_sha256"] != settings_sha256:
        before = record["settings"]
        changed = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        raise ConfigError(
            f"the record {record['id']} was made with other settings than its spec has now ({', '.join(changed)}); "
            "delete it to run it again"
        )

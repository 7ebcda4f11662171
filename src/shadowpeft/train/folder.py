"""The folder of a run: its records, and whether they still describe the run when it is resumed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from shadowpeft.errors import ConfigError
from shadowpeft.runtime import environment
from shadowpeft.storage import LOCK, is_temporary, reason, write_json, write_text


def is_first_file(name: str) -> bool:
    """Whether a run that was killed before its first step may have left this; ``config.yaml`` is written last."""
    return name in ("versions.json", "data.json", LOCK) or is_temporary(name)


def check_loggers(names: Sequence[str]) -> None:
    """Whether the packages that training reports to are there.

    Raises:
        ConfigError: naming the one that is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to names {name}, which is not installed; run: pip install 'shadowpeft[{name}]'"
            )


def stored_record(file: Path, of: str = "the run to resume", remedy: str = "start a new run") -> dict[str, Any]:
    """A record of a run (JSON is YAML, too); messages say ``of`` which, and how to go on."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # so are numbers of 5,000 digits, and nesting
        raise ConfigError(f"'{file}', the record of {of}, cannot be read ({reason(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{file}', the record of {of}, is damaged; {remedy}")
    return content


FREE = (
    "eval_batch_size",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "threads",
    "report_to",
    "patience",
)
"""Settings that may change when a run is resumed: none of them is part of what is optimised."""


def refuse_changed(
    folder: Path,
    stored: dict[str, Any],
    now: dict[str, Any],
    keys: Sequence[str],
    sections: Sequence[str],
    usual: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Compare the settings a run was started with and those it has now: ``keys`` as wholes, ``sections`` but for :data:`FREE`.

    Args:
        usual: defaults by section, for settings that came after the run was started.

    Raises:
        ConfigError: naming what differs.
    """
    changed = [key for key in keys if stored.get(key) != now[key]]
    changed += [
        f"{section}.{key}"
        for section in sections
        for key in now[section]
        if key not in FREE
        and (stored.get(section) or {}).get(key, (usual or {}).get(section, {}).get(key)) != now[section][key]
    ]
    if changed:
        raise ConfigError(
            f"the run in '{folder}' was started with other settings ({', '.join(changed)}); resume with the configuration "
            "it was started with"
        )


def write_records(folder: Path, run: BaseModel, data: dict[str, Any]) -> None:
    """Write what a run is: ``versions.json``, ``data.json``, ``config.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "versions.json", environment())
    write_json(folder / "data.json", data)
    # last: a folder with this file is a run that can be resumed, from its start if there is no checkpoint yet
    write_text(folder / "config.yaml", yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True))

"""Robot-intent data: 34 robot-dog skills and open-domain requests, in English and Chinese (see CARD.md).

A skill row answers ``[Skill()] short spoken reply``. An open-domain row carries a real answer for the base
path or, in ``train_remote_shadow``, a ``[REMOTE] note`` for the shadow path. The rows are files of this package;
``python -m scripts.robot_set`` in the repository writes them from hand-written seed files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from shadowpeft.data.actions import parser
from shadowpeft.data.robot.skills import MEANINGS, SKILLS, SPLITS

__all__ = ["MEANINGS", "SETS", "SKILLS", "SPLITS", "SYSTEM", "Row", "load", "parse_action", "read_split", "write_jsonl"]

Row = dict[str, str]

ROWS = Path(__file__).parent / "rows"
"""The folder of the set: ``<split>.jsonl.gz``."""

SYSTEM = "You are a robot dog."
"""System message of the set: short, so that prompts stay short, and the same for training and use."""

SETS = {
    "robot": ("train_normal", "train_remote_base", "train_remote_shadow"),
    "robot_large": ("train_normal", "train_remote_base", "train_remote_shadow", "more_normal", "more_remote"),
    "robot_oos": ("train_normal", "train_remote_base", "train_remote_shadow", "train_oos"),
}
"""A packaged set, as run files name it -> the splits that it trains on."""

_parse = parser(SKILLS)


def load(split: str) -> list[Row]:
    """The rows of one split: dicts with id, split, lang, kind, skill, family, style, prompt and response."""
    return read_split(ROWS, split, SPLITS)


def read_split(folder: Path, split: str, splits: Collection[str]) -> list[dict[str, Any]]:
    """Fresh rows of a packaged set, ``<split>.jsonl.gz`` in ``folder``.

    Raises:
        ValueError: if it is none of ``splits``.
    """
    if split not in splits:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(splits)}")
    return [json.loads(line) for line in _lines(folder / f"{split}.jsonl.gz")]


@cache
def _lines(file: Path) -> tuple[str, ...]:
    return tuple(gzip.decompress(file.read_bytes()).decode().split("\n")[:-1])


def parse_action(text: str) -> str | None:
    """The action a response starts with: a skill's name, "REMOTE", or None if there is no known one."""
    return _parse(text)


def json_lines(rows: Iterable[Row]) -> str:
    """The rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(folder: str | Path) -> list[Path]:
    """Writes ``folder/<split>.jsonl`` for every split, one row a line, and returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        path.write_text(json_lines(load(split)), encoding="utf-8")
        paths.append(path)
    return paths

"""Robot-intent data: 34 robot-dog skills and open-domain requests, in English and Chinese (see CARD.md).

A skill row answers ``[Skill()] short spoken reply``. An open-domain row carries a real answer for the base
path or, in ``train_remote_shadow``, a ``[REMOTE] note`` for the shadow path. Everything is composed from
hand-written seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

from shadowpeft.data.actions import parser
from shadowpeft.data.robot.compose import Row, build
from shadowpeft.data.robot.skills import MEANINGS, SKILLS, SPLITS

__all__ = ["MEANINGS", "SKILLS", "SPLITS", "SYSTEM", "build", "load", "parse_action", "write_jsonl"]

SYSTEM = "You are a robot dog."
"""System message of the set: short, so that prompts stay short, and the same for training and use."""

_parse = parser(SKILLS)


def load(split: str, seed: int = 0) -> list[Row]:
    """The rows of one split: dicts with id, split, lang, kind, skill, family, style, prompt and response."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    return build(seed)[split]


def parse_action(text: str) -> str | None:
    """The action a response starts with: a skill's name, "REMOTE", or None if there is no known one."""
    return _parse(text)


def write_jsonl(folder: str | Path, seed: int = 0) -> list[Path]:
    """Writes ``folder/<split>.jsonl`` for every split, one row a line, and returns the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, rows in build(seed).items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        paths.append(path)
    return paths

"""Robot-dog intents (the paper, Appendix F), on the packaged set: run the right skill, and none for anything else."""

from __future__ import annotations

from typing import Any

from shadowpeft.data import robot as package
from shadowpeft.data.chat import rows_digest
from shadowpeft.data.robot import SYSTEM, parse_action
from shadowpeft.data.tasks.base import Example
from shadowpeft.data.tasks.intents import Acting, Group
from shadowpeft.errors import DataError

_SPLITS = {
    "train": ("train_normal", "train_remote_base", "train_remote_shadow"),
    "validation": ("validation_normal", "validation_remote"),
    "test": ("test_normal", "test_remote"),
    "test_normal": ("test_normal",),
    "test_large": ("test_normal", "test_remote_large"),
}
_PATHS = {"train_remote_base": "base", "train_remote_shadow": "shadow"}


class Robot(Acting):
    """The packaged requests. ``test_large`` has 320 open ones instead of the paper's 18, and ``test_normal`` none."""

    name = "robot"
    actions = package.SKILLS
    max_new_tokens = 16
    system = SYSTEM
    groups: dict[str, Group] = {"en": lambda e: e.meta["lang"] == "en", "zh": lambda e: e.meta["lang"] == "zh"}  # noqa: RUF012

    def rows(self, split: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if split not in _SPLITS:
            raise DataError(f"split is '{split}' but task 'robot' has {', '.join(_SPLITS)}")
        rows: list[dict[str, Any]] = [dict(row) for name in _SPLITS[split] for row in package.load(name)]
        origin = {
            "from": "package",
            "name": ["shadowpeft.data.robot:" + name for name in _SPLITS[split]],
            "fingerprint": rows_digest(rows),
            "partial": False,
            "lacks": "",
            "rows": len(rows),
        }
        return rows, origin

    def example(self, row: dict[str, Any], identity: str) -> Example:
        meta = {"lang": row["lang"], "path": _PATHS.get(row["split"], "both")}
        return Example(row["id"], row["prompt"], row["response"], row["skill"], (), meta)

    def parse(self, text: str) -> str | None:
        """The skill an answer starts with, ``REMOTE``, or None for words."""
        return parse_action(text)

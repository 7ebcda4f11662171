"""Two tiny tasks in the form of ``shadowpeft.data.tasks``: one that generates, one that classifies."""

from __future__ import annotations

from typing import Any

from shadowpeft.data.chat import rows_digest
from shadowpeft.data.tasks import Example, Task

SIZES = {"train": 24, "validation": 10, "test": 12}


class Fake(Task):
    """Says which of three letters a text is full of; with ``paths`` some rows are for one path only."""

    max_new_tokens = 4

    def __init__(self, kind: str, paths: bool = False) -> None:
        self.kind, self.paths = kind, paths
        self.name = f"fake_{kind}"
        self.labels = ("a", "b", "c") if kind == "classify" else ()

    def rows(self, split: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        made = []
        for i in range(SIZES[split]):
            letter = "abc"[i % 3]
            path = ("base", "shadow", "both")[i % 3] if self.paths else "both"
            made.append(
                {
                    "id": f"{split}-{i}",
                    "text": split[:2] + letter * (2 + i % 7) + str(i),
                    "letter": letter,
                    "path": path,
                }
            )
        return made, {"from": "folder", "path": "inline", "fingerprint": rows_digest(made), "partial": False}

    def example(self, row: dict[str, Any], identity: str) -> Example:
        letter = row["letter"]
        gold = (
            self.labels.index(letter) if self.kind == "classify" else letter
        )  # a classifier names a class by its place
        return Example(identity, row["text"], letter, gold, ("a", "b", "c"), {"path": row["path"]})

    def parse(self, text: str) -> str:
        return text.strip()[:1]

"""A JSONL file of chat rows as a task: the answer that a row gives, word for word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shadowpeft.data.chat import read_file, with_system
from shadowpeft.data.sources import Source
from shadowpeft.data.tasks.base import Example, FileTask
from shadowpeft.errors import DataError


class Rows(FileTask):
    """Share of answers that equal the row's, white space aside. A path is asked what it learns (:mod:`shadowpeft.data.chat`).

    Args:
        file: its name, or another source. max_new_tokens: longest answer in tokens.
        system: the system message of rows that bring none.
        learnt: makes of a row what the paths learn of it; None: it stays as it is.

    Raises:
        DataError: naming file and line, if the file is missing or empty or a row is malformed.
    """

    def __init__(
        self,
        file: str | Path | Source,
        max_new_tokens: int = 64,
        *,
        system: str | None = None,
        learnt: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.name, self.max_new_tokens = str(file), max_new_tokens  # type: ignore[misc]
        self.system = system  # type: ignore[misc]
        self._rows = read_file(file)
        for row in self._rows:
            beside = [*row.get("answer", {}), *(["tools"] if "tools" in row else [])]
            if beside:
                where = getattr(row, "where", file)
                raise DataError(
                    f"{where} has '{beside[0]}', which an evaluation by text cannot judge; leave the row out"
                )
        if learnt is not None:
            self._rows = [learnt(row) for row in self._rows]

    def lead(self, shots: int, seed: int) -> str:
        raise DataError(f"'{self.name}' has no form with worked examples; set shots to 0")

    def example(self, row: dict[str, Any], identity: str) -> Example:
        return Example(identity, row["messages"][-1]["content"], row["response"], row["response"], (), row)

    def for_path(self, examples: list[Example], path: str) -> list[Example]:
        """Rows that this path learns, with the shadow's own response for the shadow."""
        asked = [e for e in examples if e.meta["path"] in ("both", path)]
        if not asked:
            raise DataError(f"'{self.name}' has no row for the {path} path; leave out the modes that answer with it")
        own = [e.meta["shadow_response"] if path == "shadow" else None for e in asked]
        return [e if text is None else replace(e, answer=text, gold=text) for e, text in zip(asked, own, strict=True)]

    def chat(self, example: Example) -> list[dict[str, str]]:
        return with_system(list(example.meta["messages"]), self.system)

    def per_example(self, prediction: Any, example: Example) -> float:
        return float(prediction.split() == example.gold.split())

"""Requests whose right action is known: actions of one's own, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from shadowpeft.data.actions import REMOTE, is_right, parser
from shadowpeft.data.tasks.base import Example, FileTask, Task, mean, shares
from shadowpeft.errors import DataError

Group = Callable[[Example], bool]


class Acting(Task):
    """A command is right if its action is called; an open request is right if no action is.

    The router hands on whatever is no known action, with ``[REMOTE]`` or without, so one rule judges both paths: the shadow
    answers ``[REMOTE]``, the base path answers in words.
    """

    groups: dict[str, Group] = {}  # noqa: RUF012
    """Parts of the score beside ``skill`` and ``remote``."""

    def lead(self, shots: int, seed: int) -> str:
        raise DataError(f"task '{self.name}' has no form with worked examples; set shots to 0")

    def per_example(self, prediction: Any, example: Example) -> float:
        return float(is_right(prediction, example.gold))

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """``score``; ``skill``, ``remote`` and :attr:`groups`: parts of it; ``tagged``: open requests answered ``[REMOTE]``."""
        parts: dict[str, Group] = {"skill": lambda e: e.gold != REMOTE, "remote": lambda e: e.gold == REMOTE}
        scores = shares(self, predictions, examples, {**parts, **self.groups})
        asked = [float(p == REMOTE) for p, e in zip(predictions, examples, strict=True) if e.gold == REMOTE]
        return {**scores, "tagged": mean(asked)} if asked else scores


class Intents(Acting, FileTask):
    """The rows of a file.

    Args:
        name: of the file. rows: with ``prompt``, ``skill`` (``REMOTE`` for none) and ``where``.
        actions: what a device knows to do. system: the system message. max_new_tokens: longest answer in tokens.
    """

    def __init__(
        self, name: str, rows: list[dict[str, Any]], actions: Sequence[str], system: str | None, max_new_tokens: int = 16
    ) -> None:
        self.name, self.actions, self.max_new_tokens = name, tuple(actions), max_new_tokens  # type: ignore[misc]
        self.system = system  # type: ignore[misc]
        self._rows, self._parse = rows, parser(self.actions)

    @property
    def settings(self) -> dict[str, Any]:
        return {"actions": list(self.actions)}

    def example(self, row: dict[str, Any], identity: str) -> Example:
        return Example(identity, row["prompt"], "", row["skill"])

    def parse(self, text: str) -> str | None:
        """The action an answer starts with, ``REMOTE``, or None for words."""
        return self._parse(text)

"""What a task is: prompts, answers, a parser and a scorer over rows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from shadowpeft.data.chat import check_row, rows_digest, with_system
from shadowpeft.data.tasks.source import Parts, read
from shadowpeft.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05
"""Share of the training rows that serves as validation split where none is published."""
CLASSIFY_MAX_LENGTH = 512
"""Tokens of a text that a classifier reads unless told otherwise, in training and evaluation alike."""


@dataclass(frozen=True)
class Example:
    """One question of a task."""

    id: str
    prompt: str
    """The user message (the paper, Appendix C); for a classifier the text itself."""
    answer: str
    """The response to train on."""
    gold: Any
    """What the scorer compares a prediction with."""
    choices: tuple[str, ...] = ()
    """Responses whose likelihoods can be compared."""
    meta: dict[str, Any] = field(default_factory=dict)


class Task:
    """Base of the tasks: subclasses say where rows are, how a row becomes an :class:`Example`, how answers are judged."""

    name: ClassVar[str]
    kind: ClassVar[str] = "generate"
    labels: ClassVar[tuple[str, ...]] = ()
    actions: ClassVar[tuple[str, ...]] = ()
    """What a device knows to do; its answers start with one of these or ``[REMOTE]``."""
    max_new_tokens: ClassVar[int] = 0
    system: ClassVar[str | None] = None
    """System message that prompts are rendered with."""
    parts: ClassVar[Parts] = {}
    held_out_by: ClassVar[str | None] = None
    """Column whose equal values stay on one side when a validation split is cut off the training rows."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its scores beside its name and rows, for the record."""
        return {}

    @property
    def told(self) -> dict[str, Any]:
        """What its chat template is told beside the messages, such as ``tools``."""
        return {}

    # ---------------------------------------------------------------------------------------------------- rows

    def rows(self, split: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Raw rows of a split, and their source.

        Raises:
            DataError: if the split is unknown or its data cannot be had.
        """
        names = [*SPLITS, *(s for s in self.parts if s not in SPLITS)]
        if split not in names:
            raise DataError(f"split is '{split}' but task '{self.name}' has {', '.join(names)}")
        cut = self.held_out_by is not None and split != "test" and "validation" not in self.parts
        rows, origin = read(self.parts["train" if cut else split])
        if cut:
            rows = [row for row in rows if self._is_held_out(row) == (split == "validation")]
            origin = {
                **origin,
                "fingerprint": rows_digest(rows),
                "split": f"{split}: cut off the training rows by a hash of '{self.held_out_by}' ({HELD_OUT:.0%} held out)",
            }
        return rows, {**origin, "rows": len(rows)}

    def _is_held_out(self, row: dict[str, Any]) -> bool:
        digest = hashlib.sha256(f"{self.name}/{row[str(self.held_out_by)]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64

    def source(self, split: str) -> dict[str, Any]:
        """``from`` ("hub", "folder" or "package"), ``name`` or ``path``, ``fingerprint`` (sha256 of the rows), ``partial``."""
        return self.rows(split)[1]

    def load(self, split: str, *, shots: int = 0, limit: int | None = None, seed: int = 0) -> list[Example]:
        """Examples of a split, in the order of the data; the same arguments give the same examples.

        Args:
            split: train, validation or test. shots: worked examples before each question.
            limit: draw this many examples; the draw, and the choice of worked examples, follow ``seed``.

        Raises:
            DataError: if the split is unknown, the data are missing, or the task has no such form with examples.
        """
        return self.load_with_source(split, shots=shots, limit=limit, seed=seed)[0]

    def load_with_source(
        self, split: str, *, shots: int = 0, limit: int | None = None, seed: int = 0
    ) -> tuple[list[Example], dict[str, Any]]:
        """:meth:`load` and :meth:`source` of the same reading."""
        if limit is not None and limit < 1:
            raise DataError(f"limit is {limit} but must be at least 1; leave it out for all examples")
        lead = self.lead(shots, seed) if shots else ""
        rows, origin = self.rows(split)
        chosen = range(len(rows))
        if limit is not None and limit < len(rows):
            chosen = sorted(random.Random(seed).sample(chosen, limit))  # type: ignore[assignment]
        examples = [self.example(rows[i], f"{self.name}-{split}-{i}") for i in chosen]
        if lead:
            examples = [Example(e.id, lead + e.prompt, e.answer, e.gold, e.choices, e.meta) for e in examples]
        return examples, origin

    def lead(self, shots: int, seed: int) -> str:
        """Text before a question that shows ``shots`` solved training questions.

        The paper's 2-shot experiment (Table 2) names no template beyond MMLU's: each question in its own form, followed by its
        answer, with an empty line between.
        """
        if self.kind == "classify":
            raise DataError(f"task '{self.name}' classifies and has no form with worked examples; set shots to 0")
        if shots < 0:
            raise DataError(f"shots is {shots} but must be 0 or more")
        rows, _ = self.rows("train")
        picked = random.Random(f"{self.name}/shots/{seed}").sample(rows, shots)
        solved = [self.example(row, "shot") for row in picked]
        return "".join(f"{e.prompt} {e.answer}\n\n" for e in solved)

    def example(self, row: dict[str, Any], identity: str) -> Example:
        """The example of a row."""
        raise NotImplementedError

    def for_path(self, examples: list[Example], path: str) -> list[Example]:
        """The examples that the ``base`` or the ``shadow`` path is asked, each with the answer that this path should give."""
        return examples

    def chat(self, example: Example) -> list[dict[str, str]]:
        """The messages of a question, the system message included."""
        return with_system([{"role": "user", "content": example.prompt}], self.system)

    # ------------------------------------------------------------------------------------------------- judging

    def parse(self, text: str) -> Any:
        """The prediction in a generated text; None if there is none."""
        return text.strip()

    def per_example(self, prediction: Any, example: Example) -> float:
        """How right a prediction is, 0 to 1; its mean is ``score``."""
        return float(prediction == example.gold)

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """``score`` and whatever else the task reports, as fractions."""
        return {"score": mean([self.per_example(p, e) for p, e in _pairs(predictions, examples)])}


class FileTask(Task):
    """The rows of a file, whatever the split; subclasses set ``name`` and ``_rows``."""

    _rows: Sequence[dict[str, Any]]

    def rows(self, split: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of the file, whatever the split."""
        about = {"from": "file", "path": [self.name], "partial": False, "lacks": "", "rows": len(self._rows)}
        return list(self._rows), {**about, "fingerprint": rows_digest(self._rows)}


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return sum(values) / len(values) if values else float("nan")


def _pairs(predictions: Sequence[Any], examples: Sequence[Example]) -> list[tuple[Any, Example]]:
    if len(predictions) != len(examples):
        raise ConfigError(f"there are {len(predictions)} predictions for {len(examples)} examples; give one for each")
    return list(zip(predictions, examples, strict=True))


def shares(
    task: Task, predictions: Sequence[Any], examples: Sequence[Example], groups: dict[str, Any]
) -> dict[str, float]:
    """``score``, and the same over those examples that each of ``groups`` (name -> condition on an example) holds for.

    A group without examples is left out.
    """
    pairs = [(task.per_example(p, e), e) for p, e in _pairs(predictions, examples)]
    scores = {"score": mean([value for value, _ in pairs])}
    for name, belongs in groups.items():
        values = [value for value, example in pairs if belongs(example)]
        if values:
            scores[name] = mean(values)
    return scores


def training_rows(task: Task, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples of a generating task as checked chat rows (:mod:`shadowpeft.data.chat`), its system message included."""
    rows = []
    for e in examples:
        messages = [*task.chat(e), {"role": "assistant", "content": e.answer}]
        rows.append(check_row({"messages": messages, "path": e.meta.get("path", "both")}, e.id))
    return rows


def class_ids(tokenizer: Any, text: str, max_length: int = CLASSIFY_MAX_LENGTH) -> list[int]:
    """Tokens of a text for a classifier: its beginning, at most ``max_length``; an empty text is one line feed.

    No chat template: the pooled token is the text's last.
    """
    ids = tokenizer(text if text.strip() else "\n", truncation=True, max_length=max_length).input_ids
    return list(ids)

"""MMLU: four-way questions of 57 subjects (Hendrycks et al., 2021), answered with one letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from shadowpeft.data.tasks.base import Example, Task, mean
from shadowpeft.data.tasks.source import Parts, SplitPart
from shadowpeft.errors import DataError

LETTERS = ("A", "B", "C", "D")
INSTRUCTIONS = (
    "Instructions: Answer with ONLY the letter (A, B, C, or D). Do not include any explanation, reasoning, or additional "
    "text."
)
FEW_SHOT = (
    "Examples of correct response format:\n"
    "What is 2+2? (A: 3, B: 4, C: 5, D: 6) Answer: B\n"
    "What color is the sky? (A: Green, B: Blue, C: Red, D: Yellow) Answer: B\n"
    "Now answer the following question:\n"
)
_LETTER = re.compile(
    r"\W*(?:(?:the\s+)?(?:correct\s+)?answer(?:\s+is)?\W+)?([A-D])(?:\s*$|\s*\n|[^\w\s])", re.IGNORECASE
)


class MMLU(Task):
    """Accuracy of the letter; by generation, or as the likeliest of the four letters."""

    name = "mmlu"
    max_new_tokens = 8
    parts: ClassVar[Parts] = {
        "train": (
            SplitPart(
                ("mmlu/auxiliary_train_subset.jsonl.gz",),
                ("cais/mmlu", "all", "auxiliary_train"),
                "8,323 of about 99,842 auxiliary training questions; no RACE, MCTest or law part",
            ),
        ),
        "validation": (SplitPart(("mmlu/validation.jsonl.gz",), ("cais/mmlu", "all", "validation")),),
        "test": (SplitPart(("mmlu/test.jsonl.gz",), ("cais/mmlu", "all", "test")),),
    }

    def lead(self, shots: int, seed: int) -> str:
        """The paper's few-shot form: always the same two worked examples."""
        if shots != 2:
            raise DataError(f"shots is {shots} but the few-shot form of MMLU has exactly 2 worked examples; set 0 or 2")
        return FEW_SHOT

    def example(self, row: dict[str, Any], identity: str) -> Example:
        options = "\n".join(f"{letter}: {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
        prompt = f"Question: {row['question']}\nOptions:\n{options}\n{INSTRUCTIONS}\nAnswer:"
        letter = LETTERS[row["answer"]]
        return Example(identity, prompt, letter, letter, LETTERS, {"subject": row.get("subject", "")})

    def parse(self, text: str) -> str | None:
        """The letter an answer begins with ("B", "(B)", "B: four", "The answer is B"); "A cat" names none."""
        match = _LETTER.match(text)
        return match[1].upper() if match else None

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """``score``: accuracy; ``subject_mean``: mean of the subjects' accuracies; ``answered``: share with a letter."""
        by_subject: dict[str, list[float]] = {}
        for prediction, example in zip(predictions, examples, strict=True):
            by_subject.setdefault(example.meta["subject"], []).append(self.per_example(prediction, example))
        return {
            **super().score(predictions, examples),
            "subject_mean": mean([mean(values) for values in by_subject.values()]),
            "answered": mean([float(p is not None) for p in predictions]),
        }

"""GSM8K: grade-school word problems (Cobbe et al., 2021), scored on the number after ``####``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from shadowpeft.data.tasks.base import Example, Task, mean
from shadowpeft.data.tasks.source import Parts, SplitPart

_NUMBER = re.compile(r"#### (-?[\d.,]+)")


class GSM8K(Task):
    """Exact match of the final number, as the data set's own scorer reads it: thousands separators dropped, nothing else."""

    name = "gsm8k"
    max_new_tokens = 400
    held_out_by = "question"
    parts: ClassVar[Parts] = {
        "train": (SplitPart(("gsm8k/train.jsonl.gz",), ("openai/gsm8k", "main", "train")),),
        "test": (SplitPart(("gsm8k/test.jsonl.gz",), ("openai/gsm8k", "main", "test")),),
    }

    def example(self, row: dict[str, Any], identity: str) -> Example:
        prompt = f"Question: {row['question']}\nAnswer:"
        return Example(identity, prompt, row["answer"], self.parse(row["answer"]))

    def parse(self, text: str) -> str | None:
        """The first number behind ``####``; None where there is none."""
        match = _NUMBER.search(text)
        return match[1].replace(",", "") if match else None

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """``score``: share of right numbers; ``answered``: share of answers with a number."""
        return {
            **super().score(predictions, examples),
            "answered": mean([float(p is not None) for p in predictions]),
        }

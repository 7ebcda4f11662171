"""SQuAD v2: spans of a paragraph, or nothing (Rajpurkar et al., 2018), with the official exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from shadowpeft.data.tasks.base import Example, Task, mean
from shadowpeft.data.tasks.source import Parts, SplitPart

UNANSWERABLE = "unanswerable"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation out, articles out, white space single: the official normalisation, in its order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(prediction: str, gold: str) -> float:
    """1 if the normalised texts are equal, else 0."""
    return float(normalise(prediction) == normalise(gold))


def f1(prediction: str, gold: str) -> float:
    """F1 of the normalised words as bags; with an empty side, 1 only if both are."""
    words, gold_words = normalise(prediction).split(), normalise(gold).split()
    if not words or not gold_words:
        return float(words == gold_words)
    common = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * common / (len(words) + len(gold_words))


def golds(example: Example) -> list[str]:
    """Gold answers that normalise to something; the empty answer alone where there is none."""
    return [text for text in example.gold if normalise(text)] or [""]


class SquadV2(Task):
    """Exact match against the best gold span. The published dev set is the test split, as in the paper."""

    name = "squad_v2"
    max_new_tokens = 64
    held_out_by = "context"
    parts: ClassVar[Parts] = {
        "train": (
            SplitPart(
                ("squad_v2/train_first10articles.jsonl.gz", "squad_v2/train_extra_answerable_only.jsonl.gz"),
                ("rajpurkar/squad_v2", None, "train"),
                "8,569 of 130,319 training questions, 4.1 % unanswerable instead of 33.4 %; no random sample",
            ),
        ),
        "test": (SplitPart(("squad_v2/validation.jsonl.gz",), ("rajpurkar/squad_v2", None, "validation")),),
    }

    def example(self, row: dict[str, Any], identity: str) -> Example:
        prompt = (
            "Answer with the exact span from the context. If the question is unanswerable from the context, respond with "
            f"exactly: {UNANSWERABLE}\nContext: {row['context']}\nQuestion: {row['question']}\n"
            f"Answer (span or '{UNANSWERABLE}' only):"
        )
        texts = tuple(row["answers"]["text"])
        answer = texts[0] if texts else UNANSWERABLE
        return Example(row.get("id", identity), prompt, answer, texts, (), {"answerable": bool(texts)})

    def parse(self, text: str) -> str:
        """The text itself; the empty string where it says that there is no answer."""
        return "" if normalise(text) == UNANSWERABLE else text.strip()

    def per_example(self, prediction: Any, example: Example) -> float:
        """Exact match with any gold answer."""
        return max(exact(prediction, gold) for gold in golds(example))

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """``score`` and ``exact`` (the same), ``f1``, and both over questions with (``has_answer_``) and without answer."""
        rows = [
            (example.meta["answerable"], self.per_example(p, example), max(f1(p, gold) for gold in golds(example)))
            for p, example in zip(predictions, examples, strict=True)
        ]
        scores = {
            "score": mean([r[1] for r in rows]),
            "exact": mean([r[1] for r in rows]),
            "f1": mean([r[2] for r in rows]),
        }
        for prefix, wanted in (("has_answer_", True), ("no_answer_", False)):
            some = [r for r in rows if r[0] is wanted]
            if some:
                scores[f"{prefix}exact"], scores[f"{prefix}f1"] = mean([r[1] for r in some]), mean([r[2] for r in some])
        return scores


class SquadV2DevSplit(SquadV2):
    """The published dev set cut in two by article, for training with a real share of unanswerable questions.

    Not official: its scores are comparable with each other only.
    """

    name = "squad_v2_devsplit"
    parts: ClassVar[Parts] = {
        "train": (
            SplitPart(("squad_v2_devsplit/train.jsonl.gz",), None, "25 of the 35 articles of the published dev set"),
        ),
        "test": (
            SplitPart(("squad_v2_devsplit/test.jsonl.gz",), None, "10 of the 35 articles of the published dev set"),
        ),
    }

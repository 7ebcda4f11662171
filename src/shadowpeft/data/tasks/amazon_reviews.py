"""Amazon reviews: one to five stars from the English review text (Keung et al., 2020); only on the Hub or in your folder."""

from __future__ import annotations

from typing import Any, ClassVar

from shadowpeft.data.tasks.base import Example, Task
from shadowpeft.data.tasks.source import Parts, SplitPart

_HUB = ("mteb/amazon_reviews_multi", "en")


class AmazonReviews(Task):
    """Accuracy over five classes. The paper's Amazon scores are multiples of 0.02 %, which fits this set's 5,000 test rows."""

    name = "amazon_reviews"
    kind = "classify"
    labels = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
    parts: ClassVar[Parts] = {
        split: (SplitPart((f"amazon_reviews/{split}.jsonl.gz",), (*_HUB, split)),)
        for split in ("train", "validation", "test")
    }

    def example(self, row: dict[str, Any], identity: str) -> Example:
        return Example(identity, row["text"], self.labels[row["label"]], int(row["label"]))

"""20 Newsgroups: which of twenty groups a post of 1993 went to (bydate split, headers and quoted lines removed)."""

from __future__ import annotations

from typing import Any, ClassVar

from shadowpeft.data.tasks.base import Example, Task
from shadowpeft.data.tasks.source import Parts, SplitPart

_HUB = "SetFit/20_newsgroups"
_GROUPS = """
alt.atheism comp.graphics comp.os.ms-windows.misc comp.sys.ibm.pc.hardware comp.sys.mac.hardware
comp.windows.x misc.forsale rec.autos rec.motorcycles rec.sport.baseball rec.sport.hockey sci.crypt
sci.electronics sci.med sci.space soc.religion.christian talk.politics.guns talk.politics.mideast
talk.politics.misc talk.religion.misc
"""


class Newsgroups(Task):
    """Accuracy over twenty classes. The Hub's copy and the folder's are cleaned differently, as their fingerprints say."""

    name = "newsgroups"
    kind = "classify"
    labels = tuple(_GROUPS.split())
    held_out_by = "text"
    parts: ClassVar[Parts] = {
        "train": (SplitPart(("20news/train.jsonl.gz",), (_HUB, None, "train")),),
        "test": (SplitPart(("20news/test.jsonl.gz",), (_HUB, None, "test")),),
    }

    def example(self, row: dict[str, Any], identity: str) -> Example:
        return Example(identity, row["text"], self.labels[row["label"]], int(row["label"]))

"""``docs/results.md``, ``docs/figures`` and docs/compared.md's table of scores, from the committed records alone.

A cell without a record says "not run"; a spec without any is named in a list at the end.

``records`` reads them and makes a number of them; ``tables`` and ``figures`` show one spec; ``pages`` puts a page together.
"""

from experiments.report.pages import SCORES_MARKS, compared, text, write
from experiments.report.records import Page

__all__ = ["SCORES_MARKS", "Page", "compared", "text", "write"]

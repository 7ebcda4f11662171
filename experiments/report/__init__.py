"""``docs/results.md``, ``docs/figures`` and the README's table of scores, from the committed records alone.

A cell without a record says "not run"; a spec without any is named in a list at the end.

``records`` reads them and makes a number of them; ``tables`` and ``figures`` show one spec; ``pages`` puts a page together.
"""

from experiments.report.pages import README_MARKS, readme, text, write
from experiments.report.records import Page

__all__ = ["README_MARKS", "Page", "readme", "text", "write"]

"""Tables of pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

EMPTY = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


def percent(found: Mapping[str, Any] | None, *, interval: bool = False) -> str:
    """A share, ``score`` or ``accuracy`` with ``interval``, in percent; a dash if there is none."""
    share = None if found is None else found["score"] if "score" in found else found["accuracy"]
    if found is None or share is None:
        return EMPTY
    low, high = found["interval"]
    return f"{100 * share:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if interval else "")

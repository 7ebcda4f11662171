"""Values and names in the sentences that a user reads."""

from __future__ import annotations

import difflib
from typing import Any


def quote(value: Any, limit: int = 80) -> str:
    """``repr`` of a value from a file, on one line and at most about ``limit`` characters long."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def shorten(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text; its type where it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


def did_you_mean(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` with the nearest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""

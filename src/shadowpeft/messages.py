"""Words that error messages share."""

from __future__ import annotations

import difflib
from typing import Any


def quote(value: Any, limit: int = 80) -> str:
    """``repr`` of a value from a file, on one line and not longer than a message can bear."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def shorten(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, and the next one where the first only announces it."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # of a missing key, the text is the key alone
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:limit]


def did_you_mean(name: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""

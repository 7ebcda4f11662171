"""Regular expressions of the numbers in a range, in their one form: no ``+``, no leading zero, no point without need.

Digits are compared from the left, as people do. ``None`` as a limit means no limit but the number of digits.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

DIGITS = 9
"""Digits before the point of a number that has no limit."""
DECIMALS = 4
"""Digits after the point, where the limits need no more."""
NOTHING = "[^\\s\\S]"
"""Matches no text."""


def integers(low: int | None, high: int | None) -> str:
    """Whole numbers from ``low`` to ``high``."""
    return numbers(None if low is None else Decimal(low), None if high is None else Decimal(high), 0)


def numbers(low: Decimal | None, high: Decimal | None, decimals: int = DECIMALS) -> str:
    """Numbers from ``low`` to ``high`` with at most so many decimals; the last is not 0."""
    most = Decimal(10**DIGITS - 1)
    step = Decimal(1).scaleb(-decimals)
    low = (-most if low is None else max(low, -most)).quantize(step, ROUND_CEILING)
    high = (most if high is None else min(high, most)).quantize(step, ROUND_FLOOR)
    parts = []
    if high >= 0 and low <= high:
        parts.append(_positive(max(low, Decimal(0)), high, decimals))
    if low < 0 and low <= high:
        least = max(-high, step)  # there is no minus zero
        if least <= -low:
            parts.append("-" + _grouped([_positive(least, -low, decimals)]))
    return _grouped(parts) if parts else NOTHING


def _positive(low: Decimal, high: Decimal, decimals: int) -> str:
    """Numbers from ``low`` to ``high``, neither below 0."""
    whole_low, whole_high = int(low), int(high)
    first, last = _fraction(low, decimals), _fraction(high, decimals)
    if whole_low == whole_high:
        return str(whole_low) + _fractions(first, last)
    parts = [str(whole_low) + _fractions(first, "9" * decimals), str(whole_high) + _fractions("0" * decimals, last)]
    if whole_low + 1 < whole_high:
        parts.append(_whole(whole_low + 1, whole_high - 1) + _fractions("0" * decimals, "9" * decimals))
    return _grouped(parts)


def _fraction(value: Decimal, decimals: int) -> str:
    return str(int((value - int(value)).scaleb(decimals))).zfill(decimals) if decimals else ""


def _fractions(low: str, high: str) -> str:
    """What may follow a whole number so that the digits after the point are from ``low`` to ``high``, both of one length."""
    if not low:
        return ""
    some = _digits(low, high)
    bare = not int(low)  # no point at all is the fraction 0
    if some is None:
        return ""
    return rf"(\.{some})?" if bare else rf"\.{some}"


def _digits(low: str, high: str) -> str | None:
    """Digits from ``low`` to ``high`` without zeros at the end, at least one digit; None: there are none."""
    parts = []
    for digit in range(int(low[0]), int(high[0]) + 1):
        rest_low = low[1:] if digit == int(low[0]) else "0" * (len(low) - 1)
        rest_high = high[1:] if digit == int(high[0]) else "9" * (len(high) - 1)
        rest = _digits(rest_low, rest_high) if rest_low else None
        ends = digit > 0 and (not rest_low or not int(rest_low))  # a last digit, not 0
        if rest is not None:
            parts.append((f"({rest})?" if ends else rest, digit))
        elif ends:
            parts.append(("", digit))
    if not parts:
        return None
    by_rest: dict[str, list[int]] = {}
    for tail, digit in parts:
        by_rest.setdefault(tail, []).append(digit)
    return _grouped([_one_of(digits) + tail for tail, digits in by_rest.items()])


def _one_of(digits: list[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    if digits == list(range(digits[0], digits[-1] + 1)):
        return f"[{digits[0]}-{digits[-1]}]"
    return f"[{''.join(map(str, digits))}]"


def _whole(low: int, high: int) -> str:
    """Whole numbers from ``low`` to ``high``, neither below 0."""
    parts = []
    while low <= high:
        end = min(high, 10 ** len(str(low)) - 1)
        parts += _same_length(str(low), str(end))
        low = end + 1
    return _grouped(parts)


def _same_length(low: str, high: str) -> list[str]:
    if not low:
        return [""]
    if low[0] == high[0]:
        return [low[0] + tail for tail in [_grouped(_same_length(low[1:], high[1:]))]]
    free = len(low) - 1
    first, last = int(low[0]), int(high[0])
    parts = []
    if free and int(low[1:]):
        parts.append(low[0] + _grouped(_same_length(low[1:], "9" * free)))
        first += 1
    tail = []
    if free and high[1:] != "9" * free:
        tail.append(high[0] + _grouped(_same_length("0" * free, high[1:])))
        last -= 1
    if first <= last:
        parts.append(_one_of(list(range(first, last + 1))) + (f"[0-9]{{{free}}}" if free else ""))
    return parts + tail


def _grouped(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"

"""Which combinations of a test's values run by default; the rest are ``slow`` (pytest -m slow)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def usual(values: Iterable[Any], kept: Iterable[Any]) -> list[Any]:
    """The values as parameters, of which all but ``kept`` have the marker ``slow``."""
    kept = list(kept)
    return [pytest.param(value, marks=[] if value in kept else pytest.mark.slow) for value in values]


def covering(*axes: Iterable[Any], strength: int | None = None) -> list[Any]:
    """All combinations of values as parameters, of which those beyond a covering array have the marker ``slow``.

    The array has every combination of values of every ``strength`` axes (pairwise testing for 2), found greedily: the next
    row is the one that covers most of what is left, with the values that were used least. It is the same in every run.

    Args:
        axes: the values of each argument. strength: None: one less than there are axes.
    """
    values = [list(axis) for axis in axes]
    width = max(len(values) - 1, 1) if strength is None else strength
    rows = list(itertools.product(*(range(len(axis)) for axis in values)))

    def parts(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(row), width))

    left = set().union(*map(parts, rows))
    kept, used = set(), Counter[tuple[int, int]]()
    while left:
        best = max(rows, key=lambda row: (len(parts(row) & left), -sum(used[pair] for pair in enumerate(row))))
        kept.add(best)
        used.update(enumerate(best))
        left -= parts(best)
    return [
        pytest.param(
            *(axis[place] for axis, place in zip(values, row, strict=True)), marks=[] if row in kept else pytest.mark.slow
        )
        for row in rows
    ]

"""A threshold that holds its target with a confidence that survives the choice: fixed-sequence testing.

"Learn then Test" (Angelopoulos and others, arXiv 2110.01052): thresholds are tested from strict to lax, each the hypothesis "of
what is kept, more than the target is wrong" by an exact binomial tail. The first that is not rejected ends the sequence, so
no level is spent on the others. The threshold before it is taken.

Why the guarantee covers the choice:

- The thresholds lie at ranks of the signal that follow from the number of rows alone, and what ranks above a threshold is an
  independent sample of what it would keep. Which threshold is the first too lax one depends on how many rows lie between those
  at which the true error crosses the target. Between two crossings the error is the target, so that says nothing about how many
  of them are wrong.
- Rows that choose the signal are not tested.
- Nothing that is fitted to the tested answers (the chances) decides what is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from shadowpeft.errors import ConfigError, DataError

FEWEST = 30
"""Answers with a known action that a calibration needs."""
_TESTS = 20
"""Thresholds at even steps of rank: each is one more chance to stop by bad luck, and fewer leave larger steps."""
_STRICTEST, _FORGIVEN, _AT_MOST = 0.3, 2, 0.4
"""The strictest threshold keeps this share of the tested answers. It keeps so many that one of them may be wrong, or two, where
that takes no more than the last share: a sequence that starts where none may be wrong ends at the first wrong label."""
_CHOOSING, _MOST_CHOOSING = 5, 200  # one row in five chooses the signal; more than 200 tell signals no better apart


@dataclass(frozen=True)
class Tested:
    """What the tests found."""

    least: float
    """Least value of the signal that is kept. Minus infinity: every known action is (a target of 1). Infinity: none is."""
    rows: int
    """Answers with a known action that were tested."""
    kept: int
    wrong: int
    """Of these rows, how many the threshold keeps, and how many of those are wrong."""


def fewest_kept(target: float, level: float, wrong: int = 0) -> int:
    """How many answers must be kept until ``wrong`` wrong ones among them hold ``target``; none: (1 - target)^n <= 1 - level.

    Raises:
        ConfigError: if no number of answers can, or the level is none.
    """
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level is {level} but must be between 0 and 1, such as 0.95")
    if target <= 0.0:
        raise ConfigError(
            f"target is {target}, which no number of answers can hold; give a target above 0, or take the plain share (bound "
            "off, --no-bound)"
        )
    if target >= 1.0:
        return 1 + wrong
    if not wrong:
        return max(1, math.ceil(math.log(1.0 - level) / math.log1p(-target)))
    from scipy.stats import nbinom

    return 1 + wrong + int(nbinom.ppf(level, 1 + wrong, target))  # until one more than that is wrong


def choosing_rows(n: int, signal: str, seed: int) -> list[int]:
    """Which of ``n`` rows choose the signal instead of being tested: none if it is named."""
    if signal != "auto":
        return []
    rows: list[int] = np.random.default_rng(seed).permutation(n)[: min(n // _CHOOSING, _MOST_CHOOSING)].tolist()
    return rows


def require_known(is_open: list[bool], enough: int = FEWEST) -> None:
    """Refuse rows with so few commands that no device could give :data:`FEWEST` answers worth a calibration.

    Args:
        is_open: for each row, whether no action is right for it. enough: commands to ask for.

    Raises:
        DataError: with the number of commands that there are, and that it takes.
    """
    commands = is_open.count(False)
    if commands < FEWEST:
        raise DataError(
            f"a calibration needs {FEWEST} answers with a known action but the data has {commands} commands in {len(is_open)} "
            f"rows; give at least {max(enough, FEWEST)} commands, and some more if the device does not know them all"
        )


def require_rows(is_open: list[bool], *, target: float, level: float, signal: str, seed: int = 0) -> None:
    """Refuse rows that cannot hold the target even if every command is kept and answered rightly.

    Args:
        is_open: for each row, whether no action is right for it. signal: ``auto`` takes rows away from the tests.

    Raises:
        ConfigError: for an impossible target or level. DataError: with the number of commands that it would take, also as
            :func:`require_known`.
    """
    needed = fewest_kept(target, level)
    aside = choosing_rows(len(is_open), signal, seed)
    commands, tested = is_open.count(False), is_open.count(False) - sum(not is_open[i] for i in aside)
    if tested >= needed and commands >= FEWEST:
        return
    enough = needed
    while enough - len(choosing_rows(enough, signal, seed)) < needed:
        enough += 1
    require_known(is_open, enough)
    choosing = f", {commands - tested} of which choose the signal" if commands > tested else ""
    reach = f"a target from {math.ceil(1e4 * (1 - (1 - level) ** (1 / tested))) / 1e4:g}, " if tested else ""
    raise DataError(
        f"target {target:g} at level {level:g} takes {needed} kept answers without a wrong one, but the data has {commands} "
        f"commands{choosing}; give about {enough} commands, {reach}or --no-bound"
    )


def strictest(rows: int, target: float, level: float) -> int:
    """How many of ``rows`` tested answers the first threshold keeps; more than there are if none can hold ``target``."""
    forgiving = (fewest_kept(target, level, wrong) for wrong in range(1, _FORGIVEN + 1))
    least = [n for n in forgiving if n <= _AT_MOST * rows]
    return max(fewest_kept(target, level), math.ceil(_STRICTEST * rows), *least)


def strictest_to_laxest(x: np.ndarray, wrong: np.ndarray, *, target: float, level: float, seed: int = 0) -> Tested:
    """Test thresholds on a signal in order and take the last that passes.

    Args:
        x: ``(N,)`` the signal of each tested answer, the larger the surer. wrong: ``(N,)`` whether the answer is.
    """
    rows = len(x)
    first = strictest(rows, target, level)
    if first > rows:
        return Tested(math.inf, rows, 0, 0)
    shuffled = np.random.default_rng(seed).permutation(
        rows
    )  # equal values rank at random, whatever the order of the rows
    order = shuffled[np.argsort(-x[shuffled], kind="stable")]
    falling, errors = x[order], np.cumsum(wrong[order])
    ranks = np.linspace(first, rows, _TESTS).round().astype(int)
    ends = np.searchsorted(-falling, -falling[ranks - 1], side="right")  # a threshold keeps equal values together
    ranks = np.unique(np.concatenate([ranks, ends]))
    passed = _holds(ranks, errors[ranks - 1], target, level)
    ranks = ranks[: len(ranks) if passed.all() else int(np.argmin(passed))]
    ranks = ranks[np.isin(ranks, ends)]
    if len(ranks) == 0:
        return Tested(math.inf, rows, 0, 0)
    kept = int(ranks[-1])
    if kept < rows:
        least = float(np.nextafter(falling[kept], math.inf))
    else:  # all of these may be kept; nothing is known of requests that are less sure than any of them
        least = -math.inf if target >= 1.0 else float(falling[-1])
    return Tested(least, rows, kept, int(errors[kept - 1]))


def _holds(n: np.ndarray, wrong: np.ndarray, target: float, level: float) -> np.ndarray:
    """Whether so few wrong of ``n`` would be unlikely if more than ``target`` were: an exact binomial tail."""
    from scipy.stats import binom

    return np.asarray((binom.cdf(wrong, n, target) <= 1.0 - level) | (target >= 1.0))

"""Whether the requests that come are still like those of the calibration, whose bound holds for such requests only."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from itertools import accumulate
from typing import Any

from shadowpeft.errors import ConfigError
from shadowpeft.serve.router import KNOWN, TAGGED, UNKNOWN, UNSURE, Calibration, Decision

WINDOW = 500
"""Decisions that are compared: the last ones."""
FEWEST = 30
"""Decisions before anything is said."""
_CHANCE = 1e-4  # of a warning about a full window of requests that are like the calibration's
_REASONS = (KNOWN, UNSURE, TAGGED, UNKNOWN)


class Drift:
    """Compares the last decisions with the calibration's, by Kolmogorov and Smirnov's statistic of two samples.

    Every request is put in order: unknown answer, ``[REMOTE]``, and known actions by tenths of the signal. The statistic is the
    largest gap between the shares of requests up to a place of this order, here and there: 0 to 1.

    Args:
        traffic: what :func:`shadowpeft.serve.calibration.calibrate` counted.

    Raises:
        ConfigError: if it is damaged.
    """

    def __init__(self, traffic: Any, window: int = WINDOW) -> None:
        _check(traffic)
        self._edges: list[float] = traffic["edges"]
        self._reasons = Counter[str](traffic["reasons"])
        self._known: list[int] = traffic["known"]
        away = [self._reasons[UNKNOWN], self._reasons[TAGGED]]
        self._calibrated = _rising([*away, *self._known])
        self._n = sum(self._reasons.values())
        self._window: deque[tuple[int, str]] = deque(maxlen=window)

    @classmethod
    def of(cls, calibration: Calibration | None) -> Drift | None:
        """None without a calibration, or with one from before traffic was counted."""
        traffic = None if calibration is None else calibration.report.get("traffic")
        return None if traffic is None else cls(traffic)

    def add(self, decision: Decision) -> None:
        """Count one decision of the router."""
        place = 0 if decision.reason == UNKNOWN else 1
        if decision.value is not None:
            place = 2 + bisect_right(self._edges, decision.value)
        self._window.append((place, decision.reason))

    @property
    def gap(self) -> float:
        """The statistic; not a number until there are :data:`FEWEST` decisions."""
        return math.nan if len(self._window) < FEWEST else max(self._gaps())

    def _gaps(self) -> list[float]:
        """Between the shares of requests up to each place."""
        return [abs(a - b) for a, b in zip(_rising(self._places()), self._calibrated, strict=True)]

    def _places(self) -> list[int]:
        """The last decisions at each place of the order."""
        places = Counter(place for place, _ in self._window)
        return [places[i] for i in range(len(self._calibrated))]

    @property
    def limit(self) -> float:
        """What the gap of a window exceeds with a probability of 1 in 10,000 if nothing has moved."""
        n = max(1, len(self._window))
        return math.sqrt(-math.log(_CHANCE / 2) / 2 * (1 / n + 1 / self._n))

    @property
    def moved(self) -> bool:
        """Whether the gap is beyond the limit."""
        return self.gap > self.limit

    def problem(self) -> str | None:
        """What has moved: shares by reason, and of the known actions where their signal lies; None: nothing has."""
        if not self.moved:
            return None
        n, live = len(self._window), Counter(reason for _, reason in self._window)
        shares = [(reason, live[reason] / n, self._reasons[reason] / self._n) for reason in _REASONS]
        gaps = self._gaps()
        below = gaps.index(max(gaps)) - 1  # tenths up to the place that differs most
        places = self._places()[2:]
        if 0 < below < len(places) and any(places):
            text = f"known actions with a signal below {self._edges[below - 1]:.3g}, of all known"
            shares.append((text, sum(places[:below]) / sum(places), sum(self._known[:below]) / sum(self._known)))
        moved = [
            f"{what} {now:.0%} (then {then:.0%})".replace("%", " %")
            for what, now, then in shares
            if f"{now:.0%}" != f"{then:.0%}"
        ]
        return (
            f"the last {n} requests are not like the calibration's: {', '.join(moved)}; calibrate again on requests as they "
            "come now"
        )


def _rising(counts: list[int]) -> list[float]:
    return [count / sum(counts) for count in accumulate(counts)]


def _check(traffic: Any) -> None:
    """
    Raises:
        ConfigError: if these are no counts.
    """
    good = isinstance(traffic, dict) and traffic.keys() == {"reasons", "edges", "known"}
    if good:
        reasons, edges, known = traffic["reasons"], traffic["edges"], traffic["known"]
        good = isinstance(reasons, dict) and isinstance(edges, list) and isinstance(known, list)
        good = good and reasons.keys() <= set(_REASONS) and len(known) == len(edges) + 1
        good = good and all(type(x) is int and x >= 0 for x in (*reasons.values(), *known))
        good = good and all(type(x) is float for x in edges) and edges == sorted(edges)
        good = good and sum(known) == reasons.get(KNOWN, 0) + reasons.get(UNSURE, 0) > 0
    if not good:
        raise ConfigError("a calibration has 'traffic' in its report that is damaged; calibrate again")

"""Fitting a confidence: from scored device answers to the chance that an action is right, and what is kept.

Only answers with a known action take part, since all others go to the cloud anyway. What is kept is decided on the signal
itself (:mod:`shadowpeft.serve.bound`). The chances are an isotonic regression of the signal, for people to read; what is
reported of them comes from folds that did not see the answer (cross-fitting).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve.bound import FEWEST, Tested, choosing_rows, fewest_kept, require_rows, strictest_to_laxest
from shadowpeft.serve.router import ACTION, ALL, KNOWN, TAGGED, UNKNOWN, UNSURE, Calibration
from shadowpeft.storage import whole
from shadowpeft.versions import require_sklearn

NEAR = 0.01
"""Of two signals with AUROCs so close, the probability of the action is taken: it needs no answer but an action."""
_NEVER = 2.0  # a threshold that no chance reaches


@dataclass(frozen=True)
class Sample:
    """One device answer to a request whose right answer is known."""

    kept: bool
    """Whether it has a known action."""
    right: bool
    """Whether that action is right."""
    signals: dict[str, float] = field(default_factory=dict)
    """See :func:`shadowpeft.serve.router.signals`; may be empty if there is no action."""
    cloud_right: bool | None = None
    """Whether the cloud's answer is right; None if it was not asked."""
    is_open: bool = False
    """Whether no action is right for the request, so that it should be handed on."""
    tagged: bool = False
    """Whether the answer is ``[REMOTE]``."""
    times: int = 1
    """How often the request came. It is one answer, and counts once but for the traffic."""
    handed_right: bool | None = None
    """As ``cloud_right``, where the device's ``[REMOTE]`` has gone along with the request; None: that changes nothing."""


def calibrate(
    samples: Sequence[Sample],
    *,
    target: float,
    signal: str = "auto",
    bound: bool = True,
    level: float = 0.95,
    folds: int = 5,
    seed: int = 0,
) -> Calibration:
    """Fit on ``samples`` and choose what is kept: as much as possible while at most ``target`` of it is wrong.

    Args:
        target: largest share of wrong answers among those given on the device, 0 to 1.
        signal: one that the samples have, or ``auto`` for the one with the largest AUROC.
        bound: with probability ``level`` at most ``target`` of what is kept of requests like these is wrong, whatever the
            signal is worth. False: the share holds on ``samples`` only.
        folds: of the cross-fitting.

    Raises:
        ConfigError: for an impossible target, level or signal. DataError: if fewer than :data:`FEWEST` answers have a known
            action, or the bound could not hold even if every answer were right.
    """
    require_sklearn("route calibrate")
    if not 0.0 <= target <= 1.0 or math.isnan(target):
        raise ConfigError(f"target is {target} but must be a share from 0 to 1, such as 0.05")
    if signal not in ("auto", *ALL):
        raise ConfigError(f"signal is {signal!r} but must be auto or one of {', '.join(ALL)}")
    if folds < 2:
        raise ConfigError(f"folds is {folds} but must be at least 2")
    if bound:
        require_rows([s.is_open for s in samples], target=target, level=level, signal=signal, seed=seed)
    known = [s for s in samples if s.kept]
    if len(known) < FEWEST:
        more = f"give about {math.ceil(FEWEST * len(samples) / len(known))} rows like these, or " if known else ""
        raise DataError(
            f"{len(known)} of {len(samples)} device answers have a known action but a calibration needs {FEWEST}; {more}train "
            "the shadow longer"
        )
    right = np.array([s.right for s in known], dtype=float)
    values = {name: _column(known, name) for name in ALL if name in known[0].signals}
    if signal not in ("auto", *values):
        raise ConfigError(f"signal is {signal!r} but these answers have {', '.join(values)}; take one of these")
    tested: Tested | None = None
    if bound:
        aside = set(choosing_rows(len(samples), signal, seed))
        choosing = np.array([i in aside for i, s in enumerate(samples) if s.kept])
        chosen, tested = decide(values, right, choosing, target=target, level=level, signal=signal, seed=seed)
    else:
        chosen = _largest_auroc(values, right) if signal == "auto" else signal
    x = values[chosen]
    out_of_fold = _cross_fit(x, right, folds, seed)
    fitted = _isotonic().fit(x, right)
    points, chances = (tuple(row.tolist()) for row in (fitted.X_thresholds_, fitted.y_thresholds_))
    if tested is None:
        calibration = Calibration(chosen, points, chances, choose_threshold(out_of_fold, right, target))
        kept = _spread(samples, out_of_fold >= calibration.threshold)
    else:
        calibration = _keeping_from(tested.least, Calibration(chosen, points, chances, _NEVER))
        kept = _kept(calibration, samples)
    calibration.report.update(
        {
            "n": len(samples),
            "known_actions": len(known),
            "target": target,
            "bound": bound,
            **({} if tested is None else _tests(tested, target, level)),
            "folds": folds,
            "signals_auroc": {name: _rounded(area) for name, area in signal_areas(samples).items()},
            "auroc": _rounded(auroc(right, out_of_fold)),
            "ece": _rounded(ece(right, out_of_fold)),
            **summarise(samples, kept),
            "without_confidence": summarise(samples, [s.kept for s in samples]),
            "traffic": _traffic(calibration, samples),
        }
    )
    return calibration


def decide(
    values: Mapping[str, np.ndarray],
    right: np.ndarray,
    choosing: np.ndarray,
    *,
    target: float,
    level: float,
    signal: str = "auto",
    seed: int = 0,
) -> tuple[str, Tested]:
    """All that a bound depends on: the signal, chosen on some answers, and its threshold, tested on the others.

    Args:
        values: ``(N,)`` of each signal, for the answers with a known action. right: ``(N,)``. choosing: ``(N,)``, which answers
            choose the signal.
    """
    if signal == "auto":
        signal = _largest_auroc({name: column[choosing] for name, column in values.items()}, right[choosing])
    x, wrong = values[signal][~choosing], 1 - right[~choosing]
    return signal, strictest_to_laxest(x, wrong, target=target, level=level, seed=seed)


def _largest_auroc(values: Mapping[str, np.ndarray], right: np.ndarray) -> str:
    """The first of several that are equally good, or that nothing can be said of."""
    return max(values, key=lambda name: auroc(right, values[name]) or 0.0)


def _keeping_from(least: float, calibration: Calibration) -> Calibration:
    if least == math.inf:
        return calibration
    if least == -math.inf:
        return replace(calibration, threshold=0.0)
    return replace(calibration, threshold=calibration.at(least), least=least)


def _tests(tested: Tested, target: float, level: float) -> dict[str, Any]:
    return {
        "level": level,
        "tested": {
            "rows": tested.rows,
            "kept": tested.kept,
            "wrong": tested.wrong,
            "needed": fewest_kept(target, level),
        },
    }


def _traffic(calibration: Calibration, samples: Sequence[Sample]) -> dict[str, Any]:
    """What :mod:`shadowpeft.serve.drift` compares the live requests with: counts by reason and by tenths of the signal."""
    values = [s.signals[calibration.signal] for s in samples if s.kept for _ in range(s.times)]
    edges = sorted({*np.quantile(values, np.linspace(0.1, 0.9, 9)).tolist()})
    tenths = Counter(bisect_right(edges, value) for value in values)
    here = [KNOWN if calibration.keeps(value) else UNSURE for value in values]
    away = [TAGGED if s.tagged else UNKNOWN for s in samples if not s.kept for _ in range(s.times)]
    return {"reasons": dict(Counter(here + away)), "edges": edges, "known": [tenths[i] for i in range(len(edges) + 1)]}


def signal_areas(samples: Sequence[Sample]) -> dict[str, float | None]:
    """The AUROC of each signal that the samples with a known action have."""
    known = [s for s in samples if s.kept]
    right = np.array([s.right for s in known], dtype=float)
    names = [name for name in ALL if known and name in known[0].signals]
    return {name: auroc(right, _column(known, name)) for name in names}


def best_signal(areas: Mapping[str, float | None]) -> str:
    """The signal with the largest AUROC; the action's probability where none is better by more than :data:`NEAR`."""
    best = max(areas, key=lambda name: areas[name] or 0.0, default=ACTION)
    near = (areas.get(best) or 0.0) - (areas.get(ACTION) or 0.0) <= NEAR
    return ACTION if near and ACTION in areas else best


def check(calibration: Calibration, samples: Sequence[Sample]) -> dict[str, Any]:
    """The same figures on answers that had no part in the fit."""
    known = np.array([c for c in confidences(calibration, samples) if c is not None])
    right = np.array([s.right for s in samples if s.kept], dtype=float)
    return {
        "n": len(samples),
        "known_actions": len(known),
        "auroc": _rounded(auroc(right, known)),
        "ece": _rounded(ece(right, known)),
        **summarise(samples, _kept(calibration, samples)),
    }


def confidences(calibration: Calibration, samples: Sequence[Sample]) -> list[float | None]:
    """The confidence of each sample; None for those without a known action."""
    return [calibration.at(s.signals[calibration.signal]) if s.kept else None for s in samples]


def summarise(samples: Sequence[Sample], kept: Sequence[bool]) -> dict[str, Any]:
    """Share answered on the device, share of these that is wrong with its 95 % upper bound, accuracy of the whole.

    Shares of the commands and of the open requests stand beside those of the mixture, which say little: where half of the
    requests are open, no router may keep more than half.
    """
    here, wrong = sum(kept), sum(k and not s.right for k, s in zip(kept, samples, strict=True))
    of_commands = [k for k, s in zip(kept, samples, strict=True) if not s.is_open]
    of_open = [k for k, s in zip(kept, samples, strict=True) if s.is_open]
    result: dict[str, Any] = {
        "on_device": _share(here, len(samples)),
        "answered_on_device": here,
        "wrong_on_device": wrong,
        "wrong_share": _share(wrong, here),
        "wrong_share_upper_95": _rounded(upper_bound(wrong, here)),
        "commands": len(of_commands),
        "commands_right": _share(sum(s.right for s in samples if not s.is_open), len(of_commands)),
        "commands_kept": _share(sum(of_commands), len(of_commands)),
        "commands_handed_on": _share(of_commands.count(False), len(of_commands)),
        "open_requests": len(of_open),
        "open_handed_on": _share(of_open.count(False), len(of_open)),
    }
    if samples and all(s.cloud_right is not None for s in samples):
        handed = [s.cloud_right if s.handed_right is None else s.handed_right for s in samples]
        hits = sum(s.right if k else bool(h) for k, h, s in zip(kept, handed, samples, strict=True))
        result["accuracy_routed"] = _share(hits, len(samples))
        result["accuracy_cloud"] = _share(sum(bool(s.cloud_right) for s in samples), len(samples))
    return result


def choose_threshold(chance: np.ndarray, right: np.ndarray, target: float) -> float:
    """The least threshold on ``chance`` ``(N,)`` at which the share of wrong answers kept is within ``target``.

    Of all thresholds that hold the target on these answers, the one that keeps most is taken, also if a stricter one does not
    hold it. So other answers may miss it by much. If none holds it, a threshold that keeps nothing.
    """
    order = np.argsort(-chance, kind="stable")
    sorted_chance, wrong = chance[order], np.cumsum(1 - right[order])
    last = np.append(
        sorted_chance[1:] != sorted_chance[:-1], True
    )  # a threshold keeps all answers of one chance or none
    holds = last & (wrong / np.arange(1, len(order) + 1) <= target)
    return float(sorted_chance[holds][-1]) if holds.any() else _NEVER


def upper_bound(wrong: int, n: int, level: float = 0.95) -> float:
    """Upper end of the one-sided Clopper-Pearson interval of ``wrong`` in ``n``: the share at which so few are unlikely."""
    from scipy.stats import beta

    return 1.0 if wrong >= n else float(beta.ppf(level, wrong + 1, n - wrong))


def auroc(right: np.ndarray, score: np.ndarray) -> float | None:
    """Chance that a right answer scores above a wrong one (ties count half); None if all are right or all wrong."""
    if len(right) == 0 or right.min() == right.max():
        return None
    hits, misses = score[right == 1], np.sort(score[right == 0])
    below = np.searchsorted(misses, hits, side="left") + np.searchsorted(misses, hits, side="right")
    return float(below.mean()) / (2 * len(misses))


def ece(right: np.ndarray, chance: np.ndarray, bins: int = 10) -> float | None:
    """Expected calibration error: mean gap between chance and share of right answers, over ``bins`` equal bins of chance."""
    if len(right) == 0:
        return None
    place = np.minimum((chance * bins).astype(int), bins - 1)
    gaps = [abs(float((right - chance)[place == b].sum())) for b in range(bins)]
    return sum(gaps) / len(right)


def curve(calibration: Calibration, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The cost-quality curve: one point a threshold, with the share sent to the cloud and what :func:`summarise` finds."""
    chances = confidences(calibration, samples)
    points = []
    for threshold in sorted({0.0, *(c for c in chances if c is not None), _NEVER}):
        summary = summarise(samples, [c is not None and c >= threshold for c in chances])
        points.append({"threshold": threshold, "to_cloud": round(1 - summary["on_device"], 4), **summary})
    return points


def plot(calibration: Calibration, samples: Sequence[Sample], file: Path, title: str) -> None:
    """Draw the cost-quality curve, by the share of commands kept, and the reliability of the confidence into a PNG."""
    from matplotlib.figure import Figure

    points = curve(calibration, samples)
    chosen = summarise(samples, _kept(calibration, samples))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right_axis = figure.subplots(1, 2)
    of_commands = [_number(p["commands_kept"]) for p in points]
    lines = {
        "wrong_share": "wrong, of what is kept",
        "open_handed_on": "open requests handed on",
        "accuracy_routed": "accuracy, routed",
    }
    for key, label in lines.items():
        if any(p.get(key) is not None for p in points):
            left.plot(of_commands, [_number(p.get(key)) for p in points], label=label)
    if "accuracy_cloud" in chosen:
        left.axhline(chosen["accuracy_cloud"], linestyle="--", color="grey", label="accuracy, always cloud")
    left.axhline(calibration.report.get("target", math.nan), linestyle=":", color="tab:red", label="the target")
    left.axvline(_number(chosen["commands_kept"]), linestyle=":", color="black", label="what is kept")
    left.set(xlabel="share of commands kept on the device", ylabel="share", title=title, ylim=(-0.02, 1.02))
    left.legend(fontsize=7)
    known = np.array([c for c in confidences(calibration, samples) if c is not None])
    hits = np.array([s.right for s in samples if s.kept], dtype=float)
    place = np.minimum((known * 10).astype(int), 9)
    used = [b for b in range(10) if (place == b).any()]
    right_axis.plot([0, 1], [0, 1], linestyle="--", color="grey")
    right_axis.plot([known[place == b].mean() for b in used], [hits[place == b].mean() for b in used], marker="o")
    right_axis.set(xlabel="confidence", ylabel="share that is right", title="reliability", ylim=(-0.02, 1.02))
    with whole(file) as beside:
        figure.savefig(beside, dpi=120)


def _column(known: Sequence[Sample], name: str) -> np.ndarray:
    return np.array([s.signals[name] for s in known], dtype=float)


def _kept(calibration: Calibration, samples: Sequence[Sample]) -> list[bool]:
    return [s.kept and calibration.keeps(s.signals[calibration.signal]) for s in samples]


def _spread(samples: Sequence[Sample], kept: np.ndarray) -> list[bool]:
    left = iter(kept.tolist())
    return [s.kept and next(left) for s in samples]


def _isotonic() -> Any:
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")


def _cross_fit(x: np.ndarray, right: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Chances from fits that did not see the answer; right and wrong ones are dealt evenly over the folds.

    ``StratifiedKFold`` deals otherwise for the same seed, which would change the thresholds of saved calibrations.
    """
    fold = np.zeros(len(x), dtype=int)
    for value in (0.0, 1.0):
        group = np.flatnonzero(right == value).tolist()
        random.Random(seed).shuffle(group)
        fold[group] = np.arange(len(group)) % folds
    chances = np.empty(len(x))
    for out in np.unique(fold):
        chances[fold == out] = _isotonic().fit(x[fold != out], right[fold != out]).predict(x[fold == out])
    return chances


def _share(part: int, of: int) -> float | None:
    return _rounded(part / of if of else None)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

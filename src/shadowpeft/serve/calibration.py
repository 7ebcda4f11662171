"""Fitting a confidence: from scored device answers to the chance that an action is right, and the least chance to keep.

Only answers with a known action take part, since all others go to the cloud anyway. The chances are an isotonic regression
of the signal; what is reported of them comes from folds that did not see the answer (cross-fitting).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve.router import ACTION, SIGNALS, Calibration
from shadowpeft.storage import whole

FEWEST = 30
"""Answers with a known action that a calibration needs."""
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


def require_sklearn() -> None:
    """Raises:
    ConfigError: if scikit-learn is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "route calibrate needs scikit-learn, which is not installed; run: pip install 'shadowpeft[route]'"
        )


def calibrate(
    samples: Sequence[Sample],
    *,
    target: float,
    signal: str = "auto",
    bound: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> Calibration:
    """Fit on ``samples`` and choose the threshold that keeps most while at most ``target`` of what is kept is wrong.

    Args:
        target: largest share of wrong answers among those given on the device, 0 to 1.
        signal: one that the samples have, or ``auto``: see :func:`best_signal`.
        bound: hold the upper end of a one-sided 95 % interval (Clopper-Pearson) under the target, not the share itself.
        folds: of the cross-fitting.

    Raises:
        ConfigError: for an impossible target or signal. DataError: if fewer than :data:`FEWEST` answers have a known action.
    """
    require_sklearn()
    if not 0.0 <= target <= 1.0 or math.isnan(target):
        raise ConfigError(f"target is {target} but must be a share from 0 to 1, such as 0.01")
    if signal not in ("auto", *SIGNALS, ACTION):
        raise ConfigError(f"signal is {signal!r} but must be auto or one of {', '.join((*SIGNALS, ACTION))}")
    if folds < 2:
        raise ConfigError(f"folds is {folds} but must be at least 2")
    known = [s for s in samples if s.kept]
    if len(known) < FEWEST:
        raise DataError(
            f"{len(known)} of {len(samples)} device answers have a known action but a calibration needs {FEWEST}; use more "
            "data or a better trained shadow"
        )
    right = np.array([s.right for s in known], dtype=float)
    areas = signal_areas(known)
    chosen = best_signal(areas) if signal == "auto" else signal
    x = _column(known, chosen)
    out_of_fold = _cross_fit(x, right, folds, seed)
    threshold = choose_threshold(out_of_fold, right, target, bound=bound)
    fitted = _isotonic().fit(x, right)
    values, chances = (tuple(points.tolist()) for points in (fitted.X_thresholds_, fitted.y_thresholds_))
    report = {
        "n": len(samples),
        "known_actions": len(known),
        "target": target,
        "bound": bound,
        "folds": folds,
        "signals_auroc": {name: _rounded(area) for name, area in areas.items()},
        "auroc": _rounded(auroc(right, out_of_fold)),
        "ece": _rounded(ece(right, out_of_fold)),
        **summarise(samples, _spread(samples, out_of_fold), threshold),
        "without_confidence": summarise(samples, _spread(samples, np.ones(len(known))), 0.0),
    }
    return Calibration(chosen, values, chances, threshold, report)


def signal_areas(samples: Sequence[Sample]) -> dict[str, float | None]:
    """The AUROC of each signal that the samples with a known action have."""
    known = [s for s in samples if s.kept]
    right = np.array([s.right for s in known], dtype=float)
    names = [name for name in (*SIGNALS, ACTION) if known and name in known[0].signals]
    return {name: auroc(right, _column(known, name)) for name in names}


def best_signal(areas: Mapping[str, float | None]) -> str:
    """The signal with the largest AUROC; the action's probability where none is better by more than :data:`NEAR`."""
    best = max(areas, key=lambda name: areas[name] or 0.0, default=ACTION)
    near = (areas.get(best) or 0.0) - (areas.get(ACTION) or 0.0) <= NEAR
    return ACTION if near and ACTION in areas else best


def check(calibration: Calibration, samples: Sequence[Sample]) -> dict[str, Any]:
    """The same figures on answers that had no part in the fit."""
    chances = confidences(calibration, samples)
    known = np.array([c for c in chances if c is not None])
    right = np.array([s.right for s in samples if s.kept], dtype=float)
    return {
        "n": len(samples),
        "known_actions": len(known),
        "auroc": _rounded(auroc(right, known)),
        "ece": _rounded(ece(right, known)),
        **summarise(samples, chances, calibration.threshold),
    }


def confidences(calibration: Calibration, samples: Sequence[Sample]) -> list[float | None]:
    """The confidence of each sample; None for those without a known action."""
    return [calibration.at(s.signals[calibration.signal]) if s.kept else None for s in samples]


def summarise(samples: Sequence[Sample], chances: Sequence[float | None], threshold: float) -> dict[str, Any]:
    """Share answered on the device, share of these that is wrong with its 95 % upper bound, accuracy of the whole."""
    here = [c is not None and c >= threshold for c in chances]
    kept = sum(here)
    wrong = sum(k and not s.right for k, s in zip(here, samples, strict=True))
    result: dict[str, Any] = {
        "on_device": _rounded(kept / len(samples) if samples else None),
        "answered_on_device": kept,
        "wrong_on_device": wrong,
        "wrong_share": _rounded(wrong / kept if kept else None),
        "wrong_share_upper_95": _rounded(upper_bound(wrong, kept)),
    }
    if samples and all(s.cloud_right is not None for s in samples):
        hits = sum(s.right if k else bool(s.cloud_right) for k, s in zip(here, samples, strict=True))
        result["accuracy_routed"] = _rounded(hits / len(samples))
        result["accuracy_cloud"] = _rounded(sum(bool(s.cloud_right) for s in samples) / len(samples))
    return result


def choose_threshold(chance: np.ndarray, right: np.ndarray, target: float, *, bound: bool = False) -> float:
    """The least threshold on ``chance`` ``(N,)`` at which the share of wrong answers kept is within ``target``.

    Of all thresholds that hold the target, the one that keeps most is taken, also if a stricter one does not hold it. If
    none does, a threshold that keeps nothing.
    """
    order = np.argsort(-chance, kind="stable")
    sorted_chance, wrong = chance[order], np.cumsum(1 - right[order])
    best = _NEVER
    for i in range(len(order)):
        if i + 1 < len(order) and sorted_chance[i + 1] == sorted_chance[i]:
            continue  # a threshold keeps all answers of one chance or none
        share = upper_bound(int(wrong[i]), i + 1) if bound else float(wrong[i]) / (i + 1)
        if share <= target:
            best = float(sorted_chance[i])
    return best


def upper_bound(wrong: int, n: int, level: float = 0.95) -> float:
    """Upper end of the one-sided Clopper-Pearson interval of ``wrong`` in ``n``: the share at which so few are unlikely."""
    from scipy.stats import beta

    return 1.0 if wrong >= n else float(beta.ppf(level, wrong + 1, n - wrong))


def auroc(right: np.ndarray, score: np.ndarray) -> float | None:
    """Chance that a right answer scores above a wrong one (ties count half); None if all are right or all wrong."""
    if len(right) == 0 or right.min() == right.max():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right, score))


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
        summary = summarise(samples, chances, threshold)
        points.append({"threshold": threshold, "to_cloud": round(1 - summary["on_device"], 4), **summary})
    return points


def plot(calibration: Calibration, samples: Sequence[Sample], file: Path, title: str) -> None:
    """Draw the cost-quality curve and the reliability of the confidence into a PNG."""
    from matplotlib.figure import Figure

    points = curve(calibration, samples)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right_axis = figure.subplots(1, 2)
    cost = [p["to_cloud"] for p in points]
    if "accuracy_routed" in points[0]:
        left.plot(cost, [p["accuracy_routed"] for p in points], drawstyle="default", label="accuracy, routed")
        left.axhline(points[0]["accuracy_cloud"], linestyle="--", color="grey", label="accuracy, always cloud")
    left.plot(
        cost,
        [math.nan if p["wrong_share"] is None else p["wrong_share"] for p in points],
        label="wrong, of the answers on the device",
    )
    chosen = summarise(samples, confidences(calibration, samples), calibration.threshold)
    left.axvline(1 - chosen["on_device"], linestyle=":", color="black", label="the chosen threshold")
    left.set(xlabel="share sent to the cloud", ylabel="share", title=title, ylim=(-0.02, 1.02))
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


def _spread(samples: Sequence[Sample], values: np.ndarray) -> list[float | None]:
    left = iter(values.tolist())
    return [next(left) if s.kept else None for s in samples]


def _isotonic() -> Any:
    from sklearn.isotonic import IsotonicRegression

    return IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")


def _cross_fit(x: np.ndarray, right: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Chances from fits that did not see the answer; right and wrong ones are dealt evenly over the folds.

    ``StratifiedKFold`` deals otherwise for the same seed, which would change the thresholds of saved calibrations.
    """
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    fold = np.zeros(len(x), dtype=int)
    for value in (0.0, 1.0):
        group = np.flatnonzero(right == value).tolist()
        random.Random(seed).shuffle(group)
        fold[group] = np.arange(len(group)) % folds
    chances: np.ndarray = cross_val_predict(_isotonic(), x, right, cv=PredefinedSplit(fold))
    return chances


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

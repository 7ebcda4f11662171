"""How often the bound of ``route calibrate`` fails, where the true error is known: thousands of simulated calibrations.

``python -m scripts.calibration_bound`` writes docs/records/calibration-bound.json, the tables in docs/routing.md and their
figure. Most runs go through the part of ``calibrate`` that decides; some go through all of it, which must decide the same.
``--render`` makes the page again from the record.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from scipy.stats import binom, norm
from sklearn import config_context

from shadowpeft.errors import DataError, ShadowPeftError
from shadowpeft.serve.bound import choosing_rows, require_rows
from shadowpeft.serve.calibration import Sample, calibrate, decide
from shadowpeft.serve.router import SIGNALS, Calibration
from shadowpeft.storage import write_text

DOCS = Path(__file__).parents[1] / "docs"
RECORD, PAGE, FIGURE = DOCS / "records" / "calibration-bound.json", DOCS / "routing.md", DOCS / "calibration-bound.png"
BEGIN, END = "<!-- simulated: made by python -m scripts.calibration_bound -->", "<!-- end of simulated -->"
ROWS, TARGETS, LEVEL = (100, 300, 1000, 3000), (0.01, 0.05, 0.1), 0.95
KNOWN = 0.85  # share of answers with a known action
ABOVE = 1.001  # the worst case is an error just above the target
_POPULATION = 200_000


def _logistic(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _informative(rank: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    z = norm.ppf(rank)
    return z, _logistic(-3 * z - 3)


def _mislabelled(rank: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_informative`, but some rows say the opposite, whatever the confidence: a share of 0.4 times the target."""
    z, error = _informative(rank, target)
    return z, error + (1 - 2 * error) * 0.4 * target


def _weak(rank: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    z = norm.ppf(rank)
    return z, _logistic(-0.5 * z - 2.2)


def _worst(rank: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    return rank, np.full_like(rank, ABOVE * target)


def _tied(rank: np.ndarray, target: float) -> tuple[np.ndarray, np.ndarray]:
    """Three values. Half of the surest answers are wrong and none of the next: together just above the target."""
    top = 1.8 * target
    value = np.select([rank > 1 - top, rank > 1 - 0.9 / ABOVE], [2.0, 1.0], 0.0)
    return value, np.select([value == 2, value == 1], [0.5, 0.0], ABOVE * target)


@dataclass(frozen=True)
class Curve:
    """How the true error falls with the confidence.

    Attributes:
        at: ranks ``(N,)`` from 0 to 1, and the target -> value of the best signal, and error.
        noise: by how much the standard deviation of what is added grows from one signal to the next; None: each signal is
            noise of its own.
    """

    title: str
    at: Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
    noise: float | None


CURVES = {
    "informative": Curve("confidence informs (a fifth is wrong)", _informative, 0.15),
    "mislabelled": Curve("confidence informs, some rows are mislabelled", _mislabelled, 0.15),
    "weak": Curve("confidence is weak (a ninth is wrong)", _weak, 0.15),
    "worst": Curve("confidence says nothing, error just above the target", _worst, None),
    "tied": Curve("three values of confidence, the surest the worst", _tied, 0.0),
}


class World:
    """A device of which all is known: its answers to draw, and the true error of whatever is kept."""

    def __init__(self, curve: str, target: float) -> None:
        self.curve, self.target = CURVES[curve], target
        ranks = (np.arange(_POPULATION) + 0.5) / _POPULATION
        values, error = self._signals(ranks, np.random.default_rng(1))
        self.values: dict[str, np.ndarray] = {}
        """All values of each signal, increasing."""
        self._above: dict[str, np.ndarray] = {}
        for name, column in values.items():
            order = np.argsort(column)
            self.values[name] = column[order]
            self._above[name] = error[order][::-1].cumsum()[::-1] / np.arange(_POPULATION, 0, -1)

    def draw(self, n: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """``n`` answers with a known action: their signals, and whether each is right."""
        values, error = self._signals(rng.random(n), rng)
        return values, (rng.random(n) >= error).astype(float)

    def kept(self, signal: str, least: float) -> tuple[float, float]:
        """Of all answers with a known action, the share kept from ``least`` on, and the true share of wrong ones of these."""
        place = int(np.searchsorted(self.values[signal], least))
        if place == _POPULATION:
            return 0.0, 0.0
        return 1 - place / _POPULATION, float(self._above[signal][place])

    @property
    def most(self) -> float:
        """The largest share that could be kept if the true errors were known."""
        signal = SIGNALS[0]
        starts = np.searchsorted(self.values[signal], np.unique(self.values[signal]))
        good = starts[self._above[signal][starts] <= self.target]
        return 1 - int(good.min()) / _POPULATION if len(good) else 0.0

    def _signals(self, ranks: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
        best, error = self.curve.at(ranks, self.target)
        values = {}
        for i, name in enumerate(SIGNALS):
            noise = self.curve.noise
            values[name] = (
                rng.random(len(ranks)) if noise is None else best + i * noise * rng.standard_normal(len(ranks))
            )
        return values, error


@dataclass(frozen=True)
class Draw:
    """Device answers to ``N`` requests: half of the wrong ones and of those without an action belong to open requests."""

    values: dict[str, np.ndarray]
    right: np.ndarray
    known: np.ndarray
    is_open: np.ndarray

    @classmethod
    def of(cls, world: World, n: int, seed: int) -> Draw:
        """The same for the same seed."""
        rng = np.random.default_rng([n, seed])
        values, right = world.draw(n, rng)
        known = rng.random(n) < KNOWN
        return cls(values, right, known, (rng.random(n) < 0.5) & ~(known & (right == 1)))

    def samples(self) -> list[Sample]:
        """For the whole of ``calibrate``."""
        rows = zip(*(column.tolist() for column in self.values.values()), strict=True)
        flags = zip(self.known.tolist(), (self.right == 1).tolist(), self.is_open.tolist(), rows, strict=True)
        return [Sample(k, k and r, dict(zip(SIGNALS, row, strict=True)), None, o, not k) for k, r, o, row in flags]

    def decide(self, target: float, seed: int) -> tuple[str, float]:
        """The part of ``calibrate`` that decides: signal, and least value that is kept.

        Raises:
            DataError: if so few rows can never hold the target.
        """
        require_rows(self.is_open.tolist(), target=target, level=LEVEL, signal="auto", seed=seed)
        choosing = np.zeros(len(self.known), dtype=bool)
        choosing[choosing_rows(len(self.known), "auto", seed)] = True
        values = {name: column[self.known] for name, column in self.values.items()}
        signal, tested = decide(
            values, self.right[self.known], choosing[self.known], target=target, level=LEVEL, seed=seed
        )
        return signal, tested.least


def cell(world: World, n: int, runs: int, whole: int, *, bound: bool) -> dict[str, Any]:
    """``runs`` calibrations on ``n`` requests each: how many miss the target, and what they keep on average.

    Args:
        whole: of these, how many go through the whole of ``calibrate``; the others only through what decides.

    Raises:
        ShadowPeftError: if the whole decides otherwise.
    """
    missed, refused, shares = 0, 0, [0.0]
    for run in range(runs):
        drawn = Draw.of(world, n, run)
        try:
            found = drawn.decide(world.target, run) if bound else None
            if run < whole or found is None:
                made = calibrate(drawn.samples(), target=world.target, bound=bound, level=LEVEL, seed=run)
                served = made.signal, smallest(made, world)
                if bound and found != served:
                    raise ShadowPeftError(f"the tests chose {found} but the calibration serves {served}; run {run}")
                found = served
        except DataError:  # so few rows can never hold the target
            refused += 1
            continue
        share, error = world.kept(*found)
        missed += error > world.target
        shares.append(share)
    kept = sum(shares) / (runs - refused) if refused < runs else None
    return {
        "runs": runs,
        "whole": whole,
        "refused": refused,
        "missed": missed,
        "kept": None if kept is None else round(kept, 4),
    }


def smallest(calibration: Calibration, world: World) -> float:
    """The least value of the signal that is kept."""
    if calibration.threshold > 1:
        return np.inf
    if calibration.least is not None:
        return calibration.least
    values = world.values[calibration.signal]
    place = int(np.searchsorted(np.interp(values, calibration.values, calibration.chances), calibration.threshold))
    return float(values[place]) if place < len(values) else np.inf


def page(record: dict[str, Any]) -> str:
    """The part of docs/routing.md that says how often a target was missed."""
    machine = record["machine"]
    runs = {rule: record["cells"][0][rule]["runs"] for rule in ("bound", "plain")}
    lines = [
        f"How many of {runs['bound']:,} simulated calibrations missed the target / how many of the answers with a known action",
        f"they kept on average, in % ([record](records/calibration-bound.json), {record['date']}, {machine['device']},",
        f"{record['minutes']:.0f} minutes of a machine busy with other work).",
        f"{record['cells'][0]['bound']['whole']} of each went through all of `calibrate`,",
        "the others through the part of it that decides. At a level of",
        f"{100 * LEVEL:.0f} %, at most {100 - 100 * LEVEL:.0f} % may miss; of so few simulations up to",
        f"{record['noise']:.1f} % may be seen to. Refused: so few rows can never hold the target. The last column",
        "is what could be kept if the true errors were known.",
        "",
        "| curve | target | " + " | ".join(f"{n:,} rows" for n in ROWS) + " | at most |",
        "|---|---|" + "---|" * len(ROWS) + "---|",
    ]
    for curve, of_curve in _grouped(record["cells"], "curve"):
        for target, cells in _grouped(of_curve, "target"):
            shown = " | ".join(_shown(c["bound"]) for c in cells)
            lines.append(f"| {CURVES[curve].title} | {100 * target:.0f} % | {shown} | {100 * cells[0]['most']:.0f} |")
    lines += [
        "",
        f"The same with `--no-bound`, {runs['plain']} simulated calibrations each:",
        "",
        "| curve | target | " + " | ".join(f"{n:,} rows" for n in ROWS) + " |",
        "|---|---|" + "---|" * len(ROWS),
    ]
    for curve, of_curve in _grouped(record["cells"], "curve"):
        for target, cells in _grouped(of_curve, "target"):
            shown = " | ".join(_shown(c["plain"]) for c in cells)
            lines.append(f"| {CURVES[curve].title} | {100 * target:.0f} % | {shown} |")
    return "\n".join(lines)


def _grouped(cells: list[dict[str, Any]], key: str) -> list[tuple[Any, list[dict[str, Any]]]]:
    return [(value, list(group)) for value, group in groupby(cells, lambda c: c[key])]


def _shown(result: dict[str, Any]) -> str:
    if result["refused"] == result["runs"]:
        return "refused"
    return f"{100 * result['missed'] / result['runs']:.1f} / {100 * result['kept']:.0f}"


def draw(record: dict[str, Any], file: Path) -> None:
    """How often the targets were missed, with the bound and without."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    panels = figure.subplots(1, len(CURVES), sharey=True)
    for axes, (curve, of_curve) in zip(panels, _grouped(record["cells"], "curve"), strict=True):
        for target, cells in _grouped(of_curve, "target"):
            colour = {0.01: "#1f5fa8", 0.05: "#c2571a", 0.1: "#4b8b3b"}[target]
            for rule, style, marker in (("plain", "--", "x"), ("bound", "-", "o")):
                shares = [100 * c[rule]["missed"] / c[rule]["runs"] for c in cells]
                label = f"{100 * target:.0f} %, {'the bound' if rule == 'bound' else '--no-bound'}"
                axes.plot(ROWS, shares, style, marker=marker, color=colour, label=label)
        axes.axhline(100 - 100 * LEVEL, color="black", linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="rows", xticks=ROWS, xticklabels=map(str, ROWS))
        axes.set_title(CURVES[curve].title.replace(", ", ",\n").replace(" (", "\n("), fontsize=8)
        axes.set_yscale("symlog", linthresh=5)
        ticks = (0, 1, 2, 5, 10, 20, 50, 100)
        axes.set(yticks=ticks, yticklabels=map(str, ticks), ylim=(-0.3, 110))
        axes.minorticks_off()
    panels[0].set_ylabel("calibrations that miss the target, %")
    panels[0].legend(fontsize=6, title="target", title_fontsize=6)
    figure.savefig(file, dpi=130)


def _measured(job: tuple[str, float, int], counts: tuple[int, int, int]) -> dict[str, Any]:
    curve, target, n = job
    world, (runs, whole, plain) = World(curve, target), counts
    with config_context(assume_finite=True, skip_parameter_validation=True):  # scikit-learn's checks take long
        rules = {"bound": cell(world, n, runs, whole, bound=True), "plain": cell(world, n, plain, plain, bound=False)}
    return {"curve": curve, "target": target, "rows": n, "most": round(world.most, 4), **rules}


def main() -> None:
    """Simulate, and write record, page and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument(
        "--whole", type=int, default=40, help="of these, through all of calibrate; the others decide only"
    )
    parser.add_argument("--plain", type=int, default=50, help="runs without the bound, all through calibrate")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--render", action="store_true", help="only the page and the figure, from the record")
    options = parser.parse_args()
    if not options.render:
        from experiments.measuring import stamp  # torch: slow to import, and the tests of the bound need none of it

        from shadowpeft.runtime import environment

        began = time.monotonic()
        jobs = [(curve, target, n) for curve in CURVES for target in TARGETS for n in ROWS]
        counts = (options.runs, options.whole, options.plain)
        with ProcessPoolExecutor(options.processes) as pool:
            made = pool.map(_measured, jobs, [counts] * len(jobs))
            cells = list(track(made, "simulating", total=len(jobs), console=Console(stderr=True)))
        record = {
            **stamp(),
            "level": LEVEL,
            "known_actions": KNOWN,
            "signals": list(SIGNALS),
            "noise": 100 * float(binom.ppf(0.999, options.runs, 1 - LEVEL)) / options.runs,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "processes": options.processes,
            "machine": environment(),
            "scipy": metadata.version("scipy"),
            "scikit-learn": metadata.version("scikit-learn"),
            "cells": cells,
        }
        write_text(RECORD, json.dumps(record, indent=2) + "\n")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{page(record)}\n{END}{rest.split(END)[1]}")
    draw(record, FIGURE)


if __name__ == "__main__":
    main()

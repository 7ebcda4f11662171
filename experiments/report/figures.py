"""A figure for each kind of spec that has one."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.records import (
    NAMES,
    TITLES,
    Page,
    Score,
    columns,
    columns_run,
    label,
    mean_score,
    rows,
    scores,
    title_with_rows,
)
from experiments.spec import MODES, Spec

COLOURS = {
    "attached": "#1f5fa8",
    "detached": "#c2571a",
    "lora": "#4b8b3b",
    "dora": "#7a4fa3",
    "rslora": "#2f9e9e",
    "base": "#777777",
}


def _plain(axes: Axes, grid: Any = "both") -> None:
    """Without a frame, on a pale grid."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)


def _canvas(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    _plain(axes)
    return figure, axes


def _legend_above(axes: Axes, count: int) -> None:
    axes.legend(frameon=False, ncols=count, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _save(figure: Figure, path: Path) -> None:
    """Without a version, so that equal records give equal files."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _sides(shown: list[Score]) -> list[list[float]]:
    """How far each interval reaches below and above its score."""
    return [[max(value - low, 0.0) for value, low, _ in shown], [max(high - value, 0.0) for value, _, high in shown]]


def bars(page: Page, spec: Spec, path: Path) -> None:
    """Score and interval of every method on every task that was run."""
    across, series = columns_run(page, spec), list(rows(spec))
    figure, axes = _canvas(max(8.0, 1.6 * len(across)))
    width = 0.8 / len(series)
    by_column = [scores(page, spec, column) for column in across]
    for number, (name, mode) in enumerate(series):
        shown = {at: score for at, column in enumerate(by_column) if (score := column[number]) is not None}
        places = [at + (number - (len(series) - 1) / 2) * width for at in shown]
        values = [value for value, _, _ in shown.values()]
        if not shown:
            continue
        sides = _sides(list(shown.values()))
        axes.bar(places, values, width, yerr=sides, label=label(spec, name, mode), color=COLOURS[mode], capsize=2)
        for place, value in zip(places, values, strict=True):
            if value < 1.0:  # a bar that cannot be seen is not one that was not run
                axes.annotate(f"{value:.1f}", (place, value), ha="center", va="bottom", fontsize=8, color=COLOURS[mode])
    titles = [title_with_rows(page, spec, column) for column in across]
    axes.set_xticks(range(len(across)), [t.replace(", ", ",\n").replace(" (", "\n(") for t in titles], fontsize=8)
    axes.set_ylabel("score, % (95 % interval)")
    axes.set_ylim(bottom=0)
    _legend_above(axes, len(series))
    _save(figure, path)


def panels(page: Page, spec: Spec, path: Path) -> None:
    """Score and interval of every row of an ablation that was run, a panel for each task."""
    across = columns_run(page, spec)
    labels = [label(spec, name, mode) for name, mode in rows(spec)]
    by_column = [scores(page, spec, column) for column in across]
    shown = [i for i in range(len(labels)) if any(column[i] for column in by_column)]
    figure, axes = _canvas(6.0 + 3.0 * len(across), 1.2 + 0.32 * len(shown))
    axes.remove()
    for number, (column, in_column) in enumerate(zip(across, by_column, strict=True), 1):
        panel = figure.add_subplot(1, len(across), number)
        _plain(panel, grid="x")
        for at, i in enumerate(shown):
            score = in_column[i]
            if score is not None:
                colour = COLOURS["detached" if labels[i].endswith(" detached") else "attached"]
                panel.barh(at, score[0], 0.7, xerr=_sides([score]), color=colour, capsize=2)
        panel.set_yticks(range(len(shown)), [labels[i] for i in shown] if number == 1 else [""] * len(shown))
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_xlabel(f"{column.title}: score, %")
    _save(figure, path)


def curves(page: Page, spec: Spec, path: Path) -> None:
    """Score against trainable parameters, one line a method and task."""
    figure, axes = _canvas()
    for column in columns(spec):
        for kind in ("shadow", "lora", "dora"):
            for mode in MODES[kind]:
                points = []
                for name, method in spec.methods.items():
                    records = page.finished(spec, column.trained_on, name)
                    score = mean_score(records, column.key(mode)) if method.method == kind else None
                    if score is not None:
                        points.append((records[0]["training"]["trainable_parameters"], *score))
                if points:
                    x, y, low, high = zip(*sorted(points), strict=True)
                    title = TITLES.get(column.trained_on, column.trained_on)
                    axes.plot(x, y, "o-", color=COLOURS[mode], label=f"{title}, {NAMES.get(kind, 'shadow ' + mode)}")
                    axes.fill_between(x, low, high, color=COLOURS[mode], alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("score, %")
    axes.legend(frameon=False)
    _save(figure, path)


def latencies(page: Page, spec: Spec, path: Path) -> None:
    """Median of paired ratios to the base of the same process, a bar a method."""
    figure, axes = _canvas()
    shown: list[tuple[str, str, float]] = []
    for task in spec.tasks:
        for name, mode in rows(spec):
            record = (page.seeds(spec, task, name) or [None])[0]
            if record is not None:
                shown.append((label(spec, name, mode), mode, record["results"][mode]["ratio"]))
    drawn = axes.bar(range(len(shown)), [ratio for _, _, ratio in shown], color=[COLOURS[mode] for _, mode, _ in shown])
    axes.bar_label(drawn, fmt="%.2f")
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [name.replace(", ", ",\n") for name, _, _ in shown])
    axes.set_ylabel(f"time for {spec.latency.new_tokens} new tokens, bare base = 1")
    _save(figure, path)


def accuracies(page: Page, spec: Spec, path: Path) -> None:
    """Accuracy of each system on commands, open requests and all: what a busy machine does not change."""
    figure, axes = _canvas()
    kinds = {"commands": "commands", "open": "open requests", "all": "all"}
    by_method = {name: [r for task in spec.tasks for r in page.finished(spec, task, name)] for name in spec.methods}
    by_method = {name: records for name, records in by_method.items() if records}
    width = 0.8 / len(by_method)
    for number, (name, records) in enumerate(by_method.items()):
        method = spec.methods[name].method
        handed = 100 * statistics.mean(record["results"]["all"]["handed_on"] for record in records)
        own = f"shadow first, {handed:.0f} % handed on" if method == "shadow" else label(spec, name, "")
        places = [at + (number - (len(by_method) - 1) / 2) * 0.8 / len(by_method) for at in range(len(kinds))]
        shown = [mean_score(records, kind) or (0.0, 0.0, 0.0) for kind in kinds]
        colour = COLOURS[MODES[method][0]]
        axes.bar(places, [v for v, _, _ in shown], width, yerr=_sides(shown), label=own, color=colour, capsize=3)
    axes.set_xticks(range(len(kinds)), list(kinds.values()))
    axes.set_ylabel("right, % (95 % interval)")
    axes.set_ylim(0, 100)
    _legend_above(axes, len(by_method))
    _save(figure, path)


def bars_with_intervals(path: Path, shown: list[tuple[str, Score]]) -> None:
    """Shares (0 to 1) of right commands with their intervals, one bar a cell."""
    figure, axes = _canvas(7.0, 1.2 + 0.5 * len(shown))
    for at, (name, share) in enumerate(shown):
        percent = tuple(100 * value for value in share)
        colour = COLOURS["lora" if "lora" in name else "attached"]
        axes.barh(at, percent[0], 0.6, xerr=_sides([percent]), color=colour, capsize=3)  # type: ignore[list-item]
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlim(50, 100)
    axes.set_xlabel("right development commands, % (95 % interval)")
    _save(figure, path)


def depth_against_score(path: Path, shown: dict[str, list[tuple[int, Score]]], rivals: dict[str, float]) -> None:
    """The best share of right commands of each depth of the shadow, and the classifier's as a line, by the rows they learnt."""
    figure, axes = _canvas(7.0, 3.6)
    for name, colour in zip(sorted({*shown, *rivals}), itertools.cycle(("base", "detached")), strict=False):
        points = shown.get(name, [])
        percent = [(100 * value, 100 * low, 100 * high) for _, (value, low, high) in points]
        if points:
            layers, values = [depth for depth, _ in points], [value for value, _, _ in percent]
            options: dict[str, Any] = {"color": COLOURS[colour], "capsize": 3, "label": f"shadow, {name}"}
            axes.errorbar(layers, values, yerr=_sides(percent), fmt="o-", **options)
        if name in rivals:
            axes.axhline(100 * rivals[name], color=COLOURS[colour], linestyle="--", label=f"TF-IDF and LinearSVC, {name}")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_xlabel("layers of the shadow")
    axes.set_ylabel("right development commands, %")
    _save(figure, path)


_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))


def score_curves(
    path: Path, lines: list[tuple[str, str, list[tuple[float, float]]]], across: str, up: str
) -> None:
    """A line of points for each training: its name, its colour, and its points.

    The axis begins a little below the worst training's median, so that a first point far below does not flatten the rest; how
    many lie below is written there.
    """
    figure, axes = _canvas()
    used: dict[str, int] = {}
    floor = min(statistics.median(value for _, value in points) for _, _, points in lines) - 2.0
    below = sum(value < floor for _, _, points in lines for _, value in points)
    for name, colour, points in lines:
        style = _STYLES[used.get(colour, 0) % len(_STYLES)]
        used[colour] = used.get(colour, 0) + 1
        axes.plot(*zip(*points, strict=True), linestyle=style, color=colour, marker=".", label=name)
    axes.set_xlim(left=0)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if below:
        axes.set_ylim(bottom=floor)
        told = "1 point lies" if below == 1 else f"{below} points lie"
        axes.text(0.01, 0.02, f"{told} below", transform=axes.transAxes, fontsize=8, color="#555555")
    axes.legend(frameon=False)
    _save(figure, path)


def ratio_bars(path: Path, shown: list[tuple[str, float, float]]) -> None:
    """Ratios of the shadow and of LoRA side by side; 1 is what each is divided by."""
    figure, axes = _canvas(8.0, 0.9 + 0.6 * len(shown))
    for offset, which, colour, title in ((-0.18, 1, "attached", "shadow"), (0.18, 2, "lora", "LoRA")):
        places, values = [at + offset for at in range(len(shown))], [row[which] for row in shown]
        drawn = axes.barh(places, values, 0.34, label=title, color=COLOURS[colour])
        axes.bar_label(drawn, fmt=" %.2f", fontsize=8)
    axes.axvline(1.0, color="#777777", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [title.replace(", of ", ",\nof ") for title, _, _ in shown], fontsize=8)
    axes.invert_yaxis()
    _legend_above(axes, 2)
    _save(figure, path)


FIGURES: dict[str, Callable[[Page, Spec, Path], None]] = {
    "table1": bars,
    "ablation": panels,
    "scaling": curves,
    "latency": latencies,
    "system": accuracies,
}

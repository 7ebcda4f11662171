"""``docs/results.md``, ``docs/figures`` and the README's table of scores from the committed records alone.

A cell without a record says "not run"; a spec without any is named in a list at the end.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.spec import KINDS, MODES, RECORDS, SPECS, Cell, Spec, cells, evaluation_name, names, read_spec
from shadowpeft.evaluate.record import bootstrap
from shadowpeft.storage import between, write_text

ROOT = Path(__file__).parent.parent
PAPER = Path(__file__).parent / "paper.yaml"
NOT_RUN = "not run"
TITLES = {
    "mmlu": "MMLU",
    "gsm8k": "GSM8K",
    "squad_v2": "SQuAD v2",
    "squad_v2_devsplit": "SQuAD v2 (devsplit)",
    "amazon_reviews": "Amazon",
    "newsgroups": "20 Newsgroups",
    "clinc150": "CLINC150",
    "robot": "Robot intents",
}
README_SPEC = "table1-smollm2-cpu"
README_MARKS = ("<!-- scores -->", "<!-- /scores -->")
NAMES = {"lora": "LoRA", "dora": "DoRA", "base": "Base, untrained"}
COLOURS = {"attached": "#1f5fa8", "detached": "#c2571a", "lora": "#4b8b3b", "dora": "#7a4fa3", "base": "#777777"}

HEAD = """# Results

Made by `python -m experiments report` from the files in `experiments/records`; nothing is typed in by hand. Every number of
ours links to the record it comes from. Scores are percentages of n test rows, which the record names; brackets hold the 95 %
bootstrap interval over examples (Wilson's at 0 and 100 %). GSM8K by likelihood is the geometric mean probability of the gold
answer's tokens, not a share of rows. With several seeds the number is their mean, the brackets hold the mean of their
intervals, and each seed's own number follows. "{not_run}" means that no record exists. The paper's numbers are printed beside
ours for comparison: they are of other bases, larger budgets and, where a note says so, other rows.

How equal conditions are kept is described in [experiments.md](experiments.md).
"""


@dataclass
class Page:
    """Where a report reads and writes."""

    records: Path = RECORDS
    specs: Path = SPECS
    docs: Path = ROOT / "docs"

    @property
    def readme(self) -> Path:
        """The README beside ``docs``."""
        return self.docs.parent / "README.md"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell, or None."""
        file = self.records / cell.spec / f"{cell.id}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def link(self, record: dict[str, Any], text: str) -> str:
        """``text`` as a link to the record."""
        path = os.path.relpath(self.records / f"{record['id']}.json", self.docs)
        return f"[{text}]({Path(path).as_posix()})"


def read(cell: Cell) -> dict[str, Any] | None:
    """The committed record of a cell, or None if it was not run."""
    return Page().read(cell)


def _specs(page: Page) -> list[Spec]:
    """Every spec; those with a record first."""

    def key(spec: Spec) -> tuple[bool, int, str]:
        return all(page.read(cell) is None for cell in cells(spec)), KINDS.index(spec.kind), spec.name

    return sorted((read_spec(name, page.specs) for name in names(page.specs)), key=key)


def write(page: Page | None = None) -> list[Path]:
    """Write the page and its figures; returns their paths."""
    page = page or Page()
    figures = page.docs / "figures"
    specs = _specs(page)
    written = []
    for spec in specs:
        draw = FIGURES.get(spec.kind)
        path = figures / f"{spec.name}.png"
        if draw is not None and any(page.read(cell) is not None for cell in cells(spec)):
            figures.mkdir(parents=True, exist_ok=True)
            draw(page, spec, path)
            written.append(path)
    page.docs.mkdir(parents=True, exist_ok=True)
    write_text(page.docs / "results.md", text(page))
    if page.readme.is_file():
        write_text(page.readme, readme(page, page.readme.read_text(encoding="utf-8")))
    return [page.docs / "results.md", *written]


def text(page: Page) -> str:
    """The content of ``docs/results.md``."""
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    specs = _specs(page)
    begun = [spec for spec in specs if any(page.read(cell) is not None for cell in cells(spec))]
    waiting = [
        f"| `{spec.name}` | {spec.title} | {len(cells(spec))} cells {NOT_RUN} |" for spec in specs if spec not in begun
    ]
    lines = [HEAD.format(not_run=NOT_RUN), *(section(page, spec, paper) for spec in begun)]
    if waiting:
        lines += ["## Specs without a record\n", "| spec | what it is | |\n|---|---|---|", *waiting, ""]
    return "\n".join(lines)


def readme(page: Page, content: str) -> str:
    """``content`` with the table of scores between its two marks made anew: each method on each task of ``README_SPEC``."""
    if between(content, README_MARKS, "") is None:
        return content
    spec = read_spec(README_SPEC, page.specs)
    columns = [c for c in _columns(spec) if any(_scores(page, spec, c[0], c[2])) and c[2].how is None]
    lines = []
    for name, method in spec.methods.items():
        for mode in MODES[method.method]:
            row = [label(spec, name, mode)]
            for task, _, evaluation in columns:
                planned = of(page, spec, task, name)
                records = [r for r in planned or [] if r is not None]
                found = _mean(records, _key(task, mode, evaluation))
                seeds = f", {len(records)} seeds" if len(records) > 1 else ""
                empty = "" if planned is None else NOT_RUN
                row.append(f"{found[0]:.1f} [{found[1]:.0f}, {found[2]:.0f}]{seeds}" if found else empty)
            lines.append(row)
    titles = [f"{title}{_rows(page, spec, task, evaluation)}" for task, title, evaluation in columns]
    return between(content, README_MARKS, "\n".join(table(["%, [95 % interval]", *titles], lines))) or content


def section(page: Page, spec: Spec, paper: dict[str, Any]) -> str:
    """One spec: what it is, what was run, the table, the figure, the training behind it."""
    every = cells(spec)
    found = [page.read(cell) for cell in every]
    done = sum(record is not None for record in found)
    old = [
        cell.id
        for cell, record in zip(every, found, strict=True)
        if record is not None and record["settings_sha256"] != cell.digest()
    ]
    lines = [f"## {spec.title}", "", f"Spec `{spec.name}`, base `{spec.base}`, {done} of {len(every)} cells run."]
    if spec.note:
        lines += ["", spec.note.strip()]
    if old:
        lines += ["", f"Records of other settings than the spec has now: {', '.join(old)}."]
    lines += ["", *TABLES[spec.kind](page, spec, paper)]
    mixed = unlike(page, spec)
    if mixed:
        lines += [
            "",
            f"Rows of one column that must not be compared, since their test rows differ: {', '.join(mixed)}.",
        ]
    note = paper.get(spec.kind, {}).get("note")
    if note and spec.paper:
        lines += ["", note.strip()]
    if done and spec.kind in FIGURES:
        lines += ["", f"![{spec.title}](figures/{spec.name}.png)"]
    if done and spec.kind != "latency":
        lines += ["", *training_table(page, spec)]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------------- numbers


def share(page: Page, records: list[dict[str, Any] | None], key: str) -> str:
    """A score in percent with its interval and links; several seeds: mean, mean interval, and each."""
    there = [r for r in records if r is not None and key in r["results"]]
    if not there:
        return NOT_RUN
    scores = [100 * r["results"][key]["score"] for r in there]
    lows, highs = zip(*(interval_of(r["results"][key]) for r in there), strict=True)
    interval = f"[{100 * statistics.mean(lows):.1f}, {100 * statistics.mean(highs):.1f}]"
    if len(there) == 1 and len(records) == 1:
        return f"{page.link(there[0], f'{scores[0]:.1f}')} {interval}"
    each = " ".join(page.link(r, f"{s:.1f}") for r, s in zip(there, scores, strict=True))
    missing = len(records) - len(there)
    return f"{statistics.mean(scores):.1f} {interval} ({each}" + (
        f"; {missing} seed{'s' if missing > 1 else ''} {NOT_RUN})" if missing else ")"
    )


def interval_of(result: dict[str, Any]) -> list[float]:
    """The bootstrap interval; where every row has one value it has no width, and Wilson's stands for it."""
    low, high = result["interval"]
    found: list[float] = result.get("wilson_interval", [low, high]) if low == high else [low, high]
    return found


def label(spec: Spec, name: str, mode: str) -> str:
    """A row's name."""
    method = spec.methods[name]
    own = method.label or NAMES.get(method.method) or ("Shadow" if name == "shadow" else name)
    return f"{own}, {mode}" if method.method == "shadow" else own


def parameters(page: Page, spec: Spec, name: str) -> str:
    """Trainable parameters of a method over the tasks (a classification head makes them differ), with links."""
    found: dict[int, dict[str, Any]] = {}
    for cell in cells(spec):
        record = page.read(cell) if cell.name == name else None
        number = None if record is None else record.get("training", {}).get("trainable_parameters")
        if number is not None and record is not None:
            found.setdefault(number, record)
    if not found:
        return "0" if spec.methods[name].method == "base" else NOT_RUN
    return ", ".join(page.link(record, f"{number:,}") for number, record in sorted(found.items()))


def _rows(page: Page, spec: Spec, task: str, evaluation: Any) -> str:
    """The number of test rows behind a column, for its title."""
    counts = {
        result["n"]
        for name, method in spec.methods.items()
        for record in of(page, spec, task, name) or []
        if record is not None
        for mode in MODES[method.method]
        if (result := record["results"].get(_key(task, mode, evaluation))) is not None
    }
    return f" (n = {', '.join(f'{n:,}' for n in sorted(counts))})" if counts else ""


def unlike(page: Page, spec: Spec) -> list[str]:
    """Columns whose records were not all made from the same test rows (other data, or another reading of it)."""
    seen: dict[str, set[str]] = {}
    for cell in cells(spec):
        for key, result in ((page.read(cell) or {}).get("results") or {}).items():
            if "settings" in result:
                column = key.replace(f"-{result['mode']}", "")
                seen.setdefault(f"{cell.task}: {column}", set()).add(result["settings"]["examples"])
    return [column for column, digests in seen.items() if len(digests) > 1]


def of(page: Page, spec: Spec, task: str, name: str) -> list[dict[str, Any] | None] | None:
    """The records of a task and method, one a seed; None if the spec has no such cell."""
    own = [cell for cell in cells(spec) if cell.task == task and cell.name == name]
    return [page.read(cell) for cell in own] if own else None


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# ------------------------------------------------------------------------------------------------------------------ tables


def _columns(spec: Spec) -> list[tuple[str, str, Any]]:
    """(trained on, title, evaluation) of every column of a table of tasks."""
    found = []
    for task, part in spec.tasks.items():
        for evaluation in part.evaluate:
            title = TITLES.get(evaluation.task or task, evaluation.task or task)
            title += f", {evaluation.how}" if evaluation.how else ""
            title += f", {evaluation.shots}-shot" if evaluation.shots else ""
            found.append((task, title, evaluation))
    return found


def _key(task: str, mode: str, evaluation: Any) -> str:
    return evaluation_name({**evaluation.model_dump(), "task": evaluation.task or task}, mode)


def tasks_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """Methods down, tasks across; the paper's rows below ours."""
    columns = _columns(spec)
    rows = []
    for name, method in spec.methods.items():
        for mode in MODES[method.method]:
            row = [label(spec, name, mode), parameters(page, spec, name) if mode != "detached" else ""]
            for task, _, evaluation in columns:
                records = of(page, spec, task, name)
                row.append("" if records is None else share(page, records, _key(task, mode, evaluation)))
            rows.append(row)
    published = paper.get(spec.kind, {})
    for name, values in published.get("models", {}).get(spec.paper, {}).items():
        scores = dict(zip(published["columns"], values["scores"], strict=True))
        count = f"{values['parameters']:,}" if "parameters" in values else ""
        row = [f"paper, {spec.paper}: {name}", count]
        for task, _, evaluation in columns:
            own = evaluation.task or task
            row.append(f"{scores[own]:.2f}" if own in scores and evaluation.how is None else "")
        rows.append(row)
    titles = [f"{title}{_rows(page, spec, task, evaluation)}" for task, title, evaluation in columns]
    return table(["method", "trainable parameters", *titles], rows)


def compared_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """As :func:`tasks_table`, then every row's distance from the one it is compared with."""
    return [*tasks_table(page, spec, paper), *differences_table(page, spec)]


def differences_table(page: Page, spec: Spec) -> list[str]:
    """Scores less those of LoRA (an ablation's: of its first row in the same mode) on the same rows and seeds."""
    other = "lora" if spec.kind == "table1" else next(iter(spec.methods))
    columns = _columns(spec)
    rows, used = [], set()
    for name, method in spec.methods.items():
        for mode in MODES[method.method]:
            against = mode if other != "lora" else "lora"
            if name == other or method.method == "base":
                continue
            gaps = [difference(page, spec, task, e, (name, mode), (other, against)) for task, _, e in columns]
            used |= {i for i, gap in enumerate(gaps) if gap}
            if any(gaps):
                rows.append([label(spec, name, mode), *gaps])
    if not rows:
        return []
    kept = [[row[0], *(row[1 + i] for i in sorted(used))] for row in rows]
    titles = [columns[i][1] for i in sorted(used)]
    first = label(spec, other, MODES[spec.methods[other].method][0]).removesuffix(", attached")
    told = f"Points above {first} on the same test rows, seed by seed; 95 % paired bootstrap interval over rows, bold where it"
    return ["", f"{told} leaves out 0:", "", *table(["", *titles], kept)]


def difference(page: Page, spec: Spec, task: str, evaluation: Any, one: tuple[str, str], other: tuple[str, str]) -> str:
    """Mean over the seeds that both rows have, in points, with the interval; empty if no record holds values of both."""
    gaps = []
    for mine, theirs in zip(of(page, spec, task, one[0]) or [], of(page, spec, task, other[0]) or [], strict=False):
        found = [_values(r, _key(task, mode, evaluation)) for r, mode in ((mine, one[1]), (theirs, other[1]))]
        if found[0] is not None and found[1] is not None and found[0][0] == found[1][0]:
            gaps.append([100 * (a - b) for a, b in zip(found[0][1], found[1][1], strict=True)])
    if not gaps:
        return ""
    each = [statistics.mean(row) for row in zip(*gaps, strict=True)]
    low, high = bootstrap(each)
    shown = f"{statistics.mean(each):+.1f} [{low:+.1f}, {high:+.1f}]"
    seeds = f", {len(gaps)} seeds" if len(gaps) > 1 else ""
    return (f"**{shown}**" if low > 0 or high < 0 else shown) + seeds


def _values(record: dict[str, Any] | None, key: str) -> tuple[str, list[float]] | None:
    """The digest of an evaluation's rows, and what each row was worth."""
    if record is None or key not in record.get("values", {}):
        return None
    return record["results"][key]["settings"]["examples"], [float(v) for v in record["values"][key].split()]


def ood_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """Trained on (down) against tested on (across)."""
    tested: dict[str, str] = {}
    for task, _, evaluation in _columns(spec):
        own = evaluation.task or task
        shots = sorted({e.shots for t, _, e in _columns(spec) if (e.task or t) == own})
        asked = f", {'/'.join(map(str, shots))}-shot" if any(shots) else ""
        tested.setdefault(own, f"{TITLES.get(own, own)}{asked}{_rows(page, spec, task, evaluation)}")
    rows = []
    for task, part in spec.tasks.items():
        for name, method in spec.methods.items():
            records = of(page, spec, task, name)
            if records is None:
                continue
            for mode in MODES[method.method]:
                row = [TITLES.get(task, task), label(spec, name, mode)]
                for other in tested:
                    match = next((e for e in part.evaluate if e.task == other), None)
                    row.append("" if match is None else share(page, records, _key(task, mode, match)))
                rows.append(row)
    published = paper["ood"]
    for name, values in published["models"].get(spec.paper, {}).items():
        trained, method_name = name.split(", ")
        scores = dict(zip(published["columns"], values, strict=True))
        shown = [f"{scores[other]:.2f}" if other in scores else "" for other in tested]
        rows.append([f"paper, {spec.paper}: {TITLES[trained]}", method_name, *shown])
    return table(["trained on", "method", *tested.values()], rows)


def scaling_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """As :func:`tasks_table`, then the paper's points."""
    lines = tasks_table(page, spec, {})
    points = [
        [f"paper, {spec.paper}: {name}", f"{count:,}", TITLES.get(task, task), f"{score:.2f}"]
        for task, series in paper["scaling"]["models"].get(spec.paper, {}).items()
        for name, values in series.items()
        for count, score in values
    ]
    return lines + (["", *table(["method", "trainable parameters", "task", "score"], points)] if points else [])


def latency_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """The median of paired ratios to the bare base, which takes turns with the method in one process, and both times.

    Milliseconds of different rows come from different minutes of the machine; ratios can be compared, they cannot.
    """
    new = spec.latency.new_tokens
    rows = []
    for task in spec.tasks:
        for name, method in spec.methods.items():
            for mode in MODES[method.method]:
                records = of(page, spec, task, name)
                record = None if records is None else records[0]
                row = [label(spec, name, mode)]
                if record is None:
                    rows.append([*row, NOT_RUN, NOT_RUN, NOT_RUN, NOT_RUN])
                    continue
                result = record["results"][mode]
                low, high = result["interval"]
                value = page.link(record, f"{result['milliseconds']:.1f}")
                shown = [
                    f"{result['ratio']:.2f}",
                    f"{value} [{low:.1f}, {high:.1f}]",
                    f"{record['results']['base']['milliseconds']:.1f}",
                ]
                rows.append([*row, *shown, f"{record['processor']}, {record['versions']['threads']} threads"])
    for name, value in paper["latency"]["models"].get(spec.paper, {}).items():
        rows.append([f"paper, {spec.paper}: {name}", "", f"{value:.1f}", "", ""])
    header = [
        "method",
        "ratio to the base beside it",
        f"ms for {new} tokens [quartiles]",
        "ms of the base beside it",
        "device",
    ]
    return table(header, rows)


def system_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """The robot as a system: who answers, how well, how fast."""
    rows = []
    for task in spec.tasks:
        for name, method in spec.methods.items():
            records = of(page, spec, task, name)
            own = "Shadow first, attached behind" if method.method == "shadow" else label(spec, name, "")
            if records is None:
                continue
            there = [r for r in records if r is not None]
            row = [own, *(share(page, records, key) for key in ("commands", "open", "all"))]
            if there:
                row.append(" ".join(page.link(r, f"{r['results']['all']['milliseconds']:.0f}") for r in there))
                row.append(" ".join(page.link(r, f"{100 * r['results']['all']['handed_on']:.1f}") for r in there))
            else:
                row += [NOT_RUN, NOT_RUN]
            rows.append(row)
    return table(["system", "commands", "open requests", "all", "mean ms a request", "handed on, %"], rows)


def training_table(page: Page, spec: Spec) -> list[str]:
    """What each trained cell was given and used."""
    rows = []
    for cell in cells(spec):
        record = page.read(cell)
        if record is None or "rate" not in record:
            continue
        training, rate = record["training"], record["rate"]
        chosen = f"{rate.get('used', rate['chosen']):g}"
        if rate.get("diverged"):
            chosen += f" ({', '.join(format(d['learning_rate'], 'g') for d in rate['diverged'])} diverged)"
        elif rate.get("at_edge"):
            chosen += " (edge of the grid)"
        if rate["record"] is not None:
            chosen = page.link({"id": rate["record"]}, chosen)
        peak = training.get("peak_memory_mib")
        rows.append(
            [
                page.link(record, record["id"]),
                chosen,
                f"{training['steps']:,}",
                f"{training['tokens']:,}",
                f"{training['seconds']:,.0f}",
                "unknown" if peak is None else f"{peak:,.0f}",
                record["processor"],
                ", ".join(f"`{commit[:8]}`" for commit in _commits(record)) or "unknown",
            ]
        )
    header = ["record", "learning rate", "steps", "tokens", "seconds (last sitting)", "peak MiB", "device", "commit"]
    return ["Training behind these numbers:", "", *table(header, rows)] if rows else []


def _commits(record: dict[str, Any]) -> list[str]:
    """The commits that a record was trained and evaluated at (the first records did not keep that of the training)."""
    found = {result["commit"] for result in record["results"].values() if result.get("commit")}
    found |= {record["training"]["commit"]} if record["training"].get("commit") else set()
    return sorted(found) or [record["commit"]] * bool(record["commit"])


TABLES: dict[str, Callable[[Page, Spec, dict[str, Any]], list[str]]] = {
    "table1": compared_table,
    "ablation": compared_table,
    "ood": ood_table,
    "scaling": scaling_table,
    "latency": latency_table,
    "system": system_table,
}


# ----------------------------------------------------------------------------------------------------------------- figures


def _canvas(width: float = 8.0, height: float = 4.5) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return plt, figure, axes


def _legend_above(axes: Any, columns: int) -> None:
    axes.legend(frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(
        path, dpi=130, metadata={"Software": None}
    )  # without a version, so that equal records give equal files
    plt.close(figure)


def _mean(records: list[dict[str, Any]], key: str) -> tuple[float, float, float] | None:
    """Score and interval in percent, means over the seeds that were run."""
    there = [r["results"][key] for r in records if key in r["results"]]
    if not there:
        return None
    low = statistics.mean(interval_of(r)[0] for r in there)
    high = statistics.mean(interval_of(r)[1] for r in there)
    return 100 * statistics.mean(r["score"] for r in there), 100 * low, 100 * high


def bars(page: Page, spec: Spec, path: Path) -> None:
    """Score and interval of every method on every task that was run."""
    columns = [(t, title, e) for t, title, e in _columns(spec) if any(_scores(page, spec, t, e))]
    plt, figure, axes = _canvas(max(8.0, 1.6 * len(columns)))
    series = [(name, mode) for name, method in spec.methods.items() for mode in MODES[method.method]]
    width = 0.8 / len(series)
    for number, (name, mode) in enumerate(series):
        places, values, errors = [], [], []
        for at, (task, _, evaluation) in enumerate(columns):
            records = [r for r in of(page, spec, task, name) or [] if r is not None]
            found = _mean(records, _key(task, mode, evaluation))
            if found is not None:
                places.append(at + (number - (len(series) - 1) / 2) * width)
                values.append(found[0])
                errors.append((found[0] - found[1], found[2] - found[0]))
        if values:
            both = [[max(e[side], 0.0) for e in errors] for side in (0, 1)]
            axes.bar(places, values, width, yerr=both, label=label(spec, name, mode), color=COLOURS[mode], capsize=2)
            for place, value in zip(places, values, strict=True):
                if value < 1.0:  # a bar that cannot be seen is not one that was not run
                    axes.annotate(
                        f"{value:.1f}", (place, value), ha="center", va="bottom", fontsize=8, color=COLOURS[mode]
                    )
    titles = [f"{title}{_rows(page, spec, task, evaluation)}" for task, title, evaluation in columns]
    axes.set_xticks(range(len(columns)), [t.replace(", ", ",\n").replace(" (", "\n(") for t in titles], fontsize=8)
    axes.set_ylabel("score, % (95 % interval)")
    axes.set_ylim(bottom=0)
    _legend_above(axes, len(series))
    _save(plt, figure, path)


def _scores(page: Page, spec: Spec, task: str, evaluation: Any) -> list[tuple[float, float, float] | None]:
    """Score and interval of each method and mode, in the order of the spec."""
    found = []
    for name, method in spec.methods.items():
        records = [r for r in of(page, spec, task, name) or [] if r is not None]
        found += [_mean(records, _key(task, mode, evaluation)) for mode in MODES[method.method]]
    return found


def rows(page: Page, spec: Spec, path: Path) -> None:
    """Score and interval of every row of an ablation that was run, a panel for each task."""
    columns = [(t, title, e) for t, title, e in _columns(spec) if any(_scores(page, spec, t, e))]
    labels = [label(spec, name, mode) for name, method in spec.methods.items() for mode in MODES[method.method]]
    found = [_scores(page, spec, task, evaluation) for task, _, evaluation in columns]
    shown = [i for i in range(len(labels)) if any(scores[i] for scores in found)]
    plt, figure, axes = _canvas(6.0 + 3.0 * len(columns), 1.2 + 0.32 * len(shown))
    axes.remove()
    for number, ((_, title, _), scores) in enumerate(zip(columns, found, strict=True), 1):
        panel = figure.add_subplot(1, len(columns), number)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        for at, i in enumerate(shown):
            score = scores[i]
            if score is not None:
                sides = [[max(score[0] - score[1], 0.0)], [max(score[2] - score[0], 0.0)]]
                colour = COLOURS["detached" if labels[i].endswith(" detached") else "attached"]
                panel.barh(at, score[0], 0.7, xerr=sides, color=colour, capsize=2)
        panel.set_yticks(range(len(shown)), [labels[i] for i in shown] if number == 1 else [""] * len(shown))
        panel.invert_yaxis()
        panel.set_xlim(left=0)
        panel.set_xlabel(f"{title}: score, %")
    _save(plt, figure, path)


def curves(page: Page, spec: Spec, path: Path) -> None:
    """Score against trainable parameters, one line a method and task."""
    plt, figure, axes = _canvas()
    for task, _, evaluation in _columns(spec):
        for kind in ("shadow", "lora", "dora"):
            for mode in MODES[kind]:
                points = []
                for name, method in spec.methods.items():
                    records = [r for r in of(page, spec, task, name) or [] if r is not None]
                    found = _mean(records, _key(task, mode, evaluation)) if method.method == kind else None
                    if found is not None:
                        points.append((records[0]["training"]["trainable_parameters"], *found))
                if points:
                    x, y, low, high = zip(*sorted(points), strict=True)
                    name = f"{TITLES.get(task, task)}, {NAMES.get(kind, 'shadow ' + mode)}"
                    axes.plot(x, y, "o-", color=COLOURS[mode], label=name)
                    axes.fill_between(x, low, high, color=COLOURS[mode], alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("trainable parameters")
    axes.set_ylabel("score, %")
    axes.legend(frameon=False)
    _save(plt, figure, path)


def latencies(page: Page, spec: Spec, path: Path) -> None:
    """Median of paired ratios to the base of the same process, a bar a method."""
    plt, figure, axes = _canvas()
    shown: list[tuple[str, str, dict[str, Any]]] = []
    for task in spec.tasks:
        for name, method in spec.methods.items():
            record = (of(page, spec, task, name) or [None])[0]
            if record is not None:
                shown += [(label(spec, name, mode), mode, record["results"][mode]) for mode in MODES[method.method]]
    bars = axes.bar(range(len(shown)), [r["ratio"] for _, _, r in shown], color=[COLOURS[mode] for _, mode, _ in shown])
    axes.bar_label(bars, fmt="%.2f")
    axes.axhline(1.0, color="#777777", linewidth=0.8)
    axes.set_xticks(range(len(shown)), [name.replace(", ", ",\n") for name, _, _ in shown])
    axes.set_ylabel(f"time for {spec.latency.new_tokens} new tokens, bare base = 1")
    _save(plt, figure, path)


def parts(page: Page, spec: Spec, path: Path) -> None:
    """Accuracy of each system on commands, open requests and all: what a busy machine does not change."""
    plt, figure, axes = _canvas()
    kinds = {"commands": "commands", "open": "open requests", "all": "all"}
    every = {name: [r for task in spec.tasks for r in of(page, spec, task, name) or [] if r] for name in spec.methods}
    there = {name: records for name, records in every.items() if records}
    for number, (name, records) in enumerate(there.items()):
        method = spec.methods[name].method
        handed = 100 * statistics.mean(r["results"]["all"]["handed_on"] for r in records)
        own = f"shadow first, {handed:.0f} % handed on" if method == "shadow" else label(spec, name, "")
        places = [at + (number - (len(there) - 1) / 2) * 0.8 / len(there) for at in range(len(kinds))]
        found = [_mean(records, kind) or (0.0, 0.0, 0.0) for kind in kinds]
        errors = [[max(v - low, 0.0) for v, low, _ in found], [max(high - v, 0.0) for v, _, high in found]]
        colour = COLOURS[MODES[method][0]]
        axes.bar(places, [v for v, _, _ in found], 0.8 / len(there), yerr=errors, label=own, color=colour, capsize=3)
    axes.set_xticks(range(len(kinds)), list(kinds.values()))
    axes.set_ylabel("right, % (95 % interval)")
    axes.set_ylim(0, 100)
    _legend_above(axes, len(there))
    _save(plt, figure, path)


FIGURES: dict[str, Callable[[Page, Spec, Path], None]] = {
    "table1": bars,
    "ablation": rows,
    "scaling": curves,
    "latency": latencies,
    "system": parts,
}

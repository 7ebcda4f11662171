"""A table for each kind of spec, and one of the training behind any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.markdown import table
from experiments.report.records import (
    NOT_RUN,
    TITLES,
    Page,
    Record,
    columns,
    difference,
    label,
    parameters,
    rows,
    share,
    title_with_rows,
)
from experiments.spec import MODES, Spec, cells


def tasks_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """Methods down, tasks across; the paper's rows below ours."""
    lines = []
    for name, mode in rows(spec):
        line = [label(spec, name, mode), parameters(page, spec, name) if mode != "detached" else ""]
        for column in columns(spec):
            records = page.seeds(spec, column.trained_on, name)
            line.append("" if records is None else share(page, records, column.key(mode)))
        lines.append(line)
    published = paper.get(spec.kind, {})
    for name, values in published.get("models", {}).get(spec.paper, {}).items():
        scores = dict(zip(published["columns"], values["scores"], strict=True))
        count = f"{values['parameters']:,}" if "parameters" in values else ""
        line = [f"paper, {spec.paper}: {name}", count]
        for column in columns(spec):
            comparable = column.task in scores and column.evaluation.how is None
            line.append(f"{scores[column.task]:.2f}" if comparable else "")
        lines.append(line)
    titles = [title_with_rows(page, spec, column) for column in columns(spec)]
    return table(["method", "trainable parameters", *titles], lines)


def compared_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """As :func:`tasks_table`, then every row's distance from the one it is compared with."""
    return [*tasks_table(page, spec, paper), *differences_table(page, spec)]


def differences_table(page: Page, spec: Spec) -> list[str]:
    """Scores less those of LoRA (an ablation's: of its first row in the same mode) on the same rows and seeds."""
    other = "lora" if spec.kind == "table1" else next(iter(spec.methods))
    lines = []
    for name, mode in rows(spec):
        against = mode if other != "lora" else "lora"
        if name != other and spec.methods[name].method != "base":
            gaps = [difference(page, spec, column, (name, mode), (other, against)) for column in columns(spec)]
            if any(gaps):
                lines.append([label(spec, name, mode), *gaps])
    if not lines:
        return []
    used = [i for i in range(len(columns(spec))) if any(line[1 + i] for line in lines)]
    first = label(spec, other, MODES[spec.methods[other].method][0]).removesuffix(", attached")
    return [
        "",
        f"Points above {first} on the same test rows, seed by seed; 95 % paired bootstrap interval over rows, bold where it "
        "leaves out 0:",
        "",
        *table(
            ["", *(columns(spec)[i].title for i in used)], [[line[0], *(line[1 + i] for i in used)] for line in lines]
        ),
    ]


def ood_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """Trained on (down) against tested on (across)."""
    tested: dict[str, str] = {}
    for column in columns(spec):
        shots = sorted({c.evaluation.shots for c in columns(spec) if c.task == column.task})
        title = TITLES.get(column.task, column.task) + (f", {'/'.join(map(str, shots))}-shot" if any(shots) else "")
        tested.setdefault(column.task, title_with_rows(page, spec, column, title))
    lines = []
    for task in spec.tasks:
        for name, mode in rows(spec):
            records = page.seeds(spec, task, name)
            if records is None:
                continue
            line = [TITLES.get(task, task), label(spec, name, mode)]
            for other in tested:
                match = next((c for c in columns(spec) if c.trained_on == task and c.evaluation.task == other), None)
                line.append("" if match is None else share(page, records, match.key(mode)))
            lines.append(line)
    published = paper["ood"]
    for name, values in published["models"].get(spec.paper, {}).items():
        trained, method_name = name.split(", ")
        scores = dict(zip(published["columns"], values, strict=True))
        shown = [f"{scores[other]:.2f}" if other in scores else "" for other in tested]
        lines.append([f"paper, {spec.paper}: {TITLES[trained]}", method_name, *shown])
    return table(["trained on", "method", *tested.values()], lines)


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
    lines = []
    for task in spec.tasks:
        for name, mode in rows(spec):
            record = (page.seeds(spec, task, name) or [None])[0]
            if record is None:
                lines.append([label(spec, name, mode), *[NOT_RUN] * 4])
                continue
            result = record["results"][mode]
            low, high = result["interval"]
            lines.append(
                [
                    label(spec, name, mode),
                    f"{result['ratio']:.2f}",
                    f"{page.link(record['id'], format(result['milliseconds'], '.1f'))} [{low:.1f}, {high:.1f}]",
                    f"{record['results']['base']['milliseconds']:.1f}",
                    f"{record['processor']}, {record['versions']['threads']} threads",
                ]
            )
    for name, value in paper["latency"]["models"].get(spec.paper, {}).items():
        lines.append([f"paper, {spec.paper}: {name}", "", f"{value:.1f}", "", ""])
    header = [
        "method",
        "ratio to the base beside it",
        f"ms for {spec.latency.new_tokens} tokens [quartiles]",
        "ms of the base beside it",
        "device",
    ]
    return table(header, lines)


def system_table(page: Page, spec: Spec, paper: dict[str, Any]) -> list[str]:
    """The robot as a system: who answers, how well, how fast."""
    lines = []
    for task in spec.tasks:
        for name, method in spec.methods.items():
            records = page.seeds(spec, task, name)
            if records is None:
                continue
            own = "Shadow first, attached behind" if method.method == "shadow" else label(spec, name, "")
            line = [own, *(share(page, records, key) for key in ("commands", "open", "all"))]
            whole = [(record["id"], record["results"]["all"]) for record in page.finished(spec, task, name)]
            for key, scale, form in (("milliseconds", 1, ".0f"), ("handed_on", 100, ".1f")):
                links = [page.link(identity, format(scale * result[key], form)) for identity, result in whole]
                line.append(" ".join(links) or NOT_RUN)
            lines.append(line)
    return table(["system", "commands", "open requests", "all", "mean ms a request", "handed on, %"], lines)


def training_table(page: Page, spec: Spec) -> list[str]:
    """What each trained cell was given and used."""
    lines = []
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
            chosen = page.link(rate["record"], chosen)
        peak = training.get("peak_memory_mib")
        lines.append(
            [
                page.link(record["id"], record["id"]),
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
    return ["Training behind these numbers:", "", *table(header, lines)] if lines else []


def _commits(record: Record) -> list[str]:
    """The commits that a record was trained and evaluated at (the first records did not keep that of the training)."""
    commits = {result["commit"] for result in record["results"].values() if result.get("commit")}
    commits |= {record["training"]["commit"]} if record["training"].get("commit") else set()
    return sorted(commits) or [record["commit"]] * bool(record["commit"])


TABLES: dict[str, Callable[[Page, Spec, dict[str, Any]], list[str]]] = {
    "table1": compared_table,
    "ablation": compared_table,
    "ood": ood_table,
    "scaling": scaling_table,
    "latency": latency_table,
    "system": system_table,
}

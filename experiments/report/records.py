"""The records of a spec, by row and column, and the numbers that are made of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.records import read_record, record_file
from experiments.spec import MODES, RECORDS, ROOT, SPECS, Cell, Evaluation, Spec, cells, evaluation_name
from shadowpeft.evaluate.record import bootstrap

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
NAMES = {"lora": "LoRA", "dora": "DoRA", "base": "Base, untrained"}

Record = dict[str, Any]
Score = tuple[float, float, float]
"""A score in percent and the two ends of its interval."""


@dataclass
class Page:
    """Where a report reads and writes."""

    records: Path = RECORDS
    specs: Path = SPECS
    docs: Path = ROOT / "docs"

    @property
    def compared(self) -> Path:
        """The page that compares methods."""
        return self.docs / "compared.md"

    def read(self, cell: Cell) -> Record | None:
        """The record of a cell, or None."""
        return read_record(cell, self.records)

    def link(self, identity: str, text: str) -> str:
        """``text`` as a link to the record of that id."""
        path = os.path.relpath(record_file(identity, self.records), self.docs)
        return f"[{text}]({Path(path).as_posix()})"

    def has_records(self, spec: Spec) -> bool:
        """Whether any cell of a spec was run."""
        return any(self.read(cell) is not None for cell in cells(spec))

    def seeds(self, spec: Spec, task: str, name: str) -> list[Record | None] | None:
        """The records of a task and method, one a seed; None if the spec has no such cell."""
        own = [cell for cell in cells(spec) if cell.task == task and cell.name == name]
        return [self.read(cell) for cell in own] if own else None

    def finished(self, spec: Spec, task: str, name: str) -> list[Record]:
        """Those of :meth:`seeds` that exist."""
        return [record for record in self.seeds(spec, task, name) or [] if record is not None]


@dataclass(frozen=True)
class Column:
    """One evaluation of the methods that were trained on a task."""

    trained_on: str
    evaluation: Evaluation

    @property
    def task(self) -> str:
        """What it is evaluated on."""
        return self.evaluation.task or self.trained_on

    @property
    def title(self) -> str:
        """Name in tables."""
        title = TITLES.get(self.task, self.task)
        title += f", {self.evaluation.how}" if self.evaluation.how else ""
        return title + (f", {self.evaluation.shots}-shot" if self.evaluation.shots else "")

    def key(self, mode: str) -> str:
        """Key of the evaluation in a record."""
        return evaluation_name({**self.evaluation.model_dump(), "task": self.task}, mode)


def columns(spec: Spec) -> list[Column]:
    """Every column of a table of tasks."""
    return [Column(task, evaluation) for task, part in spec.tasks.items() for evaluation in part.evaluate]


def rows(spec: Spec) -> Iterator[tuple[str, str]]:
    """Method and mode of every row of a table."""
    return ((name, mode) for name, method in spec.methods.items() for mode in MODES[method.method])


def label(spec: Spec, name: str, mode: str) -> str:
    """A row's name."""
    method = spec.methods[name]
    own = method.label or NAMES.get(method.method) or ("Shadow" if name == "shadow" else name)
    return f"{own}, {mode}" if method.method == "shadow" else own


# ----------------------------------------------------------------------------------------------------------------- numbers


def interval_of(result: dict[str, Any]) -> list[float]:
    """The bootstrap interval; where every row has one value it has no width, and Wilson's stands for it."""
    low, high = result["interval"]
    interval: list[float] = result.get("wilson_interval", [low, high]) if low == high else [low, high]
    return interval


def mean_score(records: list[Record], key: str) -> Score | None:
    """Score and interval in percent, means over the seeds that were run."""
    results = [record["results"][key] for record in records if key in record["results"]]
    if not results:
        return None
    low = statistics.mean(interval_of(result)[0] for result in results)
    high = statistics.mean(interval_of(result)[1] for result in results)
    return 100 * statistics.mean(result["score"] for result in results), 100 * low, 100 * high


def scores(page: Page, spec: Spec, column: Column) -> list[Score | None]:
    """Score and interval of each row, in the order of the spec."""
    return [mean_score(page.finished(spec, column.trained_on, name), column.key(mode)) for name, mode in rows(spec)]


def columns_run(page: Page, spec: Spec) -> list[Column]:
    """The columns in which any row has a score."""
    return [column for column in columns(spec) if any(scores(page, spec, column))]


def share(page: Page, records: list[Record | None], key: str) -> str:
    """A score in percent with its interval and links; several seeds: mean, mean interval, and each."""
    ran = [record for record in records if record is not None and key in record["results"]]
    mean = mean_score(ran, key)
    if mean is None:
        return NOT_RUN
    interval = f"[{mean[1]:.1f}, {mean[2]:.1f}]"
    links = [page.link(record["id"], f"{100 * record['results'][key]['score']:.1f}") for record in ran]
    if len(records) == 1:
        return f"{links[0]} {interval}"
    missing = len(records) - len(ran)
    note = f"; {missing} seed{'s' if missing > 1 else ''} {NOT_RUN}" if missing else ""
    return f"{mean[0]:.1f} {interval} ({' '.join(links)}{note})"


def parameters(page: Page, spec: Spec, name: str) -> str:
    """Trainable parameters of a method over the tasks (a classification head makes them differ), with links."""
    first_with: dict[int, str] = {}
    for cell in cells(spec):
        record = page.read(cell) if cell.name == name else None
        number = None if record is None else record.get("training", {}).get("trainable_parameters")
        if number is not None and record is not None:
            first_with.setdefault(number, record["id"])
    if not first_with:
        return "0" if spec.methods[name].method == "base" else NOT_RUN
    return ", ".join(page.link(identity, f"{number:,}") for number, identity in sorted(first_with.items()))


def title_with_rows(page: Page, spec: Spec, column: Column, title: str | None = None) -> str:
    """A column's title and the number of test rows behind it."""
    counts = {
        record["results"][column.key(mode)]["n"]
        for name, mode in rows(spec)
        for record in page.finished(spec, column.trained_on, name)
        if column.key(mode) in record["results"]
    }
    return (title or column.title) + (f" (n = {', '.join(f'{n:,}' for n in sorted(counts))})" if counts else "")


def unlike(page: Page, spec: Spec) -> list[str]:
    """Columns whose records were not all made from the same test rows (other data, or another reading of it)."""
    seen: dict[str, set[str]] = {}
    for cell in cells(spec):
        for key, result in ((page.read(cell) or {}).get("results") or {}).items():
            if "settings" in result:
                column = key.replace(f"-{result['mode']}", "")
                seen.setdefault(f"{cell.task}: {column}", set()).add(result["settings"]["examples"])
    return [column for column, digests in seen.items() if len(digests) > 1]


def difference(page: Page, spec: Spec, column: Column, one: tuple[str, str], other: tuple[str, str]) -> str:
    """Mean over the seeds that both rows (method, mode) have, in points, with the interval; empty if there is no such seed."""
    gaps = []
    pairs = zip(*(page.seeds(spec, column.trained_on, name) or [] for name, _ in (one, other)), strict=False)
    for pair in pairs:
        mine, theirs = (_values(record, column.key(mode)) for record, (_, mode) in zip(pair, (one, other), strict=True))
        if mine is not None and theirs is not None and mine[0] == theirs[0]:
            gaps.append([100 * (a - b) for a, b in zip(mine[1], theirs[1], strict=True)])
    if not gaps:
        return ""
    each = [statistics.mean(row) for row in zip(*gaps, strict=True)]
    low, high = bootstrap(each)
    shown = f"{statistics.mean(each):+.1f} [{low:+.1f}, {high:+.1f}]"
    seeds = f", {len(gaps)} seeds" if len(gaps) > 1 else ""
    return (f"**{shown}**" if low > 0 or high < 0 else shown) + seeds


def _values(record: Record | None, key: str) -> tuple[str, list[float]] | None:
    """The digest of an evaluation's rows, and what each row was worth."""
    if record is None or key not in record.get("values", {}):
        return None
    return record["results"][key]["settings"]["examples"], [float(v) for v in record["values"][key].split()]

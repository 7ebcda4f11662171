"""Pages of all specs: ``docs/results.md`` with its figures, and docs/compared.md's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from experiments.markdown import table
from experiments.report import questions
from experiments.report.records import (
    NOT_RUN,
    Page,
    columns_run,
    label,
    mean_score,
    rows,
    title_with_rows,
    unlike,
)
from experiments.report.tables import TABLES, training_table
from experiments.spec import KINDS, Spec, cells, names, read_spec
from shadowpeft.storage import between, write_text

PAPER = Path(__file__).parents[1] / "paper.yaml"
SCORES_SPEC = "table1-smollm2-cpu"
SCORES_TASKS = ("clinc150", "newsgroups", "robot")
"""Tasks on which a model of 135M parameters learns more than the form of an answer; results.md has the others."""
SCORES_MARKS = ("<!-- scores -->", "<!-- /scores -->")

HEAD = """# Results

Made by `python -m experiments report` from the files in `experiments/records`; nothing is typed in by hand. Every number of
ours links to the record it comes from. Scores are percentages of n test rows, which the record names; brackets hold the 95 %
bootstrap interval over examples (Wilson's at 0 and 100 %). GSM8K by likelihood is the geometric mean probability of the gold
answer's tokens, not a share of rows. With several seeds the number is their mean, the brackets hold the mean of their
intervals, and each seed's own number follows. "{not_run}" means that no record exists. The paper's numbers are printed beside
ours for comparison: they are of other bases, larger budgets and, where a note says so, other rows.

How equal conditions are kept is described in [experiments.md](experiments.md).
"""


def _specs(page: Page) -> list[Spec]:
    """Every spec; those with a record first."""

    def key(spec: Spec) -> tuple[bool, int, str]:
        return not page.has_records(spec), KINDS.index(spec.kind), spec.name

    return sorted((read_spec(name, page.specs) for name in names(page.specs)), key=key)


def write(page: Page | None = None) -> list[Path]:
    """Write the page and its figures; returns their paths."""
    from experiments.report.figures import FIGURES  # matplotlib: slow to import, and the text alone does not need it

    page = page or Page()
    figures = page.docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    written = [page.docs / "results.md"]
    for spec in _specs(page):
        if spec.kind in FIGURES and page.has_records(spec):
            written.append(figures / f"{spec.name}.png")
            FIGURES[spec.kind](page, spec, written[-1])
    written += questions.figures(page, figures)
    write_text(page.docs / "results.md", text(page))
    if page.compared.is_file():
        write_text(page.compared, compared(page, page.compared.read_text(encoding="utf-8")))
    return written


def text(page: Page) -> str:
    """The content of ``docs/results.md``."""
    paper = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    specs = _specs(page)
    begun = [spec for spec in specs if page.has_records(spec)]
    waiting = [
        f"| `{spec.name}` | {spec.title} | {len(cells(spec))} cells {NOT_RUN} |" for spec in specs if spec not in begun
    ]
    lines = [HEAD.format(not_run=NOT_RUN), questions.text(page), *(section(page, spec, paper) for spec in begun)]
    if waiting:
        lines += ["## Specs without a record\n", "| spec | what it is | |\n|---|---|---|", *waiting, ""]
    return "\n".join(lines)


def compared(page: Page, content: str) -> str:
    """``content`` with the table of scores between its two marks made anew: each method on each task of ``SCORES_SPEC``."""
    if between(content, SCORES_MARKS, "") is None:
        return content
    spec = read_spec(SCORES_SPEC, page.specs)
    run = [column for column in columns_run(page, spec) if column.trained_on in SCORES_TASKS]
    shown = [column for column in run if column.evaluation.how is None]
    lines = []
    for name, mode in rows(spec):
        line = [label(spec, name, mode)]
        for column in shown:
            records = page.finished(spec, column.trained_on, name)
            score = mean_score(records, column.key(mode))
            seeds = f", {len(records)} seeds" if len(records) > 1 else ""
            empty = "" if page.seeds(spec, column.trained_on, name) is None else NOT_RUN
            line.append(f"{score[0]:.1f} [{score[1]:.0f}, {score[2]:.0f}]{seeds}" if score else empty)
        lines.append(line)
    titles = [title_with_rows(page, spec, column) for column in shown]
    return between(content, SCORES_MARKS, "\n".join(table(["%, [95 % interval]", *titles], lines))) or content


def section(page: Page, spec: Spec, paper: dict[str, Any]) -> str:
    """One spec: what it is, what was run, the table, the figure, the training behind it."""
    records = [(cell, page.read(cell)) for cell in cells(spec)]
    done = sum(record is not None for _, record in records)
    old = [cell.id for cell, record in records if record is not None and record["settings_sha256"] != cell.digest()]
    lines = [f"## {spec.title}", "", f"Spec `{spec.name}`, base `{spec.base}`, {done} of {len(records)} cells run."]
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
    if done and spec.kind != "ood":  # a grid of tasks by tasks has no figure
        lines += ["", f"![{spec.title}](figures/{spec.name}.png)"]
    if done and spec.kind != "latency":
        lines += ["", *training_table(page, spec)]
    return "\n".join(lines) + "\n"

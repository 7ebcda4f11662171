"""Methods that were trained until their validation score stopped rising (:mod:`experiments.converged`), side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.markdown import percent, table
from experiments.records import read_file, read_folder
from experiments.report.figures import COLOURS, score_curves
from experiments.report.records import Page
from shadowpeft.evaluate.record import bootstrap

FIGURE = "question-converged.png"
NAMES = {"shadow": "shadow, attached", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}


def ended(page: Page) -> list[dict[str, Any]]:
    """Records of trainings that are over, with a judgement to show."""
    return [r for r in read_folder(page.records / "converged") if r["ended"] is not None and r["best"] is not None]


def section(page: Page) -> list[str]:
    """Table, paired difference on test rows, and the curves."""
    records = ended(page)
    lines = []
    for record in sorted(records, key=lambda r: (r["settings"]["method"], r["settings"]["rate"])):
        best, test = record["best"], (record["test"] or {}).get("attached")
        first = record["started_processor_seconds"]
        minutes = f"{best['processor_seconds'] / 60:.0f}" + (f" + {first / 60:.0f}" if first else "")
        lines.append(
            [
                page.link(record["id"], record["name"]),
                NAMES[record["settings"]["method"]],
                f"{record['settings']['rate']:g}",
                _trained(page, record),
                f"{best['pass']:g} of {record['curve'][-1]['pass']:g}",
                minutes,
                percent(best["constrained"]["in_scope"], interval=True),
                percent((test or {}).get("in_scope"), interval=True),
                percent((test or {}).get("oos_recall"), interval=True),
            ]
        )
    lines += _detached(page, records)
    if not lines:
        return []
    svc = read_file("rivals/clinc150-svc", page.records)
    if svc is not None:
        values = svc["results"]["clinc150-svc"]["scores"]
        shown = [f"{100 * values[key]:.1f}" for key in ("in_scope", "oos_recall")]
        lines.append([page.link("rivals/clinc150-svc", "clinc150-svc"), "TF-IDF and LinearSVC", *[""] * 4, "-", *shown])
    header = ["cell", "what", "rate", "trained, million parameters", "best pass", "processor minutes"]
    header += ["in scope, validation", "in scope, test", "out of scope, test"]
    return [
        "CLINC150, all 15,100 training rows, SmolLM2-135M, one seed. Every training went on until three judgements in a row"
        " (one a half pass) found no new best on the 3,100 validation rows; the averaged weights of the best were kept. A "
        "shadow was trained alone before, which the second numbers of minutes and parameters count, and stayed frozen; in the "
        "cells named joint it trained with the attached half, from the base's first layers. Test rows "
        "are read once, by the best cell of each method; a dash: not yet.\n",
        *table(header, lines),
        *_difference(records),
        f"\n![Validation score against training time](figures/{FIGURE})\n",
    ]


def _detached(page: Page, records: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each shadow, by what it is worth alone: of the frozen ones, which cells share, and of each joint cell."""
    alone = {r["settings"]["shadow"] or r["name"]: r for r in records if r.get("detached")}
    rows = []
    for name, record in sorted(alone.items()):
        trained = ""
        if record["settings"]["shadow"]:
            what, link = "the frozen shadow, detached", page.link(f"device/{name}", name)
            own = read_file(f"device/{name}", page.records)  # a cell may have trained it once more, on a busier machine
            first = record["started_processor_seconds"] if own is None else own["curve"][-1]["processor_seconds"]
            minutes = f"{first / 60:.0f}" if first else ""
            trained = "" if own is None else f"{own['trained_parameters'] / 1e6:.0f}"
        else:
            what, link, minutes = "its shadow, detached", page.link(record["id"], name), "the same"
        test = (record["test"] or {}).get("detached") or {}
        shown = [percent(test.get(key), interval=True) for key in ("in_scope", "oos_recall")]
        validation = percent(record["detached"]["in_scope"], interval=True)
        rows.append([link, what, "", trained, "", minutes, validation, *shown])
    return rows


def _trained(page: Page, record: dict[str, Any]) -> str:
    """Millions of parameters that trained, and those of the shadow that trained before."""
    own = f"{record['trained_parameters'] / 1e6:.1f}"
    before = record["settings"].get("shadow")
    shadow = read_file(f"device/{before}", page.records) if before else None
    return own if shadow is None else f"{own} + {shadow['trained_parameters'] / 1e6:.0f}"


def _paired(ours: str, theirs: str) -> tuple[int, tuple[float, float, float]]:
    """Rows, and by how many points the first is right more often, from what each row was worth."""
    differences = [float(a) - float(b) for a, b in zip(ours.split(), theirs.split(), strict=True)]
    low, high = (100 * end for end in bootstrap(differences))
    mean = 100 * sum(differences) / len(differences)
    return len(differences), (mean, low, high)


def _difference(records: list[dict[str, Any]]) -> list[str]:
    """Points of the attached shadow above LoRA: on the same test rows, else on the validation rows that chose both."""
    first = [record for record in records if record["settings"]["seed"] == 0]
    tested = {r["settings"]["method"]: r["test"]["attached"]["values"] for r in first if r["test"]}
    if {"shadow", "lora"} <= set(tested):
        rows, said = _paired(tested["shadow"], tested["lora"])
        return [_sentence(rows, "test", "the attached shadow", "LoRA", said) + "\n"]
    ordered = sorted(first, key=lambda r: r["best"]["constrained"]["all"]["score"])
    best = {r["settings"]["method"]: r for r in ordered if r["best"]["constrained"].get("values")}
    if not {"shadow", "lora"} <= set(best):
        return []
    rows, said = _paired(*(best[method]["best"]["constrained"]["values"] for method in ("shadow", "lora")))
    rates = sum(record["settings"]["method"] == "lora" for record in first)
    ours, theirs = best["shadow"]["name"], best["lora"]["name"]
    return [
        f"{_sentence(rows, 'validation', ours, theirs, said)} These rows also chose the rates and when to stop; "
        f"{rates} of LoRA's rates {'has' if rates == 1 else 'have'} ended. So it is no verdict yet.\n"
    ]


def _sentence(rows: int, split: str, ours: str, theirs: str, found: tuple[float, float, float]) -> str:
    mean, low, high = found
    return (
        f"\nOn all {rows:,} {split} rows, in and out of scope, {ours} has {mean:+.1f} points more right than {theirs}, "
        f"with a paired 95 % interval from {low:+.1f} to {high:+.1f}."
    )


def figure(page: Page, folder: Path) -> list[Path]:
    """Validation score against processor minutes, a line a cell."""
    lines = [
        (
            f"{NAMES[record['settings']['method']]}: {record['name']}",
            COLOURS[{"shadow": "attached"}.get(record["settings"]["method"], record["settings"]["method"])],
            [
                (
                    (point["processor_seconds"] + (record["started_processor_seconds"] or 0)) / 60,
                    100 * point["constrained"]["in_scope"]["score"],
                )
                for point in record["curve"]
            ],
        )
        for record in ended(page)
    ]
    if not lines:
        return []
    score_curves(folder / FIGURE, lines, "processor minutes, the shadow's own training included", "in scope, validation, %")
    return [folder / FIGURE]

"""docs/comparison.md and docs/compared.md's block, from the records of behaviour and of speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.markdown import table
from experiments.measuring import short

from benchmarks.comparison.facts import FACTS
from benchmarks.comparison.files import FILES
from benchmarks.comparison.modes import DECODERS, MODES
from benchmarks.comparison.peers import KINDS, NONE, Row
from benchmarks.comparison.training import TRAINING
from shadowpeft.storage import between

ROOT = Path(__file__).resolve().parents[2]
RECORD, PAGE, COMPARED, SPEED = (
    ROOT / name for name in ("docs/records/compare.json", "docs/comparison.md", "docs/compared.md", "benchmarks/results.json")
)
ROWS: dict[str, Row] = {**FACTS, **TRAINING, **FILES, **DECODERS}
IN_SHORT = ("eval_loss", "accumulation", "bfloat16", "masked", "foreign_cache", "other_base", "mixed")
MARKS = ("<!-- compare -->", "<!-- /compare -->")


def shown(outcome: dict[str, Any]) -> str:
    """A cell: yes, no, a number, or that it raised."""
    value = outcome["value"]
    if value is None:
        return "raises"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _speed() -> list[tuple[str, str, str]]:
    if not SPEED.is_file():
        return []
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    decode, prefill = record["decode"]["ratio_to_base"], record["prefill_256"]["ratio_to_base"]
    step, memory = record["train_step"]["ratio_to_lora"], record["train_memory_mib"]
    ratios = {
        "decode, time per token (bare base = 1)": decode,
        "prefill of 256 tokens (bare base = 1)": prefill,
        "training step (LoRA of equal size = 1)": step,
    }
    above = [f"{memory[name]['above_model_mib']:,} MiB" for name in ("shadow", "peft_shadow")]
    return [
        *((label, f"{ratio['shadow']:.2f}", f"{ratio['peft_shadow']:.2f}") for label, ratio in ratios.items()),
        ("memory of a training step above the model's", above[0], above[1]),
    ]


def _right_modes(record: dict[str, Any], kind: str) -> str:
    return f"{sum(row[kind]['value'] is True for row in record['modes'].values())} of {len(record['modes'])}"


def _cells(rows: Mapping[str, Row], outcomes: dict[str, Any]) -> list[list[str]]:
    """A line for each row that is in the record."""
    return [
        [row.label, *(shown(outcomes[key][kind]) for kind in KINDS)] for key, row in rows.items() if key in outcomes
    ]


def short_table(record: dict[str, Any], only: tuple[str, ...] | None = None) -> list[str]:
    """Counts, facts and speed; docs/compared.md shows the counts and the facts of ``only``."""
    lines = []
    counts = record.get("architectures")
    if counts:
        labels = {"_attached": "attach, train, cached = uncached", "": "and detach, generate"}
        for end, label in labels.items():
            lines.append([f"architectures, of {counts['of']}: {label}", *(str(counts[kind + end]) for kind in KINDS)])
    lines.append(["modes of generation that are right", *(_right_modes(record, kind) for kind in KINDS)])
    lines += _cells({key: row for key, row in ROWS.items() if only is None or key in only}, record["facts"])
    if only is None:
        lines += [[label, ours, pefts, "not measured"] for label, ours, pefts in _speed()]
    return table(["", *KINDS.values()], lines)


def source(record: dict[str, Any]) -> str:
    """Where the facts come from."""
    v = record["versions"]
    return (
        f"`make compare`, {record['date']}, commit {short(record['commit'])}, {record['machine']}, one thread, torch "
        f"{v['torch']}, transformers {v['transformers']}, PEFT {v['peft']}, shadow-peft {v['shadow-peft']}, TRL {v['trl']}; "
        "tiny random models."
    )


def source_of_speed() -> str:
    """Where the last four rows come from."""
    if not SPEED.is_file():
        return ""
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    return (
        f" Speed and memory: SmolLM2-135M, benchmarks/results.json, {record['date']}, commit {short(record['commit'])}."
    )


def page(record: dict[str, Any]) -> str:
    """docs/comparison.md."""
    later = "".join(
        f" {len(more['rows'])} rows were measured later ({more['date']}, commit {short(more['commit'])})."
        for more in record.get("later", [])
    )
    lines = ["# Comparison", "", source(record) + later + source_of_speed(), "", *short_table(record), ""]
    lines += [
        f'"{NONE}" stands where an implementation does not have what the row is about. The rows that measure a numbered defect '
        "are named in [defects.md](defects.md).",
        "",
        "## Modes of generation",
        "",
        *table(["", *KINDS.values()], _cells(MODES, record["modes"])),
    ]
    reasons = [
        f"- {KINDS[kind]}, {rows[key].label}: `{outcome[kind]['reason']}`"
        for part, rows in (("facts", ROWS), ("modes", MODES))
        for key, outcome in record[part].items()
        for kind in KINDS
        if outcome[kind].get("reason")
    ]
    lines += ["", "## What was raised", "", *reasons]
    counts = record.get("architectures")
    if counts:
        lines += ["", "## Architectures", ""]
        lines.append(
            f"{counts['tried']} decoder architectures of transformers were built tiny; in {counts['of']} of them the stock "
            "model generates the same with and without a cache, and only those count. Not handled:"
        )
        for kind, label in KINDS.items():
            lines.append(f"- {label}: {', '.join(sorted(counts['fails'][kind])) or 'none'}")
    return "\n".join(lines) + "\n"


def compared(record: dict[str, Any], content: str) -> str:
    """docs/compared.md's content with the block between the markers made anew.

    Raises:
        RuntimeError: if it has no markers.
    """
    text = between(content, MARKS, "\n".join([source(record), "", *short_table(record, IN_SHORT)]))
    if text is None:
        raise RuntimeError(f"{COMPARED} has no {MARKS[0]} ... {MARKS[1]}; put the two markers where the table belongs")
    return text

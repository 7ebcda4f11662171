"""``python -m experiments.device_page``: the tables of ``docs/device-search.md`` from the records alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from experiments.device_plan import FOLDER, Cell
from experiments.markdown import EMPTY, percent, table
from experiments.records import read_folder
from experiments.spec import RECORDS
from shadowpeft.errors import ConfigError
from shadowpeft.storage import between, write_text

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "device-search.md"
RIVALS = RECORDS / "rivals"
USUAL = {field.name: field.default for field in fields(Cell) if field.default is not MISSING}
MARKS = {name: (f"<!-- {name} -->", f"<!-- /{name} -->") for name in ("robot", "curves", "clinc150")}


def differs(settings: Mapping[str, Any]) -> str:
    """The settings of a cell that are no defaults, but for its layers and problem."""
    shown = [f"{key} {value}" for key, value in settings.items() if key in USUAL and value != USUAL[key]]
    return ", ".join(text for text in shown if not text.startswith(("layers ", "problem "))) or "as the first cell"


def value(record: Mapping[str, Any]) -> float:
    """What cells are ranked by: the mean of right commands and of open requests handed on (or the share in scope)."""
    found = record["curve"][-1]["constrained"]
    if "in_scope" in found:
        return float(found["in_scope"]["score"])
    return float(found["commands"]["score"] + found["open_handed_on"]["score"]) / 2


def link(record: Mapping[str, Any], page: Path, records: Path) -> str:
    """The record's name as a link to it."""
    path = os.path.relpath(records / f"{record['id']}.json", page.parent)
    return f"[{record['name']}]({Path(path).as_posix()})"


def robot(
    cells: Sequence[Mapping[str, Any]], rivals: Sequence[Mapping[str, Any]], page: Path, records: Path
) -> list[str]:
    """A row for each cell at its last pass, the best first, and the rival on the same rows."""
    head = [
        "cell", "layers", "what differs", "passes", "commands, % [95 %]", "en", "zh", "free decoding", "open handed on",
        "commands handed on", "AUROC", "kept at 3 % wrong", "processor minutes",
    ]  # fmt: skip
    lines = []
    for record in sorted(cells, key=value, reverse=True):
        last, settings = record["curve"][-1], record["settings"]
        found = last["constrained"]
        lines.append(
            [
                link(record, page, records),
                str(settings["layers"]),
                differs(settings),
                str(last["pass"]) + (f" ({record['ended']})" if record["ended"] else ""),
                percent(found["commands"], interval=True),
                percent(found.get("en")),
                percent(found.get("zh")),
                percent(last.get("greedy", {}).get("commands")),
                percent(found["open_handed_on"]),
                percent(found["commands_handed_on"]),
                EMPTY if found["auroc"] is None else f"{found['auroc']:.3f}",
                f"{100 * found['kept']:.1f}",
                f"{last['processor_seconds'] / 60:.1f}",
            ]
        )
    for record in rivals:
        found = record["rate"].get("development")
        if found is not None:
            own = [percent(found["commands"], interval=True), percent(found["en"]), percent(found["zh"]), EMPTY]
            share = [percent(found["open_handed_on"]), percent(found["commands_handed_on"]), EMPTY, EMPTY, EMPTY]
            text = f"TF-IDF and LinearSVC, {record['settings']['rows']}, C = {record['rate']['chosen']:g}"
            lines.append([link(record, page, records), EMPTY, text, EMPTY, *own, *share])
    return table(head, lines)


def curves(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells of more than one pass: commands and open requests after each."""
    longest = max((len(record["curve"]) for record in cells), default=0)
    lines = [
        [record["name"], *(_point(point) for point in record["curve"]), *[""] * (longest - len(record["curve"]))]
        for record in cells
        if len(record["curve"]) > 1
    ]
    return (
        table(["cell", *(f"pass {number}" for number in range(1, longest + 1))], lines) if lines else ["No cell yet."]
    )


def _point(point: Mapping[str, Any]) -> str:
    found = point["constrained"]
    parts = ("commands", "open_handed_on") if "commands" in found else ("in_scope", "oos_recall")
    return " / ".join(percent(found[part]) for part in parts)


def clinc150(cells: Sequence[Mapping[str, Any]], page: Path, records: Path) -> list[str]:
    """The cells of CLINC150 on its validation rows."""
    head = [
        "cell",
        "layers",
        "what differs",
        "passes",
        "in scope, % [95 %]",
        "out-of-scope recall",
        "processor minutes",
    ]
    lines = []
    for record in sorted(cells, key=value, reverse=True):
        last = record["curve"][-1]
        found = last["constrained"]
        lines.append(
            [
                link(record, page, records),
                str(record["settings"]["layers"]),
                differs(record["settings"]),
                str(last["pass"]),
                percent(found["in_scope"], interval=True),
                percent(found["oos_recall"]),
                f"{last['processor_seconds'] / 60:.1f}",
            ]
        )
    return table(head, lines) if lines else ["No cell yet."]


def text(content: str, page: Path = PAGE, folder: Path = FOLDER, rivals: Path = RIVALS) -> str:
    """``content`` with its tables made anew.

    Raises:
        ConfigError: if one of the marks is missing.
    """
    cells = [record for record in read_folder(folder) if record["curve"]]
    chosen = {name: [r for r in cells if r["settings"]["problem"] == name] for name in ("robot", "clinc150")}
    parts = {
        "robot": robot(chosen["robot"], [r for r in read_folder(rivals) if r["task"] == "robot"], page, folder.parent),
        "curves": curves(cells),
        "clinc150": clinc150(chosen["clinc150"], page, folder.parent),
    }
    for name, lines in parts.items():
        changed = between(content, MARKS[name], "\n".join(lines))
        if changed is None:
            raise ConfigError(f"'{page}' lacks the marks {' and '.join(MARKS[name])}; put them back")
        content = changed
    return content


def main() -> int:
    """Write the page."""
    write_text(PAGE, text(PAGE.read_text(encoding="utf-8")))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

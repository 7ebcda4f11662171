"""``python -m experiments list|run|report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.records import read_record
from experiments.spec import Cell, cells, names, read_spec
from shadowpeft.errors import ShadowPeftError


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: done; 1: failed; 2: wrong usage or configuration; 3: the time was up, cells are left; 130: Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Tables and figures from data files.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="specs and how many of their cells have records; of one spec, its cells")
    listing.add_argument("name", nargs="?")
    run = commands.add_parser("run", help="run the cells of a spec that have no record; a killed run continues")
    run.add_argument("name")
    run.add_argument(
        "--cells", default="*", metavar="PATTERN", help="only cells whose id matches, such as 'clinc150-*-s0'"
    )
    run.add_argument("--limit-minutes", type=float, metavar="N", help="stop, with a checkpoint, after this time")
    run.add_argument("--work", type=Path, help="folder of checkpoints, adapters and predictions (runs/experiments)")
    run.add_argument("--quiet", action="store_true")
    commands.add_parser("report", help="write docs/results.md and docs/figures from the records alone")
    chosen = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if chosen.command == "list":
            show(Console(), chosen.name)
            return 0
        if chosen.command == "report":
            from experiments.report import write

            for path in write():
                print(path)
            return 0
        from experiments.runner import Runner
        from shadowpeft.apps.common import quiet_libraries

        quiet_libraries()
        options = {} if chosen.work is None else {"work": chosen.work}
        runner = Runner(limit_minutes=chosen.limit_minutes, quiet=chosen.quiet, console=console, **options)
        outcome = runner.run(chosen.name, chosen.cells)
        print(", ".join(f"{len(ids)} {what}" for what, ids in outcome.items()))
        return 3 if outcome["left"] else 0
    except KeyboardInterrupt:
        console.print("stopped; what was done is kept, and the same command continues")
        return 130
    except ShadowPeftError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2 if isinstance(error, ValueError) else 1


def show(console: Console, name: str | None) -> None:
    """A table of the specs, or of one spec's cells."""
    if name is None:
        table = Table("spec", "cells", "done", "title")
        for each in names():
            spec = read_spec(each)
            all_cells = cells(spec)
            done = sum(state(cell) == "done" for cell in all_cells)
            table.add_row(each, str(len(all_cells)), str(done), spec.title)
    else:
        table = Table("cell", "budget", "learning rate", "state")
        for cell in cells(read_spec(name)):
            table.add_row(cell.id, budget(cell), rate(cell), state(cell))
    console.print(table)


def budget(cell: Cell) -> str:
    """What a cell may train for."""
    if cell.tokens is not None:
        return f"{cell.tokens:,} tokens"
    for unit in ("max_steps", "epochs"):
        if cell.train.get(unit) is not None:
            return f"{cell.train[unit]:g} {'steps' if unit == 'max_steps' else 'epochs'}"
    return "no training"


def rate(cell: Cell) -> str:
    """Where a cell's learning rate comes from."""
    if not cell.train:
        return ""
    if cell.rates is None:
        return f"{cell.train['learning_rate']:g}"
    return (
        f"from {cell.rates['from']}" if cell.rates["from"] else "grid " + " ".join(f"{r:g}" for r in cell.rates["grid"])
    )


def state(cell: Cell) -> str:
    """Whether a cell has a record, and whether that is of the settings it has now."""
    record = read_record(cell)
    if record is None:
        return "not run"
    return "done" if record["settings_sha256"] == cell.digest() else "record of other settings"


if __name__ == "__main__":
    sys.exit(main())

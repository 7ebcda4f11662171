"""Runs the cells of a spec and writes one record each; whatever was interrupted continues where it was."""

from __future__ import annotations

import fnmatch
import gc
import time
from typing import Any

from experiments.kinds import KINDS, trained_and_evaluated
from experiments.measuring import processor, stamp
from experiments.records import check_settings, read_record, write_record
from experiments.spec import Cell, cells, read_spec
from experiments.training import CellTraining, Paused
from shadowpeft.errors import ConfigError
from shadowpeft.runtime import environment, prepare_cpu


class Runner(CellTraining):
    """Runs specs cell by cell."""

    def run(self, name: str, pattern: str = "*") -> dict[str, list[str]]:
        """Run the cells of a spec whose id matches ``pattern`` and that have no record yet.

        Returns:
            ``done`` (had a record), ``ran``, ``left`` (no time).

        Raises:
            ConfigError: if no cell matches, or a record was made with other settings than the spec now has.
        """
        spec = read_spec(name, self.specs)
        chosen = [cell for cell in cells(spec) if fnmatch.fnmatch(cell.id, pattern)]
        if not chosen:
            raise ConfigError(
                f"no cell of '{name}' matches '{pattern}'; `python -m experiments list {name}` shows them"
            )
        threads = spec.train.get("threads")
        prepare_cpu(None if threads is None else int(threads))
        for cell in chosen:
            record = read_record(cell, self.records)
            if record is not None:
                check_settings(record, cell.settings(), cell.digest())
        outcome: dict[str, list[str]] = {"done": [], "ran": [], "left": []}
        for number, cell in enumerate(chosen, 1):
            if read_record(cell, self.records) is not None:
                outcome["done"].append(cell.id)
                continue
            if outcome["left"] or self.time_is_up():
                outcome["left"].append(cell.id)
                continue
            self.say(f"[{number}/{len(chosen)}] {cell.spec}/{cell.id}")
            try:
                self.run_cell(cell)
                outcome["ran"].append(cell.id)
            except Paused:
                outcome["left"].append(cell.id)
            gc.collect()
        return outcome

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Run one cell and write its record."""
        began = time.monotonic()
        parts = KINDS.get(cell.kind, trained_and_evaluated)(self, cell)
        record = {
            "id": f"{cell.spec}/{cell.id}",
            "spec": cell.spec,
            "kind": cell.kind,
            "task": cell.task,
            "name": cell.name,
            "method": cell.method,
            "seed": cell.seed,
            **parts,
            "settings": cell.settings(),
            "settings_sha256": cell.digest(),
            **stamp(),
            "versions": environment(),
            "processor": processor(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds_of_last_call": round(time.monotonic() - began, 1),
        }
        write_record(record, self.records)
        return record

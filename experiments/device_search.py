"""The recorded search for the detached shadow's recipe: ``python -m experiments.device_search run|list|final NAME``.

Cells come from ``specs/device/search.yaml`` in the order in which they are run; a cell that stands there again with more
passes goes on from its state. Each is judged on development rows alone, after every pass, by an average of its weights, so
that no schedule has to end before it can be judged. A killed run goes on from its last saved state; a record is written after
every pass.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.device_plan import FOLDER, PLAN, WORK, Cell, read_plan, record_of, waiting
from experiments.device_problems import PROBLEMS, freeze
from experiments.device_rows import batches
from shadowpeft.errors import ConfigError, NonFiniteLossError
from shadowpeft.runtime import prepare_cpu
from shadowpeft.storage import whole, write_json

SAVE_EVERY = 180.0
"""Seconds between saved states."""


class Training:
    """A cell's model, optimiser and averaged weights, and where it stands.

    Args:
        cell: a :class:`Cell`, or another recipe with the same names.
    """

    def __init__(self, cell: Any, work: Path = WORK, folder: Path = FOLDER) -> None:
        self.cell, self.file, self.folder = cell, work / cell.name / "state.pt", folder
        torch.manual_seed(cell.seed)
        self.problem = self.make()
        self.model = self.problem.model
        self.named = self.trained()
        decayed = [p for _, p in self.named if p.ndim > 1]
        rest = [p for _, p in self.named if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": cell.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=cell.rate, fused=True)
        self.averaged = [p.detach().clone() for _, p in self.named]
        self.at: dict[str, Any] = {
            "pass": 0,
            "step": 0,
            "steps": 0,
            "begun": 0,
            "tokens": 0,
            "seconds": 0.0,
            "processor": 0.0,
            "loss": 0.0,
        }
        self.curve: list[dict[str, Any]] = []
        if self.file.is_file():
            self._load(self.file, cell.digest())
        elif cell.start:
            self._load(work / cell.start / "state.pt", None)
            self.at["begun"] = self.at["steps"]

    def make(self) -> Any:
        """The problem of the cell, with its model and rows."""
        return PROBLEMS[self.cell.problem](self.cell)

    def trained(self) -> list[tuple[str, Any]]:
        """Names and tensors of what trains."""
        return freeze(self.model, self.cell.frozen_layers)

    # ------------------------------------------------------------------------------------------------------------- state

    def save(self) -> None:
        """Write everything beside and rename it."""
        state = {
            "settings": self.cell.digest(),
            "data": self.problem.data(),
            "weights": {name: p.detach() for name, p in self.named},
            "averaged": self.averaged,
            "optimiser": self.optimiser.state_dict(),
            "random": torch.get_rng_state(),
            "at": self.at,
            "curve": self.curve,
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.file) as beside:
            torch.save(state, beside)

    def _load(self, file: Path, settings: str | None) -> None:
        state = torch.load(file, weights_only=True)
        if settings not in (None, state["settings"]) or state["data"] != self.problem.data():
            raise ConfigError(f"the state '{file}' is of other settings or rows; remove '{file.parent}' to start anew")
        with torch.no_grad():
            for (name, p), mean, kept in zip(self.named, self.averaged, state["averaged"], strict=True):
                p.copy_(state["weights"][name])
                mean.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        self.at, self.curve = {"begun": 0, **state["at"]}, state["curve"]

    @contextlib.contextmanager
    def judged_weights(self) -> Iterator[None]:
        """The averaged weights inside the model, the trained ones back afterwards."""
        own = [p.detach().clone() for _, p in self.named]
        with torch.no_grad():
            for (_, p), mean in zip(self.named, self.averaged, strict=True):
                p.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, p), value in zip(self.named, own, strict=True):
                    p.copy_(value)

    # ---------------------------------------------------------------------------------------------------------- training

    def rate(self, total: int) -> float:
        """The rate of the next step."""
        done = self.at["steps"]
        rise = min(1.0, (done + 1) / max(self.cell.warmup, 1))
        if self.cell.schedule == "constant":
            return self.cell.rate * rise
        return self.cell.rate * rise * (1.0 - (done - self.at["begun"]) / (total - self.at["begun"]))

    def step(self, places: list[int], total: int) -> None:
        """One optimiser step on some rows.

        Raises:
            NonFiniteLossError: before the step, if the loss is not finite.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(total)
        loss = self.problem.loss(places)
        loss.backward()
        value, norm = loss.item(), torch.nn.utils.clip_grad_norm_([p for _, p in self.named], 1.0).item()
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise NonFiniteLossError(f"loss {value}, gradient {norm} at step {self.at['steps']}")
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.at["steps"] += 1
        self.at["tokens"] += sum(len(self.problem.items[i].ids) for i in places)
        self.at["loss"] += value
        keep = min(self.cell.average, self.at["steps"] / (self.at["steps"] + 9))  # a short memory at the start
        torch._foreach_lerp_(self.averaged, [p.detach() for _, p in self.named], 1.0 - keep)

    def run(self, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Train until the cell's passes are done; False, with the state saved, if ``is_over`` said so before."""
        self.model.train()
        began, used, saved = time.monotonic(), time.process_time(), time.monotonic()

        def count() -> None:
            nonlocal began, used
            self.at["seconds"] += time.monotonic() - began
            self.at["processor"] += time.process_time() - used
            began, used = time.monotonic(), time.process_time()

        while self.going():
            order = batches(self.problem.items, self.cell.batch_size, f"{self.cell.seed}/{self.at['pass']}")
            marks = self.marks(len(order))
            for batch in order[self.at["step"] :]:
                self.step(batch, self.cell.passes * len(order))
                self.at["step"] += 1
                if self.at["step"] in marks:
                    count()
                    mean = self.at["loss"] / (self.at["step"] - max((m for m in marks if m < self.at["step"]), default=0))
                    self.at["loss"] = 0.0
                    if self.at["step"] == len(order):
                        self.at.update({"pass": self.at["pass"] + 1, "step": 0})
                    self.judge(mean)
                    self.save()
                    self.write(None)
                    began, used, saved = time.monotonic(), time.process_time(), time.monotonic()
                    if not self.going():
                        break
                over = is_over()
                if over or time.monotonic() - saved > SAVE_EVERY:
                    count()
                    self.save()
                    saved = time.monotonic()
                if over:
                    return False
        return True

    def going(self) -> bool:
        """Whether there are steps to make."""
        return bool(self.at["pass"] < self.cell.passes)

    def marks(self, steps: int) -> set[int]:
        """After which of the steps of a pass the model is judged."""
        return {steps}

    def judge(self, loss: float) -> None:
        """Append a point to the curve; the last of the asked passes is also decoded freely."""
        last = self.at["pass"] == self.cell.passes
        began, used = time.monotonic(), time.process_time()
        with self.judged_weights():
            worth = self.problem.development(greedy=last)
        for older in self.curve:  # what each row was worth is kept of the last point alone
            older["constrained"].pop("values", None)
        point: dict[str, Any] = {"pass": self.at["pass"], "steps": self.at["steps"], "tokens": self.at["tokens"]}
        point.update(seconds=round(self.at["seconds"], 1), processor_seconds=round(self.at["processor"], 1))
        point.update(train_loss=round(loss, 4), **worth)
        point.update(judged_seconds=[round(time.monotonic() - began, 1), round(time.process_time() - used, 1)])
        self.curve.append(point)

    def write(self, ended: str | None) -> None:
        """The record; ``ended``: why the cell will not go on."""
        older = record_of(self.cell.name, self.folder) or {}
        record = {
            "id": f"device/{self.cell.name}",
            "kind": "device",
            "name": self.cell.name,
            "passes": self.at["pass"],
            "ended": ended,
            "chosen_on": "development rows alone; no test row was looked at",
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trained_parameters": sum(p.numel() for _, p in self.named),
            "data": self.problem.data(),
            "curve": self.curve,
            "test": older.get("test"),
            **self.cell.stamp(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{self.cell.name}.json", record)


def run(file: Path = PLAN, minutes: float | None = None, work: Path = WORK, folder: Path = FOLDER) -> int:
    """Run what the plan still asks for; the plan is read again after each entry. Returns how many entries are left."""
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    asked_to_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.set())
    prepare_cpu(1)
    while cells := waiting(read_plan(file), folder):
        cell = cells[0]
        print(f"{time.strftime('%H:%M:%S')} {cell.name} to {cell.passes} passes", flush=True)
        training = Training(cell, work, folder)
        try:
            if not training.run(lambda: asked_to_stop.is_set() or time.monotonic() > deadline):
                break
        except NonFiniteLossError as error:
            training.write(str(error))
        print(f"{time.strftime('%H:%M:%S')} {cell.name}: {summary(training.curve)}", flush=True)
        del training
    return len(cells)


def summary(curve: list[dict[str, Any]]) -> str:
    """One line of a curve's last point."""
    if not curve:
        return "no pass"
    found = curve[-1]["constrained"]
    shown = {key: value["score"] for key, value in found.items() if isinstance(value, dict)}
    return json.dumps({**shown, "log_loss": found["log_loss"], "seconds": curve[-1]["processor_seconds"]})


def final(cell: Cell, work: Path = WORK, folder: Path = FOLDER) -> dict[str, Any]:
    """Look at the test rows, once for each depth: with the recipe that was chosen on development rows.

    Raises:
        ConfigError: if a record of the same problem and depth has seen them, or the cell was not run to its end.
    """
    question = (cell.problem, cell.layers)
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("test") is not None and (record["settings"]["problem"], record["settings"]["layers"]) == question:
            raise ConfigError(f"'{record['name']}' has already been tested; the test rows are looked at once")
    prepare_cpu(1)
    training = Training(cell, work, folder)
    record = record_of(cell.name, folder)
    if record is None or record["passes"] < cell.passes or training.at["step"]:
        raise ConfigError(f"'{cell.name}' has not reached {cell.passes} passes; run it first")
    with training.judged_weights():
        record["test"] = training.problem.test()
    write_json(folder / f"{cell.name}.json", record)
    return dict(record["test"])


def main(arguments: list[str] | None = None) -> int:
    """0: done; 1: failed; 2: wrong usage; 3: entries of the plan are left."""
    parser = argparse.ArgumentParser(prog="python -m experiments.device_search", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "list", "final"])
    parser.add_argument("name", nargs="?", help="final: the chosen cell")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--limit-minutes", type=float, metavar="N", help="stop, with a saved state, after this time")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "run":
            return 3 if run(chosen.plan, chosen.limit_minutes) else 0
        plan = read_plan(chosen.plan)
        if chosen.command == "final":
            cells = [cell for cell in plan if cell.name == chosen.name]
            if not cells:
                raise ConfigError(f"the plan has no cell '{chosen.name}'")
            print(json.dumps(final(cells[-1]), indent=2))
            return 0
        for cell in plan:
            record = record_of(cell.name)
            print(f"{cell.name:28} {0 if record is None else record['passes']} of {cell.passes} passes")
        return 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

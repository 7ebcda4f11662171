"""Adapters trained until their validation score stops rising: ``python -m experiments.converged run|list|final NAME ...``.

Cells come from ``specs/device/converged.yaml``. Every method has the same rows, order, batches, constant rate after a short
rise, and average of its weights, which is what is judged; a training ends when ``patience`` judgements in a row bring no
new best, and the best average is kept. A shadow may start from a cell of :mod:`experiments.device_search` and stay frozen:
then nothing below the first corrected layer, and no shadow, is computed twice. Or it starts from the base's first layers and
trains with the attached half, on the sum of both losses; then the base below is stored alone. Only ``final`` reads test
rows, with one cell for each method and seed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

import shadowpeft
from experiments.device_plan import PLAN as SEARCH
from experiments.device_plan import WORK as SEARCHED
from experiments.device_plan import Recipe, averaged_of, own_record, read_cells, read_plan, record_of
from experiments.device_problems import Clinc, corrected, place
from experiments.device_search import Training
from experiments.spec import RECORDS
from shadowpeft.data.padding import pad_inputs
from shadowpeft.data.tasks import class_ids
from shadowpeft.errors import ConfigError, NonFiniteLossError
from shadowpeft.hf.base.load import load_base, of_labels
from shadowpeft.runtime import prepare_cpu
from shadowpeft.storage import whole, write_json
from shadowpeft.train.activations import Activations, prepare
from shadowpeft.train.baselines import LINEARS, lora_config

PLAN = SEARCH.with_name("converged.yaml")
FOLDER = RECORDS / "converged"
WORK = SEARCHED.with_name("converged")
METHODS = ("shadow", "lora", "dora", "rslora")


@dataclass(frozen=True)
class Cell(Recipe):
    """One training to its end; all fields but ``name`` decide what it computes."""

    name: str
    method: str = "lora"
    rate: float = 1e-3
    base: str = "smollm2-135m"
    batch_size: int = 32
    warmup: int = 25
    """Steps in which the rate rises."""
    average: float = 0.98
    """Share of the averaged weights that stays in each step."""
    judgements: int = 2
    """How often a pass over the training rows is judged."""
    patience: int = 3
    """Judgements in a row without a new best score that end the training."""
    most: int = 24
    """Judgements that end it in any case."""
    r: int = 16
    dropout: float = 0.1
    """Of the adapter's low-rank input."""
    shadow: str = ""
    """Shadow: the cell of the search whose averaged weights it starts from and stays frozen at."""
    joint: int = 0
    """Shadow: of how many first layers of the base it starts instead, to train with the attached half."""
    last: int = 0
    """Shadow: how many of the base's last layers are corrected; 0: all."""
    alpha: float = 0.5
    variant: Any = "paper"
    seed: int = 0

    weight_decay = 0.0
    schedule = "constant"
    start, passes = "", 0
    """Of the search alone: here weights are placed, and the score decides."""

    def __post_init__(self) -> None:
        starts = bool(self.shadow) + bool(self.joint)
        if self.method not in METHODS or starts != (self.method == "shadow"):
            raise ConfigError(
                f"cell '{self.name}': method '{self.method}' with shadow '{self.shadow}' and joint {self.joint} is impossible; "
                "a shadow starts from one of both, and no other method from any"
            )


def started(cell: Cell) -> Any:
    """The cell of the search that a shadow starts from.

    Raises:
        ConfigError: if the search has none of that name.
    """
    found = {other.name: other for other in read_plan()}
    if cell.shadow not in found:
        raise ConfigError(f"cell '{cell.name}' starts from '{cell.shadow}', which {SEARCH.name} does not have")
    return found[cell.shadow]


class Attached(Clinc):
    """CLINC150 answered by the base with an adapter."""

    def build(self) -> Any:
        """The base as a classifier, with its adapter."""
        cell = self.cell
        torch.manual_seed(cell.seed)
        base = load_base(cell.base, "SEQ_CLS", **of_labels(self.task.labels))
        base.config.pad_token_id = self.tokenizer.pad_token_id
        self.stored: Activations | None = None
        if cell.method != "shadow":
            own = lora_config(base, cell.method, cell.r, target_modules=LINEARS, dropout=cell.dropout)
            own.use_rslora = cell.method == "rslora"
            return get_peft_model(base, own)
        return corrected(
            base,
            cell.joint or started(cell).layers,
            last=cell.last,
            task_type="SEQ_CLS",
            r=cell.r,
            shadow_alpha=cell.alpha,
            shadow_dropout=cell.dropout,
            variant=cell.variant,
            auxiliary_loss_weight=1.0,
        )

    def store(self, folder: Path) -> None:
        """Compute once what no step changes: the base below the first corrected layer, and a frozen shadow."""
        rows = [item.ids for item in self.items]
        rows += [class_ids(self.tokenizer, e.prompt, 64) for e in self.task.load("validation")]
        self.stored = prepare(self.model, rows, folder, batch_size=64, shadow=not self.cell.joint, tell=print)

    def forward(self, ids: Sequence[list[int]], **given: Tensor) -> Any:
        """The model's outputs for some texts."""
        batch = pad_inputs(ids, int(self.tokenizer.pad_token_id))
        states = {} if self.stored is None else self.stored.batch(**batch)
        return self.model(**batch, **states, **given)

    def _logits(self, ids: Sequence[list[int]]) -> Tensor:
        logits: Tensor = self.forward(ids).logits
        return logits

    def loss(self, places: Sequence[int]) -> Tensor:
        """Cross-entropy over the classes, of the attached path; of a shadow that trains too, of both."""
        out = self.forward(
            [self.items[i].ids for i in places], labels=torch.tensor([self.examples[i].gold for i in places])
        )
        loss: Tensor = out.task_loss if self.cell.shadow else out.loss
        return loss

    def test(self) -> dict[str, Any]:
        """What both paths are worth on the test rows, of which nothing is stored."""
        self.stored = None
        found = {"attached": self.worth("test")["constrained"]}
        return {**found, "detached": self.detached("test")} if self.cell.method == "shadow" else found

    def detached(self, name: str) -> dict[str, Any]:
        """What the shadow alone is worth on a split."""
        alone = copy.copy(self)
        alone.model = shadowpeft.detach(self.model)
        alone._logits = functools.partial(Clinc._logits, alone)  # type: ignore[method-assign]
        found: dict[str, Any] = alone.worth(name)["constrained"]
        return found


class Converging(Training):
    """A training that its validation score ends."""

    def make(self) -> Any:
        """The base with its adapter, and the rows."""
        return Attached(self.cell)

    def trained(self) -> list[tuple[str, Any]]:
        """All that asks for a gradient, after a shadow was placed and frozen."""
        if self.cell.shadow:
            place(self.model, averaged_of(self.cell.shadow, SEARCHED)).freeze_shadow("default")
        if self.cell.last:
            self.problem.store(self.file.parents[1] / "activations" / f"{self.cell.shadow or 'base'}-{self.cell.last}")
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def best(self) -> dict[str, Any] | None:
        """The first judgement with the highest score."""
        return max(self.curve, key=lambda point: point["constrained"]["all"]["score"], default=None)

    def ended(self) -> str | None:
        """Why no further step is made."""
        best = self.best
        if best is not None and len(self.curve) - 1 - self.curve.index(best) >= self.cell.patience:
            return f"{self.cell.patience} judgements without a new best"
        return f"{self.cell.most} judgements" if len(self.curve) >= self.cell.most else None

    def going(self) -> bool:
        """Whether the score may still rise."""
        return self.ended() is None

    def marks(self, steps: int) -> set[int]:
        """Equal parts of a pass."""
        return {round(steps * (i + 1) / self.cell.judgements) for i in range(self.cell.judgements)}

    def judge(self, loss: float) -> None:
        """Append a point to the curve; the averaged weights of the best, and what each row was worth, are kept."""
        before = self.best
        own = before["constrained"].get("values") if before is not None else None
        super().judge(loss)
        best, last = self.best, self.curve[-1]
        last["pass"] = round(len(self.curve) / self.cell.judgements, 3)
        if best is last:
            with whole(self.file.with_name("best.pt")) as beside:
                torch.save(dict(zip((name for name, _ in self.named), self.averaged, strict=True)), beside)
        elif best is not None:
            last["constrained"].pop("values", None)
            best["constrained"]["values"] = own

    def write(self, ended: str | None) -> None:
        """The record; ``ended``: why the cell will not go on."""
        write_json(
            self.folder / f"{self.cell.name}.json",
            {
                "id": f"converged/{self.cell.name}",
                "kind": "converged",
                "name": self.cell.name,
                "ended": ended or self.ended(),
                "chosen_on": "validation rows alone; no test row was looked at",
                "trained_parameters": sum(p.numel() for _, p in self.named),
                "data": self.problem.data(),
                "curve": self.curve,
                "best": self.best,
                "test": None,
                "started_processor_seconds": began_with(self.cell),
                **self.cell.stamp(),
            },
        )

    def place_best(self) -> None:
        """The best averaged weights into the model."""
        kept = torch.load(self.file.with_name("best.pt"), weights_only=True)
        with torch.no_grad():
            for name, p in self.named:
                p.copy_(kept[name])


def began_with(cell: Cell) -> float | None:
    """Processor seconds of the shadow's own training before."""
    record = record_of(cell.shadow) if cell.shadow else None
    return None if record is None else float(record["curve"][-1]["processor_seconds"])


def waiting(cells: dict[str, Cell], folder: Path = FOLDER) -> list[Cell]:
    """Cells that have not ended, in order; raises as :func:`~experiments.device_plan.own_record`."""
    records = ((cell, own_record(cell, folder)) for cell in cells.values())
    return [cell for cell, record in records if record is None or record["ended"] is None]


def run(cell: Cell, is_over: Callable[[], bool], work: Path = WORK, folder: Path = FOLDER) -> bool:
    """Train a cell to its end, or until ``is_over`` says so; a loss that is not finite ends it too."""
    training = Converging(cell, work, folder)
    try:
        done = training.run(is_over)
    except NonFiniteLossError as error:
        training.write(str(error))
        return True
    if done and cell.method == "shadow":
        record = record_of(cell.name, folder)
        assert record is not None
        training.place_best()
        write_json(folder / f"{cell.name}.json", {**record, "detached": training.problem.detached("validation")})
    return done


def final(cell: Cell, work: Path = WORK, folder: Path = FOLDER) -> dict[str, Any]:
    """Look at the test rows, once for each method and seed: with the cell that was chosen on validation rows.

    Raises:
        ConfigError: if a cell of this method and seed has seen them, or this one has not ended.
    """
    for file in sorted(folder.glob("*.json")):
        seen = json.loads(file.read_text(encoding="utf-8"))
        if seen["test"] is not None and (seen["settings"]["method"], seen["settings"]["seed"]) == (cell.method, cell.seed):
            raise ConfigError(f"'{seen['name']}' has already been tested; the test rows are looked at once")
    record = record_of(cell.name, folder)
    if record is None or record["ended"] is None:
        raise ConfigError(f"'{cell.name}' has not ended; run it first")
    training = Converging(cell, work, folder)
    training.place_best()
    record["test"] = training.problem.test()
    write_json(folder / f"{cell.name}.json", record)
    return dict(record["test"])


def main(arguments: list[str] | None = None) -> int:
    """0: done; 2: wrong usage; 3: stopped before the end, with a saved state."""
    parser = argparse.ArgumentParser(prog="python -m experiments.converged", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "list", "final"])
    parser.add_argument("names", nargs="*", help="cells; run and list: none means all that have not ended")
    parser.add_argument("--limit-minutes", type=float, default=math.inf, metavar="N", help="stop after this time")
    chosen = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * chosen.limit_minutes
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    prepare_cpu(1)
    try:
        cells = read_cells(PLAN, Cell)
        unknown = [name for name in chosen.names if name not in cells]
        if unknown:
            raise ConfigError(f"{PLAN.name} has no cell '{unknown[0]}'; it has {', '.join(cells)}")
        left = [cell for cell in waiting(cells) if not chosen.names or cell.name in chosen.names]
        if chosen.command == "list":
            print("\n".join(cell.name for cell in left))
            return 0
        if chosen.command == "final":
            for name in chosen.names:
                print(json.dumps(final(cells[name]), indent=2))
            return 0
        for cell in left:
            done = run(cell, lambda: stop.is_set() or time.monotonic() > deadline)
            print(f"{time.strftime('%H:%M:%S')} {cell.name}: {'ended' if done else 'stopped'}", flush=True)
            if not done:
                return 3
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

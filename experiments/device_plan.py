"""The plan of the device search: its cells, and which of them wait to be run; and what the plans that start from it share."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from experiments.device_problems import PROBLEMS
from experiments.measuring import processor
from experiments.spec import RECORDS, SPECS, digest
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.record import commit
from shadowpeft.runtime import environment
from shadowpeft.train.config import RunLoader

Planned = TypeVar("Planned", bound="Recipe")

PLAN = SPECS / "device" / "search.yaml"
FOLDER = RECORDS / "device"
WORK = Path(__file__).resolve().parents[1] / "runs" / "device-search"


class Recipe:
    """What a cell of any plan is: a frozen dataclass with a name, of which all else decides what it computes."""

    def settings(self: Any) -> dict[str, Any]:
        """What a record must have been made with."""
        return {key: value for key, value in asdict(self).items() if key != "name"}

    def digest(self: Any) -> str:
        """sha256 of the settings that are no defaults: a setting that is added later changes no older cell."""
        usual = {field.name: field.default for field in fields(self)}
        return digest({key: value for key, value in self.settings().items() if value != usual[key]})

    def stamp(self: Any) -> dict[str, Any]:
        """What ends a record: the settings, and by which code, where and when it was made."""
        return {
            "settings": self.settings(),
            "settings_sha256": self.digest(),
            "commit": commit(),
            "versions": environment(),
            "processor": processor(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


@dataclass(frozen=True)
class Cell(Recipe):
    """One recipe; all fields but ``name`` and ``passes`` decide what a step computes."""

    name: str
    passes: int = 1
    problem: str = "robot"
    base: str = "smollm2-135m"
    layers: int = 6
    """First layers of the base that the shadow starts from."""
    frozen_layers: int = 0
    """Of these, how many (from the first) do not train."""
    target: str = "action"
    """``action``: the answer ends after its action. ``reply``: the spoken reply is learnt too."""
    open_rows: bool = True
    """The open prompts of the base path's rows are learnt as ``[REMOTE]``."""
    hold_out: bool = True
    """Part of the training rows is held out for choosing; False: all train, and the packaged validation set chooses."""
    more_rows: bool = False
    """The further training rows of ``robot_large`` are learnt too, and choose nothing."""
    rate: float = 1e-3
    batch_size: int = 16
    warmup: int = 25
    """Steps in which the rate rises."""
    schedule: str = "constant"
    """``constant``, or ``linear`` to 0 at the end of ``passes`` (such a cell cannot go on)."""
    average: float = 0.98
    """Share of the averaged weights that stays in each step; 0: the weights themselves are judged."""
    weight_decay: float = 0.0
    dropout: float = 0.0
    """Of the embedded tokens, number by number."""
    token_dropout: float = 0.0
    """Of the embedded tokens, whole tokens."""
    seed: int = 0
    start: str = ""
    """Another cell whose state this one starts from, so that two ways to go on can be compared; its passes count."""

    def __post_init__(self) -> None:
        if self.problem not in PROBLEMS or self.target not in ("action", "reply"):
            raise ConfigError(f"cell '{self.name}': problem '{self.problem}' or target '{self.target}' is unknown")
        if self.schedule not in ("constant", "linear") or self.passes < 1:
            raise ConfigError(f"cell '{self.name}': schedule '{self.schedule}' or passes {self.passes} is impossible")

    def settings(self) -> dict[str, Any]:
        """A constant schedule can be carried on, so its passes are left out."""
        found = super().settings()
        return {key: value for key, value in found.items() if key != "passes" or self.schedule != "constant"}


def read_plan(file: Path = PLAN) -> list[Cell]:
    """The cells of a plan, in order, each laid over its ``defaults``.

    Raises:
        ConfigError: if a key is unknown, or a name stands for two different recipes.
    """
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=RunLoader)
    known = {field.name for field in fields(Cell)}
    cells: dict[str, Cell] = {}
    order = []
    for entry in content["cells"]:
        unknown = set(entry) - known
        if unknown:
            raise ConfigError(f"{file.name}: cell '{entry.get('name')}' has the unknown key '{min(unknown)}'")
        before = cells.get(entry["name"])
        cell = replace(before, **entry) if before else Cell(**{**content.get("defaults", {}), **entry})
        if before is not None and before.settings() != cell.settings():
            raise ConfigError(f"{file.name}: '{cell.name}' stands for two recipes; a cell may only get more passes")
        cells[cell.name] = cell
        order.append(cell)
    return order


def read_cells(file: Path, kind: type[Planned]) -> dict[str, Planned]:
    """The cells of another plan by name, each laid over its ``defaults``."""
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=RunLoader)
    return {entry["name"]: kind(**{**content.get("defaults", {}), **entry}) for entry in content["cells"]}


def averaged_of(name: str, work: Path) -> dict[str, Tensor]:
    """The averaged weights of a cell of the search, by name in its stock model."""
    state = torch.load(work / name / "state.pt", weights_only=True)
    return dict(zip(state["weights"], state["averaged"], strict=True))


def record_of(name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """The record of a cell, or None."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def own_record(cell: Any, folder: Path) -> dict[str, Any] | None:
    """The record of a cell, or None.

    Raises:
        ConfigError: if it was made with other settings.
    """
    record = record_of(cell.name, folder)
    if record is not None and record["settings_sha256"] != cell.digest():
        raise ConfigError(f"the record of '{cell.name}' has other settings than the plan; give the cell a new name")
    return record


def waiting(plan: list[Cell], folder: Path = FOLDER) -> list[Cell]:
    """Entries of the plan whose passes are not done; raises as :func:`own_record`."""
    found = []
    for cell in plan:
        record = own_record(cell, folder)
        if record is None or (record["passes"] < cell.passes and record["ended"] is None):
            found.append(cell)
    return found

"""Training the adapter of a cell: at which learning rate, on which rows, and again only where something differs.

Checkpoints, adapters and predictions (large) stay in a work folder, under names made from everything that decides them, so
specs with the same training share it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

import shadowpeft
from experiments.measuring import stamp
from experiments.records import check_settings, read_file, write_record
from experiments.spec import MODES, NEWEST, RECORDS, ROOT, SPECS, Cell, digest
from shadowpeft.apps import common
from shadowpeft.data.chat import rows_digest
from shadowpeft.data.tasks import Example, Task, get_task
from shadowpeft.errors import ConfigError, NonFiniteLossError
from shadowpeft.evaluate import answer_loss, evaluate_task
from shadowpeft.evaluate.folder import PREDICTIONS
from shadowpeft.evaluate.record import commit
from shadowpeft.runtime import DTYPES, environment
from shadowpeft.storage import whole, write_json
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train import baselines
from shadowpeft.train.config import TrainingSection

WORK = ROOT / "runs" / "experiments"
CHECKPOINTS = 5
"""Checkpoints of a cell's training: a kill costs a fifth of it at most."""

DIVERGED = 0.1
"""A whole run has diverged if it is worth less than the trial of its rate by this share; both on the same validation rows."""


class Paused(Exception):
    """The time is up; what was done is kept."""


@dataclass
class CellTraining:
    """Where things are and who does them; the last two are replaced in tests."""

    records: Path = RECORDS
    work: Path = WORK
    specs: Path = SPECS
    limit_minutes: float | None = None
    console: Console = field(default_factory=lambda: Console(stderr=True))
    quiet: bool = False
    get_task: Callable[[str], Task] = get_task
    evaluate: Callable[..., dict[str, Any]] = evaluate_task

    def __post_init__(self) -> None:
        self.deadline = None if self.limit_minutes is None else time.monotonic() + 60 * self.limit_minutes
        self._tokenizers: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """One line of progress."""
        if not self.quiet:
            self.console.print(text, highlight=False)

    def time_is_up(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def check_time(self) -> None:
        """Raise :class:`Paused` if the deadline has passed."""
        if self.time_is_up():
            raise Paused

    def tokenizer(self, base: str) -> Any:
        """The base's tokenizer, loaded once."""
        if base not in self._tokenizers:
            self._tokenizers[base] = load_tokenizer(base)
        return self._tokenizers[base]

    # ------------------------------------------------------------------------------------------------------ learning rate

    def rate(self, cell: Cell) -> dict[str, Any]:
        """The learning rate of a cell: its spec's number, another spec's record, or a search over the grid.

        Raises:
            ConfigError: if the record of another spec is not there yet, or this spec's is of other settings.
        """
        if cell.rates is None:
            return {"chosen": cell.train["learning_rate"], "record": None}
        rates = cell.rates
        if rates["from"] is not None:
            identity = f"{rates['from']}/{cell.task}-{rates['method'] or cell.name}-rate"
            record = read_file(identity, self.records)
            if record is None:
                raise ConfigError(
                    f"{cell.spec}/{cell.id} takes its learning rate from {identity}, which has no record; run "
                    f"`python -m experiments run {rates['from']}` first"
                )
            return _choice(record)
        left_out = ("seed", "evaluate", "latency", "spec", "kind")
        settings = {key: value for key, value in cell.settings().items() if key not in left_out}
        settings["train"] = {key: value for key, value in settings["train"].items() if key != "seed"}
        identity = f"{cell.spec}/{cell.rate_id}"
        record = read_file(identity, self.records)
        if record is not None:
            check_settings(record, settings, digest(settings))
            return _choice(record)
        task = self.get_task(cell.task)
        baselines.check_splits(task, choose_on=rates["split"])
        details: list[dict[str, Any]] = []
        choice = baselines.choose_rate(rates["grid"], lambda rate: self.trial(cell, task, rate, details))
        record = {
            "id": identity,
            "kind": "rate",
            **choice,
            "details": details,
            "validation": task.source(rates["split"]),
            "settings": settings,
            "settings_sha256": digest(settings),
            **stamp(),
            "versions": environment(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_record(record, self.records)
        return _choice(record)

    def trial(self, cell: Cell, task: Any, rate: float, details: list[dict[str, Any]]) -> float:
        """Value of a learning rate on validation rows, of the path that answers with the base."""
        rates: Any = cell.rates
        assert rates is not None
        try:
            model, summary, folder = self.trained(cell, task, rate, seed=rates["seed"], share=rates["budget_share"])
        except NonFiniteLossError as error:
            details.append({"learning_rate": rate, "by": "diverged", "error": str(error)})
            self.say(f"    learning rate {rate:g}: {error}")
            return math.nan
        by, value, _ = self.judged(cell, rates, model, task, folder)
        details.append({"learning_rate": rate, "by": by, **summary})
        self.say(f"    learning rate {rate:g}: {by} {abs(value):.4f}")
        return value

    def judged(self, cell: Cell, rates: dict[str, Any], model: Any, task: Any, folder: Path) -> tuple[str, float, bool]:
        """What a trained adapter is worth on the validation rows: by what, its score or its cross-entropy (negative), and
        whether a classifier's cross-entropy is no better than that of equal chances for all classes."""
        guesses = False
        by = rates["by"] or ("score" if task.kind == "classify" else "loss")
        tokenizer, mode = self.tokenizer(cell.base), MODES[cell.method][0]
        with autocast(cell):
            if by == "score" or task.kind == "classify":
                place = folder / "evaluations" / f"{rates['split']}-{rates['rows']}"
                rows = {"split": rates["split"], "limit": rates["rows"]}
                value = self.evaluated(cell, model, task, mode, place, rows)["score"]
                if task.kind == "classify":
                    likelihood = statistics.mean(row["scores"][row["gold"]] for row in predictions(place))
                    guesses = likelihood <= -math.log(len(task.labels))
                    value = likelihood if by == "loss" else value
            else:
                examples = task.load(rates["split"], shots=cell.shots, limit=rates["rows"], seed=0)
                encoded: Any = baselines.encode_examples(task, examples, tokenizer, max_length=cell.max_length)
                own = [s for s in encoded.sequences if s.base]
                value = -answer_loss(model, own, tokenizer.pad_token_id)["loss"]
        return by, float(value), guesses

    # ----------------------------------------------------------------------------------------------------------- training

    def trained_stably(self, cell: Cell, task: Any, rate: dict[str, Any]) -> tuple[PeftModel, dict[str, Any], Path]:
        """Train at the chosen rate. A rate that held for a share of the budget can diverge over all of it: where the loss is
        not finite, or the whole run is worth less on the validation rows than the rate's own trial (by more than a tenth of its
        value), or is a classifier that only guesses, the next lower rate of the grid is taken, for every method alike.

        ``rate`` keeps ``chosen`` and gets ``used``, its ``value`` on the validation rows, and ``diverged``.
        """
        trials, rates = rate.pop("trials", {}), rate.pop("judged", None)
        rate.update(used=rate["chosen"], value=None, diverged=[])
        while True:
            below = [r for r in sorted(trials, reverse=True) if r < rate["used"]]
            trial = trials.get(rate["used"])
            try:
                model, summary, folder = self.trained(cell, task, rate["used"], seed=cell.seed)
            except NonFiniteLossError:
                if not below:
                    raise
                rate["value"] = None
            else:
                guesses = False
                if rates is not None:
                    _, rate["value"], guesses = self.judged(cell, rates, model, task, folder)
                worth = trial is None or rate["value"] >= trial - DIVERGED * abs(trial)
                if not below or (worth and not guesses):
                    return model, summary, folder
            self.say(f"    diverged at {rate['used']:g} (value {rate['value']}, in its trial {trial})")
            rate["diverged"].append({"learning_rate": rate["used"], "value": rate["value"], "trial": trial})
            rate["used"] = below[0]

    def trained(
        self, cell: Cell, task: Any, rate: float, *, seed: int, share: float = 1.0
    ) -> tuple[PeftModel, dict[str, Any], Path]:
        """The trained adapter on its base, the summary of its training, and its folder; trained once for equal settings."""
        tokenizer = self.tokenizer(cell.base)
        base = baselines.load_task_base(cell.base, task, tokenizer, precision=cell.precision, seed=seed)
        examples = repeated_rows(task, cell.shadow_row_repeats, shots=cell.shots)
        data = baselines.encode_examples(task, examples, tokenizer, max_length=cell.max_length)
        section = TrainingSection.model_validate({**cell.train, "seed": seed, "learning_rate": rate})
        steps = planned_steps(cell, data, section, share)
        section = section.model_copy(
            update={
                "epochs": None,
                "max_steps": steps,
                "save_every": max(1, steps // CHECKPOINTS),
                "keep_checkpoints": 1,
            }
        )
        key = _training_key(cell, section, data)
        folder = self.work / "train" / key
        summary_file, adapter = folder / "summary.json", folder / "adapter"
        if summary_file.is_file():
            summary = json.loads(summary_file.read_text(encoding="utf-8"))
            return placed(PeftModel.from_pretrained(base, str(adapter))), summary, folder
        budget = None if cell.match is None else baselines.shadow_parameters(base, cell.match)
        model = baselines.attach(base, cell.method, cell.fields, budget=budget, seed=seed)
        summary = baselines.train_task(
            model, tokenizer, data, section, folder, deadline=self.deadline, console=self.console, quiet=self.quiet
        )
        if not summary.pop("finished"):
            raise Paused if self.time_is_up() else KeyboardInterrupt
        summary.update(
            learning_rate=rate,
            seed=seed,
            key=key,
            budget=budget,
            rank=getattr(model.peft_config["default"], "r", None),
            train=task.source("train"),
            commit=commit(),
            versions=environment(),
        )
        with whole(adapter, folder=True) as beside:
            model.save_pretrained(str(beside))
        write_json(summary_file, summary)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return model, summary, folder

    # --------------------------------------------------------------------------------------------------------- evaluation

    def evaluated(
        self, cell: Cell, model: Any, task: Any, mode: str, folder: Path, options: dict[str, Any]
    ) -> dict[str, Any]:
        """The result of one evaluation; it continues where an interrupted one stopped."""
        how = options.get("how") or ("classify" if task.kind == "classify" else "generate")
        rest = {key: value for key, value in options.items() if key in ("split", "shots", "limit", "batch_size")}
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer(cell.base)
        if how == "classify":
            rest["max_length"] = cell.max_length  # read as much of a text as in training
        if self.quiet:
            rest["progress"] = lambda done: None
        return self.evaluate(model, tokenizer, task, mode=mode, method=how, folder=folder, resume=True, seed=0, **rest)


def repeated_rows(task: Any, repeats: int, *, shots: int = 0) -> list[Example]:
    """The training rows; those that only the shadow path learns ``repeats`` times."""
    return [
        example
        for example in task.load("train", shots=shots, seed=0)
        for _ in range(repeats if example.meta.get("path") == "shadow" else 1)
    ]


def _training_key(cell: Cell, section: TrainingSection, data: Any) -> str:
    """Name of a training: a digest of all that decides its weights."""
    optimised = section.model_dump(exclude={"eval_batch_size", "log_every", "threads", "report_to", "save_every"})
    usual = TrainingSection().model_dump()
    optimised = {k: v for k, v in optimised.items() if k not in NEWEST or v != usual[k]}
    parts = [
        cell.base,
        cell.precision,
        cell.task,
        cell.method,
        cell.fields,
        cell.match,
        cell.max_length,
        cell.shots,
        cell.shadow_row_repeats,
        optimised,
        rows_digest(data[i] for i in range(len(data))),  # prompts and answers, as encoded
        shadowpeft.__version__,
    ]
    return digest(parts)[:16]


def _choice(record: dict[str, Any]) -> dict[str, Any]:
    """What a cell needs of the record of its learning rate."""
    trials = {t["learning_rate"]: t["value"] for t in record["trials"] if t["value"] is not None}
    own = {"chosen": record["chosen"], "record": record["id"], "at_edge": record["at_edge"]}
    return {**own, "trials": trials, "judged": record["settings"]["rates"]}


def predictions(folder: Path) -> list[dict[str, Any]]:
    """What an evaluation wrote of each example."""
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]


def placed(model: Any) -> Any:
    """``model`` where the commands put theirs by default."""
    return common.placed(model, common.pick_device("auto"))


def planned_steps(cell: Cell, data: Any, section: TrainingSection, share: float = 1.0) -> int:
    """Optimiser steps of a cell's budget, or of a share of it."""
    per_epoch = -(-len(data) // (section.batch_size * section.gradient_accumulation))
    if cell.tokens is not None:
        return baselines.steps_for(max(1, round(cell.tokens * share)), data, section)
    steps = section.max_steps if section.max_steps is not None else round(per_epoch * (section.epochs or 1.0))
    return max(1, round(steps * share))


@contextlib.contextmanager
def autocast(cell: Cell) -> Iterator[None]:
    """16-bit bases run under autocast, since trained weights are float32, for every method alike."""
    if cell.precision == "float32":
        yield
        return
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=DTYPES[cell.precision]):
        yield

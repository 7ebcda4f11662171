"""Runs the cells of a spec and writes one record each; whatever was interrupted continues where it was.

Records (small, committed) go to ``experiments/records/<spec>/<cell>.json``. Checkpoints, adapters and predictions (large) stay
in a work folder, under names made from everything that decides them, so specs with the same training share it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gc
import json
import math
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

import shadowpeft
from experiments.spec import MODES, RECORDS, SPECS, Cell, Spec, cells, digest, evaluation_name, read_spec
from shadowpeft.apps import common
from shadowpeft.data.chat import fingerprint
from shadowpeft.data.tasks import Task, get_task
from shadowpeft.errors import ConfigError, NonFiniteLossError
from shadowpeft.evaluate import answer_loss, evaluate_task, norms_kept
from shadowpeft.evaluate.engine import PREDICTIONS
from shadowpeft.evaluate.record import bootstrap, commit
from shadowpeft.generate import answer, routing_reason
from shadowpeft.runtime import DTYPES, environment, prepare_cpu
from shadowpeft.storage import sync, write_json
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train import baselines
from shadowpeft.train.config import TrainingSection

ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "experiments"
CHECKPOINTS = 5
"""Checkpoints of a cell's training: a kill costs a fifth of it at most."""

DIVERGED = 0.1
"""A whole run has diverged if it is worth less than the trial of its rate by this share; both on the same validation rows."""


class Paused(Exception):
    """The time is up; what was done is kept."""


@dataclass
class Runner:
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

    # ------------------------------------------------------------------------------------------------------ cell by cell

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
        prepare_cpu(_threads(spec))
        outcome: dict[str, list[str]] = {"done": [], "ran": [], "left": []}
        for cell in chosen:
            record = read_record(cell, self.records)
            if record is not None and record["settings_sha256"] != cell.digest():
                raise ConfigError(
                    f"the record {record['id']} was made with other settings than '{name}' has now "
                    f"({', '.join(changed(record['settings'], cell.settings()))}); delete it to run the cell again"
                )
        for number, cell in enumerate(chosen, 1):
            if read_record(cell, self.records) is not None:
                outcome["done"].append(cell.id)
                continue
            if outcome["left"] or self._over():
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
        made = {"latency": self._latency, "system": self._system}.get(cell.kind, self._train_and_evaluate)(cell)
        record = {
            "id": f"{cell.spec}/{cell.id}",
            "spec": cell.spec,
            "kind": cell.kind,
            "task": cell.task,
            "name": cell.name,
            "method": cell.method,
            "seed": cell.seed,
            **made,
            "settings": cell.settings(),
            "settings_sha256": cell.digest(),
            "commit": commit(),
            "versions": environment(),
            "processor": processor(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds_of_last_call": round(time.monotonic() - began, 1),
        }
        write_record(record, self.records)
        return record

    def say(self, text: str) -> None:
        """One line of progress."""
        if not self.quiet:
            self.console.print(text, highlight=False)

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _check_time(self) -> None:
        if self._over():
            raise Paused

    # ---------------------------------------------------------------------------------------------------------- training

    def tokenizer(self, base: str) -> Any:
        """The base's tokenizer, loaded once."""
        if base not in self._tokenizers:
            self._tokenizers[base] = load_tokenizer(base)
        return self._tokenizers[base]

    def rate(self, cell: Cell) -> dict[str, Any]:
        """The learning rate of a cell: its spec's number, another spec's record, or a search over the grid.

        Raises:
            ConfigError: if the record of another spec is not there yet.
        """
        if cell.rates is None:
            return {"chosen": cell.train["learning_rate"], "record": None}
        rates = cell.rates
        if rates["from"] is not None:
            other = f"{cell.task}-{rates['method'] or cell.name}-rate"
            file = self.records / rates["from"] / f"{other}.json"
            if not file.is_file():
                raise ConfigError(
                    f"{cell.spec}/{cell.id} takes its learning rate from {rates['from']}/{other}, which has no record; run "
                    f"`python -m experiments run {rates['from']}` first"
                )
            found = json.loads(file.read_text(encoding="utf-8"))
            return _choice(found)
        file = self.records / cell.spec / f"{cell.rate_id}.json"
        settings = {
            key: value
            for key, value in cell.settings().items()
            if key not in ("seed", "evaluate", "latency", "spec", "kind")
        }
        settings["train"] = {k: v for k, v in settings["train"].items() if k != "seed"}
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["settings_sha256"] != digest(settings):
                raise ConfigError(
                    f"the record {found['id']} was made with other settings "
                    f"({', '.join(changed(found['settings'], settings))}); delete it to search again"
                )
            return _choice(found)
        task = self.get_task(cell.task)
        baselines.check_splits(task, choose_on=rates["split"])
        details: list[dict[str, Any]] = []
        found = baselines.choose_rate(rates["grid"], lambda rate: self._trial(cell, task, rate, details))
        record = {
            "id": f"{cell.spec}/{cell.rate_id}",
            "kind": "rate",
            **found,
            "details": details,
            "validation": task.source(rates["split"]),
            "settings": settings,
            "settings_sha256": digest(settings),
            "commit": commit(),
            "versions": environment(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_record(record, self.records)
        return _choice(record)

    def _trial(self, cell: Cell, task: Any, rate: float, details: list[dict[str, Any]]) -> float:
        """Value of a learning rate on validation rows, of the path that answers with the base."""
        rates: Any = cell.rates
        assert rates is not None
        try:
            model, trained, folder = self._trained(cell, task, rate, seed=rates["seed"], share=rates["budget_share"])
        except NonFiniteLossError as error:
            details.append({"learning_rate": rate, "by": "diverged", "error": str(error)})
            self.say(f"    learning rate {rate:g}: {error}")
            return math.nan
        by, value, _ = self._judged(cell, rates, model, task, folder)
        details.append({"learning_rate": rate, "by": by, **trained})
        self.say(f"    learning rate {rate:g}: {by} {abs(value):.4f}")
        return value

    def _judged(
        self, cell: Cell, rates: dict[str, Any], model: Any, task: Any, folder: Path
    ) -> tuple[str, float, bool]:
        """What a trained adapter is worth on the validation rows: by what, its score or its cross-entropy (negative), and
        whether a classifier's cross-entropy is no better than that of equal chances for all classes."""
        guesses = False
        by = rates["by"] or ("score" if task.kind == "classify" else "loss")
        tokenizer, mode = self.tokenizer(cell.base), MODES[cell.method][0]
        with autocast(cell):
            if by == "score" or task.kind == "classify":
                place = folder / "evaluations" / f"{rates['split']}-{rates['rows']}"
                asked = {"split": rates["split"], "limit": rates["rows"]}
                value = self._evaluated(cell, model, task, mode, place, asked)["score"]
                if task.kind == "classify":
                    likelihood = statistics.mean(row["scores"][row["gold"]] for row in predictions(place))
                    guesses = likelihood <= -math.log(len(task.labels))
                    value = likelihood if by == "loss" else value
            else:
                rows = task.load(rates["split"], shots=cell.shots, limit=rates["rows"], seed=0)
                encoded: Any = baselines.encode_examples(task, rows, tokenizer, max_length=cell.max_length)
                own = [s for s in encoded.sequences if s.base]
                value = -answer_loss(model, own, tokenizer.pad_token_id)["loss"]
        return by, float(value), guesses

    def _trained_stably(self, cell: Cell, task: Any, rate: dict[str, Any]) -> tuple[PeftModel, dict[str, Any], Path]:
        """Train at the chosen rate. A rate that held for a share of the budget can diverge over all of it: where the loss is
        not finite, or the whole run is worth less on the validation rows than the rate's own trial (by more than a tenth of its
        value), or is a classifier that only guesses, the next lower rate of the grid is taken, for every method alike.

        ``rate`` keeps ``chosen`` and gets ``used``, its ``value`` on the validation rows, and ``diverged``.
        """
        trials, rates = rate.pop("trials", {}), rate.pop("judged", None)
        rate.update(used=rate["chosen"], value=None, diverged=[])
        while True:
            below = [r for r in sorted(trials, reverse=True) if r < rate["used"]]
            try:
                model, summary, folder = self._trained(cell, task, rate["used"], seed=cell.seed)
            except NonFiniteLossError:
                if not below:
                    raise
                rate["value"] = None
            else:
                trial, guesses = trials.get(rate["used"]), False
                if rates is not None:
                    _, rate["value"], guesses = self._judged(cell, rates, model, task, folder)
                worth = trial is None or rate["value"] >= trial - DIVERGED * abs(trial)
                if not below or (worth and not guesses):
                    return model, summary, folder
            found = {"learning_rate": rate["used"], "value": rate["value"], "trial": trials.get(rate["used"])}
            self.say(f"    diverged at {rate['used']:g} (value {found['value']}, in its trial {found['trial']})")
            rate["diverged"].append(found)
            rate["used"] = below[0]

    def _trained(
        self, cell: Cell, task: Any, rate: float, *, seed: int, share: float = 1.0
    ) -> tuple[PeftModel, dict[str, Any], Path]:
        """The trained adapter on its base, the summary of its training, and its folder; trained once for equal settings."""
        tokenizer = self.tokenizer(cell.base)
        base = baselines.load_task_base(cell.base, task, tokenizer, precision=cell.precision, seed=seed)
        examples = [
            e
            for e in task.load("train", shots=cell.shots, seed=0)
            for _ in range(cell.shadow_row_repeats if e.meta.get("path") == "shadow" else 1)
        ]
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
        optimised = section.model_dump(exclude={"eval_batch_size", "log_every", "threads", "report_to", "save_every"})
        key = digest(
            [
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
                fingerprint(data[i] for i in range(len(data))),  # prompts and answers, as encoded
                shadowpeft.__version__,
            ]
        )
        folder = self.work / "train" / key[:16]
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
            raise Paused if self._over() else KeyboardInterrupt
        config = model.peft_config["default"]
        summary.update(
            learning_rate=rate,
            seed=seed,
            key=key[:16],
            budget=budget,
            rank=getattr(config, "r", None),
            train=task.source("train"),
            commit=commit(),
            versions=environment(),
        )
        model.save_pretrained(str(folder / "partial-adapter"))
        sync(folder / "partial-adapter")
        shutil.rmtree(adapter, ignore_errors=True)
        (folder / "partial-adapter").rename(adapter)
        write_json(summary_file, summary)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        return model, summary, folder

    # -------------------------------------------------------------------------------------------------------- evaluation

    def _evaluated(
        self, cell: Cell, model: Any, task: Any, mode: str, folder: Path, options: dict[str, Any]
    ) -> dict[str, Any]:
        how = options.get("how") or ("classify" if task.kind == "classify" else "generate")
        rest = {key: value for key, value in options.items() if key in ("split", "shots", "limit", "batch_size")}
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer(cell.base)
        if how == "classify":
            rest["max_length"] = cell.max_length  # read as much of a text as in training
        if self.quiet:
            rest["progress"] = lambda done: None
        return self.evaluate(model, tokenizer, task, mode=mode, method=how, folder=folder, resume=True, seed=0, **rest)

    def _train_and_evaluate(self, cell: Cell) -> dict[str, Any]:
        task = self.get_task(cell.task)
        made: dict[str, Any] = {}
        tokenizer = self.tokenizer(cell.base)
        if cell.method == "base":
            model: Any = placed(
                baselines.load_task_base(cell.base, task, tokenizer, precision=cell.precision, seed=cell.seed)
            )
            folder = self.work / "base" / digest([cell.base, cell.precision])[:16]
        else:
            made["rate"] = self.rate(cell)
            self._check_time()
            model, made["training"], folder = self._trained_stably(cell, task, made["rate"])
        made["results"], made["values"] = {}, {}
        for options in cell.evaluate:
            other = self.get_task(options["task"])
            if other.kind != task.kind:
                raise ConfigError(
                    f"{cell.spec}/{cell.id} was made for {task.name}, a '{task.kind}' task, and cannot be evaluated on "
                    f"{other.name}, a '{other.kind}' task; take it out of 'evaluate'"
                )
            for mode in MODES[cell.method]:
                self._check_time()
                name = evaluation_name(options, mode)
                self.say(f"    {name}")
                place = folder / "evaluations" / f"{name}-{digest(options)[:8]}"
                with autocast(cell):
                    made["results"][name] = self._evaluated(cell, model, other, mode, place, options)
                made["values"][name] = values_of(place)
        return made

    # ------------------------------------------------------------------------------------------- Figure 3b and Appendix F

    def _latency(self, cell: Cell) -> dict[str, Any]:
        """Milliseconds for a few greedy tokens after one prompt, alternating with the bare base, whose weights it shares."""
        settings: Any = cell.latency
        task, tokenizer = self.get_task(cell.task), self.tokenizer(cell.base)
        prompt = task.load("test", limit=1, seed=0)[0].prompt

        def bare() -> Any:
            return baselines.load_task_base(cell.base, task, tokenizer, precision=cell.precision, seed=0)

        runners: dict[str, Any] = {"base": bare().eval()}
        parameters = None
        if cell.method != "base":
            budget = None if cell.match is None else baselines.shadow_parameters(runners["base"], cell.match)
            model = baselines.attach(bare(), cell.method, cell.fields, budget=budget, seed=0).eval()
            parameters = baselines.count_trainable(model)
            runners[MODES[cell.method][0]] = model
            if cell.method == "shadow":
                runners["detached"] = shadowpeft.detach(model).to(dtype=DTYPES[cell.precision])
        runners = {name: placed(runner) for name, runner in runners.items()}

        def once(runner: Any) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            answer(
                runner,
                tokenizer,
                [prompt],
                max_new_tokens=settings["new_tokens"],
                min_new_tokens=settings["new_tokens"],
            )
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - began)

        times: dict[str, list[float]] = {name: [] for name in runners}
        adapted = next((r for name, r in runners.items() if name in ("lora", "dora")), runners["base"])
        with autocast(cell), norms_kept(adapted):
            for turn in range(settings["warmup"] + settings["repeats"]):
                for name in list(runners) if turn % 2 == 0 else list(runners)[::-1]:
                    value = once(runners[name])
                    if turn >= settings["warmup"]:
                        times[name].append(value)
        return {
            "training": {"trainable_parameters": parameters},
            "results": {
                name: {
                    "milliseconds": statistics.median(values),
                    "interval": quartiles(values),
                    "ratio": statistics.median(a / b for a, b in zip(values, times["base"], strict=True)),
                    "n": len(values),
                }
                for name, values in times.items()
            },
        }

    def _system(self, cell: Cell) -> dict[str, Any]:
        """Appendix F: the detached shadow answers first, what it does not know goes to the attached model; LoRA and DoRA have
        only the full model. One request at a time; every model on the same machine, and nothing added for a network."""
        task, tokenizer = self.get_task(cell.task), self.tokenizer(cell.base)
        rate = self.rate(cell)
        self._check_time()
        model, training, _ = self._trained_stably(cell, task, rate)
        options = cell.evaluate[0]
        rows = task.load(options["split"], limit=options["limit"], seed=0)
        system = getattr(task, "system", None)

        def ask(runner: Any, chosen: list[Any]) -> list[tuple[str | None, float]]:
            found = answer(
                runner,
                tokenizer,
                [e.prompt for e in chosen],
                max_new_tokens=task.max_new_tokens,
                batch_size=1,
                system=system,
            )
            return [(task.parse(a.text), a.seconds) for a in found]

        began = time.monotonic()
        with autocast(cell), norms_kept(model):
            if cell.method == "shadow":
                edge = placed(shadowpeft.detach(model))
                first = ask(edge, rows)
                handed = [i for i, (action, _) in enumerate(first) if routing_reason(action) != "known skill"]
                second = dict(zip(handed, ask(model, [rows[i] for i in handed]), strict=True)) if handed else {}
            else:
                first, handed, second = ask(model, rows), [], {}
        outcomes = [second.get(i, first[i])[0] for i in range(len(rows))]
        seconds = [first[i][1] + (second[i][1] if i in second else 0.0) for i in range(len(rows))]
        hits = [task.per_example(out, row) for out, row in zip(outcomes, rows, strict=True)]
        kinds = {"commands": [r.gold != "REMOTE" for r in rows], "open": [r.gold == "REMOTE" for r in rows]}
        results: dict[str, Any] = {}
        for name, mask in {"all": [True] * len(rows), **kinds}.items():
            chosen = [i for i, inside in enumerate(mask) if inside]
            if chosen:
                results[name] = {
                    "score": sum(hits[i] for i in chosen) / len(chosen),
                    "interval": bootstrap([hits[i] for i in chosen]),
                    "n": len(chosen),
                    "milliseconds": 1000 * statistics.mean(seconds[i] for i in chosen),
                    "handed_on": sum(i in second for i in chosen) / len(chosen),
                }
        values = {"all": " ".join(f"{hit:.6g}" for hit in hits)}
        asked = {
            "data": task.source(options["split"]),
            "examples": fingerprint(asdict(row) for row in rows),
            "wall_seconds": round(time.monotonic() - began, 1),
        }
        return {"rate": rate, "training": training, "results": results, "values": values, "asked": asked}


# ------------------------------------------------------------------------------------------------------------- small parts


def values_of(folder: Path) -> str:
    """What each example of an evaluation was worth (1: right), in the order of their ids: what two methods are compared by."""
    return " ".join(f"{row['value']:.6g}" for row in sorted(predictions(folder), key=lambda row: str(row["id"])))


def predictions(folder: Path) -> list[dict[str, Any]]:
    """What an evaluation wrote of each example."""
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]


def _choice(record: dict[str, Any]) -> dict[str, Any]:
    """What a cell needs of the record of its learning rate."""
    trials = {t["learning_rate"]: t["value"] for t in record["trials"] if t["value"] is not None}
    own = {"chosen": record["chosen"], "record": record["id"], "at_edge": record["at_edge"]}
    return {**own, "trials": trials, "judged": record["settings"]["rates"]}


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cell.precision == "float32":
        yield
        return
    with torch.autocast(device, dtype=DTYPES[cell.precision]):
        yield


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile."""
    found = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.25, 0.75], dtype=torch.float64))
    return [float(v) for v in found]


def _threads(spec: Spec) -> int | None:
    threads = spec.train.get("threads")
    return None if threads is None else int(threads)


def changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of settings that differ."""
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def record_file(identity: str, records: Path = RECORDS) -> Path:
    """The file of a record's id."""
    return records / f"{identity}.json"


def read_record(cell: Cell, records: Path = RECORDS) -> dict[str, Any] | None:
    """The record of a cell, or None if it was not run."""
    file = record_file(f"{cell.spec}/{cell.id}", records)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def write_record(record: dict[str, Any], records: Path) -> None:
    """Write a record beside and rename it: a record that is there is whole."""
    file = record_file(record["id"], records)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, record)


def processor() -> str:
    """Name of the processor or accelerator that computed."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    line = next((r for r in info.read_text().splitlines() if r.startswith("model name")), "") if info.exists() else ""
    return line.split(":", 1)[-1].strip() or platform.processor() or platform.machine()

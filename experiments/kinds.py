"""What is made of a cell of each kind: results of evaluations, of a latency test, of a device-cloud pair in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import shadowpeft
from experiments.measuring import alternate, paired_ratios, quartiles, seconds
from experiments.spec import MODES, Cell, digest, evaluation_name
from experiments.training import CellTraining, autocast, placed, predictions
from shadowpeft.data.chat import rows_digest
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate import norms_kept
from shadowpeft.evaluate.record import bootstrap
from shadowpeft.generate import answer, routing_reason
from shadowpeft.runtime import DTYPES
from shadowpeft.train import baselines


def trained_and_evaluated(runner: CellTraining, cell: Cell) -> dict[str, Any]:
    """Scores of every evaluation of the spec in every mode, and what each row was worth."""
    task, tokenizer = runner.get_task(cell.task), runner.tokenizer(cell.base)
    parts: dict[str, Any] = {}
    if cell.method == "base":
        base = baselines.load_task_base(cell.base, task, tokenizer, precision=cell.precision, seed=cell.seed)
        model: Any = placed(base)
        folder = runner.work / "base" / digest([cell.base, cell.precision])[:16]
    else:
        parts["rate"] = runner.rate(cell)
        runner.check_time()
        model, parts["training"], folder = runner.trained_stably(cell, task, parts["rate"])
    parts["results"], parts["values"] = {}, {}
    for options in cell.evaluate:
        other = runner.get_task(options["task"])
        if other.kind != task.kind:
            raise ConfigError(
                f"{cell.spec}/{cell.id} was made for {task.name}, a '{task.kind}' task, and cannot be evaluated on "
                f"{other.name}, a '{other.kind}' task; take it out of 'evaluate'"
            )
        for mode in MODES[cell.method]:
            runner.check_time()
            name = evaluation_name(options, mode)
            runner.say(f"    {name}")
            place = folder / "evaluations" / f"{name}-{digest(options)[:8]}"
            with autocast(cell):
                parts["results"][name] = runner.evaluated(cell, model, other, mode, place, options)
            parts["values"][name] = values_of(place)
    return parts


def values_of(folder: Path) -> str:
    """What each example of an evaluation was worth (1: right), in the order of their ids: what two methods are compared by."""
    return " ".join(f"{row['value']:.6g}" for row in sorted(predictions(folder), key=lambda row: str(row["id"])))


def latency(runner: CellTraining, cell: Cell) -> dict[str, Any]:
    """Figure 3b: milliseconds for a few greedy tokens after one prompt, alternating with the bare base, whose weights it
    shares."""
    settings: Any = cell.latency
    task, tokenizer = runner.get_task(cell.task), runner.tokenizer(cell.base)
    prompt = task.load("test", limit=1, seed=0)[0].prompt

    def bare() -> Any:
        return baselines.load_task_base(cell.base, task, tokenizer, precision=cell.precision, seed=0)

    models: dict[str, Any] = {"base": bare().eval()}
    parameters = None
    if cell.method != "base":
        budget = None if cell.match is None else baselines.shadow_parameters(models["base"], cell.match)
        model = baselines.attach(bare(), cell.method, cell.fields, budget=budget, seed=0).eval()
        parameters = baselines.count_trainable(model)
        models[MODES[cell.method][0]] = model
        if cell.method == "shadow":
            models["detached"] = shadowpeft.detach(model).to(dtype=DTYPES[cell.precision])
    models = {name: placed(model) for name, model in models.items()}
    new = {"max_new_tokens": settings["new_tokens"], "min_new_tokens": settings["new_tokens"]}

    def milliseconds(model: Any) -> float:
        return 1000 * seconds(lambda: answer(model, tokenizer, [prompt], **new))

    adapted = next((model for name, model in models.items() if name in ("lora", "dora")), models["base"])
    runs = {name: partial(milliseconds, model) for name, model in models.items()}
    with autocast(cell), norms_kept(adapted):
        times = alternate(runs, settings["repeats"], warmup=settings["warmup"])
    ratios = paired_ratios(times, "base")
    return {
        "training": {"trainable_parameters": parameters},
        "results": {
            name: {
                "milliseconds": statistics.median(values),
                "interval": quartiles(values),
                "ratio": ratios[name],
                "n": len(values),
            }
            for name, values in times.items()
        },
    }


def system(runner: CellTraining, cell: Cell) -> dict[str, Any]:
    """Appendix F: the detached shadow answers first, what it does not know goes to the attached model; LoRA and DoRA have
    only the full model. One request at a time; every model on the same machine, and nothing added for a network."""
    task, tokenizer = runner.get_task(cell.task), runner.tokenizer(cell.base)
    rate = runner.rate(cell)
    runner.check_time()
    model, training, _ = runner.trained_stably(cell, task, rate)
    options = cell.evaluate[0]
    rows = task.load(options["split"], limit=options["limit"], seed=0)
    message = getattr(task, "system", None)

    def ask(who: Any, chosen: list[Any]) -> list[tuple[str | None, float]]:
        prompts = [example.prompt for example in chosen]
        answers = answer(who, tokenizer, prompts, max_new_tokens=task.max_new_tokens, batch_size=1, system=message)
        return [(task.parse(a.text), a.seconds) for a in answers]

    began = time.monotonic()
    with autocast(cell), norms_kept(model):
        if cell.method == "shadow":
            first = ask(placed(shadowpeft.detach(model)), rows)
            handed = [i for i, (action, _) in enumerate(first) if routing_reason(action) != "known skill"]
            second = dict(zip(handed, ask(model, [rows[i] for i in handed]), strict=True)) if handed else {}
        else:
            first, second = ask(model, rows), {}
    outcomes = [second.get(i, first[i])[0] for i in range(len(rows))]
    spent = [first[i][1] + (second[i][1] if i in second else 0.0) for i in range(len(rows))]
    hits = [task.per_example(outcome, row) for outcome, row in zip(outcomes, rows, strict=True)]
    kinds = {"commands": [r.gold != "REMOTE" for r in rows], "open": [r.gold == "REMOTE" for r in rows]}
    results: dict[str, Any] = {}
    for name, mask in {"all": [True] * len(rows), **kinds}.items():
        chosen = [i for i, inside in enumerate(mask) if inside]
        if chosen:
            results[name] = {
                "score": sum(hits[i] for i in chosen) / len(chosen),
                "interval": bootstrap([hits[i] for i in chosen]),
                "n": len(chosen),
                "milliseconds": 1000 * statistics.mean(spent[i] for i in chosen),
                "handed_on": sum(i in second for i in chosen) / len(chosen),
            }
    asked = {
        "data": task.source(options["split"]),
        "examples": rows_digest(asdict(row) for row in rows),
        "wall_seconds": round(time.monotonic() - began, 1),
    }
    values = {"all": " ".join(f"{hit:.6g}" for hit in hits)}
    return {"rate": rate, "training": training, "results": results, "values": values, "asked": asked}


KINDS: dict[str, Callable[[CellTraining, Cell], dict[str, Any]]] = {"latency": latency, "system": system}
"""The kinds that are not simply trained and evaluated."""

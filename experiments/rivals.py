"""The rival that any user would try first: TF-IDF and a linear support vector machine, fitted in seconds (scikit-learn).

``python -m experiments.rivals`` fits it on the rows that the trained methods learn, chooses C on validation rows alone, scores
the test rows once, and writes records in the form of the other methods' under ``records/rivals``.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline

from experiments import device_rows
from experiments.device_problems import shares
from experiments.measuring import processor
from experiments.spec import RECORDS, digest
from shadowpeft.data.chat import rows_digest
from shadowpeft.data.second_opinion import features
from shadowpeft.data.tasks import Example, Task, get_task
from shadowpeft.evaluate import wilson
from shadowpeft.evaluate.record import bootstrap, commit
from shadowpeft.evaluate.rival import classifier, fit, predict
from shadowpeft.storage import write_json

GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SPEC = "rivals"
NAME = "svc"


@dataclass(frozen=True)
class Problem:
    """Texts with their labels, and the rows on which C is chosen."""

    id: str
    title: str
    task: str
    train: list[tuple[str, Any]]
    validation: list[tuple[str, Any]]


def choose_c(problem: Problem, grid: Sequence[float] = GRID) -> dict[str, Any]:
    """C by the share of right validation rows; of equals the one nearest to 1. The features are counted once."""
    extract = features()
    inputs = extract.fit_transform([text for text, _ in problem.train])
    asked = extract.transform([text for text, _ in problem.validation])
    labels, gold = ([label for _, label in rows] for rows in (problem.train, problem.validation))
    trials = {}
    for c in grid:
        found = classifier(c).fit(inputs, labels).predict(asked)
        trials[c] = float(np.mean([a == b for a, b in zip(found, gold, strict=True)]))
    best = max(grid, key=lambda c: (trials[c], -abs(np.log(c))))
    return {
        "chosen": best,
        "at_edge": best in (min(grid), max(grid)),
        "trials": [{"C": c, "score": value} for c, value in trials.items()],
        "n": len(gold),
    }


# ------------------------------------------------------------------------------------------------------------- the problems


ROBOT: dict[str, tuple[str, dict[str, bool]]] = {
    "robot-svc": ("commands and 47 [REMOTE] rows", {"open_rows": False}),
    "robot-svc-open": ("commands and all open rows", {"open_rows": True}),
    "robot-svc-large": ("all rows of robot_large", {"open_rows": True, "more_rows": True}),
}
"""Record -> what it is called, and the rows that it learns (:func:`experiments.device_rows.split`)."""


def robot_problem(name: str) -> Problem:
    """Robot intents with ``[REMOTE]`` as a class, the rows as ``ROBOT`` has them.

    C is chosen on the packaged validation set and the phrasings held out of training, as in the device search; the test rows
    are scored by a fit on all training rows.
    """
    title, rows = ROBOT[name]
    part = device_rows.split(**rows)
    return Problem(name, title, "robot", train=_robot(part.train), validation=_robot(part.development))


def _robot(rows: Sequence[dict[str, str]]) -> list[tuple[str, Any]]:
    return [(row["prompt"], row["skill"]) for row in rows]


def class_problem(name: str) -> Problem:
    """A classification task with all of its training rows; C is chosen on its validation split."""
    task = get_task(name)
    train, validation = ([(e.prompt, e.gold) for e in task.load(split)] for split in ("train", "validation"))
    return Problem(f"{name}-svc", "all training rows", name, train, validation)


def problems() -> list[Problem]:
    """What has records."""
    return [
        *(robot_problem(name) for name in ROBOT),
        class_problem("clinc150"),
        class_problem("newsgroups"),
    ]


# -------------------------------------------------------------------------------------------------------------- the records


def final_rows(problem: Problem) -> list[tuple[str, Any]]:
    """What the chosen C is fitted on: for the robot all training rows, elsewhere the training split."""
    if problem.task != "robot":
        return problem.train
    return _robot(device_rows.split(**ROBOT[problem.id][1], hold_out=False).train)


def result(task: Task, examples: Sequence[Example], model: Pipeline, split: str) -> tuple[dict[str, Any], str]:
    """An evaluation in the form of the other methods' records, and what each example was worth, in the order of their ids."""
    began = time.monotonic()
    labels, margins = predict(model, [e.prompt for e in examples])
    seconds = time.monotonic() - began
    hits = [task.per_example(label, e) for label, e in zip(labels, examples, strict=True)]
    low, high = wilson(round(sum(hits)), len(hits))
    right = [hit == 1.0 for hit in hits]
    found = {
        "task": task.name,
        "split": split,
        "mode": NAME,
        "method": "classify",
        "score": sum(hits) / len(hits),
        "interval": bootstrap(hits),
        "scores": {name: float(value) for name, value in task.score(labels, examples).items()},
        "n": len(hits),
        "wilson_interval": [low, high],
        "auroc_of_margin": roc_auc_score(right, margins) if 0 < sum(right) < len(right) else None,
        "milliseconds_each": round(1000 * seconds / len(hits), 3),
        "data": task.source(split),
        "settings": {"limit": None, "examples": rows_digest(asdict(e) for e in examples)},
    }
    ordered = sorted(zip((e.id for e in examples), hits, strict=True), key=lambda pair: str(pair[0]))
    return found, " ".join(f"{hit:.6g}" for _, hit in ordered)


def record(problem: Problem, splits: Sequence[str] | None = None) -> dict[str, Any]:
    """Choose C, fit, score the test rows; the robot's twice, with 18 and with 320 open requests."""
    task = get_task(problem.task)
    choice = choose_c(problem)
    if problem.task == "robot":
        choice["development"] = development(problem, choice["chosen"])
    rows = final_rows(problem)
    began = time.monotonic()
    model = fit([text for text, _ in rows], [label for _, label in rows], choice["chosen"])
    seconds = time.monotonic() - began
    results, values = {}, {}
    for split in splits or (("test", "test_large") if problem.task == "robot" else ("test",)):
        name = f"{problem.task}-{NAME}" + ("" if split == "test" else f"-{split}")
        results[name], values[name] = result(task, task.load(split), model, split)
    kept = model.steps[-1][1].coef_
    settings = {"features": "tfidf words 1-2, char_wb 2-5, sublinear", "grid": list(GRID), "rows": problem.title}
    return {
        "id": f"{SPEC}/{problem.id}",
        "spec": SPEC,
        "kind": "rival",
        "task": problem.task,
        "name": problem.id.split("-", 1)[1],
        "method": NAME,
        "seed": 0,
        "rate": {**choice, "chosen_on": "validation rows alone", "validation_sha256": _sha(problem.validation)},
        "training": {
            "rows": len(rows),
            "sha256": _sha(rows),
            "seconds": round(seconds, 2),
            "trainable_parameters": int(kept.size + model.steps[-1][1].intercept_.size),
        },
        "results": results,
        "values": values,
        "settings": settings,
        "settings_sha256": digest(settings),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("scikit-learn", "numpy", "scipy", "shadowpeft")},
        },
        "device": f"{os.cpu_count()} CPU cores",
        "processor": processor(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def development(problem: Problem, c: float) -> dict[str, Any]:
    """The robot's development rows as the device search judges them, by a fit that has not seen them."""
    model = fit([text for text, _ in problem.train], [label for _, label in problem.train], c)
    rows = device_rows.split(**ROBOT[problem.id][1]).development
    return shares(rows, predict(model, [row["prompt"] for row in rows])[0])


def _sha(pairs: Sequence[tuple[str, Any]]) -> str:
    return rows_digest({"text": text, "label": label} for text, label in pairs)


def main(arguments: list[str] | None = None) -> int:
    """Write the records that are not there yet."""
    parser = argparse.ArgumentParser(prog="python -m experiments.rivals", description="TF-IDF and LinearSVC.")
    parser.add_argument("--records", type=Path, default=RECORDS)
    chosen = parser.parse_args(arguments)
    folder = chosen.records / SPEC
    for problem in problems():
        file = folder / f"{problem.id}.json"
        if file.is_file():
            continue
        made = record(problem)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, made)
        scores = {name: found["scores"] for name, found in made["results"].items()}
        print(problem.id, made["rate"]["chosen"], made["training"]["seconds"], scores, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

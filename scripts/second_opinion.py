"""What a second opinion is worth, on validation rows: ``python -m scripts.second_opinion EDGE --train robot_oos``.

``C`` of the classifier comes from folds of the training rows, families apart. Then an edge model judges the packaged validation
rows alone, and with the classifier in five ways of joining two judges. For each: what is right, how well the chance tells right
from wrong, and what a calibration keeps, averaged over samples of these rows drawn with replacement. No test row is read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadowpeft.apps.intents import rows_to_learn
from shadowpeft.constrained import choose
from shadowpeft.data import robot
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.second_opinion import C, SecondOpinion, features, file_of
from shadowpeft.errors import DataError
from shadowpeft.evaluate.record import commit
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.serve.bound import strictest_to_laxest
from shadowpeft.serve.calibration import auroc
from shadowpeft.storage import write_json

GRID = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FOLDS, DRAWN = 3, 200
TARGETS, LEVEL = (0.03, 0.05), 0.95


def penalties(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Mean negative log-likelihood and accuracy of held-out families, for each ``C``."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    prompts, actions = [row["prompt"] for row in rows], np.array([row["skill"] for row in rows])
    trials = []
    parts = []
    for fit, held in GroupKFold(FOLDS).split(prompts, actions, [row["family"] for row in rows]):
        union = features()
        x = union.fit_transform([prompts[i] for i in fit])
        parts.append((x, actions[fit], union.transform([prompts[i] for i in held]), actions[held]))
    for c in GRID:
        losses, hits = [], []
        for x, taught, asked, right in parts:
            model = LogisticRegression(C=c, max_iter=300).fit(x, taught)
            chances = model.predict_proba(asked)
            places = np.searchsorted(model.classes_, right)
            if not np.array_equal(model.classes_[places], right):
                raise DataError("a fold lacks an action; take fewer folds")
            losses.append(-np.log(chances[np.arange(len(right)), places]).mean())
            hits.append((chances.argmax(1) == places).mean())
        trials.append({"C": c, "nll": round(float(np.mean(losses)), 4), "score": round(float(np.mean(hits)), 4)})
    best = min(trials, key=lambda trial: trial["nll"])["C"]
    return {"chosen": best, "at_edge": best in (GRID[0], GRID[-1]), "folds": FOLDS, "trials": trials}


def worth(
    chances: np.ndarray, names: Sequence[str], rows: Sequence[dict[str, str]], signal: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """What the likeliest action is worth, and a confidence in it.

    Args:
        chances: ``(N, A)``. signal: ``(N,)``.
    """
    action = np.array(names)[chances.argmax(1)]
    truth, kind = np.array([row["skill"] for row in rows]), np.array([row["kind"] for row in rows])
    known, right, command = action != REMOTE, action == truth, truth != REMOTE
    found: dict[str, Any] = {
        "commands_right": float(right[command].mean()),
        "commands_handed_on": float((~known)[command].mean()),
        **{f"{k}_handed_on": float((~known)[kind == k].mean()) for k in ("remote", "oos") if (kind == k).any()},
        "auroc": auroc(right[known].astype(float), signal[known]),
    }
    draws = np.random.default_rng(seed)
    for target in TARGETS:
        kept, wrong = [], []
        for draw in range(DRAWN):
            picked = draws.choice(len(rows), len(rows))
            picked = picked[known[picked]]
            tested = strictest_to_laxest(signal[picked], ~right[picked], target=target, level=LEVEL, seed=draw)
            keeps = known & (signal >= tested.least)
            kept.append(keeps[command].mean())
            wrong.append((keeps & ~right).sum() / max(1, keeps.sum()))
        found[f"at_{target:g}"] = {
            "commands_kept": round(float(np.mean(kept)), 4),
            "nothing_kept": round(float(np.mean(np.array(kept) == 0)), 4),
            "wrong_of_kept": round(float(np.mean(wrong)), 4),
        }
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def cost(learnt: Sequence[dict[str, str]], asked: Sequence[str]) -> dict[str, Any]:
    """What a second opinion takes: processor time to fit it and for one request, and its size in a file."""
    began = time.process_time()
    opinion = SecondOpinion.fit([row["prompt"] for row in learnt], [row["skill"] for row in learnt])
    fitted, times = time.process_time() - began, []
    for prompt in asked:
        began = time.process_time()
        opinion.chances(prompt)
        times.append(1000 * (time.process_time() - began))
    with TemporaryDirectory() as folder:
        size = file_of(Path(folder), opinion.save(Path(folder))).stat().st_size
    return {
        "rows": len(learnt),
        "actions": len(opinion.actions),
        "fit_seconds": round(fitted, 1),
        "request_milliseconds": round(statistics.median(times), 2),
        "bytes": size,
    }


def validation(edge: str, train: str) -> dict[str, Any]:
    """Both judges on the validation rows, alone and joined."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(edge).eval(), AutoTokenizer.from_pretrained(edge)
    rows = [row for split in ("validation_normal", "validation_remote", "validation_oos") for row in robot.load(split)]
    learnt, prompts = rows_to_learn(train), [row["prompt"] for row in rows]
    opinion = SecondOpinion.fit([row["prompt"] for row in learnt], [row["skill"] for row in learnt])
    trie, weighed = (ActionTrie.of(tokenizer, robot.SKILLS, each) for each in (None, opinion))
    names = list(trie.actions)
    chosen = [choose(model, tokenizer, prompts, each, system=robot.SYSTEM) for each in (trie, weighed)]
    own, led = (np.array([[one.probabilities[name] for name in names] for one in ones]) for ones in chosen)
    other = np.array([[chances[name] for name in names] for chances in map(opinion.chances, prompts)])
    whole, half = own * other, np.sqrt(own) * other
    ways = {
        "device": own,
        "classifier": other,
        "product at every branch": led,
        "product of the whole": whole / whole.sum(1, keepdims=True),
        "the device's root times the classifier": half / half.sum(1, keepdims=True),
        "mean": (own + other) / 2,
    }
    judged = {way: (chances, chances.max(1)) for way, chances in ways.items()}
    judged["product, agreement"] = (led, np.take_along_axis((own + other) / 2, led.argmax(1)[:, None], 1)[:, 0])
    asked = {"robot": [i for i, row in enumerate(rows) if row["kind"] != "oos"], "robot_oos": list(range(len(rows)))}
    return {
        name: {
            "n": len(places),
            "ways": {way: worth(c[places], names, [rows[i] for i in places], s[places]) for way, (c, s) in judged.items()},
        }
        for name, places in asked.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("edge", help="folder of an edge model of the robot set")
    parser.add_argument("--train", default="robot", choices=sorted(robot.SETS), help="what it was trained on")
    parser.add_argument("--about", default="", help="how it was trained, for the record")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--same-penalty", action="store_true", help="take the trials of C from the record that is there")
    options = parser.parse_args()
    prepare_cpu(1)
    before = json.loads(options.out.read_text(encoding="utf-8")) if options.same_penalty else None
    penalty = penalties(rows_to_learn(options.train)) if before is None else before["penalty"]
    record = {
        "train": options.train,
        "about": options.about,
        "penalty": {**penalty, "used": C},
        "cost": cost(rows_to_learn(options.train), [row["prompt"] for row in robot.load("validation_normal")]),
        "validation": validation(options.edge, options.train),
        "drawn": DRAWN,
        "level": LEVEL,
        "machine": environment(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_json(options.out, record)
    for name, part in record["validation"].items():
        print(f"{name}, {part['n']} rows")
        for way, found in part["ways"].items():
            print(f"  {way:40s}", found)


if __name__ == "__main__":
    main()

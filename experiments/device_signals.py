"""Which signal tells a device's right answers from its wrong ones: ``python -m experiments.device_signals CELL``.

A trained cell of :mod:`experiments.device_search` answers the development rows as a server would: freely, with the five signals
of its tokens, and by choosing among the known actions, with the probability of the one it chose. No test row is read. What a
decision costs is measured with one thread on this model, and on the whole base it was cut from.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.device_plan import PLAN, WORK, read_plan
from experiments.device_problems import WRONG
from experiments.device_search import Training
from experiments.measuring import processor
from experiments.spec import RECORDS
from shadowpeft.constrained import choose
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.robot import SYSTEM, parse_action
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate import wilson
from shadowpeft.evaluate.record import commit
from shadowpeft.generate import answer
from shadowpeft.hf.base.load import load_base
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.calibration import auroc
from shadowpeft.serve.router import ACTION, SIGNALS, action_probability, decisive, settled, signals
from shadowpeft.serve.scoring import scored_answers
from shadowpeft.storage import write_json

FOLDER = RECORDS / "device-signals"
TIMED = 8
"""Development rows whose decisions are timed, one by one."""


def judged(rows: Sequence[dict[str, str]], answers: Sequence[Any], chosen: bool) -> dict[str, Any]:
    """Accuracy of the answers, and what each signal is worth.

    ``auroc_known``: among known actions, as ``route calibrate`` reports it. ``auroc_all``: over all rows, where what is handed
    on counts as least sure. ``right_and_kept``: share of commands that are right and kept at the laxest threshold at which at
    most ``WRONG`` of what is kept is wrong; it is chosen on the same rows, so this is a ceiling and no guarantee.
    """
    found = [decisive(pieces, parse_action) for pieces, _ in answers]
    own = [scores.first(n) for (n, _), (_, scores) in zip(found, answers, strict=True)]
    actions = [action for _, action in found]
    kept = np.array([action not in (None, REMOTE) for action in actions])
    right = np.array([k and a == row["skill"] for k, a, row in zip(kept, actions, rows, strict=True)], dtype=float)
    command = np.array([row["skill"] != REMOTE for row in rows])
    values = [{ACTION: action_probability(s)} if chosen else signals(s) for s in own]
    per_signal = {}
    for name in (ACTION,) if chosen else SIGNALS:
        score = np.where(kept, [value[name] for value in values], -np.inf)
        # roc_auc_score takes no infinite number
        rank = np.where(kept, score, score[kept].min() - 1.0)
        order = np.argsort(-rank, kind="stable")[: int(kept.sum())]
        wrong = np.cumsum(1 - right[order]) / np.arange(1, len(order) + 1)
        allowed = np.flatnonzero(wrong <= WRONG)
        ceiling = float(right[order[: allowed[-1] + 1]].sum() / command.sum()) if len(allowed) else 0.0
        per_signal[name] = {
            "auroc_known": auroc(right[kept], score[kept]),
            "auroc_all": auroc(right, rank),
            "right_and_kept": ceiling,
        }
    hits, n = int(right[command].sum()), int(command.sum())
    return {
        "known_actions": int(kept.sum()),
        "wrong_of_these": int(kept.sum() - right.sum()),
        "commands": {"score": hits / n, "interval": list(wilson(hits, n)), "n": n},
        "open_handed_on": {"score": float(1 - kept[~command].mean()), "n": int((~command).sum())},
        "signals": per_signal,
    }


def milliseconds(work: Callable[[str], Any], prompts: Sequence[str]) -> dict[str, float]:
    """Median wall and processor time of one prompt."""
    work(prompts[0])
    wall, used = [], []
    for prompt in prompts:
        began, before = time.perf_counter(), time.process_time()
        work(prompt)
        wall.append(1000 * (time.perf_counter() - began))
        used.append(1000 * (time.process_time() - before))
    return {"wall": round(statistics.median(wall), 1), "processor": round(statistics.median(used), 1)}


def costs(model: Any, tokenizer: Any, trie: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """What a decision costs, one prompt at a time: free until its action is known, and chosen, greedily and exactly."""
    backend = Detached(model, tokenizer, "edge")

    def engine(prompt: str, actions: Any) -> Any:
        return scored_answers(
            backend,
            "edge",
            [prompt],
            system=SYSTEM,
            max_tokens=16,
            until=lambda pieces, _: settled(pieces, parse_action),
            actions=actions,
        )

    return {
        "choose_greedy": milliseconds(
            lambda p: choose(model, tokenizer, [p], trie, system=SYSTEM, exact=False), prompts
        ),
        "choose_exact": milliseconds(lambda p: choose(model, tokenizer, [p], trie, system=SYSTEM), prompts),
        "engine_choosing": milliseconds(lambda p: engine(p, trie), prompts),
        "engine_free": milliseconds(lambda p: engine(p, None), prompts),
        "generate_free": milliseconds(
            lambda p: answer(model, tokenizer, [p], system=SYSTEM, max_new_tokens=10), prompts
        ),
    }


def measure(name: str, plan: Path, work: Path) -> dict[str, Any]:
    """The record of a cell."""
    cells = [cell for cell in read_plan(plan) if cell.name == name]
    if not cells:
        raise ConfigError(f"the plan has no cell '{name}'")
    if not (work / name / "state.pt").is_file():
        raise ConfigError(f"'{work / name}' has no state; run the cell first: python -m experiments.device_search run")
    prepare_cpu(1)
    training = Training(cells[-1], work)
    problem, rows = training.problem, training.problem.split.development
    prompts = [row["prompt"] for row in rows]
    ways: dict[str, Any] = {}
    with training.judged_weights():
        model, tokenizer, trie = problem.model.eval(), problem.tokenizer, problem.trie
        for way, actions in (("free", None), ("chosen", trie)):
            answers = scored_answers(
                Detached(model, tokenizer, "edge"),
                "edge",
                prompts,
                system=SYSTEM,
                max_tokens=16,
                until=lambda pieces, _: settled(pieces, parse_action),
                actions=actions,
            )
            ways[way] = judged(rows, answers, actions is not None)
        greedy = [decisive(pieces, parse_action)[1] for pieces, _ in answers]
        exact = choose(model, tokenizer, prompts, trie, system=SYSTEM, batch_size=32)
        same = sum(one.action == action for one, action in zip(exact, greedy, strict=True))
        times = {f"{cells[-1].layers} layers": costs(model, tokenizer, trie, prompts[:: len(prompts) // TIMED])}
    whole = load_base(cells[-1].base).eval()
    times["the whole base"] = costs(whole, tokenizer, trie, prompts[:: len(prompts) // TIMED])
    return {
        "id": f"device-signals/{name}",
        "kind": "device-signals",
        "cell": name,
        "cell_settings_sha256": cells[-1].digest(),
        "passes": training.at["pass"],
        "rows": "development rows; no test row was looked at",
        "data": problem.data()["development"],
        "n": len(rows),
        **ways,
        "greedy_is_exact": {"same": same, "n": len(rows)},
        "milliseconds": times,
        "threads": 1,
        "commit": commit(),
        "versions": environment(),
        "processor": processor(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(arguments: list[str] | None = None) -> int:
    """0: done; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m experiments.device_signals", description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a trained cell")
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--work", type=Path, default=WORK, help="where its state is")
    chosen = parser.parse_args(arguments)
    try:
        record = measure(chosen.name, chosen.plan, chosen.work)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_json(FOLDER / f"{chosen.name}.json", record)
    print(record["free"], record["chosen"], record["greedy_is_exact"], record["milliseconds"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

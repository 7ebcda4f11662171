"""What the demo measures: rival, device, cloud and both together on the same unseen requests, the device calibrated before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import shadowpeft
from shadowpeft.apps.common import bar
from shadowpeft.apps.demo_picture import NAMES
from shadowpeft.apps.detach import save_edge
from shadowpeft.apps.intents import rows_to_learn
from shadowpeft.apps.second_opinion import fitted
from shadowpeft.constrained import choose
from shadowpeft.data import robot
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE, written
from shadowpeft.data.declined import Beginnings, DeclinedRequests, may_change
from shadowpeft.evaluate import accuracy, rival
from shadowpeft.evaluate.record import commit
from shadowpeft.generate import answer
from shadowpeft.runtime import environment
from shadowpeft.serve.calibrated import sketch
from shadowpeft.serve.calibration import Sample, calibrate
from shadowpeft.serve.router import ACTION, FILE, KNOWN, TAGGED, UNSURE, Calibration

TARGET, STRICT, LEVEL = 0.05, 0.03, 0.95
"""At most this share of what the device keeps is wrong, with this confidence: as ``route calibrate`` has it, and a stricter one
that is told of beside it."""
WORDS = 8
"""Tokens of an answer that are read for its action."""
TIMED = 40
"""Requests whose decision is timed, one by one."""
Row = dict[str, str]


def measure(
    model: Any, tokenizer: Any, folder: Path, requests: Sequence[str], console: Console, *, learnt: str
) -> dict[str, Any]:
    """Detach, calibrate on the calibration rows, score the test rows, answer ``requests``; writes ``folder/edge``.

    ``learnt``: the packaged set that the model was trained on, which its second opinion and the rival learn too.
    """
    edge = shadowpeft.detach(model)
    files = save_edge(edge, tokenizer, folder / "edge")
    opinion = fitted(rows_to_learn(learnt), learnt, console)
    tries = {"device": ActionTrie.of(tokenizer, robot.SKILLS)}
    tries["second"] = ActionTrie.of(tokenizer, robot.SKILLS, opinion)

    def decide(rows: Sequence[Row], name: str, label: str) -> list[tuple[str, float]]:
        with bar(console, f"{label}, {NAMES[name]}", len(rows)) as progress:
            prompts = [row["prompt"] for row in rows]
            found = choose(edge, tokenizer, prompts, tries[name], exact=False, system=robot.SYSTEM, progress=progress)
        return [(c.action, c.probability) for c in found]

    def say(rows: Sequence[Row], label: str, actions: Any = None) -> list[str | None]:
        with bar(console, label, len(rows)) as progress:
            options: dict[str, Any] = {"system": robot.SYSTEM, "max_new_tokens": WORDS, "batch_size": 32}
            prompts = [row["prompt"] for row in rows]
            answers = answer(model, tokenizer, prompts, progress=progress, actions=actions, **options)
        return [robot.parse_action(a.text) for a in answers]

    fit = robot.load("calibration_normal") + robot.load("calibration_remote")
    made = {name: samples(fit, decide(fit, name, "calibrating")) for name in tries}

    def calibrated(target: float) -> dict[str, Calibration]:
        return {name: calibrate(each, target=target, level=LEVEL, signal=ACTION) for name, each in made.items()}

    calibrations, strict = calibrated(TARGET), calibrated(STRICT)
    calibration = replace(calibrations["second"], opinion=opinion.save(folder / "edge"))
    calibration.report.update(system=robot.SYSTEM, model=sketch(edge))
    calibration.save(folder / "edge" / FILE)
    test = robot.load("test_normal") + robot.load("test_remote_large")
    decided = {name: decide(test, name, "test") for name in tries}
    with console.status("rival"):
        began = time.monotonic()
        svc = rival.fit_robot(learnt)
        seconds = time.monotonic() - began
        labels = rival.predict(svc, [row["prompt"] for row in test])[0]
    spoken = say(test, "cloud")
    begin = Beginnings.of(tokenizer, model.config.vocab_size)

    def again(rows: Sequence[Row], chances: Mapping[str, float]) -> list[str | None]:
        return say(rows, "cloud, told of the device's [REMOTE]", DeclinedRequests(begin, chances))

    handed = handed_on(test, decided["second"], spoken, again)

    def keeping(by_name: Mapping[str, Calibration]) -> dict[str, list[bool]]:
        return {name: [a != REMOTE and by_name[name].keeps(p) for a, p in decided[name]] for name in tries}

    kept = keeping(calibrations)
    actions = {name: [action for action, _ in decided[name]] for name in tries}
    routed = [a if k else other for a, other, k in zip(actions["second"], handed, kept["second"], strict=True)]

    def told(target: float, kept: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
        alone = shares(test, actions["device"], kept["device"])
        about = {"target": target, "level": LEVEL, "signal": ACTION, "rows": len(fit)}
        return {**about, **shares(test, actions["second"], kept["second"]), "alone": alone}

    methods = {"rival": labels, **actions, "cloud": spoken, "routed": routed}
    size = {
        "base_parameters": sum(p.numel() for n, p in model.named_parameters() if "shadowpeft_" not in n),
        "adapter_parameters": sum(p.numel() for n, p in model.named_parameters() if "shadowpeft_" in n),
        "adapter_bytes": (folder / "run" / "adapter" / "adapter_model.safetensors").stat().st_size,
        "edge_parameters": files["parameters"],
        "edge_bytes": files["bytes"],
        "rival_parameters": int(svc.steps[-1][1].coef_.size),
        "opinion_parameters": opinion.parameters,
    }
    return {
        "methods": {name: worth(test, actions) for name, actions in methods.items()},
        "calibrated": told(TARGET, kept),
        "strict": told(STRICT, keeping(strict)),
        "rival_seconds": round(seconds, 1),
        "milliseconds": times(svc, edge, model, tokenizer, tries, test),
        "size": size,
        "requests": [one(request, edge, model, tokenizer, tries["second"], calibration, begin) for request in requests],
        "machine": environment(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def handed_on(
    rows: Sequence[Row],
    decided: Sequence[tuple[str, float]],
    spoken: Sequence[str | None],
    again: Callable[[Sequence[Row], Mapping[str, float]], list[str | None]],
) -> list[str | None]:
    """The cloud's actions where the device's ``[REMOTE]`` goes along with the request.

    Args:
        decided: the device's actions and their probabilities. spoken: the cloud's actions by itself.
        again: asks the cloud once more about the rows whose answers that may change, told of the chances by prompt.
    """
    each = enumerate(zip(decided, spoken, strict=True))
    places = [n for n, ((action, p), said) in each if action == REMOTE and may_change(p, said is not None)]
    said = again([rows[n] for n in places], {rows[n]["prompt"]: decided[n][1] for n in places}) if places else []
    told = dict(zip(places, said, strict=True))
    return [told.get(n, own) for n, own in enumerate(spoken)]


def samples(rows: Sequence[Row], decided: Sequence[tuple[str, float]]) -> list[Sample]:
    """The device's decisions on rows whose right action is known."""
    return [
        Sample(
            kept=action != REMOTE,
            right=action == row["skill"] != REMOTE,
            signals={ACTION: p},
            is_open=row["skill"] == REMOTE,
            tagged=action == REMOTE,
        )
        for row, (action, p) in zip(rows, decided, strict=True)
    ]


def worth(rows: Sequence[Row], actions: Sequence[str | None]) -> dict[str, Any]:
    """Commands with the right action, open requests without any, and commands without any, each with its interval."""
    pairs = list(zip(rows, actions, strict=True))
    commands = [(row, action) for row, action in pairs if row["skill"] != REMOTE]
    idle = (REMOTE, None)
    return {
        "commands": accuracy([action == row["skill"] for row, action in commands]),
        "en": accuracy([action == row["skill"] for row, action in commands if row["lang"] == "en"]),
        "zh": accuracy([action == row["skill"] for row, action in commands if row["lang"] == "zh"]),
        "open_handed_on": accuracy([action in idle for row, action in pairs if row["skill"] == REMOTE]),
        "commands_handed_on": accuracy([action in idle for _, action in commands]),
    }


def shares(rows: Sequence[Row], actions: Sequence[str], kept: Sequence[bool]) -> dict[str, Any]:
    """What the calibrated device keeps: of the commands, of the open requests, and how much of it is wrong."""
    triples = list(zip(rows, actions, kept, strict=True))
    return {
        "commands_kept": accuracy([k for row, _, k in triples if row["skill"] != REMOTE]),
        "open_kept": accuracy([k for row, _, k in triples if row["skill"] == REMOTE]),
        "wrong_of_kept": accuracy([action != row["skill"] for row, action, k in triples if k]),
        "wrong_of_kept_commands": accuracy([a != row["skill"] for row, a, k in triples if k and row["skill"] != REMOTE]),
    }


def times(
    svc: Any, edge: Any, model: Any, tokenizer: Any, tries: Mapping[str, ActionTrie], rows: Sequence[Row]
) -> dict[str, float]:
    """Median milliseconds of one decision, one request at a time, on one thread."""
    prompts = [row["prompt"] for row in rows[:: max(1, len(rows) // TIMED)]][:TIMED]
    threads = torch.get_num_threads()

    def decision(trie: ActionTrie) -> float:
        return median(lambda p: choose(edge, tokenizer, [p], trie, exact=False, system=robot.SYSTEM), prompts)

    def median(ask: Callable[[str], Any], asked: Sequence[str]) -> float:
        ask(asked[0])
        found = []
        for prompt in asked:
            began = time.perf_counter()
            ask(prompt)
            found.append(1000 * (time.perf_counter() - began))
        return round(statistics.median(found), 2)

    torch.set_num_threads(1)
    try:
        return {
            "rival": median(lambda p: rival.predict(svc, [p]), prompts),
            **{name: decision(trie) for name, trie in tries.items()},
            "cloud": median(
                lambda p: answer(model, tokenizer, [p], system=robot.SYSTEM, max_new_tokens=WORDS), prompts[::4]
            ),
        }
    finally:
        torch.set_num_threads(threads)


def one(
    request: str, edge: Any, model: Any, tokenizer: Any, trie: ActionTrie, calibration: Calibration, begin: Beginnings
) -> dict[str, Any]:
    """One request by the paper's procedure: the device first, the cloud if it hands on, told if the device found no action."""
    began = time.perf_counter()
    (chosen,) = choose(edge, tokenizer, [request], trie, exact=False, system=robot.SYSTEM)
    sure = calibration.keeps(chosen.probability)
    reason = TAGGED if chosen.action == REMOTE else KNOWN if sure else UNSURE
    text = written(chosen.action)
    if reason != KNOWN:
        declined = DeclinedRequests(begin, {request: chosen.probability}) if reason == TAGGED else None
        text = answer(model, tokenizer, [request], system=robot.SYSTEM, max_new_tokens=40, actions=declined)[0].text
    return {
        "request": request,
        "where": "device" if reason == KNOWN else "cloud",
        "reason": reason,
        "action": chosen.action,
        "probability": round(chosen.probability, 4),
        "answer": text,
        "milliseconds": round(1000 * (time.perf_counter() - began)),
    }

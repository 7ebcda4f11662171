"""Every row of every implementation in a child process with a time limit: a crash or a hang is an outcome, too."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import zoo

from benchmarks.comparison.modes import architecture
from benchmarks.comparison.page import shown
from benchmarks.comparison.peers import KINDS, Row


def forked(run: Callable[[], Any], seconds: int = 300) -> dict[str, Any]:
    """``{"value": ...}`` or ``{"value": None, "reason": ...}`` of ``run`` in a child process with a time limit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        signal.alarm(seconds)
        try:
            result: dict[str, Any] = {"value": run()}
        except Exception as error:  # noqa: BLE001  (a peer may fail in any way; how it does is what is recorded)
            first = (str(error).strip().splitlines() or [""])[0]
            result = {"value": None, "reason": f"{type(error).__name__}: {first}"[:200]}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if said else {"value": None, "reason": f"ended by signal {-status} ({seconds} s limit)"}


def measure(rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """Every row for every implementation."""
    outcomes: dict[str, dict[str, Any]] = {}
    for key, row in rows.items():
        outcomes[key] = {kind: forked(partial(row.ask, kind)) for kind in KINDS}
        text = ", ".join(f"{kind} {shown(outcome)}" for kind, outcome in outcomes[key].items())
        print(f"{row.label}: {text}", file=sys.stderr, flush=True)
    return outcomes


def architectures(limit: int | None) -> dict[str, Any]:
    """How many architectures each implementation handles, of those whose stock model is sound by itself."""
    names = zoo.decoders()
    chosen = names if limit is None else names[:: max(1, len(names) // limit)][:limit]
    sound = [name for name in chosen if forked(partial(architecture, "base", name), 60)["value"] is True]
    result: dict[str, Any] = {"of": len(sound), "tried": len(chosen), "fails": {}}
    for kind in KINDS:
        outcomes = {name: forked(partial(architecture, kind, name), 60) for name in sound}
        result[kind] = sum(outcome["value"] is True for outcome in outcomes.values())
        result[f"{kind}_attached"] = sum(bool(outcome["value"]) for outcome in outcomes.values())
        result["fails"][kind] = {
            name: outcome.get("reason") or outcome["value"] or "wrong"
            for name, outcome in outcomes.items()
            if outcome["value"] is not True
        }
        print(f"architectures: {kind} {result[kind]} of {len(sound)}", file=sys.stderr, flush=True)
    return result

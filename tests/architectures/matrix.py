"""Runs the checks of one architecture in a process of its own, with a limit of time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import checks
import torch
import zoo

LIMIT = 60
"""Seconds of processor time that one architecture may take; ten times as many by the clock, for what waits for ever."""

_LATE = (signal.SIGPROF, signal.SIGALRM)


def isolated(work: Callable[[str], dict[str, Any]], name: str, limit: float = LIMIT) -> dict[str, Any]:
    """``work(name)`` in a forked process: a crash, a hang or a leak of one architecture is that one's alone.

    Returns:
        the result of ``work`` with ``seconds``, or ``error`` if the process died or ran out of time.
    """
    start = time.perf_counter()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        for late in _LATE:
            signal.signal(late, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, limit)
        signal.setitimer(signal.ITIMER_REAL, 10 * limit)
        try:
            result = work(name)
        except BaseException as error:  # noqa: BLE001  (the parent reports it)
            result = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "wb") as out:
            out.write(json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        content = source.read()
    _, status = os.waitpid(child, 0)
    if not content:
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in _LATE
        content = json.dumps(
            {"error": f"took more than {limit} s" if late else f"the process died ({status})"}
        ).encode()
    return {**json.loads(content), "seconds": round(time.perf_counter() - start, 2)}


def bare(name: str, build: Callable[[str], Any] = zoo.build) -> dict[str, Any]:
    """Whether the tiny base alone works here: finite logits, the same tokens and logits with its cache as without."""
    model = build(name)
    ids = torch.randint(2, zoo.VOCAB - 2, (2, 12), generator=torch.Generator().manual_seed(3))
    if not bool(torch.isfinite(checks.logits(model, ids)).all()):
        return {"error": "its logits are not finite"}
    if not torch.equal(checks.greedy(model, ids, True), checks.greedy(model, ids, False)):
        return {"error": "the bare model itself gives other tokens with its cache than without"}
    if not checks.caches_like_the_whole(model, ids):
        return {"error": "the bare model itself gives other logits with its cache than without"}
    return {"parameters": sum(p.numel() for p in model.parameters())}


def shadowed(name: str, build: Callable[[str], Any] = zoo.build) -> dict[str, Any]:
    """All steps of :func:`checks.check`; ``failed`` names the first that does not hold."""
    try:
        return {"passed": True, **checks.check(name, build)}
    except checks.StepFailed as error:
        return {"passed": False, "failed": error.step, "refused": error.refused, "reason": error.reason}


def published(name: str) -> dict[str, Any]:
    """:func:`bare` and :func:`shadowed` of the configuration that a checkpoint has."""
    alone = bare(name, zoo.build_published)
    return {**alone, **shadowed(name, zoo.build_published)} if "error" not in alone else alone

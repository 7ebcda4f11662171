"""What a long prompt costs a short neighbour, by the size of the pieces it is read in: docs/records/prefill-pieces.json.

A short request makes tokens with SmolLM2-135M and a shadow, on one thread, when a prompt of 2,000 tokens comes. Measured are
the time between two tokens of the short one while the prompt is read, and the time to the first token of the long one, both in
seconds of this process's processor time, which other work on the machine stretches least. Five minutes on an idle core:
``python -m scripts.prefill_pieces``
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import track

import shadowpeft
from shadowpeft.apps.common import quiet_libraries
from shadowpeft.hf.base.load import load_base
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.serve.backend import Attached, Backend
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.requests import Event, Failed, Finish, SamplingParams, Token
from shadowpeft.storage import write_json
from shadowpeft.tokenizer import load_tokenizer

RECORD = Path(__file__).parents[1] / "docs" / "records" / "prefill-pieces.json"
BASE = "smollm2-135m"
SHORT, ALONE = 16, 12
"""Tokens of the short prompt, and tokens of its answer before the long prompt comes."""


class Watch:
    """When each token of a request came, in processor time, and how it ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.came, self.ended = threading.Semaphore(0), threading.Event()
        self.error: BaseException | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.times.append(time.process_time())
            self.came.release()
        if isinstance(event, Failed):
            self.error = event.error
        if isinstance(event, (Finish, Failed)):
            self.came.release()
            self.ended.set()


def beside(backend: Backend, piece: int, prompt: int) -> dict[str, float]:
    """One long prompt beside one short answer, in milliseconds of processor time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (prompt + SHORT,), generator=generator).tolist()
    engine = Engine(backend, EngineLimits(prefill_tokens=piece, prompt_tokens=prompt, new_tokens=1024))
    engine.start()
    short, long = Watch(), Watch()
    running = engine.submit(ids[:SHORT], "default", SamplingParams(max_tokens=1024), short)
    for _ in range(ALONE):
        short.came.acquire()
    began = time.process_time()
    engine.submit(ids[SHORT:], "default", SamplingParams(max_tokens=1), long)
    long.ended.wait()
    running.cancelled = True
    engine.stop()
    for watch in (short, long):
        if watch.error is not None:
            raise watch.error
    first = long.times[0]
    gaps = [b - a for a, b in zip(short.times, short.times[1:], strict=False) if a < first and b > began]
    alone = [b - a for a, b in zip(short.times[1:], short.times[2:], strict=False) if b <= began]
    return {
        "alone_ms": 1000 * statistics.median(alone),
        "beside_ms": 1000 * statistics.median(gaps),
        "longest_ms": 1000 * max(gaps),
        "prompt_ms": 1000 * (first - began),
        "tokens_meanwhile": len(gaps),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet_libraries()
    prepare_cpu(1)
    config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=16)
    model: Any = get_peft_model(load_base(BASE), config).eval()
    backend = Attached(model, load_tokenizer(BASE), {"default": BASE}, "base")
    backend.stop_token_ids = frozenset()  # every answer has its full length
    jobs = [piece for _ in range(options.rounds) for piece in options.pieces]
    rounds: dict[int, list[dict[str, float]]] = {piece: [] for piece in options.pieces}
    for piece in track(jobs, "measuring", console=Console(stderr=True)):
        rounds[piece].append(beside(backend, piece, options.prompt))
    rows = [
        {"piece": piece, **{key: round(statistics.median(r[key] for r in found), 1) for key in found[0]}}
        for piece, found in rounds.items()
    ]
    record = {
        "base": f"{BASE}, float32, shadow of r 16, one thread",
        "measured": f"processor time beside other work, medians of {options.rounds} rounds",
        "prompt_tokens": options.prompt,
        "pieces": rows,
        "machine": environment(),
    }
    write_json(RECORD, record)


if __name__ == "__main__":
    main()

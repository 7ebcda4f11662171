"""Device answers with their scores, made by the engine that also serves: what is calibrated is what will be served."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shadowpeft.data.chat import render_prompt, with_system
from shadowpeft.serve.backend import Backend
from shadowpeft.serve.engine import Engine, Event, Failed, Limits, Sampling, Token
from shadowpeft.serve.router import Scores


class _Collector:
    def __init__(self, done: Callable[[], None]) -> None:
        self.pieces: list[str] = []
        self.scores = Scores()
        self.failure: BaseException | None = None
        self.finished = threading.Event()
        self._done = done

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.pieces.append(event.piece)
            self.scores.logprob.append(event.logprob)
            self.scores.margin.append(event.margin)
            self.scores.entropy.append(event.entropy)
            return
        if isinstance(event, Failed):
            self.failure = event.error
        self.finished.set()
        self._done()


def scored_answers(
    backend: Backend,
    name: str,
    prompts: list[str],
    *,
    system: str | None,
    max_tokens: int,
    rows: int = 16,
    until: Callable[[list[str], Scores], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[list[str], Scores]]:
    """Greedy answers to user messages: the text each token added, and what the model thought of the tokens.

    Args:
        name: which of the backend's names answers. rows: requests at the same time.
        until: see :meth:`Engine.submit`. progress: takes the number done.

    Raises:
        DataError: if a prompt does not fit the model.
    """
    lock, done = threading.Lock(), 0

    def count() -> None:
        nonlocal done
        with lock:
            done += 1
            if progress is not None:
                progress(done)

    engine = Engine(
        backend, Limits(rows=rows, queue=len(prompts) + 1, prompt_tokens=backend.context, new_tokens=backend.context)
    )
    collectors = []
    for prompt in prompts:
        ids = _prompt_ids(backend.tokenizer, prompt, system)
        collectors.append(_Collector(count))
        engine.submit(ids, name, Sampling(max_tokens=max_tokens), collectors[-1], until)
    engine.start()
    try:
        for collector in collectors:
            collector.finished.wait()
            if collector.failure is not None:
                raise collector.failure
    finally:
        engine.stop()
    return [(c.pieces, c.scores) for c in collectors]


def _prompt_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    chat = with_system([{"role": "user", "content": prompt}], system)
    ids: list[int] = tokenizer(render_prompt(tokenizer, chat), add_special_tokens=False).input_ids
    return ids

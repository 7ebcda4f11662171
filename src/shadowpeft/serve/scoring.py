"""Device answers with their scores, made by the engine that also serves: what is calibrated is what will be served."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable
from typing import Any

from shadowpeft.data.action_trie import Actions
from shadowpeft.data.chat import render_prompt, with_system
from shadowpeft.errors import DataError
from shadowpeft.serve.backend import Backend
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.requests import Event, Failed, SamplingParams, Token
from shadowpeft.serve.router import Scores


def scored_answers(
    backend: Backend,
    name: str,
    prompts: list[str],
    *,
    system: str | None,
    max_tokens: int,
    rows: int = EngineLimits.max_num_seqs,
    places: list[str] | None = None,
    until: Callable[[list[str], Scores], bool] | None = None,
    actions: Actions | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[list[str], Scores]]:
    """Greedy answers to user messages: the text each token added, and what the model thought of the tokens.

    Args:
        name: which of the backend's names answers. rows: requests at the same time. places: where each prompt stands.
        until, actions: see :meth:`Engine.submit`. progress: takes the number done.

    Raises:
        DataError: if a prompt does not fit the model, with its place.
    """
    longest = backend.max_model_len
    limits = EngineLimits(
        max_num_seqs=rows,
        queue=len(prompts) + 1,
        prompt_tokens=longest,
        new_tokens=longest,
        answer_seconds=math.inf,  # the last prompt waits for all others
    )
    engine = Engine(backend, limits)
    answers: list[list[Token]] = [[] for _ in prompts]
    ends: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def reader(tokens: list[Token]) -> Callable[[Event], None]:
        return lambda event: tokens.append(event) if isinstance(event, Token) else ends.put(event)

    for i, (prompt, tokens) in enumerate(zip(prompts, answers, strict=True)):
        ids = _prompt_ids(backend.tokenizer, prompt, system)
        held = None if actions is None else actions.start(prompt)
        try:
            engine.submit(ids, name, SamplingParams(max_tokens=max_tokens), reader(tokens), until, held)
        except DataError as error:
            if places is None:
                raise
            raise DataError(f"{places[i]}: {error}") from error
    engine.start()
    try:
        for done in range(1, len(prompts) + 1):
            end = ends.get()
            if isinstance(end, Failed):
                raise end.error
            if progress is not None:
                progress(done)
    finally:
        engine.stop()
    return [([token.piece for token in tokens], Scores.of(tokens)) for tokens in answers]


def _prompt_ids(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    chat = with_system([{"role": "user", "content": prompt}], system)
    ids: list[int] = tokenizer(render_prompt(tokenizer, chat), add_special_tokens=False).input_ids
    return ids

"""Text from a model, attached or detached: batched greedy or sampled answers to chat prompts, and why one is handed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from queue import Queue
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from shadowpeft.data.action_trie import Actions, ActionTrie, Choices
from shadowpeft.data.chat import render_prompt, stop_tokens, with_system
from shadowpeft.data.padding import pad_inputs
from shadowpeft.decode import Decoder, decode
from shadowpeft.errors import ConfigError, DataError


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    tokens: int
    seconds: float
    """Wall time of the batch it was made in, divided by the batch size."""
    ended: bool = True
    """Whether the model has ended it; False: it was cut at its longest."""


def encode_prompts(
    tokenizer: Any, prompts: list[list[dict[str, Any]]], device: Any, template: list[dict[str, Any]] | None = None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(B, T)`` of rendered chats, padded on the left; ``template``: options of each."""
    ids = [
        tokenizer(render_prompt(tokenizer, prompt, **told), add_special_tokens=False).input_ids
        for prompt, told in zip(prompts, template or [{}] * len(prompts), strict=True)
    ]
    return pad_inputs(ids, tokenizer.pad_token_id, "left", device)


@torch.inference_mode()
def answer(
    model: nn.Module,
    tokenizer: Any,
    prompts: list[str] | list[list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    system: str | None = None,
    progress: Callable[[int], None] | None = None,
    actions: Actions | Sequence[Actions] | None = None,
    template: list[dict[str, Any]] | None = None,
    **sampling: Any,
) -> list[Answer]:
    """Answers to prompts, in their order; greedy unless ``sampling`` says otherwise (``do_sample``, ``temperature``, ...).

    With ``speculative`` (:class:`~shadowpeft.hf.forward.speculation.Speculation`) an attached model's shadow drafts them.

    Prompts are sorted by length into batches, so that little is padded.

    Args:
        prompts: user messages, or whole message lists. system: system message for prompts that bring none.
        progress: called with the number of prompts done after each batch.
        actions: each answer starts with one of these, and is free after it; a temperature applies among them. As a list:
            those of each prompt.
        template: for each prompt what its chat template is told beside the messages, such as ``tools``; None: nothing.

    Raises:
        ConfigError: if ``prompts`` is one text, ``max_new_tokens`` is too low for the longest action, or a list of actions is
            not as long as ``prompts``.
        DataError: if a prompt with its answer does not fit the model's context.
    """
    chats = chats_of(prompts, system)
    if not chats:
        return []
    told = template or [{}] * len(chats)
    prepared = [render_prompt(tokenizer, chat, **each) for chat, each in zip(chats, told, strict=True)]
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in prepared]
    if isinstance(actions, ActionTrie) and max_new_tokens < actions.longest:
        raise ConfigError(f"max_new_tokens is {max_new_tokens} but an action has {actions.longest} tokens; raise it")
    if isinstance(actions, Sequence) and len(actions) != len(chats):
        raise ConfigError(f"actions has {len(actions)} entries for {len(chats)} prompts; pass one for each, or one for all")
    check_room(model, max(lengths), max_new_tokens)
    ends = stop_tokens(model, tokenizer)
    order = sorted(range(len(chats)), key=lambda i: lengths[i])
    device = next(model.parameters()).device
    answers: list[Answer | None] = [None] * len(chats)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **sampling}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = encode_prompts(tokenizer, [chats[i] for i in chosen], device, [told[i] for i in chosen])
            if actions is not None:
                own = [actions[i] if isinstance(actions, Sequence) else actions for i in chosen]
                among = _Among(own, inputs["input_ids"].shape[1], [request_of(chats[i]) for i in chosen])
                options["logits_processor"] = LogitsProcessorList([among])
            began = time.perf_counter()
            out = model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                **options,
            )
            share = (time.perf_counter() - began) / len(chosen)
            for i, row in zip(chosen, out[:, inputs["input_ids"].shape[1] :], strict=True):
                kept = row[: _length(row.tolist(), ends)]
                tokens = kept.tolist()
                ended = bool(tokens) and tokens[-1] in ends
                answers[i] = Answer(decode(tokenizer, tokens).strip(), len(tokens), share, ended)
            if progress is not None:
                progress(start + len(chosen))
    return [a for a in answers if a is not None]


class _Among(LogitsProcessor):
    """For ``generate``: while an answer has no action, the tokens that may follow; temperatures come after it."""

    def __init__(self, actions: Sequence[Actions], prompt: int, requests: Sequence[str]) -> None:
        self.actions, self.prompt, self.requests = actions, prompt, requests
        self._held: list[Choices] = []

    def of_row(self, place: int, rows: int) -> _Among:
        """The same for one row of a batch of ``rows``, as drafts need it (:mod:`shadowpeft.hf.forward.one_row`)."""
        which = place * len(self.requests) // rows
        return _Among([self.actions[which]], self.prompt, [self.requests[which]])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self._held) < len(input_ids):  # several answers to a request stand side by side
            each = len(input_ids) // len(self.requests)
            asked = zip(self.actions, self.requests, strict=True)
            self._held = [actions.start(request) for actions, request in asked for _ in range(each)]
        rows = input_ids[:, self.prompt :].tolist()
        allowed = [held.allowed(row) for held, row in zip(self._held, rows, strict=True)]
        barred = torch.zeros_like(scores, dtype=torch.bool)
        for row, tokens in enumerate(allowed):
            if len(tokens):
                barred[row] = True
                barred[row, tokens] = False
        held_to = scores.masked_fill(barred, -torch.inf)
        for row, (held, path) in enumerate(zip(self._held, rows, strict=True)):
            if (leaning := held.leaning(path)) is not None:
                held_to[row, allowed[row]] += torch.as_tensor(leaning, dtype=scores.dtype, device=scores.device)
        return held_to


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode inside, and afterwards as it was: a training loop may ask in between."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_room(model: nn.Module, length: int, max_new_tokens: int) -> None:
    """Raises:
    DataError: if a prompt of ``length`` tokens with such an answer does not fit the model.
    """
    limit = getattr(model.config, "max_position_embeddings", None)  # type: ignore[union-attr]
    if limit is not None and length + max_new_tokens > limit:
        raise DataError(
            f"a prompt has {length} tokens and {max_new_tokens} more are asked for, but the model reads {limit}; shorten the "
            "prompt or lower max_new_tokens"
        )


def _length(row: list[int], ends: list[int]) -> int:
    """Tokens of an answer up to and with the one that ends it; what follows in its row is padding."""
    return next((i + 1 for i, token in enumerate(row) if token in ends), len(row))


def chats_of(prompts: Any, system: str | None) -> list[list[dict[str, str]]]:
    """Each prompt as a message list, with a system message where it brings none.

    Raises:
        ConfigError: if ``prompts`` is one text, each character of which would be a prompt, or one message list.
    """
    asked = [] if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or (asked and isinstance(asked[0], dict)):
        raise ConfigError(f"prompts is one {'text' if isinstance(prompts, str) else 'message list'}; put it into a list")
    return [with_system(messages_of(p), system) for p in asked]


def messages_of(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A prompt as a message list."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def request_of(messages: list[dict[str, str]]) -> str:
    """The request of a message list: its last user message; empty without one."""
    content: Any = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")  # parts, as OpenAI's API has them


class _Tokens(BaseStreamer):
    """What ``generate`` gives a streamer: the prompt, then each token."""

    def __init__(self) -> None:
        self.queue: Queue[Tensor | None] = Queue()

    def put(self, value: Tensor) -> None:
        self.queue.put(value)

    def end(self) -> None:
        """The end comes when ``generate`` has returned or failed."""


def stream(
    model: nn.Module, tokenizer: Any, messages: str | list[dict[str, str]], *, max_new_tokens: int = 256, **sampling: Any
) -> Iterator[str]:
    """One answer, piece by piece as it is made; joined, the pieces are the text of :func:`answer`, white space aside.

    Args:
        messages: a user message, or a message list.

    Raises:
        DataError: if the prompt with its answer does not fit the model's context.
    """
    tokens, decoder, left = _Tokens(), Decoder(tokenizer), Event()
    inputs = encode_prompts(tokenizer, [messages_of(messages)], next(model.parameters()).device)
    check_room(model, inputs["input_ids"].shape[1], max_new_tokens)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **sampling}

    def is_left(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), left.is_set(), device=ids.device)

    with evaluating(model), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(
            model.generate,  # type: ignore[arg-type]
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_tokens(model, tokenizer),
            stopping_criteria=StoppingCriteriaList([is_left]),
            **options,
        )
        whole.add_done_callback(lambda _: tokens.queue.put(None))
        try:
            for value in islice(iter(tokens.queue.get, None), 1, None):
                yield from (piece for token in value.flatten().tolist() if (piece := decoder.push(token)))
            whole.result()
            yield decoder.finish()
        finally:
            left.set()  # a reader that goes away waits for one token, not for the rest


def routing_reason(action: str | None) -> str:
    """Why an on-device answer with this action is kept ("known skill") or handed on (the paper, Appendix F)."""
    if action is None:
        return "unknown answer"
    return "[REMOTE]" if action == "REMOTE" else "known skill"

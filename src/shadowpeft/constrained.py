"""Which of the known actions a model answers with, and how likely each is: a softmax at every branch of their tokens' tree.

A branch's softmax is over the tokens that may follow there and no others, at temperature 1. What must follow has probability
one and costs nothing. So the probabilities of all actions add up to one. Where the actions have a second opinion, it leans
the softmax of each branch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shadowpeft.data.action_trie import ActionTrie, Choices, Path
from shadowpeft.data.chat import prompt_ids
from shadowpeft.errors import ConfigError
from shadowpeft.generate import chats_of, check_room, evaluating, request_of
from shadowpeft.hf.base.rotary import turns_by_length
from shadowpeft.hf.forward.joining import can_continue, select_rows

_ROWS = 128
"""Rows of a pass that reads branches: each has a copy of its prompt's cache."""


@dataclass(frozen=True)
class Chosen:
    """An action and how likely it is."""

    action: str
    probability: float
    """Among all actions and ``REMOTE``, at temperature 1."""
    probabilities: dict[str, float] | None = None
    """Of every action and ``REMOTE``; they add up to one. None of a greedy descent, which sees one path alone."""


@torch.inference_mode()
def choose(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    actions: ActionTrie,
    *,
    exact: bool = True,
    system: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Chosen]:
    """The action that ``model`` answers each prompt with.

    What all prompts begin with is read once. Prompts of one length share passes, so nothing is padded.

    Args:
        prompts: user messages, or whole message lists. system: system message for prompts that bring none.
        exact: compute the probability of every action and take the likeliest. Otherwise take the likeliest token at each
            branch, as a server does: fewer passes, and the action has the same probability, but another may be likelier.
        progress: called with the number of prompts done after each batch.

    Raises:
        ConfigError: if ``batch_size`` is below 1, or ``prompts`` is one text.
        DataError: if a prompt with the longest action does not fit the model.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size} but must be at least 1")
    chats = chats_of(prompts, system)
    rows = [prompt_ids(tokenizer, chat) for chat in chats]
    held = [actions.start(request_of(chat)) for chat in chats]
    return choose_after(model, rows, actions, held, exact=exact, batch_size=batch_size, progress=progress)


@torch.inference_mode()
def choose_after(
    model: nn.Module,
    rows: Sequence[list[int]],
    actions: ActionTrie,
    held: Sequence[Choices],
    *,
    exact: bool = True,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Chosen]:
    """The same for prompts that are tokens: of each in ``rows`` what is held to ``held``, which ``actions`` has begun.

    Raises:
        DataError: as :func:`choose`.
    """
    if not rows:
        return []
    check_room(model, max(map(len, rows)), actions.longest)
    chosen: dict[int, Chosen] = {}
    with evaluating(model):
        start = _Read.nothing(model)
        common = _common(rows) if len(rows) > 1 else 0
        if common and start.can_go_on:
            start = start.further([0], [rows[0][:common]])
        for places in equal_lengths([len(row) for row in rows], batch_size):
            tails = [rows[i][len(start.rows[0]) :] + list(actions.stem) for i in places]
            read = start.further([0] * len(places), tails)
            found = (_exact if exact else _greedy)(read, actions, [held[i] for i in places])
            chosen.update(zip(places, found, strict=True))
            if progress is not None:
                progress(len(chosen))
    return [chosen[i] for i in range(len(rows))]


def equal_lengths(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of rows in groups of at most ``size`` of one length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, same in groupby(order, key=lambda i: lengths[i]):
        places = list(same)
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; each has one more at least."""
    low, high, shortest = min(rows), max(rows), min(map(len, rows)) - 1
    return next((i for i in range(shortest) if low[i] != high[i]), shortest)


def _exact(read: _Read, actions: ActionTrie, held: Sequence[Choices]) -> list[Chosen]:
    """Every branch of every row: one pass for all that are equally deep, as many rows at a time as :data:`_ROWS`."""
    size, stem = len(read.rows), len(actions.stem)
    states = [read.logits]
    for _, equally_deep in groupby(list(actions.branches)[1:], key=len):
        paths = [list(path[stem:]) for path in equally_deep]
        step = max(1, _ROWS // size)
        for start in range(0, len(paths), step):
            some = paths[start : start + step]
            further = read.further([b for b in range(size) for _ in some], some * size)
            states += further.logits.unflatten(0, (size, len(some))).unbind(1)
    logs = [_log_softmax(state, held, [path] * size) for state, path in zip(states, actions.branches, strict=True)]
    total = torch.stack([torch.stack([logs[n][:, child] for n, child in steps]).sum(0) for steps in actions.steps], 1)
    best = []
    for row in total.exp().tolist():
        place = max(range(len(row)), key=row.__getitem__)
        best.append(Chosen(actions.actions[place], row[place], dict(zip(actions.actions, row, strict=True))))
    return best


def _greedy(read: _Read, actions: ActionTrie, held: Sequence[Choices]) -> list[Chosen]:
    """The likeliest token at each branch; rows that have their action drop out."""
    names = {ids: name for name, ids in actions.tokens.items()}
    chosen: dict[int, Chosen] = {}

    def descend(read: _Read, rows: list[int], path: list[Path], logs: list[float]) -> None:
        tails: list[list[int]] = []
        for n, state in enumerate(read.logits):
            after = actions.allowed(path[n])
            (log_p,) = _log_softmax(state[None], [held[rows[n]]], [path[n]])
            child = int(log_p.argmax())
            tail = [after[child], *actions.forced([*path[n], after[child]])]
            tails.append(tail)
            path[n], logs[n] = (*path[n], *tail), logs[n] + float(log_p[child])
        for n, row in enumerate(rows):
            if path[n] in names:
                chosen[row] = Chosen(names[path[n]], math.exp(logs[n]))
        left = [n for n in range(len(rows)) if path[n] not in names]
        for group in equal_lengths([len(tails[n]) for n in left], len(left)):
            on = [left[i] for i in group]
            further = read.further(on, [tails[n] for n in on])
            descend(further, [rows[n] for n in on], [path[n] for n in on], [logs[n] for n in on])

    size = len(read.rows)
    descend(read, list(range(size)), [actions.stem] * size, [0.0] * size)
    return [chosen[row] for row in range(size)]


def _log_softmax(logits: Tensor, held: Sequence[Choices], paths: Sequence[Path]) -> Tensor:
    """Log-probabilities ``(B, C)`` of the tokens that may follow each row's path, which are the same ones, from ``(B, V)``."""
    own = logits[:, held[0].allowed(paths[0])].double()
    leanings = [each.leaning(path) for each, path in zip(held, paths, strict=True)]
    if leanings[0] is not None:
        own = own + torch.tensor(leanings, dtype=torch.float64, device=own.device)
    return own.log_softmax(-1)


class _Read:
    """Rows of one length that a model has read, and the logits ``(B, V)`` of what follows each."""

    def __init__(self, model: Any, rows: list[list[int]], cache: DynamicCache, logits: Tensor) -> None:
        self.model, self.rows, self.cache, self.logits = model, rows, cache, logits

    @classmethod
    def nothing(cls, model: Any) -> _Read:
        return cls(model, [[]], DynamicCache(config=model.config), torch.empty(1, 0))

    @property
    def can_go_on(self) -> bool:
        """Whether several tokens may follow on what the cache holds; else all is read again."""
        return can_continue(self.cache) and not turns_by_length(self.model.config)

    def further(self, places: list[int], tails: list[list[int]]) -> _Read:
        """These rows (one may be there several times) read on, all by equally many tokens; this object stays as it is."""
        rows = [self.rows[place] + tail for place, tail in zip(places, tails, strict=True)]
        if self.can_go_on:
            cache = copy.deepcopy(self.cache)
            select_rows(cache, places)
        else:
            cache, tails = DynamicCache(config=self.model.config), rows
        device = next(self.model.parameters()).device
        out = self.model(
            input_ids=torch.tensor(tails, device=device),
            attention_mask=torch.ones(len(rows), len(rows[0]), dtype=torch.long, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _Read(self.model, rows, cache, out.logits[:, -1])

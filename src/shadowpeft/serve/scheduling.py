"""Whose turn it is: which waiting requests start, which share a forward pass, which batches are joined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations

from shadowpeft.serve.batch import Batch
from shadowpeft.serve.requests import Request

PADDING = 4096
"""Tokens of padding a pass may carry to spare another pass: the packaged model on a CPU takes about as long for either."""
_PROMPT_PADDING = 64
"""Tokens of padding that a batch of prompts may carry in any case."""


def next_in_turn(waiting: Sequence[Request], running: Iterable[Request]) -> Request:
    """The first request of the name that has the fewest running; of two such names, the one that waits longer."""
    busy = Counter(request.name for request in running)
    return min(waiting, key=lambda request: busy[request.name])  # the first of equals


def group_by_length(requests: Iterable[Request]) -> list[list[Request]]:
    """Requests whose prompts are read together: at most half of what a pass reads is padding."""
    groups: list[list[Request]] = []
    tokens = 0
    for request in sorted(requests, key=lambda request: len(request.ids)):
        length = len(request.ids)
        if groups:
            padding = (len(groups[-1]) + 1) * length - tokens - length
            if padding <= max(tokens + length, _PROMPT_PADDING):
                groups[-1].append(request)
                tokens += length
                continue
        groups.append([request])
        tokens = length
    return groups


def join_batches(batches: list[Batch], most: int) -> list[Batch]:
    """The batches, joined where that saves time, and where there are more than ``most`` and they can be joined."""
    while True:
        pairs = [(a.padding_with(b), a, b) for a, b in combinations(batches, 2) if a.can_join(b)]
        pairs = [pair for pair in pairs if pair[0] <= PADDING or len(batches) > most]
        if not pairs:
            return batches
        _, one, other = min(pairs, key=lambda pair: pair[0])
        one.join(other)
        batches = [batch for batch in batches if batch is not other]


def next_to_read(batches: Sequence[Batch]) -> list[Batch]:
    """Which prompts are read on with the next step: those with the least left, and the oldest, so that none waits for ever."""
    reading = [batch for batch in batches if batch.reading]
    shortest = sorted(reading, key=lambda batch: batch.left)[:1]
    return shortest + [batch for batch in reading[:1] if batch not in shortest]

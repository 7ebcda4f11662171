"""A round of drafts in a batch: rows that draft beside rows that do not, each with its own number of accepted tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowpeft.core.speculation import Drafts, accept_greedy, accept_sampled, draw
from shadowpeft.hf.forward.drafting import Draft, realigned
from shadowpeft.hf.forward.speculation import DraftCounts
from shadowpeft.serve.requests import Request
from shadowpeft.serve.sampling import Choice, choices_of, distribution
from shadowpeft.serve.sessions import Drafter

MAX_DRAFT = 8
"""Tokens drafted in a round at most."""


class _Row:
    """One request in a round."""

    def __init__(self, request: Request, pending: list[int]) -> None:
        self.request, self.pending, self.kept = request, pending, 0
        # what begins with an action is chosen among actions; until then its forced tokens jump
        free = request.gate is not None and len(pending) == 1 and not len(request.allowed())
        room = request.sampling.max_tokens - len(request.new) - 1
        self.drafts = Drafts(request.gate, room if free else 0)

    def column(self, place: int) -> int:
        """What the row reads at ``place`` of the round; what stands after its last token is never looked at."""
        tokens = [*self.pending, *self.drafts.tokens]
        return tokens[min(place, len(tokens) - 1)]

    def draft(self, draft: Draft | None) -> None:
        """Add a token, if that pays."""
        if draft is None:
            self.drafts.stop()
            return
        generator, among = self.request.generator, draft.tokens
        p = draft.logits.softmax(-1) if generator is None else distribution(draft.logits, self.request.sampling)

        def choose() -> int:
            place = int(p.argmax()) if generator is None else draw(p, generator)
            return place if among is None else int(among[place])

        self.drafts.add(p, choose, (p, among))

    def judge(self, logits: Tensor) -> list[Choice]:
        """The new tokens, from the logits ``(n + 1, V)`` after the last token before the drafts and after each draft."""
        request, drafted = self.request, self.drafts.tokens
        if request.generator is None:
            new, self.kept = accept_greedy(drafted, logits.argmax(-1).tolist())
        else:
            target = [distribution(row, request.sampling) for row in logits]
            blank = torch.zeros_like(target[0])
            shares = [p if ids is None else blank.index_copy(0, ids, p) for p, ids in self.drafts.shares]
            new, self.kept = accept_sampled(drafted, shares, target, request.generator)
        request.drafted += len(drafted)
        request.accepted += self.kept
        self.drafts.learn(self.kept)
        return choices_of([request] * len(new), logits[: len(new)], new)

    def count(self, counts: DraftCounts, new: int) -> None:
        """Add a round that made ``new`` tokens, if the row's shadow was to draft."""
        if self.drafts.looked:
            counts.tokens += new
            counts.passes += 1
            counts.drafted += len(self.drafts.tokens)
            counts.accepted += self.kept


class Round:
    """One round.

    Args:
        pending: of each row, the tokens of its answer that are not read; at least one. mask: of what was read ``(B, L)``.
    """

    def __init__(self, drafter: Drafter, requests: list[Request], pending: list[list[int]], mask: Tensor) -> None:
        self.rows = [_Row(request, own) for request, own in zip(requests, pending, strict=True)]
        self.mask, self._drafter = mask, drafter
        self.pays = any(row.drafts.planned for row in self.rows)
        """Whether any row drafts; else an ordinary pass does the same."""

    def verify(self) -> list[Tensor]:
        """Draft and verify; of each row that is to choose now the logits that judge its drafts, else none ``(0, V)``."""
        columns: list[Tensor] = []
        while True:
            place = len(columns)
            column = torch.tensor([[row.column(place)] for row in self.rows], device=self.mask.device)
            columns.append(column)
            self.mask = F.pad(self.mask, (0, 1), value=1)
            self._drafter.read(column, self.mask)
            if any(row.drafts.go_on for row in self.rows):  # the head is read for those alone
                for row, draft in zip(self.rows, self._drafter.drafts(), strict=True):
                    if row.drafts.go_on:
                        row.draft(draft)
            if not any(len(row.drafts.tokens) > place for row in self.rows):
                break
        logits = self._drafter.verify(torch.cat(columns, 1), self.mask)
        self._read = len(columns)
        found = []
        for row, own in zip(self.rows, logits, strict=True):
            first = len(row.pending) - 1
            found.append(own[first : first + 1 + len(row.drafts.tokens)] if first < self._read else own[:0])
        return found

    def take_back(self, kept: list[int]) -> Tensor:
        """Keep so many of each row's tokens of this round; the mask afterwards."""
        lost = [self._read - each for each in kept]
        self._drafter.take_back(lost)
        return realigned(self.mask, lost)

    def read(self, row: int) -> int:
        """How many of a row's pending tokens were read."""
        return min(self._read, len(self.rows[row].pending))

"""A round of drafts in a batch: rows that draft beside rows that do not, each with its own number of accepted tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowpeft.core.speculation import accept_greedy, accept_sampled, draw
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
        self.request, self.pending = request, pending
        self.drafted: list[int] = []
        self.shares: list[tuple[Tensor, Tensor | None]] = []
        self.confidences: list[float] = []
        self.looked, self.kept, self.chance = 0, 0, 1.0
        room = request.sampling.max_tokens - len(request.new) - 1
        # what begins with an action is chosen among actions; until then its forced tokens jump
        free = request.gate is not None and len(pending) == 1 and not request.allowed()
        self.planned = min(room, request.gate.plan()) if free and request.gate is not None and room > 0 else 0

    def column(self, place: int) -> int:
        """What the row reads at ``place`` of the round; what stands after its last token is never looked at."""
        tokens = [*self.pending, *self.drafted]
        return tokens[min(place, len(tokens) - 1)]

    def draft(self, draft: Draft | None) -> bool:
        """Add a token, if that pays."""
        gate, request = self.request.gate, self.request
        if draft is None or gate is None:
            return False
        self.looked += 1
        greedy = request.generator is None
        p = draft.logits.softmax(-1) if greedy else distribution(draft.logits, request.sampling)
        confidence = float(p.max())
        if not gate.wants(len(self.drafted), self.planned, self.chance, confidence):
            return False
        place = int(p.argmax()) if greedy else draw(p, request.generator)
        self.shares.append((p, draft.tokens))
        self.drafted.append(place if draft.tokens is None else int(draft.tokens[place]))
        self.confidences.append(confidence)
        self.chance *= gate.chance(confidence)
        return True

    def judge(self, logits: Tensor) -> list[Choice]:
        """The new tokens, from the logits ``(n + 1, V)`` after the last token before the drafts and after each draft."""
        request = self.request
        if request.generator is None:
            new, kept = accept_greedy(self.drafted, logits.argmax(-1).tolist())
        else:
            target = [distribution(row, request.sampling) for row in logits]
            shares = [p if ids is None else torch.zeros_like(target[0]).index_copy(0, ids, p) for p, ids in self.shares]
            new, kept = accept_sampled(self.drafted, shares, target, request.generator)
        request.drafted += len(self.drafted)
        request.accepted += kept
        self.kept = kept
        if request.gate is not None and self.looked:
            request.gate.learn(self.confidences, kept, self.looked)
        return choices_of([request] * len(new), logits[: len(new)], new)

    def count(self, counts: DraftCounts, new: int) -> None:
        """Add a round that made ``new`` tokens, if the row's shadow was to draft."""
        if self.looked:
            counts.tokens += new
            counts.passes += 1
            counts.drafted += len(self.drafted)
            counts.accepted += self.kept


class Round:
    """One round.

    Args:
        pending: of each row, the tokens of its answer that are not read; at least one. mask: of what was read ``(B, L)``.
    """

    def __init__(self, drafter: Drafter, requests: list[Request], pending: list[list[int]], mask: Tensor) -> None:
        self.rows = [_Row(request, own) for request, own in zip(requests, pending, strict=True)]
        self.mask, self._drafter = mask, drafter
        self.pays = any(row.planned for row in self.rows)
        """Whether any row drafts; else an ordinary pass does the same."""

    def verify(self) -> list[Tensor]:
        """Draft and verify; of each row that is to choose now the logits that judge its drafts, else none ``(0, V)``."""
        columns: list[Tensor] = []
        drafting = [row for row in self.rows if row.planned]
        while True:
            place = len(columns)
            column = torch.tensor([[row.column(place)] for row in self.rows], device=self.mask.device)
            columns.append(column)
            self.mask = F.pad(self.mask, (0, 1), value=1)
            drafts = self._drafter.read(column, self.mask)
            drafting = [
                row
                for row, draft in zip(self.rows, drafts, strict=True)
                if row in drafting and len(row.drafted) < row.planned and row.draft(draft)
            ]
            if not any(len(row.drafted) > place for row in self.rows):
                break
        logits = self._drafter.verify(torch.cat(columns, 1), self.mask)
        self._read = len(columns)
        found = []
        for row, own in zip(self.rows, logits, strict=True):
            first = len(row.pending) - 1
            found.append(own[first : first + 1 + len(row.drafted)] if first < self._read else own[:0])
        return found

    def take_back(self, kept: list[int]) -> Tensor:
        """Keep so many of each row's tokens of this round; the mask afterwards."""
        lost = [self._read - each for each in kept]
        self._drafter.take_back(lost)
        return realigned(self.mask, lost)

    def read(self, row: int) -> int:
        """How many of a row's pending tokens were read."""
        return min(self._read, len(self.rows[row].pending))

"""Requests that share forward passes: one cache, one row each.

A row whose answer must be one of some actions jumps: tokens that must follow are part of the answer at once, and are read with
what comes next. A row that has more of them to read than its neighbours chooses nothing until it has read them; so no padding
ever stands between the tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.backend import Backend
from shadowpeft.serve.drafting import MAX_DRAFT, Round
from shadowpeft.serve.requests import Request
from shadowpeft.serve.sampling import Choice, append_token, certain, choose
from shadowpeft.serve.sessions import Session


class NumbersError(ShadowPeftError):
    """The model's output for a request is not a number."""


class Batch:
    """Rows that read their prompts and then make a token a pass.

    Attributes:
        requests: whose rows there are, in order.
        reading: whether the prompts are not wholly read.
        apart: whether it must not be joined with others.
    """

    def __init__(self, backend: Backend, requests: list[Request], session: Session | None = None) -> None:
        self.requests, self.reading, self.apart = requests, True, session is not None
        self._tokenizer, self._stop_token_ids = backend.tokenizer, backend.stop_token_ids
        self._counts = backend.drafts
        self._session = session or backend.open([request.name for request in requests])
        read = [request.ids + request.new + request.ahead() for request in requests]
        width = max(len(ids) for ids in read)
        pad = self._tokenizer.pad_token_id or 0
        device = backend.model.device
        self._unread = torch.tensor([[pad] * (width - len(ids)) + ids for ids in read], device=device)
        self._pending: list[list[int]] = [[] for _ in requests]
        """Of each row, tokens of its answer that are not read; empty while prompts are."""
        lengths = torch.tensor([[len(ids)] for ids in read])
        self._mask = (torch.arange(width)[None] >= width - lengths).long().to(device)

    @property
    def columns(self) -> int:
        """Tokens of the longest row, prompt and what is read of the answer."""
        return self._mask.shape[1]

    @property
    def left(self) -> int:
        """Columns of prompts that are not read."""
        return self._unread.shape[1]

    def forward_step(self, columns: int) -> int:
        """Read what was not read, at most so many columns of prompts that can be read in pieces; returns the tokens this made.

        Once the prompts are read, each pass adds to every answer, but for those that have more to read than their neighbours.
        """
        self.keep(row for row, request in enumerate(self.requests) if not request.cancelled)
        if not self.requests:
            return 0
        if not self.reading and (drafts := self._drafts()) is not None:
            return self._draft(drafts)
        logits = self._read_prompts(columns) if self.reading else self._read_answers()
        if self.reading:
            return 0
        due = [row for row, pending in enumerate(self._pending) if not pending]
        choices = choose([self.requests[row] for row in due], logits if len(due) == len(logits) else logits[due])
        made = 0
        ended: set[int] = set()
        for row, choice in zip(due, choices, strict=True):
            request, before = self.requests[row], len(self.requests[row].new)
            self._pending[row] = self._take(request, [choice])
            made += len(request.new) - before
            if not self._pending[row]:
                ended.add(row)
        self.keep(row for row in range(len(self.requests)) if row not in ended)
        return made

    def _read_prompts(self, columns: int) -> Tensor:
        now = min(columns, self.left) if self._session.can_continue else self.left
        logits = self._session.forward(self._unread[:, :now], self._mask[:, : self.columns - self.left + now])
        self._unread = self._unread[:, now:]
        self.reading = self.left > 0
        return logits

    def _read_answers(self) -> Tensor:
        now = min(map(len, self._pending)) if self._session.can_continue else 1
        ids = torch.tensor([pending[:now] for pending in self._pending], device=self._mask.device)
        self._mask = F.pad(self._mask, (0, now), value=1)
        self._pending = [pending[now:] for pending in self._pending]
        return self._session.forward(ids, self._mask)

    def _drafts(self) -> Round | None:
        """A round of drafts, if a row's shadow is to draft and the session can."""
        if all(request.gate is None for request in self.requests):
            return None
        drafter = self._session.drafter(MAX_DRAFT)
        if drafter is None:
            return None
        drafts = Round(drafter, self.requests, self._pending, self._mask)
        return drafts if drafts.pays else None

    def _draft(self, drafts: Round) -> int:
        """As a step, for rows that draft and rows that do not."""
        logits = drafts.verify()
        kept, made, ended = [], 0, set()
        for row, (request, own) in enumerate(zip(self.requests, logits, strict=True)):
            read = drafts.read(row)
            self._pending[row] = self._pending[row][read:]
            if len(own):
                before, drafting = len(request.new), drafts.rows[row]
                choices = drafting.judge(own) if drafting.drafts.looked else choose([request], own)
                self._pending[row] = self._take(request, choices)
                new = len(request.new) - before
                made += new
                drafting.count(self._counts, new)
                read += max(new - 1, 0) if drafting.drafts.tokens else 0  # all but the last were read as drafts
                if not self._pending[row]:
                    ended.add(row)
            kept.append(read)
        self._mask = drafts.take_back(kept)
        self.keep(row for row in range(len(self.requests)) if row not in ended)
        return made

    def _take(self, request: Request, choices: list[Choice]) -> list[int]:
        """Append some choices; what is to be read of the answer then, [] if it ends."""
        pending: list[int] = []
        try:
            for choice in choices:
                if math.isnan(choice.logprob):
                    raise NumbersError("the model's output is not a number; its weights may be damaged")
                pending = self._append(request, choice)
                if not pending:
                    break
        except BaseException as error:  # noqa: BLE001  (handed to the request; its neighbours go on)
            request.fail(error)
            return []
        return pending

    def _append(self, request: Request, choice: Choice) -> list[int]:
        """Add to an answer what was read ahead of it, the choice, and what must follow; what is to be read, [] if it ends."""

        def goes_on(*new: Choice) -> bool:
            return all(append_token(request, each, self._tokenizer, self._stop_token_ids) for each in new)

        def forced() -> list[Choice]:
            return [certain(token, request.sampling.top_logprobs) for token in request.ahead()]

        if not goes_on(*forced(), choice):
            return []
        after = forced()
        return [choice.id, *(each.id for each in after)] if goes_on(*after) else []

    def keep(self, rows: Iterable[int]) -> None:
        """Go on with these rows only, without the columns that none of them needs."""
        rows = list(rows)
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        if not rows:
            return
        self._session.keep(rows)
        self._mask, self._unread = self._mask[rows], self._unread[rows]
        self._pending = [self._pending[row] for row in rows]
        unneeded = int(self._mask.any(0).long().argmax())
        if unneeded and not self.reading and self._session.can_shift:
            self._session.shift(-unneeded)
            self._mask = self._mask[:, unneeded:]

    def padding_with(self, other: Batch) -> int:
        """Tokens of padding that joining the two would add to every later pass."""
        shorter, longer = sorted((self, other), key=lambda batch: batch.columns)
        return (longer.columns - shorter.columns) * len(shorter.requests)

    def can_join(self, other: Batch) -> bool:
        """Whether both have read their prompts, and share weights and a kind of cache that can be joined."""
        ready = not (self.reading or other.reading or self.apart or other.apart)
        return ready and self._session.can_join(other._session)

    def join(self, other: Batch) -> None:
        """Take over the rows of ``other``."""
        columns = max(self.columns, other.columns)
        for batch in (self, other):
            batch._session.shift(columns - batch.columns)
            batch._mask = F.pad(batch._mask, (columns - batch.columns, 0))
        self._session.join(other._session)
        self._mask = torch.cat([self._mask, other._mask])
        self._unread = torch.cat([self._unread, other._unread])
        self._pending = self._pending + other._pending
        self.requests, other.requests = self.requests + other.requests, []

    def alone(self, backend: Backend, row: int) -> Batch:
        """A batch of this row alone that reads its prompt and its answer so far again, with the weights it began with."""
        return Batch(backend, [self.requests[row]], self._session.restart(row))

"""Requests that share forward passes: one cache, one row each."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.nn import functional as F

from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.backend import Backend
from shadowpeft.serve.requests import Request
from shadowpeft.serve.sampling import append_token, choose
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
        self._session = session or backend.open([request.name for request in requests])
        read = [request.ids + request.new for request in requests]
        width = max(len(ids) for ids in read)
        pad = self._tokenizer.pad_token_id or 0
        device = backend.model.device
        self._unread = torch.tensor([[pad] * (width - len(ids)) + ids for ids in read], device=device)
        lengths = torch.tensor([[len(ids)] for ids in read])
        self._mask = (torch.arange(width)[None] >= width - lengths).long().to(device)

    @property
    def columns(self) -> int:
        """Tokens of the longest row, prompt and answer."""
        return self._mask.shape[1]

    @property
    def left(self) -> int:
        """Columns that are not read."""
        return self._unread.shape[1]

    def forward_step(self, columns: int) -> int:
        """Read what was not read, at most so many columns if it can be read in pieces; returns the tokens this made.

        Once everything is read, each pass adds a token to every answer.
        """
        self.keep(row for row, request in enumerate(self.requests) if not request.cancelled)
        if not self.requests:
            return 0
        now = min(columns, self.left) if self._session.can_continue else self.left
        logits = self._session.forward(self._unread[:, :now], self._mask[:, : self.columns - self.left + now])
        self._unread = self._unread[:, now:]
        if self.left:
            return 0
        self.reading = False
        choices = choose(self.requests, logits)
        self._unread = torch.tensor([[choice.id] for choice in choices], device=self._mask.device)
        self._mask = F.pad(self._mask, (0, 1), value=1)
        going_on = []
        for row, (request, choice) in enumerate(zip(self.requests, choices, strict=True)):
            try:
                if math.isnan(choice.logprob):
                    raise NumbersError("the model's output is not a number; its weights may be damaged")
                if append_token(request, choice, self._tokenizer, self._stop_token_ids):
                    going_on.append(row)
            except BaseException as error:  # noqa: BLE001  (handed to the request; its neighbours go on)
                request.fail(error)
        self.keep(going_on)
        return len(choices)

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
        self.requests, other.requests = self.requests + other.requests, []

    def alone(self, backend: Backend, row: int) -> Batch:
        """A batch of this row alone that reads its prompt and its answer so far again, with the weights it began with."""
        return Batch(backend, [self.requests[row]], self._session.restart(row))

"""Requests that share forward passes: one cache, one row each."""

from __future__ import annotations

import torch

from shadowpeft.serve.backend import Backend
from shadowpeft.serve.requests import Request
from shadowpeft.serve.sampling import append_token, choose


class Batch:
    """A batch from its prompts to its last token.

    Attributes:
        requests: whose rows are left, in order.
    """

    def __init__(self, backend: Backend, requests: list[Request]) -> None:
        self.requests = requests
        self._tokenizer, self._stop_token_ids = backend.tokenizer, backend.stop_token_ids
        self._session = backend.open([request.name for request in requests])
        width = max(len(request.ids) for request in requests)
        pad = self._tokenizer.pad_token_id or 0
        rows = [[pad] * (width - len(request.ids)) + request.ids for request in requests]
        lengths = torch.tensor([[len(request.ids)] for request in requests])
        device = backend.model.device
        self._unread = torch.tensor(rows, device=device)
        self._mask = (torch.arange(width)[None] >= width - lengths).long().to(device)

    def forward_step(self) -> int:
        """Read what was not read yet and add a token to every answer; returns how many tokens that made."""
        self.keep([row for row, request in enumerate(self.requests) if not request.cancelled])
        if not self.requests:
            return 0
        choices = choose(self.requests, self._session.forward(self._unread, self._mask))
        self._unread = torch.tensor([[choice.id] for choice in choices], device=self._mask.device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._unread)], dim=1)
        going_on = [
            row
            for row, (request, choice) in enumerate(zip(self.requests, choices, strict=True))
            if append_token(request, choice, self._tokenizer.decode, self._stop_token_ids)
        ]
        self.keep(going_on)
        return len(choices)

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        if rows:
            self._session.keep(rows)
            self._mask, self._unread = self._mask[rows], self._unread[rows]

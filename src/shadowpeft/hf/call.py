"""One forward pass as an object: which adapters take part, with which weights, on which rows, and their shadow states.

A :class:`ShadowCall` travels through keyword arguments or a context variable and is never stored on a module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shadowpeft.core import Trajectory

if TYPE_CHECKING:
    from shadowpeft.hf.layer import Weights

CALL = "shadow_call"


class Part:
    """One adapter in one forward pass: its weights, the rows of the batch that are its own, its shadow states."""

    def __init__(self, weights: Weights, rows: list[int] | None = None) -> None:
        self.weights = weights
        self.trajectory: Trajectory | None = None
        self.rows = rows
        """Indices in the batch; None: all of it."""
        self._indices: dict[torch.device, Tensor] = {}

    @property
    def adapter(self) -> str:
        return self.weights.adapter

    def index(self, device: torch.device) -> Tensor:
        """The rows as an int64 tensor ``(B_part,)`` on ``device``."""
        assert self.rows is not None
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.rows, device=device)
        return self._indices[device]

    def pick(self, x: Tensor, axis: int = 0) -> Tensor:
        """The part's rows of ``x``, whose axis ``axis`` counts the rows of the batch."""
        return x if self.rows is None else x.index_select(axis, self.index(x.device))


class ShadowCall:
    """One forward pass: its parts, what was asked for, and the shadow states."""

    def __init__(self, parts: list[Part], names: tuple[str, ...] | None = None) -> None:
        self.parts = parts
        self.names = names
        """The adapter of each row of a mixed batch; None if one adapter has all rows."""
        self.labels: Tensor | None = None
        self.shift_labels: Tensor | None = None
        self.shadow_labels: Tensor | None = None
        self.num_items: Any = None
        self.shadow_num_items: Any = None
        self.return_shadow = False
        self.fused = False
        self.logits_to_keep: Any = 0
        self.input_ids: Tensor | None = None
        self.attention_mask: Any = None
        self.streams_first = False
        self.tokens: list[Token[ShadowCall | None]] = []

    @property
    def started(self) -> bool:
        """Whether the shadow backbones have run."""
        return all(part.trajectory is not None for part in self.parts)


@dataclass
class Request:
    """What one call of a ``PeftModel``'s forward or generate fixed for every forward pass of ``model`` inside it."""

    model: nn.Module
    names: Any = None
    """``adapter_names``."""
    repeats: bool = False
    """Whether each prompt may stand in the batch several times (beams, several sequences of one prompt)."""
    held: dict[str, Weights] = field(default_factory=dict)
    """The weights that each adapter had when it was first used: a generation ends with those it began with."""


_current: ContextVar[ShadowCall | None] = ContextVar("shadowpeft_call", default=None)
request: ContextVar[Request | None] = ContextVar("shadowpeft_request", default=None)


_lock = threading.Lock()
_named = 0
any_named = False
"""Whether a request with names runs in any thread: compiled code cannot read a context variable, but this it can."""


@contextmanager
def asking(asked: Request) -> Iterator[None]:
    """Let the forward passes inside find ``asked``."""
    global _named, any_named
    token, named = request.set(asked), asked.names is not None
    with _lock:
        _named += named
        any_named = _named > 0
    try:
        yield
    finally:
        request.reset(token)
        with _lock:
            _named -= named
            any_named = _named > 0


def current() -> ShadowCall | None:
    """The innermost forward pass that is running here."""
    return _current.get()


def enter(call: ShadowCall) -> None:
    """Let modules that get no keyword arguments find ``call`` until :func:`leave`."""
    call.tokens.append(_current.set(call))


def leave() -> None:
    """Undo the last :func:`enter`."""
    call = _current.get()
    if call is not None and call.tokens:
        _current.reset(call.tokens.pop())

"""A request in the engine: how it wants its tokens, and the events it gets back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from shadowpeft.core.speculation import Gate
from shadowpeft.data.action_trie import Choices
from shadowpeft.decode import Decoder
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.serve.router import Scores

GREEDY = 1e-307
"""Where processors and libraries begin to take a number for 0 and divide by it."""


class QueueFullError(ShadowPeftError):
    """As many requests wait as may."""


class UnknownModelError(ConfigError):
    """No model of this name is loaded, or none any more."""


class StoppedError(ShadowPeftError):
    """The engine takes no more requests: it is shutting down."""


class TooLongError(DataError):
    """The prompt, or the answer that is asked for, is longer than this server's model or its limits allow."""


class OverdueError(ShadowPeftError):
    """The request waited for as long as its whole answer may take."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request wants its tokens."""

    max_tokens: int = 64
    temperature: float = 0.0
    """0, or less than :data:`GREEDY`: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; not part of it."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report with each."""

    def generator(self) -> torch.Generator | None:
        """The request's own source of random numbers, on the CPU; None for greedy answers, which draw none."""
        if self.temperature < GREEDY:
            return None
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str
    """What it adds to the text, once that is certain: empty for parts of a character, and while a stop text may follow."""
    piece: str
    """What it adds to the text, stop texts or not; empty in the middle of a character."""
    raw: bytes
    """What it stands for: those of an answer's tokens joined are the answer in UTF-8."""
    logprob: float
    margin: float
    entropy: float
    top: tuple[tuple[bytes, float], ...] = ()
    """The likeliest tokens and their log-probabilities."""
    judges: tuple[float, float] = (0.0, 0.0)
    """See :class:`~shadowpeft.serve.router.Scores`."""


@dataclass(frozen=True)
class Finish:
    """The end of an answer."""

    reason: str
    """``stop``, ``length``, ``until`` (the request's own condition), or ``time`` (cut by ``answer_seconds``)."""
    text: str
    """What the last token held back."""
    prompt_tokens: int
    new_tokens: int
    drafted: int = 0
    accepted: int = 0
    """Tokens that the shadow drafted, and those of them that stayed."""


@dataclass(frozen=True)
class Failed:
    """The request could not be finished."""

    error: BaseException


Event = Token | Finish | Failed


@dataclass(eq=False)
class Request:
    """A request in the engine: what was asked for, and how far its answer is."""

    ids: list[int]
    name: str
    sampling: SamplingParams
    emit: Callable[[Event], None]
    until: Callable[[list[str], Scores], bool] | None = None
    actions: Choices | None = None
    """What the answer starts with is one of these."""
    deadline: float = math.inf
    """Monotonic time at which the answer ends."""
    cancelled: bool = False
    """Set it, from any thread, to have the row taken out after the running step; nothing is emitted any more."""
    new: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)
    sent: int = 0
    """Characters of the text that were given away."""
    generator: torch.Generator | None = None
    decoder: Decoder | None = None
    """Of the answer so far."""
    gate: Gate | None = None
    """What decides how much the shadow drafts of the answer; None: nothing."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens, and those of them that stayed."""
    text: str = ""
    """The answer so far: whole characters, stop texts not cut off."""

    def ahead(self) -> list[int]:
        """Tokens that must follow the answer so far."""
        return [] if self.actions is None else self.actions.forced(self.new)

    def allowed(self) -> Any:
        """Tokens that may come after those, a list or a tensor; empty: any."""
        return [] if self.actions is None else self.actions.allowed(self.new + self.ahead())

    def next_tokens(self) -> tuple[Any, Any]:
        """What :meth:`allowed` says, and what is added to the logits of those tokens, a list or a tensor; None: nothing."""
        if self.actions is None:
            return [], None
        path = self.new + self.ahead()
        return self.actions.allowed(path), self.actions.leaning(path)

    def fail(self, error: BaseException) -> None:
        """Tell the reader that there will be no more, unless it has left."""
        if not self.cancelled:
            self.cancelled = True
            self.emit(Failed(error))

"""Continuous batching: one thread that makes a token a step for every running request, and takes new ones in between steps.

Requests that wait when a step begins start together as one batch with a cache of its own, at most :attr:`Limits.batches` at a
time; a row leaves its batch when it ends or is cancelled. Every row has its own sampling state, so an answer does not depend
on its neighbours (up to the order of float additions).
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.messages import did_you_mean
from shadowpeft.serve.backend import Backend, Session
from shadowpeft.serve.router import Scores

_REPLACEMENT = "\ufffd"


class QueueFullError(ShadowPeftError):
    """The engine has as many waiting requests as it may."""


class StoppedError(ShadowPeftError):
    """The engine takes no more requests: it is shutting down."""


class OverdueError(ShadowPeftError):
    """The request waited for as long as its whole answer may take."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the engine."""

    rows: int = 16
    """Requests that run at the same time."""
    batches: int = 4
    """Batches that run at the same time."""
    queue: int = 64
    """Requests that wait."""
    prompt_tokens: int = 2048
    new_tokens: int = 512
    answer_seconds: float = 120.0
    """From the request to the end of its answer: what runs then is ended, what still waits has failed."""
    gather_seconds: float = 0.002
    """How long an idle engine waits for neighbours of the first request."""


@dataclass(frozen=True)
class Sampling:
    """How one request wants its tokens."""

    max_tokens: int = 64
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; not part of it."""
    top_logprobs: int = 0
    """How many of the likeliest tokens to report with each."""


@dataclass(frozen=True)
class Token:
    """One generated token."""

    id: int
    text: str
    """What it adds to the text, once that is certain: empty for parts of a character, and while a stop text may follow."""
    piece: str
    """The token alone, decoded."""
    logprob: float
    margin: float
    entropy: float
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens and their log-probabilities."""


@dataclass(frozen=True)
class Finish:
    """The end of an answer."""

    reason: str
    """``stop``, ``length``, ``until`` (the request's own condition), or ``time`` (cut by :attr:`Limits.answer_seconds`)."""
    text: str
    """What the last token held back."""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Failed:
    """The request could not be finished."""

    error: BaseException


Event = Token | Finish | Failed


@dataclass
class _Change:
    action: Callable[[], None]
    without: str | None
    done: Future[None] = field(default_factory=Future)


@dataclass
class Work:
    """A request in the engine."""

    ids: list[int]
    name: str
    sampling: Sampling
    emit: Callable[[Event], None]
    until: Callable[[list[str], Scores], bool] | None = None
    deadline: float = math.inf
    """Monotonic time at which the answer ends."""
    cancelled: bool = False
    """Set it, from any thread, to have the row taken out after the running step; nothing is emitted any more."""
    new: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)
    sent: int = 0
    generator: torch.Generator | None = None


class _Batch:
    def __init__(self, session: Session, works: list[Work]) -> None:
        self.session, self.works = session, works
        self.mask = torch.empty(0)
        self.next = torch.empty(0)


class Engine:
    """Runs a :class:`~shadowpeft.serve.backend.Backend`.

    Attributes:
        beat: time (monotonic) of the last step or idle wake-up: an engine that hangs is seen by it.
        steps: forward passes so far. tokens: tokens made so far.
    """

    def __init__(self, backend: Backend, limits: Limits | None = None) -> None:
        self.backend = backend
        self.limits = limits or Limits()
        self._waiting: deque[Work] = deque()
        self._batches: list[_Batch] = []
        self._changes: list[_Change] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="shadowpeft-engine", daemon=True)
        self.beat = time.monotonic()
        self.steps = self.tokens = 0

    # ----------------------------------------------------------------------------------------------- from other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(
        self,
        ids: list[int],
        name: str,
        sampling: Sampling,
        emit: Callable[[Event], None],
        until: Callable[[list[str], Scores], bool] | None = None,
    ) -> Work:
        """Queue a request.

        Args:
            ids: tokens of the prompt. name: one of the backend's names.
            emit: called from the engine's thread with every :class:`Token`, then one :class:`Finish` or :class:`Failed`.
            until: asked after each token with the pieces and scores so far; True ends the answer.

        Raises:
            DataError: if the prompt is empty or too long, or more tokens are asked for than allowed.
            ConfigError: for an unknown name. QueueFullError: as it says. StoppedError: while shutting down.
        """
        work = Work(ids, name, sampling, emit, until, time.monotonic() + self.limits.answer_seconds)
        if sampling.temperature > 0:
            work.generator = torch.Generator()
            if sampling.seed is None:
                work.generator.seed()
            else:
                work.generator.manual_seed(sampling.seed)
        with self._changed:
            self.check(len(ids), name, sampling.max_tokens)  # here, so that the name is not taken out in between
            if self._stopping:
                raise StoppedError("the server is shutting down; send the request to another one")
            self._waiting = deque(w for w in self._waiting if not w.cancelled)
            if len(self._waiting) >= self.limits.queue:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(work)
            self._changed.notify_all()
        return work

    def check(self, prompt: int, name: str, max_tokens: int) -> None:
        """Raises:
        DataError: if a prompt of so many tokens with such an answer is not allowed. ConfigError: for an unknown name.
        """
        limits, names = self.limits, self.backend.names
        if name not in names:
            raise ConfigError(
                f"model '{name}' is not loaded{did_you_mean(name, list(names))}; there are {sorted(names)}"
            )
        if prompt == 0:
            raise DataError("the prompt has no tokens; say something")
        if prompt > limits.prompt_tokens:
            raise DataError(f"the prompt has {prompt} tokens but may have {limits.prompt_tokens}; shorten it")
        if max_tokens > limits.new_tokens:
            raise DataError(f"max_tokens is {max_tokens} but may be {limits.new_tokens}; lower it")
        if prompt + max_tokens > self.backend.context:
            raise DataError(
                f"the prompt has {prompt} tokens and {max_tokens} more are asked for, but the model reads "
                f"{self.backend.context}; shorten the prompt or lower max_tokens"
            )

    def add(self, name: str, folder: str) -> None:
        """Load one more adapter between two steps; every running answer waits for it, none is lost.

        Raises:
            ShadowPeftError: if it cannot be loaded; everything is as it was.
        """
        self._between(_Change(lambda: self.backend.add(name, folder), None))

    def remove(self, name: str) -> None:
        """Take an adapter out: new requests for it are refused at once, those that are here are finished first.

        Raises:
            ConfigError: if it cannot be taken out.
        """
        with self._changed:
            self.backend.check_removable(name)
            self.backend.names = tuple(n for n in self.backend.names if n != name)
        try:
            self._between(_Change(lambda: self.backend.remove(name), name))
        except BaseException:
            with self._changed:
                self.backend.names = (name, *self.backend.names)
            raise

    def _between(self, change: _Change) -> None:
        with self._changed:
            if not self.ready():
                raise StoppedError("the server takes no changes now: it is shutting down, or has not started")
            self._changes.append(change)
            self._changed.notify_all()
        change.done.result()

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have."""
        return sum(len(batch.works) for batch in list(self._batches))

    def ready(self) -> bool:
        """Whether requests are taken and the thread is alive."""
        return self._thread.is_alive() and not self._stopping

    def stop(self, timeout: float = 30.0) -> bool:
        """Take no more requests, finish what there is within ``timeout`` seconds, fail the rest; whether all was finished."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if not self._thread.is_alive():
            return True
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            left = [*self._waiting, *(w for batch in list(self._batches) for w in batch.works)]
            self._waiting.clear()
            changes, self._changes = self._changes, []
        for change in changes:
            change.done.set_exception(StoppedError("the server shut down before the change was made"))
        for work in left:
            if not work.cancelled:
                work.cancelled = True
                work.emit(Failed(StoppedError("the server shut down before the answer was finished")))
        self._thread.join(timeout)
        return False

    # -------------------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._batches and not self._changes:
                    self.beat = time.monotonic()
                    if self._stopping:
                        return
                    self._changed.wait(1.0)
                idle = not self._batches and not self._changes
            if idle and self.limits.gather_seconds:
                time.sleep(self.limits.gather_seconds)
            self._drop_overdue()
            works = self._admit()
            if works:
                self._start(works)
            for batch in list(self._batches):
                self._guard(batch, self._advance)
            self._batches = [batch for batch in self._batches if batch.works]
            self._change()
            self.beat = time.monotonic()

    def _change(self) -> None:
        with self._changed:
            needed = {w.name for w in self._waiting} | {w.name for batch in self._batches for w in batch.works}
            due = [change for change in self._changes if change.without not in needed]
            self._changes = [change for change in self._changes if change.without in needed]
        for change in due:
            try:
                change.action()
            except BaseException as error:  # noqa: BLE001  (handed to who asked; the engine goes on)
                change.done.set_exception(error)
            else:
                change.done.set_result(None)

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [w for w in self._waiting if w.deadline <= now]
            if late:
                self._waiting = deque(w for w in self._waiting if w.deadline > now)
        for work in late:
            if not work.cancelled:
                limit = self.limits.answer_seconds
                work.emit(Failed(OverdueError(f"the request waited {limit:g} s and had not begun; try again later")))

    def _admit(self) -> list[Work]:
        with self._changed:
            if len(self._batches) >= self.limits.batches:
                return []
            room = self.limits.rows - self.running
            works: list[Work] = []
            while self._waiting and len(works) < room:
                work = self._waiting.popleft()
                if not work.cancelled:
                    works.append(work)
            return works

    def _start(self, works: list[Work]) -> None:
        try:
            batch = _Batch(self.backend.open([w.name for w in works]), works)
        except BaseException as error:  # noqa: BLE001  (handed to the requests; the engine goes on)
            for work in works:
                work.emit(Failed(error))
            return
        self._batches.append(batch)
        self._guard(batch, self._prefill)

    def _guard(self, batch: _Batch, action: Callable[[_Batch], None]) -> None:
        try:
            with torch.inference_mode():
                action(batch)
        except BaseException as error:  # noqa: BLE001  (handed to the batch's requests; other batches go on)
            works, batch.works = batch.works, []
            for work in works:
                if not work.cancelled:
                    work.emit(Failed(error))

    def _prefill(self, batch: _Batch) -> None:
        width = max(len(w.ids) for w in batch.works)
        device = self.backend.model.device
        pad = self.backend.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(w.ids)) + w.ids for w in batch.works], device=device)
        lengths = torch.tensor([[len(w.ids)] for w in batch.works], device=device)
        batch.mask = (torch.arange(width, device=device)[None] >= width - lengths).long()
        self._read(batch, ids)

    def _advance(self, batch: _Batch) -> None:
        gone = [w.cancelled for w in batch.works]
        if any(gone):
            self._keep(batch, [i for i, away in enumerate(gone) if not away])
        if not batch.works:
            return
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.works), 1)], dim=1)
        self._read(batch, batch.next)

    def _read(self, batch: _Batch, ids: Tensor) -> None:
        logits = batch.session.forward(ids, batch.mask)
        self.steps += 1
        chosen, tokens = self._choose(batch.works, logits)
        batch.next = torch.tensor(chosen, device=logits.device)[:, None]
        left = [i for i, (work, token) in enumerate(zip(batch.works, tokens, strict=True)) if self._take(work, token)]
        self.tokens += len(tokens)
        if len(left) < len(batch.works):
            self._keep(batch, left)

    def _keep(self, batch: _Batch, rows: list[int]) -> None:
        batch.works = [batch.works[row] for row in rows]
        if rows:
            batch.session.keep(rows)
            batch.mask, batch.next = batch.mask[rows], batch.next[rows]

    def _choose(self, works: list[Work], logits: Tensor) -> tuple[list[int], list[tuple[float, ...]]]:
        """The next token of every row, and ``(log-probability, margin, entropy)`` of each."""
        log_p = logits.log_softmax(-1)
        best = log_p.topk(2, dim=-1).values
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
        greedy = log_p.argmax(-1).tolist()
        chosen = [
            greedy[i] if work.generator is None else draw(logits[i], work.sampling, work.generator)
            for i, work in enumerate(works)
        ]
        picked = log_p[torch.arange(len(works)), torch.tensor(chosen, device=log_p.device)]
        numbers = torch.stack([picked, best[:, 0] - best[:, 1], entropy], dim=1).tolist()
        tops: list[tuple[tuple[int, float], ...]] = []
        for i, work in enumerate(works):
            top = log_p[i].topk(min(work.sampling.top_logprobs, log_p.shape[1])) if work.sampling.top_logprobs else None
            tops.append(() if top is None else tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        return chosen, [(token, *row, top) for token, row, top in zip(chosen, numbers, tops, strict=True)]  # type: ignore[misc]

    def _take(self, work: Work, made: tuple[Any, ...]) -> bool:
        """Add a token to an answer, tell its reader; whether the answer goes on."""
        token, logprob, margin, entropy, top = made
        decode = self.backend.tokenizer.decode
        ended = token in self.backend.ends
        work.new.append(token)
        if work.cancelled:
            return False
        before = work.sent
        text = decode(work.new[:-1] if ended else work.new, skip_special_tokens=True)
        cut = min((at for at in (text.find(s) for s in work.sampling.stop) if at >= 0), default=-1)
        if cut >= 0:
            text = text[:cut]
        over = ended or cut >= 0
        sure = len(text) if over else _certain(text, work.sampling.stop)
        delta = text[before:sure] if sure > before else ""
        work.sent = max(before, sure)
        if not ended:
            piece = decode([token])
            work.pieces.append(piece)
            for values, value in zip(
                (work.scores.logprob, work.scores.margin, work.scores.entropy), (logprob, margin, entropy), strict=True
            ):
                values.append(value)
            told = tuple((decode([t]), p) for t, p in top)
            work.emit(Token(token, delta, piece, logprob, margin, entropy, told))
            delta = ""
        reason = "stop" if over else "length" if len(work.new) >= work.sampling.max_tokens else ""
        if not reason and work.until is not None and work.until(work.pieces, work.scores):
            reason = "until"
        if not reason and time.monotonic() >= work.deadline:
            reason = "time"
        if not reason:
            return True
        work.emit(Finish(reason, delta + text[work.sent :], len(work.ids), len(work.new)))
        return False


def _certain(text: str, stops: tuple[str, ...]) -> int:
    """How much of an unfinished text can be given away: no half characters, nothing that may become a stop text."""
    end = len(text)
    while end and text[end - 1] == _REPLACEMENT:
        end -= 1
    held = 0
    for stop in stops:
        held = max(held, next((n for n in range(min(len(stop) - 1, end), 0, -1) if text.endswith(stop[:n], 0, end)), 0))
    return end - held


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from ``softmax(logits / temperature)`` ``(V,)``, cut to the likeliest that together have ``top_p``.

    The random number comes from the row's own generator on the CPU, so it does not depend on the batch or the device.
    """
    p = (logits.double().cpu() / sampling.temperature).softmax(-1)
    sorted_p, order = p.sort(descending=True, stable=True)
    total = sorted_p.cumsum(-1)
    if sampling.top_p < 1.0:
        sorted_p = sorted_p.masked_fill(total - sorted_p >= sampling.top_p, 0.0)
        total = sorted_p.cumsum(-1)
    u = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    place = int(torch.searchsorted(total, u, right=True))
    return int(order[min(place, int((sorted_p > 0).sum()) - 1)])

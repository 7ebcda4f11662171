"""Continuous batching: one thread that makes a token a step for every running request, and takes new ones in between steps.

A new request starts with the next step while fewer than :attr:`EngineLimits.max_num_seqs` run. Its prompt is read beside the
steps of the others, in pieces if it is long, and then it joins them; a row leaves when it ends or is cancelled. Every row has
its own sampling state, so an answer does not depend on its neighbours (up to the order of float additions).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from shadowpeft.data.action_trie import Choices
from shadowpeft.errors import DataError
from shadowpeft.messages import did_you_mean
from shadowpeft.ops.thin import thin_products
from shadowpeft.serve.backend import Backend
from shadowpeft.serve.batch import Batch
from shadowpeft.serve.options import Options
from shadowpeft.serve.requests import (
    Event,
    OverdueError,
    QueueFullError,
    Request,
    SamplingParams,
    StoppedError,
    TooLongError,
    UnknownModelError,
)
from shadowpeft.serve.router import Scores
from shadowpeft.serve.scheduling import group_by_length, join_batches, next_in_turn, next_to_read

_log = logging.getLogger("shadowpeft.serve")
_BROKEN = "the engine has stopped after an error, which the server's log has; restart the server"
_LAST_SECONDS = 5.0
"""How long a forward pass that runs on is waited for when the server shuts down."""
_SHORTEST_PIECE = 32
"""Columns of a batch of prompts that are read in one pass at least."""


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of the engine."""

    max_num_seqs: int = Options.rows
    """Requests that run at the same time."""
    batches: int = Options.batches
    """Forward passes a step, if rows of very different length have passes of their own."""
    queue: int = Options.queue
    """Requests that wait."""
    prompt_tokens: int = Options.prompt_tokens
    new_tokens: int = Options.new_tokens
    answer_seconds: float = Options.answer_seconds
    """From the request to the end of its answer: what runs then is ended, what still waits has failed."""
    gather_seconds: float = 0.002
    """How long an idle engine waits for neighbours of the first request."""
    speculative: bool = Options.speculative
    """Whether the shadow drafts for requests that do not say."""
    prefill_tokens: int | None = None
    """Tokens of prompts that are read in one step, which delays those that run. None: 128 on a CPU, 1024 elsewhere.

    SmolLM2-135M on one thread, a prompt of 2,000 tokens beside one short answer (docs/records/prefill-pieces.json): with 128 a
    token of the short one takes 0.69 s instead of 0.07 s, and the prompt 11.3 s; in one piece the prompt takes 8.7 s, and so
    does that token; with 1,024 they take 9.2 and 4.6 s, with 64 14.5 and 0.46 s. No GPU was measured.
    """


@dataclass(eq=False)
class _Change:
    """Something to do while no forward pass runs."""

    action: Callable[[], None]
    without: str | None = None
    """To be done once no request of this name is left, and nothing else changes the adapters."""
    done: Future[None] = field(default_factory=Future)

    def make(self) -> None:
        try:
            self.action()
        except BaseException as error:  # noqa: BLE001  (handed to who asked; the engine goes on)
            self.settle(error)
        else:
            self.settle(None)

    def settle(self, error: BaseException | None) -> None:
        """Tell who asked, unless a shutdown has."""
        with suppress(InvalidStateError):
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)


class Engine:
    """Runs a :class:`~shadowpeft.serve.backend.Backend`.

    Attributes:
        beat: time (monotonic) of the last step or idle wake-up: an engine that hangs is seen by it.
        steps: forward passes so far. tokens: tokens made so far.
    """

    def __init__(self, backend: Backend, limits: EngineLimits | None = None) -> None:
        self.backend = backend
        self.limits = limits or EngineLimits()
        self._waiting: list[Request] = []
        self._batches: list[Batch] = []
        self._changes: list[_Change] = []
        self._changed = threading.Condition()
        self._stopping = self._broken = False
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
        sampling: SamplingParams,
        emit: Callable[[Event], None],
        until: Callable[[list[str], Scores], bool] | None = None,
        actions: Choices | None = None,
        speculative: bool | None = None,
    ) -> Request:
        """Queue a request.

        Args:
            ids: tokens of the prompt. name: one of the backend's names.
            emit: called from the engine's thread with every :class:`Token`, then one :class:`Finish` or :class:`Failed`.
            until: asked after each token with the pieces and scores so far; True ends the answer.
            actions: the answer starts with one of these; what follows is free.
            speculative: whether the shadow drafts where that is faster; None: as the engine does by default. What is drawn with
                a seed depends on it, its distribution does not.

        Raises:
            DataError: if the prompt is empty or too long, or more tokens are asked for than allowed.
            ConfigError: for an unknown name. QueueFullError: as it says. StoppedError: while shutting down.
        """
        deadline = time.monotonic() + self.limits.answer_seconds
        request = Request(ids, name, sampling, emit, until, actions, deadline, generator=sampling.generator())
        if self.limits.speculative if speculative is None else speculative:
            request.gate = self.backend.gate(name, sampled=request.generator is not None)
        with self._changed:
            self.check(len(ids), name, sampling.max_tokens)  # here, so that the name is not taken out in between
            if self._stopping or self._broken:
                why = _BROKEN if self._broken else "the server is shutting down; send the request to another one"
                raise StoppedError(why)
            self._waiting = [r for r in self._waiting if not r.cancelled]
            # a name that has none waiting may always wait: the requests of others must not shut it out
            # those that a free row takes with the next step do not wait
            places = self.limits.queue + max(0, self.limits.max_num_seqs - self.running)
            if len(self._waiting) >= places and any(r.name == name for r in self._waiting):
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already; try again later")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def check(self, prompt: int, name: str, max_tokens: int) -> None:
        """Raises:
        DataError: if a prompt of so many tokens with such an answer is not allowed. ConfigError: for an unknown name.
        """
        limits, names = self.limits, self.backend.names
        if name not in names:
            raise UnknownModelError(
                f"model '{name}' is not loaded{did_you_mean(name, list(names))}; there are {sorted(names)}"
            )
        if prompt == 0:
            raise DataError("the prompt has no tokens; send some text")
        if prompt > limits.prompt_tokens:
            raise TooLongError(f"the prompt has {prompt} tokens but may have {limits.prompt_tokens}; shorten it")
        if max_tokens > limits.new_tokens:
            raise TooLongError(f"max_tokens is {max_tokens} but may be {limits.new_tokens}; lower it")
        if prompt + max_tokens > self.backend.max_model_len:
            raise TooLongError(
                f"the prompt has {prompt} tokens and {max_tokens} more are asked for, which is longer than the model's context "
                f"length of {self.backend.max_model_len}; shorten the prompt or lower max_tokens"
            )

    def add(self, name: str, folder: str) -> None:
        """Load one more adapter. It is read and checked beside the running answers, and put in its place between two steps.

        Raises:
            ShadowPeftError: if it cannot be loaded; everything is as it was.
        """
        self.backend.add(name, folder, lambda action: self.between(action).result())

    def remove(self, name: str) -> Future[None]:
        """Take an adapter out: new requests for it are refused at once, those that are here are finished first.

        Returns:
            What is done when the adapter is out; the same for all who ask meanwhile.

        Raises:
            ConfigError: if it has to stay.
        """
        with self._changed:
            for change in self._changes:
                if change.without == name:
                    return change.done
            self.backend.check_removable(name)
            self.backend.leaving.add(name)
            try:
                return self._between(_Change(lambda: self.backend.remove(name), name))
            except StoppedError:
                self.backend.leaving.discard(name)
                raise

    def between(self, action: Callable[[], None]) -> Future[None]:
        """Do something in the engine's thread while no forward pass runs, after the present step.

        Returns:
            What is done when it is, or has what ``action`` raised.

        Raises:
            StoppedError: if nothing is done any more.
        """
        return self._between(_Change(action))

    def _between(self, change: _Change) -> Future[None]:
        change.done.set_running_or_notify_cancel()  # so that nobody who waits for it can cancel it for the others
        with self._changed:
            if not self.ready():
                raise StoppedError("the server takes no changes now: it is shutting down, or has not started")
            self._changes = [*self._changes, change]
            self._changed.notify_all()
        return change.done

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have."""
        return sum(len(batch.requests) for batch in list(self._batches))

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
        self._fail_all(StoppedError("the server shut down before this was finished"))
        self._thread.join(min(timeout, _LAST_SECONDS))
        return False

    def _fail_all(self, error: StoppedError) -> None:
        """Tell all who wait for an answer or a change."""
        with self._changed:
            left = [*self._waiting, *(r for batch in list(self._batches) for r in batch.requests)]
            self._waiting.clear()
            changes, self._changes = self._changes, []
        for change in changes:
            self.backend.leaving.discard(change.without or "")
            change.settle(error)
        for request in left:
            request.fail(error)

    # -------------------------------------------------------------------------------------------- in the engine's thread

    def _run(self) -> None:
        try:
            with thin_products(self.backend.model):
                self._loop()
        except BaseException as error:  # noqa: BLE001  (everybody who waits is told; the server is not ready any more)
            _log.critical("the engine has stopped", exc_info=error)
            self._broken = True
            self._fail_all(StoppedError(_BROKEN))

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._batches and not self._changes:
                    self.beat = time.monotonic()
                    if self._stopping:
                        return
                    self._changed.wait(1.0)
                idle = not self._batches and not self._changes
                stuck = bool(self._changes) and not self._waiting and not self._batches
            if (idle or stuck) and self.limits.gather_seconds:  # neighbours may come, or what a change waits for end
                time.sleep(self.limits.gather_seconds)
            self.step()

    def step(self) -> None:
        """Admit who may start, add a token to every answer, read a piece of the prompts, and make the changes that are due."""
        self._drop_overdue()
        self._admit()
        advancing = [batch for batch in self._batches if not batch.reading]
        for batch in [*advancing, *next_to_read(self._batches)]:
            self._pass(batch)
        ready = [batch for batch in self._batches if batch.requests and not batch.reading]
        reading = [batch for batch in self._batches if batch.requests and batch.reading]
        try:
            self._batches = [*join_batches(ready, self.limits.batches), *reading]
        except BaseException as error:  # noqa: BLE001  (half-joined caches are lost; the others go on)
            self._batches = reading
            for request in [request for batch in ready for request in batch.requests]:
                request.fail(error)
        self._change()
        self.beat = time.monotonic()

    def _change(self) -> None:
        """Make the changes that are due. One that must wait for others leaves the batches running."""
        with self._changed:
            needed = {r.name for r in self._waiting} | {r.name for batch in self._batches for r in batch.requests}
            changes = self._changes
        for change in changes:
            if change.without is None:
                change.make()
            elif change.without in needed or not self.backend.changing.acquire(blocking=False):
                continue
            else:
                try:
                    change.make()
                finally:
                    self.backend.changing.release()
            self._forget(change)

    def _forget(self, change: _Change) -> None:
        with self._changed:
            self._changes = [other for other in self._changes if other is not change]
            self.backend.leaving.discard(change.without or "")

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        with self._changed:
            late = [r for r in self._waiting if r.deadline <= now]
            if late:
                self._waiting = [r for r in self._waiting if r.deadline > now]
        for request in late:
            limit = self.limits.answer_seconds
            request.fail(OverdueError(f"the request waited {limit:g} s and had not begun; try again later"))

    def _admit(self) -> None:
        """Start what waits and has room."""
        running = [request for batch in self._batches for request in batch.requests]
        admitted: list[Request] = []
        with self._changed:
            self._waiting = [request for request in self._waiting if not request.cancelled]
            while self._waiting and len(running) + len(admitted) < self.limits.max_num_seqs:
                request = next_in_turn(self._waiting, [*running, *admitted])
                self._waiting.remove(request)
                admitted.append(request)
        for group in group_by_length(admitted):
            self._open(group)

    def _open(self, requests: list[Request]) -> None:
        try:
            self._batches = [*self._batches, Batch(self.backend, requests)]
        except BaseException as error:  # noqa: BLE001  (handed to the request; the engine goes on)
            if len(requests) == 1:
                requests[0].fail(error)
            else:
                for request in requests:
                    self._open([request])

    def _pass(self, batch: Batch) -> None:
        tokens = self.limits.prefill_tokens or (128 if self.backend.model.device.type == "cpu" else 1024)
        piece = max(tokens // max(len(batch.requests), 1), _SHORTEST_PIECE)
        try:
            with torch.inference_mode():
                self.tokens += batch.forward_step(piece)
            self.steps += 1
        except BaseException as error:  # noqa: BLE001  (each request is tried alone, and told if it fails again)
            requests = batch.requests
            if len(requests) == 1:
                requests[0].fail(error)
            else:
                for row, request in enumerate(requests):
                    try:
                        self._batches = [*self._batches, batch.alone(self.backend, row)]
                    except BaseException as again:  # noqa: BLE001
                        request.fail(again)
            batch.requests = []

"""The reply to one request, from this server's engine or from the cloud: whole, or chunk by chunk."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import accumulate
from typing import Any

from shadowpeft.data.action_trie import Choices
from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.answers import ResponseBuilder, usage
from shadowpeft.serve.client import CloudClient
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.protocol import error
from shadowpeft.serve.requests import Event, Failed, Finish, Request, SamplingParams, Token
from shadowpeft.serve.router import Scores


class EngineError(ShadowPeftError):
    """A forward pass failed; its cause says how."""


class Generation:
    """A request in the engine, seen from the event loop. Leaving the ``with`` block cancels what is not finished."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.tokens: list[Token] = []
        self.finish: Finish | None = None
        self._request: Request | None = None

    def start(
        self,
        engine: Engine,
        ids: list[int],
        name: str,
        sampling: SamplingParams,
        until: Callable[[list[str], Scores], bool] | None = None,
        actions: Choices | None = None,
        speculative: bool | None = None,
    ) -> Generation:
        """Submit; raises what :meth:`Engine.submit` does."""
        self._request = engine.submit(ids, name, sampling, self._emit, until, actions, speculative)
        return self

    def _emit(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._request is not None:
            self._request.cancelled = True

    async def next(self) -> Token | Finish:
        """The next event.

        Raises:
            EngineError: if the model failed. ShadowPeftError: what else went wrong in the engine.
        """
        event = await self.queue.get()
        if isinstance(event, Failed):
            if isinstance(event.error, ShadowPeftError):
                raise event.error
            raise EngineError(f"the model failed with {type(event.error).__name__}") from event.error
        if isinstance(event, Token):
            self.tokens.append(event)
        else:
            self.finish = event
        return event

    async def run(self) -> Finish:
        """Wait for the end."""
        while self.finish is None:
            await self.next()
        return self.finish

    @property
    def text(self) -> str:
        """All of a finished answer."""
        return "".join(t.text for t in self.tokens) + (self.finish.text if self.finish else "")


class Reply(ABC):
    """What a request gets.

    Attributes:
        note: where the answer was made and why, and how long it took; complete at the end.
        first: seconds until its beginning was there.
        counts: tokens read and made, once the whole answer is there; None: the cloud did not say.
    """

    named_events = False
    """Whether the chunks of a stream are events with names (their ``type``), of which the last says that it is the last."""

    def __init__(self, note: dict[str, Any], began: float) -> None:
        self.note, self.began = note, began
        self.first: float | None = None
        self.counts: dict[str, Any] | None = None

    @property
    def parts(self) -> list[Reply]:
        """The replies that are counted, each an answer of its own."""
        return [self]

    @abstractmethod
    async def begin(self) -> None:
        """Wait until it is certain that there is an answer; raises otherwise."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""

    @abstractmethod
    def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces."""

    @abstractmethod
    def close(self) -> None:
        """Give up what is not finished."""

    def broken(self, message: str) -> dict[str, Any]:
        """What ends a stream that cannot be finished."""
        return error(message, "server_error", "incomplete")


class LocalReply(Reply):
    """An answer of this server's engine; what it has made already is given first."""

    def __init__(self, generation: Generation, builder: ResponseBuilder, began: float) -> None:
        super().__init__(builder.note, began)
        self.generation, self.builder = generation, builder

    async def begin(self) -> None:
        if not self.generation.tokens and self.generation.finish is None:
            await self.generation.next()
        self.first = time.monotonic() - self.began

    async def whole(self) -> dict[str, Any]:
        finish = await self.generation.run()
        self._time()
        self.counts = counts = _usage(finish)
        text, tokens = self.generation.text, self.generation.tokens
        starts = [0, *accumulate(len(token.piece) for token in tokens)]
        return self.builder.whole(text, tokens[: _within(starts, len(text))], self._reason(finish), counts)

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        generation, seen, given, characters, starts = self.generation, 0, 0, 0, [0]
        while True:
            while seen < len(generation.tokens):
                token = generation.tokens[seen]
                seen, characters = seen + 1, characters + len(token.text)
                starts.append(starts[-1] + len(token.piece))
                if token.text or seen == 1:  # a token of which nothing is certain yet may be part of a stop text
                    ready = generation.tokens[given : _within(starts, characters)]
                    given += len(ready)
                    for chunk in self.builder.chunks(token.text, ready):
                        yield _uncounted(chunk, with_usage)
            if generation.finish is not None:
                break
            await generation.next()
        self._time()
        finish = generation.finish
        self.counts = _usage(finish)
        rest = generation.tokens[given : _within(starts, characters + len(finish.text))]
        for chunk in [*(self.builder.chunks(finish.text, rest) if finish.text or rest else []), *self._end(finish)]:
            yield _uncounted(chunk, with_usage)
        if with_usage:
            yield self.builder.last(self.counts)

    def close(self) -> None:
        self.generation.__exit__()

    def _end(self, finish: Finish) -> list[dict[str, Any]]:
        return self.builder.chunks("", [], self._reason(finish))

    def _reason(self, finish: Finish) -> str:
        """The protocol knows no cut by time: it is a ``length``, and the note says which."""
        if finish.reason != "time":
            return finish.reason
        self.note["cut"] = "answer_seconds"
        return "length"

    def _time(self) -> None:
        self.note["milliseconds"] = _ms(self.began)


async def begun(reply: Reply) -> Reply:
    """The reply, once its first part is there; it is closed if none comes."""
    try:
        await reply.begin()
    except BaseException:
        reply.close()
        raise
    return reply


class ForwardedReply(Reply):
    """An answer of the cloud under this server's name and note. A stream is asked for its token counts in any case."""

    def __init__(
        self,
        cloud: CloudClient,
        path: str,
        body: dict[str, Any],
        model: str,
        note: dict[str, Any],
        began: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(note, began)
        self.cloud, self.path, self.body, self.model, self.headers = cloud, path, body, model, headers
        self._whole: dict[str, Any] | None = None
        self._chunks: AsyncIterator[dict[str, Any]] | None = None
        self._head: dict[str, Any] | None = None

    async def begin(self) -> None:
        if self.body.get("stream"):
            self.body["stream_options"] = {**(self.body.get("stream_options") or {}), "include_usage": True}
            self._chunks = self.cloud.stream(self.path, self.body, self.headers)
            self._head = await anext(self._chunks)
        else:
            self._whole = await self.cloud.ask(self.path, self.body, self.headers)
        self.first = time.monotonic() - self.began

    async def whole(self) -> dict[str, Any]:
        assert self._whole is not None
        self.note["milliseconds"] = _ms(self.began)
        self.counts = self._whole.get("usage")
        return self._named(self._whole, note=True)

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        assert self._chunks is not None
        assert self._head is not None
        yield self._named(self._counted(self._head, with_usage), note=True)
        async for chunk in self._chunks:
            bare = not chunk["choices"]
            chunk = self._counted(chunk, with_usage)
            if bare and not with_usage:
                continue
            last = any(choice.get("finish_reason") for choice in chunk.get("choices", []))
            self.note["milliseconds"] = _ms(self.began)
            yield self._named(chunk, note=last)

    def close(self) -> None:
        """Nothing: the connection ends with the task that reads it."""

    def _counted(self, chunk: dict[str, Any], with_usage: bool) -> dict[str, Any]:
        """The chunk as the client asked for it, its counts taken down."""
        self.counts = chunk.get("usage") or self.counts
        return chunk if with_usage else {key: value for key, value in chunk.items() if key != "usage"}

    def _named(self, content: dict[str, Any], note: bool) -> dict[str, Any]:
        content = {key: value for key, value in content.items() if key != "shadowpeft"}
        return {**content, "model": self.model, **({"shadowpeft": dict(self.note)} if note else {})}


def _within(starts: list[int], characters: int) -> int:
    """How many tokens so many characters of an answer have: all of them, unless a stop text has cut it, or may.

    Args:
        starts: where each token's text starts, and where the last one's ends.
    """
    return len(starts) - 1 if starts[-1] <= characters else bisect_left(starts, characters)


def _uncounted(chunk: dict[str, Any], with_usage: bool) -> dict[str, Any]:
    """A chunk before the counts, of a stream that ends with them."""
    return {**chunk, "usage": None} if with_usage else chunk


def _usage(finish: Finish) -> dict[str, Any]:
    return usage(finish.prompt_tokens, finish.new_tokens, finish.drafted, finish.accepted)


def _ms(began: float) -> float:
    return round(1000 * (time.monotonic() - began), 2)

"""Replies as server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Response

from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.failures import report
from shadowpeft.serve.replies import Reply
from shadowpeft.serve.requests import StoppedError

T = TypeVar("T")
UNREAD = "shadowpeft.unread"
"""Key of a request's scope: what to call if its client leaves before it has read its whole answer. Several may see it leave."""


def once(call: Callable[[], None]) -> Callable[[], None]:
    """``call``, done by the first of those who call the result."""
    calls = [call]
    return lambda: calls.pop()() if calls else None


class GoneError(ShadowPeftError):
    """The client left."""


class EventStream(Response):
    """A reply as server-sent events.

    Args:
        sent: called when everything was sent. gone: called when the client left before. closed: called in any case, last.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        reply: Reply,
        with_usage: bool,
        headers: dict[str, str],
        overdue: asyncio.Event,
        *,
        sent: Callable[[], None],
        gone: Callable[[], None],
        closed: Callable[[], None],
    ) -> None:
        # a proxy such as nginx collects kilobytes otherwise
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.reply, self.with_usage, self.overdue = reply, with_usage, overdue
        self._sent, self._gone, self._closed = sent, gone, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await until_gone(receive, self._send_chunks(send), self.overdue)
            except GoneError:
                self._gone()
                return
            except ShadowPeftError as failure:
                report(failure)
                await _event(send, self.reply.broken("the answer could not be finished"), self.reply.named_events)
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._closed()

    async def _send_chunks(self, send: Any) -> None:
        async for chunk in self.reply.chunks(self.with_usage):
            await _event(send, chunk, self.reply.named_events)
        await _room(send)
        self._sent()
        if not self.reply.named_events:
            await _event(send, "[DONE]")
            await _room(send)


async def _event(send: Any, content: dict[str, Any] | str, named: bool = False) -> None:
    data = content if isinstance(content, str) else json.dumps(content)
    name = f"event: {content['type']}\n" if named and isinstance(content, dict) else ""
    await send({"type": "http.response.body", "body": f"{name}data: {data}\n\n".encode(), "more_body": True})


async def _room(send: Any) -> None:
    """Wait until the client has read enough: a server waits before it sends, so the last event would be sent unawaited."""
    await send({"type": "http.response.body", "body": b"", "more_body": True})


async def until_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T], overdue: asyncio.Event) -> T:
    """The result of ``work``, which is cancelled if the client disconnects before, or ``overdue`` is set.

    Raises:
        GoneError: if the client disconnects. StoppedError: if ``overdue`` is set.
    """

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task: asyncio.Future[T] = asyncio.ensure_future(work)
    listener: asyncio.Future[Any] = asyncio.ensure_future(listen())
    clock: asyncio.Future[Any] = asyncio.ensure_future(overdue.wait())
    everything: set[asyncio.Future[Any]] = {task, listener, clock}
    try:
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        if listener.done():  # first: what is sent to a client that has left is dropped, so the work ends at the same moment
            raise GoneError("the client left")
        if task.done():
            return task.result()
        raise StoppedError("the server shut down before the answer was finished")
    finally:
        for each in everything:
            each.cancel()
        await asyncio.gather(*everything, return_exceptions=True)

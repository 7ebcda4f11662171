"""Replies as server-sent events, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Response

from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.failures import report
from shadowpeft.serve.protocol import error
from shadowpeft.serve.replies import Reply

T = TypeVar("T")


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
        *,
        sent: Callable[[], None],
        gone: Callable[[], None],
        closed: Callable[[], None],
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store"})
        del self.headers["content-length"]
        self.reply, self.with_usage = reply, with_usage
        self._sent, self._gone, self._closed = sent, gone, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except GoneError:
            self._gone()
        finally:
            self._closed()

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self.reply.chunks(self.with_usage):
                await _event(send, json.dumps(chunk, ensure_ascii=False))
            self._sent()
            await _event(send, "[DONE]")
        except ShadowPeftError as failure:
            report(failure)
            await _event(send, json.dumps(error("the answer could not be finished", "server_error", "incomplete")))
        await send({"type": "http.response.body", "body": b""})


async def _event(send: Any, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def until_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects before.

    Raises:
        GoneError: if it does.
    """

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task: asyncio.Future[T] = asyncio.ensure_future(work)
    listener: asyncio.Future[Any] = asyncio.ensure_future(listen())
    both: set[asyncio.Future[Any]] = {task, listener}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError("the client left")
    finally:
        for each in both:
            each.cancel()
        await asyncio.gather(*both, return_exceptions=True)

"""Connections that end: requests that arrive too slowly, readers that stop reading, more connections than the process can hold.

uvicorn's own limits begin with a whole request; half a request costs a connection for as long as its client likes.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from shadowpeft.serve.failures import without_text
from shadowpeft.serve.listener import Listener
from shadowpeft.serve.streams import UNREAD

_GRACE_SECONDS = 5.0
"""What the answers that say that the server shuts down may take beyond the drain time."""
_SPARE_FILES = 300
"""Files that are open besides connections of clients: weights, libraries, connections to the cloud."""


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may take."""

    header_seconds: float = 10.0
    """From the connection, or the end of the last answer, to the end of a request's headers."""
    request_seconds: float = 40.0
    """From there to the end of its body. The application gives up earlier, with an answer."""
    write_seconds: float = 30.0
    """Until a client has read what was sent, up to what the system buffers."""
    connections: int = 512
    """At the same time. Beyond, the one that has been sending its request for longest is closed."""


class TimelyProtocol(H11Protocol):
    """uvicorn's protocol with time limits of its own."""

    def __init__(self, limits: ConnectionLimits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.since: float | None = None
        """When the request began that is not wholly there."""
        self._late: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._unread: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.limits.connections:
            slow: list[Any] = [c for c in self.connections if getattr(c, "since", None) is not None]
            oldest = min(slow, key=lambda connection: connection.since)  # this one, if all others are answered
            oldest.since = None  # it is counted until the loop comes round, and must not be chosen twice
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()
        self.since = None
        if self.cycle is not None and not self.cycle.response_complete:  # what is still sent goes nowhere
            request: Any = self.cycle.scope
            self._unread = request.get(UNREAD)
            self._tell_unread()
        elif exc is not None:  # reset by a client that left something unread
            self._tell_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_a_reader()

    def on_response_complete(self) -> None:
        left = self.transport.get_write_buffer_size() > 0
        request: Any = self.scope or {}
        # a connection that was reset during the answer has an empty buffer and will be lost with an exception
        self._unread = request.get(UNREAD) if left or self.transport.is_closing() else None
        super().on_response_complete()
        if left:
            self._expect_a_reader()

    def _watch(self) -> None:
        """Start the clock of a request that is not wholly there, stop that of one that is."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self.since = None
            if self._late is not None:
                self._late.cancel()
        elif self.since is None:
            self.since = time.monotonic()
            self._late = self.loop.call_later(self.limits.header_seconds, self._check_request)

    def _check_request(self) -> None:
        if self.since is None:
            return
        left = self.since + self.limits.request_seconds - time.monotonic()
        if self.conn.their_state is h11.IDLE or left <= 0:
            self.transport.abort()
        else:
            self._late = self.loop.call_later(left, self._check_request)

    def _expect_a_reader(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = self.loop.call_later(self.limits.write_seconds, self._check_reader)

    def _check_reader(self) -> None:
        if self.flow.write_paused or (self.transport.is_closing() and self.transport.get_write_buffer_size()):
            self._tell_unread()
            self.transport.abort()

    def _tell_unread(self) -> None:
        if self._unread is not None:
            self._unread()
        self._unread = None


class DrainingServer(uvicorn.Server):
    """A server whose application ends its answers by itself when it shuts down, before uvicorn would cut them."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: Any = None) -> None:
        draining = asyncio.ensure_future(self._drain())
        await super().shutdown(sockets)
        await draining


def quiet(record: logging.LogRecord) -> bool:
    """uvicorn logs a line for every malformed request, which anybody can send as fast as the network goes."""
    return not record.getMessage().startswith(("Invalid HTTP request", "Unsupported upgrade request"))


def serve(app: FastAPI, listener: Listener, drain_seconds: float, limits: ConnectionLimits | None = None) -> None:
    """Run on a bound ``listener`` until a signal. Running requests are finished within ``drain_seconds``; those that are not
    are told so."""
    import signal

    # uvicorn ends gracefully on SIGTERM and then raises the signal again; a server that was asked to end has not failed
    signal.signal(signal.SIGTERM, lambda *_: None)
    for filter_ in (without_text, quiet):
        logging.getLogger("uvicorn.error").addFilter(filter_)
    settings = uvicorn.Config(
        app,
        http=partial(TimelyProtocol, limits or ConnectionLimits(connections=_affordable())),  # type: ignore[arg-type]
        ws="none",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=round(drain_seconds + _GRACE_SECONDS),
        h11_max_incomplete_event_size=1 << 16,
    )
    DrainingServer(settings, app.state.server.drain).run(listener.sockets)


def _affordable() -> int:
    """Connections that leave the process the files that it needs."""
    if sys.platform == "win32":  # which has neither the module nor the limit
        return ConnectionLimits.connections
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(ConnectionLimits.connections, files - _SPARE_FILES))

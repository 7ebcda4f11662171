"""The edge server's way to the cloud: one HTTP client behind a circuit breaker.

Whatever a cloud does, an exchange ends: it has one deadline and one size. Only what the cloud itself did counts against it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from shadowpeft.errors import ShadowPeftError
from shadowpeft.json_text import parse_json
from shadowpeft.serve.exchange import DONE, MAX_BYTES, MAX_LINE, Exchange, are_counts, checked, message_of, parse
from shadowpeft.serve.options import Options
from shadowpeft.serve.router import CIRCUIT_OPEN, CLOUD_BUSY, CLOUD_DOWN

MAX_EXCHANGES = 128
"""Requests that wait for the cloud, or read from it, at the same time."""
STREAM_SECONDS = 30.0
"""Until a stream's first line, and between lines: one that works says something soon."""
_GRACE = 1.0
"""Seconds beyond the answer's own limit: a cloud with the same limit cuts its answer at that time, which then has to arrive."""
_LAST = 2.0
"""Seconds that the rest of a stream is waited for once the answer has ended."""
_IDLE = 2.0
"""Seconds that an idle connection is kept: less than servers keep theirs, so that none is closed under a request."""
_HINTS = {
    401: "the key for it",
    403: "the key for it",
    404: "--cloud-url and --cloud-model",
    508: "--cloud-url, which leads to an edge server",
}
HOP = "x-shadow-hop"
"""Header of what an edge hands on. An edge that would hand it on again is no cloud, and may be the same one."""
_log = logging.getLogger("shadowpeft.serve")


class CloudError(ShadowPeftError):
    """The cloud gave no answer; ``reason`` is one of the router's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class CloudRefusedError(ShadowPeftError):
    """The cloud refused the request for a fault of the request itself (400, 413, 422)."""

    def __init__(self, status: int, content: Any) -> None:
        self.reason = message_of(content)
        """What the cloud says, in one sentence."""
        super().__init__(f"the cloud refused the request with status {status}")
        self.status, self.content = status, content

    @property
    def details(self) -> dict[str, Any]:
        """What it says beside that, such as ``param``."""
        said = self.content if isinstance(self.content, dict) else {}
        return said["error"] if isinstance(said.get("error"), dict) else said


class LoopError(ShadowPeftError):
    """An edge server was asked as a cloud by an edge server."""


@dataclass
class Breaker:
    """Opens after ``failures`` failures in a row; lets one trial through ``pause`` seconds later, and closes if it succeeds."""

    failures: int = 3
    pause: float = 5.0
    clock: Callable[[], float] = time.monotonic
    failed: int = 0
    opened: float | None = None
    trying: bool = False

    @property
    def state(self) -> str:
        """``closed``, ``open``, or ``half-open`` (a trial may go, or is on its way)."""
        if self.opened is None:
            return "closed"
        return "half-open" if self.trying or self.clock() - self.opened >= self.pause else "open"

    def enter(self) -> bool:
        """Whether a request may go now; each that may must end in one of the two methods below, or :meth:`forget`."""
        if self.opened is None:
            return True
        if self.trying or self.clock() - self.opened < self.pause:
            return False
        self.trying = True
        return True

    def succeed(self) -> None:
        """A request was answered."""
        self.failed, self.opened, self.trying = 0, None, False

    def fail(self) -> None:
        """A request failed."""
        self.failed += 1
        if self.trying or self.failed >= self.failures:
            self.opened = self.clock()
        self.trying = False

    def forget(self) -> None:
        """The client of a request left; this says nothing about the cloud."""
        self.trying = False


class CloudClient:
    """The edge's client of a cloud server.

    Args:
        url: such as ``http://host:8000``, with or without ``/v1``. key: its API key.
        timeout: seconds until a whole answer, or a stream's first line, and between lines. None: a stream has
            :data:`STREAM_SECONDS`, a whole answer as long as it may take.
        delay: seconds to wait before each request, to stand for a network. answer_seconds: for a whole answer.
        hands_on: requests are marked as those of an edge (:data:`HOP`); False: it asks on its own account.

    Attributes:
        exchanges: how many are on their way.
        problem: what went wrong last; None once it is well again.
        on_failure: called with the kind of each failure.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float | None = None,
        connect_timeout: float = 2.0,
        delay: float = 0.0,
        answer_seconds: float = Options.answer_seconds,
        breaker: Breaker | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        hands_on: bool = True,
    ) -> None:
        self.breaker = breaker or Breaker()
        self.delay, self.seconds = delay, answer_seconds + _GRACE
        self.patience = {False: timeout or self.seconds, True: timeout or STREAM_SECONDS}
        """Seconds, by whether the answer is streamed."""
        self.exchanges = 0
        self.problem: str | None = None
        self.on_failure: Callable[[str], None] = lambda kind: None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        if hands_on:
            headers[HOP] = "1"
        address = httpx.URL(re.sub(r"/v1/?$", "", url))
        # out of the address, which libraries log
        login = httpx.BasicAuth(address.username, address.password) if address.userinfo else None
        self._http = httpx.AsyncClient(
            base_url=address.copy_with(username="", password=""),
            auth=login,
            headers={**headers, "accept-encoding": "identity", "content-type": "application/json"},
            timeout=httpx.Timeout(self.seconds, connect=connect_timeout),
            transport=transport,
            trust_env=False,
            limits=httpx.Limits(max_connections=2 * MAX_EXCHANGES, keepalive_expiry=_IDLE),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """The whole answer to ``body``, sent with more ``headers``.

        Raises:
            CloudError: if none came. CloudRefusedError: if the request itself is at fault.
        """
        async with self._open(path, body, headers, self.patience[False]) as (exchange, response):
            content = checked(parse(await exchange.read(response, MAX_BYTES)), "message" if "chat" in path else "text")
            if not content["choices"]:
                raise ValueError("lacks choices")
            self._succeed(exchange)
            self._check_counts(content)
            return content

    async def stream(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer to ``body``; raises as :meth:`ask`, also in the middle."""
        ended = False
        async with self._open(path, {**body, "stream": True}, headers, self.patience[True]) as (exchange, response):
            messages = exchange.messages(response)
            while True:
                try:
                    message = await anext(messages, None)
                except httpx.HTTPError:
                    if ended:  # no [DONE], but the answer is whole
                        return
                    raise
                if message is None:
                    break
                if exchange.over:
                    raise httpx.ReadTimeout("the cloud's answer takes longer than a whole answer may")
                if message is DONE and exchange.settled:
                    break
                chunk = checked(message, "delta" if "chat" in path else "text", streamed=True)
                self._succeed(exchange)
                self._check_counts(chunk)
                ended = ended or any(choice.get("finish_reason") for choice in chunk["choices"])
                if ended:  # the counts may follow, and need not
                    exchange.patience = min(exchange.patience, _LAST)
                    exchange.progress()
                yield chunk
            if not ended:
                raise httpx.RemoteProtocolError("the cloud's answer ended in the middle")

    def _check_counts(self, content: dict[str, Any]) -> None:
        """Leave out token counts that are none; an answer without any is as good."""
        if content.get("usage") is not None and not are_counts(content["usage"]):
            self._failed("usage", "the cloud's answer has token counts that are none; they were left out")
            del content["usage"]

    def _succeed(self, exchange: Exchange) -> None:
        """The cloud works: an answer came, or a stream's first chunk."""
        if not exchange.settled:
            exchange.settled = True
            self.breaker.succeed()
            self.problem = None

    def _failed(self, kind: str, problem: str) -> None:
        """Tell who runs the edge."""
        self.problem = problem
        self.on_failure(kind)

    @asynccontextmanager
    async def _open(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None, patience: float
    ) -> AsyncIterator[tuple[Exchange, httpx.Response]]:
        # before anything counts against the cloud; in ASCII, so that there is nothing in it that cannot be sent
        content = json.dumps(body).encode()
        if self.exchanges >= MAX_EXCHANGES:
            raise CloudError(CLOUD_BUSY, f"{self.exchanges} requests wait for the cloud already")
        if not self.breaker.enter():
            raise CloudError(
                CIRCUIT_OPEN, "the cloud failed several times in a row, so it is not asked for a few seconds"
            )
        self.exchanges += 1
        trial = self.breaker.trying
        exchange = Exchange(self.seconds + self.delay, patience + self.delay, trial)
        try:
            await asyncio.sleep(self.delay)
            response = await self._send(exchange, path, content, dict(headers or {}))
            try:
                exchange.progress()
                if response.status_code != 200:
                    self._judge(response.status_code, await exchange.read(response, MAX_LINE))
                yield exchange, response
            finally:
                await response.aclose()
        except CloudRefusedError:
            self._succeed(exchange)  # it is alive
            raise
        except CloudError as error:
            if error.reason == CLOUD_BUSY:
                self._succeed(exchange)
            self._fail(exchange, "status", error)
            raise
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            what = (
                f"{type(error).__name__}: what it said {error}" if type(error) is ValueError else type(error).__name__
            )
            failure = CloudError(CLOUD_DOWN, f"the cloud gave no answer ({what})")
            kind = "timeout" if isinstance(error, httpx.TimeoutException) else "answer"
            self._fail(exchange, "connection" if isinstance(error, httpx.ConnectError) else kind, failure)
            raise failure from error
        finally:
            self.exchanges -= 1
            if trial and not exchange.settled:
                self.breaker.forget()

    async def _send(self, exchange: Exchange, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        """The response as it begins. A connection that the cloud has closed since it was used last says nothing of the cloud,
        so what breaks on such a one is sent again on another."""
        while True:
            seen: list[str] = []

            async def trace(event: str, _: Any, seen: list[str] = seen) -> None:
                seen.append(event)

            request = self._http.build_request("POST", path, content=content, headers=headers, extensions={"trace": trace})
            try:
                return await exchange.within(self._http.send(request, stream=True))
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                if not seen or any(event.startswith("connection.connect") for event in seen):
                    raise

    def _fail(self, exchange: Exchange, kind: str, error: CloudError) -> None:
        # an answer that began and did not end in time says nothing: its client may read slowly
        begun, exchange.settled = exchange.settled, True
        counts = error.reason != CLOUD_BUSY and not (begun and exchange.over)
        if counts and (exchange.trial or self.breaker.opened is None):
            self.breaker.fail()
        _log.warning("%s: %s", error.reason, error)
        self._failed(kind, str(error))

    @staticmethod
    def _judge(status: int, content: bytes) -> None:
        if status == 429:
            raise CloudError(CLOUD_BUSY, "the cloud has too many requests")
        if status not in (400, 413, 422):  # anything else is no fault of the request, but of who runs edge and cloud
            hint = _HINTS.get(status, "--cloud-url" if status < 500 else None)
            raise CloudError(
                CLOUD_DOWN, f"the cloud answered with status {status}" + (f"; check {hint}" if hint else "")
            )
        try:
            said = parse_json(content)
        except ValueError:
            said = None
        raise CloudRefusedError(status, said)

"""The edge server's way to the cloud: one HTTP client behind a circuit breaker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.options import Options
from shadowpeft.serve.router import CIRCUIT_OPEN, CLOUD_BUSY, CLOUD_DOWN


class CloudError(ShadowPeftError):
    """The cloud gave no answer; ``reason`` is one of the router's."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class CloudRefusedError(ShadowPeftError):
    """The cloud refused the request for a fault of the request itself (4xx)."""

    def __init__(self, status: int, content: Any) -> None:
        super().__init__(f"the cloud refused the request with status {status}")
        self.status, self.content = status, content


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
        url: such as ``http://host:8000``. key: its API key. timeout: seconds until the first byte, and between bytes.
        delay: seconds to wait before each request, to stand for a network. answer_seconds: for a whole stream.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = Options.cloud_timeout,
        connect_timeout: float = 2.0,
        delay: float = 0.0,
        answer_seconds: float = Options.answer_seconds,
        breaker: Breaker | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.breaker = breaker or Breaker()
        self.delay, self.answer_seconds = delay, answer_seconds
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=connect_timeout),
            transport=transport,
            trust_env=False,
            limits=httpx.Limits(max_connections=256),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The whole answer to ``body``.

        Raises:
            CloudError: if none came. CloudRefusedError: for a 4xx.
        """
        async with self._open(path, body) as response:
            content = json.loads(await response.aread())
            if not _is_answer(content):
                raise httpx.DecodingError("the cloud's answer lacks choices or usage")
            return content  # type: ignore[no-any-return]

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer to ``body``; raises as :meth:`ask`, also in the middle."""
        end, begun = time.monotonic() + self.answer_seconds, False
        async with self._open(path, {**body, "stream": True}) as response:
            async for line in response.aiter_lines():
                if time.monotonic() >= end:
                    raise httpx.ReadTimeout("the cloud's answer takes longer than a whole answer may")
                field, _, data = line.partition(":")
                if field != "data":
                    continue
                if data.strip() == "[DONE]" and begun:
                    return
                chunk = json.loads(data)
                if not isinstance(chunk, dict) or "choices" not in chunk:  # an error, or nothing of this protocol
                    raise httpx.RemoteProtocolError("the cloud failed in the middle of its answer")
                begun = True
                yield chunk
            raise httpx.RemoteProtocolError("the cloud's answer ended in the middle")

    @asynccontextmanager
    async def _open(self, path: str, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        if not self.breaker.enter():
            raise CloudError(
                CIRCUIT_OPEN, "the cloud failed several times in a row, so it is not asked for a few seconds"
            )
        settled = False
        try:
            await asyncio.sleep(self.delay)
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    self._judge(response.status_code, await response.aread())
                yield response
            self.breaker.succeed()
            settled = True
        except CloudRefusedError:
            self.breaker.succeed()  # it is alive
            settled = True
            raise
        except CloudError as error:
            (self.breaker.succeed if error.reason == CLOUD_BUSY else self.breaker.fail)()
            settled = True
            raise
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            self.breaker.fail()
            settled = True
            raise CloudError(CLOUD_DOWN, f"the cloud gave no answer ({type(error).__name__})") from error
        finally:
            if not settled:
                self.breaker.forget()

    @staticmethod
    def _judge(status: int, content: bytes) -> None:
        if status == 429:
            raise CloudError(CLOUD_BUSY, "the cloud has too many requests")
        if status in (401, 403):
            raise CloudError(CLOUD_DOWN, f"the cloud answered with status {status}; check the key for it")
        if not 400 <= status < 500:
            raise CloudError(CLOUD_DOWN, f"the cloud answered with status {status}")
        try:
            said = json.loads(content)
        except ValueError:
            said = None
        raise CloudRefusedError(status, said)


def _is_answer(content: Any) -> bool:
    """Whether it has what is passed on and counted."""
    if not isinstance(content, dict):
        return False
    choices, counts = content.get("choices"), content.get("usage")
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        return False
    wanted = ("prompt_tokens", "completion_tokens")
    return isinstance(counts, dict) and all(isinstance(counts.get(name), int) for name in wanted)

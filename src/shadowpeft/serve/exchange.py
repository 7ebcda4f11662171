"""One request to a cloud and what comes back: its time, its size, its events, and whether they can be passed on."""

from __future__ import annotations

import asyncio
import math
import re
import time
from codecs import BOM_UTF8
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import httpx

from shadowpeft.json_text import parse_json

MAX_BYTES = 32 << 20
"""Of one answer, a stream's too."""
MAX_LINE = 1 << 20
"""Bytes of one line of a stream, and of a refusal."""
DONE = object()
"""The end of a stream."""
_ANSWERS = (b"", b"message", b"error")
"""Names of events that are about the answer."""
_NEWLINE = re.compile(rb"\r\n|\r|\n")
T = TypeVar("T")


class Exchange:
    """One request to the cloud and what comes back.

    Args:
        seconds: for all of it. patience: for the headers, and for each line or the whole body after them.
        trial: whether it is the one that an open circuit lets through.
    """

    def __init__(self, seconds: float, patience: float, trial: bool) -> None:
        self.end, self.patience, self.trial = time.monotonic() + seconds, patience, trial
        self.settled = False
        """Whether the breaker was told of it."""
        self.waits_until = 0.0
        self.progress()

    def progress(self) -> None:
        """Something has come."""
        self.waits_until = min(self.end, time.monotonic() + self.patience)

    @property
    def over(self) -> bool:
        """Whether the time for all of it has passed."""
        return time.monotonic() >= self.end

    async def within(self, work: Awaitable[T]) -> T:
        """The result of ``work``, if it comes in time."""
        try:
            return await asyncio.wait_for(work, max(self.waits_until - time.monotonic(), 0.001))
        except asyncio.TimeoutError as error:
            raise httpx.ReadTimeout("the cloud takes too long") from error

    async def read(self, response: httpx.Response, limit: int) -> bytes:
        """A whole body."""
        return b"".join([piece async for piece in self._pieces(response, limit)])

    async def lines(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """The lines of a body, which CR and LF end and nothing else; the last one may have no end."""
        rest = b""
        async for piece in self._pieces(response, MAX_BYTES):
            whole = rest + piece
            end = len(whole) - whole.endswith(b"\r")  # its LF may be in the next piece
            *lines, rest = _NEWLINE.split(whole[:end])
            rest += whole[end:]
            for line in lines:
                self.progress()
                yield line
            if len(rest) > MAX_LINE:
                raise httpx.DecodingError(f"a line of the cloud's answer has more than {MAX_LINE} bytes")
        for line in _NEWLINE.split(rest):
            if line:
                yield line

    async def messages(self, response: httpx.Response) -> AsyncIterator[Any]:
        """What the events of a stream (server-sent events) hold, read as JSON; :data:`DONE` for ``[DONE]``.

        An event's lines ``data:`` belong together up to an empty line; one that is whole by itself is given at once. Events of
        a name of their own, such as pings, say nothing of the answer.

        Raises:
            ValueError: if an event holds no JSON.
        """
        event, held, size = b"", list[bytes](), 0
        async for line in self.lines(response):
            field, _, value = line.removeprefix(BOM_UTF8).partition(b":")
            value = value.removeprefix(b" ")
            if not line:
                if held:
                    yield parse(b"\n".join(held))
                event, held, size = b"", [], 0
            elif field == b"event":
                event = value.strip()
            elif field == b"data" and event in _ANSWERS and (held or value.strip()):
                size += len(value) + 1
                if size > MAX_LINE:
                    raise httpx.DecodingError(f"an event of the cloud's answer has more than {MAX_LINE} bytes")
                if held:
                    held.append(value)
                    continue
                if value.strip() == b"[DONE]":
                    yield DONE
                    continue
                try:
                    found = parse(value)
                except ValueError:
                    held = [value]  # more lines may follow
                else:
                    size = 0
                    yield found
        if held:
            yield parse(b"\n".join(held))

    async def _pieces(self, response: httpx.Response, limit: int) -> AsyncIterator[bytes]:
        source, size = response.aiter_bytes(), 0

        async def following() -> bytes | None:
            return await anext(source, None)

        while (piece := await self.within(following())) is not None:
            size += len(piece)
            if size > limit:
                raise httpx.DecodingError(f"the cloud's answer has more than {limit} bytes")
            yield piece


def parse(content: bytes) -> Any:
    """JSON as it came over the wire.

    Raises:
        ValueError: a clause, if it is none.
    """
    return parse_json(content, parse_constant=_no_number, parse_float=_finite)


def message_of(content: Any) -> str | None:
    """The sentence of a refusal or an error, in any of the forms that servers give it; None without one."""
    if not isinstance(content, dict):
        return None
    for said in (content.get("error"), content.get("message"), content.get("detail")):
        if isinstance(said, dict):
            said = said.get("message")
        if isinstance(said, list):  # of FastAPI
            said = "; ".join(f"{each.get('loc')}: {each['msg']}" for each in said if isinstance(each, dict) and "msg" in each)
        if isinstance(said, str) and said.strip():
            return said.strip()
    return None


def checked(answer: Any, key: str, *, streamed: bool = False) -> dict[str, Any]:
    """An answer, or a chunk of one, that is safe to pass on.

    Args:
        key: what each choice says it by: ``message``, ``delta`` or ``text``.

    Raises:
        ValueError: a clause, if it is none.
    """
    if not isinstance(answer, dict) or "choices" not in answer:
        said = message_of(answer)
        raise ValueError("is nothing of this protocol" if said is None else f"is the error {said[:200]!r}")
    choices = answer["choices"]
    if choices is None and streamed:
        choices = answer["choices"] = []
    if not isinstance(choices, list) or not all(_is_choice(choice, key) for choice in choices):
        raise ValueError("has choices that are none")
    return answer


def _is_choice(choice: Any, key: str) -> bool:
    if not isinstance(choice, dict) or not isinstance(choice.get("finish_reason"), (str, type(None))):
        return False
    said = choice.get(key)
    if key != "text":
        if not isinstance(said, dict):
            return key == "delta" and said is None
        said = said.get("content")
    return said is None or isinstance(said, str)


def are_counts(counts: Any) -> bool:
    """Whether both are there and are numbers of tokens."""
    if not isinstance(counts, dict):
        return False
    numbers = [counts.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return all(type(number) is int and 0 <= number < 1 << 53 for number in numbers)


def _no_number(name: str) -> float:
    raise ValueError(f"holds {name}, which is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)

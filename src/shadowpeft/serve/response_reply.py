"""Answers of ``POST /v1/responses``, made of a chat's: whole, or event by event."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from shadowpeft.serve.answers import CALLED, call_id
from shadowpeft.serve.client import CloudError
from shadowpeft.serve.replies import Reply
from shadowpeft.serve.responses import ResponsesRequest
from shadowpeft.serve.router import CLOUD_DOWN

_CUT = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer is incomplete, by the chat's reason for its end."""


def _usage(counts: dict[str, Any] | None) -> dict[str, Any] | None:
    """A chat's counts under this endpoint's names; None: a cloud did not say."""
    if counts is None:
        return None
    read, made = (_numbers(counts.get(f"{kind}_tokens_details")) for kind in ("prompt", "completion"))
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": read.get("cached_tokens", 0), "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **made},
        "total_tokens": counts["prompt_tokens"] + counts["completion_tokens"],
    }


def _numbers(details: Any) -> dict[str, int]:
    return {key: n for key, n in details.items() if type(n) is int} if isinstance(details, dict) else {}


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]]:
    told = choice.get("logprobs")
    content = told.get("content") if isinstance(told, dict) else None
    return [each for each in content if isinstance(each, dict)] if isinstance(content, list) else []


def _of_the_beginning(logprobs: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Those of the tokens that begin with ``text``, behind which calls stand."""
    left, place = len(text), 0
    while place < len(logprobs) and left > 0:
        left -= len(str(logprobs[place].get("token", "")))
        place += 1
    return logprobs[:place]


def _of_the_end(logprobs: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Those of the tokens that end with ``text``, which stands after calls."""
    left, place = len(text), len(logprobs)
    while place and left > 0:
        place -= 1
        left -= len(str(logprobs[place].get("token", "")))
    return logprobs[place:]


def _calls(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, or what a delta adds to them.

    Raises:
        CloudError: if a cloud sends something else.
    """
    calls = said.get(CALLED) or []
    if not isinstance(calls, list) or not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls):
        raise CloudError(CLOUD_DOWN, "the cloud's answer has tool calls that are none")
    return calls


def _string(holder: dict[str, Any], key: str) -> str:
    value = holder.get(key)
    return value if isinstance(value, str) else ""


class _Message:
    """A message that grows; ``kind``: of its one part, ``output_text`` or ``refusal``."""

    ended: dict[str, Any] | None = None
    """The item as it ended; None: it still grows."""

    def __init__(self, kind: str = "output_text", text: str = "") -> None:
        self.id, self.kind, self.text = f"msg_{uuid.uuid4().hex}", kind, text
        self.logprobs = list[dict[str, Any]]()

    @property
    def part(self) -> dict[str, Any]:
        if self.kind == "refusal":
            return {"type": "refusal", "refusal": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part]
        return {"type": "message", "id": self.id, "role": "assistant", "status": status, "content": content}


class _Call:
    """A call that grows."""

    ended: dict[str, Any] | None = None

    def __init__(self, call: dict[str, Any], arguments: str = "") -> None:
        self.id, self.call_id = f"fc_{uuid.uuid4().hex}", _string(call, "id") or call_id()
        self.name, self.arguments = _string(call["function"], "name"), arguments

    def item(self, status: str) -> dict[str, Any]:
        said = {"call_id": self.call_id, "name": self.name, "arguments": self.arguments}
        return {"type": "function_call", "id": self.id, "status": status, **said}


class ResponsesReply(Reply):
    """A chat's reply in the form of ``/v1/responses``."""

    named_events = True

    def __init__(self, asked: ResponsesRequest, inner: Reply) -> None:
        super().__init__(inner.note, inner.began)
        self.inner = inner
        head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": asked.model}
        self._said: dict[str, Any] = {**head, **asked.told()}
        self._events = 0

    @property
    def parts(self) -> list[Reply]:
        return self.inner.parts

    async def begin(self) -> None:
        """Nothing: the chat's reply has begun."""

    async def whole(self) -> dict[str, Any]:
        choice = (await self.inner.whole())["choices"][0]
        reason, said = choice["finish_reason"], choice["message"]
        items: list[_Message | _Call] = [_Call(call, _string(call["function"], "arguments")) for call in _calls(said)]
        text, refusal = said.get("content") or "", _string(said, "refusal")
        if text or not (items or refusal):
            message = _Message(text=text)
            before = bool(items) and [*said].index("content") < [*said].index(CALLED)
            part = _of_the_beginning if before else _of_the_end
            message.logprobs = part(_logprobs(choice), text) if items else _logprobs(choice)
            items.insert(0 if before else len(items), message)
        if refusal:
            items.append(_Message("refusal", refusal))
        done = [item.item("completed") for item in items[:-1]]
        return self._response(reason, [*done, items[-1].item("incomplete" if reason in _CUT else "completed")])

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response(None, []))
        growing = _Growing(self)
        reason = "stop"
        async for chunk in self.inner.chunks(True):
            for choice in chunk["choices"]:
                reason, delta = choice.get("finish_reason") or reason, choice.get("delta") or {}
                logprobs, text = _logprobs(choice), delta.get("content") or ""
                if text or (logprobs and growing.takes_logprobs(delta)):
                    for event in growing.say("output_text", text, logprobs):
                        yield event
                if refusal := _string(delta, "refusal"):
                    for event in growing.say("refusal", refusal, []):
                        yield event
                for call in _calls(delta):
                    for event in growing.call(call):
                        yield event
        if not growing.items:  # an answer of no characters is a message too
            for event in growing.open(_Message()):
                yield event
        for event in growing.close("incomplete" if reason in _CUT else "completed"):
            yield event
        response = self._response(reason, [item.ended for item in growing.items if item.ended is not None])
        yield self._event(f"response.{response['status']}", response=response)

    def close(self) -> None:
        self.inner.close()

    def broken(self, message: str) -> dict[str, Any]:
        failed = {**self._response(None, []), "status": "failed", "error": {"code": "server_error", "message": message}}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **content}

    def _response(self, reason: str | None, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer as far as it is; ``reason``: why it has ended, None before."""
        cut = _CUT.get(reason or "")
        return {
            **self._said,
            "status": "in_progress" if reason is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": cut} if cut else None,
            "output": items,
            "usage": None if reason is None else _usage(self.inner.counts),
            "shadowpeft": dict(self.note),
        }


class _Growing:
    """The items of a stream: a message ends where another item begins, calls end with the stream."""

    def __init__(self, reply: ResponsesReply) -> None:
        self._event = reply._event
        self.items = list[_Message | _Call]()
        self._calls: dict[int, _Call] = {}

    def takes_logprobs(self, delta: dict[str, Any]) -> bool:
        """Whether log-probabilities without text belong to a message: those of a call are told nowhere."""
        return not delta.get(CALLED) and not (self.items and isinstance(self.items[-1], _Call))

    def _place(self, item: _Message | _Call) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": item.id, "output_index": self.items.index(item)}
        return {**place, "content_index": 0} if isinstance(item, _Message) else place

    def open(self, item: _Message | _Call) -> Iterator[dict[str, Any]]:
        """A new item begins."""
        if self.items and isinstance(self.items[-1], _Message):
            yield from self._end(self.items[-1], "completed")
        self.items.append(item)
        yield self._event("response.output_item.added", output_index=len(self.items) - 1, item=item.item("in_progress"))
        if isinstance(item, _Message):
            yield self._event("response.content_part.added", **self._place(item), part=item.part)

    def say(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Text of a message."""
        last = self.items[-1] if self.items else None
        if not isinstance(last, _Message) or last.kind != kind:
            last = _Message(kind)
            yield from self.open(last)
        last.text += text
        last.logprobs += logprobs
        more = {"logprobs": logprobs} if kind == "output_text" else {}
        yield self._event(f"response.{kind}.delta", **self._place(last), delta=text, **more)

    def call(self, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a delta adds to a call: its ``index`` says to which; without one, another ``id`` begins another call."""
        index = call.get("index")
        if type(index) is not int:
            newest = max(self._calls, default=-1)
            known = newest >= 0 and _string(call, "id") in ("", self._calls[newest].call_id)
            index = newest if known else newest + 1
        if index not in self._calls:
            self._calls[index] = _Call(call)
            yield from self.open(self._calls[index])
        own, more = self._calls[index], _string(call["function"], "arguments")
        if more:
            own.arguments += more
            yield self._event("response.function_call_arguments.delta", **self._place(own), delta=more)

    def close(self, status: str) -> Iterator[dict[str, Any]]:
        """All items end, the last with ``status``."""
        for item in self.items:
            if item.ended is None:
                yield from self._end(item, status if item is self.items[-1] else "completed")

    def _end(self, item: _Message | _Call, status: str) -> Iterator[dict[str, Any]]:
        place = self._place(item)
        if isinstance(item, _Call):
            said = {"name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **place, **said)
        else:
            told = {"refusal": item.text} if item.kind == "refusal" else {"text": item.text, "logprobs": item.logprobs}
            yield self._event(f"response.{item.kind}.done", **place, **told)
            yield self._event("response.content_part.done", **place, part=item.part)
        item.ended = item.item(status)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item.ended)

"""Answers of ``POST /v1/responses``, made of a chat's: whole, or event by event."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from shadowpeft.serve.answers import CALLED
from shadowpeft.serve.replies import Reply
from shadowpeft.serve.responses import ResponsesRequest

_CUT = {"length": "max_output_tokens"}
"""Why an answer is incomplete, by the chat's reason for its end."""


def _usage(counts: dict[str, Any] | None) -> dict[str, Any] | None:
    """A chat's counts under this endpoint's names; None: a cloud did not say."""
    if counts is None:
        return None
    details = {key: value for key, value in (counts.get("completion_tokens_details") or {}).items() if value is not None}
    cached = (counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0, **details},
        "total_tokens": counts["prompt_tokens"] + counts["completion_tokens"],
    }


def _logprobs(choice: dict[str, Any]) -> list[dict[str, Any]]:
    return list((choice.get("logprobs") or {}).get("content") or ())


class _Message:
    """A message that grows."""

    def __init__(self) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self.text, self.logprobs = "", list[dict[str, Any]]()

    @property
    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def item(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part]
        return {"type": "message", "id": self.id, "role": "assistant", "status": status, "content": content}


class _Call:
    """A call that grows."""

    def __init__(self, call: dict[str, Any]) -> None:
        self.id, self.call_id, self.name = f"fc_{uuid.uuid4().hex}", call["id"], call["function"]["name"]
        self.arguments: str = call["function"].get("arguments") or ""

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
        answer = await self.inner.whole()
        choice = answer["choices"][0]
        status = "incomplete" if choice["finish_reason"] in _CUT else "completed"
        said, items = choice["message"], list[dict[str, Any]]()
        calls = said.get(CALLED) or ()
        if said.get("content") or not calls:
            message = _Message()
            message.text, message.logprobs = said.get("content") or "", _logprobs(choice)
            items.append(message.item(status))
        items += [_Call(call).item("completed") for call in calls]
        return self._response(choice["finish_reason"], items)

    async def chunks(self, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
        reason, done = "stop", list[dict[str, Any]]()
        growing: _Message | _Call | None = None
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response(None, []))
        async for chunk in self.inner.chunks(True):
            for choice in chunk["choices"]:
                reason, delta = choice.get("finish_reason") or reason, choice["delta"]
                text, logprobs = delta.get("content") or "", _logprobs(choice)
                if text or (logprobs and CALLED not in delta and not isinstance(growing, _Call)):
                    if not isinstance(growing, _Message):
                        for event in self._close(growing, done):
                            yield event
                        growing = _Message()
                        for event in self._open(growing, done):
                            yield event
                    growing.text += text
                    growing.logprobs += logprobs
                    place = {"item_id": growing.id, "output_index": len(done), "content_index": 0}
                    yield self._event("response.output_text.delta", **place, delta=text, logprobs=logprobs)
                for call in delta.get(CALLED) or ():
                    if call.get("id"):  # a call begins with it, and goes on without
                        for event in self._close(growing, done):
                            yield event
                        growing = _Call({**call, "function": {**call["function"], "arguments": ""}})
                        for event in self._open(growing, done):
                            yield event
                    more = (call.get("function") or {}).get("arguments")
                    if more and isinstance(growing, _Call):
                        growing.arguments += more
                        place = {"item_id": growing.id, "output_index": len(done)}
                        yield self._event("response.function_call_arguments.delta", **place, delta=more)
        if growing is None and not done:  # an answer of no characters is a message too
            growing = _Message()
            for event in self._open(growing, done):
                yield event
        for event in self._close(growing, done, "incomplete" if reason in _CUT else "completed"):
            yield event
        response = self._response(reason, done)
        yield self._event(f"response.{response['status']}", response=response)

    def close(self) -> None:
        self.inner.close()

    def broken(self, message: str) -> dict[str, Any]:
        return self._event("error", code="incomplete", message=message, param=None)

    def _open(self, growing: _Message | _Call, done: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A new item begins."""
        begun = [self._event("response.output_item.added", output_index=len(done), item=growing.item("in_progress"))]
        if isinstance(growing, _Message):
            place = {"item_id": growing.id, "output_index": len(done), "content_index": 0}
            begun.append(self._event("response.content_part.added", **place, part=growing.part))
        return begun

    def _close(
        self, growing: _Message | _Call | None, done: list[dict[str, Any]], status: str = "completed"
    ) -> list[dict[str, Any]]:
        """An item is whole; it joins those that are ``done``."""
        if growing is None:
            return []
        place: dict[str, Any] = {"item_id": growing.id, "output_index": len(done)}
        if isinstance(growing, _Message):
            place["content_index"] = 0
            ended = [
                self._event("response.output_text.done", **place, text=growing.text, logprobs=growing.logprobs),
                self._event("response.content_part.done", **place, part=growing.part),
            ]
        else:
            said = {"name": growing.name, "arguments": growing.arguments}
            ended = [self._event("response.function_call_arguments.done", **place, **said)]
        item = growing.item(status)
        ended.append(self._event("response.output_item.done", output_index=len(done), item=item))
        done.append(item)
        return ended

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

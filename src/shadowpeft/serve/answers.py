"""How answers look: whole, or chunk by chunk, for either endpoint."""

from __future__ import annotations

import time
import uuid
from itertools import accumulate
from typing import Any

from shadowpeft.data.calls import Call, CallParser
from shadowpeft.serve.requests import Token

CALLED = "tool_calls"
"""Why an answer with calls has ended."""


def call_id() -> str:
    """A name for a call, by which its result comes back."""
    return f"call_{uuid.uuid4().hex[:24]}"


def usage(prompt: int, new: int, drafted: int = 0, accepted: int = 0) -> dict[str, Any]:
    """Token counts; of drafted ones under the names that the API has for predictions."""
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    if drafted:
        details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": drafted - accepted}
        counts["completion_tokens_details"] = details
    return counts


class ResponseBuilder:
    """Builds the answers to one request: whole, or chunk by chunk, for either endpoint.

    Args:
        chat: which endpoint. model: the name to report. top: see :attr:`ChatRequest.wanted_logprobs`.
        parser: of the tools that the client can have called; None: an answer is text.
    """

    def __init__(
        self, chat: bool, model: str, top: int | None, note: dict[str, Any], parser: CallParser | None = None
    ) -> None:
        self.chat, self.top, self.note, self.parser = chat, top, note, parser
        self._called = self._spoken = False
        self._held, self._held_tokens = "", list[Token]()
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_kind = "chat.completion.chunk" if chat else "text_completion"
        self._first = True
        self._offset = 0

    def whole(self, text: str, tokens: list[Token], reason: str, counts: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        found = self.parser.found(text) if self.parser is not None else None
        if found is not None and found.calls:
            assert self.parser is not None
            calls = self._openai(found.calls, self.parser)
            words, rest = text[: found.start].rstrip(), text[found.end :].lstrip()
            said, reason = {"content": words or rest or None}, CALLED
            # keys stand in the order of the answer, by which ``/v1/responses`` orders its items
            message = {"role": "assistant", **(said if words else {}), CALLED: calls, **said, "refusal": None}
        choice = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens)}
        choice |= {"message": message} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else self._chunk_kind
        return {**self._head, "object": kind, "choices": [choice], "usage": counts, "shadowpeft": self.note}

    def chunks(self, text: str, tokens: list[Token], reason: str | None = None) -> list[dict[str, Any]]:
        """What a piece of a stream adds: text that may become calls is held back, and whole calls are given as such."""
        if self.parser is None:
            if self._called and not self._spoken:  # as in a whole answer
                text = text.lstrip()
            self._spoken = self._spoken or bool(text)
            return [self._chunk({"content": text} if text else {}, tokens, reason)]
        text, tokens = self._held + text, self._held_tokens + tokens
        self._held, self._held_tokens = "", []
        over = reason is not None
        found = self.parser.found(text) if over or not self.parser.waits else None
        if found is not None and found.calls:
            calls = self._openai(found.calls, self.parser)
            self.parser, self._called = None, True
            words = text[: found.start].rstrip()
            deltas: list[dict[str, Any]] = []
            for n, call in enumerate(calls):
                arguments = call["function"].pop("arguments")
                deltas.append({"index": n, **call, "function": {**call["function"], "arguments": ""}})
                deltas.append({"index": n, "function": {"arguments": arguments}})
            before = [self._chunk({"content": words}, [])] if words else []
            chunks = before + [self._chunk({CALLED: [each]}, tokens if not n else []) for n, each in enumerate(deltas)]
            rest = text[found.end :].lstrip()
            self._spoken = bool(rest)
            return [*chunks, *([self._chunk({"content": rest} if rest else {}, [], reason)] if rest or reason else [])]
        free = self.parser.words(text)
        if over or found is not None or (free and not self.parser.later):
            self.parser = None
            return [self._chunk({"content": text} if text else {}, tokens, reason)]
        ready = sum(end <= free for end in accumulate(len(token.piece) for token in tokens)) if free else 0
        self._held, self._held_tokens = text[free:], tokens[ready:]
        return [self._chunk({"content": text[:free]}, tokens[:ready])] if free else []

    def _openai(self, calls: tuple[Call, ...], parser: CallParser) -> list[dict[str, Any]]:
        return [parser.told(call).openai(call_id()) for call in calls]

    def _chunk(self, delta: dict[str, Any], tokens: list[Token], reason: str | None = None) -> dict[str, Any]:
        """One chunk; the first one says who answers, and why."""
        if self._first:  # whoever adds up the pieces begins with a text, or with calls
            delta = {"role": "assistant", "content": None if CALLED in delta else "", **delta}
        text, reason = delta.get("content", ""), CALLED if reason is not None and self._called else reason
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens), **said}
        chunk: dict[str, Any] = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        if self._first or reason is not None:  # at the end the times are known
            chunk["shadowpeft"] = dict(self.note)
        self._first = False
        return chunk

    def last(self, counts: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": counts}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        if self.chat:
            content = [{**_entry(t.raw, t.logprob), "top_logprobs": [_entry(*top) for top in t.top]} for t in tokens]
            return {"content": content, "refusal": None}
        offsets = []
        for t in tokens:
            offsets.append(self._offset)
            self._offset += len(t.piece)
        return {
            "tokens": [_shown(t.raw) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{_shown(token): logprob for token, logprob in t.top} for t in tokens]
            if self.top
            else None,
            "text_offset": offsets,
        }


def _entry(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(token), "logprob": logprob, "bytes": list(token)}


def _shown(token: bytes) -> str:
    """A token as text; bytes that are no character are escaped, so that different tokens look different."""
    return token.decode("utf-8", "backslashreplace")

"""The OpenAI API as far as it is spoken here: what a request may hold, and how answers look. Anything else is refused."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    field_validator,
)

from shadowpeft.serve.requests import Token

Text = Annotated[StrictStr, Field(max_length=200_000)]
Number = Union[StrictInt, StrictFloat]
_SEED = 2**63


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_Strict):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text
    name: Optional[Annotated[StrictStr, Field(max_length=64)]] = Field(default=None, description="Accepted, not used.")


class StreamOptions(_Strict):
    """What a stream carries."""

    include_usage: StrictBool = False


class _Generate(_Strict):
    """What both endpoints take."""

    model: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    max_tokens: Optional[Annotated[StrictInt, Field(ge=1, le=1 << 20)]] = None
    temperature: Optional[Annotated[Number, Field(ge=0, le=2)]] = Field(
        default=None, description="0, the default, is greedy."
    )
    top_p: Optional[Annotated[Number, Field(gt=0, le=1)]] = None
    seed: Optional[Annotated[StrictInt, Field(ge=-_SEED, lt=_SEED)]] = None
    stop: Optional[Union[StrictStr, list[StrictStr]]] = Field(
        default=None, description="At most 4 texts of 1 to 100 characters."
    )
    stream: Optional[StrictBool] = None
    stream_options: Optional[StreamOptions] = None
    n: Optional[Literal[1]] = None
    user: Optional[Annotated[StrictStr, Field(max_length=200)]] = Field(default=None, description="Accepted, not used.")
    frequency_penalty: Optional[Literal[0]] = None
    presence_penalty: Optional[Literal[0]] = None
    route: Literal["auto", "device", "cloud"] = Field(
        default="auto", description="Edge only: let the router decide, or say who answers."
    )

    @field_validator("stop")
    @classmethod
    def _short(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 4 or any(not 1 <= len(text) <= 100 for text in texts):
            raise ValueError("stop must be at most 4 texts of 1 to 100 characters")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens to report; None: no log-probabilities at all."""
        raise NotImplementedError


class ChatRequest(_Generate):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Optional[Annotated[StrictInt, Field(ge=1, le=1 << 20)]] = None
    logprobs: Optional[StrictBool] = None
    top_logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=20)]] = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generate):
    """``POST /v1/completions``."""

    prompt: Annotated[StrictStr, Field(min_length=1, max_length=200_000)]
    echo: Optional[Literal[False]] = None
    logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=5)]] = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""What an adapter may be called."""


class SwapRequest(_Strict):
    """``POST /admin/adapters/{name}``, and ``.../swap``."""

    version: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        description="Name of a folder under the server's --versions folder."
    )


class ErrorBody(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: Optional[str] = None
    code: Optional[str] = None


class ErrorAnswer(BaseModel):
    """Every error has this form."""

    error: ErrorBody


def error(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The content of an error answer; half surrogate pairs, which no JSON in UTF-8 can hold, are replaced."""
    body = ErrorBody(message=_clean(message), type=kind, param=None if param is None else _clean(param), code=code)
    return {"error": body.model_dump()}


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:1000]


def usage(prompt: int, new: int) -> dict[str, int]:
    """Token counts."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class ResponseBuilder:
    """Builds the answers to one request: whole, or chunk by chunk, for either endpoint.

    Args:
        chat: which endpoint. model: the name to report. top: see :attr:`ChatRequest.wanted_logprobs`.
    """

    def __init__(self, chat: bool, model: str, top: int | None, note: dict[str, Any]) -> None:
        self.chat, self.top, self.note = chat, top, note
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }
        self._chunk_kind = "chat.completion.chunk" if chat else "text_completion"
        self._first = True
        self._offset = 0

    def whole(self, text: str, tokens: list[Token], reason: str, counts: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens), **said}
        kind = "chat.completion" if self.chat else self._chunk_kind
        return {**self._head, "object": kind, "choices": [choice], "usage": counts, "shadowpeft": self.note}

    def chunk(self, text: str, tokens: list[Token], reason: str | None = None) -> dict[str, Any]:
        """One piece of a stream; the first one says who answers, and why."""
        delta = {**({"role": "assistant"} if self._first else {}), **({"content": text} if text else {})}
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": 0, "finish_reason": reason, "logprobs": self._logprobs(tokens), **said}
        chunk: dict[str, Any] = {**self._head, "object": self._chunk_kind, "choices": [choice]}
        if self._first or reason is not None:  # at the end the times are known
            chunk["shadowpeft"] = dict(self.note)
        self._first = False
        return chunk

    def last(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk with the token counts."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": counts}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        if self.chat:
            content = [{**_entry(t.piece, t.logprob), "top_logprobs": [_entry(*top) for top in t.top]} for t in tokens]
            return {"content": content, "refusal": None}
        offsets = []
        for t in tokens:
            offsets.append(self._offset)
            self._offset += len(t.piece)
        return {
            "tokens": [t.piece for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens] if self.top else None,
            "text_offset": offsets,
        }


def _entry(piece: str, logprob: float) -> dict[str, Any]:
    return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}

"""The OpenAI API as far as it is spoken here: what a request may hold, and how answers look. Anything else is refused."""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from shadowpeft.serve.requests import Token

Text = Annotated[StrictStr, Field(max_length=200_000)]
_SEED = 2**63


class _Strict(BaseModel):
    """Null means absent; what is not supported may be there as long as it asks for nothing."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of the OpenAI API that are not supported, and their values that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for name, values in cls.neutral.items():
            given = content.get(name)
            # True is 1 for Python, not for JSON
            if given is not None and not any(
                given == v and isinstance(given, bool) == isinstance(v, bool) for v in values
            ):
                also = "".join(f" or send {json.dumps(value)}" for value in values[:1])
                raise _invalid(f"asks for what this server does not do; leave it out{also}", name)
        return {name: value for name, value in content.items() if value is not None and name not in cls.neutral}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> Any:
        schema = handler.resolve_ref_schema(handler(core))
        schema["properties"] |= {name: {"enum": [None, *values]} for name, values in cls.neutral.items()}
        return schema


def _invalid(problem: str, *where: str) -> PydanticCustomError:
    """A refusal of the field ``where``, seen from the one that is validated."""
    return PydanticCustomError("refused", "{problem}", {"problem": problem, "where": where})


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


def _joined(content: Any) -> Any:
    """Text that may come in parts."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _invalid('is no text, and only text is read; send {"type": "text", "text": ...}', str(number))
        texts.append(part["text"])
    return "\n".join(texts)


class CalledFunction(_Strict):
    """What was called."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(_Strict):
    """A call of an earlier turn."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Strict):
    """One turn."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
    }
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="A developer's message is a system message."
    )
    content: Annotated[Text, BeforeValidator(_joined, json_schema_input_type=Union[Text, list[TextPart]])] = Field(
        default="", description="Only the assistant's may be left out."
    )
    name: Optional[Annotated[StrictStr, Field(max_length=64)]] = Field(default=None, description="Accepted, not used.")
    tool_calls: Optional[list[ToolCall]] = Field(
        default=None, description="Of an earlier turn, if the model's chat template writes them."
    )
    tool_call_id: Optional[StrictStr] = None

    @model_validator(mode="after")
    def _normal(self) -> Message:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise _invalid("is missing; send the text", "content")
        if self.tool_calls is not None and self.role != "assistant":
            raise _invalid(f"belongs to the assistant, not to the role {self.role}; leave it out", "tool_calls")
        if self.role == "developer":
            self.role = "system"
        self.tool_calls = self.tool_calls or None
        return self


class StreamOptions(_Strict):
    """What a stream carries."""

    include_usage: StrictBool = False
    include_obfuscation: Optional[StrictBool] = Field(default=None, description="Accepted; nothing is padded.")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _only(value: Any) -> Any:
    """The one text of a list."""
    if not isinstance(value, list):
        return value
    if len(value) != 1 or not isinstance(value[0], str):
        raise _invalid("has to be one text; send a request for each, and no tokens")
    return value[0]


class _Generate(_Strict):
    """What both endpoints take."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "n": (1,),
        "presence_penalty": (0,),
    }
    model: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    max_tokens: Optional[Annotated[StrictInt, Field(ge=1, le=1 << 20)]] = None
    temperature: Optional[Annotated[StrictFloat, Field(ge=0, le=2)]] = Field(
        default=None, description="0, the default, is greedy."
    )
    top_p: Optional[Annotated[StrictFloat, Field(gt=0, le=1)]] = None
    seed: Optional[Annotated[StrictInt, Field(ge=-_SEED, lt=_SEED)]] = None
    stop: Optional[
        Annotated[
            list[Annotated[StrictStr, Field(min_length=1, max_length=100)]],
            BeforeValidator(_listed, json_schema_input_type=Union[str, list[str]]),
            Field(max_length=4),
        ]
    ] = Field(default=None, description="At most 4 texts of 1 to 100 characters.")
    stream: Optional[StrictBool] = None
    stream_options: Optional[StreamOptions] = None
    user: Optional[Annotated[StrictStr, Field(max_length=200)]] = Field(default=None, description="Accepted, not used.")
    route: Literal["auto", "device", "cloud"] = Field(
        default="auto", description="Edge only: let the router decide, or say who answers."
    )
    speculative: Optional[StrictBool] = Field(
        default=None, description="Cloud: whether the shadow drafts, where that is faster. Default: the server's."
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_characters(cls, content: Any) -> Any:
        """Text is judged here, once: nothing behind this door can be anything but Unicode."""
        parts: list[tuple[tuple[str, ...], Any]] = [((), content)]
        while parts:
            where, value = parts.pop()
            if isinstance(value, dict):
                parts += [((*where, key), each) for key, each in value.items()]
                parts += [((*where, "(a key)"), key) for key in value]
            elif isinstance(value, list):
                parts += [((*where, str(number)), each) for number, each in enumerate(value)]
            elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise _invalid("holds half a surrogate pair; send whole characters", *where)
        return content

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many likeliest tokens to report; None: no log-probabilities at all."""
        raise NotImplementedError


class ChatRequest(_Generate):
    """``POST /v1/chat/completions``."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_Generate.neutral,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "prompt_cache_options": ({}, {"mode": "implicit"}, {"mode": "implicit", "ttl": "30m"}),
        "prompt_cache_retention": ("in_memory", "24h"),
        "reasoning_effort": ("none", "medium"),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_completion_tokens: Optional[Annotated[StrictInt, Field(ge=1, le=1 << 20)]] = None
    logprobs: Optional[StrictBool] = None
    top_logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=20)]] = None
    safety_identifier: Optional[Text] = Field(default=None, description="Accepted, not used.")
    prompt_cache_key: Optional[Text] = Field(default=None, description="Accepted, not used.")

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Generate):
    """``POST /v1/completions``."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **_Generate.neutral,
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
    }
    prompt: Annotated[
        StrictStr,
        BeforeValidator(_only, json_schema_input_type=Union[str, list[str]]),
        Field(min_length=1, max_length=200_000),
    ]
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

    def whole(self, text: str, tokens: list[Token], reason: str, counts: dict[str, Any]) -> dict[str, Any]:
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

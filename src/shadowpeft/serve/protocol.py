"""The OpenAI API as far as it is spoken here: what a request may hold, and how answers look. Anything else is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    model_validator,
)

from shadowpeft.data.tools import Tools, tools_of
from shadowpeft.errors import DataError
from shadowpeft.serve.strict import Strict, invalid
from shadowpeft.serve.tool_protocol import (
    ALLOWED,
    AllowedChoice,
    NamedTool,
    ResponseFormat,
    ToolCall,
    checked_choice,
    checked_format,
    checked_tools,
)

DECLINED = "x-shadow-declined"
"""Header of what a device hands on because it found no action: the probability of its ``[REMOTE]``. A header, since other
servers refuse a field that they do not know."""
Text = Annotated[StrictStr, Field(max_length=200_000)]
Length = Annotated[StrictInt, Field(ge=1, le=1 << 20)]
_SEED = 2**63
_NUMBER = re.compile(r"[0-9]{1,2}(\.[0-9]{1,20})?")
MOST_ANSWERS = 64
"""Of one request."""
MOST_MESSAGES = 1024
"""Of one request: more than any context has room for, and few enough to check."""


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


PARTS = {"text": "text", "refusal": "refusal"}
"""Parts of a message's content that are read, and where each holds its text. A refusal was the assistant's."""


def joined(content: Any, parts: Mapping[str, str] = PARTS, *where: str) -> Any:
    """Text that may come in ``parts``; ``where``: the field that holds it, seen from the one that is validated."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(parts[kind]) if isinstance(kind, str) and kind in parts else None
        if not isinstance(text, str):
            wanted = json.dumps({"type": next(iter(parts)), "text": "..."})
            raise invalid(f"is no text, and only text is read; send {wanted}", *where, str(number))
        texts.append(text)
    return "\n".join(texts)


class Message(Strict):
    """One turn. Keys that clients add to an answer before they send it back (LiteLLM does) are not read."""

    model_config = ConfigDict(extra="ignore")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "refusal": (),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
    }
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="A developer's message is a system message."
    )
    content: Annotated[Text, BeforeValidator(joined, json_schema_input_type=Union[Text, list[TextPart]])] = Field(
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
            raise invalid("is missing; send the text", "content")
        if self.tool_calls is not None and self.role != "assistant":
            raise invalid(f"belongs to the assistant, not to the role {self.role}; leave it out", "tool_calls")
        if self.role == "developer":
            self.role = "system"
        self.tool_calls = self.tool_calls or None
        return self


class StreamOptions(Strict):
    """What a stream carries."""

    include_usage: StrictBool = False
    include_obfuscation: Optional[StrictBool] = Field(default=None, description="Accepted; nothing is padded.")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """Prompts, each a text or tokens, from one or a list of them."""
    several = value if isinstance(value, list) and any(isinstance(each, (str, list)) for each in value) else [value]
    for each in several:
        if not (each and (isinstance(each, str) or (isinstance(each, list) and all(type(t) is int for t in each)))):
            raise invalid("is no text, no list of tokens, and no list of these; send one of them, and nothing empty")
    return several


class Ask(Strict):
    """What all endpoints take."""

    model: Annotated[StrictStr, Field(min_length=1, max_length=200)]
    temperature: Optional[Annotated[StrictFloat, Field(ge=0, le=2)]] = Field(
        default=None, description="0, the default, is greedy."
    )
    top_p: Optional[Annotated[StrictFloat, Field(gt=0, le=1)]] = None
    stream: Optional[StrictBool] = None
    user: Optional[Annotated[StrictStr, Field(max_length=200)]] = Field(default=None, description="Accepted, not used.")
    route: Literal["auto", "device", "cloud"] = Field(
        default="auto", description="Edge only: let the router decide, or say who answers."
    )
    speculative: Optional[StrictBool] = Field(
        default=None, description="Cloud: whether the shadow drafts, where that is faster. Default: the server's."
    )
    _declined: Optional[float] = PrivateAttr(default=None)

    @property
    def declined(self) -> float | None:
        """The probability of a device's ``[REMOTE]``; None: no device has found that the request asks for no action."""
        return self._declined

    def decline(self, chance: str) -> None:
        """Keep what a device says in a header.

        Raises:
            DataError: if that is no probability.
        """
        self._declined = float(chance) if _NUMBER.fullmatch(chance) else None
        if self._declined is None or not 0.0 <= self._declined <= 1.0:
            said = f"the header {DECLINED} is '{chance[:30]}' but must be the probability of the device's [REMOTE], from 0 to 1"
            raise DataError(f"{said}; leave it out, or send one")

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
                raise invalid("holds half a surrogate pair; send whole characters", *where)
        return content


class _Generate(Ask):
    """What the endpoints of texts and of chats take."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
    }
    max_tokens: Optional[Length] = None
    n: Optional[Annotated[StrictInt, Field(ge=1, le=MOST_ANSWERS)]] = Field(
        default=None, description="Answers to each prompt, drawn apart."
    )
    seed: Optional[Annotated[StrictInt, Field(ge=-_SEED, lt=_SEED)]] = None
    stop: Optional[
        Annotated[
            list[Annotated[StrictStr, Field(min_length=1, max_length=100)]],
            BeforeValidator(_listed, json_schema_input_type=Union[str, list[str]]),
            Field(max_length=4),
        ]
    ] = Field(default=None, description="At most 4 texts of 1 to 100 characters.")
    stream_options: Optional[StreamOptions] = None

    @model_validator(mode="after")
    def _consistent(self) -> _Generate:
        if self.stream_options is not None and not self.stream:
            raise invalid("is given without stream; send stream: true, or leave it out", "stream_options")
        if (self.n or 1) > 1 and not self.temperature:
            raise invalid(f"is {self.n} but all answers would be alike at temperature 0; send a temperature too", "n")
        return self

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
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": ({}, {"mode": "implicit"}, {"mode": "implicit", "ttl": "30m"}),
        "prompt_cache_retention": ("in_memory", "24h"),
        "reasoning_effort": ("none", "minimal", "low", "medium"),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Optional[Length] = None
    logprobs: Optional[StrictBool] = None
    top_logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=20)]] = None
    tools: Annotated[Optional[list[dict[str, Any]]], BeforeValidator(checked_tools)] = Field(
        default=None, description="Functions that the answer may call, by name and JSON schema of their arguments."
    )
    tool_choice: Annotated[
        Optional[Union[Literal["none", "auto", "required"], NamedTool, AllowedChoice]], BeforeValidator(checked_choice)
    ] = Field(
        default=None, description="Whether the answer calls: none, auto (default), required, one by name, or some by name."
    )
    parallel_tool_calls: Optional[StrictBool] = Field(default=None, description="false: one call at most.")
    response_format: Annotated[Optional[ResponseFormat], BeforeValidator(checked_format)] = Field(
        default=None, description="text, a JSON schema, or any JSON object. With tools: of an answer that calls none."
    )
    metadata: Optional[dict[StrictStr, StrictStr]] = Field(default=None, description="Accepted, not used.")
    safety_identifier: Optional[Text] = Field(default=None, description="Accepted, not used.")
    prompt_cache_key: Optional[Text] = Field(default=None, description="Accepted, not used.")

    @model_validator(mode="after")
    def _whole(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise invalid("is given without logprobs; send logprobs: true, or leave it out", "top_logprobs")
        if self.response_format is not None:
            if self.response_format.type == "text":
                self.response_format = None
            elif (self.response_format.type == "json_schema") != (self.response_format.json_schema is not None):
                wanted = self.response_format.type == "json_schema"
                why = "is missing; send the schema" if wanted else "belongs to the type json_schema; leave it out"
                raise invalid(why, "response_format", "json_schema")
        if self.tools is None:
            if self.tool_choice not in (None, "none", "auto"):
                raise invalid("asks for a call but there are no tools; send tools", "tool_choice")
            self.tool_choice = self.parallel_tool_calls = None
        elif self.offered is not None and self.called is not None:
            one = isinstance(self.tool_choice, NamedTool)
            for number, named in enumerate(self.called):
                if named not in self.offered.names:
                    where = ("function", "name") if one else (ALLOWED, "tools", str(number))
                    raise invalid(f"names '{named}', which is none of the tools; send one of them", "tool_choice", *where)
        return self

    @property
    def called(self) -> list[str] | None:
        """The names of the tools that the answer may call; None: of all."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return [choice.function.name]
        return choice.names if isinstance(choice, AllowedChoice) else None

    @property
    def calling(self) -> Literal["none", "auto", "required"]:
        """Whether the answer may call tools, or has to."""
        choice = self.tool_choice
        if isinstance(choice, NamedTool):
            return "required"
        return choice.allowed_tools.mode if isinstance(choice, AllowedChoice) else choice or "auto"

    @cached_property
    def offered(self) -> Tools | None:
        """The tools that the request has, read once; None: there are none."""
        return None if self.tools is None else tools_of(self.tools)

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
        list[Union[Text, list[StrictInt]]],
        BeforeValidator(_prompts, json_schema_input_type=Union[str, list[str], list[int], list[list[int]]]),
    ] = Field(description="One or several, each a text or its tokens; several are answered like requests of their own.")
    logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=5)]] = None

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        wanted = len(self.prompt) * (self.n or 1)
        if wanted > MOST_ANSWERS:
            raise invalid(f"asks for {wanted} answers but one request may have {MOST_ANSWERS}; send several", "prompt")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


AdapterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""What an adapter may be called."""


class SwapRequest(Strict):
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

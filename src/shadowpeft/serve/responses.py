"""Requests of ``POST /v1/responses``, OpenAI's newer form of a chat: they are read as chats, and nothing is kept of them."""

from __future__ import annotations

from functools import cached_property
from itertools import count
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from shadowpeft.json_text import parse_json
from shadowpeft.messages import quote
from shadowpeft.serve.protocol import MOST_MESSAGES, Ask, ChatRequest, Length, Message, Text, joined
from shadowpeft.serve.strict import Strict, invalid, remedy
from shadowpeft.serve.tool_protocol import (
    ALLOWED,
    CHOICES,
    FORMATS,
    AllowedChoice,
    NamedTool,
    ResponseFormat,
    allowed_choice,
    name_of,
)

_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_ROLES = ("user", "assistant", "system", "developer")
PATH = "/v1/responses"
NAMES = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
}
"""Fields of a chat by their names here."""
_KEPT_NOWHERE = (
    "names what was kept of an earlier answer, and nothing is kept here; send the whole conversation as input (some clients "
    "need store: false for it)"
)
LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""What ``include`` may name: of reasoning there is none, so nothing of it is left out."""
_BESIDE = {"id", "status", "phase", "annotations", "caller", "namespace", "name", "provider_data", "provider_specific_fields"}
"""Keys of items that clients send back with them and that say nothing of the text."""
_READ = {
    "message": {"type", "role", "content"},
    "function_call": {"type", "call_id", "name", "arguments"},
    "function_call_output": {"type", "call_id", "output"},
}


def _text(item: dict[str, Any], key: str, number: int) -> str:
    """A field of an item that has to be text."""
    if not isinstance(item.get(key), str):
        raise invalid(f"is {quote(item.get(key))} but must be text; send it", str(number), key)
    return str(item[key])


def _joined(item: dict[str, Any], key: str, number: int) -> str:
    """A field of an item that is text or a list of texts."""
    text = joined(item.get(key), _PARTS, str(number), key)
    if not isinstance(text, str):
        raise invalid("is no text and no list of texts; send one of them", str(number), key)
    return text


def _message(item: dict[str, Any], number: int) -> dict[str, Any]:
    if item.get("role") not in _ROLES:
        problem = f"is {quote(item.get('role'))} but there are {', '.join(_ROLES)}; send one of them"
        raise invalid(problem, str(number), "role")
    return {"role": item["role"], "content": _joined(item, "content", number)}


def _call(item: dict[str, Any], number: int) -> dict[str, Any]:
    function = {"name": _text(item, "name", number), "arguments": _text(item, "arguments", number)}
    try:
        given = parse_json(function["arguments"])
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise invalid("is no JSON object; send the arguments as the text of one", str(number), "arguments")
    calls = [{"id": _text(item, "call_id", number), "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(item: dict[str, Any], number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": _text(item, "call_id", number), "content": _joined(item, "output", number)}


_ITEMS = {"message": _message, "function_call": _call, "function_call_output": _result}


def _turn(item: Any, number: int) -> Message | None:
    """The turn that an item is, if it is one that chats have too; None of another model's reasoning, which is not read."""
    if not isinstance(item, dict):
        raise invalid(f"is {quote(item)} but must be an item; send objects, or one text as input", str(number))
    kind = item.get("type") or "message"
    if kind == "reasoning":
        return None
    if kind == "item_reference":
        raise invalid(_KEPT_NOWHERE, str(number))
    if not isinstance(kind, str) or kind not in _ITEMS:
        problem = f"has the type {quote(kind)} but there are {', '.join(_ITEMS)}; leave it out or send one of them"
        raise invalid(problem, str(number))
    for key, value in item.items():
        if value not in (None, [], {}) and key not in _READ[kind] | _BESIDE:
            what = "send each call as an item of the type function_call" if key == "tool_calls" else "leave it out"
            raise invalid(f"is no field of this item; {what}", str(number), key)
    try:
        return Message(**_ITEMS[kind](item, number))
    except ValidationError as error:
        first = error.errors()[0]
        where = ["output" if kind == "function_call_output" and part == "content" else str(part) for part in first["loc"]]
        raise invalid(remedy(first["msg"]), str(number), *where) from error


def turns(given: Any) -> Any:
    """The turns of a chat that an ``input`` holds: calls belong to the assistant's turn before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]  # which is judged as any text
    if not isinstance(given, list) or not given:
        raise invalid("is no text and no list of items; send one of them, and nothing empty")
    found: list[Message] = []
    for turn in filter(None, map(_turn, given, count())):
        before = found[-1] if found and found[-1].role == "assistant" else None
        if before is not None and turn.tool_calls:
            before.tool_calls = [*(before.tool_calls or []), *turn.tool_calls]
        elif before is not None and turn.role == "assistant" and before.tool_calls and not before.content:
            before.content = turn.content
        else:
            found.append(turn)
    if not found:
        raise invalid("has no item that is read; send a message")
    return found


_UNUSED = ("allowed_callers", "async", "async_", "defer_loading", "output_schema")
"""Of a function, what says nothing about the call that is made here."""


def _tools(given: Any) -> Any:
    """Definitions of functions as chats have them, which judge them; here the function's fields stand beside its type."""
    if not isinstance(given, list):
        return given
    nested = []
    for number, tool in enumerate(given):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            problem = f"has the type {quote(kind)} but only functions are called here; send the type function"
            raise invalid(problem, str(number))
        if tool.get("defer_loading"):
            raise invalid("is true but all tools are read at once; leave it out", str(number), "defer_loading")
        own = {key: value for key, value in tool.items() if key not in ("type", *_UNUSED) and value is not None}
        nested.append(tool if isinstance(tool.get("function"), dict) else {"type": "function", "function": own})
    return nested


_NAMED = '{"type": "function", "name": "..."}'


def _choice(given: Any) -> Any:
    """The choice of a tool as chats have it."""
    if given is None or given in CHOICES or isinstance(given, (NamedTool, AllowedChoice)):
        return given
    if isinstance(given, dict) and given.get("type") == ALLOWED:
        return allowed_choice(given.get(ALLOWED, given), form=_NAMED)
    name = name_of(given)
    if name is None:
        some = f'{{"type": "{ALLOWED}", "mode": "auto", "tools": [...]}}'
        raise invalid(
            f"is {quote(given)} but must be {', '.join(CHOICES)}, or {_NAMED}, or {some}; name the choice in one of these ways"
        )
    return {"type": "function", "function": {"name": name}}


def _included(given: Any) -> Any:
    wrong = [each for each in given if each not in _INCLUDED] if isinstance(given, list) else []
    if wrong:
        raise invalid(f"asks for {quote(wrong[0])}, which no answer here has; leave it out")
    return given


def _format(given: Any) -> Any:
    """The form of an answer as chats have it; here the schema's fields stand beside its type."""
    if given is None or isinstance(given, ResponseFormat):
        return given
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in FORMATS:
        raise invalid(
            f"has the type {quote(kind)} but there are {', '.join(FORMATS)}; "
            'send {"type": "json_schema", "name": "...", "schema": ...}'
        )
    if kind != "json_schema" or isinstance(given.get("json_schema"), dict):
        return given
    own = {key: value for key, value in given.items() if key != "type"}
    if not isinstance(own.get("schema"), dict):
        raise invalid("is missing; send the schema", "schema")
    if not isinstance(own.get("strict"), (bool, type(None))):
        raise invalid(f"is {quote(own['strict'])} but must be true or false; change it or leave it out", "strict")
    return {"type": kind, "json_schema": own}


def _renamed(error: Any) -> dict[str, Any]:
    """What is wrong with a chat, by the names of this request."""
    context = dict(error.get("ctx", {}))
    if "where" in context:
        context["where"] = tuple(NAMES.get(part, part) for part in context["where"])
    return {**error, "loc": ("body", *(NAMES.get(str(part), part) for part in error["loc"])), "ctx": context}


class TextOptions(Strict):
    """How the text of an answer has to be."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}
    format: Annotated[Optional[ResponseFormat], BeforeValidator(_format)] = None


class Reasoning(Strict):
    """What is asked of reasoning, of which there is none."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "effort": ChatRequest.neutral["reasoning_effort"],
        "summary": ("auto",),
        "generate_summary": ("auto",),
    }


class ResponseStream(Strict):
    """What a stream carries."""

    include_obfuscation: Optional[StrictBool] = Field(default=None, description="Accepted; nothing is padded.")
    include_usage: Optional[StrictBool] = Field(default=None, description="Accepted; the last event always has it.")


class ResponsesRequest(Ask):
    """``POST /v1/responses``."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": ChatRequest.neutral["prompt_cache_options"],
        "prompt_cache_retention": ChatRequest.neutral["prompt_cache_retention"],
        "service_tier": ChatRequest.neutral["service_tier"],
        "store": (False,),
        "truncation": ("disabled",),
    }
    input: Annotated[
        list[Message], BeforeValidator(turns, json_schema_input_type=Union[Text, list[dict[str, Any]]])
    ] = Field(
        max_length=MOST_MESSAGES - 1,
        description="A text, or messages, function_call and function_call_output items: the whole conversation.",
    )
    instructions: Optional[Text] = Field(default=None, description="A system message before the input.")
    max_output_tokens: Optional[Length] = None
    previous_response_id: Optional[StrictStr] = Field(default=None, description="Refused: nothing is kept.")
    tools: Annotated[Optional[list[dict[str, Any]]], BeforeValidator(_tools)] = None
    tool_choice: Annotated[
        Optional[Union[Literal["none", "auto", "required"], NamedTool, AllowedChoice]], BeforeValidator(_choice)
    ] = None
    parallel_tool_calls: Optional[StrictBool] = Field(default=None, description="false: one call at most.")
    text: Optional[TextOptions] = None
    include: Annotated[Optional[list[StrictStr]], BeforeValidator(_included)] = None
    top_logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=20)]] = None
    stream_options: Optional[ResponseStream] = None
    reasoning: Optional[Reasoning] = None
    max_tool_calls: Optional[StrictInt] = Field(default=None, description="Of built-in tools, of which there are none.")
    metadata: Optional[dict[StrictStr, StrictStr]] = Field(default=None, description="Given back, not used.")
    client_metadata: Optional[dict[str, Any]] = Field(default=None, description="Accepted, not used.")
    safety_identifier: Optional[Text] = Field(default=None, description="Accepted, not used.")
    prompt_cache_key: Optional[Text] = Field(default=None, description="Accepted, not used.")

    @model_validator(mode="after")
    def _stateless(self) -> ResponsesRequest:
        if self.previous_response_id is not None:
            raise invalid(_KEPT_NOWHERE, "previous_response_id")
        return self

    @property
    def form(self) -> ResponseFormat | None:
        """What the text of the answer is held to."""
        return None if self.text is None else self.text.format

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat that this is.

        Raises:
            RequestValidationError: for what no chat may hold, by the names of this request.
        """
        shared = {name: getattr(self, name) for name in Ask.model_fields if name != "stream"}
        first = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        wants_logprobs = bool(self.top_logprobs) or LOGPROBS in (self.include or ())
        try:
            return ChatRequest(
                **shared,
                messages=[*first, *self.input],
                max_completion_tokens=self.max_output_tokens,
                logprobs=wants_logprobs or None,
                top_logprobs=self.top_logprobs if wants_logprobs else None,
                tools=self.tools,
                tool_choice=self.tool_choice,
                parallel_tool_calls=self.parallel_tool_calls,
                response_format=self.form,
                stream=self.stream,
            )
        except ValidationError as error:
            raise RequestValidationError([_renamed(each) for each in error.errors()]) from error

    def told(self) -> dict[str, Any]:
        """What an answer says of its request."""
        functions = [{"parameters": None, "strict": None, **tool["function"]} for tool in self.tools or ()]
        form = self.form
        schema = {} if form is None or form.json_schema is None else form.json_schema.model_dump(by_alias=True)
        choice: Any = self.tool_choice or "auto"
        if isinstance(choice, NamedTool):
            choice = {"type": "function", "name": choice.function.name}
        elif isinstance(choice, AllowedChoice):
            named = [{"type": "function", "name": name} for name in choice.names]
            choice = {"type": ALLOWED, "mode": choice.allowed_tools.mode, "tools": named}
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.temperature or 0.0,
            "text": {"format": {"type": "text" if form is None else form.type, **schema}},
            "tool_choice": choice,
            "tools": [{"type": "function", **function} for function in functions],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }

"""Requests of ``POST /v1/responses``, OpenAI's newer form of a chat: they are read as chats, and nothing is kept of them."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Optional, Union

from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from shadowpeft.messages import quote
from shadowpeft.serve.protocol import Ask, ChatRequest, Length, Message, Text, joined
from shadowpeft.serve.strict import Strict, invalid
from shadowpeft.serve.tool_protocol import NamedTool, ResponseFormat, checked_choice, checked_format, checked_tools

_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_ROLES = ("user", "assistant", "system", "developer")
PATH = "/v1/responses"
_KEPT_NOWHERE = "names what was kept of an earlier answer, and nothing is kept here; send the whole conversation as input"
LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""What ``include`` may name: of reasoning there is none, so nothing of it is left out."""


def _text(item: dict[str, Any], key: str, number: int) -> str:
    """A field of an item that has to be text."""
    if not isinstance(item.get(key), str):
        raise invalid(f"is {quote(item.get(key))} but must be text; send it", str(number), key)
    return str(item[key])


def _message(item: dict[str, Any], number: int) -> dict[str, Any]:
    if item.get("role") not in _ROLES:
        problem = f"is {quote(item.get('role'))} but there are {', '.join(_ROLES)}; send one of them"
        raise invalid(problem, str(number), "role")
    content = joined(item.get("content"), _PARTS, str(number), "content")
    if not isinstance(content, str):
        raise invalid("is no text and no list of texts; send one of them", str(number), "content")
    return {"role": item["role"], "content": content}


def _call(item: dict[str, Any], number: int) -> dict[str, Any]:
    function = {"name": _text(item, "name", number), "arguments": _text(item, "arguments", number)}
    calls = [{"id": _text(item, "call_id", number), "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(item: dict[str, Any], number: int) -> dict[str, Any]:
    output = joined(item.get("output"), _PARTS, str(number), "output")
    if not isinstance(output, str):
        raise invalid("is no text and no list of texts; send one of them", str(number), "output")
    return {"role": "tool", "tool_call_id": _text(item, "call_id", number), "content": output}


_ITEMS = {"message": _message, "function_call": _call, "function_call_output": _result}


def turns(given: Any) -> Any:
    """The turns of a chat that an ``input`` holds: calls belong to the assistant's turn before them."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise invalid("is no text and no list of items; send one of them, and nothing empty")
    found: list[dict[str, Any]] = []
    for number, item in enumerate(given):
        if isinstance(item, Message):
            return given  # read already
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "item_reference":
            raise invalid(_KEPT_NOWHERE, str(number))
        if not isinstance(kind, str) or kind not in _ITEMS:
            problem = f"has the type {quote(kind)} but there are {', '.join(_ITEMS)}; leave it out or send one of them"
            raise invalid(problem, str(number))
        turn = _ITEMS[kind](item, number)
        before = found[-1] if found else {}
        if kind == "function_call" and before.get("role") == "assistant":
            before.setdefault("tool_calls", []).extend(turn["tool_calls"])
        elif turn["role"] == "assistant" and "tool_calls" in before and not before["content"]:
            before["content"] = turn["content"]
        else:
            found.append(turn)
    return found


def _tools(given: Any) -> Any:
    """Definitions of functions as chats have them; here the function's fields stand beside its type."""
    if not isinstance(given, list):
        return checked_tools(given)
    for number, tool in enumerate(given):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind != "function":
            problem = f"has the type {quote(kind)} but only functions are called here; send the type function"
            raise invalid(problem, str(number))
    return checked_tools(
        [
            tool
            if isinstance(tool.get("function"), dict)
            else {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}
            for tool in given
        ]
    )


def _choice(given: Any) -> Any:
    """The choice of a tool as chats have it."""
    flat = isinstance(given, dict) and given.get("type") == "function" and "function" not in given
    return checked_choice({"type": "function", "function": {"name": given.get("name")}} if flat else given)


def _included(given: Any) -> Any:
    wrong = [each for each in given if each not in _INCLUDED] if isinstance(given, list) else []
    if wrong:
        raise invalid(f"asks for {quote(wrong[0])}, which no answer here has; leave it out")
    return given


def _format(given: Any) -> Any:
    """The form of an answer as chats have it; here the schema's fields stand beside its type."""
    given = checked_format(given)
    if isinstance(given, dict) and given["type"] == "json_schema" and "json_schema" not in given:
        if not isinstance(given.get("schema"), dict):
            raise invalid("is missing; send the schema", "schema")
        return {"type": "json_schema", "json_schema": {key: v for key, v in given.items() if key != "type"}}
    return given


class TextOptions(Strict):
    """How the text of an answer has to be."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}
    format: Annotated[Optional[ResponseFormat], BeforeValidator(_format)] = None


class Reasoning(Strict):
    """What is asked of reasoning, of which there is none."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "effort": ("none", "medium"),
        "summary": ("auto",),
        "generate_summary": ("auto",),
    }


class ResponseStream(Strict):
    """What a stream carries."""

    include_obfuscation: Optional[StrictBool] = Field(default=None, description="Accepted; nothing is padded.")


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
    ] = Field(description="A text, or messages, function_call and function_call_output items: the whole conversation.")
    instructions: Optional[Text] = Field(default=None, description="A system message before the input.")
    max_output_tokens: Optional[Length] = None
    previous_response_id: Optional[StrictStr] = Field(default=None, description="Refused: nothing is kept.")
    tools: Annotated[Optional[list[dict[str, Any]]], BeforeValidator(_tools)] = None
    tool_choice: Annotated[
        Optional[Union[Literal["none", "auto", "required"], NamedTool]], BeforeValidator(_choice)
    ] = None
    parallel_tool_calls: Optional[StrictBool] = Field(default=None, description="false: one call at most.")
    text: Optional[TextOptions] = None
    include: Annotated[Optional[list[StrictStr]], BeforeValidator(_included)] = None
    top_logprobs: Optional[Annotated[StrictInt, Field(ge=0, le=20)]] = None
    stream_options: Optional[ResponseStream] = None
    reasoning: Optional[Reasoning] = None
    max_tool_calls: Optional[StrictInt] = Field(default=None, description="Of built-in tools, of which there are none.")
    metadata: Optional[dict[StrictStr, StrictStr]] = Field(default=None, description="Given back, not used.")
    safety_identifier: Optional[Text] = Field(default=None, description="Accepted, not used.")
    prompt_cache_key: Optional[Text] = Field(default=None, description="Accepted, not used.")

    @model_validator(mode="after")
    def _stateless(self) -> ResponsesRequest:
        if self.previous_response_id is not None:
            raise invalid(_KEPT_NOWHERE, "previous_response_id")
        return self

    @cached_property
    def chat(self) -> ChatRequest:
        """The chat that this is.

        Raises:
            RequestValidationError: for what no chat may hold, by the names of this request.
        """
        shared = {name: getattr(self, name) for name in Ask.model_fields if name != "stream"}
        first = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        form = None if self.text is None or self.text.format is None else self.text.format
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
                response_format=form,
                stream=self.stream,
            )
        except ValidationError as error:
            names = {"messages": "input", "response_format": "text"}
            raise RequestValidationError(
                [
                    {**each, "loc": ("body", *(names.get(str(part), part) for part in each["loc"]))}
                    for each in error.errors()
                ]
            ) from error

    def told(self) -> dict[str, Any]:
        """What an answer says of its request."""
        functions = [{"parameters": None, "strict": None, **tool["function"]} for tool in self.tools or ()]
        form = self.text.format if self.text is not None and self.text.format is not None else None
        schema = {} if form is None or form.json_schema is None else form.json_schema.model_dump(by_alias=True)
        choice = self.tool_choice or "auto"
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
            "tool_choice": {"type": "function", "name": choice.function.name} if isinstance(choice, NamedTool) else choice,
            "tools": [{"type": "function", **function} for function in functions],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }

"""Tools in requests and messages, as OpenAI's API has them."""

from __future__ import annotations

import re
from typing import Any, Literal, Optional

from pydantic import Field, StrictBool, StrictInt, StrictStr

from shadowpeft.data.tools import tools_of
from shadowpeft.errors import ConfigError
from shadowpeft.messages import quote
from shadowpeft.serve.strict import Strict, invalid

MOST_TOOLS = 128
"""Of one request."""


class CalledFunction(Strict):
    """What was called."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(Strict):
    """A call of an earlier turn."""

    id: StrictStr
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Optional[StrictInt] = Field(default=None, description="Of a stream's deltas; accepted, not used.")


class ToolName(Strict):
    """A tool's name."""

    name: StrictStr


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"] = "function"
    function: ToolName


CHOICES = ("none", "auto", "required")


def checked_choice(given: Any) -> Any:
    """``tool_choice`` as it came, if it has one of its two forms."""
    named = given.get("function") if isinstance(given, dict) and given.get("type", "function") == "function" else None
    if given is None or given in CHOICES or isinstance(given, NamedTool) or isinstance(named, dict):
        return given
    raise invalid(
        f"is {quote(given)} but must be {', '.join(CHOICES)}, or "
        '{"type": "function", "function": {"name": "..."}}; name the choice in one of these ways'
    )


class JsonSchema(Strict):
    """What an answer has to be."""

    name: StrictStr = "answer"
    description: Optional[StrictStr] = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: Optional[StrictBool] = Field(default=None, description="Accepted; every answer is held to its schema.")


FORMATS = ("text", "json_schema", "json_object")


class ResponseFormat(Strict):
    """A form of answers: a JSON schema, any JSON object, or plain text."""

    type: Literal["text", "json_schema", "json_object"]
    json_schema: Optional[JsonSchema] = None

    @property
    def schema_(self) -> dict[str, Any]:
        """The JSON schema of the answer."""
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


def checked_format(given: Any) -> Any:
    """A form that there is."""
    if isinstance(given, ResponseFormat):
        return given
    kind = given.get("type") if isinstance(given, dict) else None
    if given is not None and kind not in FORMATS:
        raise invalid(
            f"has the type {quote(kind)} but there are {', '.join(FORMATS)}; "
            'send {"type": "json_schema", "json_schema": {"schema": ...}}'
        )
    return given


def checked_tools(given: Any) -> Any:
    """The definitions as they came, if they are tools; an empty list is none."""
    if given is None or given == []:
        return None
    if isinstance(given, list) and len(given) > MOST_TOOLS:
        raise invalid(f"has {len(given)} tools but may have {MOST_TOOLS}; send fewer")
    try:
        tools_of(given, "it")
    except ConfigError as error:
        raise invalid(
            f"holds no list of tools: {re.sub('^it,? ', '', str(error))}; send definitions of functions"
        ) from error
    return given

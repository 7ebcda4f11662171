"""Tools in requests and messages, as OpenAI's API has them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Optional

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


class AllowedTools(Strict):
    """Which of the tools may be called, and whether one has to be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MOST_TOOLS)]


class AllowedChoice(Strict):
    """Some of the tools: the others stay in the prompt, so that a cache of it stays good, and are not called."""

    type: Literal["allowed_tools"] = "allowed_tools"
    allowed_tools: AllowedTools

    @property
    def names(self) -> list[str]:
        """Of the tools that may be called."""
        return [tool.function.name for tool in self.allowed_tools.tools]


CHOICES = ("none", "auto", "required")
ALLOWED = "allowed_tools"
_NAMED = '{"type": "function", "function": {"name": "..."}}'


def checked_choice(given: Any) -> Any:
    """``tool_choice``, if it has one of its three forms."""
    if isinstance(given, dict) and given.get("type") == ALLOWED:
        return allowed_choice(given.get(ALLOWED), ALLOWED)
    named = given.get("function") if isinstance(given, dict) and given.get("type", "function") == "function" else None
    if given is None or given in CHOICES or isinstance(given, (NamedTool, AllowedChoice)) or isinstance(named, dict):
        return given
    allowed = f'{{"type": "{ALLOWED}", "{ALLOWED}": {{"mode": "auto", "tools": [...]}}}}'
    raise invalid(
        f"is {quote(given)} but must be {', '.join(CHOICES)}, or {_NAMED}, or {allowed}; name the choice in one of these ways"
    )


def allowed_choice(given: Any, *where: str, form: str = _NAMED) -> AllowedChoice:
    """A choice of some tools.

    Args:
        given: its mode and its tools, of each of which the name is read. where: it stands in the choice. form: a tool, as a
            refusal shows it.
    """
    if not isinstance(given, dict) or given.get("mode") not in ("auto", "required"):
        mode = given.get("mode") if isinstance(given, dict) else None
        raise invalid(f"is {quote(mode)} but must be auto or required; send one of them", *where, "mode")
    stray = next((key for key in given if key not in ("type", "mode", "tools")), None)
    if stray is not None:
        raise invalid("is no field of this choice; leave it out", *where, stray)
    if not isinstance(given.get("tools"), list) or not 0 < len(given["tools"]) <= MOST_TOOLS:
        raise invalid(f"is no list of 1 to {MOST_TOOLS} tools; send some, each as {form}", *where, "tools")
    for number, tool in enumerate(given["tools"]):
        if name_of(tool) is None:
            raise invalid(f"is {quote(tool)} but must be {form}; name a function", *where, "tools", str(number))
    tools = [NamedTool(function=ToolName(name=name)) for name in map(name_of, given["tools"]) if name is not None]
    return AllowedChoice(allowed_tools=AllowedTools(mode=given["mode"], tools=tools))


def name_of(tool: Any) -> str | None:
    """The name in the choice of a function, of either protocol; None: it is none."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return None
    name = tool.get("name", tool["function"].get("name") if isinstance(tool.get("function"), dict) else None)
    return name if isinstance(name, str) else None


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

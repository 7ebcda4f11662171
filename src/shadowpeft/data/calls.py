"""Calls of tools, and the compact form in which an answer begins with them: ``[Walk(direction="left", distance=2), Sit()]``.

Grammar: ``[``, calls with ``, `` between them, ``]``. A call is a name and its arguments in the schema's order,
``name=value`` with ``, `` between them; a value is JSON. Models of the Llama family write calls in this way too. It costs few
tokens, and the paper's ``[Skill()] reply`` is a call without arguments. ``[REMOTE]`` hands the request on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shadowpeft.data.actions import REMOTE
from shadowpeft.data.tools import Tool, Tools, canonical, said_arguments, value_text
from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json
from shadowpeft.messages import quote

LONGEST = 4_000
"""Characters of an answer after which it has no call any more."""
_OPEN = re.compile(r"\s*\[")
_NAME = re.compile(r"([^\W\d][\w-]*)\(")
_KEY = re.compile(r"([^\W\d][\w-]*)=")
_KEYS = {"function", "type", "id", "index", "name", "arguments"}
"""Of a call; ``index`` comes from the deltas of a stream."""
_JSON = json.JSONDecoder(parse_constant=lambda name: _refuse(name))


@dataclass(frozen=True)
class Call:
    """A tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]

    def openai(self, identity: str) -> dict[str, Any]:
        """In the form of OpenAI's API."""
        return {"id": identity, "type": "function", "function": {"name": self.name, "arguments": self.json}}

    @property
    def json(self) -> str:
        """The arguments as a JSON text."""
        return value_text(self.arguments)


@dataclass(frozen=True)
class Part:
    """A stretch of an answer that says one thing: the name of call ``call``, or one of its arguments."""

    call: int
    argument: str | None
    """None: the name."""
    start: int
    end: int


@dataclass(frozen=True)
class Answered:
    """The calls of an answer, and where they stand."""

    calls: tuple[Call, ...]
    """None of them: ``[REMOTE]``."""
    end: int
    """Where the rest of the text begins."""
    parts: tuple[Part, ...] = ()
    start: int = 0
    """Where the calls begin; what stands before are words."""

    @property
    def text(self) -> str:
        """The calls in their one form; ``REMOTE`` for none."""
        return ", ".join(map(_call_text, self.calls)) or REMOTE


def written(calls: Sequence[Call]) -> str:
    """What an answer begins with; ``[REMOTE]`` for no call."""
    return f"[{Answered(tuple(calls), 0).text}]"


def _call_text(call: Call) -> str:
    return f"{call.name}({', '.join(f'{key}={value_text(value)}' for key, value in call.arguments.items())})"


def ordered(call: Call, tools: Tools) -> Call:
    """The call with its arguments in the schema's order.

    Raises:
        ConfigError: a clause that goes on after the place, if the tool is unknown or its arguments are not valid.
    """
    tool = tools.by_name.get(call.name)
    if tool is None:
        raise ConfigError(f"calls {quote(call.name)}, which is none of the tools {', '.join(tools.names)[:200]}")
    call = _in_order(call, tool)
    problem = tool.problem(call.arguments)
    if problem is not None:
        raise ConfigError(f"calls {call.name} with arguments that its schema refuses ({problem})")
    return call


def _in_order(call: Call, tool: Tool) -> Call:
    arguments = {name: canonical(call.arguments[name]) for name in tool.properties if name in call.arguments}
    return Call(call.name, arguments | {name: value for name, value in call.arguments.items() if name not in arguments})


def calls_of(given: Iterable[Any], tools: Tools, *, strict: bool = True) -> tuple[Call, ...]:
    """Calls in OpenAI's form (``{"function": {"name", "arguments"}}``), or their inner objects.

    Args:
        strict: each is a valid call of one of ``tools``.

    Raises:
        ConfigError: a clause that goes on after the place of the row or message.
    """
    calls = []
    for each in given:
        function = each.get("function", each) if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(f"has the call {quote(each)}, which needs a function with name and arguments")
        other = sorted((function.keys() | each.keys()) - _KEYS)
        if other:
            raise ConfigError(f"calls {function['name']} with the key {quote(other[0])}; its arguments stand under 'arguments'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = parse_json(arguments or "{}")
            except ValueError as error:
                raise ConfigError(f"calls {function['name']} with arguments that are no JSON ({error})") from error
        if not isinstance(arguments, dict):
            raise ConfigError(f"calls {function['name']} with arguments that are no object")
        call = _said(Call(function["name"], arguments), tools)
        if strict:
            call = ordered(call, tools)
        elif call.name in tools.by_name:
            call = _in_order(call, tools.by_name[call.name])
        calls.append(call)
    return tuple(calls)


def _said(call: Call, tools: Tools) -> Call:
    """The call without arguments that are null where its tool takes no null: a table has every key in every row."""
    tool = tools.by_name.get(call.name)
    return call if tool is None else Call(call.name, said_arguments(call.arguments, tool.properties))


def answered(text: str, tools: Tools) -> Answered | None:
    """The calls that ``text`` begins with, each valid for its tool; None if there are none, or not yet.

    It does not change its mind when text is added.
    """
    opening = _OPEN.match(text)
    if opening is None:
        return None
    at = opening.end()
    if text.startswith(f"{REMOTE}]", at):
        return Answered((), at + len(REMOTE) + 1)
    calls: list[Call] = []
    parts: list[Part] = []
    while True:
        name = _NAME.match(text, at)
        if name is None:
            return None
        parts.append(Part(len(calls), None, at, name.end()))
        arguments: dict[str, Any] = {}
        at = name.end()
        while not text.startswith(")", at):
            start = at
            key = _KEY.match(text, at)
            if key is None or key[1] in arguments:
                return None
            try:
                arguments[key[1]], at = json_at(text, key.end())
            except (ValueError, RecursionError):
                return None
            parts.append(Part(len(calls), key[1], start, at))
            if text.startswith(", ", at):
                at += 2
                if text.startswith(")", at):
                    return None
            elif not text.startswith(")", at):
                return None
        at += 1
        try:
            calls.append(ordered(Call(name[1], arguments), tools))
        except ConfigError:
            return None
        if text.startswith("]", at):
            return Answered(tuple(calls), at + 1, tuple(parts))
        if not text.startswith(", ", at):
            return None
        at += 2


def json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that starts at ``place``, and where it ends.

    Raises:
        ValueError, RecursionError: if there is none.
    """
    return _JSON.raw_decode(text, place)


class CallParser:
    """A function from a text to the calls it begins with, in their one form; ``"REMOTE"``, or None: what a router asks.

    Args:
        offered: the tools as a client has written them; None: as here.

    Attributes:
        longest: characters after which an answer has no call any more.
        waits: whether all calls are certain only once the answer has ended.
        later: whether calls may stand behind words.
    """

    longest = LONGEST
    waits = later = False

    def __init__(self, tools: Tools, offered: Tools | None = None) -> None:
        self.tools, self.offered = tools, tools if offered is None else offered

    def __call__(self, text: str) -> str | None:
        found = self.found(text)
        return None if found is None else found.text

    def found(self, text: str) -> Answered | None:
        """The calls themselves, unless they end after :attr:`longest` characters: a stream has become text by then."""
        found = answered(text, self.tools)
        return None if found is None or found.end > self.longest else found

    def told(self, call: Call) -> Call:
        """The call as the client's schema wants it: null for what it requires and the model left out, and no other null."""
        tool = self.offered.by_name[call.name]
        kept = said_arguments(call.arguments, tool.properties)
        return Call(call.name, kept | {name: None for name in tool.properties if name in tool.required and name not in kept})

    def words(self, text: str) -> int:
        """How many characters ``text`` begins with that are no calls, and will be none when text is added."""
        start = text.lstrip()
        return 0 if (not start or start.startswith("[")) and len(text) <= self.longest else len(text)


def only_calls(text: str, tools: Tools) -> str:
    """The calls at the start of ``text`` as an answer begins with them; ``[REMOTE]`` if there are none."""
    found = answered(text, tools)
    return written(() if found is None else found.calls)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")

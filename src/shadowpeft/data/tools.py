"""Actions with arguments: tools in the form of OpenAI's API, read from ``actions.json``. Names alone are the short form.

A tool is a name, a description and a JSON schema of its arguments. A call that is taken for one is always checked against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from shadowpeft.data.actions import REMOTE, checked, read_skills
from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json
from shadowpeft.messages import quote
from shadowpeft.versions import require_jsonschema

_NAME = re.compile(r"[^\W\d][\w-]{0,63}")
"""Of a tool, or of an argument, as calls are written."""
DEFINITIONS = ("$defs", "definitions")
"""Where a schema keeps what its references name."""
ABOUT = {"title", "description", "default", "examples", "deprecated", "$schema", "$id", "$comment", *DEFINITIONS}
"""What a schema may say without deciding which values are valid."""
_LARGEST, _DEEPEST = 5_000, 32
"""Parts of a schema, and references inside one another, once references are written out: a request can bring any."""
_TOOL_KEYS, _FUNCTION_KEYS = {"type", "function"}, {"name", "description", "parameters", "strict"}


@dataclass(frozen=True)
class Tool:
    """One action and the JSON schema of its arguments, an object."""

    name: str
    description: str
    parameters: dict[str, Any]

    @cached_property
    def validator(self) -> Any:
        """What judges arguments (``jsonschema-rs``)."""
        require_jsonschema()
        import jsonschema_rs

        return jsonschema_rs.validator_for({"additionalProperties": False, **self.parameters})

    @property
    def properties(self) -> dict[str, Any]:
        """Schema of each argument, in order."""
        return dict(self.parameters.get("properties", {}))

    @property
    def required(self) -> frozenset[str]:
        """Arguments that every call has."""
        return frozenset(self.parameters.get("required", ()))

    @cached_property
    def bare(self) -> Any:
        """The parameters without what does not decide which arguments a model can write; a request asks for them often."""
        return _bare(self.parameters)

    def problem(self, arguments: Any) -> str | None:
        """Why these are no arguments of the tool; None if they are."""
        for error in self.validator.iter_errors(arguments):
            at = ".".join(map(str, error.instance_path))
            return f"{at}: {error.message}" if at else str(error.message)
        return None

    def definition(self) -> dict[str, Any]:
        """In OpenAI's form."""
        about = {"description": self.description} if self.description else {}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": self.parameters}}


class Tools(Sequence[Tool]):
    """Tools by name, in order.

    Args:
        where: what holds them, for messages.

    Raises:
        ConfigError: if there is none, or two have one name.
    """

    def __init__(self, tools: Iterable[Tool], where: str = "the list of tools") -> None:
        self._tools, self.where = tuple(tools), where
        self.by_name: dict[str, Tool] = {tool.name: tool for tool in self._tools}
        if not self._tools:
            raise ConfigError(f"{where} has no tool; write at least one definition, or a name such as LampOn")
        if len(self.by_name) < len(self._tools):
            names = [tool.name for tool in self._tools]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where} has {twice!r} twice; name each tool once")

    def __getitem__(self, place: Any) -> Any:
        return self._tools[place]

    def __len__(self) -> int:
        return len(self._tools)

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tools) and self._tools == other._tools

    def __hash__(self) -> int:
        return hash(self.names)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.by_name)

    @property
    def plain(self) -> bool:
        """Whether none has arguments, so that the short form says all."""
        return all(not tool.properties for tool in self._tools)

    def definitions(self) -> list[dict[str, Any]]:
        """In OpenAI's form."""
        return [tool.definition() for tool in self._tools]

    def some(self, names: Iterable[str]) -> Tools:
        """Those with these names."""
        wanted = set(names)
        return Tools((tool for tool in self._tools if tool.name in wanted), self.where)

    def lack(self, other: Tools) -> str | None:
        """The name of the first tool of ``other`` that is not here, or whose arguments are others; None: all are.

        Titles, descriptions, defaults, orders, and null for an argument that may be left out make no other arguments.
        """
        for tool in other:
            own = self.by_name.get(tool.name)
            if own is None or own.bare != tool.bare:
                return tool.name
        return None


def tools_of(definitions: Any, where: str = "the list of tools") -> Tools:
    """Tools from a list of definitions, each ``{"type": "function", "function": {...}}`` or its inner object; or of names.

    Raises:
        ConfigError: starting with ``where``, if it is no such list, or a definition cannot be a tool.
    """
    if not isinstance(definitions, (list, tuple)):
        raise ConfigError(f"{where} is a JSON {type(definitions).__name__} but must be a list of tools")
    if definitions and all(isinstance(each, str) for each in definitions):
        return named(checked(definitions, where), where)
    return Tools([_tool(each, f"{where}, tool {n}") for n, each in enumerate(definitions, 1)], where)


def named(names: Iterable[str], where: str = "the list of tools") -> Tools:
    """Tools without arguments."""
    return Tools((Tool(name, "", {"type": "object", "properties": {}}) for name in names), where)


def read_tools(file: str | Path) -> Tools:
    """The tools of a UTF-8 file: a JSON list of definitions, or the short form: names, one a line or as a JSON list.

    Raises:
        ConfigError: if it cannot be read or is neither, and see :func:`tools_of`.
    """
    where = f"the actions file '{file}'"
    try:
        content = parse_json(Path(file).read_bytes())
    except (OSError, ValueError):
        return named(read_skills(file), where)  # names, one a line, or what is wrong with the file
    if isinstance(content, list) and any(isinstance(each, dict) for each in content):
        tools = tools_of(content, where)
        if tools.plain:  # they are skills, which have shorter names
            checked(tools.names, where)
        return tools
    return named(read_skills(file), where)


def _tool(given: Any, where: str) -> Tool:
    function = given
    if isinstance(given, dict) and "function" in given:
        if given.get("type") != "function" or not given.keys() <= _TOOL_KEYS:
            raise ConfigError(
                f'{where} has the keys {sorted(given)} but must be {{"type": "function", "function": ...}}'
            )
        function = given["function"]
    if not isinstance(function, dict) or not function.keys() <= {*_FUNCTION_KEYS, "type"}:
        raise ConfigError(f"{where} is {quote(function)} but must be an object with name, description and parameters")
    name, about = function.get("name"), function.get("description") or ""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where} has the name {quote(name)}, which must be at most 64 letters, digits, '_' or '-', a letter first"
        )
    if name == REMOTE:
        raise ConfigError(f"{where} is called {REMOTE}, which always means handing on; rename it")
    if not isinstance(about, str):
        raise ConfigError(f"{where} ({name}) has a description that is no text; write a sentence")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(name, about, _parameters(parameters, f"{where} ({name})"))


def _parameters(schema: Any, where: str) -> dict[str, Any]:
    if isinstance(schema, dict) and any(key in schema for key in (*DEFINITIONS, "$ref")):
        named = {key: schema[key] for key in DEFINITIONS if key in schema}
        try:
            schema = _inlined({key: value for key, value in schema.items() if key not in named}, schema, (), count(1))
        except ConfigError as error:
            raise ConfigError(f"{where} {error}") from error
        if "$ref" in json.dumps(schema):  # of one that names itself
            schema = {**schema, **named}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ConfigError(
            f'{where} has parameters that are no JSON schema of an object; write {{"type": "object", ...}}'
        )
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise ConfigError(f"{where} needs 'properties' as an object and 'required' as a list")
    for name in properties:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{where} has an argument called {quote(name)}; use letters, digits, '_' or '-', a letter first"
            )
    for name in required:
        if name not in properties:
            raise ConfigError(
                f"{where} requires {quote(name)}, which is none of its properties; add it or leave it out"
            )
    require_jsonschema()
    import jsonschema_rs

    try:
        jsonschema_rs.validator_for(schema)
    except (ValueError, jsonschema_rs.ValidationError) as error:
        raise ConfigError(
            f"{where} has parameters that are no JSON schema ({str(error).splitlines()[0]}); correct them"
        ) from error
    return {"type": "object", **schema, "properties": properties}


_SKIPPED = ABOUT | {"nullable"}
_CHOICES = ("anyOf", "oneOf")


def _bare(schema: Any) -> Any:
    """A schema without what does not decide which arguments a model can write for it.

    That is text, defaults, the order of lists, and null: an argument that may be null need not be written
    (:meth:`shadowpeft.data.calls.CallParser.told` writes it where a client requires it).
    """
    if isinstance(schema, (list, tuple)):
        return [_bare(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    bare = {key: _bare(value) for key, value in schema.items() if key not in _SKIPPED}
    if "const" in bare:
        bare["enum"] = [bare.pop("const")]
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        bare["properties"] = {name: _bare(_not_null(value)) for name, value in properties.items()}
        bare["required"] = [name for name in schema.get("required") or () if not takes_null(properties.get(name))]
    for key in ("enum", "required", "type", *_CHOICES):
        if isinstance(bare.get(key), list):
            bare[key] = sorted(bare[key], key=lambda value: json.dumps(value, sort_keys=True))
    if bare.get("additionalProperties") is False:
        del bare["additionalProperties"]
    return {key: value for key, value in bare.items() if value != []}


def said_arguments(arguments: dict[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that are null where the tool takes no null, or has no such argument: in a table every row has
    every argument of every tool."""
    return {n: v for n, v in arguments.items() if v is not None or takes_null(properties.get(n))}


def takes_null(schema: Any) -> bool:
    """Whether the schema of an argument says that it may be null."""
    if not isinstance(schema, Mapping):
        return False
    kind, values = schema.get("type"), schema.get("enum")
    return (
        kind == "null"
        or (isinstance(kind, (list, tuple)) and "null" in kind)
        or bool(schema.get("nullable"))
        or (kind is None and isinstance(values, (list, tuple)) and None in values)
        or any(any(map(takes_null, schema[key])) for key in _CHOICES if isinstance(schema.get(key), (list, tuple)))
    )


def _not_null(schema: Any) -> Any:
    """A schema without its null: libraries write an argument that may be left out as ``anyOf: [..., {"type": "null"}]``."""
    if not takes_null(schema) or schema.get("type") == "null":
        return schema
    kept = {key: value for key, value in schema.items() if key != "nullable"}
    if isinstance(kept.get("type"), (list, tuple)):
        types = [each for each in kept["type"] if each != "null"]
        kept["type"] = types[0] if len(types) == 1 else types
    if isinstance(kept.get("enum"), (list, tuple)):
        kept["enum"] = [each for each in kept["enum"] if each is not None]
    for key in _CHOICES:
        if isinstance(kept.get(key), (list, tuple)):
            others = [_not_null(each) for each in kept.pop(key) if each != {"type": "null"}]
            kept |= others[0] if len(others) == 1 and isinstance(others[0], Mapping) else {key: others}
    return kept


def _inlined(schema: Any, root: Mapping[str, Any], inside: tuple[str, ...], parts: Iterator[int]) -> Any:
    """A schema with what its references name in their place; one that names itself stays a reference.

    Args:
        inside: references that lead here. parts: counts the parts that were written.

    Raises:
        ConfigError: a clause that goes on after the place, if a reference leads nowhere, or to too much.
    """
    if isinstance(schema, (list, tuple)):
        return [_inlined(each, root, inside, parts) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    if next(parts) > _LARGEST or len(inside) > _DEEPEST:
        raise ConfigError(
            f"has more than {_LARGEST} parts, or {_DEEPEST} references inside one another, once references are written out; "
            "simplify it"
        )
    name = schema.get("$ref")
    if not isinstance(name, str) or name in inside:
        return {key: _inlined(value, root, inside, parts) for key, value in schema.items()}
    found: Any = root
    for step in name.removeprefix("#").strip("/").split("/") if name != "#" else ():
        step = step.replace("~1", "/").replace("~0", "~")
        if not name.startswith("#") or not isinstance(found, Mapping) or step not in found:
            raise ConfigError(f"has the reference {quote(name)}, which leads nowhere; write what it names under $defs")
        found = found[step]
    beside = {key: value for key, value in schema.items() if key != "$ref"}
    whole = _inlined(found, root, (*inside, name), parts)
    return {**whole, **_inlined(beside, root, inside, parts)} if isinstance(whole, dict) else whole


def canonical(value: Any) -> Any:
    """A JSON value with one form: a number that is whole is written without a point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: canonical(each) for key, each in value.items()}
    return [canonical(each) for each in value] if isinstance(value, list) else value


def value_text(value: Any) -> str:
    """A JSON value as calls are written."""
    return json.dumps(canonical(value), ensure_ascii=False)

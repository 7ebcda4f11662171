"""The grammar of the calls that tools allow, as ``llguidance`` reads it (a dialect of Lark).

Every text of it parses and is valid: names, required arguments, types, enumerations, lengths and ranges. Arguments stand in
the schema's order, as training sees them. Strings and numbers have an end (:data:`LONGEST_TEXT`, ``number_patterns``), so that
a model that knows nothing comes to one too.
"""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from shadowpeft.data.actions import REMOTE
from shadowpeft.data.call_form import COMPACT, CallForm
from shadowpeft.data.number_patterns import DECIMALS, NOTHING, numbers
from shadowpeft.data.tools import DEFINITIONS, Tool, Tools, canonical, value_text

LONGEST_TEXT = 200
"""Characters of a string whose schema names no ``maxLength``."""
MOST_CALLS = 4
"""Calls of one answer."""
_SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON as training writes it, without needless white space."""
_ABOUT = {"type", "description", "title", "default", "examples"}
_STRING = _ABOUT | {"minLength", "maxLength"}
_NUMBER = _ABOUT | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_CHARACTER = r'[^"\\\x00-\x1f\x7f]|\\["\\]'


def calls_grammar(tools: Tools, *, hand_on: bool, calls: int = MOST_CALLS, form: CallForm = COMPACT) -> str:
    """One to ``calls`` calls of ``tools`` as ``form`` writes them; with ``hand_on`` also ``[REMOTE]``."""
    return _rules("start: " + (f"{_text('[' + REMOTE + ']')} | calls" if hand_on else "calls"), tools, calls, form)


def _rules(start: str, tools: Tools, calls: int, form: CallForm) -> str:
    lines = [start]
    more = f" ({_piece(form.between, form)} call){{0,{calls - 1}}}" if calls > 1 and form.between is not None else ""
    lead = f"{_text(form.lead)}? " if form.lead else ""
    lines.append(f"calls: {lead}{_piece(form.begin, form)} call{more} {_piece(form.end, form)}")
    lines.append("call: " + " | ".join(f"t{n}" for n in range(len(tools))))
    for n, tool in enumerate(tools):
        lines += _tool(f"t{n}", tool, form)
    return "\n".join(lines) + "\n"


def schema_grammar(
    schema: dict[str, Any], tools: Tools | None = None, *, calls: int = MOST_CALLS, form: CallForm = COMPACT
) -> str:
    """One JSON value of a schema, without needless white space; or one to ``calls`` calls of ``tools``."""
    value = f"%json {json.dumps({**schema, 'x-guidance': _SPACING}, ensure_ascii=False)}\n"
    return f"start: {value}" if tools is None else _rules("start: value | calls", tools, calls, form) + f"value: {value}"


def _tool(rule: str, tool: Tool, form: CallForm) -> list[str]:
    """Rules of one call. ``<rule>_3f``: arguments from the fourth on, where none has been written; ``_3m``: where one has."""
    properties = list(tool.properties.items())
    lines = [f"{rule}: {_piece(tool.name + form.opens, form)} {rule}_0f"]
    for n, (name, schema) in enumerate(properties):
        value = (_raw if form.raw else _value)(schema, tool.parameters, form)
        lines.append(f"{rule}_v{n}: {value}")
        for written in (False, True) if n else (False,):
            before = (form.joint if written else "") + form.key_begin + name + form.key_end
            some = f"{_piece(before, form)} {rule}_v{n} {rule}_{n + 1}m"
            none = "" if name in tool.required else f" | {rule}_{n + 1}{'m' if written else 'f'}"
            lines.append(f"{rule}_{n}{'m' if written else 'f'}: {some}{none}")
    lines += [f"{rule}_{len(properties)}{way}: {_text(form.closes)}" for way in ("fm" if properties else "f")]
    reached = _reached(lines)
    return [line for line in lines if line.partition(":")[0] in reached]


def _reached(lines: list[str]) -> set[str]:
    """Names of the rules that the first one needs."""
    bodies = {name: body for name, _, body in (line.partition(":") for line in lines)}
    found, left = set(), [next(iter(bodies))]
    while left:
        name = left.pop()
        found.add(name)
        left += [word for word in bodies[name].split() if word in bodies and word not in found]
    return found


def _value(schema: Any, root: dict[str, Any], form: CallForm) -> str:
    """What an argument may be; ``root`` has what references name. Texts are short and of one line in the compact form alone."""
    if isinstance(schema, dict):
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if values is not None and not (schema.keys() - _ABOUT - {"enum", "const"}) and values:
            kind = schema.get("type")
            return " | ".join(_text(value_text(value)) for value in values if _is(value, kind))
        kind = schema.get("type")
        if kind == "boolean" and not (schema.keys() - _ABOUT):
            return '"true" | "false"'
        if kind == "string" and not (schema.keys() - _STRING) and form == COMPACT:
            least, most = schema.get("minLength", 0), schema.get("maxLength", LONGEST_TEXT)
            return _pattern(f'"({_CHARACTER}){{{least},{max(least, most)}}}"')
        if kind in ("integer", "number") and not (schema.keys() - _NUMBER):
            pattern = _number(schema, 0 if kind == "integer" else DECIMALS)
            if pattern != NOTHING:
                return _pattern(pattern)
    named = {key: root[key] for key in DEFINITIONS if key in root}
    whole = {**schema, **named, "x-guidance": _SPACING} if isinstance(schema, dict) else schema
    return f"%json {json.dumps(whole, ensure_ascii=False)}"


def _raw(schema: Any, root: dict[str, Any], form: CallForm) -> str:
    """What an argument may be where a text is written as it is, and its end."""
    exact, texts = _options(schema, root, form)
    end = form.value_end
    rules = [f"({' | '.join(dict.fromkeys(exact))}) {_piece(end, form)}"] if exact else []
    # a text is in one piece with what ends it, of which the engine would read the beginning as the text's
    head = end[: min((end.index(each) for each, _ in form.tokens if each in end), default=len(end))]
    closing = "".join("\\n" if each == "\n" else re.escape(each) for each in head)
    body = rf"[^{re.escape(end.strip()[0])}\x00-\x08\x7f]"
    for least, most in texts:
        rules.append(f"{_pattern(f'{body}{{{least},{most}}}{closing}')} {_piece(end[len(head) :], form)}".rstrip())
    return " | ".join(rules)


def _options(schema: Any, root: dict[str, Any], form: CallForm) -> tuple[list[str], list[tuple[int, int | str]]]:
    """What an argument may be beside a text; and the least and the most characters of texts, "" for any number."""
    if not isinstance(schema, dict):
        return [], [(0, "")]
    kind, several = schema.get("type"), schema.get("anyOf") or schema.get("oneOf")
    if several or isinstance(kind, list):
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "type")}
        ways = [one if isinstance(one, dict) else {} for one in several] if several else [{"type": one} for one in kind or ()]
        found = [_options({**rest, **way}, root, form) for way in ways]
        return [one for exact, _ in found for one in exact], [one for _, texts in found for one in texts]
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        known = [each for each in values if _is(each, kind)]
        plain = [each if isinstance(each, str) else value_text(each) for each in known]
        pythons = [str(each) for each in known if each is None or isinstance(each, bool)]
        return [_text(each) for each in [*plain, *pythons]], []
    if kind == "boolean":  # templates in Python's way write True
        return ['"true"', '"false"', '"True"', '"False"'], []
    if kind == "null":
        return ['"null"', '"None"'], []
    if kind == "string" or (kind is None and "$ref" not in schema):
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        return [], [(least, most if most == "" else max(least, most))]
    return [_value(schema, root, form)], []


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of an enumeration is of the type, or one of the types, beside it."""
    if isinstance(kind, list):
        return any(_is(value, each) for each in kind)
    kinds: dict[Any, tuple[type, ...]] = {
        "string": (str,),
        "boolean": (bool,),
        "integer": (int,),
        "number": (int, float),
        "null": (type(None),),
    }
    if kind not in kinds:
        return True
    value = canonical(value)
    return isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _number(schema: dict[str, Any], decimals: int) -> str:
    smallest = Decimal(1).scaleb(-decimals)
    lows = [Decimal(str(schema["minimum"]))] if "minimum" in schema else []
    highs = [Decimal(str(schema["maximum"]))] if "maximum" in schema else []
    if "exclusiveMinimum" in schema:
        lows.append(_floor(schema["exclusiveMinimum"], decimals) + smallest)
    if "exclusiveMaximum" in schema:
        highs.append(-_floor(-schema["exclusiveMaximum"], decimals) - smallest)
    return numbers(max(lows, default=None), min(highs, default=None), decimals)


def _floor(value: float, decimals: int) -> Decimal:
    return Decimal(math.floor(Decimal(str(value)).scaleb(decimals))).scaleb(-decimals)


def _piece(text: str, form: CallForm) -> str:
    """A text as the engine reads it, to which a token of its own is no text."""
    if not form.tokens:
        return _text(text)
    ids = dict(form.tokens)
    parts = re.split("|".join(f"({re.escape(each)})" for each in sorted(ids, key=len, reverse=True)), text)
    return " ".join(f"<[{ids[part]}]>" if part in ids else _text(part) for part in parts if part)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(pattern: str) -> str:
    return "/" + pattern.replace("/", r"\/") + "/"


def refusal(error: str) -> str:
    """What the engine says is wrong with a schema, without the place in a grammar that nobody has seen."""
    what = re.sub(r"^at \d+\(\d+\): ", "", re.split(r"\n *\d+ \|", error)[0])
    return " ".join(what.split())[:200]

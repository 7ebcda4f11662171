"""Calls in the form of a chat template (:class:`shadowpeft.data.call_form.CallForm`), found in the text of an answer."""

from __future__ import annotations

from typing import Any

from shadowpeft.data.call_form import CallForm
from shadowpeft.data.calls import Answered, Call, CallParser, json_at, ordered
from shadowpeft.data.tools import DEFINITIONS, Tools
from shadowpeft.errors import ConfigError

_PYTHONS = {"True": True, "False": False, "None": None}
"""What templates write that show a value in Python's way."""


class TemplateCalls(CallParser):
    """A :class:`~shadowpeft.data.calls.CallParser` of a template's calls, before which words may stand.

    Nothing stands behind them, so a stream knows them once the answer has ended.
    """

    waits = True

    def __init__(self, tools: Tools, form: CallForm, offered: Tools | None = None) -> None:
        super().__init__(tools, offered)
        self.form, self.later = form, form.words

    def found(self, text: str) -> Answered | None:
        """The calls, if all of them are whole and valid, and nothing but white space stands behind them."""
        form, start = self.form, self._start(text)
        if start is None:
            return None
        at, calls = start + len(form.begin), list[Call]()
        while True:
            opening = text.find(form.opens, at)
            if opening < 0:
                return None
            name, at = text[at:opening], opening + len(form.opens)
            try:
                arguments, at = self._by_argument(name, text, at) if form.raw else json_at(text, at - 1)
                calls.append(ordered(Call(name, arguments), self.tools))
            except (ValueError, RecursionError, ConfigError):
                return None
            if form.between is None or not text.startswith(form.between, at):
                break
            at += len(form.between)
        end = form.end.rstrip()
        if not text.startswith(end, at) or text[at + len(end) :].strip():
            return None
        return Answered(tuple(calls), len(text), start=start)

    def _by_argument(self, name: str, text: str, at: int) -> tuple[dict[str, Any], int]:
        """Arguments that stand one by one, and where they end.

        Raises:
            ValueError: if one is not whole, or there twice.
        """
        form, arguments = self.form, dict[str, Any]()
        tool = self.tools.by_name.get(name)
        schemas, root = ({}, {}) if tool is None else (tool.properties, tool.parameters)
        while text.startswith(form.key_begin, at):
            at += len(form.key_begin)
            value = text.index(form.key_end, at)
            end = text.index(form.value_end, value)
            key = text[at:value]
            if key in arguments:
                raise ValueError(f"{key} is there twice")
            arguments[key] = _value(text[value + len(form.key_end) : end], schemas.get(key, {}), root)
            at = end + len(form.value_end)
        return arguments, at

    def _start(self, text: str) -> int | None:
        """Where the calls begin; None: nowhere yet."""
        if self.form.words:
            place = text.find(self.form.begin)
            return None if place < 0 else place
        blank = len(text) - len(text.lstrip())
        return blank if text.startswith(self.form.begin, blank) else None

    def words(self, text: str) -> int:
        begin, start = self.form.begin, self._start(text)
        if start is None:
            if not self.form.words:
                return 0 if begin.startswith(text.lstrip()) else len(text)
            start = len(text) - next(n for n in range(len(begin) - 1, -1, -1) if text.endswith(begin[:n]))
        return len(text[:start].rstrip())  # white space between words and calls is nobody's


def _value(text: str, schema: Any, root: dict[str, Any]) -> Any:
    """What an argument's text means: JSON, or a value in Python's way, if its schema takes that; else the text."""
    import jsonschema_rs

    if not isinstance(schema, dict) or schema.get("type") == "string":
        return text
    try:
        value, end = (_PYTHONS[text], len(text)) if text in _PYTHONS else json_at(text, 0)
    except (ValueError, RecursionError):
        return text
    if end != len(text):
        return text
    named = {key: root[key] for key in DEFINITIONS if key in root}
    takes = jsonschema_rs.validator_for({**named, **schema}).is_valid
    return value if takes(value) or not takes(text) else text

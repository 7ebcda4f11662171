"""Calls in the form of a chat template (:class:`shadowpeft.data.call_form.CallForm`), found in the text of an answer."""

from __future__ import annotations

from shadowpeft.data.call_form import CallForm
from shadowpeft.data.calls import Answered, Call, CallParser, json_at, ordered
from shadowpeft.data.tools import Tools
from shadowpeft.errors import ConfigError


class TemplateCalls(CallParser):
    """A :class:`~shadowpeft.data.calls.CallParser` of a template's calls, before which words may stand.

    Nothing stands behind them, so a stream knows them once the answer has ended.
    """

    waits = True

    def __init__(self, tools: Tools, form: CallForm, offered: Tools | None = None) -> None:
        super().__init__(tools, offered)
        self.form = form

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
            name = text[at:opening]
            try:
                arguments, at = json_at(text, opening + len(form.opens) - 1)
                calls.append(ordered(Call(name, arguments), self.tools))
            except (ValueError, RecursionError, ConfigError):
                return None
            if form.between is not None and text.startswith(form.between, at):
                at += len(form.between)
            else:
                break
        end = form.end.rstrip()
        if not text.startswith(end, at) or text[at + len(end) :].strip():
            return None
        return Answered(tuple(calls), len(text), start=start)

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

"""Requests whose right calls are known: tools of one's own with arguments, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shadowpeft.data.actions import REMOTE
from shadowpeft.data.call_form import COMPACT, CallForm
from shadowpeft.data.calls import Call, CallParser, answered, calls_of, only_calls, written
from shadowpeft.data.chat import read_file, with_system
from shadowpeft.data.sources import Source
from shadowpeft.data.tasks.base import Example, FileTask, mean
from shadowpeft.data.template_calls import TemplateCalls
from shadowpeft.data.tool_rows import with_tools
from shadowpeft.data.tools import Tools
from shadowpeft.errors import DataError

Calls = tuple[Call, ...]
INVALID = ""
"""The prediction of an answer that begins to call and makes no valid call."""


@dataclass(frozen=True)
class Judged:
    """One answer beside the right one."""

    exact: bool
    """Names, arguments and order are right; for a request that has no call, no call was made."""
    names: bool
    """All names are, in order."""
    arguments: tuple[int, int]
    """Of the right calls' arguments: how many are right, and how many there are. A call with another name has none right."""
    handed_on: bool
    """No call was made."""


def judge(given: Calls | None, right: Calls) -> Judged:
    """``given`` beside ``right``; None: the answer could not be read as calls."""
    own = given or ()
    exact = given is not None and own == right
    names = [call.name for call in own] == [call.name for call in right]
    good = total = 0
    for n, call in enumerate(right):
        found = own[n].arguments if n < len(own) and own[n].name == call.name else {}
        total += len(call.arguments)
        good += sum(found.get(key) == value for key, value in call.arguments.items())
    return Judged(exact, names, (good, total), given == ())


class Calling(FileTask):
    """The rows of a file: an answer is right if its calls are, with names, arguments and order; words are no call.

    The shadow path of a row that only the base path learns is right if it makes no call, since the router hands it on then.

    Args:
        file: its name, or another source. tools: what may be called. system: the system message of rows that bring none.
        max_new_tokens: longest answer in tokens. form: how calls are written; other than the compact one, the chat template is
            told of the tools.
        rows: checked rows (:mod:`shadowpeft.data.chat`) in place of those of the file.

    Raises:
        DataError: naming file and line, if the file is missing or empty, a row is malformed, or calls something else.
    """

    def __init__(
        self,
        file: str | Path | Source,
        tools: Tools,
        system: str | None = None,
        max_new_tokens: int = 96,
        form: CallForm = COMPACT,
        rows: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        self.name, self.max_new_tokens, self.system = str(file), max_new_tokens, system  # type: ignore[misc]
        self.tools, self.form = tools, form
        self._parser = CallParser(tools) if form is COMPACT else TemplateCalls(tools, form)
        self._rows = [self._learnt(row) for row in (read_file(file) if rows is None else rows)]

    def _learnt(self, row: dict[str, Any]) -> dict[str, Any]:
        where = getattr(row, "where", self.name)
        if row["messages"][-1]["role"] not in ("user", "tool"):
            raise DataError(f"{where} has no request before its answer; end its messages with the user's")
        row = with_tools(row, self.tools, compact=self.form is COMPACT)
        called = calls_of(row.get("answer", {}).get("tool_calls") or (), self.tools)
        base = written(called) if called else only_calls(row["response"], self.tools)
        own = base if row["shadow_response"] is None else only_calls(row["shadow_response"], self.tools)
        gold = {"base": base[1:-1], "shadow": REMOTE if row["path"] == "base" else own[1:-1]}
        return {"messages": row["messages"], "path": row["path"], "gold": gold}

    @property
    def settings(self) -> dict[str, Any]:
        return {"tools": self.tools.definitions(), "calls": "compact" if self.form is COMPACT else "template"}

    @property
    def told(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        return {} if self.form is COMPACT else {"tools": self.tools.definitions()}

    def lead(self, shots: int, seed: int) -> str:
        raise DataError(f"'{self.name}' has no form with worked examples; set shots to 0")

    def example(self, row: dict[str, Any], identity: str) -> Example:
        return Example(identity, row["messages"][-1]["content"], "", row["gold"]["base"], (), row)

    def for_path(self, examples: list[Example], path: str) -> list[Example]:
        """All rows for the shadow; for the base those that it learns."""
        asked = [replace(e, gold=e.meta["gold"][path]) for e in examples if path == "shadow" or e.meta["path"] != "shadow"]
        if not asked:
            raise DataError(f"'{self.name}' has no row for the {path} path; leave out the modes that answer with it")
        return asked

    def chat(self, example: Example) -> list[dict[str, str]]:
        return with_system(list(example.meta["messages"]), self.system)

    def parse(self, text: str) -> str | None:
        """The calls of an answer in their compact form, ``REMOTE``, None for words, or :data:`INVALID`."""
        found = self._parser(text)
        begins = text.lstrip().startswith("[") if self.form is COMPACT else self.form.mark in text
        return INVALID if found is None and begins else found

    def judged(self, prediction: str | None, example: Example) -> Judged:
        """A prediction beside the right calls."""
        return judge(None if prediction == INVALID else self._calls(prediction or REMOTE), self._calls(example.gold))

    def _calls(self, text: str) -> Calls:
        found = answered(f"[{text}]", self.tools)
        assert found is not None, text
        return found.calls

    def per_example(self, prediction: Any, example: Example) -> float:
        return float(self.judged(prediction, example).exact)

    def score(self, predictions: Sequence[Any], examples: Sequence[Example]) -> dict[str, float]:
        """``score``; over requests that call: ``calls`` and ``names`` (all right), ``arguments`` (share of them),
        ``calls_handed_on``; over the others ``no_call``; over all ``invalid``."""
        found = [(self.judged(p, e), e) for p, e in zip(predictions, examples, strict=True)]
        called = [j for j, e in found if e.gold != REMOTE]
        others = [float(j.handed_on) for j, e in found if e.gold == REMOTE]
        scores = {"score": mean([float(j.exact) for j, _ in found])}
        scores["invalid"] = mean([float(p == INVALID) for p in predictions])
        if called:
            scores["calls"] = mean([float(j.exact) for j in called])
            scores["names"] = mean([float(j.names) for j in called])
            good, total = map(sum, zip(*(j.arguments for j in called), strict=True))
            scores |= {"arguments": good / total} if total else {}
            scores["calls_handed_on"] = mean([float(j.handed_on) for j in called])
        return {**scores, "no_call": mean(others)} if others else scores

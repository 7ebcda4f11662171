"""What is odd about rows that can each be learnt: copies, contradictions, and actions that look like a misspelling of another.

Nothing here is refused: a copy may be meant, and so may two answers to one prompt. Whoever does not mean them wants to know.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from typing import Any

from shadowpeft.data.calls import answered
from shadowpeft.data.tools import Tools
from shadowpeft.messages import quote

_LEARNERS = {"both": ("base", "shadow"), "base": ("base",), "shadow": ("shadow",)}
_RARE = 5
"""A name is taken for a misspelling of one that this many times as many rows have."""
_ACTION = re.compile(r"\s*\[(?:(REMOTE)\]|(?!REMOTE\()([^\W\d][\w-]*)\(([^)\n]?))")


class Review:
    """Rows so far, of one part of the data or of several.

    Args:
        tools: what rows call; None: nothing that is known, so an answer's action is what it says.
    """

    def __init__(self, tools: Tools | None = None) -> None:
        self.tools = tools
        self._seen: dict[tuple[str, bytes], tuple[str, int, str]] = {}
        """Where a prompt first stood for a path, the hash of its answer and how that begins: rows may not fit into memory."""
        self.start_part()

    def start_part(self) -> None:
        """Begin to count anew; earlier rows stay what later ones are compared with."""
        self.repeated: list[str] = []
        self.contradicting: list[str] = []
        self.actions: Counter[str] = Counter(dict.fromkeys(self.tools.names, 0) if self.tools else {})
        self._first: dict[str, str] = {}
        self._unchecked: list[str] = []

    def add(self, row: dict[str, Any], where: str) -> None:
        """Take a checked row, as it is learnt, and where it stands."""
        asked = _digest(row)
        learnt = {path: _learnt(row, path) for path in _LEARNERS[row["path"]]}
        own = {path: (where, hash(said), quote(said, 60)) for path, said in learnt.items()}
        earlier = {path: self._seen.setdefault((path, asked), entry) for path, entry in own.items()}
        other = [(earlier[path], entry) for path, entry in own.items() if earlier[path][1] != entry[1]]
        if other:
            (first, _, said), (_, _, now) = other[0]
            self.contradicting.append(f"{where} has the prompt of {first} but another answer, {now} and not {said}")
        elif all(first != where for first, _, _ in earlier.values()):  # a packaged set may give one row several times
            self.repeated.append(f"{where} repeats {next(iter(earlier.values()))[0]}")
        for name in self._names(row, where):
            self.actions[name] += 1
            self._first.setdefault(name, where)

    def _names(self, row: dict[str, Any], where: str) -> list[str]:
        """The actions of a row's answer, each once."""
        if "label" in row:
            return []
        if "tool_calls" in row.get("answer", {}):
            functions = [call.get("function", call) for call in row["answer"]["tool_calls"]]
            return [*dict.fromkeys(str(each["name"]) for each in functions if isinstance(each, dict) and "name" in each)]
        text = _learnt(row, _LEARNERS[row["path"]][-1])
        if self.tools is not None and (calls := answered(text, self.tools)) is not None:
            return [*dict.fromkeys(call.name for call in calls.calls)] or ["REMOTE"]
        match = _ACTION.match(text)
        if match is None:
            return []
        if match[3]:
            self._unchecked.append(f"{where} calls {match[2]} with arguments")
        return [match[1] or match[2]]

    def misspelt(self) -> list[str]:
        """Of each action of few rows that is written almost as one of many: where it stands, and which is meant perhaps."""
        told = []
        for name, rows in self.actions.items():
            for often, many in self.actions.most_common():
                if rows and many >= _RARE * rows and _alike(name, often):
                    more = f" and {rows - 1} more" if rows > 1 else ""
                    told.append(f"{self._first[name]}{more} has the action {name}; did you mean {often}? ({many} rows)")
                    break
        return told

    def unchecked(self) -> list[str]:
        """What calls with arguments, where no tools are named that would check them."""
        return self._unchecked if self.tools is None else []


def _digest(row: dict[str, Any]) -> bytes:
    """What is asked, in little space. Texts that differ in white space alone are one, as in ``route calibrate``."""
    turns = [{"content": row["text"]}] if "label" in row else row["messages"]
    asked = [{**turn, "content": " ".join(turn["content"].split())} for turn in turns]
    text = json.dumps([asked, row.get("tools")], sort_keys=True, default=str)  # a cell of parquet may be a date
    return hashlib.sha256(text.encode()).digest()[:16]


def _learnt(row: dict[str, Any], path: str) -> str:
    """What a path learns to say."""
    if "label" in row:
        return str(row["label"])
    if path == "shadow" and row["shadow_response"] is not None:
        return str(row["shadow_response"])
    beside = row.get("answer")
    return str(row["response"]) + (json.dumps(beside, sort_keys=True, ensure_ascii=False, default=str) if beside else "")


def _alike(name: str, other: str) -> bool:
    """Whether one slip is between two names: a letter more, less, another or exchanged. Other numbers make other names."""
    one, two = (re.sub(r"[_-]", "", each).lower() for each in (name, other))
    if name == other or re.sub(r"\D", "", one) != re.sub(r"\D", "", two):
        return False
    return difflib.SequenceMatcher(None, one, two).ratio() >= min(0.9, 1 - 1 / max(len(one), len(two), 2)) - 1e-9

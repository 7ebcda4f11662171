"""Robot-tools data: 20 actions with arguments, in English and Chinese (see CARD.md).

A row has a prompt, the calls that answer it (none: the device hands the request on), and a short reply. The rows are files of
this package; ``python -m scripts.robot_tools`` in the repository writes them from hand-written phrasings.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from shadowpeft.data.calls import Call
from shadowpeft.data.robot import SKILLS, SYSTEM, read_split
from shadowpeft.data.tools import Tools, named, read_tools

__all__ = ["SPLITS", "SYSTEM", "calls_of_row", "chat_row", "load", "tools", "tools_named"]

ROWS = Path(__file__).parent / "rows"
ACTIONS = Path(__file__).parent / "actions.json"
SPLITS = ("train", "train_more", "validation", "test")
SETS = {"robot_tools": ("train",), "robot_tools_large": ("train", "train_more")}
"""A packaged set, as run files name it -> the splits that it trains on. They share the held-out splits."""


@cache
def tools() -> Tools:
    """The 20 actions; needs the extra ``tools``, so not at import."""
    return read_tools(ACTIONS)


def load(split: str) -> list[dict[str, Any]]:
    """The rows of one split: dicts with id, split, lang, kind (one, two, cloud), family, prompt, calls and reply."""
    return read_split(ROWS, split, SPLITS)


def load_set(name: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a packaged set in :data:`SETS`."""
    return [row for each in (SETS[name] if split == "train" else (split,)) for row in load(each)]


def calls_of_row(row: dict[str, Any]) -> tuple[Call, ...]:
    """The calls that answer a row."""
    return tuple(Call(call["name"], call["arguments"]) for call in row["calls"])


def chat_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a chat in OpenAI's form; the shadow hands on what has no call."""
    calls = [call.openai(f"call_{n}") for n, call in enumerate(calls_of_row(row), 1)]
    answer = {"role": "assistant", "content": row["reply"], **({"tool_calls": calls} if calls else {})}
    handed_on = {} if calls else {"shadow_response": "[REMOTE]"}
    return {"messages": [{"role": "user", "content": row["prompt"]}, answer], **handed_on}


def tools_named(source: str) -> Tools:
    """The actions that ``--skills`` names: those of a packaged set for ``robot`` and ``robot_tools``, or those of a file.

    Raises:
        ConfigError: see :func:`shadowpeft.data.tools.read_tools`.
    """
    if source == "robot":
        return named(SKILLS)
    return tools() if source == "robot_tools" else read_tools(source)

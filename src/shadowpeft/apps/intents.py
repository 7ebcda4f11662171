"""Requests whose right answer is known, for ``shadowpeft route calibrate`` and ``eval --skills``."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shadowpeft.apps.source import is_mapping, source_named
from shadowpeft.data import robot_tools
from shadowpeft.data.actions import REMOTE, only_action
from shadowpeft.data.calls import only_calls, written
from shadowpeft.data.chat_rows import check_row, read_file, without_null
from shadowpeft.data.forms import missing
from shadowpeft.data.robot import SETS, SKILLS, load
from shadowpeft.data.sources import rows_of
from shadowpeft.data.tools import Tools, named
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.messages import shorten

_ASKED: dict[str, tuple[str, ...]] = {
    "fit": ("calibration_normal", "calibration_remote"),
    "check": ("test_normal", "test_remote_large"),
}
ROBOT: dict[str, dict[str, tuple[str, ...]]] = {
    "robot": _ASKED,
    "robot_large": _ASKED,
    "robot_oos": {
        "fit": ("calibration_normal", "calibration_remote", "calibration_oos"),
        "check": ("test_normal", "test_remote_large", "test_oos"),
    },
}
"""A packaged set of intents, and the splits of each part. Validation rows are in none: they have chosen settings."""
ROBOT_TOOLS = {"fit": "validation", "check": "test"}


def read_intents(
    source: str,
    part: str,
    limit: int | None,
    skills: tuple[str, ...] | None = None,
    tools: Tools | None = None,
    *,
    whole_chats: bool = False,
) -> list[dict[str, Any]]:
    """Rows with ``prompt``, ``skill`` (``REMOTE`` for requests that no skill fits) and ``where`` they stand: a packaged set, or
    another source (:func:`shadowpeft.apps.source.source_named`).

    Args:
        skills: what ``skill`` may be, besides ``REMOTE``; None: a skill of the packaged set.
        tools: actions with arguments. Rows are chats then, and ``skill`` is the calls of their answers, in one form.
        whole_chats: a row to train on may have more than one message; the last user message is the request.

    Raises:
        ConfigError: if a packaged set is asked for and ``skills`` lack some of its.
        DataError: naming the file and line of a row that has something else.
    """
    rows: list[dict[str, Any]]
    if tools is not None:
        rows = _calling(source, part, tools)
    elif source in ROBOT and not set(SKILLS) <= set(skills or SKILLS):
        raise ConfigError(
            f"'{source}' has the packaged skills but --skills names others; pass rows of your own with --data FILE "
            "(and --check)"
        )
    elif source in ROBOT:
        rows = [{**row, "where": f"{source}, row {row['id']}"} for split in ROBOT[source][part] for row in load(split)]
    else:
        if not is_mapping(source) and not Path(source).is_file():
            raise DataError(f"{missing(Path(source))}, or write robot for the packaged set")
        known = {*(skills or SKILLS), REMOTE}
        found = rows_of(source_named(source, intents=True))
        rows = [_checked(row, where, known, whole_chats) for where, row in found]
        if not rows:
            raise DataError(f"data '{source}' holds no rows; give it some requests and their actions")
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]
    return rows


def rows_to_learn(source: str, skills: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    """The rows of a packaged set, or of a file, that a device learns its actions from; form and errors of
    :func:`read_intents`. The request of a longer chat is its last user message."""
    if source not in ROBOT or not set(SKILLS) <= set(skills or SKILLS):
        return read_intents(source, "fit", None, skills, whole_chats=True)
    return [{**row, "where": f"{source}, row {row['id']}"} for split in SETS[source] for row in load(split)]


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each prompt once, the first of its copies with how often it came as ``times``. Prompts that differ in white
    space alone are copies.

    Raises:
        DataError: if copies have different skills, so that nobody knows what is right.
    """
    times = Counter(_said(row) for row in rows)
    first = {_said(row): row for row in reversed(rows)}
    differing = [row for row in rows if row["skill"] != first[_said(row)]["skill"]]
    if differing:
        row, other = differing[0], first[_said(differing[0])]
        more = f", and {len(differing) - 1} more rows contradict an earlier one" if len(differing) > 1 else ""
        raise DataError(
            f"{other['where']} and {row['where']} have the same request ({shorten(row['prompt'], 60)!r}) but other right "
            f"answers, {other['skill']} and {row['skill']}{more}; keep one of them"
        )
    return [{**first[said], "times": n} for said, n in times.items()]


def without_prompts_of(
    rows: list[dict[str, Any]], others: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], tuple[dict[str, Any], dict[str, Any]] | None]:
    """The rows whose prompt none of ``others`` has (prompts that differ in white space alone are the same), and the first row
    and other with the same prompt but another skill.
    """
    elsewhere = {_said(row): row for row in others}
    differing = ((row, elsewhere[_said(row)]) for row in rows if _said(row) in elsewhere)
    first = next(((row, other) for row, other in differing if row["skill"] != other["skill"]), None)
    return [row for row in rows if _said(row) not in elsewhere], first


def _said(row: dict[str, Any]) -> str:
    return " ".join(row["prompt"].split())


def _checked(row: Any, where: str, known: set[str], whole_chats: bool) -> dict[str, Any]:
    row = without_null(row)  # an empty cell of a table
    if isinstance(row, dict) and "skill" not in row and ("messages" in row or "response" in row):
        row = _of_chat(check_row(row, where), named(known - {REMOTE}), where, whole_chats)
    good = isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("skill"), str)
    if not good:
        raise DataError(f"{where} must have the strings 'prompt' and 'skill', or be a row to train on (docs/data.md)")
    if row["skill"] not in known:
        raise DataError(
            f"{where} has the skill {row['skill']!r}, which is none of the {len(known) - 1} known ones and not {REMOTE}; "
            "correct it, or name skills of your own with --skills FILE"
        )
    return {**row, "where": where}


def _calling(source: str, part: str, tools: Tools) -> list[dict[str, Any]]:
    """Rows with the calls that answer them; ``REMOTE`` for none. A row's last user message is the request."""
    if source in ROBOT:
        raise ConfigError(
            f"'{source}' has actions without arguments but --skills has some; pass --data FILE, or robot_tools"
        )
    if source == "robot_tools":
        lack = tools.lack(robot_tools.tools())
        if lack is not None:
            raise ConfigError(
                f"'robot_tools' calls '{lack}', which --skills lacks; pass rows of your own with --data FILE"
            )
        packaged = robot_tools.load(ROBOT_TOOLS[part])
        return [
            {
                "prompt": row["prompt"],
                "skill": written(robot_tools.calls_of_row(row))[1:-1],
                "where": f"robot_tools, row {row['id']}",
            }
            for row in packaged
        ]
    return [_of_chat(row, tools, getattr(row, "where", source)) for row in read_file(source_named(source))]


def _of_chat(row: dict[str, Any], tools: Tools, where: str, whole_chats: bool = False) -> dict[str, Any]:
    """The request of a checked row, and the action or calls that the device would learn of it."""
    from shadowpeft.train.rows import told  # torch, which a command's --help does not need

    messages = row["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked if whole_chats else [message["role"] for message in messages] != ["user"]:
        raise DataError(f"{where} has {len(messages)} messages before its answer but must have one, the user's; shorten it")
    plain = tools.plain and "answer" not in row
    row = told(row, actions=True, tools=None if plain else tools, compact=True)
    learnt = row["shadow_response"] or row["response"]
    skill = REMOTE if row["path"] == "base" else (only_action(learnt) if plain else only_calls(learnt, tools))[1:-1]
    skill = skill.removesuffix("()") if tools.plain else skill
    return {"prompt": asked[-1], "skill": skill, "where": where}

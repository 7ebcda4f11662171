"""The rows of a fine-tuning run, as sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from shadowpeft.data import chat, robot_tools
from shadowpeft.data.actions import only_action
from shadowpeft.data.calls import only_calls
from shadowpeft.data.forms import OWN, forms_of
from shadowpeft.data.robot import SYSTEM as ROBOT_SYSTEM
from shadowpeft.data.robot import load as load_robot
from shadowpeft.data.tool_rows import with_tools, writes_calls
from shadowpeft.data.tools import Tools, read_tools
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.train.config import PACKAGED, RunConfig, TrainingSection

ROBOT_REMOTE_REPEATS = 10

def robot_rows(split: str, *, actions: bool = False) -> list[dict[str, Any]]:
    """Rows of the packaged robot set in the form of :mod:`shadowpeft.data.chat`.

    ``train`` joins the three training parts: skill commands for both paths, open-domain answers for the base path, open-domain
    requests answered ``[REMOTE]`` for the shadow path (the paper, Appendix F). The last are only 47, so they are repeated
    ``ROBOT_REMOTE_REPEATS`` times: they cost almost nothing, and a shadow that never learns to defer executes questions. With
    ``actions`` they are not: there the shadow path learns the 1,000 open requests of the base path too, as ``[REMOTE]``.
    """
    own: dict[str, dict[str, str]] = {
        "train_remote_base": {} if actions else {"path": "base"},  # words are no action, so [REMOTE] is learnt of them
        "train_remote_shadow": {"path": "shadow"},
    }
    repeats = {} if actions else {"train_remote_shadow": ROBOT_REMOTE_REPEATS}
    names = {
        "train": ["train_normal", "train_remote_base", "train_remote_shadow"],
        "validation": ["validation_normal"],
    }.get(split, [split])
    return [
        chat.check_row({"prompt": row["prompt"], "response": row["response"], **own.get(name, {})}, row["id"])
        for name in names
        for row in load_robot(name) * repeats.get(name, 1)
    ]


def packaged(source: str | None) -> bool:
    """Whether ``source`` names a packaged set."""
    return source in PACKAGED


def tools_of_run(train: str, file: str | None) -> Tools | None:
    """The tools that a run's rows call: those of ``file``, of the packaged set ``robot_tools``, or None."""
    if train == "robot_tools":
        return robot_tools.TOOLS
    return None if file is None else read_tools(file)


def read_rows(
    source: str, split: str, *, actions: bool = False, tools: Tools | None = None, compact: bool = True
) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of a packaged set (:data:`PACKAGED`); with ``actions`` the shadow path learns actions alone.

    Args:
        tools, compact: what the rows call, and how that is written (:func:`shadowpeft.data.tool_rows.with_tools`).

    Raises:
        DataError: naming file and line, if a row is malformed, calls what is no tool, or has a tool call in the template's form
            where actions are learnt.
    """
    if source == "robot_tools":
        rows = [chat.check_row(robot_tools.chat_row(row), row["id"]) for row in robot_tools.load(split)]
    else:
        rows = robot_rows(split, actions=actions) if source == "robot" else chat.read_file(source)
    if tools is not None:
        rows = [with_tools(row, tools, compact=compact) for row in rows]
    return [with_action(row, tools) for row in rows] if actions else rows


def with_action(row: dict[str, Any], tools: Tools | None = None) -> dict[str, Any]:
    """The row with nothing but the action, or the calls of ``tools``, in the shadow path's answer."""
    if row["path"] == "base":
        return row
    if "tool_calls" in row.get("answer", {}):
        where = getattr(row, "where", "") or "a row"
        raise DataError(
            f"{where} has 'tool_calls' but data.shadow_answers is 'action', which reads actions such as [Sit()] from the text; "
            "name the tools with data.tools, write them so, or set it to 'whole'"
        )
    key = "response" if row["path"] == "shadow" else "shadow_response"
    text = row["shadow_response"] or row["response"]
    row[key] = only_action(text) if tools is None else only_calls(text, tools)
    return row


def encode_run(
    run: RunConfig, tokenizer: Any, warn: Callable[[str], None]
) -> tuple[list[chat.Sequence], list[chat.Sequence] | None, dict[str, Any]]:
    """Training and validation sequences, and the record of the data: source, rows that are used, rows that are left out, and
    fingerprint. ``warn`` is told of rows that are left out.
    """
    system = run.data.system if run.data.system is not None else (ROBOT_SYSTEM if packaged(run.data.train) else None)
    options: dict[str, Any] = {"max_length": run.data.max_length, "too_long": run.data.too_long, "system": system}
    validation = run.data.validation or (run.data.train if packaged(run.data.train) else None)
    tools = tools_of_run(run.data.train, run.data.tools)
    compact = tools is None or not writes_calls(tokenizer)
    encoded: dict[str, chat.Encoded] = {}
    record: dict[str, Any] = {}
    for part, source in (("train", run.data.train), ("validation", validation)):
        if source is not None:
            rows = read_rows(source, part, actions=run.data.learns_actions, tools=tools, compact=compact)
            encoded[part] = chat.encode(rows, tokenizer, **options)
            record[part] = {"source": source, **encoded[part].record(), "sha256": chat.rows_digest(rows)}
            if not packaged(source) and set(forms := forms_of(rows)) - set(OWN):
                record[part]["forms"] = forms
                warn(f"data.{part}: " + ", ".join(f"{count} rows of the form {name}" for name, count in forms.items()))
            if encoded[part].skipped is not None:
                warn(f"data.{part}: {encoded[part].skipped}")
    training = encoded["train"]
    again = [s.alone() for s in training if s.shadow]
    return training + again * run.data.shadow_repeats, encoded.get("validation"), record


def shadow_first(
    training: list[chat.Sequence], t: TrainingSection, batch: int
) -> tuple[chat.ChatDataset, int | None, int]:
    """The rows of a whole run whose ``shadow_epochs`` come before both paths train, its number of steps (None: by epochs), and
    how many of these are the shadow's alone.

    Args:
        batch: sequences of a step, over all processes.

    Raises:
        ConfigError: if ``max_steps`` ends the run before both paths train.
    """
    if not t.shadow_epochs:
        return chat.ChatDataset(training), t.max_steps, 0
    alone = [s.alone() for s in training if s.shadow]
    if not alone:
        raise ConfigError("training.shadow_epochs is set but the shadow path learns no row of data.train; remove it")
    before = len(alone) * t.shadow_epochs
    steps = t.max_steps or math.ceil((before + (t.epochs or 1.0) * len(training)) / batch)
    if steps * batch <= before:
        raise ConfigError(
            f"training.max_steps is {steps} but {t.shadow_epochs} epochs of the shadow alone take {math.ceil(before / batch)} "
            "steps; raise it or lower training.shadow_epochs"
        )
    times = math.ceil((steps * batch - before) / len(training))
    parts = [len(alone)] * t.shadow_epochs + [len(training)] * times
    return chat.ChatDataset(alone * t.shadow_epochs + training * times, parts), steps, before // batch

"""Chat rows with tool calls as a model's chat template writes them; where it writes none, in the compact form of
:mod:`shadowpeft.data.calls`.

In the compact form the tools do not stand in the prompt: the model knows them from training. So they are named once for all
rows, and every call of a row is checked against them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from shadowpeft.chat_template import render, render_prompt
from shadowpeft.data.calls import calls_of, written
from shadowpeft.data.chat_rows import ChatRow
from shadowpeft.data.tools import Tools, tools_of
from shadowpeft.data.writable import Writable
from shadowpeft.errors import ConfigError, DataError


def writes_calls(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes the calls of an answer."""
    turn: dict[str, Any] = {"role": "user", "content": "a"}
    function = {"name": "probe", "arguments": {}}
    call = {"id": "call_1", "type": "function", "function": function}
    answer = {"role": "assistant", "content": "b"}
    tools = [
        {
            "type": "function",
            "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    render_prompt(tokenizer, [turn])  # a tokenizer without a template says so here
    try:
        whole = render(tokenizer, [turn, {**answer, "tool_calls": [call]}], tools=tools)
    except (DataError, TypeError):
        return True  # it looks at them, and wants another form
    return whole != render(tokenizer, [turn, answer], tools=tools)


def compact_messages(
    messages: list[dict[str, Any]], tools: Tools, where: str, *, strict: bool = True
) -> list[dict[str, Any]]:
    """Messages whose calls are text, as a template that knows none can write them.

    Args:
        strict: each call is a valid one of ``tools``.

    Raises:
        DataError: starting with ``where``, if a message calls no known tool, or with arguments that its schema refuses.
    """
    return [_compact(message, tools, f"{where}: message {n}", strict) for n, message in enumerate(messages, 1)]


def _compact(message: dict[str, Any], tools: Tools, where: str, strict: bool) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    try:
        calls = written(calls_of(message["tool_calls"], tools, strict=strict))
    except ConfigError as error:
        raise DataError(f"{where} {error}; correct it, or name the tool among the run's tools") from error
    words = message.get("content") or ""
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": f"{calls} {words}" if words else calls}


def with_tools(row: dict[str, Any], tools: Tools, *, compact: bool) -> dict[str, Any]:
    """A checked row that calls ``tools``: all of its calls valid, and in the compact form if the template writes none.

    Args:
        compact: see :func:`writes_calls`. Otherwise a row that brings no tools gets these, for the template.

    Raises:
        ConfigError: naming what holds ``tools``, if a device could not write calls of one.
        DataError: naming file and line, if the row has another tool, or a call that is not valid.
    """
    where = getattr(row, "where", "") or "a row"
    try:
        other = tools.lack(tools_of(row["tools"], where)) if "tools" in row else None
    except ConfigError as error:
        raise DataError(str(error)) from error
    if other is not None:
        raise DataError(
            f"{where} has the tool '{other}', which is none of the run's tools, or has other arguments there; add it"
        )
    answer = {"role": "assistant", "content": row["response"], **row.get("answer", {})}
    *history, last = compact_messages([*row["messages"], answer], tools, where)
    if not compact:
        row.setdefault("tools", tools.definitions())
        return row
    made = ChatRow({key: value for key, value in row.items() if key not in ("tools", "answer")})
    made.update(messages=history, response=last["content"])
    beside = {key: value for key, value in row.get("answer", {}).items() if key != "tool_calls"}
    if beside:
        made["answer"] = beside
    made.where, made.form = getattr(row, "where", ""), getattr(row, "form", "")
    grammar = _grammar(tools)  # a schema that no call can be held to is no fault of a row
    for key in ("response", "shadow_response"):
        if made[key]:
            try:
                found = grammar.read(made[key])
            except ConfigError as error:
                raise DataError(f"{where} {error}; correct it") from error
            if found is not None:  # in its one form
                made[key] = f"[{found.text}]{made[key][found.end :]}"
    return made


@lru_cache(maxsize=4)
def _grammar(tools: Tools) -> Writable:
    return Writable(tools)

"""Chat rows of a file, checked: everything in a row is used, or refused by name with file and line.

A row is ``{"messages": [...]}`` or ``{"prompt": ..., "response": ...}``, or has another form of :mod:`shadowpeft.data.forms`.
The last message is the answer. Optional keys:
``"tools"`` (what the chat template writes them for), ``"shadow_response"`` and ``"path"`` ("both", "base", "shadow"), see
:mod:`shadowpeft.data.chat`. A message may have ``"tool_calls"`` and what a model has thought beside its content. ``null`` means
absent. Keys of a row that say nothing of training, such as an id, are left alone.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shadowpeft.data.forms import MESSAGE_KEYS, WRITTEN, normal, rows_in
from shadowpeft.data.sources import Source, rows_of
from shadowpeft.data.tools import said_arguments
from shadowpeft.errors import DataError
from shadowpeft.json_text import parse_json
from shadowpeft.messages import did_you_mean, quote

PATHS = ("both", "base", "shadow")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Who may speak: the roles that chat templates write; the last three are names of ``tool``."""
_KEYS = ("messages", "prompt", "response", "shadow_response", "path", "tools")
_FOREIGN = ("completion", "instruction", "input", "output", "conversations", "system", "history")
_UNUSED = (
    "weight",
    "system",
    "history",
    "completion",
    "conversations",
    "chat_template_kwargs",
    "functions",
    "function_call",
    "images",
    "audios",
    "videos",
)
"""Keys by which other trainers are told something that this one would not do."""


_NAMING = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords of JSON schema whose keys are names."""


class ChatRow(dict[str, Any]):
    """A row in normal form: ``messages``, ``response``, ``shadow_response``, ``path``; and, where there are any, ``tools`` and
    ``answer``, what the answer has beside its text."""

    where = ""
    """File and line."""
    form = ""
    """The keys by which it was recognised (:mod:`shadowpeft.data.forms`)."""


def read_file(path: str | Path | Source) -> list[dict[str, Any]]:
    """Rows of a file, or of another source, each a checked chat row; see :func:`shadowpeft.data.forms.rows_in` for the kinds of
    file.

    Raises:
        DataError: naming file and place, if the file is missing or empty or a row is malformed.
    """
    found = rows_of(path) if isinstance(path, Source) else rows_in(path)
    rows = [check_row(row, where) for where, row in found]
    if not rows:
        raise DataError(f"data file '{path}' holds no rows; each line must be one JSON object")
    return rows


read_jsonl = read_file
"""The name of earlier releases."""


def check_row(row: Any, where: str, *, every_turn: bool = False) -> dict[str, Any]:
    """A row in normal form, a :class:`ChatRow`.

    Args:
        every_turn: whether earlier answers are learnt too; then they may have a ``weight``, and one of 0 stays in its message.

    Raises:
        DataError: starting with ``where``, if something is missing, of the wrong type, or asks for what training does not do.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__} but must be an object")
    empty = [key for key in ("prompt", "response") if key in row and row[key] is None]
    row = without_null(row)
    for key in row:
        meant = str(key).strip().lower()
        if meant != key and meant not in row and meant in (*_KEYS, *_FOREIGN):
            raise DataError(f"{where} has the key {quote(key)}; did you mean '{meant}'? Rename it, or leave it out")
    row, form = normal(row, where)
    for key in row:
        if key not in _KEYS and difflib.get_close_matches(key, ["shadow_response"], n=1, cutoff=0.85):
            raise DataError(f"{where} has the key '{key}'; did you mean 'shadow_response'?")
        if (problem := _unused(key, row)) is not None:
            raise DataError(f"{where} {problem}")
    if "messages" in row and ("prompt" in row or "response" in row):
        raise DataError(f"{where} has 'messages' and also 'prompt' or 'response'; keep one form")
    beside: dict[str, Any] = {}
    if "messages" in row:
        *history, answer = _check_messages(row["messages"], where, every_turn)
        response, beside = answer["content"], {key: answer[key] for key in WRITTEN if key in answer}
    elif "prompt" in row and "response" in row:
        if not isinstance(row["prompt"], str) or not isinstance(row["response"], str):
            raise DataError(f"{where}: 'prompt' and 'response' must be strings")
        history, response = [{"role": "user", "content": row["prompt"]}], row["response"]
    elif "text" in row and "label" in row:
        raise DataError(
            f"{where} has 'text' and 'label', which a classifier learns from; give a run file with task_type: SEQ_CLS (data "
            "check of the rows alone: --task-type SEQ_CLS), or rows of a form of docs/data.md"
        )
    elif empty:
        raise DataError(f"{where} has nothing as '{empty[0]}'; write it, or leave the row out")
    else:
        raise DataError(
            f"{where} has {named_keys(row)} but needs 'messages', or 'prompt' and 'response', or a form of docs/data.md; "
            f"{renamed('prompt', 'response')}"
        )
    _check_asked(history, where, every_turn)
    shadow, path = row.get("shadow_response"), row.get("path", "both")
    if shadow is not None and not isinstance(shadow, str):
        raise DataError(f"{where}: 'shadow_response' must be a string")
    if path not in PATHS:
        raise DataError(f"{where}: 'path' is {path!r} but must be one of {', '.join(PATHS)}")
    if shadow is not None and path != "both":
        raise DataError(f"{where}: 'shadow_response' with path '{path}' contradicts itself; leave one out")
    checked = ChatRow(messages=history, response=response, shadow_response=shadow, path=path)
    if beside:
        checked["answer"] = beside
    if tools := _tools(row.get("tools", []), where):
        checked["tools"] = tools
        properties = _properties(tools)
        for message in (*history, beside):
            if "tool_calls" in message:
                message["tool_calls"] = [_without_absent(call, properties) for call in message["tool_calls"]]
    checked.where, checked.form = where, form
    return checked


def named_keys(row: dict[str, Any], most: int = 12) -> str:
    """The keys that a row has, in words."""
    rest = f" and {len(row) - most} more" if len(row) > most else ""
    return f"the key{'s' * (len(row) > 1)} {', '.join(map(quote, list(row)[:most]))}{rest}" if row else "no key"


def renamed(*ours: str) -> str:
    """What to do about columns of other names."""
    names = ", ".join(f"{name}: YOUR_NAME" for name in ours)
    return (
        f"rename them, or write {{path: FILE, columns: {{{names}}}}} in the place of the file (as data.train of a run file; "
        "data check, eval and data answer take it too)"
    )


def _check_asked(history: list[dict[str, Any]], where: str, every_turn: bool) -> None:
    """Whether the user's messages that are answered say something: an answer to nothing is what a model then says to anything.

    Raises:
        DataError: starting with ``where``, if not.
    """
    for number, message in enumerate(history, 1):
        if message["role"] != "user" or message["content"].strip():
            continue
        after = history[number] if number < len(history) else None
        if after is None or (every_turn and after["role"] == "assistant" and after.get("weight") != 0):
            which = "has an empty prompt" if len(history) == 1 else f"has an empty message {number}, which is answered"
            raise DataError(f"{where} {which}; write what is asked, or leave the row out")


def _tools(given: Any, where: str) -> list[dict[str, Any]]:
    """The tools of a row, which may stand there as JSON text."""
    if isinstance(given, str):
        try:
            given = without_null(parse_json(given or "[]"))
        except ValueError as error:
            raise DataError(f"{where}: 'tools' is a text and no JSON ({error}); give a list of objects") from error
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise DataError(f"{where}: 'tools' must be a list of objects")
    return given


def _properties(tools: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The arguments of each tool, by its name; what is not written so is refused by whoever writes it into a prompt."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        name, schema = (function.get("name"), function.get("parameters")) if isinstance(function, dict) else (None, None)
        properties = schema.get("properties", {}) if isinstance(schema, dict) else None
        if isinstance(name, str) and isinstance(properties, dict):
            found[name] = properties
    return found


def _without_absent(call: dict[str, Any], properties: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A call without the null arguments that its tool does not have, or not as null; as it is if its tool is unknown."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _without_absent(call["function"], properties)}
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(arguments, dict) or not isinstance(name, str) or name not in properties:
        return call
    return {**call, "arguments": said_arguments(arguments, properties[name])}


def _unused(key: str, row: dict[str, Any]) -> str | None:
    """What is wrong with a key by which other trainers are told something that this one would not do; None: nothing."""
    value, pair = row[key], row.keys() >= {"prompt", "response"}
    if key in ("chosen", "rejected"):
        learnt = "as the last message" if "messages" in row else "as 'response'"
        return f"has the key '{key}', which is a preference; write the answer to learn {learnt}, and leave the other out"
    if key == "label" and pair and (value is False or value in ("False", "false")):
        return "says by 'label' that its answer is bad, but every answer is learnt; leave the row out"
    if key == "input" and pair and value:
        return (
            "has the key 'input', which is read beside 'instruction' and 'output' alone; name the columns so "
            "(data.train.columns), or leave it out"
        )
    if key in _UNUSED and (value or key != "chat_template_kwargs"):
        return f"has the key '{key}', which training does not use; leave it out"
    return None


def _check_messages(messages: Any, where: str, every_turn: bool) -> list[dict[str, Any]]:
    """The messages without their weights (but for an answer's of 0, with ``every_turn``); the last one is the assistant's."""
    wrong = DataError(f"{where}: 'messages' must be a list of objects with string 'role' and 'content'")
    if not isinstance(messages, list) or not messages:
        raise wrong
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise wrong
        for key in message:
            if key not in MESSAGE_KEYS:
                raise DataError(
                    f"{where}: message {number} has the key {quote(key)}, which nothing reads; known are "
                    f"{', '.join(MESSAGE_KEYS)}"
                )
        calls, last = message.get("tool_calls"), number == len(messages)
        if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
            raise DataError(f"{where}: 'tool_calls' of message {number} must be a list of objects")
        message = {"content": "", **message} if calls else message
        message = {**message, "content": joined(message["content"])} if "content" in message else message
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise wrong
        if message["role"] not in ROLES:
            role = message["role"]
            raise DataError(
                f"{where}: message {number} has the role {quote(role)}{did_you_mean(role.lower(), list(ROLES))}; known are "
                f"{', '.join(ROLES)}"
            )
        weight = message.get("weight", 1 if last else 0)
        if type(weight) not in (int, float) or (last and weight != 1):
            raise DataError(
                f"{where}: the answer has weight {weight!r} but is learned with weight 1; leave the row out"
            )
        answers = every_turn and message["role"] == "assistant"
        if answers and weight not in (0, 1):
            raise DataError(f"{where}: message {number} has weight {weight!r} but is learnt with weight 1 or 0")
        if not last and weight != 0 and not answers:
            raise DataError(
                f"{where}: message {number} has weight {weight!r} but only the last answer is learned; make it the end of a "
                "row of its own"
            )
        unlearnt = answers and message.get("weight") == 0
        checked.append({k: v for k, v in message.items() if (k != "weight" or unlearnt) and v != []})
    if checked[-1]["role"] != "assistant" or len(checked) < 2:
        raise DataError(f"{where}: 'messages' must end with an 'assistant' message after at least one other")
    return checked


def joined(content: Any) -> Any:
    """A content in parts, as OpenAI's API has them, as one text; what has a part of another kind stays as it is. How long a
    provider may keep a part, ``cache_control``, says nothing of its text.
    """
    if not isinstance(content, list) or not content:
        return content
    known = {"type", "text", "cache_control"}
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text" and part.keys() <= known]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "\n".join(texts) if len(texts) == len(content) else content


def without_null(value: Any) -> Any:
    """``value`` without the keys that are null, at any depth: a table has every key in every row.

    In the arguments of a call null may mean something; :mod:`shadowpeft.data.calls` knows where it does not.
    """
    if isinstance(value, dict):
        special: dict[str, Any] = {"arguments": lambda each: each, "parameters": _schema}
        return {key: special.get(key, without_null)(each) for key, each in value.items() if each is not None}
    return [without_null(each) for each in value] if isinstance(value, list) else value


def _schema(value: Any, names: bool = False) -> Any:
    """A JSON schema without keywords and properties that are null; ``names``: its keys are no keywords."""
    if isinstance(value, list):
        return [_schema(each) for each in value]
    if not isinstance(value, dict):
        return value
    values = () if names else ("default", "const", "enum", "examples")  # there null is one
    kept = {key: each for key, each in value.items() if each is not None or key in values[:2]}
    return {key: each if key in values else _schema(each, not names and key in _NAMING) for key, each in kept.items()}


def rows_digest(rows: Iterable[dict[str, Any]]) -> str:
    """sha256 over the rows, in order: identifies the data of a run."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()

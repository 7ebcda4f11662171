"""Files and rows as people have them, brought into this package's form: JSON lines, a JSON list, CSV or parquet; rows of TRL,
Alpaca and ShareGPT.

A form is recognised by its keys, so a row is never read in two ways.
"""

from __future__ import annotations

import csv
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shadowpeft.errors import DataError
from shadowpeft.json_text import once_each, parse_json
from shadowpeft.messages import quote

OWN = ("messages", "prompt, response")
"""The forms that need no change."""
WRITTEN = ("tool_calls", "reasoning_content", "reasoning", "thinking")
"""Keys of a message beside its content that a chat template may write."""
MESSAGE_KEYS = ("role", "content", *WRITTEN, "tool_call_id", "name", "weight")
"""Keys that a message may have."""
_FORMS = (
    ("messages",),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("conversations",),
)
"""Keys by which a form is recognised."""
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Who speaks in ShareGPT's conversations, by the names in use; ``function_call`` is an answer that is its calls, as JSON."""


def normal(row: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """A row with ``messages``, or ``prompt`` and ``response``, and the name of the form that it had.

    - ``prompt``, ``completion`` (TRL): texts, or lists of messages.
    - ``instruction``, ``input``, ``output`` (Alpaca): the input is put after the instruction, an empty line between.
      ``system`` becomes the system message, ``history`` (pairs of question and answer) the turns before. No other words are
      added; the chat template is the model's.
    - ``conversations`` of ``from`` and ``value`` (ShareGPT), and ``system``. What else a turn has is that of its message.

    Raises:
        DataError: starting with ``where``, if a value is of the wrong type, or the row has two forms.
    """
    row = dict(row)
    found = [keys for keys in _FORMS if row.keys() >= set(keys)]
    if len(found) > 1 and found[1:] != [("prompt", "completion")]:  # both answers: the second is refused as unused
        first, second = (" and ".join(map(repr, keys)) for keys in found[:2])
        raise DataError(f"{where} has {first} and also {second}, which are two forms; keep one")
    if "completion" in row and "prompt" in row and "response" not in row and "messages" not in row:
        return _of_trl(row, where), "prompt, completion"
    if "instruction" in row and "output" in row and not {"prompt", "response", "messages"} & row.keys():
        return _of_alpaca(row, where), "instruction, input, output"
    if "conversations" in row and not {"prompt", "response", "messages"} & row.keys():
        return _of_sharegpt(row, where), "conversations"
    return row, OWN[0] if "messages" in row else OWN[1]


_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content)\1\s*:""")


def _of_trl(row: dict[str, Any], where: str) -> dict[str, Any]:
    prompt, completion = row.pop("prompt"), row.pop("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in (("prompt", prompt), ("completion", completion)):
            if _MESSAGES_AS_TEXT.match(text):  # what a table makes of lists, in JSON or as Python writes it
                raise DataError(
                    f"{where}: '{name}' is a list of messages written as text, which would be learnt as it stands; write the "
                    "rows as JSON lines (pandas: to_json(orient='records', lines=True))"
                )
        return {**row, "prompt": prompt, "response": completion}
    if isinstance(prompt, list) and isinstance(completion, list):
        return {**row, "messages": [*prompt, *completion]}
    raise DataError(f"{where}: 'prompt' and 'completion' must both be strings or both be lists of messages")


def _of_alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    parts = [row.pop("instruction"), row.pop("input", "")]
    answer, system, history = row.pop("output"), row.pop("system", ""), row.pop("history", [])
    if not all(isinstance(each, str) for each in (*parts, answer, system)):
        raise DataError(f"{where}: 'instruction', 'input', 'output' and 'system' must be strings")
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        raise DataError(f"{where}: 'history' must be a list of [question, answer], both strings")
    asked = "\n\n".join(part for part in parts if part)
    if not system and not history:
        return {**row, "prompt": asked, "response": answer}
    turns = [("system", system)] if system else []
    for question, reply in [*history, [asked, answer]]:
        turns += [("user", question), ("assistant", reply)]
    return {**row, "messages": [{"role": role, "content": text} for role, text in turns]}


def _of_sharegpt(row: dict[str, Any], where: str) -> dict[str, Any]:
    turns, system = row.pop("conversations"), row.pop("system", "")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not isinstance(system, str):
        raise DataError(
            f"{where}: 'conversations' must be a list of objects with 'from' and 'value', and 'system' a string"
        )
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        names = {"role": "from" if "from" in turn else "role", "content": "value" if "value" in turn else "content"}
        beside = {key: each for key, each in turn.items() if key not in names.values()}
        for key in beside:
            if key in names:
                raise DataError(f"{where}: turn {number} of 'conversations' has '{names[key]}' and also '{key}'; keep one")
            if key not in MESSAGE_KEYS:
                raise DataError(
                    f"{where}: turn {number} of 'conversations' has the key {quote(key)}, which nothing reads; known are "
                    f"{', '.join(('from', 'value', *MESSAGE_KEYS))}"
                )
        speaker, text = turn.get(names["role"]), turn.get(names["content"], "" if beside.get("tool_calls") else None)
        if not isinstance(speaker, str) or speaker not in _ROLES or not isinstance(text, str):
            raise DataError(
                f"{where}: turn {number} of 'conversations' needs a string 'value' and 'from', one of {', '.join(_ROLES)}; got "
                f"from {quote(speaker)}"
            )
        if speaker == "function_call":
            text, beside = "", {**beside, "tool_calls": _calls(text, f"{where}: turn {number} of 'conversations'")}
        messages.append({"role": _ROLES[speaker], "content": text, **beside})
    return {**row, "messages": messages}


def _calls(text: str, where: str) -> list[dict[str, Any]]:
    """The calls of a ``function_call``: one JSON object with a name and arguments, or a list of them."""
    try:
        found = parse_json(text, object_pairs_hook=once_each)
    except ValueError as error:
        raise DataError(f"{where} is a function_call, whose value must be its calls as JSON, but it {error}") from error
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and call.keys() >= {"name", "arguments"} for call in calls):
        raise DataError(
            f"{where} is a function_call, whose value must be an object with 'name' and 'arguments', or a list of such; got "
            f"{quote(text)}"
        )
    return [{"type": "function", "function": call} for call in calls]


def missing(file: Path) -> str:
    """Why a path is no file to read."""
    if file.is_dir():
        return f"'{file}' is a folder but one file is read here; give a file of it"
    if any(mark in str(file) for mark in "*?["):
        return f"data file '{file}' does not exist, and patterns are not read; give a file, or a folder that holds them all"
    return f"data file '{file}' does not exist; check the path"


_KINDS = "JSON lines (.jsonl), JSON lists (.json), .csv and .parquet"
_UNREAD = {
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "unpack it"),
    **dict.fromkeys((".tsv", ".xlsx", ".xls", ".ods"), "save it as CSV, with commas between its cells"),
    **dict.fromkeys((".arrow", ".feather"), "save it as parquet"),
}
"""Kinds of file that rows often stand in, and what to do with one."""


def check_kind(file: Path) -> None:
    """Whether a file is of a kind that is read, by its name.

    Raises:
        DataError: naming the file, the kinds that are read, and what to do with it.
    """
    kind = file.suffix.lower()
    if kind in _UNREAD:
        raise DataError(f"data file '{file}' ends in {kind} but {_KINDS} are read; {_UNREAD[kind]}")


def rows_in(path: str | Path, *, keep_damaged: bool = False) -> Iterator[tuple[str, Any]]:
    """Every row of a file as it is, and where it stands: ``.csv``, ``.parquet``, ``.json`` (a list), else JSON lines.

    Args:
        keep_damaged: give the error in place of a row that cannot be read, and go on, where a file can be read on after it.

    Raises:
        DataError: naming the file, and the place where that is known, if it is missing or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(missing(file))
    check_kind(file)
    kind = file.suffix.lower()
    if kind != ".parquet":
        with file.open("rb") as handle:
            if handle.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE):
                raise DataError(f"{file} is UTF-16 text; save it as UTF-8")
    readers = {".csv": _csv, ".parquet": _parquet, ".json": _json}
    for where, row in readers.get(kind, _lines)(file):
        if isinstance(row, DataError) and not keep_damaged:
            raise row
        yield where, row


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    yield where, parse_json(line, object_pairs_hook=once_each)
                except ValueError as error:
                    yield where, DataError(f"{where} {error}")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = parse_json(file.read_bytes(), object_pairs_hook=once_each)
    except ValueError as error:
        with file.open("rb") as handle:
            first, second = handle.readline().strip(), handle.read(1 << 16).strip()
            if second and (first[:1], first[-1:]) == (b"{", b"}"):  # JSON lines, which are called so too
                yield from _lines(file)
                return
        raise DataError(f"{file} {error}") from error
    if not isinstance(content, list):
        raise DataError(f"{file} holds a JSON {type(content).__name__} but must hold a list of rows")
    for number, row in enumerate(content, 1):
        yield f"{file}, row {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    """Empty cells are None; a comma separates, or a semicolon if the header has them and no comma, as Excel writes it in many
    languages. A row that spans several lines stands where it ends."""
    csv.field_size_limit(2**31 - 1)  # a long conversation is a long cell; the limit of the csv module is 131,072 characters
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        header = next((line.strip() for line in handle if line.strip()), "")
        separator = ";" if ";" in header and "," not in header and not header.startswith("sep=") else ","
        handle.seek(0)
        reader = csv.reader(handle, delimiter=separator, strict=True)
        names: list[str] = []
        while True:
            begins = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                several = begins < reader.line_num
                where = f"{file}, " + (f"lines {begins} to {reader.line_num}" if several else f"line {reader.line_num}")
                yield where, DataError(f"{where} {'are' if several else 'is'} not valid CSV in UTF-8 ({error}); correct it")
                continue
            if cells is None:
                return
            where = f"{file}, line {reader.line_num}"
            damage = _not_utf8(cells) if cells else None
            if not names:
                if damage is not None:
                    raise DataError(f"{where} {damage}")
                if twice := [name for n, name in enumerate(cells) if name in cells[:n]]:
                    raise DataError(
                        f"{where} names the column {quote(twice[0])} twice, of which one would be lost; give each its own name"
                    )
                if len(cells) == 1 and (marks := [mark for mark in ";\t|" if mark in cells[0]]):
                    raise DataError(
                        f"{where} has one column, {quote(cells[0])}, but commas have to stand between columns, not "
                        f"{marks[0]!r}; save the file with commas"
                    )
                names = cells
            elif damage is not None:
                yield where, DataError(f"{where} {damage}")
            elif cells and len(cells) != len(names):
                quoted = "commas" if separator == "," else "semicolons"
                yield where, DataError(
                    f"{where} has {len(cells)} cells but the header has {len(names)} names; quote {quoted} in texts"
                )
            elif cells:
                yield where, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _not_utf8(cells: list[str]) -> str | None:
    """What is wrong with a line that is no UTF-8: its first such byte, and what Excel would have written with it."""
    found = re.search("[\udc80-\udcff]", "".join(cells))
    if found is None:
        return None
    byte = bytes([ord(found.group()) - 0xDC00])
    letter = byte.decode("cp1252", errors="ignore")
    perhaps = f", which is {letter!r} in cp1252, Excel's plain CSV" if letter else ""
    return f"is not valid CSV in UTF-8 (byte 0x{byte.hex()}{perhaps}); save the file as UTF-8, in Excel as 'CSV UTF-8'"


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        if twice := [name for n, name in enumerate(names) if name in names[:n]]:
            raise DataError(f"{file} has the column {quote(twice[0])} twice, and one would be lost; give each its own name")
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file ({error}); make it again") from error


def forms_of(rows: Iterable[Any]) -> dict[str, int]:
    """How many rows had which form."""
    return dict(Counter(getattr(row, "form", OWN[1]) for row in rows))

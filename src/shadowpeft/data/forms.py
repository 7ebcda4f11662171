"""Files and rows as people have them, brought into this package's form: JSON lines, a JSON list, CSV or parquet; rows of TRL,
Alpaca and ShareGPT.

A form is recognised by its keys, so a row is never read in two ways.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shadowpeft.errors import DataError
from shadowpeft.json_text import parse_json

OWN = ("messages", "prompt, response")
"""The forms that need no change."""
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Who speaks in ShareGPT's conversations, by the names in use."""


def normal(row: dict[str, Any], where: str) -> tuple[dict[str, Any], str]:
    """A row with ``messages``, or ``prompt`` and ``response``, and the name of the form that it had.

    - ``prompt``, ``completion`` (TRL): texts, or lists of messages.
    - ``instruction``, ``input``, ``output`` (Alpaca): the input is put after the instruction, an empty line between.
      ``system`` becomes the system message. No other words are added; the chat template is the model's.
    - ``conversations`` of ``from`` and ``value`` (ShareGPT), and ``system``.

    Raises:
        DataError: starting with ``where``, if a value is of the wrong type.
    """
    row = dict(row)
    if "completion" in row and "prompt" in row and "response" not in row and "messages" not in row:
        return _of_trl(row, where), "prompt, completion"
    if "instruction" in row and "output" in row and not {"prompt", "response", "messages"} & row.keys():
        return _of_alpaca(row, where), "instruction, input, output"
    if "conversations" in row and not {"prompt", "response", "messages"} & row.keys():
        return _of_sharegpt(row, where), "conversations"
    return row, OWN[0] if "messages" in row else OWN[1]


def _of_trl(row: dict[str, Any], where: str) -> dict[str, Any]:
    prompt, completion = row.pop("prompt"), row.pop("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {**row, "prompt": prompt, "response": completion}
    if isinstance(prompt, list) and isinstance(completion, list):
        return {**row, "messages": [*prompt, *completion]}
    raise DataError(f"{where}: 'prompt' and 'completion' must both be strings or both be lists of messages")


def _of_alpaca(row: dict[str, Any], where: str) -> dict[str, Any]:
    parts = [row.pop("instruction"), row.pop("input", "")]
    answer, system = row.pop("output"), row.pop("system", "")
    if not all(isinstance(each, str) for each in (*parts, answer, system)):
        raise DataError(f"{where}: 'instruction', 'input', 'output' and 'system' must be strings")
    asked = "\n\n".join(part for part in parts if part)
    if not system:
        return {**row, "prompt": asked, "response": answer}
    turns = [("system", system), ("user", asked), ("assistant", answer)]
    return {**row, "messages": [{"role": role, "content": text} for role, text in turns]}


def _of_sharegpt(row: dict[str, Any], where: str) -> dict[str, Any]:
    turns, system = row.pop("conversations"), row.pop("system", "")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns) or not isinstance(system, str):
        raise DataError(
            f"{where}: 'conversations' must be a list of objects with 'from' and 'value', and 'system' a string"
        )
    messages = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, 1):
        speaker = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if speaker not in _ROLES or not isinstance(text, str):
            raise DataError(
                f"{where}: turn {number} of 'conversations' needs a string 'value' and 'from', one of {', '.join(_ROLES)}; got "
                f"from {speaker!r}"
            )
        messages.append(
            {"role": _ROLES[speaker], "content": text, **({"weight": turn["weight"]} if "weight" in turn else {})}
        )
    return {**row, "messages": messages}


def rows_in(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Every row of a file as it is, and where it stands: ``.csv``, ``.parquet``, ``.json`` (a list), else JSON lines.

    Raises:
        DataError: naming the file, and the place where that is known, if it is missing or damaged.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data file '{file}' does not exist; check the path")
    readers = {".csv": _csv, ".parquet": _parquet, ".json": _json}
    yield from readers.get(file.suffix.lower(), _lines)(file)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    yield where, parse_json(line)
                except ValueError as error:
                    raise DataError(f"{where} {error}") from error


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} {error}; JSON lines belong into a file that ends in .jsonl") from error
    if not isinstance(content, list):
        raise DataError(f"{file} holds a JSON {type(content).__name__} but must hold a list of rows")
    for number, row in enumerate(content, 1):
        yield f"{file}, row {number}", row


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    """Empty cells are absent; a comma separates."""
    with file.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        try:
            for row in reader:
                where = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where} has another number of cells than the first line has names; quote commas in texts"
                    )
                yield where, {name: cell for name, cell in row.items() if cell != ""}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{file}, line {reader.line_num} is not valid CSV in UTF-8 ({error}); correct it"
            ) from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable parquet file ({error}); make it again") from error


def forms_of(rows: Iterable[Any]) -> dict[str, int]:
    """How many rows had which form."""
    return dict(Counter(getattr(row, "form", OWN[1]) for row in rows))

"""``shadowpeft data answer``: what a model says to the rows of a file, as what the shadow learns from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from shadowpeft.apps.common import bar, in_mode, system_message
from shadowpeft.apps.generate import check_mode, drafts_of, opened
from shadowpeft.apps.options import Adapter, Base, Device, Json, Mode, NewTokens, Seed, Speculative, System, Temperature
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.storage import discard, exclusive, require_writable, whole, write_json
from shadowpeft.terminal import terminal

_CHUNK = 64
"""Rows that are answered and then kept: what a stopped command has done."""


@dataclass(frozen=True)
class _Row:
    """A row of the file in normal form."""

    row: dict[str, Any]
    asks: bool
    """Whether the model answers it; other rows are written as they are."""


def read(file: str) -> list[_Row]:
    """The rows of a file or of a packaged set; what both paths learn is answered, and prompts that have no answer.

    Raises:
        DataError: for a row that training would refuse, for one with tools, and for a file that asks nothing.
    """
    from shadowpeft.data.chat_rows import check_row, without_null
    from shadowpeft.data.sources import Source, rows_of
    from shadowpeft.train.rows import packaged, packaged_rows

    rows = []
    if packaged(file):
        given: Any = ((f"row {n}", row) for n, row in enumerate(packaged_rows(file, "train"), 1))
    else:
        given = rows_of(Source(path=file))
    for where, row in given:
        bare = False
        if not packaged(file):
            row = without_null(row) if isinstance(row, dict) else row
            bare = _asks_alone(row)
            row = check_row(_with_answer(row) if bare else row, where)
        if "tools" in row or "answer" in row or any("tool_calls" in message for message in row["messages"]):
            raise DataError(f"{where} has tools or calls, and answers alone are written here; leave such rows out of this file")
        written: dict[str, Any] = {"messages": row["messages"], "response": None if bare else row["response"]}
        if row["shadow_response"] is not None:
            written["shadow_response"] = row["shadow_response"]
        if bare or row["path"] != "both":
            written["path"] = "shadow" if bare else row["path"]
        rows.append(_Row(written, bare or (row["path"] == "both" and row["shadow_response"] is None)))
    if not any(row.asks for row in rows):
        raise DataError(f"'{file}' has no row that both paths learn and no prompt without an answer, so nothing is asked")
    return rows


def _asks_alone(row: Any) -> bool:
    """Whether a row has a prompt and no answer."""
    if not isinstance(row, dict):
        return False
    if isinstance(row.get("messages"), list) and row["messages"]:
        last = row["messages"][-1]
        return isinstance(last, dict) and last.get("role") == "user"
    return "prompt" in row and not {"response", "completion", "shadow_response"} & row.keys()


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Such a row with an empty answer, so that the rest of it can be checked."""
    if "messages" in row:
        return {**row, "messages": [*row["messages"], {"role": "assistant", "content": ""}]}
    if isinstance(row["prompt"], list):
        return {**row, "completion": [{"role": "assistant", "content": ""}]}
    return {**row, "response": ""}


def _line(row: dict[str, Any]) -> str:
    """A row as training reads it."""
    messages, response = row["messages"], row["response"]
    rest = {key: value for key, value in row.items() if key not in ("messages", "response")}
    if len(messages) == 1 and messages[0]["role"] == "user":
        said: dict[str, Any] = {"prompt": messages[0]["content"], "response": response}
    else:
        said = {"messages": [*messages, {"role": "assistant", "content": response}]}
    return json.dumps({**said, **rest}, ensure_ascii=False) + "\n"


@dataclass
class _Counts:
    """What became of the rows."""

    rows: int = 0
    answered: int = 0
    kept: int = 0
    """Rows that nothing was asked of."""
    cut: int = 0
    """Answers that did not end: the row keeps its own, and a prompt that has none is left out."""
    empty: int = 0

    def add(self, row: _Row, text: str | None) -> str:
        """The line of a row; ``text``: the answer, None of one that was cut."""
        self.rows += 1
        if not row.asks:
            self.kept += 1
        elif text:
            self.answered += 1
            return _line({**row.row, "shadow_response" if row.row["response"] is not None else "response": text})
        elif text is None:
            self.cut += 1
        else:
            self.empty += 1
        return "" if row.row["response"] is None else _line(row.row)


def main(
    adapter: Adapter,
    file: Annotated[str, typer.Argument(help="JSON lines, .json, .csv, .parquet or a folder; robot.")],
    out: Annotated[str, typer.Option(help="File of JSON lines to write.")],
    mode: Mode = "attached",
    base: Base = None,
    system: System = None,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are answered at a time.")] = 16,
    device: Device = "auto",
    speculative: Speculative = False,
    as_json: Json = False,
) -> None:
    """Let a model answer the rows of a file, for the shadow to learn what its own cloud says.

    A row that both paths learn gets the answer as its shadow_response. A prompt without an answer gets it as its response,
    for the shadow alone. All other rows stay as they are. The command can be stopped and given again.
    """
    target = Path(out)
    if target.exists():
        raise ConfigError(f"'{out}' exists; choose another --out")
    require_writable(target.parent)
    check_mode(mode, speculative)
    rows = read(file)
    system = system_message(adapter, system)
    model, tokenizer, sampling = opened(adapter, base, device, temperature, seed)
    from shadowpeft.data.chat import rows_digest
    from shadowpeft.evaluate.record import weights_digest

    settings = {
        "rows": rows_digest([row.row for row in rows]),
        "model": weights_digest(model),
        "mode": mode,
        "system": system,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "seed": seed if sampling else None,
        "speculative": speculative and bool(sampling),  # greedy answers are the same
    }
    begun = target.with_name(target.name + ".begun")
    console = terminal(stderr=True)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "system": system, **sampling}
    options |= drafts_of(speculative)
    with exclusive(begun), in_mode(model, mode) as runner:
        counts = _answered(rows, runner, tokenizer, begun, settings, options, seed, console)
        with whole(target, replace=False) as beside, beside.open("w", encoding="utf-8") as written:
            for part in _parts(begun):
                written.write(part.read_text(encoding="utf-8"))
    discard(begun)
    result = {**asdict(counts), "out": out, "system": system}
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    console.print(
        f"{counts.answered} of {counts.rows} rows answered, {counts.kept} kept as they are; {counts.cut} answers did not end "
        f"within {max_new_tokens} tokens and {counts.empty} were empty: these rows keep their own, or are left out without one"
    )
    if system is not None:
        console.print(f"the answers were given under a system message; train with data.system: {json.dumps(system)}")
    console.print(f"saved: {target}")


def _parts(begun: Path) -> list[Path]:
    return sorted(begun.glob("*.jsonl"))


def _answered(
    rows: list[_Row],
    runner: Any,
    tokenizer: Any,
    begun: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    seed: int,
    console: Any,
) -> _Counts:
    """Answer what ``begun`` does not hold yet, a file for each chunk of rows.

    Raises:
        ConfigError: if it was begun with other rows, another model or other settings.
    """
    from transformers import set_seed

    from shadowpeft.generate import answer

    told = begun / "settings.json"
    if told.exists():
        before = json.loads(told.read_text(encoding="utf-8"))
        other = [key for key, value in settings.items() if before.get(key) != value]
        if other:
            raise ConfigError(
                f"'{begun}' was begun with other {', '.join(other)}; delete that folder to begin anew, or choose another --out"
            )
    else:
        write_json(told, settings)
    counts = _Counts()
    with bar(console, "answering", len(rows)) as done:
        for number, start in enumerate(range(0, len(rows), _CHUNK)):
            chunk = rows[start : start + _CHUNK]
            part, state = begun / f"{number:06d}.jsonl", begun / f"{number:06d}.json"
            if state.exists():  # written after its rows
                counts = _Counts(**json.loads(state.read_text(encoding="utf-8")))
            else:

                def further(n: int, start: int = start) -> None:
                    done(start + n)

                prompts = [row.row["messages"] for row in chunk if row.asks]
                set_seed((seed + number) % 2**32)  # so that a stopped command draws what one that was not would have drawn
                said = iter(answer(runner, tokenizer, prompts, progress=further, **options))
                lines = ""
                for row in chunk:
                    found = next(said) if row.asks else None
                    cut = found is not None and found.tokens >= options["max_new_tokens"]
                    lines += counts.add(row, None if found is None or cut else found.text)
                with whole(part) as beside:
                    beside.write_text(lines, encoding="utf-8")
                write_json(state, asdict(counts))
            done(start + len(chunk))
    return counts

"""``shadowpeft data answer``: what a model says to the rows of a file, as what the shadow learns from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from shadowpeft.apps.common import bar, in_mode, mode_of, system_message
from shadowpeft.apps.generate import GREEDY, drafts_of, opened, prepared
from shadowpeft.apps.options import (
    AdapterOrEdge,
    Base,
    Device,
    Json,
    Mode,
    NewTokens,
    Seed,
    Speculative,
    System,
    Temperature,
)
from shadowpeft.apps.source import source_named
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.storage import (
    LOCK,
    discard,
    exclusive,
    is_write_error,
    reason,
    require_writable,
    whole,
    write_json,
    write_text,
)
from shadowpeft.terminal import terminal

_CHUNK = 64
"""Rows that are answered and then kept: what a stopped command has done."""


@dataclass(frozen=True)
class _Row:
    """A row of the file, as it stands there."""

    where: str
    row: dict[str, Any]
    prompt: list[dict[str, Any]] | None
    """What the model is asked; None: the row stays as it is."""
    bare: bool = False
    """Whether it has no answer of its own."""

    def line(self, text: str | None = None) -> str:
        """The row as it is written, with an answer if there is one.

        Raises:
            DataError: if JSON cannot hold it.
        """
        row = self.row
        if text is not None:
            row = {**_answered_with(row, text), "path": "shadow"} if self.bare else {**row, "shadow_response": text}
        try:
            return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.where} cannot be written as JSON ({error}); give its values as text or numbers") from error


def read(file: str) -> list[_Row]:
    """The rows of a file or of a packaged set; what both paths learn is answered, and prompts that have no answer.

    Raises:
        DataError: for a row that training would refuse, for one with tools, and for a file that asks nothing.
    """
    from shadowpeft.data.chat_rows import check_row, without_null
    from shadowpeft.data.sources import rows_of
    from shadowpeft.train.rows import packaged, packaged_rows

    rows: list[_Row] = []
    if packaged(file):
        for n, checked in enumerate(packaged_rows(file, "train"), 1):
            rows.append(_row(f"row {n}", _own_form(checked), checked, bare=False))
    else:
        for where, row in rows_of(source_named(file)):
            present = without_null(row) if isinstance(row, dict) else row
            bare = isinstance(row, dict) and _is_bare(present)
            if bare and ("shadow_response" in present or present.get("path", "shadow") != "shadow"):
                raise DataError(
                    f"{where} has no answer, so the model's is for the shadow alone; leave 'shadow_response' and 'path' out"
                )
            checked = check_row(_answered_with(present, "") if bare else row, where, every_turn=True)
            rows.append(_row(where, present if bare else row, checked, bare=bare))
    if all(row.prompt is None for row in rows):
        raise DataError(f"'{file}' has no row that both paths learn and no prompt without an answer, so nothing is asked")
    return rows


def _row(where: str, row: dict[str, Any], checked: dict[str, Any], *, bare: bool) -> _Row:
    """A row with what is asked of it.

    Raises:
        DataError: if it has tools.
    """
    messages = [{key: value for key, value in turn.items() if key != "weight"} for turn in checked["messages"]]
    if "tools" in checked or any("tool_calls" in turn for turn in (*messages, checked.get("answer", {}))):
        raise DataError(f"{where} has tools or calls, and answers alone are written here; leave such rows out of this file")
    if bare and messages and messages[-1]["role"] == "assistant":
        raise DataError(f"{where} has a prompt that ends with an answer; let it end with the user, or give the answer apart")
    asks = bare or (checked["path"] == "both" and checked["shadow_response"] is None)
    return _Row(where, row, messages if asks else None, bare)


def _own_form(checked: dict[str, Any]) -> dict[str, Any]:
    """A checked row in the form of a file."""
    messages, response = checked["messages"], checked["response"]
    rest = {key: checked[key] for key in ("shadow_response",) if checked[key] is not None}
    rest |= {"path": checked["path"]} if checked["path"] != "both" else {}
    if len(messages) == 1 and messages[0]["role"] == "user":
        return {"prompt": messages[0]["content"], "response": response, **rest}
    return {"messages": [*messages, {"role": "assistant", "content": response}], **rest}


def _is_bare(row: dict[str, Any]) -> bool:
    """Whether a row, in any form of docs/data.md, has a prompt and no answer."""
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list) and turns:
        last = turns[-1]
        return isinstance(last, dict) and last.get("role", last.get("from")) in ("user", "human")
    if "instruction" in row:
        return "output" not in row
    return "prompt" in row and not {"response", "completion"} & row.keys()


def _answered_with(row: dict[str, Any], text: str) -> dict[str, Any]:
    """Such a row with an answer, in its own form."""
    if "messages" in row:
        return {**row, "messages": [*row["messages"], {"role": "assistant", "content": text}]}
    if "conversations" in row:
        last = row["conversations"][-1]
        speaker, said = "from" if "from" in last else "role", "value" if "value" in last else "content"
        turn = {speaker: "gpt" if speaker == "from" else "assistant", said: text}
        return {**row, "conversations": [*row["conversations"], turn]}
    if "instruction" in row:
        return {**row, "output": text}
    if isinstance(row["prompt"], list):
        return {**row, "completion": [{"role": "assistant", "content": text}]}
    return {**row, "response": text}


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

    def add(self, row: _Row, found: Any) -> str:
        """The line of a row; ``found``: its answer, None where nothing was asked."""
        self.rows += 1
        if found is None:
            self.kept += 1
        elif not found.ended:
            self.cut += 1
        elif not found.text:
            self.empty += 1
        else:
            self.answered += 1
            return row.line(found.text)
        return "" if row.bare else row.line()


def _stored(file: Path) -> Any:
    """The settings of an earlier command; None: there are none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class _Begun:
    """The folder of what is answered so far: two files for each chunk of rows, and what they were made with."""

    def __init__(self, target: Path) -> None:
        self.folder = target.with_name(target.name + ".begun")
        self.settings = self.folder / "settings.json"

    def files(self, number: int) -> tuple[Path, Path]:
        """The lines of a chunk, and the counts up to its end, which are written after them."""
        return self.folder / f"{number:06d}.jsonl", self.folder / f"{number:06d}.json"

    def check(self, settings: dict[str, Any]) -> None:
        """Whether what is there may be gone on with.

        Raises:
            ConfigError: if it is no folder of this command, or was begun with other rows, another model or other settings.
        """
        if not self.folder.exists():
            return
        before = _stored(self.settings)
        if not isinstance(before, dict):
            if self.folder.is_dir() and not any(path.name != LOCK for path in self.folder.iterdir()):
                return
            raise ConfigError(f"'{self.folder}' is not what this command has begun; choose another --out, or move it away")
        other = [key for key, value in settings.items() if before.get(key) != value]
        if other:
            raise ConfigError(
                f"'{self.folder}' was begun with other {', '.join(other)}; delete that folder to begin anew, or choose another "
                "--out"
            )

    def lines(self, chunks: int) -> str:
        """The lines of all chunks."""
        return "".join(self.files(number)[0].read_text(encoding="utf-8") for number in range(chunks))


def main(
    adapter: AdapterOrEdge,
    file: Annotated[
        str, typer.Argument(help="JSON lines, .json, .csv, .parquet or a folder; a mapping as in a run file; robot.")
    ],
    out: Annotated[str, typer.Option(help="File of JSON lines to write.")],
    mode: Mode = None,
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
    folder = source_named(file).path
    if folder is not None and Path(folder).is_dir() and target.resolve().is_relative_to(Path(folder).resolve()):
        raise ConfigError(f"'{out}' lies in the folder '{file}', whose files are the rows; choose another --out")
    require_writable(target.parent)
    mode = mode_of(adapter, mode)
    prepared(mode, speculative, temperature)
    rows = read(file)
    from shadowpeft.data.chat_rows import rows_digest
    from shadowpeft.train.rows import system_of

    system = system_of(file, system_message(adapter, system))
    greedy = temperature < GREEDY
    settings: dict[str, Any] = {
        "rows": rows_digest([row.row for row in rows]),
        "mode": mode,
        "system": system,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        # drafts and batches change no greedy answer but by rounding
        "drawn": None if greedy else {"seed": seed, "batch_size": batch_size, "speculative": speculative},
    }
    begun, chunks = _Begun(target), -(-len(rows) // _CHUNK)
    begun.check(settings)
    if target.exists():
        _finish(target, begun, chunks)
        return
    model, tokenizer, sampling = opened(adapter, base, device, temperature, seed)
    from shadowpeft.evaluate.record import weights_digest

    settings["model"] = weights_digest(model)
    begun.check(settings)
    console = terminal(stderr=True)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "system": system, **sampling}
    with in_mode(model, mode) as runner:
        _check_room(rows, runner, tokenizer, system, max_new_tokens)
        with exclusive(begun.folder):
            try:
                if not begun.settings.exists():
                    write_json(begun.settings, settings)
                counts = _answer_all(rows, runner, tokenizer, begun, {**options, **drafts_of(speculative)}, seed, console)
                if counts.answered:
                    with whole(target, replace=False) as beside:
                        beside.write_text(begun.lines(chunks), encoding="utf-8")
            except OSError as error:
                if not is_write_error(error):
                    raise
                raise ConfigError(
                    f"'{begun.folder}' or '{out}' cannot be written ({reason(error)}); what was answered is kept there: give "
                    "the command again when it can"
                ) from error
    discard(begun.folder)
    if not counts.answered:
        raise DataError(
            f"no answer ended within {max_new_tokens} tokens, so nothing is written; raise --max-new-tokens, or ask a model "
            "that was trained on such rows"
        )
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


def _finish(target: Path, begun: _Begun, chunks: int) -> None:
    """What is left to do where the file is there already: if this very command has made it, remove what it had begun.

    Raises:
        ConfigError: if it is another file.
    """
    parts = [begun.files(number)[0].is_file() for number in range(chunks)]
    if not begun.settings.is_file() or not all(parts) or target.read_text(encoding="utf-8") != begun.lines(chunks):
        raise ConfigError(f"'{target}' exists; choose another --out")
    discard(begun.folder)
    terminal(stderr=True).print(f"'{target}' was complete already")


def _check_room(rows: list[_Row], runner: Any, tokenizer: Any, system: str | None, new: int) -> None:
    """Whether every prompt can be asked, before the first is.

    Raises:
        DataError: naming the first row that the chat template refuses, or that does not fit the model with its answer.
    """
    from shadowpeft.data.chat import render_prompt, with_system
    from shadowpeft.generate import check_room

    for row in rows:
        if row.prompt is not None:
            try:
                text = render_prompt(tokenizer, with_system(row.prompt, system))
                check_room(runner, len(tokenizer(text, add_special_tokens=False).input_ids), new)
            except DataError as error:
                raise DataError(f"{row.where}: {error}") from error


def _answer_all(
    rows: list[_Row], runner: Any, tokenizer: Any, begun: _Begun, options: dict[str, Any], seed: int, console: Any
) -> _Counts:
    """Answer what ``begun`` does not hold yet."""
    from transformers import set_seed

    from shadowpeft.generate import answer

    counts = _Counts()
    with bar(console, "answering", len(rows)) as done:
        for number, start in enumerate(range(0, len(rows), _CHUNK)):
            chunk = rows[start : start + _CHUNK]
            lines, state = begun.files(number)
            if state.exists():
                counts = _Counts(**json.loads(state.read_text(encoding="utf-8")))
            else:

                def further(n: int, start: int = start) -> None:
                    done(start + n)

                prompts = [row.prompt for row in chunk if row.prompt is not None]
                # a stopped command draws what one that was not stopped would have drawn; no two chunks of two seeds are alike
                set_seed((seed * 1_000_003 + number) % 2**32)
                found = iter(answer(runner, tokenizer, prompts, progress=further, **options))
                text = "".join(counts.add(row, None if row.prompt is None else next(found)) for row in chunk)
                write_text(lines, text)
                write_json(state, asdict(counts))
            done(start + len(chunk))
    return counts

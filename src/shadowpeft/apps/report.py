"""``shadowpeft report RUN``: a run as one HTML page that needs nothing beside it."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from shadowpeft.apps.common import quiet_libraries
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.storage import require_writable, written_whole
from shadowpeft.terminal import terminal


def main(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run of shadowpeft train.")],
    out: Annotated[Optional[str], typer.Option(help="The page. Default: report.html in the run's folder.")] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Requests answered by the base before training and by both paths after it; 0: none.")
    ] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 48,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Write losses of both paths, learning rate, examples before and after, and the calibration as one HTML page."""
    from shadowpeft.apps.report_page import is_page, page, read_run_folder

    run = read_run_folder(Path(folder))
    file = Path(out) if out is not None else Path(folder) / "report.html"
    if not file.parent.is_dir():
        raise ConfigError(f"'{file.parent}', where the page would go, does not exist; make it, or leave --out out")
    if file.is_dir():
        raise ConfigError(f"'{file}', where the page would go, is a folder; give the name of a file in it")
    if file.exists() and not is_page(file):
        raise ConfigError(f"'{file}' exists and is no report, so it is not written over; give --out another name")
    require_writable(file.parent)
    answers: list[dict[str, Any]] = []
    note = "" if examples else "No examples were asked for (--examples 0)."
    if examples:
        quiet_libraries()
        try:
            answers, note = answered(Path(folder), examples, max_new_tokens)
        except (ConfigError, DataError) as error:  # the page is worth having without them, and says why they are not there
            note = f"The examples could not be made: {error}"
    with written_whole(file, "the page", "free some space or choose another place with --out", folder=False) as beside:
        beside.write_text(page(run, answers, note), encoding="utf-8")
    terminal().print(f"wrote {file}" + (f" ({note})" if not answers and examples else ""))
    if show:
        webbrowser.open(file.resolve().as_uri())


def answered(folder: Path, count: int, max_new_tokens: int) -> tuple[list[dict[str, Any]], str]:
    """Requests with what they should be answered, and what the base, the attached and the detached model do answer.

    Returns:
        the examples, and of which rows they are.

    Raises:
        ConfigError: if the run has no adapter yet. DataError: if its rows cannot be read any more.
    """
    import shadowpeft
    from shadowpeft.apps.common import in_mode
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train.config import read_run

    run = read_run(folder / "config.yaml")
    adapter = folder / "adapter"
    if not adapter.is_dir():
        raise ConfigError(f"'{folder}' has no adapter yet; wait for the end of the run, or give --examples 0")
    classes = run.task_type == "SEQ_CLS"
    tokenizer = load_tokenizer(str(adapter))
    rows, which = _rows(run, count, tokenizer)
    model = shadowpeft.load(adapter)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    made = [{"request": _request(row), "wanted": _wanted(row, tokenizer)} for row in rows]
    for mode in ("attached", "detached") if classes else ("base", "attached", "detached"):
        with in_mode(model, mode) as runner:
            if classes:
                found = _classified(runner, tokenizer, rows, run)
            else:
                found = _said(runner, tokenizer, rows, run, max_new_tokens)
        for example, answer in zip(made, found, strict=True):
            example[mode] = answer
    return made, f"{len(made)} {which}, evenly spaced."


def _rows(run: Any, count: int, tokenizer: Any) -> tuple[list[Any], str]:
    from itertools import islice

    from shadowpeft.train.rows import class_rows_of, compact_calls, parts_of, read_rows, told, tools_of_run
    from shadowpeft.train.sections import source_of

    data = run.data
    part, given = [*parts_of(data).items()][-1]
    which = f"rows of the {'training' if part == 'train' else 'validation'} data"
    tools = tools_of_run(data.train, data.tools)
    compact = compact_calls(data, tools, tokenizer)
    if run.task_type == "SEQ_CLS":
        rows = class_rows_of(source_of(given))
    elif data.streaming and part == "train":
        from shadowpeft.data.chat import check_row
        from shadowpeft.data.sources import rows_of

        first = islice(rows_of(source_of(given), streaming=True), 8 * count)
        checked = (check_row(row, where, every_turn=data.assistant_only_loss) for where, row in first)
        rows = [told(row, actions=False, tools=tools, compact=compact) for row in checked]
    else:
        rows = read_rows(given, part, tools=tools, compact=compact, every_turn=data.assistant_only_loss)
    asked = [row for row in rows if row["path"] != "shadow"] or rows
    return [asked[i * len(asked) // min(count, len(asked))] for i in range(min(count, len(asked)))], which


def _request(row: Any) -> str:
    """What is asked: the text, the only message, or who said what; the rows of a run have one system message mostly."""
    if "text" in row:
        return str(row["text"])
    said = [message for message in row["messages"] if message["role"] != "system"] or row["messages"]
    if len(said) == 1:
        return str(said[0]["content"])
    return "\n".join(f"{message['role']}: {_content(message)}" for message in said)


def _content(message: dict[str, Any]) -> str:
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def _told(row: Any) -> dict[str, Any]:
    """What the chat template was told of a row in training."""
    options = {"tools": row["tools"]} if "tools" in row else {}
    return {**options, "enable_thinking": True} if row.get("answer", {}).keys() - {"tool_calls"} else options


def _messages(row: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in row["messages"]]


def _wanted(row: Any, tokenizer: Any) -> str:
    if "label" in row:
        return str(row["label"])
    text, beside, own = str(row["response"]), row.get("answer"), row.get("shadow_response")
    if beside:  # calls and thoughts, as the template writes them
        from shadowpeft.chat_template import render_prompt, written_answer_ids
        from shadowpeft.decode import decode

        prompt = render_prompt(tokenizer, _messages(row), **_told(row))
        text = decode(tokenizer, written_answer_ids(tokenizer, _messages(row), prompt, text, beside, **_told(row))).strip()
    return text + (f"\n(shadow path: {own})" if own is not None else "")


def _said(runner: Any, tokenizer: Any, rows: list[Any], run: Any, max_new_tokens: int) -> list[str]:
    from shadowpeft.generate import answer
    from shadowpeft.train.rows import system_of

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "system": system_of(run.data.train, run.data.system)}
    asked = [_messages(row) for row in rows]
    return [each.text for each in answer(runner, tokenizer, asked, template=[_told(row) for row in rows], **options)]


def _classified(runner: Any, tokenizer: Any, rows: list[Any], run: Any) -> list[str]:
    import torch

    from shadowpeft.data.padding import pad_inputs
    from shadowpeft.data.tasks import class_ids

    ids = [class_ids(tokenizer, row["text"], run.data.max_length) for row in rows]
    with torch.inference_mode():
        logits = runner(**pad_inputs(ids, tokenizer.pad_token_id, device=next(runner.parameters()).device)).logits
    chances = logits.float().softmax(-1)
    return [f"{runner.config.id2label[int(c.argmax())]} ({float(c.max()):.0%})" for c in chances]

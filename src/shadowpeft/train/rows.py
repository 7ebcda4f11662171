"""The rows of a fine-tuning run, as sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from shadowpeft.data import chat, class_rows, robot_tools
from shadowpeft.data.actions import REMOTE, almost_action, only_action, written
from shadowpeft.data.calls import only_calls
from shadowpeft.data.classify import ClassCollator
from shadowpeft.data.forms import OWN, forms_of
from shadowpeft.data.packed import PackedCollator, pack
from shadowpeft.data.robot import SETS as ROBOT_SETS
from shadowpeft.data.robot import SYSTEM as ROBOT_SYSTEM
from shadowpeft.data.robot import load as load_robot
from shadowpeft.data.sources import Source, rows_of
from shadowpeft.data.streamed import StreamedRows, fingerprint
from shadowpeft.data.tool_rows import with_tools, writes_calls
from shadowpeft.data.tools import Tools, read_tools
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.messages import quote
from shadowpeft.train.config import RunConfig
from shadowpeft.train.sections import PACKAGED, DataConfig, SourceSection, TrainingSection, source_of

ROBOT_REMOTE_REPEATS = 10


def robot_rows(split: str, *, actions: bool = False, source: str = "robot") -> list[dict[str, Any]]:
    """Rows of a packaged robot set (``source``) in the form of :mod:`shadowpeft.data.chat`.

    ``train`` joins the three training parts: skill commands for both paths, open-domain answers for the base path, open-domain
    requests answered ``[REMOTE]`` for the shadow path (the paper, Appendix F). The last are only 47, so they are repeated
    ``ROBOT_REMOTE_REPEATS`` times: they cost almost nothing, and a shadow that never learns to defer executes questions. With
    ``actions`` they are not: there the shadow path learns the 1,000 open requests of the base path too, as ``[REMOTE]``.
    So does it learn what ``robot_oos`` has beside them: requests that are no questions and that no skill answers.
    """
    in_words = {} if actions else {"path": "base"}  # words are no action, so [REMOTE] is learnt of them
    own: dict[str, dict[str, str]] = {
        "train_remote_base": in_words,
        "more_remote": in_words,
        "train_remote_shadow": {"path": "shadow"},
    }
    repeats = {} if actions else {"train_remote_shadow": ROBOT_REMOTE_REPEATS}

    def chat_row(row: dict[str, str]) -> dict[str, Any]:
        tagged = {"shadow_response": f"[REMOTE] {row['response']}"} if row["kind"] == "oos" and not actions else {}
        content = {"prompt": row["prompt"], "response": row["response"], **own.get(row["split"], {}), **tagged}
        return chat.check_row(content, row["id"])

    names = {"train": ROBOT_SETS[source], "validation": ("validation_normal",)}.get(split, (split,))
    return [chat_row(row) for name in names for row in load_robot(name) * repeats.get(name, 1)]


@dataclass
class RunData:
    """The rows of a run."""

    training: list[Any]
    """Sequences; of rows that are streamed the first ones, to estimate by."""
    validation: list[Any] | None
    record: dict[str, Any]
    """Source, rows that are used, rows that are left out, and fingerprint of each part."""
    labels: list[str] | None = None
    """Of a classifier, in the order of its classes."""
    stream: StreamedRows | None = None

    def collator(self, pad_token_id: int, *, packed: bool) -> Any:
        """What makes batches of these rows."""
        if self.labels is not None:
            return ClassCollator(pad_token_id)
        return PackedCollator(pad_token_id) if packed else chat.ChatCollator(pad_token_id)


def packaged(source: str | SourceSection | None) -> bool:
    """Whether ``source`` names a packaged set."""
    return isinstance(source, str) and source in PACKAGED


def system_of(source: str | SourceSection, given: str | None) -> str | None:
    """The system message of rows that bring none: the one that was ``given``, or that of a packaged set."""
    return ROBOT_SYSTEM if given is None and packaged(source) else given


def parts_of(data: DataConfig) -> dict[str, str | SourceSection]:
    """Where the rows of a run come from: ``train``, and ``validation`` if there is any; a packaged set brings its own."""
    validation = data.validation or (data.train if packaged(data.train) else None)
    return {"train": data.train, **({} if validation is None else {"validation": validation})}


def packaged_rows(source: str, split: str, *, actions: bool = False) -> list[dict[str, Any]]:
    """Checked rows of a packaged set; ``actions``: see :func:`robot_rows`."""
    if source in ROBOT_SETS:
        return robot_rows(split, actions=actions, source=source)
    return [chat.check_row(robot_tools.chat_row(row), row["id"]) for row in robot_tools.load_set(source, split)]


def tools_of_run(train: str | SourceSection, file: str | None) -> Tools | None:
    """The tools that a run's rows call: those of ``file``, of a packaged set with tools, or None."""
    if isinstance(train, str) and train in robot_tools.SETS:
        return robot_tools.tools()
    return None if file is None else read_tools(file)


def compact_calls(data: DataConfig, tools: Tools | None, tokenizer: Any) -> bool:
    """Whether a run writes the calls of its tools in the compact form (``data.call_form``).

    Raises:
        ConfigError: if they are to be written by a chat template that writes none, or no tools are named.
    """
    if tools is None and data.call_form is not None:
        raise ConfigError(
            f"data.call_form is '{data.call_form}' but data.tools names no tools, and those of rows are written by the chat "
            "template; name them, or leave call_form out"
        )
    form = data.call_form or ("compact" if data.learns_actions else None)
    if tools is None or form == "compact":
        return True
    writes = writes_calls(tokenizer)
    if form == "template" and not writes:
        raise ConfigError("data.call_form is 'template' but the base's chat template writes no calls; set it to 'compact'")
    return not writes


def read_rows(
    source: str | SourceSection,
    split: str,
    *,
    actions: bool = False,
    tools: Tools | None = None,
    compact: bool = True,
    every_turn: bool = False,
) -> list[dict[str, Any]]:
    """Rows of a file or data set, or of a packaged set (``PACKAGED``); with ``actions`` the shadow path learns actions alone.

    Args:
        tools, compact: what the rows call, and how that is written (:func:`shadowpeft.data.tool_rows.with_tools`).
        every_turn: every answer of a conversation is learnt, not its last one alone.

    Raises:
        DataError: naming the place, if a row is malformed, calls what is no tool, or has a tool call in the template's form
            where actions are learnt.
    """
    options: dict[str, Any] = {"actions": actions, "tools": tools, "compact": compact}
    if packaged(source):
        return [told(row, **options) for row in packaged_rows(str(source), split, actions=actions)]
    found = list(_checked(source_of(source), every_turn=every_turn, **options))
    if not found:
        raise DataError(f"data '{source_of(source)}' holds no rows; each must be one object with keys of docs/data.md")
    return found


def _checked(source: Source, *, every_turn: bool, streaming: bool = False, **options: Any) -> Iterator[dict[str, Any]]:
    for where, row in rows_of(source, streaming=streaming):
        yield told(chat.check_row(row, where, every_turn=every_turn), **options)


def told(row: dict[str, Any], *, actions: bool, tools: Tools | None, compact: bool) -> dict[str, Any]:
    """A checked row with its calls written, and with what the shadow path learns of it."""
    if tools is not None:
        row = with_tools(row, tools, compact=compact)
    return with_action(row, tools) if actions else row


def with_action(row: dict[str, Any], tools: Tools | None = None) -> dict[str, Any]:
    """The row with nothing but the action, or the calls of ``tools``, in the shadow path's answer; ``[REMOTE]`` if that begins
    with none, such as an empty one.

    Raises:
        DataError: if the answer almost is an action, or has calls that are not named.
    """
    if row["path"] == "base":
        return row
    where = getattr(row, "where", "") or "a row"
    if "tool_calls" in row.get("answer", {}):
        raise DataError(
            f"{where} has 'tool_calls' but data.shadow_answers is 'action', which reads actions such as [Sit()] from the text; "
            "name the tools with data.tools, write them so, or set it to 'whole'"
        )
    key = "response" if row["path"] == "shadow" else "shadow_response"
    text = row["response"] if row["shadow_response"] is None else row["shadow_response"]
    row[key] = only_action(text) if tools is None else only_calls(text, tools)
    if row[key] == written(REMOTE) and (found := almost_action(text)) is not None:
        raise DataError(
            f"{where} has an answer with {quote(found)}, which is no action where it stands, so the shadow would learn "
            "[REMOTE]; begin the answer with the action, such as [Sit()], or say it in other words"
        )
    return row


def load_run_data(run: RunConfig, tokenizer: Any, warn: Callable[[str], None]) -> RunData:
    """The rows of a run, encoded, and the record of them. ``warn`` is told of rows that are left out, and of foreign forms.

    Raises:
        DataError: if a row cannot be learnt, or a source cannot be read.
    """
    data = run.data
    parts = parts_of(data)
    if run.task_type == "SEQ_CLS":
        return _class_data(run, parts, tokenizer, warn)
    options: dict[str, Any] = {
        "max_length": data.max_length,
        "too_long": data.too_long,
        "system": system_of(data.train, data.system),
        "every_turn": data.assistant_only_loss,
    }
    tools = tools_of_run(data.train, data.tools)
    reading: dict[str, Any] = {
        "actions": data.learns_actions,
        "every_turn": data.assistant_only_loss,
        "tools": tools,
        "compact": compact_calls(data, tools, tokenizer),
    }
    stream = _stream(run, tokenizer, options, reading) if data.streaming else None
    made = RunData([] if stream is None else stream.sample(), None, {}, stream=stream)
    for part, given in parts.items():
        if part == "train" and stream is not None:
            source = source_of(data.train)
            made.record[part] = {"source": str(source), "rows": None, "sha256": fingerprint(source)}
            continue
        rows = read_rows(given, part, **reading)
        encoded = chat.encode(rows, tokenizer, **options)
        made.record[part] = _record(given, rows, encoded)
        if not packaged(given) and set(forms := forms_of(rows)) - set(OWN):
            made.record[part]["forms"] = forms
            warn(f"data.{part}: " + ", ".join(f"{count} rows of the form {name}" for name, count in forms.items()))
        if encoded.skipped is not None:
            warn(f"data.{part}: {encoded.skipped}")
        if part == "train":
            made.training = encoded + [s.alone() for s in encoded if s.shadow] * data.shadow_repeats
        else:
            made.validation = encoded
    tell_of_copies(made, warn)
    return made


def tell_of_copies(data: RunData, warn: Callable[[str], None]) -> None:
    """Rows that are learnt and judged: of streamed ones, what is known at the start."""
    learnt = {tuple(s.ids) for s in data.training}
    copies = sum(tuple(s.ids) in learnt for s in data.validation or [])
    if copies:
        warn(
            f"data.validation: {copies} of {len(data.validation or [])} rows are among those of data.train, so what they score "
            "says nothing of other rows"
        )


def _record(given: str | SourceSection, rows: list[dict[str, Any]], encoded: chat.Encoded) -> dict[str, Any]:
    source = given if isinstance(given, str) else str(source_of(given))
    return {"source": source, **encoded.record(), "sha256": chat.rows_digest(rows)}


def _stream(run: RunConfig, tokenizer: Any, options: dict[str, Any], reading: dict[str, Any]) -> StreamedRows:
    source, t = source_of(run.data.train), run.training

    def read() -> Iterator[list[chat.Sequence]]:
        for row in _checked(source, streaming=True, **reading):
            yield chat.encode_row(row, tokenizer, **options)

    seed = t.seed if t.data_seed is None else t.data_seed
    pack = run.data.max_length if run.data.packing else None
    return StreamedRows(read, buffer=run.data.shuffle_buffer, seed=seed, pack=pack)


def class_rows_of(source: Source) -> list[dict[str, Any]]:
    """Checked texts with labels.

    Raises:
        DataError: naming the place, if a row is malformed or there is none.
    """
    rows = [class_rows.check_row(row, where) for where, row in rows_of(source)]
    if not rows:
        raise DataError(f"data '{source}' holds no rows; each must have 'text' and 'label'")
    return rows


def _class_data(
    run: RunConfig, parts: dict[str, str | SourceSection], tokenizer: Any, warn: Callable[[str], None]
) -> RunData:
    rows = {part: class_rows_of(source_of(given)) for part, given in parts.items()}
    labels = class_rows.labels_of(rows["train"])
    made = RunData([], None, {}, labels)
    for part, given in parts.items():
        encoded = class_rows.encode(
            rows[part], tokenizer, labels, max_length=run.data.max_length, too_long=run.data.too_long
        )
        made.record[part] = _record(given, rows[part], encoded)
        if encoded.skipped is not None:
            warn(f"data.{part}: {encoded.skipped}")
        if part == "train":
            class_rows.check_learnt(labels, {labels[s.label] for s in encoded}, run.data.max_length)  # type: ignore[attr-defined]
            made.training = encoded + [s.alone() for s in encoded if s.shadow] * run.data.shadow_repeats
        else:
            made.validation = encoded
    tell_of_copies(made, warn)
    return made


def steps_by_epochs(t: TrainingSection, rows: int, processes: int = 1) -> int:
    """Steps of a run that its epochs end, as Trainer counts them."""
    batches = math.ceil(rows / (t.batch_size * processes))
    return math.ceil((t.epochs or 1.0) * max(math.ceil(batches / t.gradient_accumulation), 1))


def shadow_first(
    training: list[Any], t: TrainingSection, batch: int, pack_to: int | None = None
) -> tuple[chat.ChatDataset, int | None, int]:
    """The rows of a whole run whose ``shadow_epochs`` come before both paths train, its number of steps (None: by epochs), and
    how many of these are the shadow's alone. If it is frozen then, rows for the shadow alone are left out of the rest.

    Args:
        batch: rows of a step, over all processes. pack_to: tokens of a packed row; None: each sequence is a row.

    Raises:
        ConfigError: if ``max_steps`` ends the run before both paths train.
    """
    alone = [s.alone() for s in training if s.shadow] if t.shadow_epochs else []
    if t.freeze_shadow:
        training = [s for s in training if s.base]
    if pack_to is not None:
        training, alone = pack(training, pack_to), pack(alone, pack_to)
    if not t.shadow_epochs:
        return chat.ChatDataset(training), t.max_steps, 0
    if not alone:
        raise ConfigError("training.shadow_epochs is set but the shadow path learns no row of data.train; remove it")
    before = len(alone) * t.shadow_epochs
    steps = t.max_steps or math.ceil((before + (t.epochs or 1.0) * len(training)) / batch)
    first = math.ceil(before / batch) if t.freeze_shadow else before // batch
    if steps <= first or steps * batch <= before:
        raise ConfigError(
            f"training.max_steps is {steps} but {t.shadow_epochs} epochs of the shadow alone take {math.ceil(before / batch)} "
            "steps; raise it or lower training.shadow_epochs"
        )
    times = math.ceil((steps * batch - before) / len(training))
    parts = [len(alone)] * t.shadow_epochs + [len(training)] * times
    return chat.ChatDataset(alone * t.shadow_epochs + training * times, parts), steps, first

"""Chat rows (:mod:`shadowpeft.data.chat_rows`) to token sequences with the prompt masked, and the collator that pads them.

Two optional keys of a row address the two paths: ``"shadow_response"`` gives the shadow path another answer to the same prompt;
``"path"`` says who learns the row. A row with both answers becomes two sequences, each masking the other path; but one is
enough where the shadow's answer is the beginning of the base's, since both then read the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shadowpeft.chat_template import (
    RefusedByTemplate,
    is_special,
    render,
    render_prompt,
    stop_tokens,
    written_answer_ids,
)
from shadowpeft.core.losses import IGNORE
from shadowpeft.data.chat_rows import PATHS, ChatRow, check_row, read_file, read_jsonl, rows_digest
from shadowpeft.data.padding import pad, pad_inputs
from shadowpeft.data.turns import turn_spans
from shadowpeft.errors import DataError

__all__ = [
    "PATHS",
    "ChatCollator",
    "ChatDataset",
    "ChatRow",
    "Encoded",
    "Sequence",
    "Skipped",
    "answer_ids",
    "check_row",
    "encode",
    "prompt_ids",
    "read_file",
    "read_jsonl",
    "render_prompt",
    "rows_digest",
    "stop_tokens",
    "with_system",
]


@dataclass
class Sequence:
    """One training sequence: ``ids``, and where the answer starts; which paths learn it."""

    ids: list[int]
    start: int
    base: bool
    shadow: bool
    shadow_answer: list[int] | None = None
    """What the shadow path learns, if that is less than the whole answer: its first tokens, and then the end of the turn."""
    turns: list[tuple[int, int]] | None = None
    """Where the answers that are learnt begin and end, if there are several; None: one, from ``start`` to the end."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where what is learnt begins and ends."""
        return [(self.start, len(self.ids))] if self.turns is None else self.turns

    @property
    def learnt(self) -> list[int]:
        """The tokens that are learnt."""
        return [token for begin, end in self.spans for token in self.ids[begin:end]]

    def features(self) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``shadow_labels``, prompt tokens masked with -100, and ``length``."""
        nothing = [IGNORE] * len(self.ids)
        target = list(nothing)
        for begin, end in self.spans:
            target[begin:end] = self.ids[begin:end]
        own = target
        if self.shadow_answer is not None:
            own = (nothing[: self.start] + self.shadow_answer + nothing)[: len(self.ids)]
        return {
            "input_ids": self.ids,
            "labels": target if self.base else nothing,
            "shadow_labels": own if self.shadow else nothing,
            "length": len(self.ids),
        }

    def alone(self) -> Sequence:
        """What the shadow path learns, as a sequence of its own that never runs the base."""
        if self.turns is not None:
            return replace(self, base=False, shadow=True)
        answer = self.ids[self.start :] if self.shadow_answer is None else self.shadow_answer
        return Sequence(self.ids[: self.start] + answer, self.start, base=False, shadow=True)


@dataclass(frozen=True)
class Skipped:
    """Rows that were left out because an answer of theirs is too long."""

    rows: int
    of: int
    longest: int
    """Tokens of the longest sequence."""
    first: str
    """File and line."""
    max_length: int

    def __str__(self) -> str:
        return (
            f"{self.rows} of {self.of} rows are longer than data.max_length = {self.max_length} and are left out; the longest "
            f"has {self.longest} tokens, the first is {self.first}"
        )


class Encoded(list[Sequence]):
    """Sequences, and of how many rows they are."""

    rows = 0
    skipped: Skipped | None = None

    def record(self) -> dict[str, Any]:
        """``rows``, and ``skipped`` if there are such."""
        return {"rows": self.rows, **({"skipped": asdict(self.skipped)} if self.skipped else {})}


def encode(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    *,
    max_length: int,
    too_long: str = "error",
    system: str | None = None,
    every_turn: bool = False,
) -> Encoded:
    """Tokenise checked rows.

    Args:
        every_turn: learn every answer of a conversation, not the last one alone (:mod:`shadowpeft.data.turns`).
        max_length: longest sequence in tokens. too_long: "error", or "skip" to leave longer rows out.
        system: a system message to put before rows that bring none.

    Raises:
        DataError: if a row is longer and ``too_long`` is "error", nothing is left, or a row has what the template does not
            write.
    """
    sequences = Encoded()
    count, longest, left_out = 0, 0, []
    for count, row in enumerate(rows, 1):
        where = getattr(row, "where", "") or f"row {count}"
        own = _sequences(row, tokenizer, system, where, every_turn)
        fitting = _fitting(own, max_length, too_long, where)
        if len(fitting) < len(own):
            longest = max(longest, *(len(sequence.ids) for sequence in own))
            left_out.append(where)
        sequences += fitting
        sequences.rows += bool(fitting)
    if not sequences:
        raise DataError(f"no row is left: all {count} are longer than data.max_length = {max_length}")
    if left_out:
        sequences.skipped = Skipped(len(left_out), count, longest, left_out[0], max_length)
    return sequences


def encode_row(
    row: dict[str, Any], tokenizer: Any, *, max_length: int, too_long: str, system: str | None, every_turn: bool
) -> list[Sequence]:
    """The sequences of one checked row; see :func:`encode`."""
    where = getattr(row, "where", "") or "a row"
    return _fitting(_sequences(row, tokenizer, system, where, every_turn), max_length, too_long, where)


def _fitting(sequences: list[Sequence], max_length: int, too_long: str, where: str) -> list[Sequence]:
    length = max(len(sequence.ids) for sequence in sequences)
    if length > max_length and too_long == "error":
        raise DataError(
            f"{where} has {length} tokens but data.max_length is {max_length}; raise max_length, shorten the row, or set "
            "data.too_long: skip"
        )
    return [sequence for sequence in sequences if len(sequence.ids) <= max_length]


def _sequences(
    row: dict[str, Any], tokenizer: Any, system: str | None, where: str, every_turn: bool = False
) -> list[Sequence]:
    """One sequence, or two if the paths have answers of their own.

    Raises:
        DataError: starting with ``where``.
    """
    try:
        return _rendered(row, tokenizer, system, where, every_turn)
    except RefusedByTemplate as error:
        raise DataError(f"{where}: {error}") from error


def _rendered(row: dict[str, Any], tokenizer: Any, system: str | None, where: str, every_turn: bool) -> list[Sequence]:
    messages, beside = with_system(row["messages"], system), row.get("answer", {})
    # an answer that begins the conversation has no prompt
    learnt = [n for n, m in enumerate(messages) if n and m["role"] == "assistant" and m.get("weight") != 0]
    messages = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
    options: dict[str, Any] = {"tools": row["tools"]} if "tools" in row else {}
    if beside.keys() - {"tool_calls"}:  # a template that closes the thinking in the prompt has no place for it
        options["enable_thinking"] = True
    prompt = render_prompt(tokenizer, messages, **options)
    _check_written(tokenizer, row, messages, options, where)
    head = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    own = written_answer_ids(tokenizer, messages, prompt, row["response"], beside, **options)
    path = row["path"]
    if every_turn and learnt:
        last = {"role": "assistant", "content": row["response"], **beside}
        ids, spans = turn_spans(tokenizer, [*messages, last], [*learnt, len(messages)], where, options)
        several = Sequence(ids, spans[0][0], path in ("both", "base"), path in ("both", "shadow"), turns=spans)
        if row["shadow_response"] is None:
            return [several]
        other = written_answer_ids(tokenizer, messages, prompt, row["shadow_response"], **options)
        return [replace(several, shadow=False), Sequence(head + other, len(head), False, True)]
    if row["shadow_response"] is None:
        return [Sequence(head + own, len(head), path in ("both", "base"), path in ("both", "shadow"))]
    other = written_answer_ids(tokenizer, messages, prompt, row["shadow_response"], **options)
    if len(other) <= len(own) and other[:-1] == own[: len(other) - 1]:
        return [Sequence(head + own, len(head), True, True, other)]
    return [Sequence(head + own, len(head), True, False), Sequence(head + other, len(head), False, True)]


def _check_written(
    tokenizer: Any, row: dict[str, Any], messages: list[dict[str, Any]], options: dict[str, Any], where: str
) -> None:
    """Raise if the template leaves out tools, calls, or what the answer has beside its text."""
    turns = [*messages, {"role": "assistant", "content": row["response"], **row.get("answer", {})}]
    unread: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [("tools", turns, {})] if "tools" in row else []
    for n, turn in enumerate(turns):
        # what was thought in earlier turns is left out by design of many templates
        for key in ("tool_calls",) if n < len(messages) else row.get("answer", {}):
            if key in turn:
                bare = [*turns[:n], {k: v for k, v in turn.items() if k != key}, *turns[n + 1 :]]
                unread.append((key, bare, {"tools": row["tools"]} if "tools" in row else {}))
    if not unread:
        return
    whole = render(tokenizer, turns, **options)
    for key, bare, tools in unread:
        thinking = {k: v for k, v in options.items() if k == "enable_thinking"}
        if render(tokenizer, bare, **thinking, **tools) == whole:
            calls = ", name the tools in a file (data.tools; data check: --tools FILE), so that their calls are learnt as text"
            raise DataError(
                f"{where} has '{key}' but the tokenizer's chat template does not write it; use a base whose template does"
                f"{calls if key in ('tools', 'tool_calls') else ''}, or leave it out"
            )


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """``messages`` with ``system`` in front, unless they bring a system message of their own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt_ids(tokenizer: Any, messages: list[dict[str, Any]], **told: Any) -> list[int]:
    """Tokens of :func:`render_prompt`."""
    return list(tokenizer(render_prompt(tokenizer, messages, **told), add_special_tokens=False).input_ids)


def answer_ids(tokenizer: Any, messages: list[dict[str, Any]], answer: str, *, closed: bool = True) -> list[int]:
    """Tokens of an answer to ``messages`` as training sees them; without ``closed``, those that end the turn left out."""
    ids = written_answer_ids(tokenizer, messages, render_prompt(tokenizer, messages), answer)
    while not closed and len(ids) > 1 and is_special(tokenizer, ids[-1]):
        ids = ids[:-1]
    return ids


class ChatCollator:
    """Pads a batch of :meth:`Sequence.features` on the right to its longest row.

    Args:
        pad_token_id: token for padding; padded positions are masked in attention and labels.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` and ``shadow_labels``; all ``(B, T)``."""
        batch = pad_inputs([f["input_ids"] for f in features], self.pad_token_id)
        return {**batch, **{key: pad([f[key] for f in features], IGNORE) for key in ("labels", "shadow_labels")}}


class ChatDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded sequences for a Trainer.

    Args:
        parts: sizes of consecutive parts, each of which is shuffled alone, so that one follows the other; None: one part.
    """

    def __init__(self, sequences: list[Sequence], parts: list[int] | None = None) -> None:
        self.sequences, self.parts = sequences, parts or [len(sequences)]
        self.skipped: Skipped | None = getattr(sequences, "skipped", None)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sequences[index].features()

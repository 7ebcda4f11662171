"""Texts with a label, as the rows of a file: checked, and encoded for a sequence classifier of two paths.

A row is ``{"text": ..., "label": ...}``; a label is a string or a whole number. ``"path"`` ("both", "base", "shadow") says who
learns it. Other keys are left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shadowpeft.core.losses import IGNORE
from shadowpeft.data.chat import Encoded, Skipped
from shadowpeft.data.chat_rows import PATHS, ChatRow, named_keys, renamed, without_null
from shadowpeft.data.forms import rows_in
from shadowpeft.data.tasks.base import Example, FileTask, class_ids
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.messages import quote

FORM = "text, label"


def check_row(row: Any, where: str) -> dict[str, Any]:
    """A row with ``text``, ``label`` (a string) and ``path``.

    Raises:
        DataError: starting with ``where``, if something is missing or of the wrong type.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__} but must be an object")
    empty = [key for key in ("text", "label") if key in row and row[key] is None]
    row = without_null(row)
    if empty:
        raise DataError(f"{where} has nothing as '{empty[0]}'; write it, or leave the row out")
    if "text" not in row or "label" not in row:
        raise DataError(
            f"{where} has {named_keys(row)} but a classifier needs 'text' and 'label'; {renamed('text', 'label')}"
        )
    text, label, path = row["text"], row["label"], row.get("path", "both")
    if not isinstance(text, str):
        raise DataError(f"{where}: 'text' must be a string")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{where}: 'label' is {label!r} but must be a string or a whole number")
    if path not in PATHS:
        raise DataError(f"{where}: 'path' is {path!r} but must be one of {', '.join(PATHS)}")
    checked = ChatRow(text=text, label=str(label), path=path)
    checked.where, checked.form = where, FORM
    return checked


def labels_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The labels there are, in order: whole numbers by value, else by the alphabet.

    Raises:
        DataError: if there are fewer than two.
    """
    found = {row["label"] for row in rows}
    if len(found) < 2:
        raise DataError(f"the rows have the label {quote(min(found))} alone; a classifier needs two at least")
    numbers = all(_is_whole(label) for label in found)
    return sorted(found, key=lambda label: (int(label) if numbers else 0, label))


def _is_whole(label: str) -> bool:
    """Whether ``int`` reads it; neither ``²`` nor ``--5`` nor 5,000 digits."""
    return label.removeprefix("-").isdecimal() and len(label) < 4000


def check_learnt(labels: Sequence[str], learnt: Collection[str], max_length: int) -> None:
    """Whether each class has a training row that is not left out (``too_long: skip``).

    Raises:
        DataError: naming a label that has none.
    """
    bare = [label for label in labels if label not in learnt]
    if bare:
        raise DataError(
            f"every training row with the label {quote(bare[0])} is longer than data.max_length = {max_length} and left out, "
            "so that class would never be learnt; set data.too_long to cut, raise data.max_length, or remove these rows"
        )


@dataclass
class ClassSequence:
    """One training row: ``ids``, the index of its class, and which paths learn it."""

    ids: list[int]
    label: int
    base: bool
    shadow: bool

    def features(self) -> dict[str, Any]:
        """``input_ids``, and ``labels`` and ``shadow_labels``, -100 where a path does not learn."""
        return {
            "input_ids": self.ids,
            "labels": self.label if self.base else IGNORE,
            "shadow_labels": self.label if self.shadow else IGNORE,
        }

    def alone(self) -> ClassSequence:
        """The row for the shadow path alone."""
        return replace(self, base=False, shadow=True)


def encode(
    rows: Iterable[dict[str, Any]], tokenizer: Any, labels: Sequence[str], *, max_length: int, too_long: str = "error"
) -> Encoded:
    """Tokenise checked rows. No chat template: the pooled token is the text's last.

    Args:
        max_length: longest text in tokens. too_long: "error", "skip" to leave longer texts out, "cut" to read their beginning.

    Raises:
        DataError: if a text is longer and ``too_long`` is "error", a label is not among ``labels``, or nothing is left.
    """
    where_is = {label: i for i, label in enumerate(labels)}
    encoded, count, longest, left_out = Encoded(), 0, 0, []
    for count, row in enumerate(rows, 1):
        where = getattr(row, "where", "") or f"row {count}"
        if row["label"] not in where_is:
            raise DataError(
                f"{where} has the label {quote(row['label'])}, which no training row has; there are "
                f"{', '.join(map(quote, labels[:9]))}{', ...' if len(labels) > 9 else ''}"
            )
        ids = class_ids(tokenizer, row["text"], max_length if too_long == "cut" else 10**9)
        if len(ids) > max_length and too_long == "error":
            raise DataError(
                f"{where} has {len(ids)} tokens but data.max_length is {max_length}; raise max_length, or set data.too_long "
                "to cut or skip"
            )
        if len(ids) > max_length:
            longest = max(longest, len(ids))
            left_out.append(where)
            continue
        path = row["path"]
        learnt = ClassSequence(ids, where_is[row["label"]], path in ("both", "base"), path in ("both", "shadow"))
        encoded.append(learnt)  # type: ignore[arg-type]
        encoded.rows += 1
    if not encoded:
        raise DataError(f"no row is left: all {count} are longer than data.max_length = {max_length}")
    if left_out:
        encoded.skipped = Skipped(len(left_out), count, longest, left_out[0], max_length)
    return encoded


class ClassRows(FileTask):
    """Rows of a file as a task for a classifier; its record has accuracy.

    Args:
        file: its name in records. labels: of the adapter, in its order. rows: checked ones; None: those of the file.

    Raises:
        ConfigError: if the adapter has no record of its labels.
        DataError: naming file and place, if a row is malformed or has another label.
    """

    kind = "classify"

    def __init__(
        self, file: str | Path, labels: Sequence[str] | None, rows: Sequence[dict[str, Any]] | None = None
    ) -> None:
        if not labels:
            raise ConfigError("the adapter does not record its labels, so rows of a file cannot be judged; give --task")
        self.name, self.labels = str(file), tuple(labels)  # type: ignore[misc]
        self._rows = list(rows) if rows is not None else [check_row(row, where) for where, row in rows_in(file)]
        unknown = next((row for row in self._rows if row["label"] not in self.labels), None)
        if unknown is not None:
            where = getattr(unknown, "where", file)
            known = ", ".join(map(quote, self.labels[:10])) + (" and more" if len(self.labels) > 10 else "")
            raise DataError(
                f"{where} has the label {quote(unknown['label'])}, which the adapter has not learnt; it knows {known}"
            )

    def example(self, row: dict[str, Any], identity: str) -> Example:
        """The text, and the index of its label."""
        return Example(identity, row["text"], row["label"], self.labels.index(row["label"]), (), {"path": row["path"]})

    def for_path(self, examples: list[Example], path: str) -> list[Example]:
        """Rows that this path learns."""
        asked = [e for e in examples if e.meta["path"] in ("both", path)]
        if not asked:
            raise DataError(f"'{self.name}' has no row for the {path} path; leave out the modes that answer with it")
        return asked

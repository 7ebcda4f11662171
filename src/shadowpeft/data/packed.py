"""Several rows in one, so that no token is padding: positions begin at 0 with each, which keeps attention apart."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from shadowpeft.core.losses import IGNORE
from shadowpeft.data.chat import Sequence
from shadowpeft.data.padding import pad


@dataclass
class PackedRow:
    """Sequences put one after the other; all of them run the base, or none does."""

    parts: list[Sequence]

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return [token for part in self.parts for token in part.ids]

    @property
    def base(self) -> bool:
        """Whether the base learns anything of it."""
        return any(part.base for part in self.parts)

    @property
    def shadow(self) -> bool:
        """Whether the shadow learns anything of it."""
        return any(part.shadow for part in self.parts)

    @property
    def learnt(self) -> list[int]:
        """The tokens that are learnt."""
        return [token for part in self.parts for token in part.learnt]

    def features(self) -> dict[str, Any]:
        """``input_ids``, ``position_ids``, ``labels`` and ``shadow_labels``; no row is the target of the one before it."""
        made = [part.features() for part in self.parts]
        starts = [0, *accumulate(len(part.ids) for part in self.parts)][:-1]
        joined = {key: [v for each in made for v in each[key]] for key in ("input_ids", "labels", "shadow_labels")}
        for key in ("labels", "shadow_labels"):
            for start in starts:
                joined[key][start] = IGNORE
        positions = [i for part in self.parts for i in range(len(part.ids))]
        return {**joined, "position_ids": positions, "length": len(positions)}


def pack(sequences: Iterable[Sequence], max_length: int) -> list[PackedRow]:
    """Sequences in rows of at most ``max_length`` tokens: the longest first, each into the fullest row that has room.

    Sequences that only the shadow learns are packed among themselves, so that their rows never run the base.
    """
    rows: list[PackedRow] = []
    for base in (True, False):
        room: list[tuple[int, int]] = []  # free tokens and row, ascending
        for sequence in sorted((s for s in sequences if s.base == base), key=lambda s: -len(s.ids)):
            at = bisect_left(room, (len(sequence.ids), -1))
            if at == len(room):
                rows.append(PackedRow([sequence]))
                free, index = max_length, len(rows) - 1
            else:
                free, index = room.pop(at)
                rows[index].parts.append(sequence)
            insort(room, (free - len(sequence.ids), index))
    return rows


def pack_stream(sequences: Iterable[Sequence], max_length: int) -> Iterator[PackedRow]:
    """The same as they come: a row is given out when the next sequence has no room in it."""
    open_rows: dict[bool, PackedRow] = {}
    for sequence in sequences:
        row = open_rows.setdefault(sequence.base, PackedRow([]))
        if row.parts and len(row.ids) + len(sequence.ids) > max_length:
            yield row
            row = open_rows[sequence.base] = PackedRow([])
        row.parts.append(sequence)
    yield from (row for row in open_rows.values() if row.parts)


class PackedCollator:
    """Pads a batch of :meth:`PackedRow.features` on the right.

    There is no ``attention_mask``: attention is kept apart by ``position_ids``, and a cache would hide them, so there is none.

    Args:
        pad_token_id: token for padding; every padded token is at position 0, a row of its own without a target.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``position_ids``, ``labels`` and ``shadow_labels`` ``(B, T)``, and ``use_cache``."""
        whole = [{"position_ids": list(range(len(f["input_ids"]))), **f} for f in features]  # of a row that is not packed
        fill = {"input_ids": self.pad_token_id, "position_ids": 0, "labels": IGNORE, "shadow_labels": IGNORE}
        batch: dict[str, Tensor] = {key: pad([f[key] for f in whole], value) for key, value in fill.items()}
        return {**batch, "use_cache": False}

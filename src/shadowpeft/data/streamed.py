"""Training rows that are read while training, for data that do not fit into memory."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from shadowpeft.data.packed import pack_stream
from shadowpeft.data.sources import Source
from shadowpeft.errors import DataError

SAMPLE = 512
"""Rows that are looked at before training, to estimate lengths and tokens by; more if none of them can be learnt."""


class StreamedRows(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Features of rows, pass after pass without end; which come when is decided by the source and the seed alone.

    So a run that is resumed reads and leaves out what it has had, and goes on with the same rows.

    Args:
        read: gives one pass of rows in order, each as its encoded sequences, none for a row that is too long.
        buffer: sequences to draw the next one from. seed: of the draws.
        pack: tokens of a packed row; None: rows are not packed.
    """

    def __init__(self, read: Callable[[], Iterable[list[Any]]], *, buffer: int, seed: int, pack: int | None = None) -> None:
        self.read, self.buffer, self.seed, self.pack = read, buffer, seed, pack
        self.left_out = 0
        """Rows of the first pass that gave no sequence, as far as it was read."""

    def sample(self) -> list[Any]:
        """The first sequences of the source.

        Raises:
            DataError: if there is none.
        """
        found: list[Any] = []
        for number, row in enumerate(self.read(), 1):
            found += row
            if found and number >= SAMPLE:
                break
        if not found:
            raise DataError("data.train holds no rows that can be learnt; see `shadowpeft data check`")
        return found

    def __iter__(self) -> Iterator[dict[str, Any]]:
        sequences = self._sequences()
        rows = sequences if self.pack is None else pack_stream(sequences, self.pack)
        return (row.features() for row in rows)

    def _sequences(self) -> Iterator[Any]:
        for passes in count():
            draws = random.Random(f"{self.seed}/{passes}")
            waiting: list[Any] = []
            left_out = 0
            for row in self.read():
                left_out += not row
                if passes == 0:
                    self.left_out = left_out
                for sequence in row:
                    if len(waiting) < self.buffer:
                        waiting.append(sequence)
                        continue
                    at = draws.randrange(self.buffer)
                    waiting[at], out = sequence, waiting[at]
                    yield out
            draws.shuffle(waiting)
            yield from waiting


def fingerprint(source: Source) -> str | None:
    """sha256 of a file's bytes; None for a data set of ``datasets``, which only its name and revision tell."""
    if not source.is_file:
        return None
    digest = hashlib.sha256()
    with Path(str(source.path)).open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()

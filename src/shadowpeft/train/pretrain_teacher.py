"""The teacher of a pretraining run: the base's most likely tokens at every position of the text, computed before training."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainingArguments

from shadowpeft.data.corpora import shard_record
from shadowpeft.data.packing import PackedStream
from shadowpeft.data.teacher import TeacherCache
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.pretraining.base_ends import BaseEnds
from shadowpeft.hf.pretraining.model import SEPARATE, check_teacher_separation
from shadowpeft.runtime import DTYPES
from shadowpeft.storage import clear_leftovers
from shadowpeft.train.pretrain_config import PretrainConfig, Teacher
from shadowpeft.watching import Watched

SHARD_TOKENS = 2**16
"""About so many tokens are lost when a build is killed."""


@dataclass
class Lesson:
    """What the base of a run teaches, and where that is kept."""

    run: PretrainConfig
    teacher: Teacher
    folder: Path
    identity: dict[str, Any]
    """The base's fingerprint."""
    data: str
    """Fingerprint of the text as sequences."""
    sequences: int
    """That the run reads, unless the text ends before."""
    finished: bool = False
    """Whether the cache was there when the run began."""

    @classmethod
    def of(
        cls, run: PretrainConfig, base: BaseEnds, stream: PackedStream, tokenizer: Any, sequences: int
    ) -> Lesson | None:
        """The lesson of a run, compared with what its folder holds; None for ``loss: ce``. No layer of the base is read.

        Args:
            stream: of the run, from which nothing is taken. sequences: that the run reads.

        Raises:
            ConfigError: if the base has fewer than ``k`` tokens.
            DataError: if the folder holds something else, or too short a cache. BaseMismatchError: if it is another base's.
        """
        if run.teacher is None:
            return None
        rows = int(base.config.vocab_size)
        if run.teacher.k > rows:
            raise ConfigError(f"teacher.k is {run.teacher.k} but the base has a vocabulary of {rows}; lower it")
        folder = Path(run.teacher.folder or Path(run.output) / "teacher")
        lesson = cls(run, run.teacher, folder, base.fingerprint(), data_fingerprint(run, stream, tokenizer), sequences)
        lesson.finished = lesson.is_finished()
        if lesson.finished:
            lesson.open()
        return lesson

    @property
    def weights(self) -> tuple[float, float]:
        """Of cross-entropy and divergence."""
        return (1.0 if self.run.loss == "both" else 0.0, self.teacher.weight)

    def is_finished(self) -> bool:
        """Whether the folder holds the whole cache; False if it holds a part of it or nothing."""
        return TeacherCache.is_finished(self.folder, model=self.identity, data=self.data, k=self.teacher.k)

    def open(self) -> TeacherCache:
        """The finished cache.

        Raises:
            DataError: if it is damaged, or too short for the run.
        """
        clear_leftovers(self.folder)  # of a build that was killed after its last file
        cache = TeacherCache(self.folder, model=self.identity, data=self.data, k=self.teacher.k)
        if self.run.text.on_end == "repeat" and len(cache) < self.sequences:
            raise DataError(
                f"the teacher cache '{self.folder}' has {len(cache)} sequences but the run reads {self.sequences}; build one "
                "in another folder"
            )
        return cache

    def check_space(self) -> int:
        """Bytes that the cache still needs.

        Raises:
            ConfigError: if the disk has fewer.
        """
        whole = self.sequences * self.run.text.sequence_length * (6 * self.teacher.k + 4)
        there = sum(path.stat().st_size for path in self.folder.glob("shard-*"))
        place = next(parent for parent in self.folder.absolute().parents if parent.is_dir())
        free, needed = shutil.disk_usage(place).free, max(whole - there, 0)
        if needed > free:
            raise ConfigError(
                f"the teacher cache '{self.folder}' needs {needed / 1e9:.1f} GB more but {free / 1e9:.1f} GB are free; give "
                "another teacher.folder, or a lower teacher.k or number of tokens"
            )
        return needed


def data_fingerprint(run: PretrainConfig, stream: PackedStream, tokenizer: Any) -> str:
    """Of all that decides which sequences a run reads: settings of the text, seed, names and sizes of the shards, tokens;
    and of the precision in which the base reads them.

    What it does not see (a file changed within its size, a data set changed on the Hub) is found sequence by sequence, by
    :meth:`~shadowpeft.data.teacher.TeacherCache.look_up`.
    """
    content = {
        "text": run.text.model_dump(exclude={"validation", "validation_sequences"}),
        "seed": run.training.seed,
        "shards": [shard_record(source) for source in stream.mixture.sources],
        "end": stream.mixture.end,
        "tokens": tokenizer.get_vocab(),
        "precision": _precision(run),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _precision(run: PretrainConfig) -> str:
    return (run.teacher and run.teacher.precision) or run.training.precision


def make_cache(
    lesson: Lesson, stream: PackedStream, args: TrainingArguments, console: Console, *, quiet: bool = False
) -> TeacherCache:
    """The cache of a lesson; if it is not finished, one process loads the whole base and builds it or continues it.

    Args:
        stream: the sequences from the first on.

    Raises:
        ConfigError: if the base cannot be loaded or the disk is too small.
        UnsupportedModelError: if the base mixes the documents of a packed sequence.
        DataError: if the stream is not the one that a build was begun with.
    """
    if lesson.finished:
        return lesson.open()
    if args.process_index != 0:
        while not lesson.is_finished():
            time.sleep(1)  # no barrier: one that waits for hours is taken for a dead process
        return lesson.open()
    needed = lesson.check_space()
    if not quiet:
        console.print(
            f"the base reads {lesson.sequences:,} sequences once; what it says takes {needed / 1e9:.2f} GB in "
            f"'{lesson.folder}'"
        )
    precision = _precision(lesson.run)
    model: Any = load_base(lesson.run.base, dtype=DTYPES[precision])
    model.requires_grad_(False).to(args.device)
    check_teacher_separation(model, SEPARATE if precision == "float32" else 0.05)
    size, total = lesson.teacher.batch_size, lesson.sequences
    # whole batches in a shard: a build that goes on after a kill meets the same batches, so it computes the same bits
    per_shard = -(-max(SHARD_TOKENS // lesson.run.text.sequence_length, 1) // size) * size
    with Watched(console, "teacher", total, quiet=quiet) as watched:

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, total, size):
                sequences = list(islice(stream, min(size, total - start)))
                if not sequences:
                    return
                ids, positions = (
                    torch.from_numpy(np.stack([getattr(s, n) for s in sequences])) for n in ("ids", "positions")
                )
                yield ids, positions
                watched.update(start + len(sequences))

        k, data = lesson.teacher.k, lesson.data
        TeacherCache.build(model, batches(), lesson.folder, k, data=data, rows_per_shard=per_shard)
    return lesson.open()

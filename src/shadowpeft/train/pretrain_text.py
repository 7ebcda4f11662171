"""The text of a pretraining run: its stream of sequences, what is held out, and each process's micro-batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shadowpeft.data.corpora import (
    Encode,
    FileSource,
    HubSource,
    Mixture,
    Origin,
    Packed,
    PackedStream,
    Source,
    collate,
    find_shards,
)
from shadowpeft.data.teacher import TeacherCache
from shadowpeft.errors import AdapterFileError, ConfigError, DataError
from shadowpeft.messages import shorten
from shadowpeft.storage import write_json
from shadowpeft.train.pretrain_config import Corpus, PretrainConfig

STREAM, HELD = "stream.json", "stream.safetensors"


def make_source(
    corpus: Corpus, run: PretrainConfig, *, shuffle: bool, warn: Callable[[str], None] | None = None
) -> Source:
    """The source that a corpus of the configuration describes.

    Raises:
        DataError: if there is no such corpus. ConfigError: if a file's format is unknown.
    """
    if corpus.hub is not None:
        return HubSource(corpus.name, corpus.hub, config=corpus.config, split=corpus.split, field=corpus.field)
    return FileSource(
        corpus.name,
        find_shards(corpus.path, corpus.builtin, corpus.split),
        format=corpus.format,
        field=corpus.field,
        on_bad_shard=run.text.on_bad_shard,
        shuffle=shuffle,
        seed=run.training.seed,
        warn=warn,
    )


def make_stream(
    run: PretrainConfig, encode: Encode, end: int, warn: Callable[[str], None] | None = None
) -> PackedStream:
    """The training sequences of a run, from their beginning."""
    text, seed = run.text, run.training.seed
    sources = [make_source(corpus, run, shuffle=True, warn=warn) for corpus in text.corpora]
    mixture = Mixture(sources, [c.weight for c in text.corpora], encode, end, repeat=text.on_end == "repeat")
    return PackedStream(mixture, text.sequence_length, buffer=text.shuffle_buffer, seed=seed)


def check_enough(run: PretrainConfig, stream: PackedStream, sequences: int) -> None:
    """Read one step ahead on a stream of its own, so that text that cannot be read is refused before a folder is made.

    Raises:
        DataError: if a corpus is empty or damaged, or the text ends before the first step.
    """
    if len(list(islice(stream, sequences))) < sequences:
        raise DataError(
            f"the corpora end before the first step of {sequences * run.text.sequence_length:,} tokens; give more text, lower "
            "training.batch_size or set text.on_end: repeat"
        )


def end_token(run: PretrainConfig, tokenizer: Any) -> int:
    """Id of the token that ends a document.

    Raises:
        ConfigError: if the tokenizer has no such token.
    """
    token = run.text.end_of_document or tokenizer.eos_token
    number = None if token is None else tokenizer.get_vocab().get(token)
    if number is None:
        raise ConfigError(
            f"the tokenizer of '{run.base}' has no token {token!r} to end a document with; set text.end_of_document to one "
            "of its special tokens"
        )
    return int(number)


def hold_out(run: PretrainConfig, encode: Encode, end: int) -> dict[str, list[Packed]]:
    """The first sequences of each validation corpus, in order, from one pass.

    Raises:
        DataError: if a corpus does not fill one sequence.
    """
    held_out = {}
    for corpus in run.text.validation:
        mixture = Mixture([make_source(corpus, run, shuffle=False)], [1.0], encode, end, repeat=False)
        stream = PackedStream(mixture, run.text.sequence_length)
        held_out[corpus.name] = list(islice(stream, run.text.validation_sequences))
        if not held_out[corpus.name]:
            raise DataError(
                f"validation corpus '{corpus.name}' has {mixture.tokens[0]} tokens, which is no whole sequence of "
                f"{run.text.sequence_length}; give more text or lower text.sequence_length"
            )
    return held_out


@dataclass
class Consumed:
    """Where the text stands after a micro-batch: what a checkpoint and the result say, whatever has been read ahead."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]
    corpora: list[dict[str, Any]] = field(default_factory=list)
    """Name, tokens, documents and passes of each corpus."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    ended: str | None = None
    """The corpus whose end ended the text."""

    @classmethod
    def of(cls, stream: PackedStream) -> Consumed:
        """A copy of a stream's state."""
        mixture = stream.mixture
        numbers, tensors = stream.state()
        return cls(
            copy.deepcopy(numbers),
            tensors,
            [
                {"name": s.name, "tokens_read": n, "documents": d, "passes": p}
                for s, n, d, p in zip(mixture.sources, mixture.tokens, mixture.documents, mixture.passes, strict=True)
            ],
            [dict(vars(shard)) for s in mixture.sources if isinstance(s, FileSource) for shard in s.skipped],
            None if mixture.ended is None else mixture.sources[mixture.ended].name,
        )


class Batches:
    """This process's micro-batches of one stream.

    The first process reads for all and deals out ``size x processes`` sequences at a time; while a step runs, a thread
    tokenises the next ones. :attr:`consumed` is the state after the newest micro-batch that was handed out. With a ``teacher``
    a batch also has what the base says, ``teacher_ids`` and ``teacher_log_probs`` ``(B, T, k)``.
    """

    def __init__(self, stream: PackedStream, size: int, process: int = 0, processes: int = 1, keep: int = 1) -> None:
        self.stream, self.size, self.process, self.processes, self.keep = stream, size, process, processes, keep
        self.teacher: TeacherCache | None = None
        self.origins: dict[int, list[Origin]] = {}
        """Of the newest sequences by number, for messages."""
        self.consumed = Consumed.of(stream)
        self._reader = ThreadPoolExecutor(1, "text")
        self._ahead: Future[tuple[list[Packed], Consumed]] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        sequences = self._deal()
        if len(sequences) < self.size * self.processes:
            raise StopIteration
        own = sequences[self.process * self.size : (self.process + 1) * self.size]
        self.origins.update({s.number: s.origins for s in own})
        for number in sorted(self.origins)[: -self.keep * self.size]:
            del self.origins[number]
        batch = collate(own)
        if self.teacher is not None:
            batch["teacher_ids"], batch["teacher_log_probs"] = self.teacher.look_up(
                [s.number for s in own], batch["input_ids"]
            )
        return batch

    def _read(self) -> tuple[list[Packed], Consumed]:
        return list(islice(self.stream, self.size * self.processes)), Consumed.of(self.stream)

    def _deal(self) -> list[Packed]:
        """The next sequences of all processes: what the first one has read, or why it could not."""
        dealt: list[list[Packed] | DataError] = [[]]
        if self.process == 0:
            ahead = self._ahead or self._reader.submit(self._read)
            try:
                dealt[0], self.consumed = ahead.result()
                self._ahead = self._reader.submit(self._read)
            except DataError as error:
                dealt[0] = error
        if self.processes > 1:
            broadcast_object_list(dealt)
        if isinstance(dealt[0], DataError):
            raise dealt[0]
        return dealt[0]

    def where(self, number: int) -> str:
        """The documents of a sequence in words."""
        places = [self.stream.mixture.where(origin) for origin in self.origins.get(number, [])]
        shown = "; ".join(places[:3])
        return f"sequence {number} ({shown}{f'; {len(places) - 3} more' if len(places) > 3 else ''})"

    def save(self, folder: Path) -> None:
        """Write the state of the text into a checkpoint."""
        write_json(folder / STREAM, self.consumed.numbers)
        save_file(self.consumed.tensors, folder / HELD)

    def load(self, folder: Path) -> None:
        """Take the state from a checkpoint, before the first micro-batch.

        Raises:
            AdapterFileError: if it is missing or damaged.
        """
        try:
            numbers = json.loads((folder / STREAM).read_text(encoding="utf-8"))
            self.stream.load(numbers, load_file(folder / HELD))
            self.consumed = Consumed.of(self.stream)
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise AdapterFileError(
                f"the state of the text in '{folder}' cannot be read ({shorten(error)}); remove this checkpoint and resume "
                "from the one before"
            ) from error

"""Documents of several corpora mixed by weight, shuffled, packed into full sequences, and dealt out to the processes of a run.

What comes next depends on the corpora, the settings and the seed alone, not on how often the stream was stopped. A state
holds a few numbers and the documents that were read but not yet used: no text is read twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shadowpeft.core.losses import IGNORE
from shadowpeft.data.corpora import Origin, TextSource, stable_hash
from shadowpeft.data.teacher import TeacherCache
from shadowpeft.errors import AdapterFileError, DataError
from shadowpeft.json_text import parse_json
from shadowpeft.messages import shorten
from shadowpeft.storage import write_json

Encode = Callable[[str], list[int]]
STREAM, HELD = "stream.json", "stream.safetensors"


@dataclass(frozen=True)
class Document:
    """The tokens of one text, its end-of-document token included, and where it came from."""

    tokens: np.ndarray
    origin: Origin


@dataclass
class Mixture:
    """Documents of several corpora: each corpus gets the share of tokens that its weight says.

    The next document comes from the corpus that is furthest behind, which keeps the shares within one document of the
    weights at any time and needs no generator.

    Args:
        encode: text to tokens, without special tokens. end: the end-of-document token.
        repeat: whether a corpus that ends begins again; otherwise the mixture ends with it (:attr:`ended`).
    """

    sources: list[TextSource]
    weights: list[float]
    encode: Encode
    end: int
    repeat: bool = True
    tokens: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    ended: int | None = None
    """The corpus whose end ended the mixture."""

    def __post_init__(self) -> None:
        self.tokens, self.documents, self.passes, self._in_pass = ([0] * len(self.sources) for _ in range(4))

    def next(self) -> Document | None:
        """The next document, or None at the end.

        Raises:
            DataError: if a corpus holds no text at all, or a shard cannot be read.
        """
        if self.ended is not None:
            return None
        chosen = min(range(len(self.sources)), key=lambda i: (self.tokens[i] / self.weights[i], i))
        source = self.sources[chosen]
        while True:
            item = source.next()
            if item is None:
                if not self._in_pass[chosen]:
                    raise DataError(
                        f"corpus '{source.name}' holds no text: a whole pass gave no document; check its path, field and "
                        "format"
                    )
                self.passes[chosen] += 1
                self._in_pass[chosen] = 0
                if not self.repeat:
                    self.ended = chosen
                    return None
                continue
            text, shard, row = item
            if not text.strip():
                continue
            tokens = np.asarray([*self.encode(text), self.end], dtype=np.int32)
            self.tokens[chosen] += len(tokens)
            self.documents[chosen] += 1
            self._in_pass[chosen] += 1
            return Document(tokens, Origin(chosen, shard, row))

    def state(self) -> dict[str, Any]:
        """Counts, and where each source stands; a copy that later documents do not change."""
        return {
            "tokens": list(self.tokens),
            "documents": list(self.documents),
            "passes": list(self.passes),
            "in_pass": list(self._in_pass),
            "ended": self.ended,
            "sources": [source.state() for source in self.sources],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        self.tokens, self.documents, self.passes = (list(state[k]) for k in ("tokens", "documents", "passes"))
        self._in_pass, self.ended = list(state["in_pass"]), state["ended"]
        for source, each in zip(self.sources, state["sources"], strict=True):
            source.load(each)

    def where(self, origin: Origin) -> str:
        """A document's place in words."""
        source = self.sources[origin.corpus]
        return f"corpus '{source.name}', {source.where(origin.shard, origin.row)}"


@dataclass
class Packed:
    """A full sequence of ``T`` tokens made of documents, or parts of documents."""

    ids: np.ndarray
    """``(T,)`` int64."""
    positions: np.ndarray
    """``(T,)`` int64; they begin at 0 with each document, which is how attention is kept apart."""
    labels: np.ndarray
    """``(T,)`` int64: the ids, -100 at the first token of each document, which nothing before it should predict."""
    number: int
    """How many sequences came before it."""
    origins: list[Origin]
    """The documents in it."""


@dataclass(frozen=True)
class StreamState:
    """Everything that decides which sequence a stream gives next. It shares the documents and copies no token."""

    numbers: dict[str, Any]
    """JSON."""
    held: tuple[Document, ...]
    """Documents that were read but not yet used; the last one is the rest of a cut document if ``numbers["cut"]``."""

    @property
    def mixture(self) -> dict[str, Any]:
        """See :meth:`Mixture.state`."""
        return self.numbers["mixture"]  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """Write ``stream.json`` and ``stream.safetensors``."""
        tokens = [d.tokens for d in self.held] or [np.empty(0, dtype=np.int32)]
        tensors = {
            "tokens": torch.from_numpy(np.concatenate(tokens)),
            "lengths": torch.tensor([len(d.tokens) for d in self.held], dtype=torch.int64),
            "origins": torch.tensor([list(d.origin) for d in self.held], dtype=torch.int64).reshape(-1, 3),
        }
        write_json(folder / STREAM, self.numbers)
        save_file(tensors, folder / HELD)

    @classmethod
    def read(cls, folder: Path) -> StreamState:
        """What :meth:`save` wrote; raises whatever a missing or damaged file raises."""
        tensors = load_file(folder / HELD)
        parts = torch.split(tensors["tokens"], tensors["lengths"].tolist()) if len(tensors["lengths"]) else ()
        origins = tensors["origins"].tolist()
        held = [Document(part.numpy().copy(), Origin(*o)) for part, o in zip(parts, origins, strict=True)]
        return cls(parse_json((folder / STREAM).read_bytes()), tuple(held))


class PackedStream:
    """Sequences of a mixture: documents drawn from a shuffle buffer, put one after the other, cut at ``length``.

    A document that is cut goes on in the next sequence, at position 0.

    Args:
        length: ``T``. buffer: documents to draw from; 0 or 1 keeps the order. seed: of the draws.
    """

    def __init__(self, mixture: Mixture, length: int, *, buffer: int = 0, seed: int = 0) -> None:
        self.mixture, self.length, self.buffer, self.seed = mixture, length, buffer, seed
        self.number, self._draws = 0, 0
        self._waiting: list[Document] = []
        self._rest: Document | None = None

    def __iter__(self) -> PackedStream:
        return self

    def _document(self) -> Document | None:
        while len(self._waiting) < max(self.buffer, 1):
            document = self.mixture.next()
            if document is None:
                break
            self._waiting.append(document)
        if not self._waiting:
            return None
        chosen = stable_hash(self.seed, self._draws) % len(self._waiting)
        self._draws += 1
        self._waiting[chosen], self._waiting[-1] = self._waiting[-1], self._waiting[chosen]
        return self._waiting.pop()

    def __next__(self) -> Packed:
        """The next sequence.

        Raises:
            StopIteration: if the mixture has ended; what does not fill a sequence is left out.
        """
        ids = np.empty(self.length, dtype=np.int64)
        positions, labels = np.empty_like(ids), np.empty_like(ids)
        filled, origins = 0, []
        while filled < self.length:
            document = self._rest if self._rest is not None else self._document()
            if document is None:
                raise StopIteration
            tokens = document.tokens[: self.length - filled]
            part = slice(filled, filled + len(tokens))
            ids[part] = labels[part] = tokens
            labels[filled] = IGNORE
            positions[part] = np.arange(len(tokens))
            filled += len(tokens)
            origins.append(document.origin)
            left = document.tokens[len(tokens) :]
            self._rest = Document(left, document.origin) if len(left) else None
        self.number += 1
        return Packed(ids, positions, labels, self.number - 1, origins)

    def state(self) -> StreamState:
        """Where the stream stands."""
        numbers = {
            "number": self.number,
            "draws": self._draws,
            "cut": self._rest is not None,
            "mixture": self.mixture.state(),
        }
        return StreamState(numbers, (*self._waiting, *([] if self._rest is None else [self._rest])))

    def load(self, state: StreamState) -> None:
        """Stand where :meth:`state` was taken."""
        self.number, self._draws = state.numbers["number"], state.numbers["draws"]
        self.mixture.load(state.mixture)
        self._waiting = list(state.held)
        self._rest = self._waiting.pop() if state.numbers["cut"] else None


def collate(sequences: Sequence[Packed]) -> dict[str, Tensor]:
    """``B`` sequences as ``input_ids``, ``position_ids`` and ``labels``, each ``(B, T)``, and their ``numbers`` ``(B,)``."""
    return {
        "input_ids": torch.from_numpy(np.stack([s.ids for s in sequences])),
        "position_ids": torch.from_numpy(np.stack([s.positions for s in sequences])),
        "labels": torch.from_numpy(np.stack([s.labels for s in sequences])),
        "numbers": torch.tensor([s.number for s in sequences]),
    }


class Batches:
    """This process's micro-batches of a stream.

    The first process reads, tokenises and packs for all, in a thread, one step ahead of training, and each takes its own
    ``size`` of every ``size x processes`` sequences. Which document comes next depends on the number of tokens in all documents
    before it, so no process could read its own part alone. :attr:`state` is the stream's state at the last batch that was given
    out, however far the thread has read.

    With a ``teacher`` a batch also has what the base says, ``teacher_ids`` and ``teacher_log_probs`` ``(B, T, k)``.

    Args:
        size: sequences of a micro-batch. keep: micro-batches of a step.
    """

    def __init__(self, stream: PackedStream, size: int, process: int = 0, processes: int = 1, keep: int = 1) -> None:
        self.stream, self.size, self.process, self.processes, self.keep = stream, size, process, processes, keep
        self.state = stream.state()
        self.teacher: TeacherCache | None = None
        self.origins: dict[int, list[Origin]] = {}
        """Of the newest sequences by number, for messages."""
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: deque[Future[tuple[list[Packed], StreamState]]] = deque()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def _read(self) -> tuple[list[Packed], StreamState]:
        """The sequences of all processes for one micro-batch, fewer at the end of the text, and the state after them."""
        sequences = [s for _, s in zip(range(self.size * self.processes), self.stream, strict=False)]
        return sequences, self.stream.state()

    def _take(self) -> list[Packed]:
        while len(self._ahead) <= self.keep:
            self._ahead.append(self._reader.submit(self._read))
        sequences, self.state = self._ahead.popleft().result()
        return sequences

    def _dealt(self) -> list[Packed]:
        """What the first process takes, in every process; so is an error of the text, or the others would wait."""
        if self.processes == 1:
            return self._take()
        message: list[Any] = [None]
        if self.process == 0:
            try:
                message = [self._take()]
            except DataError as error:
                message = [error]
        torch.distributed.broadcast_object_list(message, src=0)
        if isinstance(message[0], DataError):
            raise message[0]
        return message[0]  # type: ignore[no-any-return]

    def __next__(self) -> dict[str, Tensor]:
        sequences = self._dealt()
        if len(sequences) < self.size * self.processes:
            raise StopIteration
        own = sequences[self.process * self.size : (self.process + 1) * self.size]
        self.origins.update({s.number: s.origins for s in own})
        for number in sorted(self.origins)[: -self.keep * self.size]:
            del self.origins[number]
        batch = collate(own)
        if self.teacher is not None:
            numbers = [s.number for s in own]
            batch["teacher_ids"], batch["teacher_log_probs"] = self.teacher.look_up(numbers, batch["input_ids"])
        return batch

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(cancel_futures=True)

    def where(self, number: int) -> str:
        """The documents of a sequence in words."""
        places = [self.stream.mixture.where(origin) for origin in self.origins.get(number, [])]
        shown = "; ".join(places[:3])
        return f"sequence {number} ({shown}{f'; {len(places) - 3} more' if len(places) > 3 else ''})"

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        self.state.save(folder)

    def load(self, folder: Path) -> None:
        """Take the state from a checkpoint, before the first batch.

        Raises:
            AdapterFileError: if it is missing or damaged.
        """
        try:
            self.stream.load(StreamState.read(folder))
        except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
            raise AdapterFileError(
                f"the state of the text in '{folder}' cannot be read ({shorten(error)}); remove this checkpoint and resume "
                "from the one before"
            ) from error
        self.state = self.stream.state()

"""What a base says about a packed stream of tokens, kept on disk: its ``k`` most likely next tokens at every position.

Distillation in pretraining reads the stream several times, or the base is too large to run beside the shadow; then the
base runs once, here. :func:`shadowpeft.core.teacher_loss` is the loss.

The folder of a cache::

    teacher.json            format_version, k, temperature, length, base (fingerprint), data, sequences (once complete)
    shard-00000.safetensors tokens int32 (n, T); ids int32 (n, T, k); log_probs float16 (n, T, k)
    shard-00001.safetensors ...

A shard is written beside and renamed, so a killed build leaves whole shards only and continues after them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shadowpeft.errors import AdapterFileError, BaseMismatchError, ConfigError, DataError
from shadowpeft.hf.base.fingerprint import check_fingerprint, fingerprint
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.weights import device_of
from shadowpeft.hf.files.reading import read_json
from shadowpeft.messages import quote, shorten
from shadowpeft.storage import partial_of, replace, write_text

INDEX = "teacher.json"
FORMAT_VERSION = 1
_PARTIAL = ".partial"
_KEYS = ("format_version", "k", "temperature", "length", "base", "data")


class TeacherCache:
    """A finished cache: ``cache[i]`` is what the base says about sequence ``i``.

    Args:
        folder: what :meth:`build` has written.
        model: the base, or its fingerprint; if given, the fingerprint is compared with the recorded one.
        data: fingerprint of the data; if given, it is compared with the recorded one.
        k: if given, it is compared with the recorded one.

    Raises:
        DataError: if the folder holds no cache, an unfinished or a damaged one, or one of other data or another ``k``.
        BaseMismatchError: if it is another base's.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: nn.Module | dict[str, Any] | None = None,
        data: str | None = None,
        k: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        record = _read_record(self.folder)
        if type(record.get("sequences")) is not int:
            raise DataError(
                f"the teacher cache '{self.folder}' is not finished; run its build again, which continues it"
            )
        _compare(self.folder, record, model=model, data=data, k=k)
        self.k = int(record["k"])
        """Tokens known at each position."""
        self.temperature = float(record["temperature"])
        """``t``: the log-probabilities are those of ``softmax(logits / t)``."""
        self.length = int(record["length"])
        """``T``: tokens of a sequence."""
        self.data = str(record["data"])
        """Fingerprint of the data."""
        self._shards = _shards(self.folder)
        self._ends = _ends(self._shards, record)
        if self._ends[-1:] != [record["sequences"]]:
            raise DataError(
                f"the teacher cache '{self.folder}' holds {(self._ends or [0])[-1]} sequences but its index says "
                f"{record['sequences']}; shards are missing, build it anew in another folder"
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The base's likely tokens after each token of sequence ``index``.

        Returns:
            ``ids`` ``(T, k)`` int64, most likely first, and their ``log_probs`` ``(T, k)`` float32. Row ``t`` is about the
            token that follows token ``t``, so it belongs to the same position as the label ``tokens[t + 1]``; the last row
            has no label within its sequence. What ``k`` tokens leave of the probability is ``1 - sum exp(log_probs)``.
        """
        ids, log_probs = self._read(index, "ids", "log_probs")
        return ids.long(), log_probs.float()

    def look_up(self, numbers: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the base says about the sequences ``numbers``, which must be those that it read.

        Args:
            tokens: ``(B, T)``, theirs.

        Returns:
            ``ids`` ``(B, T, k)`` int64 and ``log_probs`` ``(B, T, k)`` float32, as :meth:`__getitem__` gives them.

        Raises:
            DataError: if a sequence has other tokens, or is none of the cache's.
        """
        found = []
        for number, row in zip(numbers, tokens, strict=True):
            if not 0 <= number < len(self):
                raise DataError(
                    f"sequence {number} was asked for but the teacher cache '{self.folder}' has {len(self)}; build one of "
                    "this text in another folder"
                )
            known, ids, log_probs = self._read(number, "tokens", "ids", "log_probs")
            if not torch.equal(known.long(), row.cpu().long()):
                raise DataError(
                    f"sequence {number} of the stream differs from the one in the teacher cache '{self.folder}'; build other "
                    "data into another folder"
                )
            found.append((ids.long(), log_probs.float()))
        return torch.stack([ids for ids, _ in found]), torch.stack([log_probs for _, log_probs in found])

    def tokens(self, index: int) -> Tensor:
        """The tokens of sequence ``index``, ``(T,)`` int64, as the base read them."""
        return self._read(index, "tokens")[0].long()

    def _read(self, index: int, *names: str) -> list[Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} was asked for but the teacher cache has {len(self)}")
        index %= len(self)
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        path = self._shards[shard]
        try:
            with safe_open(path, framework="pt") as file:  # only the row is read
                return [file.get_slice(name)[row] for name in names]
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path} cannot be read ({shorten(error)}); build the cache anew in another folder"
            ) from error

    @staticmethod
    def is_finished(
        folder: str | Path, *, model: nn.Module | dict[str, Any], data: str, k: int, temperature: float = 1.0
    ) -> bool:
        """Whether a build of these arguments is finished in ``folder``; False if it was cut short or never begun.

        Raises:
            DataError, BaseMismatchError: as :meth:`build`, if the folder holds anything else.
        """
        record = _look(Path(folder), model, data, k, temperature)
        return record is not None and type(record.get("sequences")) is int

    @classmethod
    def build(
        cls,
        model: nn.Module,
        batches: Iterable[Tensor | tuple[Tensor, Tensor]],
        folder: str | Path,
        k: int,
        *,
        data: str = "",
        temperature: float = 1.0,
        rows_per_shard: int = 256,
        chunk: int = 512,
        progress: Callable[[int], None] | None = None,
    ) -> TeacherCache:
        """Run the base once over ``batches`` and keep its ``k`` most likely tokens; continues a build that was cut short.

        Sequences are numbered in the order of the batches. A build that is called again with the same arguments skips what
        is whole on disk, after comparing its tokens with those of the batches, and gives the same files. One that is
        finished computes nothing. ``4 k + 2 k + 4`` bytes a token.

        Args:
            model: a causal language model, run in evaluation mode and without gradients; its mode is put back.
            batches: int tensors ``(B, T)`` without padding, all of one ``T``; ``B`` may vary. Packed documents come as a pair
                with the positions ``(B, T)``, which begin at 0 with each. Every call must give the same sequences in the same
                order; batches that are on disk are iterated over, not run.
            folder: is made if it does not exist; it must hold nothing else.
            k: tokens to keep, at most ``V``.
            data: fingerprint of the data, recorded and compared when the cache is opened or continued.
            temperature: ``t`` of ``softmax(logits / t)``; give the same to :func:`shadowpeft.core.teacher_loss`.
            rows_per_shard: sequences in a file; what a kill loses at most.
            chunk: positions at a time whose probabilities are formed.
            progress: called with the number of sequences that are on disk, after every shard.

        Raises:
            ConfigError: if ``k`` or ``temperature`` is impossible, or a batch has another form.
            DataError: if the folder holds a cache of other data, another ``k``, or other tokens.
            BaseMismatchError: if it holds another base's.
        """
        if type(k) is not int or k < 1 or not 0 < temperature < 1e6 or rows_per_shard < 1:
            raise ConfigError(
                f"k is {k!r}, temperature {temperature!r} and rows_per_shard {rows_per_shard!r}; all must be positive"
            )
        folder = Path(folder)
        record = _start(folder, model, k, data, temperature)
        done = _shards(folder)
        sink = _Sink(folder, record, done, rows_per_shard, progress)
        training = model.training
        model.eval()
        try:
            for batch in batches:
                rows, places = batch if isinstance(batch, tuple) else (batch, None)
                sink.add(rows, partial(_likely, model, rows, places, k=k, temperature=temperature, chunk=chunk))
        finally:
            model.train(training)
        sink.finish()
        return cls(folder, model=model, data=data, k=k)


class _Sink:
    """Where sequences go: compared with what is on disk, or gathered into shards."""

    def __init__(
        self,
        folder: Path,
        record: dict[str, Any],
        shards: list[Path],
        rows_per_shard: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.folder, self.record, self.shards = folder, record, shards
        self.ends = _ends(shards, record)
        self.rows_per_shard, self.progress = rows_per_shard, progress
        self.seen = 0
        self.written = self.ends[-1] if shards else 0
        self.waiting: list[dict[str, Tensor]] = []
        self.known: tuple[int, Tensor] | None = None

    def add(self, batch: Tensor, likely: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Take a batch; ``likely`` is called with the number of its first rows that are on disk, if there are others."""
        length = self.record.get("length") or (batch.shape[1] if batch.dim() == 2 else 0)
        if batch.dim() != 2 or batch.is_floating_point() or batch.shape[1] != length or not length:
            raise ConfigError(
                f"a batch has shape {tuple(batch.shape)} and dtype {batch.dtype} but must be (B, {length or 'T'}) of token "
                "ids; pack the stream into sequences of one length"
            )
        if self.record.get("length") is None:
            self.record["length"] = length
            _write_index(self.folder, self.record)
        old = max(min(self.written - self.seen, len(batch)), 0)
        for row in batch[:old]:
            self._compare(row.cpu())
        new = batch[old:]
        self.seen += len(new)
        if not len(new):
            return
        if type(self.record.get("sequences")) is int:
            raise DataError(
                f"the teacher cache '{self.folder}' is finished with {self.written} sequences but there are more; build them "
                "into another folder"
            )
        ids, log_probs = likely(old)
        self.waiting.append({"tokens": new.cpu().int(), "ids": ids.cpu().int(), "log_probs": log_probs.cpu().half()})
        while sum(len(part["tokens"]) for part in self.waiting) >= self.rows_per_shard:
            self._write(self.rows_per_shard)

    def _compare(self, row: Tensor) -> None:
        shard = bisect_right(self.ends, self.seen)
        if self.known is None or self.known[0] != shard:
            with safe_open(self.shards[shard], framework="pt") as file:
                self.known = (shard, file.get_tensor("tokens"))
        first = self.ends[shard - 1] if shard else 0
        if not torch.equal(self.known[1][self.seen - first].long(), row.long()):
            raise DataError(
                f"sequence {self.seen} of the stream differs from the one in the teacher cache '{self.folder}'; build other "
                "data into another folder"
            )
        self.seen += 1

    def _write(self, rows: int) -> None:
        whole = {name: torch.cat([part[name] for part in self.waiting]) for name in self.waiting[0]}
        rest = {name: value[rows:] for name, value in whole.items()}
        self.waiting = [rest] if len(rest["tokens"]) else []
        path = self.folder / f"shard-{len(self.shards):05d}.safetensors"
        beside = path.with_name(path.name + _PARTIAL)
        save_file({name: value[:rows].contiguous() for name, value in whole.items()}, beside)
        replace(beside, path)
        self.shards.append(path)
        self.written += min(rows, len(whole["tokens"]))
        self.ends.append(self.written)
        if self.progress is not None:
            self.progress(self.written)

    def finish(self) -> None:
        """Write what waits and the number of sequences, which marks the cache as finished."""
        if self.waiting:
            self._write(sum(len(part["tokens"]) for part in self.waiting))
        if self.seen < self.written:
            raise DataError(
                f"the stream has {self.seen} sequences but the teacher cache '{self.folder}' holds {self.written}; build other "
                "data into another folder"
            )
        if not self.seen:
            raise DataError(f"there are no sequences to build the teacher cache '{self.folder}' from; check the data")
        if self.record.get("sequences") != self.seen:
            self.record["sequences"] = self.seen
            _write_index(self.folder, self.record)


@torch.no_grad()
def _likely(
    model: Any, batch: Tensor, positions: Tensor | None, first: int, *, k: int, temperature: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """The ``k`` most likely tokens after each of ``batch[first:]`` ``(B, T)`` and their log-probabilities, ``(B, T, k)``."""
    batch, device = batch[first:], device_of(model)
    inputs = {"input_ids": batch.long().to(device)}
    if positions is not None:
        inputs["position_ids"] = positions[first:].long().to(device)
    logits = model(**inputs, use_cache=False).logits
    if k > logits.shape[-1]:
        raise ConfigError(f"k is {k} but the base has a vocabulary of {logits.shape[-1]}; lower k")
    if not bool(torch.isfinite(logits).all()):
        raise DataError("the base's logits are not finite, so there is nothing to learn from; load it in a wider dtype")
    flat = logits.flatten(0, 1)
    ids, log_probs = [], []
    for start in range(0, len(flat), chunk):
        part = flat[start : start + chunk].float() / temperature
        values, chosen = part.topk(k)
        ids.append(chosen)
        log_probs.append(values - part.logsumexp(-1, keepdim=True))
    shape = (*batch.shape, k)
    return torch.cat(ids).view(shape), torch.cat(log_probs).view(shape)


def _start(folder: Path, model: nn.Module, k: int, data: str, temperature: float) -> dict[str, Any]:
    """The record of the build: of the one that is continued, or a new one."""
    found = _look(folder, model, data, k, temperature)
    if found is not None:
        for path in folder.glob(f"shard-*{_PARTIAL}"):
            path.unlink()
        return found
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format_version": FORMAT_VERSION,
        "k": k,
        "temperature": temperature,
        "length": None,
        "base": fingerprint(model, find_decoder(model)),
        "data": data,
    }
    _write_index(folder, record)
    return record


def _look(
    folder: Path, model: nn.Module | dict[str, Any], data: str, k: int, temperature: float
) -> dict[str, Any] | None:
    """The record of a build of these arguments, or None if the folder is empty or not there."""
    if (folder / INDEX).is_file():
        record = _read_record(folder)
        _compare(folder, record, model=model, data=data, k=k)
        if record["temperature"] != temperature:
            raise DataError(
                f"the teacher cache '{folder}' has temperature {record['temperature']}, not {temperature}; build into another "
                "folder"
            )
        return record
    # another process may have made the index since the line above looked
    fresh = (INDEX, partial_of(folder / INDEX).name)
    if folder.exists() and (not folder.is_dir() or any(p.name not in fresh for p in folder.iterdir())):
        raise DataError(f"'{folder}' is no teacher cache and not empty; choose another folder")
    return None


def _read_record(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise DataError(f"'{folder}' has no {INDEX}, so it is no teacher cache; make one with TeacherCache.build")
    try:
        record = read_json(folder / INDEX)
    except AdapterFileError as error:
        raise DataError(str(error)) from error
    missing = [key for key in _KEYS if key not in record]
    if missing or record["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{folder / INDEX} has format version {quote(record.get('format_version'))} and lacks {missing}; this shadowpeft "
            f"reads version {FORMAT_VERSION}, build the cache anew"
        )
    return record


def _compare(
    folder: Path,
    record: dict[str, Any],
    *,
    model: nn.Module | dict[str, Any] | None,
    data: str | None,
    k: int | None,
) -> None:
    for name, value in (("data", data), ("k", k)):
        if value is not None and record[name] != value:
            raise DataError(
                f"the teacher cache '{folder}' has {name} = {quote(record[name])}, not {quote(value)}; use another folder"
            )
    if model is not None:
        found = model if isinstance(model, dict) else fingerprint(model, find_decoder(model))
        try:
            check_fingerprint(record["base"], found)
        except BaseMismatchError as error:
            raise BaseMismatchError(
                f"the teacher cache '{folder}' is of another base: {str(error).partition(';')[0]}; use another folder"
            ) from error


def _shards(folder: Path) -> list[Path]:
    """The whole shards, in order; a gap ends them."""
    found: list[Path] = []
    while (path := folder / f"shard-{len(found):05d}.safetensors").is_file():
        found.append(path)
    return found


def _ends(shards: list[Path], record: dict[str, Any]) -> list[int]:
    """For each shard the number of sequences up to its end; every header must say what the index says."""
    ends: list[int] = []
    total = 0
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{path} cannot be read ({shorten(error)}); build the cache anew in another folder"
            ) from error
        rows = shapes.get("tokens", (0,))[0]
        length, k = record["length"], record["k"]
        if shapes != {"tokens": (rows, length), "ids": (rows, length, k), "log_probs": (rows, length, k)}:
            raise DataError(f"{path} holds {shapes}, not {length} tokens with {k} each; build the cache anew")
        total += rows
        ends.append(total)
    return ends


def _write_index(folder: Path, record: dict[str, Any]) -> None:
    write_text(folder / INDEX, json.dumps(record, indent=2, sort_keys=True) + "\n")

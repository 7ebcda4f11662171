"""What a base says about a packed stream of tokens, kept on disk: its ``k`` most likely next tokens at every position.

Distillation in pretraining reads the stream several times, or the base is too large to run beside the shadow; then the
base runs once, here. :func:`shadowpeft.core.teacher_loss` is the loss.

The files are described in :mod:`shadowpeft.data.teacher_folder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from shadowpeft.data.teacher_folder import INDEX, BaseIdentity, CacheFolder
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.hf.base.weights import device_of

__all__ = ["INDEX", "TeacherCache"]


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
        model: BaseIdentity | None = None,
        data: str | None = None,
        k: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._files = files = CacheFolder(self.folder)
        if not files.is_finished:
            raise DataError(
                f"the teacher cache '{self.folder}' is not finished; run its build again, which continues it"
            )
        files.compare(model, data, k)
        record = files.record
        self.k = int(record["k"])
        """Tokens known at each position."""
        self.temperature = float(record["temperature"])
        """``t``: the log-probabilities are those of ``softmax(logits / t)``."""
        self.length = int(record["length"])
        """``T``: tokens of a sequence."""
        self.data = str(record["data"])
        """Fingerprint of the data."""
        files.find_shards()
        if files.count != record["sequences"]:
            raise DataError(
                f"the teacher cache '{self.folder}' holds {files.count} sequences but its index says {record['sequences']}; "
                "shards are missing, build it anew in another folder"
            )

    def __len__(self) -> int:
        """Number of sequences."""
        return self._files.count

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
        known = []
        for number, row in zip(numbers, tokens, strict=True):
            if not 0 <= number < len(self):
                raise DataError(
                    f"sequence {number} was asked for but the teacher cache '{self.folder}' has {len(self)}; build one of "
                    "this text in another folder"
                )
            read, ids, log_probs = self._read(number, "tokens", "ids", "log_probs")
            self._files.check_same(number, read, row)
            known.append((ids.long(), log_probs.float()))
        return torch.stack([ids for ids, _ in known]), torch.stack([log_probs for _, log_probs in known])

    def tokens(self, index: int) -> Tensor:
        """The tokens of sequence ``index``, ``(T,)`` int64, as the base read them."""
        return self._read(index, "tokens")[0].long()

    def _read(self, index: int, *names: str) -> list[Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} was asked for but the teacher cache has {len(self)}")
        return self._files.read(index % len(self), *names)

    @staticmethod
    def is_finished(folder: str | Path, *, model: BaseIdentity, data: str, k: int, temperature: float = 1.0) -> bool:
        """Whether a build of these arguments is finished in ``folder``; False if it was cut short or never begun.

        Raises:
            DataError, BaseMismatchError: as :meth:`build`, if the folder holds anything else.
        """
        files = CacheFolder.look(Path(folder), model, data, k, temperature)
        return files is not None and files.is_finished

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
        build = _Build(CacheFolder.begin(folder, model, data, k, temperature), rows_per_shard, progress)
        training = model.training
        model.eval()
        try:
            for batch in batches:
                rows, places = batch if isinstance(batch, tuple) else (batch, None)
                build.add(rows, partial(_likely, model, rows, places, k=k, temperature=temperature, chunk=chunk))
        finally:
            model.train(training)
        build.finish()
        return cls(folder, model=model, data=data, k=k)


class _Build:
    """Where sequences go: compared with what is on disk, or gathered into shards."""

    def __init__(self, files: CacheFolder, rows_per_shard: int, progress: Callable[[int], None] | None) -> None:
        self.files, self.rows_per_shard, self.progress = files, rows_per_shard, progress
        self.seen = 0
        self.waiting: dict[str, Tensor] = {}
        self.known: tuple[int, Tensor] | None = None
        """The shard that is being compared, and its tokens."""

    def add(self, batch: Tensor, likely: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Take a batch; ``likely`` is called with the number of its first rows that are on disk, if there are others."""
        length = self.files.record["length"] or (batch.shape[1] if batch.dim() == 2 else 0)
        if batch.dim() != 2 or batch.is_floating_point() or batch.shape[1] != length or not length:
            raise ConfigError(
                f"a batch has shape {tuple(batch.shape)} and dtype {batch.dtype} but must be (B, {length or 'T'}) of token "
                "ids; pack the stream into sequences of one length"
            )
        if self.files.record["length"] is None:
            self.files.note(length=length)
        old = max(min(self.files.count - self.seen, len(batch)), 0)
        for row in batch[:old]:
            self._compare(row)
        new = batch[old:]
        self.seen += len(new)
        if not len(new):
            return
        if self.files.is_finished:
            raise DataError(
                f"the teacher cache '{self.files.path}' is finished with {self.files.count} sequences but there are more; "
                "build them into another folder"
            )
        ids, log_probs = likely(old)
        rows = {"tokens": new.cpu().int(), "ids": ids.cpu().int(), "log_probs": log_probs.cpu().half()}
        self.waiting = {k: torch.cat([self.waiting[k], v]) if self.waiting else v for k, v in rows.items()}
        while len(self.waiting["tokens"]) >= self.rows_per_shard:
            self._write(self.rows_per_shard)

    def _compare(self, row: Tensor) -> None:
        shard, place = self.files.place(self.seen)
        if self.known is None or self.known[0] != shard:
            with safe_open(self.files.shards[shard], framework="pt") as file:
                self.known = (shard, file.get_tensor("tokens"))
        self.files.check_same(self.seen, self.known[1][place], row)
        self.seen += 1

    def _write(self, rows: int) -> None:
        self.files.add({name: value[:rows] for name, value in self.waiting.items()})
        self.waiting = {name: value[rows:] for name, value in self.waiting.items()}
        if self.progress is not None:
            self.progress(self.files.count)

    def finish(self) -> None:
        """Write what waits and the number of sequences, which marks the cache as finished."""
        if self.waiting and len(self.waiting["tokens"]):
            self._write(len(self.waiting["tokens"]))
        path, count = self.files.path, self.files.count
        if self.seen < count:
            raise DataError(
                f"the stream has {self.seen} sequences but the teacher cache '{path}' holds {count}; build other data into "
                "another folder"
            )
        if not self.seen:
            raise DataError(f"there are no sequences to build the teacher cache '{path}' from; check the data")
        if self.files.record.get("sequences") != self.seen:
            self.files.note(sequences=self.seen)


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

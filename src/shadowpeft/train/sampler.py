"""The order of training rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochSampler(LengthGroupedSampler):
    """Batches of rows of similar length, in an order that seed and epoch alone decide.

    The stock sampler runs through each 50 batches from long to short: on the robot set that is Chinese, then English, over
    and over, and both losses went up by 1 at every return (LOG.md); here the batches are shuffled. The stock sampler also
    draws from the global generator, whose state at the start of an epoch is gone when a run is resumed in the middle of a
    second epoch; such a run would see other rows. ``parts``: sizes of consecutive parts that follow one another, each shuffled
    alone.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int, parts: list[int] | None = None) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch, self.parts = seed, 0, parts or [len(lengths)]

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = []
        for size in self.parts:
            order += [len(order) + row for row in self._part(len(order), size, generator)]
        return iter(order)

    def _part(self, start: int, size: int, generator: torch.Generator) -> list[int]:
        """The order of ``size`` rows from ``start`` on, counted from there."""
        order = get_length_grouped_indices(self.lengths[start : start + size], self.batch_size, generator=generator)
        whole = size - size % self.batch_size
        batches = [order[i : i + self.batch_size] for i in range(0, whole, self.batch_size)]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return [row for batch in shuffled for row in batch] + order[whole:]

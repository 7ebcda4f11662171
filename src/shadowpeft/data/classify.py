"""Texts with a class, encoded (:func:`shadowpeft.data.tasks.class_ids`): a data set, and the collator that pads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowpeft.core.losses import IGNORE
from shadowpeft.data.padding import pad_inputs
from shadowpeft.errors import DataError


class ClassDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded texts and their class indices for a Trainer.

    Args:
        shadow_epochs: how many times the shadow path learns all texts alone, without the base, before both paths do; ``parts``
            then has the number of texts of each pass, for the trainer's sampler.
    """

    def __init__(self, ids: list[list[int]], classes: list[int], shadow_epochs: int = 0) -> None:
        if len(ids) != len(classes):
            raise DataError(f"there are {len(ids)} texts but {len(classes)} classes; give one class per text")
        self.ids, self.classes = ids, classes
        self.parts = [len(ids)] * (shadow_epochs + 1)

    def __len__(self) -> int:
        return sum(self.parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} was asked for but there are {len(self)}")  # what ends an iteration
        passes, i = divmod(index, len(self.ids))
        alone = passes < len(self.parts) - 1
        row = {"input_ids": self.ids[i], "labels": IGNORE if alone else self.classes[i]}
        return row if len(self.parts) == 1 else {**row, "shadow_labels": self.classes[i]}


class ClassCollator:
    """Pads a batch on the right to its longest row.

    Args:
        pad_token_id: token for padding; the base pools the last token that is not it, so it must not end a text.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(B, T)``, ``labels`` and, where rows have them, ``shadow_labels`` ``(B,)``."""
        batch = pad_inputs([f["input_ids"] for f in features], self.pad_token_id)
        names = [name for name in ("labels", "shadow_labels") if name in features[0]]
        return {**batch, **{name: torch.tensor([f[name] for f in features]) for name in names}}

"""Texts with a class, encoded (:func:`shadowpeft.data.tasks.class_ids`): a data set, and the collator that pads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowpeft.data.padding import pad_inputs
from shadowpeft.errors import DataError


class ClassDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded texts and their class indices for a Trainer."""

    def __init__(self, ids: list[list[int]], classes: list[int]) -> None:
        if len(ids) != len(classes):
            raise DataError(f"there are {len(ids)} texts but {len(classes)} classes; give one class per text")
        self.ids, self.classes = ids, classes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.classes[index]}


class ClassCollator:
    """Pads a batch on the right to its longest row.

    Args:
        pad_token_id: token for padding; the base pools the last token that is not it, so it must not end a text.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(B, T)``, ``labels`` ``(B,)``."""
        batch = pad_inputs([f["input_ids"] for f in features], self.pad_token_id)
        return {**batch, "labels": torch.tensor([f["labels"] for f in features])}

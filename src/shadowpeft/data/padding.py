"""Rows of tokens of any lengths as one tensor.

transformers' ``DataCollatorForSeq2Seq`` is not used: it wants the whole tokenizer, pads on the side which that happens to have
set, and knows one kind of labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right", device: Any = None) -> Tensor:
    """``(B, T)`` int64, the shorter rows filled with ``value`` on one side."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side).to(device)


def pad_inputs(
    rows: Sequence[Sequence[int]], pad_token_id: int, side: str = "right", device: Any = None
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` ``(B, T)`` of rows of tokens; a padding token inside a row is a token."""
    mask = [[1] * len(row) for row in rows]
    return {"input_ids": pad(rows, pad_token_id, side, device), "attention_mask": pad(mask, 0, side, device)}

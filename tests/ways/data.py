"""Rows with very different numbers of targets, and the callback that keeps the gradients of an optimiser step."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tiny import padded, tokens

LAMBDA = 0.7


class KeepGradients(TrainerCallback):
    """Copies the gradients just before the optimiser uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            n.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
            for n, p in model.named_parameters()
            if p.requires_grad and p.grad is not None
        }


def rows(shadow_labels: bool = False, seed: int = 3) -> list[dict[str, Any]]:
    """Four padded rows with 9, 2, 4 and 9 targets."""
    ids, mask = padded(tokens(4, 10, seed), [0, 4, 1, 0])
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, :4] = -100
    labels[2, :5] = -100
    made = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(4)]
    if shadow_labels:
        for i, row in enumerate(made):
            row["shadow_labels"] = ids[i].roll(1).masked_fill(mask[i] == 0, -100)
            row["shadow_labels"][: 2 + i] = -100
    return made


def whole(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {k: torch.stack([row[k] for row in data]) for k in data[0]}


def smooth(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A ``compute_loss_func``: cross-entropy summed over tokens and divided by their number."""
    logits, goals = outputs["logits"][:, :-1], labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), goals.flatten(), reduction="sum")
    return total / ((goals != -100).sum() if num_items_in_batch is None else num_items_in_batch)

"""Losses (Eqs. 8-9): how many targets a path has, a path's cross-entropy, and the joint loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100

HeadLoss = Callable[[Tensor, Tensor], Tensor]


def count_targets(labels: Tensor, *, shifted: bool) -> Tensor:
    """Number of unmasked targets as a 0-d int tensor; with ``shifted`` the first token of a row is never a target.

    Args:
        labels: ``(B, T)`` token labels (``shifted=True``) or ``(B,)`` classes; -100 is ignored.
    """
    return ((labels[..., 1:] if shifted else labels) != IGNORE).sum()


def token_cross_entropy(logits: Tensor, targets: Tensor, count: Tensor | int) -> Tensor:
    """``sum CE / max(count, 1)``: a path with no target gives a graph-connected 0, never NaN.

    Args:
        logits: ``(N, V)``; taken to float32. targets: ``(N,)`` int64, -100 ignored.
        count: number of targets to normalise by, over the whole accumulated batch.
    """
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def joint_loss(task_loss: Tensor, shadow_loss: Tensor, weight: float) -> Tensor:
    """``L = L_task + lambda * L_shadow`` (Eqs. 8-9), all 0-d."""
    return task_loss + weight * shadow_loss.to(task_loss.device)


class _HeadLoss(torch.autograd.Function):
    """Sum of a loss over rows, with the gradient for the rows taken while the logits exist, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, loss: HeadLoss, chunk: int) -> Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(rows)
        for start in range(0, rows.shape[0], chunk):
            part = rows[start : start + chunk].detach().requires_grad_(True)
            with torch.enable_grad():
                value = loss(part, targets[start : start + chunk])
                (gradient[start : start + chunk],) = torch.autograd.grad(value, part)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None


def head_loss(rows: Tensor, targets: Tensor, loss: HeadLoss, *, frozen: bool, chunk: int = 512) -> Tensor:
    """``sum_i loss(head(rows_i), targets_i)`` without ever holding ``(N, V)`` logits, for a frozen head.

    The head's weights get no gradient, so the gradient for ``rows`` is all the backward pass needs and can be taken
    chunk by chunk in the forward pass: memory is ``chunk x V`` instead of ``3 N V``, and no logits are computed twice.

    Args:
        rows: ``(N, d)`` states at the positions that have a target. targets: ``(N,)``.
        loss: maps ``(n, d)`` states and ``(n,)`` targets to the 0-d *sum* of their losses.
        frozen: whether the head has no trainable weight; otherwise autograd runs through it as usual.

    Returns:
        0-d float32, connected to ``rows`` also when ``N = 0``.
    """
    if frozen and rows.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _HeadLoss.apply(rows, targets, loss, chunk)  # type: ignore[no-any-return, no-untyped-call]
    return loss(rows, targets).float()

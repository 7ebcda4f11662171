"""Losses (Eqs. 8-9): how many targets a path has, a path's cross-entropy, the joint loss; and distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowpeft.errors import ConfigError
from shadowpeft.ops import rewritten

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


def distillation_kl(logits: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``t^2 KL(p || q)`` by row, with ``p = softmax(teacher / t)`` and ``q = softmax(logits / t)``.

    ``t^2`` keeps the size of the gradient (Hinton et al., "Distilling the knowledge in a neural network", section 2).

    Args:
        logits: the student's ``(N, V)``. teacher: ``(N, V)``; no gradient flows into it. Both are taken to float32.

    Returns:
        ``(N,)`` float32, in nats.
    """
    log_q = (logits.float() / temperature).log_softmax(-1)
    log_p = (teacher.detach().to(log_q.device).float() / temperature).log_softmax(-1)
    return temperature * temperature * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def acceptance_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """``-log a`` by row, where ``a = sum_i min(p_i, q_i)`` is how often a token drawn from ``q`` stays as a draft for ``p``.

    The likelihood-based LK loss (arXiv 2602.23881). ``a`` is one minus the total variation distance of ``p = softmax(teacher)``
    and ``q = softmax(logits)``; with the logarithm a row of small ``a`` has a gradient as large as any other's. Computed from
    logarithms, so that an ``a`` below float32's smallest number has a value and a gradient.

    Args:
        logits: the student's ``(N, V)``. teacher: ``(N, V)``; no gradient flows into it. Both are taken to float32.

    Returns:
        ``(N,)`` float32, in nats.
    """
    log_q = logits.float().log_softmax(-1)
    log_p = teacher.detach().to(log_q.device).float().log_softmax(-1)
    return -torch.minimum(log_q, log_p).logsumexp(-1)


def topk_kl(logits: Tensor, ids: Tensor, log_probs: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``t^2 KL`` by row from a teacher of which only the ``k`` most likely tokens are known.

    The other ``V - k`` tokens are one event, for teacher and student alike:
    ``sum_i p_i (log p_i - log q_i) + p_rest (log p_rest - log q_rest)``. By the log-sum inequality this is at most the
    divergence over all tokens, and it is that for ``k = V``.

    Args:
        logits: the student's ``(N, V)``, taken to float32. ids: ``(N, k)`` int64, the teacher's tokens, none twice.
        log_probs: ``(N, k)`` their log-probabilities under ``softmax(teacher / t)``. temperature: ``t``.

    Returns:
        ``(N,)`` float32, in nats.
    """
    scaled = logits.float() / temperature
    log_p = log_probs.to(scaled.device).float()
    ids = ids.to(scaled.device)
    log_z = scaled.logsumexp(-1)
    known = (log_p.exp() * (log_p - scaled.gather(-1, ids) + log_z[..., None])).sum(-1)
    if ids.shape[-1] == scaled.shape[-1]:
        return temperature * temperature * known
    rest = (1.0 - log_p.exp().sum(-1)).clamp(min=0.0)  # stored in 16 bits the known ones may add up to more than 1
    log_q_rest = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1) - log_z
    entropy: Tensor = torch.special.xlogy(rest, rest)
    return temperature * temperature * (known + entropy - rest * log_q_rest)


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
        if torch.is_grad_enabled():
            raise ConfigError(
                "a gradient of a gradient was asked for (create_graph=True) but the loss over a frozen head keeps only the "
                "first; pass return_shadow=True without labels and compute both losses from out.logits and out.shadow_logits"
            )
        return gradient * grads[0].to(gradient.dtype), None, None, None


def teacher_loss(
    rows: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    frozen: bool,
    temperature: float = 1.0,
    chunk: int = 512,
) -> Tensor:
    """Sum of :func:`topk_kl` over rows, with ``chunk x V`` logits at a time for a frozen head (see :func:`head_loss`).

    Args:
        rows: the student's states ``(N, d)``. ids, log_probs: the teacher's ``(N, k)``, as
            :class:`shadowpeft.data.teacher.TeacherCache` gives them by sequence. head: ``(n, d)`` to logits ``(n, V)``.
        frozen: whether ``head`` has no trainable weight.

    Returns:
        0-d float32; divide it by the number of positions that count.
    """

    def loss(part: Tensor, index: Tensor) -> Tensor:
        return topk_kl(head(part), ids[index], log_probs[index], temperature=temperature).sum()

    return head_loss(rows, torch.arange(len(rows), device=ids.device), loss, frozen=frozen, chunk=chunk)


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
    if frozen and rows.requires_grad and torch.is_grad_enabled() and not rewritten():
        return _HeadLoss.apply(rows, targets, loss, chunk)  # type: ignore[no-any-return, no-untyped-call]
    return loss(rows, targets).float()

"""Nobody trains without the shadow's loss by accident.

A trainer that takes the model's loss gets the joint loss. Some compute their own from the logits: Trainer with label
smoothing or ``compute_loss_func``, TRL's trainers. The functions here are identities on what such a trainer reads; their
backward passes either add what is missing or raise :class:`~shadowpeft.errors.UnsupervisedShadowError`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowpeft.errors import UnsupervisedShadowError

_REMEDY = (
    "train with shadowpeft.ShadowTrainer (or put shadowpeft.ShadowLossMixin before the class of a trainer that learns from "
    "labels), pass labels= and use out.loss, pass return_shadow=True and compute both losses yourself, or, with any other loss "
    "of your trainer's own, set auxiliary_loss_weight=0"
)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise UnsupervisedShadowError(
            "gradients reached a forward pass that was given no labels, so the shadow would train without its loss "
            f"(auxiliary_loss_weight > 0); {_REMEDY}"
        )


def refuse_gradients(logits: Tensor) -> Tensor:
    """``logits``, which raise in the backward pass: no labels were given, so there is no shadow loss to add."""
    return _Refuse.apply(logits)  # type: ignore[no-any-return]


def refuse_states(output: Any) -> Any:
    """The output of a backbone that was called without its head, whose hidden states raise in the backward pass."""
    if isinstance(output, tuple):
        return tuple(_refused(each) for each in output)
    for name in ("last_hidden_state", "hidden_states"):
        if output.get(name) is not None:
            output[name] = _refused(output[name])
    return output


def _refused(states: Any) -> Any:
    """A tensor, or a tuple of them; whatever else an output has stays as it is."""
    if isinstance(states, tuple):
        return tuple(_refused(each) for each in states)
    return refuse_gradients(states) if isinstance(states, Tensor) and states.requires_grad else states


def guard_states(states: tuple[Tensor, ...], witness: _Witness | None) -> tuple[Tensor, ...]:
    """The hidden states of a whole pass: a loss from them must contain the shadow's, which ``witness`` sees; None: there is
    none, so they raise."""
    if witness is None:
        return _refused(states)  # type: ignore[no-any-return]
    return tuple(_Demand.apply(each, witness) if each.requires_grad else each for each in states)


class _Witness:
    """Whether both ends of one forward pass took part in a backward pass."""

    def __init__(self) -> None:
        self.seen = False


# Both hand on their input as it is (detached in a forward pass without a graph, so that it may be changed in place), and take
# an undefined gradient, as DistributedDataParallel gives to what its loss does not contain, for none.
class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, witness: _Witness) -> Tensor:
        ctx.witness = witness
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        if grads[0] is not None:
            ctx.witness.seen = True
        return grads[0], None


class _Demand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, witness: _Witness) -> Tensor:
        ctx.witness = witness
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        witness = ctx.witness
        if grads[0] is None:
            return None, None

        def check() -> None:
            if not witness.seen:
                raise UnsupervisedShadowError(
                    "out.shadow_loss was computed, but the loss that was differentiated contains neither it nor out.loss; add "
                    "auxiliary_loss_weight * out.shadow_loss to your own loss, give it to shadowpeft.ShadowTrainer as "
                    f"compute_loss_func, or {_REMEDY}"
                )

        torch.autograd.Variable._execution_engine.queue_callback(check)  # type: ignore[attr-defined]
        return grads[0], None


def demand_both(logits: Tensor, shadow_loss: Tensor) -> tuple[Tensor, Tensor, _Witness]:
    """``logits`` and ``shadow_loss``, such that a backward pass through the first without the second raises at its end; and
    what sees it."""
    witness = _Witness()
    return _Demand.apply(logits, witness), _Mark.apply(shadow_loss, witness), witness


class _JoinLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, shadow_sum: Tensor, mask: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.weight = weight
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        gradient = grads[0]
        per_token = gradient[mask]
        # Of L = -sum(log p) / N the gradient of every log p is the same -1/N, and -1/N is also what scales the shadow's
        # sum. A trainer that weights its tokens (DFT, DPO, policy gradients) has no such N.
        # With one sequence all tokens have one weight; where that is an advantage, some sequence's has the other sign.
        alike = per_token.numel() == 0 or torch.allclose(per_token, per_token[0].expand_as(per_token), rtol=1e-4, atol=0.0)
        if not alike or bool((per_token > 0).any()):
            raise UnsupervisedShadowError(
                "the trainer weights the tokens of its loss, so the shadow's loss has no defined share in it; set "
                "auxiliary_loss_weight=0 for this trainer"
            )
        share = -per_token[0] if per_token.numel() else gradient.new_zeros(())
        return gradient, ctx.weight * share, None, None


def join_log_probs(log_probs: Tensor, shadow_sum: Tensor, mask: Tensor, weight: float) -> Tensor:
    """``log_probs`` unchanged in value, whose gradient also trains the shadow (TRL's fused LM head).

    For a loss ``-sum(log_probs[mask]) / N`` the gradient is that of ``(sum nll + lambda * shadow_sum) / N``.

    Args:
        log_probs: ``(B, T')`` of the targets. shadow_sum: 0-d sum of the shadow's negative log-likelihoods.
        mask: ``(B, T')`` which positions count. weight: lambda.
    """
    return _JoinLogProbs.apply(log_probs, shadow_sum, mask, weight)  # type: ignore[no-any-return]

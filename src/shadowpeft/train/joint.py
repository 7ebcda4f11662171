"""What the trainer of two paths asks of a batch and of its base class: which rows are whose, and whose loss is computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from shadowpeft.core import count_targets, token_cross_entropy
from shadowpeft.core.losses import IGNORE
from shadowpeft.hf.layer import ShadowHub, find_hub


@contextmanager
def both_losses(model: nn.Module) -> Iterator[list[tuple[Any, Any, Any]]]:
    """``(task_loss, shadow_loss, n)`` of every forward inside: accelerate's copy of a compiled output has lost the attributes.

    ``n`` is the number of targets by which TRL's fused head has divided its losses, else None.
    """
    seen: list[tuple[Any, Any, Any]] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if hasattr(output, "shadow_loss"):
            mask = getattr(output, "label_mask", None)
            task = output.task_loss  # a copy: over several processes Trainer scales the loss of an evaluation in place
            task = None if task is None else task.detach().clone()
            seen.append((task, output.shadow_loss, None if mask is None else mask.sum()))

    handle = model.register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def runs_again_for_outputs(trainer: Any) -> bool:
    """Whether the outputs cost a second forward pass, as with TRL's fused head; a compiled model may pass the hook by."""
    return is_from_trl(trainer) and not trainer.args.torch_compile


def loss_is_stock(trainer: Any, mixin: type) -> bool:
    """Whether the class below the ``mixin`` that computes the loss is transformers' Trainer, which reads no logits in training;
    TRL's trainers have metrics of them, and nobody knows of others.
    """
    mro = type(trainer).__mro__
    below = mro[mro.index(mixin) + 1 :]
    return next(kind for kind in below if "compute_loss" in vars(kind)) is Trainer


def is_from_trl(trainer: Any) -> bool:
    """Whether one of the trainer's classes is TRL's."""
    return any(base.__module__.startswith("trl.") for base in type(trainer).__mro__)


def mean_loss(history: list[dict[str, float]]) -> float | None:
    """Mean training loss of a step over the whole run, from its logged means; None if nothing was logged."""
    total, last = 0.0, 0.0
    for record in history:
        if "loss" in record:
            total += record["loss"] * (record["step"] - last)
            last = record["step"]
    return total / last if last else None


def shifts(trainer: Any) -> bool:
    """Whether the target at a position is the label of the next one, as in a language model."""
    hub: ShadowHub = find_hub(trainer.model)
    name = hub.active_name()
    return name is None or not hub.is_classifier(name)


def plain_loss(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Mean cross-entropy of the targets, without smoothing."""
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return token_cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), count_targets(labels, shifted=False)
    )


def device_scale(trainer: Any, items: Any) -> float:
    """What stock Trainer multiplies a loss with, whose targets were counted over all processes."""
    if not trainer.args.average_tokens_across_devices or items is None:
        return 1.0
    return float(trainer.accelerator.num_processes // trainer.get_tp_size())


def shadow_only_rows(labels: Tensor, inputs: dict[str, Any]) -> Tensor | None:
    """Mask ``(B,)`` of rows without a task target, or None if there are none (or the batch cannot be split by row)."""
    if labels.is_floating_point():  # targets of a regression
        return None
    only = labels == IGNORE if labels.dim() == 1 else (labels[:, 1:] == IGNORE).all(-1)
    if not bool(only.any()):
        return None
    rows = labels.shape[0]
    splittable = all(not isinstance(v, Tensor) or (v.dim() and v.shape[0] == rows) for v in inputs.values())
    return only if splittable else None


def split_rows(inputs: dict[str, Any], only: Tensor) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The rows of a batch but for those of the mask ``only`` ``(B,)`` (None: there are no others), and those."""
    def take(mask: Tensor) -> dict[str, Any]:
        part = {k: v[mask] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        length = int(part["attention_mask"].sum(-1).max()) if "attention_mask" in part else None
        if length is not None and bool(part["attention_mask"][:, 0].all()):  # right padding: drop columns nobody uses
            part = {k: v[:, :length] if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in part.items()}
        return part

    return (None if bool(only.all()) else take(~only)), take(only)

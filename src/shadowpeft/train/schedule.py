"""A run whose shadow trains alone first: its learning rates, and the step from which on it may be frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments, get_scheduler

from shadowpeft.errors import ConfigError
from shadowpeft.hf.layer import find_hub
from shadowpeft.presets import TRAINING
from shadowpeft.train.sections import TrainingSection


def two_courses(
    args: TrainingArguments, optimizer: Any, steps: int, shadow_steps: int, *, freezes: bool = False
) -> LambdaLR:
    """The schedule of ``args``, warm-up included, once over ``steps`` and once over those after ``shadow_steps``.

    Args:
        optimizer: whose groups say with ``is_shadow`` which course is theirs.
        freezes: the shadow's ends at ``shadow_steps``.

    Raises:
        ConfigError: if the schedule is none that gives a factor for each step.
    """

    def course(length: int) -> Callable[[int], float]:
        stock = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            args.get_warmup_steps(length),
            length,
            args.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
        if not isinstance(stock, LambdaLR):
            raise ConfigError(
                f"the schedule is {args.lr_scheduler_type} but the shadow trains alone first, for which it must be linear, "
                "cosine, constant or constant_with_warmup"
            )
        factor: Callable[[int], float] = stock.lr_lambdas[0]
        return factor

    whole, rest = course(shadow_steps if freezes else steps), course(steps - shadow_steps)
    return LambdaLR(
        optimizer,
        [
            whole if group.get("is_shadow") else lambda step: rest(max(0, step - shadow_steps))
            for group in optimizer.param_groups
        ],
    )


def check_warmup(t: TrainingSection, preset: str, steps: int, alone: int) -> None:
    """Refuse a warm-up that a new run would not honour.

    Args:
        preset: whose own warm-up nobody need have asked for. steps: of the whole run. alone: of these, the shadow's.

    Raises:
        ConfigError: if it is no number of steps, the schedule has none, or it never ends.
    """
    asked = t.warmup not in (0, type(t)().warmup, TRAINING.get(preset, {}).get("warmup"))
    if t.scheduler == "constant" and asked:
        raise ConfigError(
            f"training.warmup is {t.warmup:g} but training.scheduler is constant, which has none; use constant_with_warmup, or "
            "leave warmup out"
        )
    if t.warmup > 1 and t.warmup % 1:
        raise ConfigError(
            f"training.warmup is {t.warmup:g} but must be a share of the steps below 1, or a whole number of them"
        )
    left = steps - alone
    if left > 1 and t.warmup >= left:
        what = "in which both paths train" if alone else "in all"
        raise ConfigError(
            f"training.warmup is {t.warmup:g} steps but there are {left} {what}, so the learning rate is never reached; give "
            "fewer, or a share such as 0.1"
        )


class FreezeShadow(TrainerCallback):
    """Freezes the shadow before the step ``after``, in a resumed run too.

    Args:
        after: steps. Gradients are off from then on, so that nothing is computed for them.
    """

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Once is enough; again changes nothing."""
        if state.global_step >= self.after:
            hub = find_hub(model)
            if (name := hub.active_name()) is not None:
                hub.freeze_shadow(name)

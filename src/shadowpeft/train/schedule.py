"""Learning rates of a run whose shadow trains alone first: the backbone's over the whole run, all others' over the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from shadowpeft.errors import ConfigError


def two_courses(args: TrainingArguments, optimizer: Any, steps: int, shadow_steps: int) -> LambdaLR:
    """The schedule of ``args``, warm-up included, once over ``steps`` and once over those after ``shadow_steps``.

    Args:
        optimizer: whose groups say with ``is_backbone`` which course is theirs.

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

    whole, rest = course(steps), course(steps - shadow_steps)
    return LambdaLR(
        optimizer,
        [
            whole if group.get("is_backbone") else lambda step: rest(max(0, step - shadow_steps))
            for group in optimizer.param_groups
        ],
    )

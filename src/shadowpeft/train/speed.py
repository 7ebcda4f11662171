"""How many steps of a run fit into a given time, by measuring some of them."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from shadowpeft.data import chat
from shadowpeft.errors import ConfigError
from shadowpeft.hf.layer import find_hub
from shadowpeft.json_text import parse_json
from shadowpeft.train.sections import TrainingSection
from shadowpeft.train.trainer import ShadowTrainer

STEPS = 8
"""Steps of a trial, of which each has rows of another length, from the shortest to the longest."""
ENOUGH = 2.0
"""Seconds that a trial takes at least."""
MOST = 30.0
"""Seconds after which a trial ends however few steps it has had."""

Build = Callable[[chat.ChatDataset, TrainingSection, Path, list[TrainerCallback]], ShadowTrainer]
"""Makes the trainer of a trial from its rows, its settings, its folder and what watches it."""


def planned_in(checkpoint: str) -> int:
    """The steps that a run had chosen, from its checkpoint.

    Raises:
        ConfigError: if the checkpoint is damaged.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        return int(parse_json(file.read_bytes())["max_steps"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"'{file}' cannot be read ({error}); remove this checkpoint and resume from the one before"
        ) from error


def steps_in_time(
    t: TrainingSection, rows: Sequence[Any], alone: Sequence[Any], model: nn.Module, build: Build
) -> tuple[int, float]:
    """The steps that fit into ``t.target_minutes``, and the seconds that one takes in which both paths learn.

    The model is trained in trials and gets its weights back. Steps of the shadow alone are measured by themselves.

    Args:
        rows: of an epoch of both paths. alone: of an epoch of the shadow, of which ``t.shadow_epochs`` come first.

    Raises:
        ConfigError: if the shadow's epochs alone take longer.
    """
    assert t.target_minutes is not None
    batch = t.batch_size * t.gradient_accumulation
    seconds, before, first = 60 * t.target_minutes, 0, 0.0
    hub = find_hub(model)
    already = set(hub.frozen)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    try:
        if t.shadow_epochs:
            before = math.ceil(len(alone) * t.shadow_epochs / batch)
            first = before * _seconds_of_a_step(t, alone, build)
            if t.freeze_shadow:
                hub.freeze_shadow("default")
        each = _seconds_of_a_step(t, rows, build)
    finally:
        hub.frozen -= {"default"} - already
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in trained:
                    parameter.requires_grad_(True).copy_(trained[name])
    steps = before + int((seconds - first) / each)
    if t.shadow_epochs and steps <= before:
        raise ConfigError(
            f"training.target_minutes is {t.target_minutes:g} but {t.shadow_epochs} epochs of the shadow alone take "
            f"{first / 60:.1f} minutes; raise it or lower training.shadow_epochs"
        )
    return max(steps, 1), each


def _seconds_of_a_step(t: TrainingSection, rows: Sequence[Any], build: Build) -> float:
    ordered = sorted(rows, key=lambda row: len(row.ids))
    wanted = STEPS * t.batch_size * t.gradient_accumulation
    chosen = [ordered[i * len(ordered) // wanted] for i in range(wanted)]
    quiet: dict[str, Any] = {
        "max_steps": 1_000_000,
        "epochs": None,
        "target_minutes": None,
        "shadow_epochs": 0,
        "eval_every": None,
        "save_every": None,
        "load_best": False,
        "patience": None,
        "log_every": 1_000_000,
        "report_to": [],
    }
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        build(chat.ChatDataset(chosen), t.model_copy(update=quiet), Path(folder), [watch]).train()
    return watch.mean


class _Stopwatch(TrainerCallback):
    """Ends a trial after whole passes over its rows; the first step, which prepares much, does not count."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Note the time."""
        self.ends.append(time.monotonic())
        taken, counted = self.ends[-1] - self.ends[0], len(self.ends) - 1
        whole = counted and counted % STEPS == 0
        if (whole and taken >= ENOUGH) or (counted and taken >= MOST):
            control.should_training_stop = True
        return control

    @property
    def mean(self) -> float:
        """Seconds of a step."""
        return max((self.ends[-1] - self.ends[0]) / (len(self.ends) - 1), 1e-6)

"""What a person sees while a run goes on, and what stays of it: a progress line, metrics.jsonl, a loss plot."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json
from shadowpeft.storage import whole, write_text
from shadowpeft.watching import Watched


class RunCallback(TrainerCallback):
    """Progress with ETA, tokens per second and both losses (without a terminal a line a minute); metrics as JSONL; a clean
    stop on Ctrl-C.

    The first Ctrl-C ends training after the current step with a checkpoint; a second one ends the process.

    Args:
        folder: the run folder, where ``metrics.jsonl`` goes. tokens_per_step: mean tokens of an optimiser step.
        writes: whether this process keeps the records (one of several does).
    """

    def __init__(
        self, folder: Path, tokens_per_step: float, console: Console, quiet: bool = False, *, writes: bool = True
    ) -> None:
        self.folder = folder
        self.tokens_per_step = tokens_per_step
        self.console = console
        self.quiet = quiet or not writes
        self.writes = writes
        self.interrupted = False
        self._watched: Watched | None = None
        self._note = ""
        self._previous: Any = None
        self._started = 0.0
        self.first = 0
        self.before = 0.0
        """Seconds of training before this session, as far as they were recorded."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar and take over Ctrl-C."""
        self._started, self.first = time.monotonic(), state.global_step
        # a resumed run repeats what came after its checkpoint: keep only the records that the checkpoint knows
        metrics = self.folder / "metrics.jsonl"
        records = read_metrics(self.folder)
        known = [record["seconds"] for record in records if is_number(record.get("seconds"))]
        self.before = max(known, default=0.0)
        if self.writes and metrics.is_file():
            kept = records[: len(state.log_history)]
            write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._watched = Watched(self.console, "training", state.max_steps, done=self.first, quiet=self.quiet)
        try:
            self._previous = signal.signal(signal.SIGINT, self._interrupt)
        except ValueError:  # not the main thread: Ctrl-C is somebody else's
            self._previous = None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.console.print("stopping after this step; press Ctrl-C again to stop at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Advance the bar; after Ctrl-C, save and stop."""
        if self._watched is not None:
            self._watched.update(state.global_step, self._note)
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = True
        if self.interrupted or control.should_save or state.global_step >= state.max_steps:
            # the last steps are part of the record however long log_every is, and the sums since the last record are
            # not part of a checkpoint
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append to ``metrics.jsonl`` and show the newest losses."""
        if not self.writes:
            return
        record = {"step": state.global_step, **(logs or {})}
        seconds = time.monotonic() - self._started
        rate = (state.global_step - self.first) * self.tokens_per_step / max(seconds, 1e-9)
        if "loss" in record:
            record["tokens_per_second"] = round(rate, 1)
        if "loss" in record or "train_loss" in record:
            record["seconds"] = round(self.before + seconds, 1)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
        newest = self.newest(record)
        if newest is not None:
            self._note = f"{newest}  {rate:.0f} tok/s"
        if self._watched is not None:
            self._watched.update(state.global_step, self._note)

    def newest(self, record: dict[str, float]) -> str | None:
        """What the line shows of a record; None leaves it as it is."""
        paths = {"task": record.get("task_loss"), "shadow": record.get("shadow_loss")}  # LoRA has no shadow
        return "  ".join(f"{path} {loss:.3f}" for path, loss in paths.items() if loss is not None) or None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away and give Ctrl-C back."""
        self.close()

    def close(self) -> None:
        """The same, also for a run that ended with an error; a second call does nothing."""
        if self._watched is not None:
            self._watched.close()
            self._watched = None
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The records of ``metrics.jsonl``; a last line that a kill cut short is no record.

    Raises:
        ConfigError: naming the line that is damaged.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        return []
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = parse_json(line) if line else None
        except ValueError as error:
            raise ConfigError(f"'{file}', line {number} {error}; remove the line, or start a new run") from error
        if not line:
            continue
        if not isinstance(record, dict) or not is_number(record.get("step")):
            raise ConfigError(
                f"'{file}', line {number} is no record with a number 'step'; remove the line, or start a new run"
            )
        records.append(record)
    return records


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


STYLES = (
    ("task_loss", "attached, training", "#1f5fa8", "-"),
    ("shadow_loss", "detached, training", "#c2571a", "-"),
    ("eval_task_loss", "attached, validation", "#1f5fa8", "--"),
    ("eval_shadow_loss", "detached, validation", "#c2571a", "--"),
)
"""Curves of a fine-tuning run: key, label, colour, line."""


def plot_losses(
    folder: Path, styles: Sequence[tuple[str, str, str, str]] = STYLES, unit: str = "cross-entropy per answer token"
) -> Path:
    """Draw the losses of ``metrics.jsonl`` that ``styles`` names into ``loss.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    draw_losses(axes, read_metrics(folder), styles, unit)
    axes.grid(alpha=0.3, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path = folder / "loss.png"
    with whole(path) as beside:
        figure.savefig(beside, dpi=130)
    plt.close(figure)
    return path


def draw_losses(
    axes: Any,
    records: Sequence[dict[str, float]],
    styles: Sequence[tuple[str, str, str, str]] = STYLES,
    unit: str = "cross-entropy per answer token",
) -> None:
    """Draw the losses that ``styles`` names."""
    shown = [r[key] for key, *_ in styles for r in records if r.get(key, 0) > 0]
    for key, label, colour, line in styles:
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            marker = "o" if line == "--" or len(points) == 1 else None  # a line of one point would not be seen
            axes.plot(*zip(*points, strict=True), line, color=colour, label=label, marker=marker, markersize=4)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(f"{unit} (nats)")
    if shown and max(shown) > 5 * min(shown):  # a start far above the rest would flatten what follows
        axes.set_yscale("log")
        label_decades(axes.yaxis, min(shown), max(shown))
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def label_decades(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis from ``low`` to ``high``, fewer the more decades there are."""
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = math.log10(high / low)
    axis.set_major_formatter("{x:g}")
    if decades <= 1:
        axis.set_minor_formatter("{x:g}")
    elif decades <= 3:
        axis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set_minor_formatter("{x:g}")
    else:
        axis.set_minor_formatter(NullFormatter())


class Deadline(TrainerCallback):
    """Ends training with a checkpoint once ``time.monotonic()`` has passed ``at``."""

    def __init__(self, at: float) -> None:
        self.at, self.reached = at, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if time.monotonic() >= self.at and state.global_step < state.max_steps:
            self.reached = control.should_training_stop = control.should_save = control.should_log = True
        return control


class EarlyStopping(TrainerCallback):
    """Ends training once ``patience`` evaluations in a row did not improve on the best value of ``metric`` (lower is better).

    It counts in the history of the run, which a checkpoint holds, so a resumed run stops where an undisturbed one does;
    transformers' own callback begins to count anew.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience, self.stopped = metric, patience, False

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Compare the newest evaluation with those before."""
        values = [record[self.metric] for record in state.log_history if self.metric in record]
        if len(values) - 1 - values.index(min(values)) >= self.patience and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
        return control

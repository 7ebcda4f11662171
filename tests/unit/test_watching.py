"""What a watcher sees of something long, on a terminal and without one."""

import io

import pytest
from rich.console import Console

from shadowpeft import watching
from shadowpeft.train.progress import RunCallback
from shadowpeft.watching import Watched


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(watching.time, "monotonic", lambda: self.now)


def lines(output):
    return output.getvalue().splitlines()


@pytest.mark.parametrize("seconds", [1, 20, 70])
def test_without_a_terminal_a_line_a_minute(monkeypatch, seconds):
    clock, output = Clock(monkeypatch), io.StringIO()
    with Watched(Console(file=output, width=20), "[x] training", 5000, done=1000) as watched:
        for step in range(1, 13 * 60 // seconds + 1):  # thirteen minutes
            clock.now += seconds
            watched.update(1000 + step, "loss 1.5")
    assert len(lines(output)) == (13 if seconds <= 60 else 11)
    first, left = -(-60 // seconds), {1: 66, 20: 1332, 70: 4666}[seconds]
    assert lines(output)[0] == f"[x] training: {1000 + first:,} of 5,000, {left} min left, loss 1.5"


def test_a_terminal_gets_a_bar_and_quiet_gets_nothing(monkeypatch):
    clock = Clock(monkeypatch)
    for quiet in (False, True):
        output = io.StringIO()
        with Watched(Console(file=output, force_terminal=True), "training", 10, quiet=quiet) as watched:
            clock.now += 100
            watched.update(5, "half")
        assert ("5/10" in output.getvalue()) is not quiet
        assert "training: 5 of 10" not in output.getvalue()


def test_nothing_after_the_end(monkeypatch):
    clock, output = Clock(monkeypatch), io.StringIO()
    watched = Watched(Console(file=output), "training", 10)
    watched.close()
    watched.close()
    clock.now += 100
    watched.update(5)
    assert output.getvalue() == ""


def test_a_run_without_a_terminal_says_its_losses(monkeypatch, tmp_path):
    from transformers import TrainerControl, TrainerState

    clock, output = Clock(monkeypatch), io.StringIO()
    shown = RunCallback(tmp_path, 100.0, Console(file=output, width=20))
    state, control = TrainerState(max_steps=10), TrainerControl()
    shown.on_train_begin(None, state, control)
    for _ in range(3):
        clock.now += 40
        state.global_step += 1
        shown.on_step_end(None, state, control)
        shown.on_log(None, state, control, logs={"loss": 3.0, "task_loss": 1.25, "shadow_loss": 2.5})
    shown.close()
    assert len(lines(output)) == 1
    assert lines(output)[0].startswith("training: 2 of 10, 5 min left, task 1.250  shadow 2.500")

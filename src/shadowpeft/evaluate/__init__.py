"""Model x data -> numbers: a task's record, and the loss of given rows."""

from shadowpeft.evaluate.engine import METHODS, evaluate_task
from shadowpeft.evaluate.modes import MODES, norms_kept, runner_in_mode
from shadowpeft.evaluate.scores import accuracy, answer_loss, wilson

__all__ = ["METHODS", "MODES", "accuracy", "answer_loss", "evaluate_task", "norms_kept", "runner_in_mode", "wilson"]

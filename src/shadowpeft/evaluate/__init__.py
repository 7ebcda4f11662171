"""Model x data -> numbers: a task's record (``engine``), or exact match, intents and loss of given rows (``scores``)."""

from shadowpeft.evaluate.engine import METHODS, MODES, evaluate_task, norms_kept, runner_in_mode
from shadowpeft.evaluate.scores import accuracy, answer_loss, exact_match, intents, target, wilson

__all__ = [
    "METHODS",
    "MODES",
    "accuracy",
    "answer_loss",
    "evaluate_task",
    "exact_match",
    "intents",
    "norms_kept",
    "runner_in_mode",
    "target",
    "wilson",
]

"""The paper's tasks and two more, one short file each: prompt (the paper, Appendix C), parser and scorer together."""

from __future__ import annotations

import difflib

from shadowpeft.data.tasks.amazon_reviews import AmazonReviews
from shadowpeft.data.tasks.base import CLASSIFY_MAX_LENGTH, Example, Task, class_ids, training_rows
from shadowpeft.data.tasks.clinc150 import Clinc150
from shadowpeft.data.tasks.gsm8k import GSM8K
from shadowpeft.data.tasks.mmlu import MMLU
from shadowpeft.data.tasks.newsgroups import Newsgroups
from shadowpeft.data.tasks.robot import Robot
from shadowpeft.data.tasks.squad_v2 import SquadV2, SquadV2DevSplit
from shadowpeft.errors import ConfigError

__all__ = ["CLASSIFY_MAX_LENGTH", "TASKS", "Example", "Task", "class_ids", "get_task", "training_rows"]

_ALL: tuple[type[Task], ...] = (MMLU, GSM8K, SquadV2, SquadV2DevSplit, AmazonReviews, Newsgroups, Clinc150, Robot)

TASKS: tuple[str, ...] = tuple(task.name for task in _ALL)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: if there is none.
    """
    for task in _ALL:
        if task.name == name:
            return task()
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(TASKS)}"
    raise ConfigError(f"there is no task '{name}'; {hint}")

"""The method's modules, its recurrence, its projection and its losses, without any model library."""

from shadowpeft.core.losses import (
    count_targets,
    distillation_kl,
    head_loss,
    joint_loss,
    teacher_loss,
    token_cross_entropy,
    topk_kl,
)
from shadowpeft.core.modules import Injection, Update
from shadowpeft.core.projection import (
    ProjectionSolution,
    fold_projection,
    pseudo_inverse_projection,
    solve_projection,
)
from shadowpeft.core.recurrence import Trajectory, refine

__all__ = [
    "Injection",
    "ProjectionSolution",
    "Trajectory",
    "Update",
    "count_targets",
    "distillation_kl",
    "fold_projection",
    "head_loss",
    "joint_loss",
    "pseudo_inverse_projection",
    "refine",
    "solve_projection",
    "teacher_loss",
    "token_cross_entropy",
    "topk_kl",
]

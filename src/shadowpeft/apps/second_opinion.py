"""The second opinion of ``shadowpeft route calibrate``: fitted on rows to learn, judged beside the device alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowpeft.apps.intents import rows_to_learn, without_prompts_of
from shadowpeft.data.robot import SKILLS
from shadowpeft.data.second_opinion import SecondOpinion, check_actions
from shadowpeft.errors import DataError
from shadowpeft.serve import calibration as fitting
from shadowpeft.serve.bound import FEWEST
from shadowpeft.serve.loading import opinion_of
from shadowpeft.serve.router import ACTION, FILE, Calibration

if TYPE_CHECKING:
    from rich.console import Console


def learning_rows(source: str, skills: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The rows that a second opinion is fitted on; raises as :func:`rows_to_learn` and :func:`check_actions`."""
    rows = rows_to_learn(source, skills)
    check_actions({row["skill"] for row in rows}, skills or SKILLS)
    return rows


def not_learnt(
    rows: list[dict[str, Any]], learnt: list[dict[str, Any]], source: str, console: Console
) -> tuple[list[dict[str, Any]], int]:
    """Rows without those that the second opinion learns, which would be no evidence.

    Raises:
        DataError: if there are no others, or one of them is learnt with another action.
    """
    kept, other = without_prompts_of(rows, learnt)
    if other is not None:
        row, taught = other
        raise DataError(
            f"{row['where']} has the skill {row['skill']} but {taught['where']}, of --second-opinion, has {taught['skill']} "
            "for the same prompt; correct one of them"
        )
    if not kept:
        raise DataError(f"every prompt of '{source}' is one of --second-opinion too; give rows that nothing was trained on")
    if len(kept) < len(rows):
        console.print(
            f"'{source}': {len(rows) - len(kept)} of {len(rows)} prompts are among those of --second-opinion and are left out"
        )
    return kept, len(rows) - len(kept)


def fitted(learnt: list[dict[str, Any]], source: str, console: Console) -> Any:
    """The second opinion of rows to learn from."""
    console.print(f"second opinion: fitting a classifier on {len(learnt):,} rows of '{source}'")
    with console.status("fitting"):
        return SecondOpinion.fit([row["prompt"] for row in learnt], [row["skill"] for row in learnt])


def beside(adapter: str, skills: tuple[str, ...]) -> SecondOpinion | None:
    """The second opinion of the calibration in the folder of a device; None without one, or if it is about other actions."""
    file = Path(adapter) / FILE
    calibration = Calibration.load(file) if file.is_file() else None
    if calibration is None or set(calibration.skills or SKILLS) != set(skills):
        return None
    return opinion_of(calibration, file)


def without(samples: list[Any], target: float, bound: bool, level: float) -> dict[str, Any]:
    """What the device would keep by itself on the same rows; nothing where it knows too few actions to be calibrated."""
    found: dict[str, Any] = {"right": sum(sample.right for sample in samples)}
    if sum(sample.kept for sample in samples) >= FEWEST:
        report = fitting.calibrate(samples, target=target, signal=ACTION, bound=bound, level=level).report
        found |= {key: report[key] for key in ("auroc", "commands_kept", "open_handed_on", "wrong_share")}
    return found

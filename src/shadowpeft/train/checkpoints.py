"""Checkpoints that are whole or not there: written beside, synced and renamed, in one process or several."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from shadowpeft.errors import ShadowPeftError
from shadowpeft.storage import sync, sync_names

_PARTIAL = "partial-"
WRITE_ERRORS = (OSError, SafetensorError, RuntimeError)
"""What a full disk raises: plain files OSError, safetensors its own error, ``torch.save`` a RuntimeError. Whoever catches them
asks :func:`is_write_error`, for most RuntimeErrors are something else."""
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")


class WholeCheckpoints:
    """Put before a Trainer class: a full disk or a kill never leaves half a checkpoint under a checkpoint's name."""

    _run_dir: str | None = None
    """Where the stock trainer is made to write while a checkpoint is being written."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, after what a killed run left half-written or half-deleted in the folder is taken away."""
        trainer: Any = self
        if trainer.args.should_save:
            clear_leftovers(Path(trainer.args.output_dir))
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            # resumed from the checkpoint of the last step: stock Trainer looks at max_steps only after one step more
            trainer.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None  # as stock, but renamed first
        try:
            output = super()._finalize_training(*args, **kwargs)  # type: ignore[misc]
        finally:
            trainer.args.save_total_limit = limit
        best = trainer.state.best_model_checkpoint
        if trainer.args.should_save and limit == 1 and best is not None:
            for path in map(Path, sort_checkpoints(self._get_output_dir(None))):
                if not path.samefile(best):
                    discard(path)
        return output

    def _get_output_dir(self, trial: Any) -> str:
        stock = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(stock) if self._run_dir is None else self._run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainer: Any = self
        if trainer.args.push_to_hub:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        beside = run_dir / f"{_PARTIAL}{name}"
        writes = trainer.args.should_save  # one process of all, or of each machine that has folders of its own
        if writes:
            clear_leftovers(run_dir)
        trainer.accelerator.wait_for_everyone()
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        self._run_dir = str(beside)
        try:
            with self._all_or_none(name, run_dir):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            with self._all_or_none(name, run_dir):
                if trainer.state.best_model_checkpoint == str(beside / name):  # it is about to get its lasting name
                    trainer.state.best_model_checkpoint = str(run_dir / name)
                    if writes:
                        trainer.state.save_to_json(str(beside / name / TRAINER_STATE_NAME))
                if writes:
                    sync(beside / name)
                    if (run_dir / name).exists():  # aside first: a kill while it is deleted would leave half of it
                        os.replace(run_dir / name, beside / "replaced")
                    os.replace(beside / name, run_dir / name)
                    sync_names(run_dir)
        finally:
            self._run_dir, trainer.args.save_total_limit = None, limit
            if writes:
                shutil.rmtree(beside, ignore_errors=True)
        if writes:
            rotate(run_dir, limit, trainer.state.best_model_checkpoint)

    @contextmanager
    def _all_or_none(self, name: str, run_dir: Path) -> Iterator[None]:
        """Writes inside succeed in every process, or fail in every process with one message."""
        failure: BaseException | None = None
        try:
            yield
        except WRITE_ERRORS as error:
            if not is_write_error(error):
                raise
            failure = error
        why = None if failure is None else reason(failure)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            reasons: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(reasons, why)
            why = next((each for each in reasons if each is not None), None)
        if why is not None:
            raise ShadowPeftError(
                f"{name} could not be written to '{run_dir}' ({why}); earlier checkpoints are untouched, free some space and "
                "resume"
            ) from failure


def is_write_error(error: BaseException) -> bool:
    """Whether one of ``WRITE_ERRORS`` is about a file: not an exhausted memory, tensors that share theirs, a lost process."""
    return not isinstance(error, RuntimeError) or any(mark in str(error) for mark in _TORCH_SAVE)


def reason(error: BaseException) -> str:
    """Why a write failed, in a few words."""
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def clear_leftovers(run_dir: Path) -> None:
    """Delete what a killed process left half-written or half-deleted; nothing of it was ever a checkpoint."""
    for path in run_dir.glob(f"{_PARTIAL}{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(path, ignore_errors=True)


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest ``limit`` checkpoints; the newest and the best one stay always.

    Each is renamed before it is deleted, so that a kill never leaves half a checkpoint under a checkpoint's name. The stock
    rotation deletes in place and orders by time of change, and a deletion that was cut short is a change.
    """
    found = sort_checkpoints(str(run_dir), use_mtime=True)
    if not limit or not found:
        return
    protected = {found[-1], *([] if best is None else [str(Path(best))])}
    surplus = len(found) - max(limit, len(protected))
    for path in [Path(p) for p in found if p not in protected][: max(surplus, 0)]:
        discard(path)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first."""
    aside = checkpoint.with_name(f"{_PARTIAL}{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def written_whole(
    folder: Path, what: str = "it", remedy: str = "free some space and resume from the newest checkpoint"
) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` when all is written and on disk.

    Raises:
        ShadowPeftError: if it cannot be written; what was there before is untouched.
    """
    beside, old = folder.with_name(f"{_PARTIAL}{folder.name}"), folder.with_name(f"old-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        sync(beside)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(beside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except WRITE_ERRORS as error:
        if not is_write_error(error):
            raise
        if old.is_dir() and not folder.exists():
            os.replace(old, folder)
        raise ShadowPeftError(
            f"{what} could not be written to '{folder}' ({reason(error)}); what was there before is untouched, {remedy}"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)

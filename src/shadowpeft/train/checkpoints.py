"""Checkpoints that are whole or not there: written beside, synced and renamed, in one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from shadowpeft.errors import ShadowPeftError
from shadowpeft.hf.files.digests import check_adapters
from shadowpeft.storage import (
    WRITE_ERRORS,
    clear_leftovers,
    discard,
    is_write_error,
    reason,
    share,
    sync,
    sync_tree,
    take_name,
    temporary_name,
    workspace,
)


class WholeCheckpoints:
    """Put before a Trainer class: a full disk or a kill never leaves half a checkpoint under a checkpoint's name."""

    _run_dir: str | None = None
    """Where the stock trainer is made to write while a checkpoint is being written."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, after what a killed run left half-written or half-deleted in the folder is taken away."""
        trainer: Any = self
        folder = Path(trainer.args.output_dir)
        if trainer.args.should_save and folder.is_dir():
            clear_leftovers(folder)
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """As stock, after each adapter's two files were compared; PEFT reads the weights alone where the adapter exists."""
        check_adapters(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """As stock, which looks for the adapter ``default`` only; PEFT saves the others in folders of their own."""
        trainer: Any = self
        best = Path(trainer.state.best_model_checkpoint)
        check_adapters(best)
        active = getattr(trainer.model, "active_adapters", [])
        named = [name for name in active if (best / name / SAFETENSORS_WEIGHTS_NAME).is_file()]
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not named:
            super()._load_best_model()  # type: ignore[misc]
            return
        for name in active:
            trainer.model.load_adapter(str(best / name if name in named else best), name)

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
        agreed = [temporary_name()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(agreed)
        beside = run_dir / agreed[0]
        writes = trainer.args.should_save  # one process of all, or of each machine that has folders of its own
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
        with ExitStack() as stack:
            with self._all_or_none(name, run_dir):
                if writes:
                    stack.enter_context(workspace(run_dir, beside.name))
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
                        share(beside / name, beside)
                        sync_tree(beside / name)
                        take_name(beside / name, run_dir / name, beside)
                        sync(run_dir)
            finally:
                self._run_dir, trainer.args.save_total_limit = None, limit
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


def rotate(run_dir: Path, limit: int | None, best: str | None) -> None:
    """Keep the newest ``limit`` checkpoints; the newest and the best one stay always.

    Each is renamed before it is deleted, so that a kill never leaves half a checkpoint under a checkpoint's name. The stock
    rotation deletes in place and orders by time of change, and a deletion that was cut short is a change.
    """
    checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
    if not limit or not checkpoints:
        return
    protected = {checkpoints[-1], *([] if best is None else [str(Path(best))])}
    surplus = len(checkpoints) - max(limit, len(protected))
    for path in [Path(p) for p in checkpoints if p not in protected][: max(surplus, 0)]:
        discard(path)

"""transformers' settings of a run, from the sections of its file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from shadowpeft.train.config import TrainingSection
from shadowpeft.train.pretrain_config import PretrainConfig, PretrainingSection

BEST = {"attached": "eval_task_loss", "detached": "eval_shadow_loss"}
"""What an evaluation says of each path."""


class RunArguments(TrainingArguments):
    """transformers' settings, of which a run of one step has no warm-up: it would be all of it, at a rate of 0."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As stock, whose first step has the rate 0 wherever there is a warm-up."""
        return 0 if num_training_steps == 1 else int(super().get_warmup_steps(num_training_steps))


def _arguments(t: TrainingSection | PretrainingSection, folder: Path, evaluates: bool, **own: Any) -> TrainingArguments:
    return RunArguments(
        output_dir=str(folder),
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        learning_rate=t.learning_rate,
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        bf16=t.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if evaluates and t.eval_every else "no",
        eval_steps=t.eval_every,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500,
        save_total_limit=t.keep_checkpoints,
        logging_steps=t.log_every,
        seed=t.seed,
        report_to=list(t.report_to) or "none",
        disable_tqdm=True,
        **own,
    )


def training_arguments(t: TrainingSection, folder: Path, *, evaluates: bool) -> TrainingArguments:
    """The settings of a fine-tuning run; ``evaluates``: whether a validation set is looked at every ``eval_every`` steps."""
    optional: dict[str, Any] = {} if t.optimizer in ("adamw", "muon") else {"optim": t.optimizer}
    if evaluates and (t.load_best or t.patience):
        optional["metric_for_best_model"], optional["greater_is_better"] = BEST[t.best_by], False
    return _arguments(
        t,
        folder,
        evaluates,
        lr_scheduler_type=t.scheduler,
        num_train_epochs=t.epochs or 1.0,
        max_steps=t.max_steps or -1,
        label_smoothing_factor=t.label_smoothing,
        gradient_checkpointing=t.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if t.gradient_checkpointing else None,
        fp16=t.precision == "float16",
        train_sampling_strategy="group_by_length" if t.group_by_length else "random",
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=True,
        neftune_noise_alpha=t.neftune,
        torch_compile=t.compile,
        data_seed=t.data_seed,
        load_best_model_at_end=evaluates and t.load_best,
        **optional,
    )


def pretraining_arguments(run: PretrainConfig, folder: Path) -> TrainingArguments:
    """The settings of a pretraining run."""
    t = run.training
    args = _arguments(
        t,
        folder,
        True,
        lr_scheduler_type={"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay"}[t.schedule],
        lr_scheduler_kwargs={"min_lr_rate": t.final_rate},
        max_steps=1,  # depends on the number of processes, which is known when this object exists
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ignore_data_skip=True,  # the checkpoint knows the place in the text
    )
    sequences = t.batch_size * t.gradient_accumulation * args.world_size
    args.max_steps = t.max_steps or math.ceil((t.tokens or 0) / (sequences * run.text.sequence_length))
    if t.decay is not None:
        args.lr_scheduler_kwargs = {
            "num_decay_steps": max(round(args.max_steps * t.decay), 1),
            "min_lr_ratio": t.final_rate,
        }
    return args

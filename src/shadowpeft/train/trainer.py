"""transformers' Trainer with two paths: joint loss whoever computes the main one, both losses reported, whole checkpoints."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from shadowpeft import versions
from shadowpeft.core import count_targets
from shadowpeft.ends import end_tokens
from shadowpeft.errors import ConfigError, NonFiniteLossError
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.forward.beginning import after_beginning
from shadowpeft.hf.forward.losses import shadow_path_loss
from shadowpeft.hf.layer import adapted_base, find_hub
from shadowpeft.train.activations import Activations
from shadowpeft.train.checkpoints import WholeCheckpoints
from shadowpeft.train.joint import (
    both_losses,
    device_scale,
    loss_is_stock,
    mean_loss,
    plain_loss,
    runs_again_for_outputs,
    shadow_only_rows,
    shifts,
    split_rows,
)
from shadowpeft.train.sampler import EpochSampler
from shadowpeft.train.schedule import FreezeShadow, two_courses

_LOSSES = ("task_loss", "shadow_loss")


class ShadowLossMixin(WholeCheckpoints):
    """Put before a Trainer class: ``class MyTrainer(ShadowLossMixin, Trainer)``.

    - ``shadow_labels`` in the batch reach the model, and each path is normalised by its own number of targets over the
      whole accumulated batch.
    - Label smoothing and ``compute_loss_func`` shape the task loss; ``lambda`` times the shadow's cross-entropy is added.
    - Rows that only the shadow learns (all ``labels`` masked) run through the shadow alone and never touch the base.
    - ``task_loss`` and ``shadow_loss`` are logged beside ``loss``, in evaluation too.
    - ``backbone_lr_ratio`` scales the learning rate of the shadow backbone (the paper: a pretrained one wants less).
    - In training the attached path's logits are computed at its targets only, and what all rows begin with runs once.
    - ``shadow_steps``: so many steps have rows of the shadow alone; the learning rate of all else begins after them. With
      ``freezes`` the shadow is frozen then.
    - With ``activations`` the base starts at its first refined layer in training, from what is stored of each row.
    - A gradient that is not finite ends the run before it reaches a weight, with
      :class:`~shadowpeft.errors.NonFiniteLossError`; a gradient scaler (float16) skips such steps itself.
    - Checkpoints are whole: see :class:`~shadowpeft.train.checkpoints.WholeCheckpoints`.
    """

    def __init__(
        self,
        *args: Any,
        backbone_lr_ratio: float = 1.0,
        activations: Activations | None = None,
        shadow_steps: int = 0,
        freezes: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, Trainer):
            name = type(self).__name__
            raise ConfigError(f"{name} is not a Trainer; declare it as class {name}(ShadowLossMixin, Trainer)")
        if not 0 < backbone_lr_ratio < 1e6:
            raise ConfigError(f"backbone_lr_ratio is {backbone_lr_ratio} but must be positive and finite")
        if "trl" in sys.modules:
            versions.check("trl")
        self.backbone_lr_ratio = backbone_lr_ratio
        self.activations = activations
        self.shadow_steps, self.freezes = shadow_steps, freezes
        self._shadow_num_items: Any = None
        self._normalised = False
        self._sums: dict[str, float] = {}
        self._since = 0
        self._eval_sums: dict[str, list[float]] = {}
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.n_gpu > 1:
            raise ConfigError(
                f"one process sees {trainer.args.n_gpu} GPUs and would divide each batch, which counts targets wrongly; start "
                "one process a GPU with accelerate launch, or set CUDA_VISIBLE_DEVICES=0"
            )
        words = trainer.processing_class
        words = getattr(words, "tokenizer", words)  # of a processor
        for config in getattr(trainer.model, "peft_config", {}).values():
            if not isinstance(config, ShadowPeftConfig):
                continue
            if config.task_type == "CAUSAL_LM" and getattr(words, "chat_template", None) is not None:
                config.note("trained_ends", end_tokens(trainer.model, words))
            if config.task_type == "SEQ_CLS":
                config.note("pad_token_id", getattr(trainer.model.config, "pad_token_id", None))
        if freezes:
            if trainer.args.world_size > 1:
                raise ConfigError(
                    f"the shadow is to be frozen during the run, but {trainer.args.world_size} processes train together, which "
                    "must agree on what trains before they begin; use one process, or two runs"
                )
            trainer.add_callback(FreezeShadow(shadow_steps))
        if getattr(trainer.args, "loss_type", None) == "dft":
            raise ConfigError("loss_type='dft' weights its tokens, which leaves lambda undefined; use loss_type='nll'")

    def create_accelerator_and_postprocess(self) -> None:
        """As stock, without ``find_unused_parameters``: every trainable weight has a gradient in every step."""
        trainer: Any = self
        if trainer.args.ddp_find_unused_parameters is None:
            trainer.args.ddp_find_unused_parameters = False
        super().create_accelerator_and_postprocess()  # type: ignore[misc]

    # -------------------------------------------------------------------------------------------------------- the loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if "shadow_labels" not in self._signature_columns:  # type: ignore[has-type]
            self._signature_columns: list[str] = [*self._signature_columns, "shadow_labels"]  # type: ignore[has-type]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        trainer: Any = self
        items = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        self._shadow_num_items = None
        if items is not None and batch_samples and "shadow_labels" in batch_samples[0]:
            shifted = shifts(trainer)
            own = sum(count_targets(b["shadow_labels"], shifted=shifted) for b in batch_samples)
            own = torch.as_tensor(own).to(device)
            if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
                own = trainer.accelerator.gather(own).sum()
            self._shadow_num_items = own
        return items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The joint loss in training, the task loss in evaluation; see :class:`ShadowLossMixin`."""
        trainer: Any = self
        hub = find_hub(trainer.model)
        if (name := hub.active_name()) is None:
            return super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        weight = float(hub.configs[name].auxiliary_loss_weight)
        inputs = dict(inputs)
        shadow_labels, labels = inputs.get("shadow_labels"), inputs.get("labels")
        shadow_items = num_items_in_batch if shadow_labels is None else self._shadow_num_items
        scale = device_scale(trainer, num_items_in_batch)
        self._normalised = num_items_in_batch is not None and (scale != 1.0 or trainer.accelerator.num_processes == 1)

        alone: Tensor | None = None
        if model.training and shadow_labels is not None and labels is not None and trainer.args.world_size == 1:
            only = shadow_only_rows(labels, inputs)
            if only is not None and shadow_items is not None:
                rest, only_rows = split_rows(inputs, only)
                with trainer.accelerator.autocast():  # as accelerate does around the model's own forward
                    own = shadow_path_loss(adapted_base(trainer.model), hub, only_rows, items=shadow_items)
                self._add("shadow_loss", own)
                alone = own * weight
                if rest is None:
                    return (alone, None) if return_outputs else alone
                inputs, shadow_labels, labels = rest, rest["shadow_labels"], rest["labels"]

        if self.activations is not None and model.training:
            inputs.update(self.activations.batch(inputs["input_ids"], inputs["attention_mask"]))
        own_loss = (trainer.label_smoother is not None or trainer.compute_loss_func is not None) and labels is not None
        if own_loss and shadow_labels is None:
            inputs["shadow_labels"] = labels
        if "shadow_labels" in inputs and num_items_in_batch is not None:
            inputs["shadow_num_items_in_batch"] = shadow_items
        asks_more = own_loss or return_outputs or trainer.args.torch_compile
        if model.training and not asks_more and loss_is_stock(trainer, ShadowLossMixin):
            inputs["loss_alone"] = True
            noisy = trainer.neftune_noise_alpha is not None  # the noise depends on how long a row is
            if self.activations is None and trainer.args.world_size == 1 and not noisy:
                with trainer.accelerator.autocast():
                    inputs = after_beginning(adapted_base(trainer.model), hub, inputs)
        asks = return_outputs or (own_loss and not model.training) or not runs_again_for_outputs(trainer)
        with both_losses(adapted_base(trainer.model)) as losses:
            result: Any = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=asks, num_items_in_batch=num_items_in_batch
            )
        outputs: Any = None
        loss = result
        if asks:
            loss, outputs = result
        task, shadow, fused = losses[0] if losses else (getattr(outputs, "task_loss", None), outputs.shadow_loss, None)
        if model.training:
            share: Any = 1.0  # of this micro-batch in what is logged
            if num_items_in_batch is None:
                share = 1.0 / getattr(trainer, "current_gradient_accumulation_steps", 1)
            elif fused is not None:
                share = fused / torch.as_tensor(num_items_in_batch, device=fused.device).clamp(min=1)
            if not own_loss:
                task, shadow = (None if value is None else value.detach() * share for value in (task, shadow))
        if own_loss:  # stock Trainer takes the labels away, so the model reports the shadow's loss alone
            task = loss / scale
            if not model.training and trainer.label_smoother is not None:  # smoothing is for training alone
                assert labels is not None
                task = plain_loss(outputs["logits"], labels, shifted=shifts(trainer))
            self._report(task, shadow, labels, inputs["shadow_labels"], None, shadow_items)
            if model.training:
                loss = loss + weight * scale * shadow
        else:
            items = (num_items_in_batch, shadow_items) if fused is None else (None, None)
            self._report(task, shadow, labels, labels if shadow_labels is None else shadow_labels, *items)
        if alone is not None:
            loss = loss + alone
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        if trainer.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
            raise NonFiniteLossError(
                f"the gradient's norm became {float(norm):g} in step {trainer.state.global_step + 1}; the run was stopped and "
                f"{kept_checkpoint(trainer)}: start a new run with a lower learning rate, more warm-up, or without the rows "
                "of that step"
            )
        return norm

    # --------------------------------------------------------------------------------------------------- both reported

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; nothing of an earlier training is in the first record."""
        self._sums = {}
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _add(self, key: str, value: Tensor | None) -> None:
        if not self._sums:  # the first since the last log, or since the run was resumed
            self._since = int(self.state.global_step)  # type: ignore[attr-defined]
        if value is not None:
            self._sums[key] = self._sums.get(key, 0.0) + float(value.detach())

    def _over_processes(self, sums: dict[str, list[float]]) -> dict[str, list[float]]:
        """Pairs of numbers by name, added up over the processes (each must call this, whichever names it has)."""
        trainer: Any = self
        if trainer.accelerator.num_processes == 1:
            return sums
        own = torch.tensor([sums.get(key, [0.0, 0.0]) for key in _LOSSES], device=trainer.args.device)
        total = trainer.accelerator.reduce(own, "sum").tolist()
        return {key: pair for key, pair in zip(_LOSSES, total, strict=True) if pair[1]}

    def _report(
        self,
        task: Tensor | None,
        shadow: Tensor | None,
        labels: Any,
        shadow_labels: Any,
        task_items: Any,
        shadow_items: Any,
    ) -> None:
        """Add up what is logged. In evaluation a loss may be divided by the ``items`` of all processes (None: its own)."""
        trainer: Any = self
        if trainer.model.training:
            self._add("task_loss", task)
            self._add("shadow_loss", shadow)
            return
        shifted = shifts(trainer)
        paths = (("task_loss", task, labels, task_items), ("shadow_loss", shadow, shadow_labels, shadow_items))
        for key, value, goals, items in paths:
            if value is not None and goals is not None:
                n = int(count_targets(goals, shifted=shifted))
                total = self._eval_sums.setdefault(key, [0.0, 0.0])
                total[0] += float(value.detach()) * (n if items is None else float(items))
                total[1] += n

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean task and shadow loss of the optimiser steps since the last log, over all processes; and the backbone's
        learning rate where it has one of its own, since the stock record is of the first group alone."""
        trainer: Any = self
        if "loss" in logs:
            steps = max(trainer.state.global_step - self._since, 1)
            totals = self._over_processes({key: [value, 1.0] for key, value in self._sums.items()})
            share = 1.0 if self._normalised else 1.0 / trainer.accelerator.num_processes  # of one process in the mean
            logs = {**logs, **{key: total * share / steps for key, (total, _) in totals.items()}}
            self._sums = {}
        if "learning_rate" in logs:
            own = [group["lr"] for group in trainer.optimizer.param_groups if group.get("is_backbone")]
            logs = {**logs, "backbone_learning_rate": own[0]} if own else logs
        whole = mean_loss(trainer.state.log_history) if "train_loss" in logs else None
        if whole is not None:  # stock Trainer's is the mean since the last resume
            logs = {**logs, "train_loss": whole}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop; adds ``eval_task_loss`` and ``eval_shadow_loss``, each per target of its own path, if it has any."""
        self._eval_sums = {}
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        prefix = kwargs.get("metric_key_prefix", "eval")
        for key, (total, n) in self._over_processes(self._eval_sums).items():
            if n:
                output.metrics[f"{prefix}_{key}"] = total / n
        return output

    # ------------------------------------------------------------------------------------------------ order, optimiser

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = self
        stock = super()._get_train_sampler(*args, **kwargs)  # type: ignore[misc]
        if type(stock) is not LengthGroupedSampler:
            return stock
        seed = trainer.args.seed if trainer.args.data_seed is None else trainer.args.data_seed
        return EpochSampler(stock.batch_size, stock.lengths, seed, getattr(trainer.train_dataset, "parts", None))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, with a learning rate of its own for the shadow backbone."""
        trainer: Any = self
        is_new = trainer.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if is_new and (self.backbone_lr_ratio != 1.0 or self.shadow_steps):
            hub = find_hub(trainer.model)
            backbone = {id(p) for p in hub.shadowpeft_backbone.parameters()}
            shadow = {id(p) for adapter in hub.configs for p in hub.shadow_path(adapter)}
            groups: dict[tuple[int, bool, bool], dict[str, Any]] = {}
            for n, group in enumerate(optimizer.param_groups):
                for p in group["params"]:
                    inside, own = id(p) in backbone, id(p) in shadow
                    rate = group["lr"] * (self.backbone_lr_ratio if inside else 1.0)
                    made = {**group, "params": [], "lr": rate, "is_backbone": inside, "is_shadow": own}
                    groups.setdefault((n, inside, own), made)["params"].append(p)
            optimizer.param_groups = [group for _, group in sorted(groups.items(), key=lambda item: item[0])]
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As stock; with ``shadow_steps`` by :func:`~shadowpeft.train.schedule.two_courses`."""
        trainer: Any = self
        if not self.shadow_steps or trainer.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        optimizer = trainer.optimizer if optimizer is None else optimizer
        trainer.lr_scheduler = two_courses(
            trainer.args, optimizer, num_training_steps, self.shadow_steps, freezes=self.freezes
        )
        trainer._created_lr_scheduler = True
        return trainer.lr_scheduler


class ShadowTrainer(ShadowLossMixin, Trainer):
    """transformers' ``Trainer`` for a model with a shadow adapter; see :class:`ShadowLossMixin`."""


def kept_checkpoint(trainer: Any) -> str:
    """What a run that has to stop leaves behind, in words."""
    last = get_last_checkpoint(trainer.args.output_dir)
    return f"'{last}' is untouched" if last is not None else "no checkpoint was written yet"

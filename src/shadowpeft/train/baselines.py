"""Shadow, LoRA and DoRA on one task under equal conditions: matched trainable parameters, the same code, rows, order and steps.

What is equal: the base, the rows and their order (recorded as a digest), the number of steps, batch size, schedule, optimiser
and seed, the grid of learning rates and the validation rows they are chosen on. What differs: the adapter.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from shadowpeft.core.losses import IGNORE
from shadowpeft.data import chat
from shadowpeft.data.classify import ClassCollator, ClassDataset
from shadowpeft.data.tasks import Example, Task, class_ids, training_rows
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.hf.base.load import load_base, of_labels, pad_with
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.runtime import DTYPES, peak_memory_bytes, prepare_cpu, reset_peak_memory
from shadowpeft.storage import exclusive
from shadowpeft.terminal import terminal
from shadowpeft.train.arguments import training_arguments
from shadowpeft.train.config import TrainingSection
from shadowpeft.train.optimisers import check_optimizer, trainer_options
from shadowpeft.train.progress import Deadline, RunCallback
from shadowpeft.train.trainer import ShadowLossMixin, ShadowTrainer

METHODS = ("shadow", "lora", "dora")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What the paper's LoRA and DoRA rows adapt (the paper, Table 1)."""
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
"""All linear layers of a decoder of Llama's kind."""


# ------------------------------------------------------------------------------------------------------- matched budgets


def count_trainable(model: nn.Module) -> int:
    """Number of trainable parameters, classification heads included."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def task_type(base: PreTrainedModel) -> str:
    """``SEQ_CLS`` for a base with a classification head, else ``CAUSAL_LM``."""
    return "CAUSAL_LM" if base.get_output_embeddings() is not None else "SEQ_CLS"


def count_adapter(base: PreTrainedModel, config: PeftConfig) -> int:
    """Trainable parameters of ``config`` on ``base``, counted on a copy without weights; ``base`` stays as it is."""
    with torch.device("meta"):
        empty = type(base)(base.config)
        return count_trainable(get_peft_model(empty, config))


def shadow_parameters(base: PreTrainedModel, fields: dict[str, Any]) -> int:
    """Trainable parameters of a shadow with these fields of ``ShadowPeftConfig`` on ``base``."""
    # how weights start does not change their number, and a copy without weights has nothing to start from
    start = {"projection_init": "random", "shadow_init": "random"}
    return count_adapter(base, ShadowPeftConfig(task_type=task_type(base), **{**fields, **start}))


def lora_config(
    base: PreTrainedModel,
    method: str,
    r: int,
    *,
    target_modules: Sequence[str] = ATTENTION,
    alpha_per_rank: float = 2.0,
    dropout: float = 0.0,
) -> LoraConfig:
    """LoRA or DoRA of rank ``r``; ``alpha_per_rank`` is ``lora_alpha / r``, the factor on the learnt update."""
    return LoraConfig(
        task_type=task_type(base),
        r=r,
        lora_alpha=max(1, round(alpha_per_rank * r)),
        lora_dropout=dropout,
        target_modules=list(target_modules),
        use_dora=method == "dora",
    )


def match_rank(
    base: PreTrainedModel,
    method: str,
    target_parameters: int,
    *,
    target_modules: Sequence[str] = ATTENTION,
    tolerance: float = 0.03,
    **fields: Any,
) -> LoraConfig:
    """The LoRA or DoRA configuration whose trainable parameters come nearest to a budget.

    The number is ``a + b r`` exactly (``a``: DoRA's magnitudes and a classification head), so two counts give the rank; a third
    one checks it.

    Args:
        target_parameters: the budget, as :func:`shadow_parameters` counts it. tolerance: greatest relative distance from it.
        fields: ``alpha_per_rank`` and ``dropout`` of :func:`lora_config`, the same at every rank.

    Raises:
        ConfigError: if the method is neither "lora" nor "dora", the base has no such modules, or no rank comes near enough; the
            message names the nearest one.
    """
    if method not in ("lora", "dora"):
        raise ConfigError(f"method is {method!r} but a budget can be matched for 'lora' and 'dora' only")

    def config(rank: int) -> LoraConfig:
        return lora_config(base, method, rank, target_modules=target_modules, **fields)

    try:
        first, second = (count_adapter(base, config(rank)) for rank in (1, 2))
    except ValueError as error:  # PEFT's, for names that no module has
        raise ConfigError(
            f"{type(base).__name__} has none of the modules {list(target_modules)}; name its linear layers in target_modules"
        ) from error
    per_rank = second - first
    rank = max(1, round((target_parameters - first + per_rank) / per_rank))
    count = count_adapter(base, config(rank))
    distance = count / target_parameters - 1
    if abs(distance) > tolerance:
        raise ConfigError(
            f"no rank of {method} on {', '.join(target_modules)} comes within {tolerance:.0%} of {target_parameters:,} "
            f"trainable parameters: the nearest is r = {rank} with {count:,} ({distance:+.1%}); choose other target_modules, "
            "another budget or a wider tolerance"
        )
    return config(rank)


# ------------------------------------------------------------------------------------------------------------- the model


def load_task_base(
    name: str, task: Task, tokenizer: Any, *, precision: str = "float32", seed: int = 0
) -> PreTrainedModel:
    """The base for a task: a language model, or a classifier over the task's labels whose new head ``seed`` alone decides."""
    set_seed(seed)
    if task.kind == "classify":
        base = load_base(name, "SEQ_CLS", dtype=DTYPES[precision], **of_labels(task.labels))
    else:
        base = load_base(name, dtype=DTYPES[precision])
    pad_with(base, tokenizer, classifies=task.kind == "classify")
    return base


def attach(
    base: PreTrainedModel,
    method: str,
    fields: dict[str, Any],
    *,
    budget: int | None = None,
    seed: int = 0,
) -> PeftModel:
    """``base`` with the adapter of a method.

    Args:
        method: "shadow", "lora" or "dora". fields: of ``ShadowPeftConfig``; for LoRA and DoRA of :func:`match_rank`
            (``target_modules``, ``tolerance``, ``alpha_per_rank``, ``dropout``), or ``r`` to set the rank by hand.
        budget: trainable parameters to match, for LoRA and DoRA without ``r``.

    Raises:
        ConfigError: for another method, a budget that no rank meets, or both or neither of ``r`` and ``budget``.
    """
    set_seed(seed)
    if method == "shadow":
        return _master_weights(get_peft_model(base, ShadowPeftConfig(task_type=task_type(base), **fields)))
    if method not in METHODS:
        raise ConfigError(f"method is {method!r} but must be one of {', '.join(METHODS)}")
    if ("r" in fields) == (budget is not None):
        raise ConfigError(f"{method} needs either a rank r or a budget to match; got {'both' if budget else 'neither'}")
    if budget is not None:
        return _master_weights(get_peft_model(base, match_rank(base, method, budget, **fields)))
    return _master_weights(get_peft_model(base, lora_config(base, method, **fields)))


def _master_weights(model: PeftModel) -> PeftModel:
    # a head of PEFT's stays in the base's dtype; in bf16 small steps are lost, for every method alike
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


# -------------------------------------------------------------------------------------------------------------- the data


def encode_examples(
    task: Task, examples: Sequence[Example], tokenizer: Any, *, max_length: int
) -> chat.ChatDataset | ClassDataset:
    """A data set for the Trainer: masked chats for a "generate" task (longer ones are left out), cut texts for "classify"."""
    if task.kind == "classify":
        where = {label: i for i, label in enumerate(task.labels)}
        unknown = next((e for e in examples if e.answer not in where), None)
        if unknown is not None:
            raise DataError(
                f"example {unknown.id} has the class '{unknown.answer}', which is none of the {len(where)} labels"
            )
        ids = [class_ids(tokenizer, e.prompt, max_length) for e in examples]
        return ClassDataset(ids, [where[e.answer] for e in examples])
    rows = training_rows(task, examples)
    return chat.ChatDataset(chat.encode(rows, tokenizer, max_length=max_length, too_long="skip"))


def check_splits(task: Task, *, choose_on: str, limit: float = 0.05) -> None:
    """Learning rates are chosen on rows that are neither trained on nor tested on.

    Args:
        limit: greatest share of ``choose_on`` prompts that may stand in another split; public sets repeat a few (MMLU 2 %).

    Raises:
        DataError: if ``choose_on`` is the test or the train split, or has the same rows.
    """
    if choose_on in ("test", "train"):
        raise DataError(f"learning rates would be chosen on the {choose_on} split of {task.name}; use 'validation'")
    chosen = task.load(choose_on)
    ids = {e.id for e in chosen}
    for split in ("train", "test"):
        rows = task.load(split)
        both = {(e.prompt, e.answer) for e in rows}
        share = sum((e.prompt, e.answer) in both for e in chosen) / len(chosen)
        if ids & {e.id for e in rows} or share > limit:
            raise DataError(
                f"{share:.1%} of the {choose_on} rows of {task.name} are also in its {split} split (ids in common: "
                f"{len(ids & {e.id for e in rows})}); split the data so that they are apart"
            )


def tokens_of(data: chat.ChatDataset | ClassDataset) -> list[int]:
    """Length of every sequence, in tokens."""
    return (
        [len(s.ids) for s in data.sequences] if isinstance(data, chat.ChatDataset) else [len(row) for row in data.ids]
    )


def steps_for(tokens: int, data: chat.ChatDataset | ClassDataset, training: TrainingSection) -> int:
    """Optimiser steps that read about ``tokens`` tokens (prompts included, padding not)."""
    lengths = tokens_of(data)
    per_step = sum(lengths) / len(lengths) * training.batch_size * training.gradient_accumulation
    return max(1, math.ceil(tokens / per_step))


# --------------------------------------------------------------------------------------------------------------- training


class TaskTrainer(ShadowTrainer):
    """The trainer of every method: with a shadow it is :class:`ShadowTrainer`; LoRA and DoRA have only the task loss.

    Order of rows, checkpoints and resuming are the inherited code for all of them.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The joint loss of a shadow; else the task loss, 0 for a batch of rows that only a shadow learns."""
        shadow = any(isinstance(c, ShadowPeftConfig) for c in self.model.peft_config.values())
        if shadow:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels: Tensor = inputs["labels"]
        if labels.dim() == 2 and bool((labels[:, 1:] == IGNORE).all()):
            nothing: Any = sum((p * 0.0).sum() for p in model.parameters() if p.requires_grad)
            return (nothing, None) if return_outputs else nothing
        loss, outputs = super(ShadowLossMixin, self).compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            parts = 1 if num_items_in_batch is not None else self.current_gradient_accumulation_steps
            self._add("task_loss", loss / parts)
        return (loss, outputs) if return_outputs else loss


def train_task(
    model: PeftModel,
    tokenizer: Any,
    data: chat.ChatDataset | ClassDataset,
    training: TrainingSection,
    folder: Path,
    *,
    deadline: float | None = None,
    console: Console | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Train an adapter of any method; continues from the newest checkpoint in ``folder`` if there is one.

    Args:
        deadline: a value of ``time.monotonic()`` at which training stops with a checkpoint, to be continued later.

    Returns:
        ``finished`` (False: stopped by the deadline or Ctrl-C), ``steps``, ``planned_steps``, ``rows``, ``tokens`` (read in all
        steps, by the mean length), ``train_loss``, ``task_loss`` and ``shadow_loss`` (last logged; a shadow's only),
        ``trainable_parameters``, ``seconds`` (of this call), ``peak_memory_mib``, and ``order``: a digest of the order in which
        the first epoch shows the rows, which is equal for equal data, batch size and seed whatever the method.

    Raises:
        ConfigError: if ``training.group_by_length`` is off; only that sampler's order is independent of what was built before.
            If ``training`` has what other methods cannot do, or what only ``shadowpeft train`` does.
        NonFiniteLossError: if the gradient became NaN or infinite; it never reaches a weight.
    """
    if not training.group_by_length:
        raise ConfigError(
            "training.group_by_length is off, but only its order of rows is the same for every method; leave it on"
        )
    for key in ("target_minutes", "patience", "load_best"):
        if getattr(training, key):
            raise ConfigError(f"training.{key} is set, but every method is trained for the same steps; leave it out")
    for key in ("shadow_epochs", "freeze_shadow", "cache_activations"):
        if getattr(training, key):
            raise ConfigError(f"training.{key} is set, but only shadowpeft train knows it; leave it out")
    check_optimizer(training.optimizer)
    prepare_cpu(training.threads)
    shadow = any(isinstance(c, ShadowPeftConfig) for c in model.peft_config.values())
    collate: Any = ClassCollator if isinstance(data, ClassDataset) else chat.ChatCollator
    collate = collate(tokenizer.pad_token_id)

    def without_shadow_labels(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {key: value for key, value in collate(features).items() if key != "shadow_labels"}

    folder.mkdir(parents=True, exist_ok=True)
    console = console or terminal(stderr=True)
    if isinstance(data, chat.ChatDataset) and data.skipped is not None:
        console.print(str(data.skipped))
    lengths = tokens_of(data)
    per_step = sum(lengths) / len(lengths) * training.batch_size * training.gradient_accumulation
    shown = RunCallback(folder, per_step, console, quiet)
    end = Deadline(math.inf if deadline is None else deadline)
    trainer = TaskTrainer(
        model=model,
        args=training_arguments(training, folder, evaluates=False),
        train_dataset=data,
        data_collator=collate if shadow else without_shadow_labels,
        callbacks=[shown, end],
        backbone_lr_ratio=training.backbone_lr_ratio if shadow else 1.0,
        **trainer_options(training.optimizer, model, training.learning_rate, training.weight_decay),
    )
    trainer.remove_callback(PrinterCallback)
    order = hashlib.sha256(",".join(str(i) for i in trainer._get_train_sampler()).encode()).hexdigest()
    reset_peak_memory(trainer.args.device)
    began = time.monotonic()
    try:
        with exclusive(folder):
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    finally:
        shown.close()
    state = trainer.state
    last = {
        key: value
        for record in state.log_history
        for key, value in record.items()
        if key in ("task_loss", "shadow_loss")
    }
    return {
        "finished": not end.reached and not (shown.interrupted and state.global_step < state.max_steps),
        "steps": int(state.global_step),
        "planned_steps": int(state.max_steps),
        "rows": len(data),
        "tokens": round(per_step * state.global_step),
        "train_loss": next((r["train_loss"] for r in reversed(state.log_history) if "train_loss" in r), None),
        **last,
        "trainable_parameters": count_trainable(model),
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_mib": round(peak_memory_bytes(trainer.args.device) / 2**20, 1),
        "order": order,
    }


# ---------------------------------------------------------------------------------------------------------- learning rate


def choose_rate(grid: Sequence[float], trial: Callable[[float], float]) -> dict[str, Any]:
    """The learning rate of ``grid`` with the highest value of ``trial``.

    Returns:
        ``trials`` (rate and value of each; None: not finite), ``chosen``, and ``at_edge``: whether it is the grid's first or
        last, which means that a better one may lie outside.

    Raises:
        ConfigError: if the grid is empty, or no trial gave a finite value.
    """
    if not grid:
        raise ConfigError("the grid of learning rates is empty; give at least one")
    values = {rate: trial(rate) for rate in sorted(grid)}
    finite = {rate: value for rate, value in values.items() if math.isfinite(value)}
    if not finite:
        raise ConfigError(f"training diverged at every learning rate of {sorted(grid)}; give lower ones")
    best = max(finite, key=finite.__getitem__)
    return {
        "trials": [{"learning_rate": rate, "value": finite.get(rate)} for rate in values],
        "chosen": best,
        "at_edge": len(values) > 1 and best in (min(values), max(values)),
    }

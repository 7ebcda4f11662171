"""transformers' Trainer for pretraining: whole-step losses, exact place in the text, held-out perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from shadowpeft.data.packing import Batches, Packed, collate
from shadowpeft.errors import AdapterFileError, NonFiniteLossError
from shadowpeft.messages import shorten
from shadowpeft.train.checkpoints import WholeCheckpoints
from shadowpeft.train.progress import RunCallback
from shadowpeft.train.trainer import kept_checkpoint

WEIGHTS = "model.safetensors"


class PretrainTrainer(WholeCheckpoints, Trainer):
    """transformers' ``Trainer`` for a :class:`~shadowpeft.hf.pretraining.model.ProjectedShadow`.

    The loss of a step is the mean over its targets in all micro-batches and processes. A checkpoint holds the tensors that
    train, the optimiser, and the exact place in the text. A loss or gradient that is not finite ends the run before it
    reaches a weight.

    Args:
        batches: the training text. held_out: sequences to evaluate on, by corpus.
        weights: of cross-entropy and divergence, where the batches bring a teacher. Evaluation is the cross-entropy always.
    """

    def __init__(
        self,
        *args: Any,
        batches: Batches,
        held_out: dict[str, list[Packed]],
        weights: tuple[float, float] = (1.0, 0.0),
        **kwargs: Any,
    ) -> None:
        self.batches, self.held_out, self.ran_out, self.weights = batches, held_out, False, weights
        everything = [s for sequences in held_out.values() for s in sequences]
        super().__init__(*args, eval_dataset=everything or None, **kwargs)
        trainer: Any = self
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by the targets of the whole step

    def get_train_dataloader(self) -> Any:
        """The batches themselves: accelerate's loaders read one batch ahead, which a saved state would not know."""
        return self.batches

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The held-out sequences; :meth:`evaluation_loop` deals them out."""
        return self.held_out

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As stock; where the text ends before a whole step, training ends with the step before."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(samples) == num_batches:
            return samples, items
        trainer: Any = self
        control: TrainerControl = trainer.control
        self.ran_out = control.should_training_stop = control.should_save = control.should_log = True
        control.should_evaluate = bool(self.held_out)
        return [], None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """``sum of losses / targets of the whole step``, 0-d.

        Raises:
            NonFiniteLossError: naming step and text.
        """
        trainer: Any = self
        inputs = dict(inputs)
        numbers = inputs.pop("numbers").tolist()
        total, count = model(**inputs, weights=self.weights)
        if not bool(torch.isfinite(total)):
            raise self._not_finite(f"the loss became {float(total.detach()):g}", self._guilty(numbers, inputs))
        loss = total / torch.as_tensor(count if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        if trainer.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * trainer.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        return (loss, None) if return_outputs else loss

    @torch.no_grad()
    def _guilty(self, numbers: list[int], inputs: dict[str, Tensor]) -> list[int]:
        """The sequences of a batch whose own loss is not finite; all, if only together."""
        trainer: Any = self
        guilty = []
        for row, number in enumerate(numbers):
            with trainer.accelerator.autocast():
                total, _ = trainer.model(**{k: v[row : row + 1] for k, v in inputs.items()}, weights=self.weights)
            if not bool(torch.isfinite(total)):
                guilty.append(number)
        return guilty or numbers

    def _not_finite(self, what: str, numbers: list[int]) -> NonFiniteLossError:
        trainer: Any = self
        places = ", ".join(self.batches.where(number) for number in numbers[:3])
        return NonFiniteLossError(
            f"{what} in step {trainer.state.global_step + 1}, at {places}; the run was stopped and {kept_checkpoint(trainer)}: "
            "start a new run with a lower training.learning_rate, more training.warmup or without that text"
        )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._not_finite(f"the gradient's norm became {float(norm):g}", sorted(self.batches.origins))
        return norm

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean cross-entropy and perplexity per target, of all held-out text and of each corpus."""
        trainer: Any = self
        model: nn.Module = trainer.model
        training = model.training
        model.eval()
        sums = torch.zeros(len(self.held_out), 2, dtype=torch.float64)
        process, processes = trainer.args.process_index, trainer.args.world_size
        size = trainer.args.per_device_eval_batch_size
        for index, sequences in enumerate(self.held_out.values()):
            own = sequences[process::processes]
            for start in range(0, len(own), size):
                batch = collate(own[start : start + size])
                del batch["numbers"]
                with trainer.accelerator.autocast():
                    total, count = model(**trainer._prepare_inputs(batch))
                sums[index] += torch.tensor([float(total), float(count)], dtype=torch.float64)
        if processes > 1:
            sums = trainer.accelerator.reduce(sums.to(trainer.args.device), "sum").cpu()
        model.train(training)
        losses = {"": float(sums[:, 0].sum() / sums[:, 1].sum())}
        if len(self.held_out) > 1:
            losses |= {f"/{n}": float(s / c) for n, (s, c) in zip(self.held_out, sums.tolist(), strict=True)}
        metrics = {f"{metric_key_prefix}_loss{n}": value for n, value in losses.items()}
        metrics |= {f"{metric_key_prefix}_perplexity{n}": math.exp(min(v, 700.0)) for n, v in losses.items()}
        return EvalLoopOutput(None, None, metrics, sum(len(s) for s in self.held_out.values()))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As stock, without the mean loss of the whole call, which a resumed run would have of its own part only."""
        super().log({k: v for k, v in logs.items() if k != "train_loss"}, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        trainer: Any = self
        if not trainer.args.should_save:  # every process is asked
            return
        folder = Path(output_dir or trainer.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = trainer.model.trainable_state()
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, folder / WEIGHTS)
        self.batches.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        path = Path(resume_from_checkpoint) / WEIGHTS
        try:
            stored = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterFileError(
                f"{path} cannot be read ({shorten(error)}); remove this checkpoint and resume"
            ) from error
        state = trainer.model.trainable_state()
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in state.items()}:
            raise AdapterFileError(f"{path} does not hold the tensors of this run; resume the run it belongs to")
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(stored[name])


class PretrainCallback(RunCallback):
    """Progress, metrics and Ctrl-C as in fine-tuning; one evaluation at the end."""

    evaluates = False

    def newest(self, record: dict[str, float]) -> str | None:
        """The loss, or the perplexity just measured."""
        if "loss" in record:
            return f"loss {record['loss']:.3f}"
        return f"held-out perplexity {record['eval_perplexity']:.2f}" if "eval_perplexity" in record else None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """As in fine-tuning; a resumed trainer counts the share of the run from its own start, which is put right here."""
        state.epoch = state.global_step / state.max_steps
        control = super().on_step_end(args, state, control, **kwargs)
        if self.evaluates and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

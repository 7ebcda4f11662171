"""Shadow pretraining (the paper, Appendix B): one run from its configuration to its folder.

Only the base's head and embedding are in memory, and the layers a backbone copies. transformers' Trainer carries the run:
schedule, precision, checkpointing, processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import broadcast_object_list
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from shadowpeft.data.corpora import FileSource, HubSource, TextSource, find_shards, shard_record
from shadowpeft.data.packing import Batches, Encode, Mixture, Packed, PackedStream, collate
from shadowpeft.errors import AdapterFileError, ConfigError, DataError, NonFiniteLossError
from shadowpeft.evaluate.record import commit, peak_memory
from shadowpeft.hf.base.vocabulary import shared_tokens
from shadowpeft.hf.files.reading import read_json
from shadowpeft.hf.pretraining.base_ends import BaseEnds, open_base
from shadowpeft.hf.pretraining.model import (
    SEPARATE,
    ProjectedShadow,
    build_projected_shadow,
    check_separation,
    save_shadow,
    save_stock,
)
from shadowpeft.messages import shorten
from shadowpeft.storage import write_json, write_text
from shadowpeft.train.checkpoints import WholeCheckpoints, written_whole
from shadowpeft.train.pretrain_config import Corpus, PretrainConfig
from shadowpeft.train.pretrain_teacher import Lesson, make_cache
from shadowpeft.train.progress import RunCallback, plot_losses, read_metrics
from shadowpeft.train.run import (
    DTYPES,
    FIRST_FILES,
    check_loggers,
    load_tokenizer,
    prepare_cpu,
    refuse_changed,
    stored_record,
    versions,
)
from shadowpeft.train.trainer import kept_checkpoint

WEIGHTS = "model.safetensors"
_CURVES = (("loss", "training", "#1f5fa8", "-"), ("eval_loss", "held out", "#c2571a", "--"))


# -------------------------------------------------------------------------------------------------------------- the text


def make_source(
    corpus: Corpus, run: PretrainConfig, *, shuffle: bool, warn: Callable[[str], None] | None = None
) -> TextSource:
    """The source that a corpus of the configuration describes.

    Raises:
        DataError: if there is no such corpus. ConfigError: if a file's format is unknown.
    """
    if corpus.hub is not None:
        return HubSource(corpus.name, corpus.hub, config=corpus.config, split=corpus.split, field=corpus.field)
    return FileSource(
        corpus.name,
        find_shards(corpus.path, corpus.builtin, corpus.split),
        format=corpus.format,
        field=corpus.field,
        on_bad_shard=run.text.on_bad_shard,
        shuffle=shuffle,
        seed=run.training.seed,
        warn=warn,
    )


def make_stream(
    run: PretrainConfig, encode: Encode, end: int, warn: Callable[[str], None] | None = None
) -> PackedStream:
    """The training sequences of a run, from their beginning."""
    text, seed = run.text, run.training.seed
    sources = [make_source(corpus, run, shuffle=True, warn=warn) for corpus in text.corpora]
    mixture = Mixture(sources, [c.weight for c in text.corpora], encode, end, repeat=text.on_end == "repeat")
    return PackedStream(mixture, text.sequence_length, buffer=text.shuffle_buffer, seed=seed)


def check_enough(run: PretrainConfig, stream: PackedStream, sequences: int) -> None:
    """Read one step ahead on a stream of its own, so that text that cannot be read is refused before a folder is made.

    Raises:
        DataError: if a corpus is empty or damaged, or the text ends before the first step.
    """
    found = sum(1 for _ in zip(range(sequences), stream, strict=False))
    if found < sequences:
        raise DataError(
            f"the corpora end before the first step of {sequences * run.text.sequence_length:,} tokens; give more text, lower "
            "training.batch_size or set text.on_end: repeat"
        )


def end_token(run: PretrainConfig, tokenizer: Any) -> int:
    """Id of the token that ends a document.

    Raises:
        ConfigError: if the tokenizer has no such token.
    """
    token = run.text.end_of_document or tokenizer.eos_token
    found = None if token is None else tokenizer.get_vocab().get(token)
    if found is None:
        raise ConfigError(
            f"the tokenizer of '{run.base}' has no token {token!r} to end a document with; set text.end_of_document to one "
            "of its special tokens"
        )
    return int(found)


def hold_out(run: PretrainConfig, encode: Encode, end: int) -> dict[str, list[Packed]]:
    """The first sequences of each validation corpus, in order, from one pass.

    Raises:
        DataError: if a corpus does not fill one sequence.
    """
    found = {}
    for corpus in run.text.validation:
        mixture = Mixture([make_source(corpus, run, shuffle=False)], [1.0], encode, end, repeat=False)
        stream = PackedStream(mixture, run.text.sequence_length)
        found[corpus.name] = [s for _, s in zip(range(run.text.validation_sequences), stream, strict=False)]
        if not found[corpus.name]:
            raise DataError(
                f"validation corpus '{corpus.name}' has {mixture.tokens[0]} tokens, which is no whole sequence of "
                f"{run.text.sequence_length}; give more text or lower text.sequence_length"
            )
    return found


# ------------------------------------------------------------------------------------------------------------ the trainer


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
            found = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise AdapterFileError(
                f"{path} cannot be read ({shorten(error)}); remove this checkpoint and resume"
            ) from error
        state = trainer.model.trainable_state()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in state.items()}:
            raise AdapterFileError(f"{path} does not hold the tensors of this run; resume the run it belongs to")
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(found[name])


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


def pretraining_arguments(run: PretrainConfig, folder: Path) -> TrainingArguments:
    """transformers' settings of a run."""
    t = run.training
    kinds = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay"}
    # max_steps depends on the number of processes, which is known when this object exists
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=kinds[t.schedule],
        lr_scheduler_kwargs={"min_lr_rate": t.final_rate},
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        max_steps=1,
        bf16=t.precision == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if t.eval_every else "no",
        eval_steps=t.eval_every,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500,
        save_total_limit=t.keep_checkpoints,
        logging_steps=t.log_every,
        logging_nan_inf_filter=False,
        seed=t.seed,
        report_to=list(t.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ignore_data_skip=True,  # the checkpoint knows the place in the text
    )
    sequences = t.batch_size * t.gradient_accumulation * args.world_size
    steps = t.max_steps or math.ceil((t.tokens or 0) / (sequences * run.text.sequence_length))
    args.max_steps = steps
    if t.decay is not None:
        args.lr_scheduler_kwargs = {"num_decay_steps": max(round(steps * t.decay), 1), "min_lr_ratio": t.final_rate}
    return args


# ---------------------------------------------------------------------------------------------------------------- the run


def pretrain(
    run: PretrainConfig, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Pretrain a shadow, measure its held-out perplexity, write it in both formats.

    The folder ``run.output`` receives ``config.yaml``, ``versions.json``, ``data.json``, ``metrics.jsonl``, ``loss.png``,
    ``checkpoint-N/``, ``shadow/`` (projected checkpoint), ``stock/`` (ordinary model) and ``result.json``; with a teacher,
    ``teacher/`` before the training begins.

    Args:
        resume: continue the run in the folder at the exact sample of its newest checkpoint; start it if there is none.

    Returns:
        the result: steps, tokens, seconds, speed, losses, perplexities before and after, what was read and skipped.

    Raises:
        ConfigError: if the folder holds a run and ``resume`` is not set, or the run there is another.
        DataError: if a corpus is missing, empty, damaged, or too short for one step; if a teacher cache is of other text.
        BaseMismatchError: if it is of another base.
        NonFiniteLossError: if the loss became NaN.
        ShadowPeftError: any other defect of base, backbone or files.
    """
    console = console or Console(stderr=True)
    t, text = run.training, run.text
    prepare_cpu(t.threads)
    folder = Path(run.output)
    check_loggers(t.report_to)
    args = pretraining_arguments(run, folder)
    main = args.process_index == 0
    last = _begin(run, folder, resume)
    finished = _finished(folder)
    if finished is not None:
        return finished
    args.eval_on_start = last is None and bool(text.validation)
    args.distributed_state.wait_for_everyone()  # before one of them makes the folder

    def warn(message: str) -> None:
        if main:
            console.print(message)

    with args.main_process_first(desc="opening the base"):
        tokenizer = load_tokenizer(run.base)
    base = open_base(run.base)
    model, start = _build(run, base, tokenizer)

    def encode(document: str) -> list[int]:
        return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])

    end = end_token(run, tokenizer)
    stream = make_stream(run, encode, end, warn)
    batches = Batches(stream, t.batch_size, args.process_index, args.world_size, keep=t.gradient_accumulation)
    held_out = hold_out(run, encode, end)
    record = {
        "train": [shard_record(source) for source in stream.mixture.sources],
        "validation": {name: len(sequences) for name, sequences in held_out.items()},
        "processes": args.world_size,
        "start": start,
    }
    sequences = t.batch_size * t.gradient_accumulation * args.world_size
    lesson = Lesson.of(run, base, stream, tokenizer, args.max_steps * sequences)
    if last is None:
        check_enough(run, make_stream(run, encode, end), sequences)
    else:
        batches.load(Path(last))
    if main:
        _write_records(run, folder, record)
    if lesson is not None:
        batches.teacher = make_cache(lesson, make_stream(run, encode, end), args, console, quiet=quiet)

    per_step = sequences * text.sequence_length
    shown = PretrainCallback(folder, per_step, console, quiet, writes=main)
    shown.evaluates = bool(held_out)
    weights = (1.0, 0.0) if lesson is None else lesson.weights
    trainer: Any = PretrainTrainer(
        model=model, args=args, callbacks=[shown], batches=batches, held_out=held_out, weights=weights
    )
    trainer.remove_callback(PrinterCallback)
    with trainer.accelerator.autocast():
        check_separation(model, SEPARATE if t.precision == "float32" else 0.05)
    if t.gradient_checkpointing:
        shadow = model.shadow_model
        # transformers 5.23 renamed it; older releases know only the old name
        enable = getattr(shadow, "activation_checkpointing_enable", None) or shadow.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        shown.close()
        batches.close()
    seconds = time.monotonic() - started
    result: dict[str, Any] = {}
    if main:
        result = _result(run, trainer, shown, start, seconds)
        with written_whole(folder / "shadow", "the shadow") as beside:
            save_shadow(model, base, beside)
            tokenizer.save_pretrained(str(beside))
        with written_whole(folder / "stock", "the stock model") as beside:
            save_stock(model, base, beside)
            tokenizer.save_pretrained(str(beside))
        if read_metrics(folder):
            plot_losses(
                folder, _CURVES, "cross-entropy per token" if run.loss == "ce" else f"loss ({run.loss}) per token"
            )
        write_json(folder / "result.json", result)
    return dict(broadcast_object_list([result])[0])  # the first process alone knows what was read


def _result(
    run: PretrainConfig, trainer: Any, shown: PretrainCallback, start: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """What ``result.json`` says."""
    folder, steps = Path(run.output), int(trainer.state.global_step)
    sources, read = trainer.batches.stream.mixture.sources, trainer.batches.state.mixture
    per_step = int(shown.tokens_per_step)
    history = trainer.state.log_history
    measured = [r for r in history if "eval_perplexity" in r]
    newest = measured[-1] if measured else {}
    return {
        "steps": steps,
        "planned_steps": int(trainer.args.max_steps),
        "interrupted": shown.interrupted and steps < trainer.args.max_steps,
        "ended_early": sources[read["ended"]].name if trainer.ran_out else None,
        "tokens": steps * per_step,
        "loss": next((r["loss"] for r in reversed(history) if "loss" in r), None),
        "perplexity_at_start": measured[0]["eval_perplexity"] if measured else None,
        "perplexity": newest.get("eval_perplexity"),
        "perplexity_by_corpus": {
            k.removeprefix("eval_perplexity/"): v for k, v in newest.items() if k.startswith("eval_perplexity/")
        },
        "seconds": round(seconds, 1),
        "resumed_from_step": shown.first,
        "tokens_per_second": round((steps - shown.first) * per_step / max(seconds, 1e-9), 1),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_memory_bytes": peak_memory(trainer.model),
        "base": run.base,
        "start": start,
        "objective": run.loss,
        "teacher": None if (cache := trainer.batches.teacher) is None else {"k": cache.k, "sequences": len(cache)},
        "corpora": [
            {"name": s.name, "tokens_read": n, "documents": d, "passes": p}
            for s, n, d, p in zip(sources, read["tokens"], read["documents"], read["passes"], strict=True)
        ],
        "skipped": [{"shard": f, "reason": why} for s in read["sources"] for f, why in s.get("skipped", ())],
        "shadow": str(folder / "shadow"),
        "stock": str(folder / "stock"),
        "commit": commit(),
        "versions": versions(),
    }


def _build(run: PretrainConfig, base: BaseEnds, tokenizer: Any) -> tuple[ProjectedShadow, dict[str, Any]]:
    t, b = run.training, run.backbone
    if b.model is not None:
        shared_tokens(tokenizer, load_tokenizer(b.model))
    set_seed(t.seed)
    model, start = build_projected_shadow(
        base,
        layers=b.layers,
        count=b.count or 1,
        model=b.model,
        start=run.start,
        dtype=DTYPES[t.precision],
        attention=t.attention,
        train_embeddings=t.train_embeddings,
    )
    limit = getattr(model.shadow_model.config, "max_position_embeddings", None)
    if limit is not None and run.text.sequence_length > limit:
        raise ConfigError(
            f"text.sequence_length is {run.text.sequence_length} but the backbone reads {limit} tokens; lower it"
        )
    return model, start


def _begin(run: PretrainConfig, folder: Path, resume: bool) -> str | None:
    """The checkpoint to continue from, or None."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"the run folder '{folder}' is a file; choose another output")
    started = (folder / "config.yaml").is_file()
    if not started:
        foreign = [p.name for p in folder.iterdir() if p.name not in FIRST_FILES] if folder.is_dir() else []
        if foreign:
            raise ConfigError(f"the run folder '{folder}' holds '{foreign[0]}' and no run; choose another output")
        return None
    if not resume:
        raise ConfigError(f"the run folder '{folder}' holds a run; continue it with --resume, or choose another output")
    stored = {"loss": "ce", "teacher": None, **stored_record(folder / "config.yaml")}  # older runs have no such keys
    refuse_changed(
        folder, stored, run.model_dump(), ("base", "backbone", "start", "text", "loss", "teacher"), ("training",)
    )
    return get_last_checkpoint(str(folder))  # type: ignore[no-any-return]


def _finished(folder: Path) -> dict[str, Any] | None:
    """The result of a run that has come to its end, if this one has."""
    if not (folder / "result.json").is_file():
        return None
    result = read_json(folder / "result.json")
    return None if result.get("interrupted") else result


def _write_records(run: PretrainConfig, folder: Path, record: dict[str, Any]) -> None:
    """Write what the run is, or compare with what it was when it was started.

    Raises:
        ConfigError: if the text or the number of processes has changed.
    """
    if (folder / "config.yaml").is_file():
        stored = stored_record(folder / "data.json")
        for key in ("train", "validation", "processes"):
            if stored.get(key) != record[key]:
                what = "number of processes" if key == "processes" else f"{key} text"
                raise ConfigError(
                    f"the {what} has changed since the run in '{folder}' was started; restore it or start a new run"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "versions.json", versions())
    write_json(folder / "data.json", record)
    # last: a folder with this file is a run that can be resumed, from its start if there is no checkpoint yet
    write_text(folder / "config.yaml", yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True))

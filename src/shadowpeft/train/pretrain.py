"""Shadow pretraining (the paper, Appendix B): one run from its configuration to its folder.

Only the base's head and embedding are in memory, and the layers a backbone copies. transformers' Trainer carries the run:
schedule, precision, checkpointing, processes.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from shadowpeft.data.corpora import shard_record
from shadowpeft.data.packing import Batches
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.record import commit
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
from shadowpeft.runtime import DTYPES, environment, peak_memory_bytes, prepare_cpu
from shadowpeft.storage import exclusive, write_json, written_whole
from shadowpeft.terminal import terminal
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.arguments import pretraining_arguments
from shadowpeft.train.folder import check_loggers, is_first_file, refuse_changed, stored_record, write_records
from shadowpeft.train.pretrain_config import PretrainConfig
from shadowpeft.train.pretrain_teacher import Lesson, make_cache
from shadowpeft.train.pretrain_text import check_enough, check_held_out, end_token, hold_out, make_stream
from shadowpeft.train.pretrain_trainer import PretrainCallback, PretrainTrainer
from shadowpeft.train.progress import plot_losses, read_metrics

_CURVES = (("loss", "training", "#1f5fa8", "-"), ("eval_loss", "held out", "#c2571a", "--"))


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
        ConfigError: if the folder holds a run and ``resume`` is not set, or the run there is another; if held-out text is
            trained on.
        DataError: if a corpus is missing, empty, damaged, or too short for one step; if a teacher cache is of other text.
        BaseMismatchError: if it is of another base.
        NonFiniteLossError: if the loss became NaN.
        ShadowPeftError: any other defect of base, backbone or files.
    """
    console = console or terminal(stderr=True)
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
    check_held_out(run)
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
    with exclusive(folder) if main else nullcontext():
        if main:
            if _begin(run, folder, resume) != last:  # again: another process may have begun while this one loaded
                raise ConfigError(f"another process has gone on with the run in '{folder}'; start again")
            _write_records(run, folder, record)
        if lesson is not None:
            batches.teacher = make_cache(lesson, make_stream(run, encode, end), args, console, quiet=quiet)
        shown = PretrainCallback(folder, sequences * text.sequence_length, console, quiet, writes=main)
        shown.evaluates = bool(held_out)
        weights = (1.0, 0.0) if lesson is None else lesson.weights
        trainer = PretrainTrainer(
            model=model, args=args, callbacks=[shown], batches=batches, held_out=held_out, weights=weights
        )
        result = _train(run, trainer, shown, last, start)
        if main:
            _save(run, trainer, base, tokenizer, result)
    return dict(broadcast_object_list([result])[0])  # the first process alone knows what was read


def _train(
    run: PretrainConfig, trainer: Any, shown: PretrainCallback, last: str | None, start: dict[str, Any]
) -> dict[str, Any]:
    """Train, and what came out; empty in every process but the first."""
    model, t = trainer.model, run.training
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
        trainer.batches.close()
    return _result(run, trainer, shown, start, time.monotonic() - started) if shown.writes else {}


def _save(run: PretrainConfig, trainer: Any, base: BaseEnds, tokenizer: Any, result: dict[str, Any]) -> None:
    folder = Path(run.output)
    for name, what, save in (("shadow", "the shadow", save_shadow), ("stock", "the stock model", save_stock)):
        with written_whole(folder / name, what) as beside:
            save(trainer.model, base, beside)
            tokenizer.save_pretrained(str(beside))
    if read_metrics(folder):
        plot_losses(folder, _CURVES, "cross-entropy per token" if run.loss == "ce" else f"loss ({run.loss}) per token")
    write_json(folder / "result.json", result)


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
        "seconds": round(shown.before + seconds, 1),  # of all sessions; the speed is that of this one
        "resumed_from_step": shown.first,
        "tokens_per_second": round((steps - shown.first) * per_step / max(seconds, 1e-9), 1),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device),
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
        "versions": environment(),
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
        foreign = [p.name for p in folder.iterdir() if not is_first_file(p.name)] if folder.is_dir() else []
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
    write_records(folder, run, record)

"""One fine-tuning run from its configuration to its folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from shadowpeft.data import chat
from shadowpeft.data.class_rows import ClassRows
from shadowpeft.data.frequent import frequent_tokens
from shadowpeft.data.packed import pack
from shadowpeft.data.robot import SKILLS
from shadowpeft.ends import end_tokens
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.evaluate import evaluate_task
from shadowpeft.hf.base.aliases import is_alias
from shadowpeft.hf.base.load import load_base, of_labels, pad_with
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.vocabulary import shared_tokens
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.layer import find_hub
from shadowpeft.hf.load import load, read_config
from shadowpeft.messages import quote, shorten
from shadowpeft.runtime import DTYPES, prepare_cpu
from shadowpeft.storage import exclusive, write_json, write_text, written_whole
from shadowpeft.terminal import terminal
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.activations import Activations, prepare
from shadowpeft.train.arguments import BEST, training_arguments
from shadowpeft.train.card import model_card
from shadowpeft.train.config import RunConfig
from shadowpeft.train.folder import check_loggers, is_first_file, refuse_changed, stored_record, write_records
from shadowpeft.train.further import LOSSES
from shadowpeft.train.optimisers import check_optimizer, trainer_options
from shadowpeft.train.packing import check_packing
from shadowpeft.train.paths import check_paths, learns
from shadowpeft.train.progress import EarlyStopping, RunCallback, plot_losses, read_metrics
from shadowpeft.train.rows import (
    RunData,
    class_rows_of,
    compact_calls,
    load_run_data,
    packaged,
    shadow_first,
    steps_by_epochs,
    system_of,
    tools_of_run,
)
from shadowpeft.train.schedule import check_warmup
from shadowpeft.train.sections import DataConfig, TrainingSection, source_of
from shadowpeft.train.speed import planned_in, steps_in_time
from shadowpeft.train.trainer import ShadowTrainer


def build_model(run: RunConfig, tokenizer: Any, labels: list[str] | None = None) -> PeftModel:
    """Base and adapter of a run; ``labels`` of a classifier.

    Raises:
        ConfigError: if the run goes on from an adapter that was trained for other labels.
    """
    if run.adapter is not None and (known := read_config(run.adapter).labels) != labels:
        raise ConfigError(
            f"the adapter '{run.adapter}' has the labels {quote(known)} but the rows have {quote(labels)}; give rows of the "
            "same labels, or train a new adapter"
        )
    set_seed(run.training.seed)  # the head of a classifier is new
    base = load_base(run.base, run.task_type, dtype=DTYPES[run.training.precision], **of_labels(labels))
    pad_with(base, tokenizer, classifies=labels is not None)
    if run.adapter is not None:
        model = load(run.adapter, base, is_trainable=True)
        _tell(model.peft_config["default"], run, base, tokenizer)
        for name in LOSSES:
            setattr(model.peft_config["default"], name, getattr(run.shadow, name))
        set_seed(run.training.seed)
    else:
        if run.shadow.shadow_model != "mirror":
            shared_tokens(tokenizer, load_tokenizer(run.shadow.shadow_model))
        config = ShadowPeftConfig(task_type=run.task_type, **run.shadow.fields_for(find_decoder(base).num_layers))
        config.base_alias = run.base if is_alias(run.base) else None
        config.labels = labels
        _tell(config, run, base, tokenizer)
        set_seed(run.training.seed)
        model = get_peft_model(base, config)
    for parameter in model.parameters():  # PEFT leaves a new head in the base's dtype, in which small steps are lost
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if run.training.freeze_shadow and not run.training.shadow_epochs:
        find_hub(model).freeze_shadow("default")
    return model


def _tell(config: Any, run: RunConfig, base: Any, tokenizer: Any) -> None:
    """Record what the rows of a language model's run teach beside words."""
    if run.task_type == "SEQ_CLS":
        return
    config.trained_ends = end_tokens(base, tokenizer)
    config.system_message = system_of(run.data.train, run.data.system)
    config.shadow_answers = "action" if run.data.learns_actions else None
    tools = tools_of_run(run.data.train, run.data.tools)
    config.call_form = None if compact_calls(run.data, tools, tokenizer) else "template"
    names = tools.names if tools is not None else SKILLS if packaged(run.data.train) else ()
    config.actions = sorted({*(config.actions or ()), *names}) or None  # a run may go on from an adapter that has some


def _stored(
    run: RunConfig, folder: Path, model: PeftModel, training: list[chat.Sequence], console: Console
) -> Activations | None:
    """What the base computes below its refined layers, if the run asks for it."""
    t = run.training
    if not t.cache_activations:
        return None
    return prepare(
        model,
        (s.ids for s in training if s.base),
        folder / "activations" if t.cache_activations is True else Path(t.cache_activations),
        precision=t.precision,
        batch_size=t.eval_batch_size,
        shadow=t.freeze_shadow and not t.shadow_epochs,
        tell=console.print,
    )


def train(
    run: RunConfig, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train, evaluate both paths, save the adapter and the record of the run.

    The folder ``run.output`` receives ``config.yaml``, ``versions.json``, ``data.json``, ``metrics.jsonl``, ``loss.png``,
    ``checkpoint-N/``, ``adapter/`` and ``summary.json``.

    Args:
        resume: continue from the newest checkpoint in the folder, or from the start if the run ended before its first; then
            data and settings may have changed.

    Returns:
        the summary: steps, losses, parameters, seconds of training (of all sessions, if the run was resumed), and whether
        Ctrl-C ended it early.

    Raises:
        ConfigError: if the folder already holds a run and ``resume`` is not set, or there is nothing to resume.
        ShadowPeftError: any defect of data, base or configuration; raised before training starts.
    """
    console = console or terminal(stderr=True)
    t = run.training
    prepare_cpu(t.threads)
    folder = Path(run.output)
    last = _start_or_resume(run, folder, resume)
    if resume and last is None:
        console.print(f"there is no checkpoint in '{folder}' yet: the run starts from its beginning")
    check_loggers(t.report_to)
    check_optimizer(t.optimizer)

    tokenizer = load_tokenizer(run.words, run.data.chat_template)
    data = load_run_data(run, tokenizer, console.print)
    if last is not None:
        _check_same_data(data.record, folder)
    check_paths(run, data)
    if t.freeze_shadow:
        training = data.training
        learnt = [s for s in training if s.base]
        if len(learnt) < len(training):
            when = " once it is frozen" if t.shadow_epochs else ""
            console.print(
                f"training.freeze_shadow: {len(training) - len(learnt)} rows for the shadow alone are left out{when}"
            )
        if not t.shadow_epochs:
            data.training = learnt
    model = build_model(run, tokenizer, data.labels)
    if data.labels is None:
        model.peft_config["default"].draft_tokens = frequent_tokens(s.learnt for s in data.training if s.base) or None
    if run.data.packing:
        check_packing(model)
    with exclusive(folder):
        last = _start_or_resume(run, folder, resume)  # again: another process may have begun while this one loaded
        write_records(folder, run, data.record)
        return _train(run, folder, last, model, tokenizer, data, console, quiet)


def _train(
    run: RunConfig,
    folder: Path,
    last: str | None,
    model: PeftModel,
    tokenizer: Any,
    data: RunData,
    console: Console,
    quiet: bool,
) -> dict[str, Any]:
    t, training, validation, record = run.training, data.training, data.validation, data.record
    activations = _stored(run, folder, model, training, console)
    pack_to = run.data.max_length if run.data.packing else None

    def build(
        rows: Any, settings: TrainingSection, folder: Path, watching: list[TrainerCallback], alone: int = 0
    ) -> ShadowTrainer:
        evaluates = validation is not None and settings.eval_every is not None
        trainer = ShadowTrainer(
            model=model,
            args=training_arguments(settings, folder, evaluates=evaluates),
            train_dataset=rows,
            eval_dataset=None if validation is None else chat.ChatDataset(validation),
            data_collator=data.collator(tokenizer.pad_token_id, packed=pack_to is not None),
            callbacks=watching,
            backbone_lr_ratio=t.backbone_lr_ratio,
            activations=activations,
            shadow_steps=alone,
            freezes=t.freeze_shadow and alone > 0,
            **trainer_options(t.optimizer, model, t.learning_rate, t.weight_decay),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    if t.target_minutes is not None:
        t = _timed(t, training, last, model, build, pack_to, console)
    rows, steps, alone = shadow_first(training, t, t.batch_size * t.gradient_accumulation * _processes(), pack_to)
    if last is None and (steps or data.stream is None):
        check_warmup(t, run.shadow.preset, steps or steps_by_epochs(t, len(rows), _processes()), alone)
    mean_tokens = sum(len(s.ids) for s in rows.sequences) / len(rows)
    shown = RunCallback(folder, mean_tokens * t.batch_size * t.gradient_accumulation, console, quiet)
    watching: list[TrainerCallback] = [shown]
    if t.patience is not None:
        watching.append(EarlyStopping(BEST[t.best_by], t.patience))
    trainer = build(data.stream or rows, t.model_copy(update={"max_steps": steps}), folder, watching, alone)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        shown.close()
    seconds = shown.before + time.monotonic() - started  # of all sessions of the run

    summary = {
        "steps": int(trainer.state.global_step),
        "planned_steps": int(trainer.state.max_steps),
        "interrupted": shown.interrupted and trainer.state.global_step < trainer.state.max_steps,
        "seconds": round(seconds, 1),
        "train_loss": next((r["train_loss"] for r in reversed(trainer.state.log_history) if "train_loss" in r), None),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base": run.base,
        "adapter": str(folder / "adapter"),
    }
    if t.patience is not None:
        summary["stopped_early"] = any(isinstance(each, EarlyStopping) and each.stopped for each in watching)
    if data.stream is not None and data.stream.left_out:
        summary["rows_left_out"] = data.stream.left_out
        console.print(f"data.train: {data.stream.left_out} of the rows that were read are longer than data.max_length")
    if t.load_best and trainer.state.best_global_step is not None:
        summary["best_step"] = int(trainer.state.best_global_step)
    save_adapter(model, tokenizer, folder / "adapter", run, summary, record)
    if validation is not None and not summary["interrupted"]:  # after saving: what fails here costs no training
        final = trainer.evaluate()
        summary.update({key: final[key] for key in BEST.values() if key in final})
        if data.labels is not None:
            judged = [path for path in BEST if learns(validation, path)]
            summary["accuracy"] = _accuracy(run, model, tokenizer, data.labels, judged)
        write_text(folder / "adapter" / "README.md", model_card(run, summary, record))
    if read_metrics(folder):
        plot_losses(folder)
    write_json(folder / "summary.json", summary)
    if run.push_to_hub is not None:
        push(folder / "adapter", run.push_to_hub)
    return summary


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _timed(
    t: TrainingSection,
    training: list[Any],
    last: str | None,
    model: PeftModel,
    build: Any,
    pack_to: int | None,
    console: Console,
) -> TrainingSection:
    """The settings with the steps that fit into ``target_minutes``, or that a run which is resumed had chosen."""
    if last is not None:
        steps = planned_in(last)
    else:
        alone = [s.alone() for s in training if s.shadow]
        if t.freeze_shadow:
            training = [s for s in training if s.base]
        if pack_to is not None:
            training, alone = pack(training, pack_to), pack(alone, pack_to)
        steps, seconds = steps_in_time(t, training, alone, model, build)
        console.print(
            f"training.target_minutes: a step takes {seconds:.2g} s, so {steps} steps fit into {t.target_minutes:g} minutes"
        )
    return t.model_copy(update={"max_steps": steps, "target_minutes": None})


def _accuracy(
    run: RunConfig, model: PeftModel, tokenizer: Any, labels: list[str], paths: list[str]
) -> dict[str, float]:
    """Share of the validation rows whose class each of the ``paths`` finds."""
    assert run.data.validation is not None
    task = ClassRows("validation", labels, class_rows_of(source_of(run.data.validation)))
    options: dict[str, Any] = {"batch_size": run.training.eval_batch_size, "max_length": run.data.max_length}
    return {
        mode: evaluate_task(model, tokenizer, task, mode=mode, progress=lambda done: None, **options)["score"]
        for mode in paths
    }


def push(adapter: Path, hub_id: str) -> None:
    """Upload an adapter's folder, model card included; the repository is made private if it does not exist.

    Raises:
        ShadowPeftError: if the Hub refuses or cannot be reached; the adapter stays where it is.
    """
    api = HfApi()
    try:
        api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(folder_path=str(adapter), repo_id=hub_id, commit_message="Add shadow adapter")
    except (HTTPError, HFValidationError, OSError) as error:  # HTTPError: the client's own, where no answer came
        raise ShadowPeftError(
            f"the adapter is saved in '{adapter}' but could not be uploaded to '{hub_id}' ({shorten(error)}); "
            "log in with `hf auth login` and upload that folder"
        ) from error


def _start_or_resume(run: RunConfig, folder: Path, resume: bool) -> str | None:
    """The checkpoint to continue from, or None for a new run."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"the run folder '{folder}' is a file; choose another output")
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    started = (folder / "config.yaml").is_file()
    if not resume:
        if folder.is_dir() and (started or not all(is_first_file(path.name) for path in folder.iterdir())):
            way = "continue with --resume" if last is not None or started else "remove it (it holds no checkpoint)"
            raise ConfigError(f"the run folder '{folder}' is not empty; choose another output, or {way}")
        return None
    if last is None and not started:
        raise ConfigError(
            f"there is no checkpoint in '{folder}' to resume from; remove the folder if it exists and start without --resume"
        )
    if last is None and (folder / "summary.json").is_file():
        raise ConfigError(
            f"the run in '{folder}' has ended and left no checkpoint to resume from; its adapter is in '{folder / 'adapter'}'"
        )
    if last is None:  # nothing was learnt yet, so rows that are corrected and other settings change nothing
        return None
    refuse_changed(
        folder,
        {"task_type": "CAUSAL_LM", "adapter": None, **stored_record(folder / "config.yaml")},
        run.model_dump(),
        ("base", "adapter", "task_type"),
        ("data", "shadow", "training"),
        {
            "data": DataConfig(train="").model_dump(),
            "training": TrainingSection().model_dump(),
        },
    )
    return last


def _check_same_data(record: dict[str, Any], folder: Path) -> None:
    stored = stored_record(folder / "data.json")
    for part, now in record.items():
        known = stored.get(part)
        if not isinstance(known, dict) or known.get("sha256") != now["sha256"]:
            raise ConfigError(
                f"the {part} data '{now['source']}' has changed since the run in '{folder}' was started; restore it or start "
                "a new run"
            )


def save_adapter(
    model: PeftModel, tokenizer: Any, folder: Path, run: RunConfig, summary: dict[str, Any], record: dict[str, Any]
) -> None:
    """Write the adapter with tokenizer and model card, beside and renamed: a failure leaves the previous one whole."""
    with written_whole(folder, "the adapter") as beside:
        model.save_pretrained(str(beside))
        tokenizer.save_pretrained(str(beside))
        (beside / "README.md").write_text(model_card(run, summary, record), encoding="utf-8")

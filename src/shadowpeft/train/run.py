"""One fine-tuning run from its configuration to its folder."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from peft import PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from shadowpeft.data import chat
from shadowpeft.data.robot import SYSTEM as ROBOT_SYSTEM
from shadowpeft.data.robot import load as load_robot
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.hf.base.aliases import is_alias, materialise
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.base.vocabulary import shared_tokens
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.messages import shorten
from shadowpeft.storage import write_json, write_text
from shadowpeft.train.checkpoints import reason, written_whole
from shadowpeft.train.config import RunConfig, TrainingSection
from shadowpeft.train.progress import RunCallback, plot_losses, read_metrics
from shadowpeft.train.trainer import ShadowTrainer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VERSIONED = ("shadowpeft", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")
ROBOT_REMOTE_REPEATS = 10


def prepare_cpu(threads: int | None = None) -> None:
    """Set thread count and flush denormals, before anything is computed.

    A random shadow produces denormal numbers, which a CPU computes many times slower (docs/defects.md, 25). The switch is per
    thread and inherited by the threads that are started later, so it comes first.
    """
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def robot_rows(split: str) -> list[dict[str, Any]]:
    """Rows of the packaged robot set in the form of :mod:`shadowpeft.data.chat`.

    ``train`` joins the three training parts: skill commands for both paths, open-domain answers for the base path, open-domain
    requests answered ``[REMOTE]`` for the shadow path (the paper, Appendix F). The last are only 47, so they are repeated
    ``ROBOT_REMOTE_REPEATS`` times: they cost almost nothing, and a shadow that never learns to defer executes questions.
    """
    paths = {"train_remote_base": "base", "train_remote_shadow": "shadow"}
    names = {
        "train": ["train_normal", "train_remote_base", "train_remote_shadow"],
        "validation": ["validation_normal"],
    }.get(split, [split])
    return [
        chat.check_row(
            {"prompt": row["prompt"], "response": row["response"], "path": paths.get(name, "both")}, row["id"]
        )
        for name in names
        for row in load_robot(name) * (ROBOT_REMOTE_REPEATS if name == "train_remote_shadow" else 1)
    ]


def read_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file, or of the packaged set for ``robot``."""
    return robot_rows(split) if source == "robot" else chat.read_jsonl(source)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base, an edge model or an adapter by alias, folder or Hub id, with a pad token.

    Raises:
        ConfigError: if it cannot be loaded, or has neither a pad nor an eos token.
    """
    source = str(materialise(name)) if is_alias(name) else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of '{name}' could not be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of '{name}' has neither a pad nor an eos token; give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(run: RunConfig, tokenizer: Any) -> PeftModel:
    """Base and adapter of a run."""
    base = load_base(run.base, dtype=DTYPES[run.training.precision])
    if base.config.pad_token_id is None:
        base.config.pad_token_id = tokenizer.pad_token_id
    _check_tokenizers(run, tokenizer)
    config = ShadowPeftConfig(task_type="CAUSAL_LM", **run.shadow.fields)
    config.base_alias = run.base if is_alias(run.base) else None
    set_seed(run.training.seed)
    return get_peft_model(base, config)


def _check_tokenizers(run: RunConfig, tokenizer: Any) -> None:
    if run.shadow.shadow_model == "mirror":
        return
    other = load_tokenizer(run.shadow.shadow_model)
    shared_tokens(tokenizer, other)


def encode_run(
    run: RunConfig, tokenizer: Any
) -> tuple[list[chat.Sequence], list[chat.Sequence] | None, dict[str, Any]]:
    """Training and validation sequences, and the record of the data (files, rows, fingerprints)."""
    system = run.data.system if run.data.system is not None else (ROBOT_SYSTEM if run.data.train == "robot" else None)
    options: dict[str, Any] = {"max_length": run.data.max_length, "too_long": run.data.too_long, "system": system}
    train_rows = read_rows(run.data.train, "train")
    record: dict[str, Any] = {
        "train": {"source": run.data.train, "rows": len(train_rows), "sha256": chat.fingerprint(train_rows)}
    }
    validation = run.data.validation or ("robot" if run.data.train == "robot" else None)
    encoded = None
    if validation is not None:
        rows = read_rows(validation, "validation")
        record["validation"] = {"source": validation, "rows": len(rows), "sha256": chat.fingerprint(rows)}
        encoded = chat.encode(rows, tokenizer, **options)
    training = chat.encode(train_rows, tokenizer, **options)
    again = [chat.Sequence(s.ids, s.start, base=False, shadow=True) for s in training if s.shadow]
    return training + again * run.data.shadow_repeats, encoded, record


def versions() -> dict[str, str]:
    """Versions and machine, for records."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    cuda = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        **found,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": cuda or f"{os.cpu_count()} CPU cores",
        "threads": str(torch.get_num_threads()),
    }


def training_arguments(t: TrainingSection, folder: Path, *, evaluates: bool) -> TrainingArguments:
    """transformers' settings of a run; ``evaluates``: whether a validation set is looked at every ``eval_every`` steps."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.scheduler,
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        num_train_epochs=t.epochs or 1.0,
        max_steps=t.max_steps or -1,
        label_smoothing_factor=t.label_smoothing,
        gradient_checkpointing=t.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if t.gradient_checkpointing else None,
        bf16=t.precision == "bfloat16",
        fp16=t.precision == "float16",
        use_cpu=not torch.cuda.is_available(),
        eval_strategy="steps" if evaluates and t.eval_every else "no",
        eval_steps=t.eval_every,
        save_strategy="steps" if t.save_every else "no",
        save_steps=t.save_every or 500,
        save_total_limit=t.keep_checkpoints,
        logging_steps=t.log_every,
        train_sampling_strategy="group_by_length" if t.group_by_length else "random",
        seed=t.seed,
        report_to=list(t.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        prediction_loss_only=True,
    )


def train(
    run: RunConfig, *, resume: bool = False, console: Console | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train, evaluate both paths, save the adapter and the record of the run.

    The folder ``run.output`` receives ``config.yaml``, ``versions.json``, ``data.json``, ``metrics.jsonl``, ``loss.png``,
    ``checkpoint-N/``, ``adapter/`` and ``summary.json``.

    Args:
        resume: continue from the newest checkpoint in the folder, or from the start if the run was killed before its first.

    Returns:
        the summary: steps, losses, parameters, seconds, and whether Ctrl-C ended the run early.

    Raises:
        ConfigError: if the folder already holds a run and ``resume`` is not set, or there is nothing to resume.
        ShadowPeftError: any defect of data, base or configuration; raised before training starts.
    """
    console = console or Console(stderr=True)
    t = run.training
    prepare_cpu(t.threads)
    folder = Path(run.output)
    last = _start_or_resume(run, folder, resume)
    check_loggers(t.report_to)

    tokenizer = load_tokenizer(run.base)
    training, validation, record = encode_run(run, tokenizer)
    if resume:
        _check_same_data(record, folder)
    model = build_model(run, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(s.ids) for s in training + (validation or []))
    if limit is not None and longest > limit:
        raise DataError(f"a row has {longest} tokens but the base reads {limit}; lower data.max_length to {limit}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "versions.json", versions())
    write_json(folder / "data.json", record)
    # last: a folder with this file is a run that can be resumed, from its start if there is no checkpoint yet
    write_text(folder / "config.yaml", yaml.safe_dump(run.model_dump(), sort_keys=False, allow_unicode=True))

    args = training_arguments(t, folder, evaluates=validation is not None)
    mean_tokens = sum(len(s.ids) for s in training) / len(training)
    shown = RunCallback(folder, mean_tokens * t.batch_size * t.gradient_accumulation, console, quiet)
    trainer = ShadowTrainer(
        model=model,
        args=args,
        train_dataset=chat.ChatDataset(training),
        eval_dataset=chat.ChatDataset(validation) if validation is not None else None,
        data_collator=chat.ChatCollator(tokenizer.pad_token_id),
        callbacks=[shown],
        backbone_lr_ratio=t.backbone_lr_ratio,
    )
    trainer.remove_callback(PrinterCallback)
    started = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=last)
    finally:
        shown.close()
    seconds = time.monotonic() - started

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
    save_adapter(model, tokenizer, folder / "adapter", run, summary, record)
    if validation is not None and not summary["interrupted"]:  # after saving: what fails here costs no training
        final = trainer.evaluate()
        summary.update({key: final[key] for key in ("eval_task_loss", "eval_shadow_loss")})
        write_text(folder / "adapter" / "README.md", model_card(run, summary, record))
    if read_metrics(folder):
        plot_losses(folder)
    write_json(folder / "summary.json", summary)
    if run.push_to_hub is not None:
        push(folder / "adapter", run.push_to_hub)
    return summary


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
        if folder.is_dir() and (started or any(path.name not in FIRST_FILES for path in folder.iterdir())):
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
    _check_same_run(run, folder)
    return last


FIRST_FILES = ("versions.json", ".versions.json.partial", "data.json", ".data.json.partial", ".config.yaml.partial")
"""What a run that was killed before its first step may leave; ``config.yaml`` is written last."""


def check_loggers(names: Sequence[str]) -> None:
    """Whether the packages that training reports to are there.

    Raises:
        ConfigError: naming the one that is missing.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.report_to names {name}, which is not installed; run: pip install 'shadowpeft[{name}]'"
            )


def stored_record(file: Path) -> dict[str, Any]:
    """A record of the run that is resumed (JSON is YAML, too)."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"'{file}', the record of the run to resume, cannot be read ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"'{file}', the record of the run to resume, is damaged; start a new run")
    return content


def _check_same_data(record: dict[str, Any], folder: Path) -> None:
    stored = stored_record(folder / "data.json")
    for part, now in record.items():
        if stored.get(part, {}).get("sha256") != now["sha256"]:
            raise ConfigError(
                f"the {part} data '{now['source']}' has changed since the run in '{folder}' was started; restore it or start "
                "a new run"
            )


FREE = (
    "eval_batch_size",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "threads",
    "report_to",
)
"""Settings that may change when a run is resumed: none of them is part of what is optimised."""


def _check_same_run(run: RunConfig, folder: Path) -> None:
    refuse_changed(
        folder, stored_record(folder / "config.yaml"), run.model_dump(), ("base",), ("data", "shadow", "training")
    )


def refuse_changed(
    folder: Path, stored: dict[str, Any], now: dict[str, Any], keys: Sequence[str], sections: Sequence[str]
) -> None:
    """Compare the settings a run was started with and those it has now: ``keys`` as wholes, ``sections`` but for :data:`FREE`.

    Raises:
        ConfigError: naming what differs.
    """
    changed = [key for key in keys if stored.get(key) != now[key]]
    changed += [
        f"{section}.{key}"
        for section in sections
        for key in now[section]
        if key not in FREE and (stored.get(section) or {}).get(key) != now[section][key]
    ]
    if changed:
        raise ConfigError(
            f"the run in '{folder}' was started with other settings ({', '.join(changed)}); resume with the configuration "
            "it was started with"
        )


def save_adapter(
    model: PeftModel, tokenizer: Any, folder: Path, run: RunConfig, summary: dict[str, Any], record: dict[str, Any]
) -> None:
    """Write the adapter with tokenizer and model card, beside and renamed: a failure leaves the previous one whole."""
    with written_whole(folder, "the adapter") as beside:
        model.save_pretrained(str(beside))
        tokenizer.save_pretrained(str(beside))
        (beside / "README.md").write_text(model_card(run, summary, record), encoding="utf-8")


def model_card(run: RunConfig, summary: dict[str, Any], record: dict[str, Any]) -> str:
    """README of an adapter: base, data, settings, results, how to use both halves."""
    header = yaml.safe_dump(
        {
            "base_model": run.base,
            "library_name": "peft",
            "tags": ["shadowpeft", "adapter", "text-generation"],
            "pipeline_tag": "text-generation",
        },
        sort_keys=False,
    )
    losses = "\n".join(
        f"| {label} | {summary[key]:.4f} |"
        for key, label in (("eval_task_loss", "attached"), ("eval_shadow_loss", "detached"))
        if key in summary
    )
    table = f"\n| path | validation cross-entropy per answer token |\n|---|---|\n{losses}\n" if losses else ""
    settings = yaml.safe_dump(
        {"shadow": run.shadow.model_dump(), "training": run.training.model_dump()}, sort_keys=False
    )
    return f"""---
{header}---
# Shadow adapter for {run.base}

Trained with shadowpeft for {summary["steps"]} steps on `{record["train"]["source"]}`
({record["train"]["rows"]} rows, sha256 `{record["train"]["sha256"][:16]}`); {summary["trainable_parameters"]:,} trainable
parameters.
{table}
```python
import shadowpeft

model = shadowpeft.load("path/to/this/folder")  # attached: the adapted base
edge = shadowpeft.detach(model)                 # detached: a stock transformers model
```

## Settings

```yaml
{settings}```
"""

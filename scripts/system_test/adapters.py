"""The three adapters, the edge model and its calibration: given, or made here."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

from experiments.training import repeated_rows
from peft import PeftConfig, PeftModel
from rich.console import Console
from scripts.system_test.options import METHODS

import shadowpeft
from shadowpeft.apps import route
from shadowpeft.apps.common import load_tokenizer_of
from shadowpeft.apps.detach import save_edge
from shadowpeft.data.tasks import get_task
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.load import read_config
from shadowpeft.serve.router import FILE
from shadowpeft.storage import write_json
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train import baselines
from shadowpeft.train.config import TrainingSection

BASE = "smollm2-135m"
SHADOW: dict[str, Any] = {
    "shadow_num_hidden_layers": 2,
    "shadow_init": "base_layers",
    "shadow_alpha": 0.5,
    "shadow_dropout": 0.1,
    "auxiliary_loss_weight": 4.0,
}
TRAINING: dict[str, Any] = {"warmup": 0.05, "scheduler": "linear", "log_every": 10, "backbone_lr_ratio": 1.5}
"""What is trained here where no adapter is given: the settings of the recorded tests, alike for all methods."""
SHADOW_ROW_REPEATS = 10
"""As in the experiments: the 47 ``[REMOTE]`` rows are shown ten times an epoch, in every method's order."""


def prepare(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """For each method its ``folder`` and, if it was trained here, the summary of its training."""
    given = {name: getattr(options, name) for name in METHODS}
    ready: dict[str, dict[str, Any]] = {}
    for name, folder in given.items():
        if folder is not None:
            if not (Path(folder) / "adapter_config.json").is_file():
                raise ConfigError(
                    f"--{name} is '{folder}', which holds no adapter_config.json; give an adapter's folder"
                )
            ready[name] = {"folder": folder}
    for name in METHODS:
        if name not in ready:
            budget = None if name == "shadow" else parameters(ready["shadow"], options.base)
            base = options.base or (base_of(given["shadow"]) if given["shadow"] else BASE)
            ready[name] = train(name, base, budget, options, console)
    return {name: ready[name] for name in METHODS}


def base_of(shadow: str) -> str:
    """The base that a shadow's adapter names."""
    config = read_config(shadow)
    named = config.base_alias or config.base_model_name_or_path
    if not named:
        raise ConfigError(f"the adapter in '{shadow}' does not name its base; pass --base")
    return str(named)


def parameters(shadow: dict[str, Any], base: str | None) -> int:
    """Trainable parameters of the shadow, which LoRA and DoRA are matched to."""
    if "training" in shadow:
        return int(shadow["training"]["trainable_parameters"])
    return baselines.count_trainable(shadowpeft.load(shadow["folder"], base, is_trainable=True))


def train(
    method: str, base_name: str, budget: int | None, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Train an adapter; continue, or take, what an earlier run with the same settings left.

    Raises:
        ConfigError: if the earlier run had others. ShadowPeftError: if training was stopped, or its loss is not finite.
    """
    section = {
        **TRAINING,
        "learning_rate": getattr(options, f"{method}_rate"),
        "batch_size": options.batch_size,
        "max_steps": options.train_steps,
        "save_every": max(1, options.train_steps // 4),
        "seed": options.seed,
    }
    settings = {
        "base": base_name,
        "budget": budget,
        "shadow": SHADOW if method == "shadow" else None,
        "shadow_row_repeats": SHADOW_ROW_REPEATS,
        "max_length": options.max_length,
        "training": section,
    }
    folder = options.out / "train" / method
    summary, before = folder / "summary.json", folder / "settings.json"
    if before.is_file() and json.loads(before.read_text(encoding="utf-8")) != settings:
        raise ConfigError(f"'{folder}' was trained with other settings; remove it or choose another --out")
    if summary.is_file():
        return json.loads(summary.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(before, settings)
    task, tokenizer = get_task("robot"), load_tokenizer(base_name)
    examples = repeated_rows(task, SHADOW_ROW_REPEATS)
    data = baselines.encode_examples(task, examples, tokenizer, max_length=options.max_length)
    base = baselines.load_task_base(base_name, task, tokenizer, seed=options.seed)
    fields = SHADOW if method == "shadow" else {}
    model = baselines.attach(base, method, fields, budget=budget, seed=options.seed)
    console.print(f"{method}: {baselines.count_trainable(model):,} parameters, {options.train_steps} steps")
    done = baselines.train_task(
        model, tokenizer, data, TrainingSection.model_validate(section), folder, console=console, quiet=False
    )
    if not done["finished"]:
        raise ShadowPeftError(f"training of {method} was stopped after {done['steps']} steps; start again")
    if not math.isfinite(done["train_loss"]):
        raise ShadowPeftError(f"the training loss of {method} is {done['train_loss']}; lower --{method}-rate")
    model.save_pretrained(str(folder / "adapter"))
    tokenizer.save_pretrained(str(folder / "adapter"))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    result = {"folder": str(folder / "adapter"), "settings": settings, "training": done}
    write_json(summary, result)
    return result


def merge(name: str, folder: str, options: argparse.Namespace) -> str:
    """A LoRA or DoRA folded into its base, as a folder that the cloud serves under the same name."""
    base = options.base or PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ConfigError(f"the adapter in '{folder}' does not name its base; pass --base")
    out = options.out / "merged" / name
    save_edge(PeftModel.from_pretrained(load_base(base), folder).merge_and_unload(), load_tokenizer(base), out)
    return str(out)


def detach(shadow: str, base: str | None, folder: Path) -> dict[str, Any]:
    """Write the edge model into ``folder``."""
    tokenizer = load_tokenizer_of(shadow, base)
    return save_edge(shadowpeft.detach(shadowpeft.load(shadow, base)), tokenizer, folder)


def routing(shadow: str, options: argparse.Namespace) -> Path | None:
    """The calibration: given, made here, found beside the adapter, or none (every known action is kept)."""
    if options.routing is not None:
        return Path(options.routing)
    if options.calibrate is None:
        beside = Path(shadow) / FILE
        return beside if beside.is_file() else None
    folder = options.out / "routing"
    route.calibrate(
        shadow,
        data="robot",
        check=None,
        base=options.base,
        target=options.calibrate,
        signal="auto",
        bound=False,
        cloud=False,
        system=None,
        max_new_tokens=16,
        limit=options.calibration_rows,
        out=str(folder),
        device="auto",
        as_json=False,
    )
    return folder / FILE

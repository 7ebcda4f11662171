"""The attached half of the device recipe: ``python -m experiments.device_joint NAME ...``; ``specs/device/joint.yaml``.

A cell starts from the averaged weights of a cell of :mod:`experiments.device_search`, trains both paths for some steps with the
product's own trainer, and is judged on the same development rows, attached and detached. No test row is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import get_peft_model
from transformers import TrainingArguments, set_seed

import shadowpeft
from experiments import device_rows as rows_of
from experiments.device_problems import shares
from experiments.device_search import FOLDER, PLAN, WORK, Cell, read_plan, record_of
from experiments.measuring import processor
from experiments.spec import digest
from shadowpeft.data import chat
from shadowpeft.data.robot import SYSTEM, parse_action
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.record import commit
from shadowpeft.generate import answer
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.layer import find_hub
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import write_json
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.config import RunLoader
from shadowpeft.train.rows import with_action

JOINT = PLAN.with_name("joint.yaml")


@dataclass(frozen=True)
class Joint:
    """One way to train both paths from a trained shadow."""

    name: str
    start: str
    """The cell of the search whose shadow it starts from."""
    steps: int = 100
    batch_size: int = 16
    rate: float = 2e-3
    """Of the injection and update networks; linear to 0."""
    ratio: float = 0.1
    """Rate of the shadow backbone, as a multiple of ``rate``; 0: it is frozen."""
    last: int = 0
    """How many of the base's last layers are refined; 0: all."""
    alpha: float = 0.5
    dropout: float = 0.1
    weight: float = 1.0
    """lambda."""
    use_update: bool = True
    variant: str = "paper"
    r: int = 16
    replies: bool = True
    """The attached path learns the spoken reply too; False: the action alone."""
    seed: int = 0

    def digest(self) -> str:
        """sha256 of the settings that are no defaults."""
        usual = {field.name: field.default for field in fields(self)}
        return digest({key: value for key, value in asdict(self).items() if key != "name" and value != usual[key]})


def read_joint(file: Path = JOINT) -> dict[str, Joint]:
    """The cells of a plan by name."""
    content = yaml.load(file.read_text(encoding="utf-8"), Loader=RunLoader)
    return {entry["name"]: Joint(**{**content.get("defaults", {}), **entry}) for entry in content["cells"]}


def sequences(train: list[dict[str, str]], tokenizer: Any, replies: bool) -> list[chat.Sequence]:
    """Training rows for both paths: the base learns real answers, the shadow actions."""
    rows = []
    for row in train:
        own = row["response"] if replies or not row["response"].startswith("[") else rows_of.response(row, "action")
        path = "shadow" if row["split"] == "train_remote_shadow" else "both"
        rows.append(with_action(chat.check_row({"prompt": row["prompt"], "response": own, "path": path}, row["id"])))
    return chat.encode(rows, tokenizer, max_length=128, system=SYSTEM)


def build(joint: Joint, cell: Cell, work: Path) -> Any:
    """Base and adapter, the shadow with the averaged weights of ``cell``."""
    base = load_base(cell.base)
    layers = base.config.num_hidden_layers
    set_seed(joint.seed)
    config = shadowpeft.ShadowPeftConfig(
        task_type="CAUSAL_LM",
        r=joint.r,
        shadow_num_hidden_layers=cell.layers,
        shadow_init="base_layers",
        shadow_alpha=joint.alpha,
        shadow_dropout=joint.dropout,
        auxiliary_loss_weight=joint.weight,
        use_update=joint.use_update,
        variant=joint.variant,
        refined_layers=[layers - joint.last, layers - 1] if joint.last else None,
    )
    model = get_peft_model(base, config)
    backbone = find_hub(model).shadowpeft_backbone["default"]
    state = torch.load(work / cell.name / "state.pt", weights_only=True)
    averaged = dict(zip(state["weights"], state["averaged"], strict=True))
    own = dict(backbone.named_parameters())
    with torch.no_grad():
        for name, mean in averaged.items():
            own[name.removeprefix("model.")].copy_(mean)
    backbone.requires_grad_(joint.ratio > 0)
    return model


def judge(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Free greedy answers of both paths on given rows."""

    def worth(runner: Any) -> dict[str, Any]:
        used = time.process_time()
        prompts = [row["prompt"] for row in rows]
        answers = answer(runner, tokenizer, prompts, system=SYSTEM, max_new_tokens=8, batch_size=32)
        actions = [parse_action(a.text) for a in answers]
        values = " ".join("1" if a == row["skill"] else "0" for row, a in zip(rows, actions, strict=True))
        return {**shares(rows, actions), "values": values, "processor_seconds": round(time.process_time() - used, 1)}

    return {"attached": worth(model), "detached": worth(shadowpeft.detach(model))}


def run(joint: Joint, cell: Cell, work: Path = WORK, folder: Path = FOLDER) -> dict[str, Any]:
    """Train and judge a cell; writes its record."""
    tokenizer = load_tokenizer(cell.base)
    model = build(joint, cell, work)
    split = rows_of.split(open_rows=True, hold_out=cell.hold_out)
    data = sequences(split.train, tokenizer, joint.replies)
    began, used = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = shadowpeft.ShadowTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                per_device_train_batch_size=joint.batch_size,
                max_steps=joint.steps,
                learning_rate=joint.rate,
                warmup_steps=0.05,
                lr_scheduler_type="linear",
                train_sampling_strategy="group_by_length",
                logging_steps=10,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
                seed=joint.seed,
            ),
            train_dataset=chat.ChatDataset(data),
            data_collator=chat.ChatCollator(tokenizer.pad_token_id),
            backbone_lr_ratio=joint.ratio or 1.0,
        )
        trainer.train()
    trained = [round(time.monotonic() - began, 1), round(time.process_time() - used, 1)]
    keys, started = ("step", "task_loss", "shadow_loss"), record_of(cell.name, folder)
    record = {
        "id": f"device/{joint.name}",
        "kind": "device-joint",
        "name": joint.name,
        "chosen_on": "development rows alone; no test row was looked at",
        "curve": [{key: line[key] for key in keys if key in line} for line in trainer.state.log_history if "loss" in line],
        "seconds": trained[0],
        "processor_seconds": trained[1],
        "development": judge(model, tokenizer, split.development),
        "start_processor_seconds": started["curve"][-1]["processor_seconds"] if started else None,
        "settings": asdict(joint),
        "settings_sha256": joint.digest(),
        "commit": commit(),
        "versions": environment(),
        "processor": processor(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    write_json(folder / "joint" / f"{joint.name}.json", record)
    return record


def main(arguments: list[str] | None = None) -> int:
    """0: done; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m experiments.device_joint", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cells; none: all without a record")
    chosen = parser.parse_args(arguments)
    prepare_cpu(1)
    try:
        plan, cells = read_joint(), {cell.name: cell for cell in read_plan()}
        unknown = [name for name in chosen.names if name not in plan]
        if unknown:
            raise ConfigError(f"{JOINT.name} has no cell '{unknown[0]}'")
        done = {file.stem for file in (FOLDER / "joint").glob("*.json")}
        for name in chosen.names or [name for name in plan if name not in done]:
            found = run(plan[name], cells[plan[name].start])["development"]
            shown = {path: {k: v["score"] for k, v in worth.items() if isinstance(v, dict)} for path, worth in found.items()}
            print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(shown)}", flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The attached half of the device recipe, and LoRA beside it: ``python -m experiments.device_joint [run|final] NAME ...``.

A cell of ``specs/device/joint.yaml`` starts from the averaged weights of a cell of :mod:`experiments.device_search`, trains
both paths (or, with a frozen shadow, the attached one) for some steps with the product's own trainer, and is judged on the
same development rows, attached and detached. A cell of the method ``lora`` trains on the rows that the attached path learns. A
killed run goes on from its last checkpoint. Only ``final`` reads test rows, once for each method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import shadowpeft
from experiments import device_rows as rows_of
from experiments.device_plan import FOLDER, PLAN, WORK, Cell, Recipe, averaged_of, read_cells, read_plan, record_of
from experiments.device_problems import corrected, place, shares
from shadowpeft.data import chat
from shadowpeft.data.robot import SYSTEM, parse_action
from shadowpeft.errors import ConfigError
from shadowpeft.generate import answer
from shadowpeft.hf.base.load import load_base
from shadowpeft.runtime import prepare_cpu
from shadowpeft.storage import write_json
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.baselines import LINEARS, count_trainable, lora_config
from shadowpeft.train.rows import with_action

JOINT = PLAN.with_name("joint.yaml")


@dataclass(frozen=True)
class Joint(Recipe):
    """One way to train both paths from a trained shadow."""

    name: str
    start: str = ""
    """The cell of the search whose shadow it starts from; none for LoRA."""
    method: str = "shadow"
    """``shadow``, or ``lora`` on all linear layers of the base."""
    steps: int = 100
    batch_size: int = 16
    rate: float = 2e-3
    """Of the injection and update networks; linear to 0."""
    ratio: float = 0.1
    """Rate of the shadow backbone, as a multiple of ``rate``; 0: it is frozen, and rows for it alone are left out."""
    last: int = 0
    """How many of the base's last layers are refined; 0: all."""
    alpha: float = 0.5
    dropout: float = 0.1
    weight: float = 1.0
    """lambda."""
    use_update: bool = True
    variant: Any = "paper"
    r: int = 16
    replies: bool = True
    """The attached path learns the spoken reply too; False: the action alone."""
    seed: int = 0


def sequences(train: list[dict[str, str]], tokenizer: Any, joint: Joint) -> list[chat.Sequence]:
    """Training rows for both paths: the base learns real answers, the shadow actions."""
    rows = []
    for row in train:
        own = row["response"] if joint.replies or not row["response"].startswith("[") else rows_of.response(row, "action")
        path = "shadow" if row["split"] == "train_remote_shadow" else "both"
        if path == "shadow" and (joint.method == "lora" or not joint.ratio):
            continue
        rows.append(with_action(chat.check_row({"prompt": row["prompt"], "response": own, "path": path}, row["id"])))
    return chat.encode(rows, tokenizer, max_length=128, system=SYSTEM)


class LoraTrainer(Trainer):
    """Logits at targets only, as the shadow's training has them, so that the times can be compared."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The mean over the targets of the whole batch."""
        whole = model.get_base_model()
        wanted = inputs["labels"][:, 1:] != -100
        out = whole.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        logits = whole.lm_head(out.last_hidden_state[:, :-1][wanted])
        loss = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:][wanted])
        return (loss, out) if return_outputs else loss


def build(joint: Joint, cell: Cell, work: Path) -> Any:
    """Base and adapter, the shadow with the averaged weights of ``cell``."""
    base = load_base(cell.base)
    set_seed(joint.seed)
    if joint.method == "lora":
        return get_peft_model(base, lora_config(base, "lora", joint.r, target_modules=LINEARS, dropout=joint.dropout))
    model = corrected(
        base,
        cell.layers,
        last=joint.last,
        task_type="CAUSAL_LM",
        r=joint.r,
        shadow_alpha=joint.alpha,
        shadow_dropout=joint.dropout,
        auxiliary_loss_weight=joint.weight,
        use_update=joint.use_update,
        variant=joint.variant,
    )
    hub = place(model, averaged_of(cell.name, work))
    if not joint.ratio:
        hub.freeze_shadow("default")
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

    if "ShadowPeftConfig" not in type(model.peft_config["default"]).__name__:
        return {"attached": worth(model)}
    return {"attached": worth(model), "detached": worth(shadowpeft.detach(model))}


class Clock(TrainerCallback):
    """Wall and processor seconds of the steps, kept beside the checkpoints, so that a continued run knows those before."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "clock.json"

    def spent(self) -> list[float]:
        """Seconds so far, and processor seconds."""
        return list(json.loads(self.file.read_text(encoding="utf-8"))) if self.file.is_file() else [0.0, 0.0]

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start to count."""
        self.before, self.began = self.spent(), (time.monotonic(), time.process_time())

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Keep what was counted; the last step is saved too."""
        now = time.monotonic(), time.process_time()
        write_json(self.file, [round(b + n - a, 1) for b, n, a in zip(self.before, now, self.began, strict=True)])


def run(joint: Joint, cell: Cell, work: Path = WORK, folder: Path = FOLDER) -> dict[str, Any]:
    """Train and judge a cell; writes its record."""
    tokenizer = load_tokenizer(cell.base)
    model = build(joint, cell, work)
    split = rows_of.split(open_rows=True, hold_out=cell.hold_out)
    data = sequences(split.train, tokenizer, joint)
    folder_of_run = work / "joint" / joint.name
    lora, last = joint.method == "lora", get_last_checkpoint(folder_of_run) if folder_of_run.is_dir() else None
    own: dict[str, Any] = {} if lora else {"backbone_lr_ratio": joint.ratio or 1.0}
    trainer: Any = (LoraTrainer if lora else shadowpeft.ShadowTrainer)(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder_of_run),
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
            save_steps=50,
            save_total_limit=1,
            remove_unused_columns=False,
            seed=joint.seed,
        ),
        train_dataset=chat.ChatDataset(data),
        data_collator=chat.ChatCollator(tokenizer.pad_token_id),
        callbacks=[Clock(folder_of_run)],
        **own,
    )
    trainer.train(resume_from_checkpoint=last)
    trained = Clock(folder_of_run).spent()
    keys, started = ("step", "loss" if lora else "task_loss", "shadow_loss"), record_of(cell.name, folder)
    trainer.model.save_pretrained(folder_of_run / "adapter")
    record = {
        "id": f"device/{joint.name}",
        "kind": "device-joint",
        "name": joint.name,
        "chosen_on": "development rows alone; no test row was looked at",
        "curve": [{key: line[key] for key in keys if key in line} for line in trainer.state.log_history if "loss" in line],
        "seconds": trained[0],
        "processor_seconds": trained[1],
        "trained_parameters": count_trainable(model),
        "development": judge(model, tokenizer, split.development),
        "start_processor_seconds": started["curve"][-1]["processor_seconds"] if started else None,
        **joint.stamp(),
        "settings": asdict(joint),
    }  # fmt: skip
    write_json(folder / "joint" / f"{joint.name}.json", record)
    return record


def final(joint: Joint, cell: Cell, work: Path = WORK, folder: Path = FOLDER) -> dict[str, Any]:
    """Look at the test rows, once for each method: with the cell that was chosen on development rows.

    Raises:
        ConfigError: if a cell of this method has seen them, or this one has not been run.
    """
    for file in sorted((folder / "joint").glob("*.json")):
        seen = json.loads(file.read_text(encoding="utf-8"))
        if seen.get("test") is not None and seen["settings"].get("method", "shadow") == joint.method:
            raise ConfigError(f"'{seen['name']}' has already been tested; the test rows are looked at once for each method")
    file = folder / "joint" / f"{joint.name}.json"
    weights = work / "joint" / joint.name / "adapter"
    if not (file.is_file() and weights.is_dir()):
        raise ConfigError(f"'{joint.name}' has no record or no weights under '{weights}'; run it first")
    model = PeftModel.from_pretrained(load_base(cell.base), weights).eval()
    record = json.loads(file.read_text(encoding="utf-8"))
    record["test"] = judge(model, load_tokenizer(cell.base), rows_of.test_rows())
    write_json(file, record)
    return dict(record["test"])


def main(arguments: list[str] | None = None) -> int:
    """0: done; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m experiments.device_joint", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "final"])
    parser.add_argument("names", nargs="*", help="cells; none: all without a record")
    chosen = parser.parse_args(arguments)
    prepare_cpu(1)
    try:
        plan, cells = read_cells(JOINT, Joint), {cell.name: cell for cell in read_plan()}
        unknown = [name for name in chosen.names if name not in plan]
        if unknown:
            raise ConfigError(f"{JOINT.name} has no cell '{unknown[0]}'")
        cells[""] = Cell(name="")
        if chosen.command == "final":
            for name in chosen.names:
                print(json.dumps(final(plan[name], cells[plan[name].start]), indent=2))
            return 0
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

"""LoRA on the rows of the packaged robot-tools set that the base answers, for the comparison in docs/tools.md.

    python -m scripts.robot_tools_lora runs/robot-tools-lora --epochs 2
    python -m scripts.robot_tools_eval runs/robot-tools-lora/adapter --split validation --modes lora --out record.json

The rows, their encoding, their order, the batches and the schedule are those of ``examples/robot-tools.yaml``; a second call
goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shadowpeft.apps.common import quiet_libraries

RUN = Path(__file__).resolve().parents[1] / "examples" / "robot-tools.yaml"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--epochs", type=float, default=2.0)
    arguments.add_argument("--rate", type=float, default=1e-3)
    arguments.add_argument("--rank", type=int, default=16)
    given = arguments.parse_args()
    quiet_libraries()
    from rich.console import Console

    from shadowpeft.data.chat import ChatDataset
    from shadowpeft.hf.base.load import load_base
    from shadowpeft.storage import write_json
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train import baselines
    from shadowpeft.train.config import TrainingSection, read_run
    from shadowpeft.train.rows import load_run_data

    run = read_run(RUN)
    tokenizer = load_tokenizer(run.base)
    rows: Any = [row for row in load_run_data(run, tokenizer, print).training if row.base]
    base = load_base(run.base)
    fields = {"r": given.rank, "target_modules": list(baselines.LINEARS), "dropout": 0.05}
    model = baselines.attach(base, "lora", fields, seed=0)
    shared = {name: getattr(run.training, name) for name in ("batch_size", "warmup", "scheduler", "seed")}
    own = {"epochs": given.epochs, "learning_rate": given.rate, "save_every": 200, "keep_checkpoints": 1, "threads": 1}
    section = TrainingSection(**shared, **own)
    summary = baselines.train_task(
        model, tokenizer, ChatDataset(rows), section, given.folder, console=Console(stderr=True), quiet=False
    )
    model.save_pretrained(str(given.folder / "adapter"))
    tokenizer.save_pretrained(str(given.folder / "adapter"))
    write_json(given.folder / "summary.json", summary)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

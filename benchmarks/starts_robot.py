"""What the detached shadow of the robot set makes of different starts, pretrained ones among them.

    python benchmarks/starts_robot.py random base_layers NAME=SHADOW ... [--steps 300] [--work runs/starts-robot]

``NAME=SHADOW`` is a folder that ``shadowpeft pretrain`` has written (``.../shadow``); ``random`` and ``base_layers`` start a
shadow of two layers without one. Each start is trained alone, without the base's forward pass, on the rows of the robot set for
the shadow (shuffled alike, ``[REMOTE]`` rows ten times), once for each learning rate; the rate with the lower validation loss
counts. The detached model then answers the 306 commands of the test set and 60 open requests. Runs that are finished are not
repeated. Writes ``docs/records/pretraining/robot-starts.json`` and the table in ``docs/pretraining.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from experiments.measuring import stamp
from rich.console import Console

import shadowpeft
from experiments import markdown
from shadowpeft import evaluate
from shadowpeft.apps.common import bar, load_tokenizer_of, quiet_libraries
from shadowpeft.data.robot import SYSTEM as ROBOT_SYSTEM
from shadowpeft.data.robot import load, parse_action
from shadowpeft.errors import ConfigError
from shadowpeft.generate import answer
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import between, write_json, write_text
from shadowpeft.train.config import parse_run
from shadowpeft.train.rows import robot_rows
from shadowpeft.train.run import train

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECORD = DOCS / "records" / "pretraining" / "robot-starts.json"
PAGE = DOCS / "pretraining.md"
MARKS = ("<!-- robot-starts -->", "<!-- /robot-starts -->")
OPEN = 60
NAMES = {
    "random": "random",
    "base_layers": "the base's first two layers",
    "first-40k": "the base's first two layers, pretrained for 40,960 tokens",
    "spread-40k": "the base's first and last layer, pretrained for 40,960 tokens",
}


def rows_for_the_shadow(split: str) -> list[dict[str, Any]]:
    """The rows that the shadow learns, for the shadow alone."""
    return [
        {"messages": [*row["messages"], {"role": "assistant", "content": row["response"]}], "path": "shadow"}
        for row in robot_rows(split)
        if row["path"] != "base"
    ]


def fine_tuned(name: str, shadow: dict[str, Any], rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train one start at one rate; the summary of the run."""
    folder = options.work / f"{name}-{rate:g}"
    content = {
        "base": "smollm2-135m",
        "data": {
            "train": str(options.work / "train.jsonl"),
            "validation": str(options.work / "validation.jsonl"),
            "system": ROBOT_SYSTEM,
            "max_length": 128,
        },
        "shadow": {"shadow_alpha": 0.5, "shadow_dropout": 0.1, "auxiliary_loss_weight": 1.0, **shadow},
        "training": {
            "max_steps": options.steps,
            "batch_size": 16,
            "learning_rate": rate,
            "warmup": 0.05,
            "scheduler": "linear",
            "log_every": 25,
            "save_every": 100,
            "threads": options.threads,
        },
        "output": str(folder),
    }
    run = parse_run(content, name)
    if (folder / "summary.json").is_file():
        summary = dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        if before != run.model_dump():
            raise ConfigError(f"'{folder}' was trained with other settings; remove it or choose another --work")
        if not summary["interrupted"]:
            return summary
    return train(run, resume=folder.exists(), console=options.console)


def measured(adapter: str, console: Console) -> dict[str, Any]:
    """Intent accuracy of the detached model, and how many open requests it does not take for commands."""
    edge, tokenizer = shadowpeft.detach(shadowpeft.load(adapter)), load_tokenizer_of(adapter, None)
    commands, remote = load("test_normal"), load("test_remote_large")
    remote = remote[:: max(1, len(remote) // OPEN)][:OPEN]
    with bar(console, "test", len(commands) + len(remote)) as progress:
        prompts = [row["prompt"] for row in [*commands, *remote]]
        answers = answer(
            edge, tokenizer, prompts, system=ROBOT_SYSTEM, max_new_tokens=10, batch_size=32, progress=progress
        )
    actions = [parse_action(a.text) for a in answers]
    skills, opened = actions[: len(commands)], actions[len(commands) :]
    return {
        "commands": evaluate.accuracy([a == row["skill"] for a, row in zip(skills, commands, strict=True)]),
        "open_tagged_remote": evaluate.accuracy([a == "REMOTE" for a in opened]),
    }


def table(record: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for name, start in record["starts"].items():
        given = f"{name}: {start['pretraining']['tokens']:,} tokens" if start["pretraining"] else name
        shares = [
            f"{100 * part['accuracy']:.1f} % [{100 * part['interval'][0]:.1f}, {100 * part['interval'][1]:.1f}]"
            for part in (start["commands"], start["open_tagged_remote"])
        ]
        rows.append([NAMES.get(name, given), f"{start['rate']:g}", f"{start['validation_loss']:.3f}", *shares])
    header = ["start", "rate", "validation loss", "commands", "open requests tagged"]
    return "\n".join(markdown.table(header, rows))


def filled(page: str, record: dict[str, Any]) -> str:
    """``page`` with the table between its two marks made anew."""
    return between(page, MARKS, table(record)) or page


def main() -> None:
    """Train, choose, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("starts", nargs="+", help="random, base_layers, or NAME=SHADOW")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 5e-3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/starts-robot"))
    options = parser.parse_args()
    options.console = Console(stderr=True)
    quiet_libraries()
    prepare_cpu(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        rows = (json.dumps(row, ensure_ascii=False) for row in rows_for_the_shadow(split))
        write_text(options.work / f"{split}.jsonl", "\n".join(rows) + "\n")
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {"starts": {}}
    for start in options.starts:
        name, _, folder = start.partition("=")
        shadow: dict[str, Any] = {"shadow_num_hidden_layers": 2, "shadow_init": name}
        if folder:
            shadow = {"shadow_model": folder, "share_embeddings": True}
        trials = {rate: fine_tuned(name, shadow, rate, options) for rate in options.rates}
        losses = {rate: summary["eval_shadow_loss"] for rate, summary in trials.items()}
        rate = min(losses, key=lambda each: losses[each])
        pretrained = Path(folder).parent / "result.json"
        record["starts"][name] = {
            "rate": rate,
            "validation_loss": losses[rate],
            "losses_by_rate": {f"{each:g}": loss for each, loss in losses.items()},
            "pretraining": json.loads(pretrained.read_text(encoding="utf-8")) if folder else None,
            "steps": trials[rate]["steps"],
            "batch_size": 16,
            "trainable_parameters": trials[rate]["trainable_parameters"],
            **measured(trials[rate]["adapter"], options.console),
            **stamp(),
            "versions": environment(),
        }
        write_json(RECORD, record)
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), record))
    print(table(record))


if __name__ == "__main__":
    main()

"""What the shadow's loss, its weight, its depth and its answers do to drafts: ``python -m experiments.drafts run|page``.

Cells stand in ``specs/device/drafts.yaml``: each trains both paths on the robot set, from a shadow that has learnt whole
answers alone, by ``shadowpeft train`` and resumed where it stopped. Drafts are judged on validation rows by counting
tokens, so a busy machine changes nothing: seconds follow from tokens a pass (docs/speculation.md).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import shadowpeft
from experiments.device_plan import PLAN as SEARCH
from experiments.device_plan import Recipe, own_record, read_cells
from experiments.markdown import table
from experiments.spec import RECORDS
from shadowpeft.data import robot
from shadowpeft.data.chat import stop_tokens, with_system
from shadowpeft.generate import encode_prompts, messages_of
from shadowpeft.runtime import prepare_cpu
from shadowpeft.storage import between, write_json, write_text
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.config import RunLoader, parse_run
from shadowpeft.train.rows import robot_rows
from shadowpeft.train.run import train

PLAN = SEARCH.with_name("drafts.yaml")
FOLDER = RECORDS / "drafts"
WORK = Path(__file__).resolve().parents[1] / "runs" / "drafts"
PAGE, MARKS = Path(__file__).resolve().parents[1] / "docs" / "speculation.md", ("<!-- drafts -->", "<!-- /drafts -->")
TEXTS = {"commands": ("validation_normal", 96), "open requests": ("validation_remote", 32)}
"""Split, and how many of its rows are asked."""
LONGEST, BATCH, DRAFTS = 40, 16, (3, 7)


@dataclass(frozen=True)
class Cell(Recipe):
    """One training of both paths; all fields but ``name`` decide what it computes."""

    name: str
    loss: str = "ce"
    """``shadow_loss``."""
    weight: float = 1.0
    """lambda of Eq. 8."""
    layers: int = 2
    regenerated_by: str = ""
    """The cell whose attached model wrote the answers that the shadow learns; "": the set's own."""
    epochs: float = 0.3
    """Passes of both paths."""


def run_files() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the starts, and what the cells have in common."""
    plan = yaml.load(PLAN.read_text(encoding="utf-8"), Loader=RunLoader)
    return plan["start"], plan["cell"]


def trained(content: dict[str, Any], folder: Path) -> Path:
    """The adapter of a run file, trained to its end in ``folder``."""
    if not (folder / "summary.json").exists():
        run = parse_run({**content, "output": str(folder)}, str(PLAN))
        train(run, resume=(folder / "config.yaml").exists())
    return folder / "adapter"


def start(content: dict[str, Any], layers: int, work: Path = WORK) -> Path:
    """The edge model that cells of so many layers begin with."""
    folder = work / f"start-{layers}-edge"
    if not folder.exists():
        own = copy.deepcopy(content)
        own["shadow"]["shadow_num_hidden_layers"] = layers
        model = shadowpeft.load(trained(own, work / f"start-{layers}"))
        shadowpeft.detach(model).save_pretrained(folder)
        load_tokenizer(own["base"]).save_pretrained(folder)
    return folder


def batches(prompts: list[str], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Prompts ``(BATCH, T)``, padded on the left."""
    chats = [with_system(messages_of(prompt), robot.SYSTEM) for prompt in prompts]
    for place in range(0, len(chats), BATCH):
        yield encode_prompts(tokenizer, chats[place : place + BATCH], "cpu")


def passes(agrees: list[bool], drafts: int) -> int:
    """Attached passes that make an answer with so many drafts in each, of whose tokens ``agrees`` says what a draft would be.

    While drafts stay, the shadow has read what the attached path says, so one pass over the answer tells all of them.
    """
    place = count = 0
    while place < len(agrees):
        stayed = 0
        while stayed < drafts and place + stayed < len(agrees) and agrees[place + stayed]:
            stayed += 1
        place, count = place + stayed + 1, count + 1
    return count


def say(model: Any, inputs: dict[str, Tensor], tokenizer: Any) -> Tensor:
    """Greedy answers ``(B, T)`` of the attached path, prompts left out."""
    out: Tensor = model.generate(
        **inputs,
        max_new_tokens=LONGEST,
        do_sample=False,
        eos_token_id=stop_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    return out[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def regenerated(adapter: Path, file: Path) -> Path:
    """The training rows as JSONL; what both paths learn gets the attached model's own answer for the shadow."""
    if file.exists():
        return file
    model, tokenizer = shadowpeft.load(adapter).eval(), load_tokenizer("smollm2-135m")
    checked = [{**row, "prompt": row["messages"][-1]["content"]} for row in robot_rows("train")]
    rows = [{key: value for key, value in row.items() if key != "messages" and value is not None} for row in checked]
    asked = [row for row in rows if row["path"] == "both"]
    asked.sort(key=lambda row: len(row["prompt"]))
    said: list[str] = []
    for inputs in batches([row["prompt"] for row in asked], tokenizer):
        said += tokenizer.batch_decode(say(model, inputs, tokenizer), skip_special_tokens=True)
        print(f"{len(said)} of {len(asked)} answers", file=sys.stderr, flush=True)
    for row, text in zip(asked, said, strict=True):
        row["shadow_response"] = text.strip() or row["response"]
    write_text(file, robot.json_lines(rows))
    return file


@torch.inference_mode()
def judge(adapter: Path) -> dict[str, Any]:
    """What drafts are worth on each text: agreement by token, tokens a pass, and how many commands the attached path knows."""
    model, tokenizer = shadowpeft.load(adapter).eval(), load_tokenizer("smollm2-135m")
    ids_of = torch.tensor(model.peft_config["default"].draft_tokens)
    found = {}
    for name, (split, count) in TEXTS.items():
        drawn = robot.load(split)
        rows = sorted(drawn[:: max(len(drawn) // count, 1)][:count], key=lambda row: len(row["prompt"]))
        said: list[str] = []
        same, overlap = [], 0.0
        for inputs in batches([row["prompt"] for row in rows], tokenizer):
            answers = say(model, inputs, tokenizer)
            said += tokenizer.batch_decode(answers, skip_special_tokens=True)
            ends = torch.isin(answers, torch.tensor([*stop_tokens(model, tokenizer), tokenizer.pad_token_id]))
            kept = ends.cumsum(1) <= 1  # the end is a token of the answer
            mask = torch.cat([inputs["attention_mask"], kept.long()], dim=1)
            ids = torch.cat([inputs["input_ids"], answers], dim=1)
            out = model(input_ids=ids, attention_mask=mask, return_shadow=True)
            before = slice(inputs["input_ids"].shape[1] - 1, -1)
            p, q = out.logits[:, before].softmax(-1), out.shadow_logits[:, before].softmax(-1)
            drafted = ids_of[q[..., ids_of].argmax(-1)]
            same += [row[real].tolist() for row, real in zip(drafted == answers, kept, strict=True)]
            overlap += float(torch.minimum(p, q).sum(-1)[kept].sum())
        tokens = sum(map(len, same))
        found[name] = {
            "rows": len(rows),
            "answer_tokens": tokens,
            "agreement": round(sum(map(sum, same)) / tokens, 4),
            "overlap": round(overlap / tokens, 4),
            "tokens_a_pass": {str(k): round(tokens / sum(passes(row, k) for row in same), 3) for k in DRAFTS},
            "right": sum(robot.parse_action(text) == row["skill"] for text, row in zip(said, rows, strict=True))
            if name == "commands"
            else None,
        }
    return found


def run(cell: Cell) -> None:
    """Train a cell and write its record."""
    first, content = run_files()
    content["shadow"] |= {
        "shadow_model": os.path.relpath(start(first, cell.layers)),
        "shadow_loss": cell.loss,
        "auxiliary_loss_weight": cell.weight,
    }
    content["training"]["epochs"] = cell.epochs
    if cell.regenerated_by:
        rows = regenerated(WORK / cell.regenerated_by / "adapter", WORK / f"said-by-{cell.regenerated_by}.jsonl")
        content["data"] = {"train": os.path.relpath(rows), "max_length": 128, "system": robot.SYSTEM}
    adapter = trained(content, WORK / cell.name)
    summary = json.loads((WORK / cell.name / "summary.json").read_text(encoding="utf-8"))
    write_json(
        FOLDER / f"{cell.name}.json",
        {"id": f"drafts/{cell.name}", "kind": "drafts", **asdict(cell), "texts": judge(adapter), "run": content}
        | {"seconds": summary["seconds"], "chosen_on": "validation rows; no test row was looked at"}
        | cell.stamp(),
    )


def records() -> list[dict[str, Any]]:
    """The cells that were run, in the plan's order; raises as :func:`~experiments.device_plan.own_record`."""
    found = (own_record(cell, FOLDER) for cell in read_cells(PLAN, Cell).values())
    return [record for record in found if record is not None]


_LEARNT = {"ce": ", the attached model's answers", "regenerated-whole": ", the answers of the row above"}
"""What the shadow learns, by the cell that wrote it."""


def block(found: list[dict[str, Any]]) -> str:
    """The table of the page."""
    found = [{"epochs": Cell.epochs, **record} for record in found]  # which the first records do not say
    varied = {"lambda": "weight", "layers": "layers", "passes": "epochs"}
    varied = {head: key for head, key in varied.items() if len({record[key] for record in found}) > 1}
    heads = ["shadow's loss", *varied, "attached right"]
    shown = ("same token", "kept if drawn", f"tokens a pass, {' and '.join(map(str, DRAFTS))} drafts")
    heads += [f"{text}: {what}" for text in TEXTS for what in shown]
    rows = []
    for record in found:
        texts = record["texts"]
        label = f"`{record['loss']}`" + _LEARNT.get(record["regenerated_by"], "")
        right = f"{texts['commands']['right'] / texts['commands']['rows']:.1%}"
        row = [label, *(f"{record[key]:g}" for key in varied.values()), right]
        for text in TEXTS:
            own = texts[text]
            row += [f"{own['agreement']:.1%}", f"{own['overlap']:.1%}"]
            row.append(", ".join(f"{own['tokens_a_pass'][str(k)]:.2f}" for k in DRAFTS))
        rows.append(row)
    counts = ", ".join(f"{own['rows']} {text} ({own['answer_tokens']} tokens)" for text, own in found[0]["texts"].items())
    return "\n".join(table(heads, rows)) + f"\n\n{counts}, greedy, one seed. Records: `experiments/records/drafts`."


def main(arguments: list[str] | None = None) -> int:
    """0: done; 130: stopped, to be resumed."""
    parser = argparse.ArgumentParser(prog="python -m experiments.drafts", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "page"])
    parser.add_argument("names", nargs="*", help="cells; none: all that have no record")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepare_cpu(1)
    if chosen.command == "run":
        for cell in read_cells(PLAN, Cell).values():
            if cell.name in chosen.names or (not chosen.names and own_record(cell, FOLDER) is None):
                run(cell)
                print(f"{cell.name}: done", flush=True)
        return 0
    text = between(PAGE.read_text(encoding="utf-8"), MARKS, block(records()))
    if text is None:
        print(f"error: '{PAGE}' lacks {MARKS[0]}", file=sys.stderr)
        return 2
    write_text(PAGE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

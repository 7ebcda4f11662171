"""Training cost and quality of a base that is corrected in its last n layers only, beside all layers and LoRA.

    python benchmarks/last_layers.py [--only time,memory,quality] [--rounds 3] [--steps 30] [--rows 240] [--resume]

SmolLM2-135M, float32, robot rows, batches of 16, one thread. Time: one training step (forward, backward, AdamW; reading the
stored activations is part of it), the methods take turns; the median over rounds of its processor time divided by LoRA's in
the same round. Memory: the most that a process of its own holds in such a step above the loaded model. Quality: every method
sees the same ``--rows`` rows in the same order for ``--steps`` steps; loss, and whether a greedy answer would begin with the
right action, on commands of the validation split. With ``--resume`` what is in the record is kept and the rest is measured, so
``--steps 300 --rows 4400`` can be run in pieces. Writes docs/records/last-layers.json, and from it the table and the figure of
docs/last-layers.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
import torch
from experiments.markdown import table
from experiments.measuring import alternate, paired_ratios, processor, quartiles, releases, resident_mib, short, stamp
from peft import get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import logging

from benchmarks.run import LINEARS, load, randomise
from shadowpeft import ShadowPeftConfig, evaluate
from shadowpeft.data import chat
from shadowpeft.data.robot import SYSTEM
from shadowpeft.hf.layer import find_hub
from shadowpeft.storage import between, write_json, write_text
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.activations import Activations, prepare
from shadowpeft.train.baselines import count_trainable, lora_config, match_rank
from shadowpeft.train.rows import robot_rows

ROOT = Path(__file__).resolve().parents[1]
PAGE, MARKS = ROOT / "docs" / "last-layers.md", ("<!-- last-layers -->", "<!-- /last-layers -->")
RECORD, FIGURE = ROOT / "docs" / "records" / "last-layers.json", ROOT / "docs" / "last-layers.png"
LAST = (15, 10, 6)
BATCH, LAYERS = 16, 30
METHODS = {
    "lora": "LoRA",
    "lora-targets": "LoRA, logits at targets only",
    "all": "all 29 layers",
    **{f"last-{n}": f"last {n}" for n in LAST},
    **{f"last-{n}-stored": f"last {n}, stored" for n in LAST},
    "last-6-frozen": "last 6, stored, shadow frozen",
}
JUDGED = ["last-6-stored", "lora", "last-10-stored", "all", "last-15-stored"]
"""Whose quality differs: storing activations changes none, and neither does leaving logits out."""
RATE = 3e-3
"""What docs/records of the robot set chose for LoRA and for all layers; not searched for the last n."""


def shadow(base: Any, last: int | None) -> Any:
    """The preset of run files, on the last layers."""
    refined = None if last is None else [LAYERS - last, LAYERS - 1]
    return get_peft_model(base, ShadowPeftConfig.preset("tuned", task_type="CAUSAL_LM", refined_layers=refined))


def kind_of(name: str) -> str:
    """What is special about a method: stored, frozen, targets, or nothing."""
    return name.rpartition("-")[2] if name.endswith(("-stored", "-frozen", "-targets")) else ""


class Method:
    """A model to train, and what is stored of its rows."""

    def __init__(self, name: str, rank: int, rows: list[chat.Sequence], folder: Path) -> None:
        kind, last = kind_of(name), next((n for n in LAST if name.startswith(f"last-{n}")), None)
        base = load()
        self.is_lora, self.targets_only = name.startswith("lora"), kind_of(name) == "targets"
        if self.is_lora:
            self.model = get_peft_model(base, lora_config(base, "lora", rank, target_modules=LINEARS))
        else:
            self.model = shadow(base, last)
        self.model.train()
        self.stored: Activations | None = None
        self.seconds_to_store = 0.0
        if kind == "frozen":
            find_hub(self.model).freeze_shadow("default")
        if kind in ("stored", "frozen"):
            began = time.process_time()
            self.stored = prepare(self.model, (s.ids for s in rows), folder / name, shadow=kind == "frozen")
            self.seconds_to_store = time.process_time() - began
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=RATE)

    def step(self, batch: dict[str, Any]) -> float:
        """Forward, backward, AdamW; the task's loss."""
        states = {} if self.stored is None else self.stored.batch(batch["input_ids"], batch["attention_mask"])
        if self.is_lora:
            task = loss = self.lora_loss(batch)
        else:
            out = self.model(**batch, **states, use_cache=False, loss_alone=True)
            loss, task = out.loss, out.task_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return float(task.detach())

    def lora_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """As transformers computes it; with ``targets_only`` as this package computes the attached path's."""
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if not self.targets_only:
            return self.model(**inputs, labels=batch["labels"], use_cache=False).loss  # type: ignore[no-any-return]
        whole = self.model.get_base_model()
        states, goals = whole.model(**inputs, use_cache=False).last_hidden_state[:, :-1], batch["labels"][:, 1:]
        wanted = goals != -100
        return torch.nn.functional.cross_entropy(whole.lm_head(states[wanted]), goals[wanted])


def sequences(split: str, count: int) -> list[chat.Sequence]:
    """``count`` rows of a split that the base learns, drawn with a fixed seed."""
    rows = [row for row in robot_rows(split) if row["path"] != "shadow"]
    chosen = random.Random(0).sample(rows, min(count, len(rows)))
    return list(chat.encode(chosen, load_tokenizer("smollm2-135m"), max_length=512, system=SYSTEM))


def batches(rows: list[chat.Sequence], steps: int) -> list[dict[str, Any]]:
    """Batches of rows of similar length, pass after pass in another order."""
    collate, made = chat.ChatCollator(pad_token_id=2), []
    ordered = sorted(rows, key=lambda s: len(s.ids))
    groups = [ordered[i : i + BATCH] for i in range(0, len(ordered) - BATCH + 1, BATCH)]
    for turn in range(math.ceil(steps / len(groups))):
        made += random.Random(turn).sample(groups, len(groups))
    return [collate([s.features() for s in group]) for group in made[:steps]]


def measure_time(rank: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Processor and wall time of a step of each method, in turns."""
    rows = sequences("train", 3 * BATCH)
    steps = batches(rows, rounds)
    methods = {name: Method(name, rank, rows, folder) for name in METHODS}
    for method in methods.values():
        randomise(method.model)
    wall: dict[str, list[float]] = {name: [] for name in METHODS}

    def run(name: str) -> float:
        batch = steps[len(wall[name])]
        began, processor_began = time.perf_counter(), time.process_time()
        methods[name].step(batch)
        spent = time.process_time() - processor_began
        wall[name].append(time.perf_counter() - began)
        return spent

    runs = {name: partial(run, name) for name in METHODS}
    times = alternate(runs, rounds, warmup=0, progress=lambda done: print(done, file=sys.stderr))
    tokens = sum(len(s.ids) for s in rows)
    size = sum(f.stat().st_size for f in (folder / "last-6-stored").glob("*.safetensors"))
    return {
        "rounds": rounds,
        "tokens_a_batch": round(statistics.mean(float(b["attention_mask"].sum()) for b in steps)),
        "processor_seconds": {n: round(statistics.median(t), 3) for n, t in times.items()},
        "wall_seconds": {n: round(statistics.median(t), 3) for n, t in wall.items()},
        "ratio_to_lora": {n: round(r, 3) for n, r in paired_ratios(times, "lora").items()},
        "quartiles": {
            n: [round(q, 3) for q in quartiles([a / b for a, b in zip(t, times["lora"], strict=True)])]
            for n, t in times.items()
        },
        "storing": {
            "rows": len(rows),
            "tokens": tokens,
            "bytes_a_token": round(size / tokens),
            "processor_seconds": {n: round(m.seconds_to_store, 2) for n, m in methods.items() if m.stored is not None},
        },
        "trainable_parameters": {n: count_trainable(m.model) for n, m in methods.items()},
    }


def peak(name: str, rank: int) -> None:
    """Child process: memory in two steps on the longest batch, above that of the loaded model."""
    rows = sorted(sequences("train", 8 * BATCH), key=lambda s: len(s.ids))[-BATCH:]
    (longest,) = batches(rows, 1)
    with tempfile.TemporaryDirectory() as folder:
        method = Method(name, rank, rows, Path(folder))
        before = resident_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        method.step(longest)
        method.step(longest)
        print(
            json.dumps(
                {"shape": list(longest["input_ids"].shape), "above_model_mib": round(resident_mib("VmHWM") - before)}
            )
        )


def measure_memory(name: str, rank: int) -> dict[str, Any]:
    """:func:`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, "--rank", str(rank)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(printed.strip().splitlines()[-1]))


def measure_quality(name: str, rank: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one method, and judge it on validation commands."""
    rows = sequences("train", options.rows)
    torch.manual_seed(0)
    method = Method(name, rank, rows, folder)
    warm = max(1, round(0.05 * options.steps))
    schedule = LambdaLR(
        method.optimiser, lambda s: min((s + 1) / warm, (options.steps - s) / max(options.steps - warm, 1))
    )
    losses, began = [], time.process_time()
    for number, batch in enumerate(batches(rows, options.steps), 1):
        losses.append(method.step(batch))
        schedule.step()
        print(f"\r{name} {number}/{options.steps} {losses[-1]:.3f}", end="", file=sys.stderr, flush=True)
    spent = time.process_time() - began
    return {
        "processor_seconds": round(spent, 1),
        "processor_seconds_to_store": round(method.seconds_to_store, 1),
        "train_loss": round(statistics.mean(losses[-5:]), 4),
        **judged(method.model.eval(), sequences("validation", options.judged)),
    }


@torch.inference_mode()
def judged(model: Any, rows: list[chat.Sequence]) -> dict[str, Any]:
    """Loss on the answers; and how many begin with the right action, judged by the likeliest token at each of its places."""
    tokenizer, collate = load_tokenizer("smollm2-135m"), chat.ChatCollator(pad_token_id=2)
    total, targets, right = 0.0, 0, []
    ordered = sorted(rows, key=lambda s: len(s.ids))
    for start in range(0, len(ordered), BATCH):
        part = ordered[start : start + BATCH]
        batch = collate([s.features() for s in part])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        goals = batch["labels"][:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), goals, reduction="sum"))
        targets += int((goals != -100).sum())
        likeliest = logits[:, :-1].argmax(-1)
        for s, chosen in zip(part, likeliest, strict=True):
            end = next(e for e in range(s.start + 1, len(s.ids) + 1) if "]" in tokenizer.decode(s.ids[s.start : e]))
            right.append(bool((chosen[s.start - 1 : end - 1] == torch.tensor(s.ids[s.start : end])).all()))
    return {"loss": round(total / targets, 4), "action": evaluate.accuracy(right)}


def page_table(record: dict[str, Any]) -> str:
    """Markdown."""
    timed, memory, quality = (record.get(part, {}) for part in ("time", "memory", "quality"))
    rows = []
    for name, title in METHODS.items():
        row = [title]
        if timed:
            low, high = timed["quartiles"][name]
            row += [
                f"{timed['trainable_parameters'][name] / 1e6:.2f} M",
                f"{timed['processor_seconds'][name]:.2f} s",
                f"{timed['ratio_to_lora'][name]:.2f} [{low:.2f}, {high:.2f}]",
            ]
        row.append(f"{memory[name]['above_model_mib']:,} MiB" if name in memory else "")
        judged_now = quality.get("methods", {}).get(name)
        row += ["", ""] if judged_now is None else [f"{judged_now['loss']:.3f}", percent(judged_now["action"])]
        rows.append(row)
    header = ["corrected", "trains", "step", "of LoRA's", "memory above the model", "loss", "right action"]
    return "\n".join(table(header, rows))


def percent(share: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    return f"{100 * share['accuracy']:.0f} % [{100 * share['interval'][0]:.0f}, {100 * share['interval'][1]:.0f}]"


def figure(record: dict[str, Any]) -> None:
    """Time and memory by the number of corrected layers, LoRA's as a line."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = {
        "computed in every pass": ["all", *(f"last-{n}" for n in LAST)],
        "activations stored": [f"last-{n}-stored" for n in LAST],
        "stored, shadow frozen": ["last-6-frozen"],
    }
    layers = {"all": 29, "last-6-frozen": 6, **{f"last-{n}{end}": n for n in LAST for end in ("", "-stored")}}
    picture, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    values = record["time"]["ratio_to_lora"], {n: m["above_model_mib"] for n, m in record["memory"].items()}
    for axes, value, label in (
        (left, values[0], "time of a step / LoRA's"),
        (right, values[1], "memory above the model, MiB"),
    ):
        for title, names in shown.items():
            known = [n for n in names if n in value]
            axes.plot([layers[n] for n in known], [value[n] for n in known], marker="o", label=title)
        axes.axhline(value["lora"], color="black", linestyle="--", label="LoRA")
        axes.set(xlabel="corrected layers, from the last", ylabel=label, ylim=(0, None))
    left.legend(fontsize=8)
    picture.savefig(FIGURE, dpi=120)


def main() -> None:
    """Measure, record, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="time,memory,quality")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--judged", type=int, default=100)
    parser.add_argument("--methods", help="of memory and quality, with commas; by default all, and those of JUDGED")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--render", action="store_true", help="only render what is recorded")
    parser.add_argument("--peak")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.peak:
        peak(options.peak, options.rank)
        return
    record = json.loads(RECORD.read_text(encoding="utf-8")) if options.resume or options.render else {}
    if not options.render:
        rank = match_rank(load(), "lora", count_trainable(shadow(load(), None)), target_modules=LINEARS).r
        versions = releases("torch", "transformers", "peft")
        made = {**stamp(), "machine": processor(), "threads": 1, "versions": versions}
        record = {**made, "model": "SmolLM2-135M-Instruct, float32", "batch": BATCH, "lora_rank": rank, **record}
        with tempfile.TemporaryDirectory() as folder:
            measured(record, options, Path(folder))
    write_text(
        PAGE, between(PAGE.read_text(encoding="utf-8"), MARKS, block(record)) or PAGE.read_text(encoding="utf-8")
    )
    if "time" in record and "memory" in record:
        figure(record)
    print(page_table(record))


def measured(record: dict[str, Any], options: argparse.Namespace, folder: Path) -> None:
    """Fill ``record``, and write it after each part; what it holds already is kept."""
    parts, rank = options.only.split(","), record["lora_rank"]
    if "time" in parts and "time" not in record:
        record["time"] = {**measure_time(rank, options.rounds, folder / "time"), **stamp()}
        write_json(RECORD, record)
    chosen = options.methods.split(",") if options.methods else None
    for name in chosen or METHODS if "memory" in parts else ():
        if name not in record.setdefault("memory", {}):
            record["memory"][name] = measure_memory(name, rank)
            write_json(RECORD, record)
    setting = {"steps": options.steps, "rows": options.rows, "judged": options.judged, "rate": RATE, "seed": 0}
    if "quality" in parts and record.get("quality", {}).get("setting") != setting:
        record["quality"] = {"setting": setting, "methods": {}, **stamp()}
    for name in chosen or JUDGED if "quality" in parts else ():
        if name not in record["quality"]["methods"]:
            record["quality"]["methods"][name] = measure_quality(name, rank, options, folder / "quality")
            write_json(RECORD, record)


def block(record: dict[str, Any]) -> str:
    """What the page says of a record."""
    timed, quality = record.get("time", {}), record.get("quality", {})
    lines = [page_table(record), ""]
    if timed:
        storing = timed["storing"]
        lines += [
            f"{record['date']}, commit {short(record['commit'])}, {record['machine']}, one thread, record "
            "[last-layers.json](records/last-layers.json).",
            f"Steps of {BATCH} rows, {timed['tokens_a_batch']} tokens: processor time, medians over {timed['rounds']} rounds "
            "in turns, quartiles in brackets.",
            f"LoRA r = {record['lora_rank']} on all linear layers trains as many parameters as the shadow on all layers.",
            f"Storing {storing['rows']} rows took {storing['processor_seconds']['last-6-stored']:.1f} s for the last 6, and "
            f"{storing['bytes_a_token']:,} bytes a token.",
        ]
    if quality:
        s = quality["setting"]
        lines.append(
            f"Quality: {s['rows']} rows, {s['steps']} steps, rate {s['rate']:g}, seed {s['seed']}; {s['judged']} commands of "
            "the validation split."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

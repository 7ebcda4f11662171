"""Starts and losses of pretraining, side by side: held-out cross-entropy after the same tokens in the same order.

    python benchmarks/starts.py [--base smollm2-135m] [--tokens 65536] [--work runs/starts] [--only NAME ...]

Every variant is a run of ``shadowpeft.train.pretrain`` on the English sample of the data folder, with two layers; ``VARIANTS``
names them. For Eq. 12 a small model with the base's tokens is needed and none can be had without a network, so one is made
first: two layers, 288 wide, its tied table the base's in its 288 leading directions, trained alone for the same number of
tokens of a part of the corpus that no variant reads. A variant that has a result in ``--work`` is not run again. Writes
``docs/records/pretraining/starts.json``, ``docs/starts.png`` and ``docs/starts.md``. About an hour on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from experiments.markdown import table
from experiments.measuring import stamp
from matplotlib.figure import Figure
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from shadowpeft.apps.common import bar, quiet_libraries
from shadowpeft.hf.base.load import load_base
from shadowpeft.storage import write_json, write_text
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.pretrain import Batches, end_token, make_stream, pretrain
from shadowpeft.train.pretrain_config import PretrainConfig, parse_pretraining

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "records" / "pretraining" / "starts.json"
LAYERS, WIDTH, LENGTH, ROWS = 2, 288, 256, 4
HELD_OUT = 24
MEASUREMENTS = 4
SMALL = "SMALL"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random, the base's width", {"backbone": {"layers": "first"}, "start": "random"}),
    "first": ("the base's first two layers", {"backbone": {"layers": "first"}}),
    "spread": ("the base's first and last layer", {"backbone": {"layers": "spread"}}),
    "narrow-random": ("small model, random projection", {"backbone": {"model": SMALL}, "start": "random"}),
    "narrow-pinv": ("small model, projection by Eq. 12", {"backbone": {"model": SMALL}, "start": "pseudo_inverse"}),
    "first-kl": ("first two layers, divergence only", {"backbone": {"layers": "first"}, "loss": "kl"}),
    "first-both": ("first two layers, both losses", {"backbone": {"layers": "first"}, "loss": "both"}),
}


def run_of(name: str, options: argparse.Namespace) -> PretrainConfig:
    """The run of a variant."""
    fields = VARIANTS[name][1]
    backbone = dict(fields["backbone"])
    if backbone.get("model") == SMALL:
        backbone["model"] = str(options.work / "small")
    else:
        backbone["count"] = LAYERS
    steps = math.ceil(options.tokens / (ROWS * LENGTH))
    content: dict[str, Any] = {
        "base": options.base,
        **fields,
        "backbone": backbone,
        "text": {
            "corpora": [{"builtin": "en_corpus"}],
            "validation": [{"builtin": "en_corpus", "split": "validation"}],
            "validation_sequences": HELD_OUT,
            "sequence_length": LENGTH,
            "shuffle_buffer": 500,
            "end_of_document": "<|endoftext|>",
        },
        "training": {
            "max_steps": steps,
            "batch_size": ROWS,
            "learning_rate": 1e-3,
            "warmup": 0.05,
            "final_rate": 0.1,
            "eval_every": max(1, steps // MEASUREMENTS),
            "log_every": max(1, steps // 16),
            "threads": options.threads,
        },
        "output": str(options.work / name),
    }
    if fields.get("loss", "ce") != "ce":
        content["teacher"] = {"folder": str(options.work / "teacher")}
    return parse_pretraining(content, name)


def make_small(options: argparse.Namespace, console: Console) -> None:
    """A narrow model with the base's tokens in ``small/`` of the work folder, trained on the corpus's test part."""
    folder = options.work / "small"
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    run = run_of("first", options)
    run = run.model_copy(update={"text": run.text.model_copy(update={"corpora": [_test_part(run)]})})
    tokenizer = load_tokenizer(run.base)
    table = load_base(run.base).get_input_embeddings().weight.detach()
    config = LlamaConfig(
        vocab_size=len(table),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 48,
        num_key_value_heads=WIDTH // 96,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model: Any = LlamaForCausalLM(config)
    directions = torch.linalg.eigh(table.T @ table).eigenvectors[:, -WIDTH:]
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table @ directions)
    stream = make_stream(
        run, lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), end_token(run, tokenizer)
    )
    batches, steps = Batches(stream, ROWS), math.ceil(options.tokens / (ROWS * LENGTH))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, 1e-4)
    with bar(console, "a small model", steps) as progress:
        for step in range(steps):
            batch = next(batches)
            loss = model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=batch["labels"],
                use_cache=False,
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            progress(step + 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _test_part(run: PretrainConfig) -> Any:
    return run.text.corpora[0].model_copy(update={"split": "test"})


def curve(folder: Path) -> list[dict[str, float]]:
    """Held-out cross-entropy by step."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{"step": r["step"], "held_out": r["eval_loss"]} for r in lines if "eval_loss" in r]


def record_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a variant's run."""
    folder = options.work / name
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    kept = ("steps", "tokens", "trainable_parameters", "start", "objective", "teacher", "seconds", "commit", "versions")
    return {
        "title": VARIANTS[name][0],
        **{key: result[key] for key in kept},
        "curve": curve(folder),
        "date": stamp()["date"],
    }


def draw(records: dict[str, Any], file: Path) -> None:
    """Held-out cross-entropy over tokens, one line a variant; starts far above uniform are cut off."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(records.values()):
        tokens = [p["step"] * run["tokens"] / run["steps"] for p in run["curve"]]
        style = {"ce": "-", "kl": ":", "both": "--"}[run["objective"]]
        axes.plot(tokens, [p["held_out"] for p in run["curve"]], style, marker=".", color=f"C{i}", label=run["title"])
    axes.set_ylim(5.5, 12.5)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("held-out cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def page(records: dict[str, Any]) -> str:
    """``docs/starts.md``."""
    newest = max(records.values(), key=lambda run: run["date"])
    rows = [
        [
            run["title"],
            run["objective"],
            f"{run['curve'][0]['held_out']:.2f}",
            f"{run['curve'][-1]['held_out']:.3f}",
            f"{run['trainable_parameters']:,}",
        ]
        for run in sorted(records.values(), key=lambda run: run["curve"][-1]["held_out"])
    ]
    lines = [
        "# Starts and losses of pretraining",
        "",
        "<!-- written by benchmarks/starts.py -->",
        "",
        f"SmolLM2-135M, two layers, {newest['tokens']:,} tokens of English in the same order, one thread ({newest['date']}). "
        "Cross-entropy on held-out text in nats per token; a uniform guess has 10.8. The small model (288 wide) was trained "
        "before, on as many tokens of another part of the corpus under its own head; no trained one with these tokens could "
        "be had.",
        "",
        *table(["variant", "trained with", "before", "after", "trainable parameters"], rows),
        "",
        "![Held-out cross-entropy over tokens](starts.png)",
        "",
        "Record: [starts.json](records/pretraining/starts.json)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write record, picture and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/starts"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet_libraries()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    options.work.mkdir(parents=True, exist_ok=True)
    if any(name.startswith("narrow") for name in options.only):
        make_small(options, console)
    for name in options.only:
        console.print(f"{name}: {VARIANTS[name][0]}", highlight=False)
        pretrain(run_of(name, options), resume=True, console=console)
    records = {name: record_of(name, options) for name in VARIANTS if (options.work / name / "result.json").is_file()}
    write_json(RECORD, records)
    draw(records, ROOT / "docs" / "starts.png")
    write_text(ROOT / "docs" / "starts.md", page(records))
    print(page(records))


if __name__ == "__main__":
    main()

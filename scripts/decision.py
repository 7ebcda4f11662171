"""How long one decision of an edge model takes on one thread, as it was detached and as it is exported.

    python -m scripts.decision FOLDER --actions actions.txt --data held-out.jsonl --rows train.jsonl --note "the machine's load"

``FOLDER`` is what ``shadowpeft detach`` wrote. Each format is written beside it, loaded as the edge server loads it, and asked
every request of the file alone. Writes docs/records/decision.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shadowpeft import export
from shadowpeft.apps.export import Vocabulary
from shadowpeft.constrained import choose
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import read_skills
from shadowpeft.serve.loading import load_edge

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "records" / "decision.json"
PAGE = ROOT / "docs" / "device.md"
_MARKED = re.compile(r"(<!-- decision -->\n).*?(<!-- /decision -->)", re.DOTALL)
FORMATS = {"f32": None, "bf16": ("hf", "bf16"), "int8": ("int8", "int8")}
"""Name -> format and number type; None: as it was detached."""
TRIMMED = {"f32, fewer tokens": ("hf", "f32"), "int8, fewer tokens": ("int8", "int8")}
"""With the tokens alone that the training rows need."""


@torch.inference_mode()
def measure(models: dict[str, Any], actions: dict[str, ActionTrie], rows: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Milliseconds of each request, the models in turn, and how many are right; the first three requests warm up.

    On a machine that does other work the processor's time says more than the clock's.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    right = dict.fromkeys(models, 0)
    for place, row in enumerate([*rows[:3], *rows]):
        for name, (model, tokenizer) in models.items():
            began, used = time.perf_counter(), time.process_time()
            (chosen,) = choose(model, tokenizer, [row["prompt"]], actions[name], exact=False)
            if place >= 3:
                times[name].append(1000 * (time.perf_counter() - began))
                processor[name].append(1000 * (time.process_time() - used))
                right[name] += chosen.action == row["skill"]
    return {
        name: {
            "p50_ms": round(statistics.median(found), 1),
            "p95_ms": round(statistics.quantiles(found, n=20)[-1], 1),
            "processor_p50_ms": round(statistics.median(processor[name]), 1),
            "right": right[name],
            "requests": len(found),
        }
        for name, found in times.items()
    }


def table(found: dict[str, Any]) -> str:
    """The record as docs/device.md has it."""
    lines = ["| edge model | MB | processor time, ms, median | clock, ms, median | right |", "|---|---|---|---|---|"]
    for name, each in found["formats"].items():
        cells = (each["megabytes"], each["processor_p50_ms"], each["p50_ms"], f"{each['right']} of {each['requests']}")
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Export, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--actions", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="training rows, which say which tokens are needed")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as beside:
        models = {}
        sizes = {}
        for name, target in {**FORMATS, **TRIMMED}.items():
            folder = options.folder
            if target is not None:
                folder = Path(beside) / name.replace(", ", "-").replace(" ", "-")
                model, tokenizer = load_edge(str(options.folder))
                if name in TRIMMED:
                    model, tokenizer, _ = Vocabulary(str(options.rows)).trim(model, tokenizer)
                export.write(target[0], model, tokenizer, folder, target[1])
            models[name] = load_edge(str(folder))
            sizes[name] = round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 1e6, 1)
        names = read_skills(options.actions)
        actions = {name: ActionTrie.of(tokenizer, names) for name, (_, tokenizer) in models.items()}
        found = measure(models, actions, rows)
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processor cores, one thread",
        "note": options.note,
        "versions": {name: version(name) for name in ("torch", "transformers", "torchao")},
        "parameters": models["f32"][0].num_parameters(),
        "formats": {name: {**found[name], "megabytes": sizes[name]} for name in models},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    if options.out == RECORD:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_MARKED.sub(lambda match: match[1] + table(result) + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()

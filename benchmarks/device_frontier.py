"""What k shadow layers cost: a decision of the detached model, and the attached model's time beside the bare base.

``python benchmarks/device_frontier.py`` writes docs/records/device-frontier.json; three minutes on an idle core. Time does not
depend on training, so the shadows are the base's first k layers as they are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.measuring import stamp
from peft import get_peft_model

import shadowpeft
from shadowpeft.constrained import choose
from shadowpeft.data import robot
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.hf.base.load import load_base
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import write_json
from shadowpeft.tokenizer import load_tokenizer

RECORD = Path(__file__).resolve().parents[1] / "docs" / "records" / "device-frontier.json"
BASE, LAYERS = "smollm2-135m", (1, 2, 4, 6, 8, 10)
ROUNDS, PROMPTS, TOKENS = 3, 12, 12


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.inference_mode()
def measure() -> dict[str, Any]:
    """Medians over alternating rounds, one thread."""
    prepare_cpu(1)
    tokenizer = load_tokenizer(BASE)
    trie = ActionTrie.of(tokenizer, robot.SKILLS)
    rows = robot.load("validation_normal")
    prompts = [row["prompt"] for row in rows[:: len(rows) // PROMPTS]][:PROMPTS]
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    attached = {k: _adapted(k).eval() for k in LAYERS}
    detached = {k: shadowpeft.detach(model) for k, model in attached.items()}
    bare = load_base(BASE).eval()
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    decisions: dict[int, list[float]] = {k: [] for k in LAYERS}
    ratios: dict[int, list[float]] = {k: [] for k in LAYERS}
    for turn in range(ROUNDS + 1):
        for k in LAYERS:
            own = [
                seconds(lambda p=p, k=k: choose(detached[k], tokenizer, [p], trie, exact=False, system=robot.SYSTEM))  # type: ignore[misc]
                for p in prompts
            ]
            base = seconds(lambda: bare.generate(input_ids=ids, **options))
            ratio = seconds(lambda k=k: attached[k].generate(input_ids=ids, **options)) / base  # type: ignore[misc]
            if turn:  # the first round warms up
                decisions[k] += own
                ratios[k].append(ratio)
    return {
        "layers": {
            str(k): {
                "decision_ms": round(1000 * statistics.median(decisions[k]), 1),
                "decision_ms_quartiles": [round(1000 * q, 1) for q in statistics.quantiles(decisions[k], n=4)[::2]],
                "attached_to_base": round(statistics.median(ratios[k]), 3),
                "attached_to_base_range": [round(min(ratios[k]), 3), round(max(ratios[k]), 3)],
                "parameters": sum(p.numel() for p in detached[k].parameters()),
            }
            for k in LAYERS
        },
        "rounds": ROUNDS,
        "prompts": len(prompts),
        "tokens": TOKENS,
        "threads": 1,
        "machine": environment(),
        **stamp(),
    }


def _adapted(layers: int) -> Any:
    config = shadowpeft.ShadowPeftConfig.preset("device", task_type="CAUSAL_LM", shadow_num_hidden_layers=layers)
    return get_peft_model(load_base(BASE), config)


if __name__ == "__main__":
    result = measure()
    write_json(RECORD, result)
    for k, row in result["layers"].items():
        print(k, row)

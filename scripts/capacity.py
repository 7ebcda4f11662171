"""What docs/deployment.md plans with: the engine's pace on this machine, and the memory of real configurations.

``python -m scripts.capacity`` measures SmolLM2-135M with a shadow on one thread, two minutes on an idle core, and
writes docs/records/capacity.json. ``--rows``, ``--prompt`` and ``--new`` change what is measured; with a GPU it measures that.
On a CPU it counts the process's own processor time, which other work on the machine stretches least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import shadowpeft
from shadowpeft.apps.common import quiet_libraries
from shadowpeft.hf.base.load import load_base
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.serve.backend import Attached, Backend, Detached
from shadowpeft.serve.capacity import answers_per_second
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.requests import Event, Failed, Finish, SamplingParams
from shadowpeft.tokenizer import load_tokenizer

RECORD = Path(__file__).parents[1] / "docs" / "records" / "capacity.json"
BASE = "smollm2-135m"
_QWEN = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
_PAPER = {
    "r": 16,
    "shadow_num_hidden_layers": 1,
    "shadow_intermediate_size": 256,
    "shadow_num_key_value_heads": 8,
    "shadow_head_dim": 128,
}


def _qwen3(width: int, layers: int, heads: int, mlp: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
        **_QWEN,
    )


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SmolLM2-135M": (
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        {"r": 16},
    ),
    "Qwen3-0.6B": (
        _qwen3(1024, 28, 16, 3072, True),
        {**_PAPER, "update_hidden_size": 10, "shadow_num_attention_heads": 16},
    ),
    "Qwen3-4B": (
        _qwen3(2560, 36, 32, 9728, True),
        {**_PAPER, "update_hidden_size": 8, "shadow_num_attention_heads": 16},
    ),
    "Qwen3-8B": (
        _qwen3(4096, 36, 32, 12288, False),
        {**_PAPER, "update_hidden_size": 8, "shadow_num_attention_heads": 8},
    ),
}
"""Base and shadow; the Qwen3 shadows are those of Table 1."""


def memory(name: str) -> dict[str, int]:
    """Parameters, and values of the key-value caches for one token, of a base and its shadow; nothing is allocated."""
    config, fields = MODELS[name]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    counts = {"base_parameters": sum(p.numel() for p in base.parameters())}
    model = get_peft_model(base, shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", **fields))
    shadow = model.peft_config["default"].shadow_backbone_config

    def cached(shape: Any) -> int:
        return int(2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"])

    return {
        **counts,
        "adapter_parameters": model.get_nb_trainable_parameters()[0],
        "base_cache_per_token": cached(
            {
                **config.to_dict(),
                "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            }
        ),
        "shadow_cache_per_token": cached(shadow),
    }


def clock_of(backend: Backend) -> Callable[[], float]:
    """Seconds: of one thread's processor time where the model computes on it, by the clock elsewhere."""
    return time.process_time if backend.model.device.type == "cpu" else time.perf_counter


def pace(backend: Backend, name: str, rows: int, prompt: int, new: int, rounds: int) -> dict[str, float]:
    """Medians: milliseconds to read a prompt, of a step, and what an engine with full rows gives, beside the formula."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (rows, prompt), generator=generator)
    reads, steps, measured = [], [], []
    clock = clock_of(backend)
    for _ in range(rounds):
        with torch.inference_mode():
            session = backend.open([name] * rows)
            mask = torch.ones_like(ids)
            began = clock()
            last = session.forward(ids, mask).argmax(-1, keepdim=True)
            reads.append((clock() - began) / rows)
            began = clock()
            for _ in range(new - 1):
                mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
                last = session.forward(last, mask).argmax(-1, keepdim=True)
            steps.append((clock() - began) / (new - 1))
        measured.append(throughput(backend, name, ids.tolist(), new))
    read, step = 1000 * statistics.median(reads), 1000 * statistics.median(steps)
    return {
        "rows": rows,
        "prefill_ms": round(read, 1),
        "step_ms": round(step, 1),
        "formula_per_second": round(answers_per_second(rows, read, step, new - 1), 3),
        "measured_per_second": round(statistics.median(measured), 3),
    }


def throughput(backend: Backend, name: str, prompts: list[list[int]], new: int) -> float:
    """Answers per second of an engine that gets two requests for every row at once."""
    engine = Engine(backend, EngineLimits(max_num_seqs=len(prompts), queue=2 * len(prompts), new_tokens=new))
    left, over, failed = threading.Semaphore(0), 2 * len(prompts), []

    def emit(event: Event) -> None:
        if isinstance(event, Failed):
            failed.append(event.error)
        if isinstance(event, (Finish, Failed)):
            left.release()

    for prompt in prompts * 2:
        engine.submit(prompt, name, SamplingParams(max_tokens=new), emit)
    clock = clock_of(backend)
    began = clock()
    engine.start()
    for _ in range(over):
        left.acquire()
    seconds = clock() - began
    engine.stop()
    if failed:
        raise failed[0]
    return over / seconds


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet_libraries()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare_cpu(1 if device == "cpu" else None)
    shape = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", **MODELS["SmolLM2-135M"][1])
    model = get_peft_model(load_base(BASE), shape).eval().to(device)
    tokenizer = load_tokenizer(BASE)
    attached = Attached(model, tokenizer, {"default": BASE}, "base")
    detached = Detached(shadowpeft.detach(model), tokenizer, "device")
    attached.stop_token_ids = detached.stop_token_ids = frozenset()  # every answer has its full length
    jobs = [(attached, "default", rows) for rows in options.rows] + [(detached, "device", 1)]
    console = Console(stderr=True)
    paces = [
        pace(backend, name, rows, options.prompt, options.new, options.rounds)
        for backend, name, rows in track(jobs, "measuring", console=console)
    ]
    record = {
        "base": f"{BASE}, float32",
        "prompt_tokens": options.prompt,
        "new_tokens": options.new,
        "clock": clock_of(attached).__name__,
        "attached": paces[:-1],
        "detached": paces[-1],
        "memory": {name: memory(name) for name in MODELS},
        "machine": environment(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"written to {RECORD}")


if __name__ == "__main__":
    main()

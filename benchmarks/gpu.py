"""The GPU kit: tests, and speed at the shapes of Qwen3 with random weights, on any CUDA machine without a network.

    python benchmarks/gpu.py [--part tests|decode|train|passes] [--shapes 0.6b,4b,8b] [--minutes 9] [--out gpu.json]

One part ends within ``--minutes``; what there was no time for is listed under ``left``. Parts add to the record, so the kit can
run in several calls. It needs torch, transformers and peft. Beside the bare base run LoRA (r = 16 on all linear layers), DoRA,
PEFT's shadow and ours (one layer, r = m = 16), the base in bfloat16; in ``train`` ours with its Triton kernels too.

decode: 64 greedy tokens after 32, batch 1; as ``generate`` runs by itself, and from a static cache, for which it compiles the
forward pass into CUDA graphs. passes: one forward over 1 to 32 tokens after 256 (what drafts cost to verify) and a drafted
token. train: a step of 4 x 512 tokens with AdamW, every token a target, and its peak of memory above the model's.
``--shapes tiny --device cpu`` tries the kit itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from experiments.markdown import table
from experiments.measuring import alternate, paired_ratios, processor, releases, seconds, stamp
from peft import LoraConfig, ShadowConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

import shadowpeft
from shadowpeft.hf.forward.drafting import Ahead, DraftHead
from shadowpeft.ops.fused import KERNELS
from shadowpeft.train import baselines
from shadowpeft.train.baselines import match_rank

LINEARS = list(baselines.LINEARS)
PARTS = ("tests", "decode", "passes", "train")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 320,
    },
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
"""Of Qwen3; ``tiny`` tries the kit itself."""
ROUNDS = 5
TRITON = "shadow_triton"
"""Ours with the step's Triton kernels."""


class OutOfTimeError(Exception):
    """The part's minutes are over."""


class Kit:
    """One shape on one device."""

    def __init__(self, shape: str, device: str, deadline: float) -> None:
        sizes = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, **SHAPES[shape]}
        if shape == "tiny":
            sizes |= {"num_key_value_heads": 2, "head_dim": 32}
        tied = shape != "8b"
        self.config = Qwen3Config(**sizes, max_position_embeddings=4096, tie_word_embeddings=tied)
        self.device, self.deadline = torch.device(device), deadline

    def base(self) -> Any:
        """Random weights in bfloat16, made on the device."""
        if time.monotonic() > self.deadline:
            raise OutOfTimeError
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16).eval()

    def model(self, name: str, rank: int = 16) -> Any:
        """A method on a base of its own; trained parts are not zero, so that nothing is skipped."""
        base = self.base()
        if name == "base":
            return base
        config: Any = {
            "shadow": lambda: shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=16),
            "peft_shadow": lambda: ShadowConfig(task_type="CAUSAL_LM", r=16),
            "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=LINEARS),
            "dora": lambda: LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=LINEARS, use_dora=True),
        }[name]()
        model = get_peft_model(base, config).to(self.device).eval()
        for parameter in model.parameters():
            if parameter.requires_grad and bool((parameter == 0).all()):
                parameter.data.normal_(0, 0.01)
        return model

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        """Random tokens."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.config.vocab_size, (rows, tokens), generator=generator).to(self.device)

    def turns(self, runs: dict[str, Callable[[], float]], against: str) -> dict[str, Any]:
        """Ratios and medians of alternating rounds."""
        times = alternate(self.timely(runs), ROUNDS)
        ratios = {name: round(ratio, 3) for name, ratio in paired_ratios(times, against).items()}
        return {
            f"ratio_to_{against}": ratios,
            "median_ms": {name: round(1000 * statistics.median(own), 3) for name, own in times.items()},
        }

    def timely(self, runs: dict[str, Callable[[], float]]) -> dict[str, Callable[[], float]]:
        """The runs, which end the part when its time is over."""

        def watched(run: Callable[[], float]) -> float:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            return run()

        return {name: partial(watched, run) for name, run in runs.items()}

    # ------------------------------------------------------------------------------------------------------- parts

    @torch.inference_mode()
    def decode(self) -> dict[str, Any]:
        """Time per token beside the bare base's, eager and from CUDA graphs."""
        tokens = 64 if self.device.type == "cuda" else 8
        models = {name: self.model(name) for name in ("base", "shadow", "lora", "peft_shadow", "dora")}
        prompt = self.ids(1, 32)

        def run(model: Any, **options: Any) -> float:
            options |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            return seconds(lambda: model.generate(input_ids=prompt, **options)) / tokens

        found = {"eager": self.turns({name: partial(run, model) for name, model in models.items()}, "base")}
        static = {"cache_implementation": "static", "disable_compile": self.device.type == "cpu"}
        compiled = {name: partial(run, models[name], **static) for name in ("base", "shadow", "lora")}
        found["graphs"] = self.turns(compiled, "base")
        return found

    @torch.inference_mode()
    def passes(self) -> dict[str, Any]:
        """An attached pass over some tokens, beside one over one token; and a drafted token."""
        model = self.model("shadow").get_base_model()
        cache = DynamicCache(config=self.config)
        model(input_ids=self.ids(1, 256), past_key_values=cache, use_cache=True, logits_to_keep=1)

        def verify(count: int) -> float:
            ids = self.ids(1, count)
            spent = seconds(lambda: model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=count))
            cache.crop(-count)
            return spent

        def draft() -> float:
            def one() -> None:
                ahead = Ahead(model, DraftHead(range(min(4096, self.config.vocab_size))))
                place = torch.tensor([[256]], device=self.device)
                ahead.read(self.ids(1, 1), cache, attention_mask=None, position_ids=place)
                ahead.drafts()

            spent = seconds(one)
            for layer in cache.layers[self.config.num_hidden_layers :]:
                layer.crop(-1)
            return spent

        counts = (1, 2, 4, 8, 16, 32)
        return self.turns({str(count): partial(verify, count) for count in counts} | {"draft": draft}, "1")

    def train(self) -> dict[str, Any]:
        """A step beside LoRA's at the rank of equal parameters, and its memory."""
        rows, tokens = (4, 512) if self.device.type == "cuda" else (2, 16)
        ids = self.ids(rows, tokens)
        shadow = self.model("shadow")
        trained = sum(p.numel() for p in shadow.parameters() if p.requires_grad)
        rank = match_rank(self.base(), "lora", trained, target_modules=LINEARS, tolerance=1.0).r
        del shadow
        found: dict[str, Any] = {"lora_rank": rank, "parameters": trained, "median_ms": {}, "above_model_mib": {}}
        for name in ("lora", "shadow", *((TRITON,) if self.device.type == "cuda" else ()), "peft_shadow"):
            os.environ[KERNELS] = "triton" if name == TRITON else ""
            model = self.model("shadow" if name == TRITON else name, rank).train()
            optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

            def step(model: Any = model, optimiser: Any = optimiser) -> None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)

            before = self._memory(reset=True)
            spent = [seconds(self.timely({"": lambda step=step: _none(step)})[""]) for _ in range(ROUNDS + 1)]  # type: ignore[misc]
            found["median_ms"][name] = round(1000 * statistics.median(spent[1:]), 2)
            found["above_model_mib"][name] = round(self._memory() - before)
            del model, optimiser, step
            gc.collect()
        lora = found["median_ms"]["lora"]
        found["ratio_to_lora"] = {name: round(own / lora, 3) for name, own in found["median_ms"].items()}
        return found

    def _memory(self, *, reset: bool = False) -> float:
        if self.device.type != "cuda":
            return 0.0
        if reset:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20


def _none(step: Callable[[], None]) -> float:
    step()
    return 0.0


def run_tests(device: str) -> dict[str, Any]:
    """The tests of every path, in a process of their own."""
    chosen = ["-m", "gpu"] if device == "cuda" else ["-k", "cpu and half_precision"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", *chosen],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    lines = done.stdout.strip().splitlines()
    return {"code": done.returncode, "summary": lines[-1] if lines else done.stderr[-500:], "failed": _failed(lines)}


def _failed(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(("FAILED", "ERROR"))][:40]


def rows_of(record: dict[str, Any]) -> list[list[str]]:
    """The table: every ratio there is."""
    rows = []
    for shape, parts in record["shapes"].items():
        for part, found in parts.items():
            for kind, own in found.items() if part == "decode" else [("", found)]:
                ratios = next((value for key, value in own.items() if key.startswith("ratio")), {})
                rows.append([shape, f"{part} {kind}".strip(), ", ".join(f"{n} {r:.3f}" for n, r in ratios.items())])
    return rows


def main() -> None:
    """Measure the parts that are asked for, and add them to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--shapes", default="0.6b,4b,8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", default="gpu.json")
    asked = parser.parse_args()
    out, deadline = Path(asked.out), time.monotonic() + 60 * asked.minutes
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"shapes": {}}
    record |= {
        "processor": processor(),
        "releases": releases("torch", "transformers", "peft"),
        "rounds": ROUNDS,
        **stamp(),
    }
    record["left"] = []
    for part in asked.part or PARTS:
        if part == "tests":
            record["tests"] = run_tests(asked.device)
            continue
        for shape in asked.shapes.split(","):
            try:
                found = getattr(Kit(shape, asked.device, deadline), part)()
            except OutOfTimeError:
                record["left"].append(f"{part} {shape}")
                continue
            record["shapes"].setdefault(shape, {})[part] = found
            out.write_text(json.dumps(record, indent=1), encoding="utf-8")
            gc.collect()
    out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(json.dumps(record))
    print("\n".join(table(["shape", "part", "ratios"], rows_of(record))))
    if record["left"]:
        print("no time for: " + ", ".join(record["left"]))
    if "tests" in record:
        print(record["tests"]["summary"], *record["tests"]["failed"], sep="\n")


if __name__ == "__main__":
    main()

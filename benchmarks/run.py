"""Speed and memory beside the bare base, LoRA, DoRA and PEFT's shadow: one process, alternating, paired medians.

    python benchmarks/run.py [--rounds 15] [--threads 1] [--out benchmarks/results.json] [--readme]

Decode: greedy tokens after a 32-token prompt; DoRA, far slower, with eight tokens beside a base of its own, as PEFT runs
it and with PEFT's cache of its norms (``DoraCaching``). Prefill: 256 tokens. Training: one step of 4 x 128 tokens with
AdamW, with LoRA at the rank whose trainable parameters come closest to the shadow's. Each ratio is the median over rounds of
the time divided by the bare base's (training: by LoRA's) in the same round. Peak memory is measured in a process of its own.
With --update, parts that are not measured keep their values in the record. With --readme the block of README.md between
``<!-- speed -->`` and ``<!-- /speed -->`` is written from the record.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import DoraCaching
from transformers import AutoModelForCausalLM, logging

import shadowpeft
from shadowpeft.evaluate.record import commit
from shadowpeft.hf.base.aliases import materialise
from shadowpeft.storage import between

ROOT = Path(__file__).resolve().parents[1]
README, MARKS = ROOT / "README.md", ("<!-- speed -->", "<!-- /speed -->")
DORA_TOKENS, DORA_ROUNDS = 8, 5
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load() -> Any:
    """SmolLM2-135M in float32."""
    return AutoModelForCausalLM.from_pretrained(materialise("smollm2-135m")).eval()


def ours() -> Any:
    """One-layer shadow, r = m = 16."""
    return get_peft_model(load(), shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=16)).eval()


def peft_shadow() -> Any:
    """PEFT's own shadow at the same settings."""
    from peft import ShadowConfig

    return get_peft_model(load(), ShadowConfig(task_type="CAUSAL_LM", r=16)).eval()


def lora(rank: int = 16, dora: bool = False) -> Any:
    """LoRA or DoRA on all linear layers."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=LINEARS, use_dora=dora)
    return get_peft_model(load(), config).eval()


def trainable(model: Any) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched_rank(budget: int) -> int:
    """The LoRA rank whose trainable parameters are nearest to ``budget``."""
    per_rank = trainable(lora(1))
    return max(1, round(budget / per_rank))


def randomise(model: Any) -> None:
    """Non-zero ``W_up`` and LoRA ``B``, so that nothing is skipped or denormal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and bool((parameter == 0).all()):
            parameter.data.normal_(0, 0.01, generator=generator)


def clock(run: Any) -> float:
    """Seconds of one call."""
    gc.collect()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds per generated token."""
    seconds = clock(
        lambda: model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=2,
        )
    )
    return seconds / new


def decode_dora(name: str, model: Any, ids: torch.Tensor) -> float:
    """Seconds per generated token, of few tokens; with PEFT's cache for the model of that name."""
    with DoraCaching(enabled=name == "dora_cached"):
        return decode(model, ids, DORA_TOKENS)


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> float:
    """Seconds for one forward over the prompt, last logits only, cache filled."""
    return clock(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1))


class Step:
    """One training step on 4 x 128 tokens: forward, backward, AdamW; the first ``masked`` tokens of a row are no targets."""

    def __init__(self, model: Any, masked: int = 0) -> None:
        self.model = model.train()
        self.optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.ids = torch.randint(0, 49000, (4, 128), generator=torch.Generator().manual_seed(0))
        self.labels = self.ids.clone()
        self.labels[:, :masked] = -100

    def __call__(self) -> None:
        self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def rounds(runs: dict[str, Any], count: int) -> dict[str, list[float]]:
    """Alternating measurements after one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(count):
        names = list(runs) if i % 2 == 0 else list(runs)[::-1]
        for name in names:
            times[name].append(runs[name]())
        print(f"\r{i + 1}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def ratios(times: dict[str, list[float]], against: str) -> dict[str, float]:
    """Median over rounds of time / time of ``against`` in the same round."""
    return {
        name: round(statistics.median(a / b for a, b in zip(values, times[against], strict=True)), 3)
        for name, values in times.items()
    }


def peak(which: str, rank: int) -> None:
    """Child process: two training steps; peak resident memory, and how far it is above that of the loaded model, in MiB."""
    model = ours() if which == "shadow" else peft_shadow() if which == "peft_shadow" else lora(rank)
    step = Step(model)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here: loading is not part of it
    step()
    step()
    print(json.dumps({"peak_mib": round(resident("VmHWM")), "above_model_mib": round(resident("VmHWM") - before)}))


def resident(key: str) -> float:
    """A line of this process's memory status (Linux), in MiB; ``ru_maxrss`` would inherit the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}; memory is measured on Linux only")


def main() -> None:
    """Measure everything and write one JSON record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", default="benchmarks/results.json")
    parser.add_argument("--only", default="decode,prefill,train,memory,growth")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--peak", default=None)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.peak:
        peak(args.peak, args.rank)
        return
    chosen = args.only.split(",")
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(0, 49000, (1, 32), generator=generator)
    long = torch.randint(0, 49000, (1, 256), generator=generator)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "machine": {"platform": platform.platform(), "threads": args.threads, "torch": torch.__version__},
        "model": "SmolLM2-135M-Instruct, float32",
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
    }
    if {"decode", "prefill", "growth"} & set(chosen):
        models = {"base": load(), "shadow": ours(), "lora": lora(), "peft_shadow": peft_shadow()}
        for name, model in models.items():
            if name != "base":
                randomise(model)
        if "decode" in chosen:
            runs = {n: (lambda m=m: decode(m, short, args.new_tokens)) for n, m in models.items()}
            times = rounds(runs, args.rounds)
            result["decode"] = {
                "ratio_to_base": ratios(times, "base"),
                "median_ms_per_token": {n: round(1000 * statistics.median(t), 2) for n, t in times.items()},
            }
        if "prefill" in chosen:
            times = rounds({n: (lambda m=m: prefill(m, long)) for n, m in models.items()}, args.rounds)
            result["prefill_256"] = {
                "ratio_to_base": ratios(times, "base"),
                "median_ms": {n: round(1000 * statistics.median(t), 1) for n, t in times.items()},
            }
        if "growth" in chosen:
            per = {
                new: statistics.median(decode(models["shadow"], short, new) for _ in range(3)) for new in (32, 64, 128)
            }
            result["ms_per_token_by_length"] = {str(k): round(1000 * v, 2) for k, v in per.items()}
        del models
        if "decode" in chosen:
            three = {"base": load(), "dora": lora(dora=True), "dora_cached": lora(dora=True)}
            times = rounds({n: (lambda n=n, m=m: decode_dora(n, m, short)) for n, m in three.items()}, DORA_ROUNDS)
            result["decode"]["ratio_to_base"].update(
                {n: ratio for n, ratio in ratios(times, "base").items() if n != "base"}
            )
            del three
    budget = trainable(ours())
    rank = matched_rank(budget)
    result["matched"] = {"shadow_parameters": budget, "lora_rank": rank, "lora_parameters": trainable(lora(rank))}
    for key, masked in (("train_step", 0), ("train_step_prompt_masked", 96)):
        if "train" not in chosen:
            break
        steps = {
            "lora": Step(lora(rank), masked),
            "shadow": Step(ours(), masked),
            "peft_shadow": Step(peft_shadow(), masked),
        }
        times = rounds({n: (lambda s=s: clock(s)) for n, s in steps.items()}, max(3, args.rounds // 2))
        result[key] = {
            "ratio_to_lora": ratios(times, "lora"),
            "median_seconds": {n: round(statistics.median(t), 2) for n, t in times.items()},
        }
        del steps
    if "memory" in chosen:
        result["train_memory_mib"] = {}
        for which in ("lora", "shadow", "peft_shadow"):
            command = [sys.executable, __file__, "--peak", which, "--rank", str(rank), "--threads", str(args.threads)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result["train_memory_mib"][which] = json.loads(out.strip().splitlines()[-1])
    if args.update and Path(args.out).is_file():
        result = {**json.loads(Path(args.out).read_text(encoding="utf-8")), **result}
    Path(args.out).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    if args.readme:
        README.write_text(filled(README.read_text(encoding="utf-8"), result), encoding="utf-8")


def filled(page: str, result: dict[str, Any]) -> str:
    """README's page with the block on speed of this record.

    Raises:
        RuntimeError: if the page has no marks.
    """
    made = between(page, MARKS, block(result))
    if made is None:
        raise RuntimeError(
            f"{README.name} has no lines {MARKS[0]} and {MARKS[1]}; write them where the block is to stand"
        )
    return made


def block(result: dict[str, Any]) -> str:
    """What README says of a record: how it was measured, and a table."""
    matched, memory = result["matched"], result["train_memory_mib"]
    names = ("base", "shadow", "peft_shadow", "lora", "dora", "dora_cached")

    def line(title: str, values: dict[str, Any], form: str) -> str:
        return f"| {title} | {' | '.join(form.format(values[n]) if n in values else '' for n in names)} |"

    commit_of = result["commit"][:7] + ("-dirty" if result["commit"].endswith("-dirty") else "")
    growth = ", ".join(f"{ms} ms at {length}" for length, ms in result["ms_per_token_by_length"].items())
    return "\n".join(
        [
            f"`make bench`, {result['date']}, commit {commit_of}, record "
            "[benchmarks/results.json](benchmarks/results.json): SmolLM2-135M, float32, one CPU thread, one process,",
            f"alternating, medians of paired ratios over {result['rounds']} rounds "
            f"(training {max(3, result['rounds'] // 2)}, DoRA {DORA_ROUNDS} of {DORA_TOKENS} tokens",
            f"where the others have {result['new_tokens']}). One-layer shadow with",
            "r = m = 16; LoRA and DoRA r = 16 on all linear layers; for training LoRA "
            f"r = {matched['lora_rank']}, which matches the number of trainable",
            f"parameters ({matched['shadow_parameters']:,} and {matched['lora_parameters']:,}).",
            "",
            "| | base | shadowpeft | PEFT's shadow | LoRA | DoRA | DoRA, norms cached |",
            "|---|---|---|---|---|---|---|",
            line("decode, time per token", result["decode"]["ratio_to_base"], "{:.2f}"),
            line("prefill, 256 tokens", result["prefill_256"]["ratio_to_base"], "{:.2f}"),
            line(
                "training step, 4 x 128 tokens, every token a target", result["train_step"]["ratio_to_lora"], "{:.2f}"
            ),
            line(
                "training step, last quarter of a row are targets",
                result["train_step_prompt_masked"]["ratio_to_lora"],
                "{:.2f}",
            ),
            line(
                "memory of a training step above the model's",
                {n: m["above_model_mib"] for n, m in memory.items()},
                "{:,} MiB",
            ),
            "",
            f"Time per token of the shadow by length: {growth} new tokens.",
        ]
    )


if __name__ == "__main__":
    main()

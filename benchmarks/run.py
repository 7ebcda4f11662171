"""Speed and memory beside the bare base, LoRA, DoRA and both other shadows: one process, alternating, paired medians.

    python benchmarks/run.py [--rounds 15] [--threads 1] [--out benchmarks/results.json] [--only PARTS] [--page | --check]

Decode: greedy tokens after a 32-token prompt, one row and eight; DoRA, far slower, with eight tokens beside a base of its own,
as PEFT runs it and with PEFT's cache of its norms (``DoraCaching``). Growth: the time of a token in answers of 64, 256 and
1,024. Prefill: 256 tokens. Training: one step of 4 x 128 tokens with AdamW, with LoRA at the rank whose trainable parameters
come closest to the shadow's. Each ratio is the median over rounds of the time divided by the bare base's (training: by LoRA's)
in the same round. Peak memory is measured in processes of their own, in turn; the median counts. With --update, parts that
are not measured keep their values in the record. With --page docs/compared.md and its figure are written from the record.
With --check nothing is written: the exit status is 1 if a ratio of ours is more than 0.05 above the record's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shadow_peft
import torch
from experiments.measuring import alternate, paired_ratios, resident_mib, seconds, stamp
from peft import LoraConfig, ShadowConfig, get_peft_model
from peft.helpers import DoraCaching
from transformers import AutoModelForCausalLM, logging

import shadowpeft
from benchmarks.speed_page import COMPARED, DORA_ROUNDS, DORA_TOKENS, filled, picture, slower, training_rounds
from shadowpeft.hf.base.aliases import materialise
from shadowpeft.storage import write_text
from shadowpeft.train import baselines
from shadowpeft.train.baselines import count_trainable, match_rank

MEASURED = 7
"""How often memory is measured: what the allocator keeps differs by a tenth from process to process."""
LENGTHS = {64: 3, 256: 3, 1024: 1}
"""New tokens, and rounds."""
LINEARS = list(baselines.LINEARS)


def load() -> Any:
    """SmolLM2-135M in float32."""
    return AutoModelForCausalLM.from_pretrained(materialise("smollm2-135m")).eval()


def ours() -> Any:
    """One-layer shadow, r = m = 16."""
    return get_peft_model(load(), shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=16)).eval()


def peft_shadow() -> Any:
    """PEFT's own shadow at the same settings."""
    return get_peft_model(load(), ShadowConfig(task_type="CAUSAL_LM", r=16)).eval()


def authors() -> Any:
    """The authors' package at the same settings."""
    inner = shadow_peft.get_shadow_model(
        load(), shadow_peft.ShadowConfig(injection_hidden_size=16, gate_hidden_size=16, dropout=0.0)
    )
    return shadow_peft.ShadowForCausalLM(inner).eval()


def lora(rank: int = 16, dora: bool = False) -> Any:
    """LoRA or DoRA on all linear layers."""
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=LINEARS, use_dora=dora)
    return get_peft_model(load(), config).eval()


def randomise(model: Any) -> None:
    """Non-zero ``W_up`` and LoRA ``B``, so that nothing is skipped or denormal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and bool((parameter == 0).all()):
            parameter.data.normal_(0, 0.01, generator=generator)


@torch.inference_mode()
def decode(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds per generated token."""
    spent = seconds(
        lambda: model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=2,
        )
    )
    return spent / new


def decode_dora(name: str, model: Any, ids: torch.Tensor) -> float:
    """Seconds per generated token, of few tokens; with PEFT's cache for the model of that name."""
    with DoraCaching(enabled=name == "dora_cached"):
        return decode(model, ids, DORA_TOKENS)


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> float:
    """Seconds for one forward over the prompt, last logits only, cache filled."""
    return seconds(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1))


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


def timed(runs: dict[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Alternating measurements after ``warmup`` rounds, with a counter."""

    def show(done: int) -> None:
        print(f"\r{done}/{rounds}", end="" if done < rounds else "\n", file=sys.stderr, flush=True)

    return alternate(runs, rounds, warmup=warmup, progress=show)


def ratios(times: dict[str, list[float]], against: str) -> dict[str, float]:
    """Paired ratios with three digits."""
    return {name: round(ratio, 3) for name, ratio in paired_ratios(times, against).items()}


def medians(times: dict[str, list[float]], scale: float, digits: int) -> dict[str, float]:
    """Median of each, in units of ``1 / scale`` seconds."""
    return {name: round(scale * statistics.median(values), digits) for name, values in times.items()}


def peak(which: str, rank: int) -> None:
    """Child process: two training steps; peak resident memory, and how far it is above that of the loaded model, in MiB."""
    model = ours() if which == "shadow" else peft_shadow() if which == "peft_shadow" else lora(rank)
    step = Step(model)
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here: loading is not part of it
    step()
    step()
    highest = resident_mib("VmHWM")
    print(json.dumps({"peak_mib": round(highest), "above_model_mib": round(highest - before)}))


def generation(parts: set[str], args: argparse.Namespace) -> dict[str, Any]:
    """``decode``, ``prefill_256`` and ``ms_per_token_by_length``, as far as they are asked for."""
    generator = torch.Generator().manual_seed(0)
    short_prompt = torch.randint(0, 49000, (1, 32), generator=generator)
    long_prompt = torch.randint(0, 49000, (1, 256), generator=generator)
    eight = torch.randint(0, 49000, (8, 32), generator=generator)
    result: dict[str, Any] = {}
    models = {"base": load(), "shadow": ours(), "lora": lora(), "peft_shadow": peft_shadow(), "authors": authors()}
    for name, model in models.items():
        if name != "base":
            randomise(model)
    models["lora_merged"] = copy.deepcopy(models["lora"]).merge_and_unload()
    if "decode" in parts:
        runs = {n: partial(decode, m, short_prompt, args.new_tokens) for n, m in models.items()}
        times = timed(runs, args.rounds)
        result["decode"] = {"ratio_to_base": ratios(times, "base"), "median_ms_per_token": medians(times, 1000, 2)}
    if "decode8" in parts:
        times = timed({n: partial(decode, m, eight, args.new_tokens // 2) for n, m in models.items()}, args.rounds // 2)
        result["decode_8"] = {"ratio_to_base": ratios(times, "base"), "median_ms_per_step": medians(times, 1000, 2)}
    if "prefill" in parts:
        times = timed({n: partial(prefill, m, long_prompt) for n, m in models.items()}, args.rounds)
        result["prefill_256"] = {"ratio_to_base": ratios(times, "base"), "median_ms": medians(times, 1000, 1)}
    if "growth" in parts:
        result["by_length"] = {}
        for new, rounds in LENGTHS.items():
            two = {n: partial(decode, models[n], short_prompt, new) for n in ("base", "shadow")}
            times = timed(two, rounds, warmup=0)
            found = {"ratio_to_base": ratios(times, "base")["shadow"], "median_ms_per_token": medians(times, 1000, 2)}
            result["by_length"][str(new)] = {"rounds": rounds, **found}
    del models
    if "decode" in parts:
        three = {"base": load(), "dora": lora(dora=True), "dora_cached": lora(dora=True)}
        times = timed({n: partial(decode_dora, n, m, short_prompt) for n, m in three.items()}, DORA_ROUNDS)
        result["decode"]["ratio_to_base"].update({n: r for n, r in ratios(times, "base").items() if n != "base"})
    return result


def training(masked: int, rank: int, rounds: int) -> dict[str, Any]:
    """A step of each method, the first ``masked`` tokens of a row without a target."""
    models = {"lora": lora(rank), "shadow": ours(), "peft_shadow": peft_shadow()}
    steps = {name: partial(seconds, Step(model, masked)) for name, model in models.items()}
    times = timed(steps, rounds)
    return {"ratio_to_lora": ratios(times, "lora"), "median_seconds": medians(times, 1, 2)}


def memory(which: str, rank: int, threads: int) -> dict[str, int]:
    """:func:`peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", which, "--rank", str(rank), "--threads", str(threads)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(printed.strip().splitlines()[-1]))


def middle(found: list[dict[str, int]]) -> dict[str, int]:
    """The one of an odd number of measurements whose memory is the median."""
    return sorted(found, key=lambda each: each["above_model_mib"])[len(found) // 2]


def main() -> None:
    """Measure everything and write one JSON record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", default="benchmarks/results.json")
    parser.add_argument("--only", default="decode,decode8,prefill,train,memory,growth")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
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
    chosen = set(args.only.split(","))
    result: dict[str, Any] = {
        **stamp(),
        "machine": {"platform": platform.platform(), "threads": args.threads, "torch": torch.__version__},
        "model": "SmolLM2-135M-Instruct, float32",
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
    }
    if {"decode", "decode8", "prefill", "growth"} & chosen:
        result.update(generation(chosen, args))
    budget = count_trainable(ours())
    rank = match_rank(load(), "lora", budget, target_modules=LINEARS).r
    result["matched"] = {
        "shadow_parameters": budget,
        "lora_rank": rank,
        "lora_parameters": count_trainable(lora(rank)),
    }
    if "train" in chosen:
        for key, masked in (("train_step", 0), ("train_step_prompt_masked", 96)):
            result[key] = training(masked, rank, training_rounds(args.rounds))
    if "memory" in chosen:
        names = ("lora", "shadow", "peft_shadow")
        found = [{name: memory(name, rank, args.threads) for name in names} for _ in range(MEASURED)]
        result["train_memory_mib"] = {name: middle([each[name] for each in found]) for name in names}
    record = json.loads(Path(args.out).read_text(encoding="utf-8")) if args.update or args.check else {}
    if args.check:
        worse = slower(record, result)
        print("\n".join(worse) or "no ratio is more than 0.05 above the record's")
        sys.exit(1 if worse else 0)
    content = json.dumps({**record, **result}, indent=2)
    write_text(Path(args.out), content + "\n")
    print(content)
    if args.page:
        write_text(COMPARED, filled(COMPARED.read_text(encoding="utf-8"), json.loads(content)))
        picture(json.loads(content))


if __name__ == "__main__":
    main()

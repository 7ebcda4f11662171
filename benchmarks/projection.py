"""Eq. 12 beside ``torch.linalg.pinv``, and alone at the shape of Qwen3-8B with Qwen3-0.6B.

    python benchmarks/projection.py [--rounds 3] [--threads 2] [--only PART ...] [--out benchmarks/projection.json]

Parts ``20000x1024x512`` and ``40000x2048x1024``: both ways in turn in one process, with random float32 heads of ``V x d`` and
``V x d_s``, medians. ``real``: accuracy on the head of SmolLM2-135M, whose condition is a real head's. ``full``: random
bfloat16 heads of 151,936 x 4,096 and 151,936 x 1,024 in a process of its own, whose peak memory is read; between its chunks
plain square matmuls are timed, for the machine's own rate. ``full-pinv``: ``pinv`` of the same large head in float32, once.
Wall time and processor time are both recorded: on a busy machine only the second, with one thread, says something. Parts that
are not measured keep their values in the record. About 20 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from experiments.measuring import resident_mib, stamp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM

from shadowpeft.core import projection
from shadowpeft.hf.base.aliases import materialise
from shadowpeft.storage import write_text

SIZES = ("20000x1024x512", "40000x2048x1024")
FULL = (151_936, 4096, 1024)
PARTS = (*SIZES, "real", "full", "full-pinv")
PROBE = 1024


def heads(rows: int, d: int, d_s: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random head, and a small one of which it explains three quarters of the squared norm."""
    generator = torch.Generator().manual_seed(0)
    large, small = torch.empty(rows, d, dtype=dtype), torch.empty(rows, d_s, dtype=dtype)
    for start in range(0, rows, 4096):  # never a float32 copy of the whole
        part = torch.randn(min(4096, rows - start), d, generator=generator)
        large[start : start + len(part)] = part
        small[start : start + len(part)] = part[:, :d_s] + 3**-0.5 * torch.randn(len(part), d_s, generator=generator)
    return large, small


Times = tuple[float, float]
"""Wall time and processor time of all threads, seconds."""


def now() -> Times:
    """Both clocks."""
    return time.perf_counter(), time.process_time()


def since(began: Times) -> Times:
    """Both times since ``began``."""
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


def clock(run: Callable[[], Any]) -> tuple[Times, Any]:
    """Times and result of one call."""
    began = now()
    result = run()
    return since(began), result


def missed(large: Tensor, small: Tensor, weight: Tensor) -> float:
    """``||W_lm W_p - W_small|| / ||W_small||`` by multiplying out in float64, chunk by chunk."""
    squared = sum(
        float((a.double() @ weight.double() - b.double()).square().sum())
        for a, b in zip(large.split(4096), small.split(4096), strict=True)
    )
    return float((squared / float(small.double().square().sum())) ** 0.5)


def beside(size: str, rounds: int, progress: Progress) -> dict[str, Any]:
    """Ours and ``pinv`` in turn at one of the sizes that fit."""
    rows, d, d_s = (int(n) for n in size.split("x"))
    large, small = heads(rows, d, d_s, torch.float32)
    times: dict[str, list[Times]] = {"ours": [], "pinv": []}
    for _ in progress.track(range(rounds), description=f"{size} beside pinv"):
        spent, mine = clock(lambda: projection.solve_projection(large, small))
        times["ours"].append(spent)
        spent, theirs = clock(lambda: torch.linalg.pinv(large) @ small)
        times["pinv"].append(spent)
    pairs = list(zip(times["ours"], times["pinv"], strict=True))
    return {
        "ours_wall_cpu_s": [[round(t, 3) for t in both] for both in times["ours"]],
        "pinv_wall_cpu_s": [[round(t, 3) for t in both] for both in times["pinv"]],
        "speedup_wall": round(statistics.median(p[0] / o[0] for o, p in pairs), 2),
        "speedup_cpu": round(statistics.median(p[1] / o[1] for o, p in pairs), 2),
        "relative_difference": float((mine.weight.double() - theirs.double()).norm() / theirs.double().norm()),
        "residual": mine.residual,
        "residual_pinv": missed(large, small, theirs),
        "residual_multiplied_out": missed(large, small, mine.weight),
    }


def real() -> dict[str, Any]:
    """Accuracy on a trained head: both float32 answers against a float64 SVD."""
    large = AutoModelForCausalLM.from_pretrained(materialise("smollm2-135m")).get_output_embeddings().weight.detach()
    small = torch.randn(len(large), 192, generator=torch.Generator().manual_seed(0)) * 0.1
    exact = torch.linalg.pinv(large.double()) @ small.double()
    narrow = projection.solve_projection(large, small, dtype=torch.float64)
    wide = projection.solve_projection(large, small, dtype=torch.float64, products=torch.float64)

    def error(weight: Tensor) -> float:
        return float((weight.double() - exact).norm() / exact.norm())

    return {
        "head": "smollm2-135m",
        "V": large.shape[0],
        "d": large.shape[1],
        "condition": narrow.condition,
        "condition_by_svd": float(torch.linalg.cond(large.double())),
        "error_ours_float32_products": error(narrow.weight),
        "error_ours_float64_products": error(wide.weight),
        "residual_float32_products_over_float64_minus_1": missed(large, small, narrow.weight)
        / missed(large, small, wide.weight)
        - 1,
        "error_pinv_float32": error(torch.linalg.pinv(large) @ small),
        "pinv_default_rtol": len(large) * torch.finfo(torch.float32).eps,
    }


def executed(rows: int, d: int, d_s: int) -> int:
    """Multiply-adds, counted twice, of the Gram matrix's blocks and the right side."""
    block = projection._BLOCK
    gram = sum(min(left + block, d) * (min(left + block, d) - left) for left in range(0, d, block))
    return 2 * rows * (gram + d * d_s)


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    return round(resident_mib("VmHWM") / 1024, 2)


def full(progress: Progress) -> dict[str, Any]:
    """Ours alone at full size, probes of the machine's matmul rate between the chunks."""
    rows, d, d_s = FULL
    large, small = heads(rows, d, d_s, torch.bfloat16)
    before = peak_gib()
    squares = {name: torch.randn(PROBE, PROBE, dtype=getattr(torch, name)) for name in ("float64", "float32")}
    probes: dict[str, list[Times]] = {name: [] for name in squares}
    task = progress.add_task("full size", total=rows)
    outside = [0.0, 0.0]

    def step(done: int, _: int) -> None:
        began = now()
        for name, square in squares.items():
            probes[name].append(clock(lambda s=square: s @ s)[0])
        progress.update(task, completed=done)
        for i, spent in enumerate(since(began)):
            outside[i] += spent

    whole, solved = clock(lambda: projection.solve_projection(large, small, progress=step))
    took = [t - o for t, o in zip(whole, outside, strict=True)]
    done, nominal = executed(rows, d, d_s), 2 * rows * d * (d + d_s)
    result: dict[str, Any] = {
        "V": rows,
        "d": d,
        "d_s": d_s,
        "heads": "bfloat16, random",
        "peak_GiB": peak_gib(),
        "peak_before_solving_GiB": before,
        "executed_TFLOP": round(done / 1e12, 3),
        "nominal_TFLOP": round(nominal / 1e12, 3),
    }
    for i, kind in enumerate(("wall", "cpu")):
        rate = {name: 2 * PROBE**3 / statistics.median(t[i] for t in times) for name, times in probes.items()}
        result[kind] = {
            "seconds": round(took[i], 1),
            "matmul_float64_GFLOPS": round(rate["float64"] / 1e9, 1),
            "matmul_float32_GFLOPS": round(rate["float32"] / 1e9, 1),
            "executed_share_of_float32_rate": round(done / took[i] / rate["float32"], 3),
            "nominal_share_of_float32_rate": round(nominal / took[i] / rate["float32"], 3),
        }
    return {
        **result,
        "method": solved.method,
        "products": str(solved.products),
        "rank": solved.rank,
        "condition": solved.condition,
        "exact_residual": solved.exact_residual,
        "residual_bfloat16": solved.residual,
        "pinv": "not run at this size",
    }


def full_pinv() -> dict[str, Any]:
    """``pinv(W_lm) W_small`` at the full size, once."""
    large, small = (head.float() for head in heads(*FULL, torch.bfloat16))
    (wall, cpu), weight = clock(lambda: torch.linalg.pinv(large) @ small)
    return {
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_GiB": peak_gib(),
        "norm": float(weight.double().norm()),
    }


def machine(threads: int) -> dict[str, Any]:
    """Where and when."""
    return {
        **stamp(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> None:
    """Measure the parts asked for and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        if options.child:
            print(json.dumps(full(progress)))
            return
        record = json.loads(options.out.read_text()) if options.out.is_file() else {}
        for part in options.only:
            if part == "full":  # a process of its own, for its peak memory
                command = [sys.executable, __file__, "--child", "--threads", str(options.threads)]
                progress.stop()
                value: Any = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            elif part == "full-pinv":
                value = full_pinv()
            else:
                value = real() if part == "real" else beside(part, options.rounds, progress)
            record[f"{part}, threads {options.threads}"] = {"on": machine(options.threads), "result": value}
            write_text(options.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

"""Compiles the step's Triton kernels for CUDA devices without one, and writes what they take.

    python -m scripts.triton_compiled

Needs ``shadowpeft[triton]``, and no ``TRITON_INTERPRET``. Writes docs/records/triton-compiled.json. A quarter of an hour on one
core beside other work; nothing is run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import triton
from experiments.measuring import stamp
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shadowpeft.ops import StepSettings, kernels
from shadowpeft.ops.triton_step import backward_kernel, forward_kernel
from shadowpeft.storage import write_json

RECORD = Path(__file__).resolve().parents[1] / "docs" / "records" / "triton-compiled.json"
WIDTH = 64
"""Of the states; loops over the width are not unrolled, so it decides nothing."""
NUMBERS = dict.fromkeys(("n", "d", "r", "m"), "i32") | dict.fromkeys(("alpha", "eps", "gate_start"), "fp32")
STATES = {"h": 0, "after": 0, "g_after": 0, "g_h": 0, "s": 1, "state": 1, "g_state": 1, "g_s": 1}
"""Arguments in the dtype of the base (0) or of the shadow (1); others are in that of the weights."""
CASES = [
    (capability, dtypes, rank)
    for dtypes in (("fp32", "fp32", "fp32"), ("bf16", "bf16", "fp32"), ("bf16", "bf16", "bf16"))
    for capability, rank in ((80, 16), (80, 128))
] + [(90, ("bf16", "bf16", "fp32"), 16)]
"""Compute capability, dtypes of base, shadow and weights, rank and width of the update's nets."""


def compiled(kernel: Any, built: dict[str, Any], dtypes: tuple[str, ...], capability: int) -> int:
    """Bytes of shared memory of a kernel with all of its parts."""
    kinds = {}
    for name in kernel.arg_names:
        if name in built:
            kinds[name] = "constexpr"
        elif re.fullmatch("g_norm(_bias)?", name):
            kinds[name] = "*fp32"
        else:
            kinds[name] = NUMBERS.get(name) or f"*{dtypes[STATES.get(name, 2)]}"
    source = ASTSource(fn=kernel, signature=kinds, constexprs=built)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": kernels.STAGES})
    return int(made.metadata.shared)


def main() -> None:
    """Compile the cases, print them and write the record."""
    found = []
    for capability, dtypes, rank in CASES:
        shapes = [(rank, WIDTH), (WIDTH, rank), (2 * rank, WIDTH), (2, WIDTH, rank), (2 * rank,), (2, WIDTH), *[(WIDTH,)] * 2]
        weights: Any = tuple(torch.empty(shape, device="meta") for shape in shapes)
        h = torch.empty(1, 256, WIDTH, device="meta")
        how = StepSettings(0.5, 0.1, 0.1, normalised=True)
        _, built = kernels._settings(h, how, (weights[0], weights[0]), weights)
        shared = {
            name: compiled(kernel, built, dtypes, capability)
            for name, kernel in (("forward", forward_kernel), ("backward", backward_kernel))
        }
        found.append({"capability": capability, "dtypes": list(dtypes), "rank": rank, "shared_bytes": shared})
        print(found[-1], flush=True)
    write_json(RECORD, {"triton": triton.__version__, "stages": kernels.STAGES, "compiled": found, **stamp()})


if __name__ == "__main__":
    main()

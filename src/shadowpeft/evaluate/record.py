"""What a result record says beside its score: interval, memory, commit, versions, device, which weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from shadowpeft.runtime import package_versions

RESAMPLES = 2000
_VERSIONED = ("shadowpeft", "torch", "transformers", "peft", "safetensors", "tokenizers", "datasets")


def bootstrap(values: list[float], seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean, from ``RESAMPLES`` draws of the examples with replacement."""
    if not values:
        return [float("nan"), float("nan")]
    data, draw = numpy.asarray(values, dtype=numpy.float64), numpy.random.default_rng(seed)
    means = [data[draw.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    return [float(edge) for edge in numpy.quantile(means, [0.025, 0.975])]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and Python's."""
    return {"python": platform.python_version(), **package_versions(_VERSIONED)}


def describe_device(model: nn.Module) -> dict[str, Any]:
    """Where a model computes: kind, name, threads."""
    where = next(model.parameters()).device
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return {"type": where.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def reset_peak(model: nn.Module) -> None:
    """Start a new measurement of :func:`~shadowpeft.runtime.peak_memory_bytes`, where the device can."""
    where = next(model.parameters()).device
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def commit() -> str | None:
    """Commit of the repository that this package runs from, with ``-dirty`` for changed files; None outside of one."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head


def weights_digest(model: nn.Module, samples: int = 16) -> str:
    """sha256 over names, shapes and ``samples`` values of every parameter: tells one trained adapter from another.

    A head that an adapter has replaced (PEFT keeps it as ``original_module``) is left out: it is drawn anew at every loading.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if ".original_module." in name:
            continue
        whole = weight.detach()
        flat = (whole.dequantize() if hasattr(whole, "qdata") else whole).reshape(
            -1
        )  # torchao's tensors cannot be reshaped
        index = torch.linspace(0, flat.numel() - 1, min(samples, flat.numel()), dtype=torch.float64).long()
        values = flat[index.to(flat.device)].double().tolist() if flat.device.type != "meta" else []
        digest.update(json.dumps([name, list(weight.shape), values]).encode())
    return digest.hexdigest()

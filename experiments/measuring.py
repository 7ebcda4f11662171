"""What experiments, benchmarks and scripts measure alike, and what each record says of its making."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from shadowpeft.evaluate import record


def stamp() -> dict[str, Any]:
    """``date`` (UTC) and ``commit`` (with ``-dirty`` for changed files; None outside of a repository), for a record."""
    return {"date": datetime.now(timezone.utc).date().isoformat(), "commit": record.commit()}


def short(commit: str | None) -> str:
    """A commit for a page: seven digits, ``-dirty`` kept."""
    return "unknown" if commit is None else commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


def releases(*packages: str) -> dict[str, str]:
    """Versions of installed packages."""
    return {name: metadata.version(name) for name in packages}


def processor() -> str:
    """Name of the processor or accelerator that computed."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo")
    line = next((r for r in info.read_text().splitlines() if r.startswith("model name")), "") if info.exists() else ""
    return line.split(":", 1)[-1].strip() or platform.processor() or platform.machine()


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call, work on an accelerator included; what is garbage before is collected before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def alternate(
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    warmup: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """What each run gave in each round; the runs take turns, every second round in the opposite order.

    Args:
        warmup: rounds before, which are not kept. progress: called with the number of rounds kept so far.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            value = runs[name]()
            if turn >= warmup:
                values[name].append(value)
        progress(max(0, turn + 1 - warmup))
    return values


def paired_ratios(values: Mapping[str, list[float]], against: str) -> dict[str, float]:
    """Median over rounds of a run's value divided by that of ``against`` in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(own, values[against], strict=True))
        for name, own in values.items()
    }


def quartiles(values: list[float]) -> list[float]:
    """First and third quartile."""
    return [float(edge) for edge in numpy.quantile(values, [0.25, 0.75])]


def resident_mib(key: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in MiB; ``ru_maxrss`` would inherit the parent's peak.

    Raises:
        RuntimeError: where the system is not Linux.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"{status} has no {key}; resident memory is measured on Linux only")

"""The machine that a command runs on: its settings, its memory, and what records say of it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKAGES = ("shadowpeft", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers")


def prepare_cpu(threads: int | None = None) -> None:
    """Set the number of threads and flush denormals, before anything is computed.

    A random shadow produces denormal numbers, which a CPU computes many times slower (docs/defects.md, 25). The switch is per
    thread and inherited by the threads that are started later, so it comes first.
    """
    torch.set_flush_denormal(True)
    if threads is not None:
        torch.set_num_threads(threads)


def package_versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Versions of installed packages, or ``not installed``."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {name: version(name) for name in packages}


def environment() -> dict[str, str]:
    """Versions and machine, for records."""
    return {
        **package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "threads": str(torch.get_num_threads()),
    }


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory_bytes` start from here, where the system can: on CUDA, and for a process under Linux."""
    clear = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(clear, os.W_OK):
        clear.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Most that was allocated on a CUDA device, or that the process held, since :func:`reset_peak_memory` or its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        line = next((row for row in status.read_text().splitlines() if row.startswith("VmHWM")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

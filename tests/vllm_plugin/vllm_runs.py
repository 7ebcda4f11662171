"""Runs vLLM for the tests: as jobs of ``engine.py`` in a process of its own Python, or as a server."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from benchmarks.vllm_speed import vllm_process

from webserver import wait_for

SAME = 2e-4
"""Float32 on both sides, other kernels: 2.3e-5 was the largest difference of a log-probability over all families."""


def vllm_python() -> str:
    """The Python that has vLLM; without one the test is skipped."""
    python = os.environ.get("SHADOWPEFT_VLLM_PYTHON")
    if not python:
        pytest.skip("SHADOWPEFT_VLLM_PYTHON names no Python that has vLLM; run make vllm")
    return python


def vllm_environment() -> dict[str, str]:
    """What a process of vLLM needs on a CPU."""
    vllm_python()
    return vllm_process()[1]


def run_engine(jobs: dict[str, Any], folder: Path, **environment: str) -> dict[str, Any]:
    """The results of ``engine.py``, by name of the job; ``environment`` is set for its process."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).with_name("engine.py")
    command = [vllm_python(), str(script), str(folder / "jobs.json"), str(folder / "out.json")]
    with (folder / "log.txt").open("w") as log:
        set_there = vllm_environment() | environment
        code = subprocess.run(command, env=set_there, stdout=log, stderr=log, timeout=1400).returncode
    assert code == 0, (folder / "log.txt").read_text()[-3000:]
    return dict(zip(jobs, json.loads((folder / "out.json").read_text()), strict=True))


def job(model: Any, base: Path | str, adapter: Path, steps: list[Any], **arguments: Any) -> dict[str, Any]:
    """What ``engine.py`` does for one model; ``arguments`` go to ``vllm.LLM``."""
    kind = model.get_base_model().config.model_type
    return {"model": str(base), "adapter": str(adapter), "model_type": kind, "steps": steps, "arguments": arguments}


def assert_same(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The tokens are equal, and their log-probabilities up to rounding."""
    assert [row["tokens"] for row in got] == [row["tokens"] for row in wanted]
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(mine["logprobs"]), torch.tensor(theirs["logprobs"]), rtol=0, atol=SAME)


class Server:
    """A command that serves until the ``with`` ends; its output goes to a file. ``ready`` is a URL that answers 200 then."""

    def __init__(self, words: list[str], folder: Path, ready: str, environment: dict[str, str] | None = None) -> None:
        self.log = folder / f"{ready.rpartition(':')[2].partition('/')[0]}.log"
        self.url = ready
        with self.log.open("w") as log:
            self.child = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log)

    def ready(self) -> bool:
        assert self.child.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(self.url, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def __enter__(self) -> Server:
        try:
            wait_for(self.ready, 700)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.child.terminate()
        self.child.wait(60)

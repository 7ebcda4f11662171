"""Edge and cloud of tiny models as processes of their own, and the adapter versions that they load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import torch

from serving import attached
from webserver import wait_for

KEY = {"authorization": "Bearer user-key-0123456789"}
ADMIN = {"authorization": "Bearer admin-key-0123456789"}
PROMPTS = [
    "sit",
    "a much longer request, please",
    "x y z",
    "站起来",
    "another one of middle length",
    "why?",
    "1 2 3",
    "go",
]


class Process:
    """``serve_tiny.py`` with its arguments: role, port, folder of versions, and the edge's cloud."""

    def __init__(self, *arguments):
        self.arguments = [str(a) for a in arguments]
        self.url = f"http://127.0.0.1:{arguments[1]}"
        self.start()

    def start(self):
        script = Path(__file__).with_name("serve") / "serve_tiny.py"
        paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        self.child = subprocess.Popen([sys.executable, str(script), *self.arguments], env=environment)
        wait_for(self.ready, 180)

    def ready(self):
        assert self.child.poll() is None, "the server ended"
        try:
            return httpx.get(self.url + "/readyz", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self):
        self.child.terminate()
        assert self.child.wait(60) in (0, -15)

    def memory(self):
        return psutil.Process(self.child.pid).memory_info().rss

    def metrics(self):
        return httpx.get(self.url + "/metrics", headers=KEY, trust_env=False).text


def save_versions(tmp_path):
    """A folder with two versions of the adapter ``late``: ``v1`` is what the cloud begins with."""
    torch.manual_seed(0)
    backend = attached(max_position_embeddings=512)
    folder = tmp_path / "versions"
    folder.mkdir()
    for v, factor in (("v1", 1), ("v2", -3)):
        with torch.no_grad():
            for name, parameter in backend.model.named_parameters():
                if "shadowpeft_injection.late" in name:
                    parameter.mul_(factor)
        backend.model.save_pretrained(tmp_path / v)
        (tmp_path / v / "late").rename(folder / v)
    return folder

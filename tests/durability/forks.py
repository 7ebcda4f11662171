"""The side of the tests that talks to ``fork_server.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path


class ForkServer:
    """A started fork server; one job at a time."""

    def __init__(self):
        here = Path(__file__).parent
        paths = [str(here), *(p for p in sys.path if p)]
        self.process = subprocess.Popen(
            [sys.executable, str(here / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)},
        )
        assert json.loads(self.process.stdout.readline()) == {"ready": True}

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def ask(self, job, args, folder, kill=None):
        """Have a job done over ``folder``; its output goes to a log beside it."""
        log = folder.parent / f"{folder.name}.log"
        request = {"job": job, "args": args, "kill": kill, "folder": str(folder), "log": str(log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer["killed"] or answer["code"] == 0, log.read_text()
        return answer

"""Runs jobs, each in a forked child, and kills them: the libraries are imported once, so a killed run costs a second.

One JSON request a line on standard input, one JSON answer a line on standard output:

- ``job``: ``cli`` (the command line with ``args``) or ``classify`` (a classifier trained in the folder ``args[0]``)
- ``folder``: where the run writes. ``log``: a file for what it prints.
- ``kill``: null; ``{"after": seconds}``; ``{"change": n}``: just before the n-th change of the file system;
  ``{"sight": seconds}``: so long after a half-written checkpoint is first seen in the folder.
"""

import glob
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
WRITES = os.O_WRONLY | os.O_RDWR


class Changes:
    """An audit hook that counts what changes files below ``folder`` and ends the process group before the n-th."""

    def __init__(self, folder, last):
        self.folder, self.last, self.count = str(folder), last, 0

    def __call__(self, event, args):
        if event not in CHANGES:
            return
        path = args[0]
        if isinstance(path, int) or (event == "open" and not (args[2] or 0) & WRITES):
            return
        relative = event in ("os.remove", "os.rmdir") and not os.path.isabs(os.fspath(path))  # a tree is being deleted
        if relative or os.fsdecode(path).startswith(self.folder):
            self.count += 1
            if self.count == self.last:
                os.killpg(0, signal.SIGKILL)


def run_job(request):
    """The child's part; the exit code."""
    if request["job"] == "cli":
        from shadowpeft import cli

        sys.argv = ["shadowpeft", *request["args"]]
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    else:
        from classifier import classify

        classify(Path(request["args"][0]))
    return 0


def child(request):
    """Never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        changes = Changes(request["folder"], (request["kill"] or {}).get("change"))
        sys.addaudithook(changes)
        code = run_job(request)
        Path(request["log"]).with_suffix(".changes").write_text(str(changes.count))
    except BaseException:  # noqa: BLE001  (a forked child must never return into the server)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request):
    """Start the job, kill it if asked, wait for its end."""
    pid = os.fork()
    if pid == 0:
        child(request)
    started = time.monotonic()
    kill, folder = request["kill"] or {}, Path(request["folder"])
    half_written = f"{glob.escape(str(folder))}/.shadowpeft-{32 * '?'}/checkpoint-*"
    due = started + kill["after"] if "after" in kill else None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if due is None and "sight" in kill and glob.glob(half_written):
            due = now + kill["sight"]
        if due is not None and now >= due:
            os.kill(pid, signal.SIGKILL)  # it has no children of its own
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.0005 if due is not None or "sight" in kill else 0.005)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    code = os.waitstatus_to_exitcode(status)
    return {"killed": killed, "code": code, "seconds": time.monotonic() - started}


def main():
    import matplotlib.pyplot  # noqa: F401

    import conftest  # noqa: F401  (one thread, no network)
    import shadowpeft.apps.train
    import shadowpeft.cli
    import shadowpeft.train.pretrain
    import shadowpeft.train.run  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

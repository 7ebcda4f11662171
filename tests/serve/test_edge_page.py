"""The commands of docs/edge.md, taken from the page and run in its order: a trained adapter ends as a running pair."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from scripts.system_test.options import METHODS, parse

from chatbase import save_sitting_base
from commands import call, edit
from webserver import free_port, wait_for

PAGE = Path(__file__).parents[2] / "docs" / "edge.md"


def blocks(kind):
    """The blocks of a kind, without the page's indentation."""
    found = re.findall(rf"^ *```{kind}\n(.*?)^ *```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return ["\n".join(line.removeprefix("   ") if kind == "bash" else line for line in b.splitlines()) for b in found]


def test_the_page_has_five_commands_and_a_request():
    commands = blocks("bash")
    assert [c.split()[1] for c in commands[:5]] == ["train", "route", "detach", "serve", "serve"]
    assert all(c.startswith("shadowpeft ") for c in commands[:5])
    assert commands[5].startswith("curl ")
    assert len(commands) == 6
    assert len(blocks("yaml")) == 1


def test_the_options_the_page_names_are_there():
    options = parse([])
    assert options.delays == [0, 50, 200]
    assert all(getattr(options, f"{name}_rate") for name in METHODS)
    assert "make system-test" in PAGE.read_text()
    assert "system-test:" in (PAGE.parents[1] / "Makefile").read_text()


@pytest.mark.server
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    base = save_sitting_base(tmp_path / "base")
    (run,) = blocks("yaml")
    # the tiny base has known actions from the start, and keeps them
    instead = {
        "smollm2-135m": base,
        "max_length: 128": "max_length: 512",
        "last_layers: 10": "last_layers: 2, shadow_num_hidden_layers: 1",
        "shadow_epochs: 1, max_steps: 750": "shadow_epochs: 0, max_steps: 2",
        "learning_rate: 1.0e-2": "learning_rate: 1.0e-6",
    }
    (tmp_path / "robot.yaml").write_text(run, encoding="utf-8")
    edit(tmp_path / "robot.yaml", instead)
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    commands = [re.sub("8000|8001", lambda m: ports[m[0]], command) for command in blocks("bash")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"cwd": tmp_path, "env": {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}}

    def do(command):
        done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, timeout=400, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    monkeypatch.chdir(tmp_path)
    for command in commands[:3]:  # in this process: three times the imports are most of what they take otherwise
        code, _, err = call(monkeypatch, capsys, *shlex.split(command)[1:])
        assert code == 0, err
    assert (tmp_path / "edge" / "model.safetensors").is_file()
    routing = json.loads((tmp_path / "run" / "adapter" / "routing.json").read_text())
    started = []
    http = httpx.Client(trust_env=False)
    try:
        for command, port in zip(commands[3:5], ports.values(), strict=True):
            with (tmp_path / f"{port}.log").open("w") as log:
                started.append(subprocess.Popen(["bash", "-ec", f"exec {command}"], stderr=log, **settings))
        for process, port in zip(started, ports.values(), strict=True):

            def ready(process=process, port=port):
                assert process.poll() is None, (tmp_path / f"{port}.log").read_text()
                time.sleep(0.1)  # the servers need the processor
                try:
                    return http.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(ready, 300)
        answer = json.loads(do(commands[5]))
    finally:
        http.close()
        for process in started:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(60) for process in started]
    assert codes == [0, 0]
    note = answer["shadowpeft"]
    assert answer["choices"][0]["message"]["content"].startswith("[Sit()]")
    assert note["action"] == "Sit"
    assert note["where"] == ("device" if note["confidence"] >= routing["threshold"] else "cloud")
    assert not note.get("degraded")

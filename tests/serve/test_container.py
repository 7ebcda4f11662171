"""The Dockerfile, without a container engine: its text, its entry command and health check as processes here, its user."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from chatbase import save_sitting_base
from shadowpeft.hf.load import named_base
from shadowpeft.serve.guard import OPEN_PATHS
from tiny import adapter_config
from webserver import free_port, wait_for

ROOT = Path(__file__).parents[2]
TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
LINES = [tuple(line.split(maxsplit=1)) for line in TEXT.splitlines() if line.strip()]
LAST = LINES[max(i for i, (word, _) in enumerate(LINES) if word == "FROM") :]
"""The stage that becomes the image."""


def only(word, lines=LAST):
    (found,) = [rest for first, rest in lines if first == word]
    return found


def health():
    return json.loads(only("HEALTHCHECK").split("CMD", 1)[1])


def test_every_line_is_an_instruction():
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}
    assert {word for word, _ in LINES} <= known


def test_the_process_is_not_root_and_its_commands_need_no_shell():
    words = [word for word, _ in LAST]
    number = only("USER")
    assert int(number) > 0  # a number, so that an orchestrator can see that it is not root's
    assert f"--uid {number} " in only("RUN")
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    assert json.loads(only("ENTRYPOINT"))[:2] == ["shadowpeft", "serve"]
    assert json.loads(only("CMD")) == ["--help"]
    assert health()[0] == "python"


def test_the_health_check_asks_an_open_route_on_the_port_that_is_served():
    (port, path) = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", " ".join(health())).groups()
    entry = json.loads(only("ENTRYPOINT"))
    assert path in OPEN_PATHS
    assert port == only("EXPOSE") == entry[entry.index("--port") + 1]


def test_what_is_copied_is_there_and_is_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").split() if line[0] == "!"}
    copied = {name for word, rest in LINES if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]}
    assert copied <= allowed
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    installs = [rest for word, rest in LINES if word == "RUN" and "pip install" in rest]
    assert installs
    assert all(part.strip().startswith("-c constraints.txt") for rest in installs for part in rest.split("pip install")[1:])
    extras = re.search(r'"\.\[([\w,]+)\]"', TEXT)[1].split(",")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f"\n{extra} = [" in declared for extra in extras)


def test_the_images_base_serves_where_the_recorded_folder_may_not_be_looked_into(monkeypatch):
    """The folder lay in the home of whoever trained; the image's user may not even ask whether it exists."""
    home = "/home/somebody/bases/smollm2-135m"
    config = adapter_config(base_alias="smollm2-135m", base_model_name_or_path=home)
    real = os.stat

    def stat(path, *arguments, **options):
        if str(path) == home:
            raise PermissionError(13, "Permission denied", home)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert named_base(config) == ("smollm2-135m", {})


@pytest.mark.server
@pytest.mark.timeout(300)
def test_the_entry_command_answers_and_the_health_check_sees_it(tmp_path):
    model = save_sitting_base(tmp_path / "edge")  # a stock model is an edge model
    port = str(free_port())
    environment = {**os.environ, "SHADOWPEFT_API_KEYS": "user-key-0123456789", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *json.loads(only("ENTRYPOINT")), "--role", "edge", "--skills", "robot"]
    # what comes last counts: no address but this machine's own is opened in a test
    command += [f"robot={model}", "--host", "127.0.0.1", "--port", port]
    check = [sys.executable, *(part.replace(":8000", f":{port}") for part in health()[1:])]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 1  # nothing is there yet
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stderr=log, env=environment)
    try:

        def healthy():
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
            return subprocess.run(check, capture_output=True, check=False).returncode == 0

        wait_for(healthy, 240)
        asked = {"model": "robot", "messages": [{"role": "user", "content": "sit"}]}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        assert httpx.post(url, json=asked, trust_env=False).status_code == 401
        headers = {"authorization": "Bearer user-key-0123456789"}
        answer = httpx.post(url, json=asked, headers=headers, trust_env=False, timeout=60).json()
        assert answer["shadowpeft"]["action"] == "Sit"
    finally:
        server.terminate()
        assert server.wait(60) in (0, -15)

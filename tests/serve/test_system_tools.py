"""The system test's requests with tools: what is made of answers, and (marker server) the whole script on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.system_test import tools as script

from chatbase import run_file, save_sitting_base
from shadowpeft.data import robot_tools
from shadowpeft.data.calls import Call
from shadowpeft.data.robot_tools import calls_of_row
from shadowpeft.errors import ConfigError
from shadowpeft.serve.router import ACTION, Calibration
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train

ROOT = Path(__file__).parents[2]
SIT = Call("Sit", {})


def test_what_an_answer_calls():
    assert script.read({"content": None, "tool_calls": [SIT.openai("call_1")]}) == (SIT,)
    for content in ("Why not.", "[REMOTE]", "", None):
        assert script.read({"content": content}) == ()
    assert script.read({"content": "[Sit(", "tool_calls": None}) is None


def test_what_is_made_of_answers():
    rows = [row for row in robot_tools.load("validation") if row["kind"] == "one"][:3]
    rows += [row for row in robot_tools.load("validation") if row["kind"] == "cloud"][:2]
    right = [calls_of_row(row) for row in rows]
    answers = [right[0], None, (), (), (SIT,)]  # right, invalid, handed on; handed on, called for nothing
    where = ["device", "device", "cloud", "cloud", "device"]
    replies = [
        {"calls": calls, "milliseconds": 10.0 * n, "where": place, "reason": ""}
        for n, (calls, place) in enumerate(zip(answers, where, strict=True))
    ]
    found = script.summarised(rows, replies)
    assert found["calls"]["accuracy"] == pytest.approx(1 / 3)
    assert found["cloud_handed_on"]["accuracy"] == 0.5
    assert (found["invalid"], found["on_device"], found["calls_on_device"], found["wrong_on_device"]) == (1, 3, 2, 2)
    assert (found["p50_ms"], found["p95_ms"]) == (20.0, 38.0)
    line = script.shown([{"milliseconds": 50.0, "systems": {"routed": found}}]).splitlines()[2]
    assert line.startswith("| 50 | device, then cloud | 33.3 [6.2, 79.2] | 50.0 [9.4, 90.5] | 1 | 20 | 38 | 2 of 3 |")


def test_an_adapter_without_a_calibration_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["tools", str(tmp_path)])
    with pytest.raises(ConfigError, match=r"there is no calibration .* make one with: shadowpeft route calibrate"):
        script.main()


@pytest.mark.server
@pytest.mark.timeout(600)
def test_the_whole_script(tmp_path):
    base = save_sitting_base(tmp_path / "base", answer="[Bark()]")  # no byte twice; what follows is free
    shadow = {"last_layers": 2, "shadow_num_hidden_layers": 1}
    steps = {"max_steps": 1, "shadow_epochs": 0, "learning_rate": 1e-6}
    run = parse_run(
        run_file(tmp_path / "run", base, "robot_tools", data={"max_length": 512}, shadow=shadow, training=steps), "the test"
    )
    adapter = Path(train(run, quiet=True)["adapter"])
    always = Calibration(ACTION, (0.0, 1.0), (1.0, 1.0), 0.0, tools=tuple(robot_tools.tools().definitions()))
    always.save(adapter / "routing.json")
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "scripts.system_test.tools", str(adapter), "--requests", "4", "--delays", "0", "300"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=500, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    near, far = (delay["systems"] for delay in record["delays"])
    assert [delay["milliseconds"] for delay in record["delays"]] == [0, 300]
    for systems in (near, far):
        assert set(systems) == {*script.SYSTEMS, script.RIVAL}
        assert systems["device"]["on_device"] == 4
        assert systems["attached"]["on_device"] == 0
        assert systems["routed"]["invalid"] == systems["device"]["invalid"] == 0
    assert far["attached"]["p50_ms"] >= 300
    assert len(done.stdout.splitlines()) == 2 + 2 * 4

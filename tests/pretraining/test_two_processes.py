"""Two gloo processes under ``accelerate launch`` train as one process with the whole batch, and resume each other's runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from processes import launch_two
from shadowpeft.train.pretrain import pretrain
from shadowpeft.train.progress import read_metrics

pytestmark = pytest.mark.slow  # starts two processes


def launch(file, *options):
    return launch_two("-m", "shadowpeft.cli", "pretrain", str(file), "--json", *options, timeout=500)


def write(tmp_path, config, name, sections=None, **training):
    run = config(name, training=training, **(sections or {}))
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(run.model_dump()))
    return run, file


def test_two_processes_share_a_teacher(config, tmp_path):
    lesson = {"loss": "both", "teacher": {"k": 5, "batch_size": 3}}
    run, file = write(tmp_path, config, "two", lesson, batch_size=1)
    done = launch(file)
    assert done.returncode == 0, done.stderr[-4000:]
    two, one = json.loads(done.stdout), pretrain(config("one", training={"batch_size": 2}, **lesson), quiet=True)
    built, alone = (Path(folder) / "teacher" for folder in (run.output, Path(one["shadow"]).parent))
    assert {p.name: p.read_bytes() for p in built.iterdir()} == {p.name: p.read_bytes() for p in alone.iterdir()}
    losses = [[r["loss"] for r in read_metrics(folder.parent) if "loss" in r] for folder in (built, alone)]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)


def test_two_processes_are_one_with_twice_the_batch(config, tmp_path):
    run, file = write(tmp_path, config, "two", batch_size=1)
    done = launch(file)
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads(done.stdout)
    one = pretrain(config("one", training={"batch_size": 2}), quiet=True)
    assert (two["tokens"], two["planned_steps"]) == (one["tokens"], one["planned_steps"])
    mine, theirs = (load_file(Path(r["shadow"]) / "model.safetensors") for r in (two, one))
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], atol=5e-5, rtol=0)  # Adam divides by small gradients
    losses = [[r["loss"] for r in read_metrics(Path(r["shadow"]).parent) if "loss" in r] for r in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    # both wrote one record; a run of two processes is not resumed by one
    assert len(losses[0]) == 6
    result = Path(run.output) / "result.json"
    result.write_text(json.dumps({**two, "interrupted": True}))
    again = launch(file, "--resume")
    assert again.returncode == 0, again.stderr[-4000:]
    assert json.loads(again.stdout)["resumed_from_step"] == 6
    result.write_text(json.dumps({**two, "interrupted": True}))
    alone = subprocess.run(
        [sys.executable, "-m", "shadowpeft.cli", "pretrain", str(file), "--resume"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert alone.returncode == 2
    assert "the number of processes has changed" in alone.stderr

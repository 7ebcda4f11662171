"""kill -9 at any moment: what is left is whole, and the same command leads to the same end, bit for bit.

Three ways to hit a moment: a random time, a random time after a half-written checkpoint was seen, and exactly before the
n-th change of a file (open for writing, rename, make, delete), which covers what the clock would rarely hit.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from classifier import HEADS
from forks import ForkServer
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

import shadowpeft
from chatbase import mixed_rows, plain_rows, run_file, save_base, write_rows
from shadowpeft.train.progress import read_metrics
from tiny import base

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "tokens_per_second", "seconds")
EVAL_TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class Server(ForkServer):
    """The fork server, and one of the two kinds of run in a folder of its own."""

    def __init__(self, folder):
        super().__init__()
        rows = write_rows(folder / "train.jsonl", plain_rows(10) + mixed_rows())
        validation = write_rows(folder / "validation.jsonl", mixed_rows()[:3])
        self.base = save_base(folder / "base")
        self.sections = {
            "data": {"train": rows, "max_length": 128, "validation": validation},
            "shadow": {"r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.2},
            "training": {
                "max_steps": 10,
                "batch_size": 3,
                "gradient_accumulation": 2,
                "learning_rate": 0.01,
                "save_every": 3,
                "log_every": 2,
                "eval_every": 3,
                "keep_checkpoints": 2,
            },
        }
        self.data = rows

    def command(self, kind, folder):
        """The job and its arguments: ``--resume`` as soon as the run has begun."""
        if kind == "classify":
            return kind, [str(folder)]
        file = folder.parent / f"{folder.name}.yaml"
        file.write_text(yaml.safe_dump(run_file(folder, self.base, self.data, **self.sections)))
        begun = (folder / "config.yaml").is_file()
        return "cli", ["train", str(file), "--json", *(["--resume"] if begun else [])]

    def run(self, kind, folder, kill=None):
        job, args = self.command(kind, folder)
        return self.ask(job, args, folder, kill)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """For each kind: the folder of a run that nobody killed, its seconds and its number of changes."""
    found = {}
    for kind in ("cli", "classify"):
        folder = tmp_path_factory.mktemp(kind) / "run"
        seconds = server.run(kind, folder)["seconds"]
        changes = int((folder.parent / "run.changes").read_text())
        assert changes > 50
        found[kind] = (folder, seconds, changes)
    return found


def state(folder, names=("optimizer.pt", "scheduler.pt", "rng_state.pth")):
    """What a checkpoint holds beside the weights; our own files, so pickle is safe here."""
    return {name: torch.load(folder / name, weights_only=False) for name in names}


def assert_equal(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    else:
        assert one == other, where


def untimed(records):
    return [{k: v for k, v in r.items() if k not in TIMES + EVAL_TIMES} for r in records]


def check_whole(kind, folder, server):
    """Every checkpoint and adapter that has its lasting name loads, heads included; records are readable."""
    whole = [p for p in folder.glob("checkpoint-*") if p.is_dir()] if folder.is_dir() else []
    if (folder / "adapter" / "adapter_config.json").exists() and kind == "cli":
        whole.append(folder / "adapter")
    for path in whole:
        on = server.base if kind == "cli" else base("llama", task="SEQ_CLS")
        shadowpeft.load(path, on)
        if path.name == "adapter":
            continue
        names = load_file(path / "adapter_model.safetensors").keys()
        assert all(any(head in name for name in names) for head in (HEADS if kind == "classify" else ()))
        left = state(path)
        step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        assert path.name == f"checkpoint-{step}"
        assert left["scheduler.pt"]["last_epoch"] == step
        assert left["optimizer.pt"]["state"]
    if kind == "cli" and folder.is_dir():
        read_metrics(folder)
        for name in ("config.yaml", "versions.json", "data.json", "summary.json"):
            if (folder / name).exists():
                assert isinstance(yaml.safe_load((folder / name).read_text()), dict)


def assert_same_end(kind, folder, expected):
    last, goal = get_last_checkpoint(str(folder)), get_last_checkpoint(str(expected))
    assert Path(last).name == Path(goal).name
    for one, other in ((Path(last), Path(goal)), (folder / "adapter", expected / "adapter")):
        assert_equal(
            load_file(one / "adapter_model.safetensors"), load_file(other / "adapter_model.safetensors"), one.name
        )
    assert_equal(state(Path(last)), state(Path(goal)))
    histories = [json.loads((Path(p) / "trainer_state.json").read_text())["log_history"] for p in (last, goal)]
    assert untimed(histories[0]) == untimed(histories[1])
    if kind == "cli":
        assert untimed(read_metrics(folder)) == untimed(read_metrics(expected))
        summaries = [json.loads((p / "summary.json").read_text()) for p in (folder, expected)]
        for summary in summaries:
            del summary["seconds"], summary["adapter"]
        assert summaries[0] == summaries[1]
    assert not list(folder.glob(".shadowpeft-*"))


def kills(count, kind, undisturbed, seed):
    """``count`` ways to be killed, drawn with ``seed``: a third each by time, on sight of a checkpoint, by change."""
    draw = random.Random(f"{seed} {kind}")
    _, seconds, changes = undisturbed[kind]
    made = []
    for i in range(count):
        if i % 3 == 0:
            made.append({"change": draw.randint(1, changes)})
        elif i % 3 == 1:
            made.append({"sight": draw.uniform(0, 0.05)})
        else:
            made.append({"after": draw.uniform(0.05, seconds)})
    draw.shuffle(made)
    return made


def disturb(server, undisturbed, tmp_path, kind, wanted, seed, a_run=5):
    """Kill runs of ``kind`` until ``wanted`` kills have hit, at most ``a_run`` in one run; each must end as if nothing was."""
    hits, episode = 0, 0
    while hits < wanted:
        episode += 1
        assert episode < 4 * wanted, "the kills miss"
        folder = tmp_path / f"{kind}{episode}"
        for kill in kills(min(a_run, wanted - hits), kind, undisturbed, f"{seed} {episode}"):
            hit = server.run(kind, folder, kill)["killed"]
            hits += hit
            check_whole(kind, folder, server)
            if not hit:
                break
        server.run(kind, folder)
        check_whole(kind, folder, server)
        assert_same_end(kind, folder, undisturbed[kind][0])
    return hits


@pytest.mark.slow
def test_three_kills(server, undisturbed, tmp_path):
    assert disturb(server, undisturbed, tmp_path, "cli", 2, seed=1) == 2
    assert disturb(server, undisturbed, tmp_path, "classify", 1, seed=1) == 1


@pytest.mark.durability
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "wanted"), [("cli", 35), ("classify", 15)])
def test_fifty_kills(server, undisturbed, tmp_path, kind, wanted):
    assert disturb(server, undisturbed, tmp_path, kind, wanted, seed=7) == wanted


@pytest.mark.durability
def test_a_fresh_process_computes_what_a_forked_one_does(server, undisturbed, tmp_path):
    job, args = server.command("cli", tmp_path / "run")
    assert job == "cli"
    subprocess.run([sys.executable, "-m", "shadowpeft.cli", *args], check=True, capture_output=True, timeout=300)
    assert_same_end("cli", tmp_path / "run", undisturbed["cli"][0])

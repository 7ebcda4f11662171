"""kill -9 at any moment of a pretraining run: what is left is whole, and the same command leads to the same end, bit for bit.

The kills are those of ``test_kill.py``: by the clock, on sight of a half-written checkpoint, before the n-th change of a file.
Run with: pytest -m durability tests/durability/test_kill_pretrain.py
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from forks import ForkServer
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from chatbase import save_base, write_rows
from shadowpeft.hf.files.projected import read_projected
from shadowpeft.train.progress import read_metrics

pytestmark = pytest.mark.durability
TIMES = ("runtime", "per_second", "seconds")
PLACES = {"seconds", "tokens_per_second", "resumed_from_step", "peak_memory_bytes", "shadow", "stock", "commit"}


class Server(ForkServer):
    """The fork server, with one pretraining run in a folder of its own per call."""

    def __init__(self, folder):
        super().__init__()
        text = folder / "text"
        text.mkdir()
        for shard in range(3):
            rows = [{"text": f"shard {shard} document {i} " + "word " * (i % 7 + 1)} for i in range(9)]
            write_rows(text / f"{shard}.jsonl", rows)
        held = write_rows(folder / "held.jsonl", [{"text": f"held out {i}"} for i in range(30)])
        more = write_rows(folder / "more.jsonl", [{"text": f"one more {i}"} for i in range(30)])
        self.run_file = {
            "base": save_base(folder / "base"),
            "backbone": {"layers": "spread", "count": 2},
            "text": {
                "corpora": [{"path": str(text), "weight": 2.0}, {"path": more}],
                "validation": [{"path": held}],
                "sequence_length": 32,
                "shuffle_buffer": 7,
                "validation_sequences": 4,
            },
            "training": {
                "max_steps": 12,
                "batch_size": 2,
                "gradient_accumulation": 2,
                "learning_rate": 0.01,
                "warmup": 1,
                "eval_every": 4,
                "save_every": 3,
                "log_every": 2,
                "threads": 1,
            },
        }

    def run(self, folder, kill=None, **sections):
        file = folder.parent / f"{folder.name}.yaml"
        file.write_text(yaml.safe_dump({**self.run_file, **sections, "output": str(folder)}))
        args = ["pretrain", str(file), "--resume", "--json"]  # the same command, begun or not
        return self.ask("cli", args, folder, kill)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """The folder of a run that nobody killed, its seconds and its number of changes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    seconds = server.run(folder)["seconds"]
    return folder, seconds, int((folder.parent / "run.changes").read_text())


def check_whole(folder):
    """What has its lasting name is whole."""
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        assert path.name == f"checkpoint-{step}"
        assert json.loads((path / "stream.json").read_text())["number"] == 4 * step
        load_file(path / "stream.safetensors")
        load_file(path / "model.safetensors")
        torch.load(path / "optimizer.pt", weights_only=True)
    if (folder / "shadow").is_dir():
        read_projected(folder / "shadow")
    if (folder / "stock").is_dir():
        load_file(folder / "stock" / "model.safetensors")
    if (folder / "result.json").is_file():
        json.loads((folder / "result.json").read_text())


def assert_same_end(folder, expected):
    last, goal = (Path(get_last_checkpoint(str(f))) for f in (folder, expected))
    assert last.name == goal.name == "checkpoint-12"
    for one, other in ((last, goal), (folder / "shadow", expected / "shadow"), (folder / "stock", expected / "stock")):
        mine, theirs = (load_file(f / "model.safetensors") for f in (one, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items()), one
    for name in ("stream.json", "stream.safetensors"):
        assert (last / name).read_bytes() == (goal / name).read_bytes()
    records = [
        [{k: v for k, v in r.items() if not k.endswith(TIMES)} for r in read_metrics(f)] for f in (folder, expected)
    ]
    assert records[0] == records[1]
    results = [json.loads((f / "result.json").read_text()) for f in (folder, expected)]
    assert {k for k in results[0] if results[0][k] != results[1][k]} <= PLACES
    assert not [p for p in folder.iterdir() if p.name.startswith(".shadowpeft-")]


@pytest.mark.timeout(1800)
def test_thirty_kills(server, undisturbed, tmp_path):
    expected, seconds, changes = undisturbed
    assert changes > 50
    draw = random.Random(11)
    hits, episode = 0, 0
    while hits < 30:
        episode += 1
        assert episode < 60, "the kills miss"
        folder = tmp_path / f"run{episode}"
        for number in range(5):
            kind = (episode + number) % 3
            kill = (
                {"change": draw.randint(1, changes)}
                if kind == 0
                else {"sight": draw.uniform(0, 0.05)}
                if kind == 1
                else {"after": draw.uniform(0.05, seconds)}
            )
            hit = server.run(folder, kill)["killed"]
            hits += hit
            check_whole(folder)
            if not hit:
                break
        server.run(folder)
        check_whole(folder)
        assert_same_end(folder, expected)


@pytest.mark.timeout(1800)
def test_a_kill_before_any_change_of_a_file_until_the_teacher_s_cache_is_finished(server, tmp_path):
    lesson = {"loss": "both", "teacher": {"k": 5, "batch_size": 3}}
    expected = tmp_path / "expected"
    server.run(expected, **lesson)
    wanted = {p.name: p.read_bytes() for p in (expected / "teacher").iterdir()}
    unfinished = 0
    for change in range(1, 60):
        folder = tmp_path / f"run{change}"
        assert server.run(folder, {"change": change}, **lesson)["killed"]
        index = folder / "teacher" / "teacher.json"
        finished = index.is_file() and "sequences" in json.loads(index.read_text())
        unfinished += (folder / "teacher").is_dir() and not finished
        server.run(folder, **lesson)
        assert {p.name: p.read_bytes() for p in (folder / "teacher").iterdir()} == wanted
        assert_same_end(folder, expected)
        if finished:
            break
    assert finished
    assert unfinished > 4


def test_a_fresh_process_computes_what_a_forked_one_does(server, undisturbed, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**server.run_file, "output": str(tmp_path / "run")}))
    command = [sys.executable, "-m", "shadowpeft.cli", "pretrain", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert_same_end(tmp_path / "run", undisturbed[0])

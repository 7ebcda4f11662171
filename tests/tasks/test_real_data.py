"""The real files, where there are any: sizes as published, gold answers right by their own scorers, splits apart."""

import os
from pathlib import Path

import pytest

from shadowpeft.data.tasks import get_task

pytestmark = pytest.mark.skipif(
    not Path(os.environ.get("SHADOWPEFT_DATA", ""), "gsm8k").is_dir(),
    reason="no data folder; set SHADOWPEFT_DATA to one to run these",
)


@pytest.mark.parametrize(
    ("name", "split", "rows", "partial"),
    [
        ("mmlu", "validation", 1531, False),
        ("mmlu", "test", 14042, False),
        ("gsm8k", "test", 1319, False),
        ("squad_v2", "test", 11873, False),
        ("squad_v2", "train", None, True),
        ("squad_v2_devsplit", "test", 3538, True),
        ("newsgroups", "test", 7532, False),
        ("clinc150", "train", 15100, False),
        ("clinc150", "test", 5500, False),
    ],
)
def test_sizes_and_gold_answers(monkeypatch, name, split, rows, partial):
    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "folder")
    task = get_task(name)
    examples, origin = task.load_with_source(split)
    assert origin["partial"] is partial
    assert rows is None or len(examples) == rows
    assert len({e.id for e in examples}) == len(examples)
    said = [e.gold if task.kind == "classify" else task.parse(e.answer) for e in examples]
    assert task.score(said, examples)["score"] == 1.0


@pytest.mark.parametrize("name", ["gsm8k", "squad_v2_devsplit", "newsgroups"])
def test_no_held_out_row_is_trained_on_or_tested(monkeypatch, name):
    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "folder")
    task = get_task(name)
    train, held, test = ({e.prompt for e in task.load(s) if e.prompt.strip()} for s in ("train", "validation", "test"))
    assert held
    assert not held & train
    assert not held & test

"""The GPU kit runs on a CPU at a tiny shape: what it would measure is there, and what it has no time for is named."""

import json
import sys

import pytest

from pages import script

RATIOS = {"decode": ("eager", "graphs"), "passes": (), "train": ()}


def run(monkeypatch, capsys, *arguments):
    kit = script("benchmarks/gpu.py")
    monkeypatch.setattr(kit, "ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--shapes", "tiny", *map(str, arguments)])
    kit.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.slow) for part in RATIOS])
def test_a_part_measures_every_method(monkeypatch, capsys, tmp_path, part):
    out = tmp_path / "gpu.json"
    said = run(monkeypatch, capsys, "--part", part, "--out", out)
    record = json.loads(out.read_text())
    assert json.loads(said.splitlines()[0]) == record
    found = record["shapes"]["tiny"][part]
    ratios = {
        "decode": {"base", "shadow", "lora", "peft_shadow", "dora"},
        "passes": {"1", "2", "4", "8", "16", "32", "draft"},
        "train": {"lora", "shadow", "peft_shadow"},
    }[part]
    measured = found["eager"] if part == "decode" else found
    (key,) = [key for key in measured if key.startswith("ratio_to")]
    assert set(measured[key]) == ratios
    assert all(ratio > 0 for ratio in measured[key].values())
    assert record["left"] == []
    assert f"| tiny | {part}" in said


def test_parts_add_up_and_what_is_left_is_named(monkeypatch, capsys, tmp_path):
    out = tmp_path / "gpu.json"
    run(monkeypatch, capsys, "--part", "train", "--out", out)
    said = run(monkeypatch, capsys, "--part", "passes", "--out", out, "--minutes", 0)
    record = json.loads(out.read_text())
    assert list(record["shapes"]["tiny"]) == ["train"]
    assert record["left"] == ["passes tiny"]
    assert "no time for: passes tiny" in said

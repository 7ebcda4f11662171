"""The committed pages on starts hold the numbers of the committed records."""

import json

from pages import ROOT, facts, marked, numbers, rows, script


def test_starts_and_losses():
    starts = script("benchmarks/starts.py")
    record = json.loads(starts.RECORD.read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "starts.md").read_text(encoding="utf-8")
    assert facts(page) == facts(starts.page(record)), "run `python benchmarks/starts.py` and commit docs/starts.md"
    ends = sorted(round(run["curve"][-1]["held_out"], 3) for run in record.values())
    assert [float(row[3]) for row in rows(page)[1:]] == ends
    assert sum(run["objective"] == "ce" for run in record.values()) >= 4


def test_starts_of_the_robots_shadow():
    starts = script("benchmarks/starts_robot.py")
    record = json.loads(starts.RECORD.read_text(encoding="utf-8"))
    table = marked(starts.PAGE, "robot-starts")
    assert facts(table) == facts(starts.table(record)), "run `python benchmarks/starts_robot.py` and commit the page"
    assert {"random", "base_layers"} <= record["starts"].keys()
    for row, start in zip(rows(table)[1:], record["starts"].values(), strict=True):
        commands = start["commands"]
        shown = [100 * commands["accuracy"], *(100 * end for end in commands["interval"])]
        assert numbers(row[3]) == [round(value, 1) for value in shown]
        assert float(row[1]) == start["rate"]

"""The pages of the device half say what their records hold."""

from __future__ import annotations

import json

import pytest
from experiments.device_results import PAGES, RECORDS

from experiments import device_results
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.rival import ROBOT_C


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_made_from_the_records(page):
    content = page.read_text(encoding="utf-8")
    assert device_results.text(content, PAGES[page], page) == content


def test_a_page_without_marks_is_refused():
    page = next(iter(PAGES))
    with pytest.raises(ConfigError, match="lacks the marks <!-- demo -->"):
        device_results.text("nothing", ("demo",), page)


def test_the_rival_of_the_demo_is_the_recorded_one():
    """The demo fits it anew, at C = 1, in seconds. The record's is chosen: 3, worth one more row of 661."""
    file = RECORDS["demo"].parents[2] / "experiments" / "records" / "rivals" / "robot-svc-large.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    scores = record["results"]["robot-svc-test_large"]["scores"]
    by_c = {trial["C"]: trial["score"] for trial in record["rate"]["trials"]}
    assert by_c[record["rate"]["chosen"]] - by_c[ROBOT_C] < 1.5 / record["rate"]["n"]
    for name in ("demo", "full"):
        rival = json.loads(RECORDS[name].read_text(encoding="utf-8"))["methods"]["rival"]
        assert rival["commands"]["accuracy"] == pytest.approx(scores["skill"], abs=0.01)
        assert rival["open_handed_on"]["accuracy"] == pytest.approx(scores["remote"], abs=0.01)


def test_the_best_cell_of_each_depth_is_shown():
    def cell(name, layers, score):
        share = {"score": score, "interval": [0.0, 1.0], "n": 10}
        point = {"pass": 1, "processor_seconds": 60.0, "constrained": {"commands": share, "open_handed_on": share}}
        own = {"settings": {"layers": layers}, "data": {"train": {"rows": 4050}}}
        return {"id": f"device/{name}", "name": name, "parameters": 1e6, "curve": [point], **own}

    costs = {"1": {"parameters": 3e6, "decision_ms": 11.0, "attached_to_base": 1.07}}
    lines = device_results.frontier([cell("b", 6, 0.5), cell("a", 2, 0.4), cell("c", 6, 0.9)], costs)
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "2", "6"]
    assert "11 ms" in lines[2]
    assert "[c](" in lines[4]
    assert "90.0" in lines[4]


def test_what_a_second_opinion_keeps_of_requests_out_of_scope_is_the_records():
    docs = RECORDS["oos"].parents[1]
    check = json.loads((docs / "records" / "demo-oos-second.json").read_text(encoding="utf-8"))["check"]
    text = " ".join((docs / "device.md").read_text(encoding="utf-8").split())
    said = (
        f"keeps {100 * check['commands_kept']:.1f} % of the {check['commands']} test commands",
        f"hands on {100 * check['open_handed_on']:.1f} % of the {check['open_requests']} requests without an action",
        f"{check['wrong_on_device']} of the {check['answered_on_device']} answers that it keeps are wrong",
    )
    assert [each for each in said if each not in text] == []


def test_how_the_calibration_rows_mattered_is_the_records():
    """Their mixture and their number, for the long demo."""
    docs = RECORDS["full"].parents[1]
    text = " ".join((docs / "device.md").read_text(encoding="utf-8").split())
    counts = (264, 626, 1040)
    by_rows = {n: json.loads((docs / "records" / f"demo-full-{n}.json").read_text(encoding="utf-8")) for n in counts}
    first, second, last = (by_rows[n]["calibrated"] for n in counts)
    assert [each["rows"] for each in (first, second, last)] == [264, 626, 1040]

    def percent(share):
        return f"{100 * share['accuracy']:.1f} %"

    said = (
        f"{100 - 100 * last['open_kept']['accuracy']:.1f} % of the open requests were handed on",
        f"kept {percent(first['commands_kept'])} of the commands, and {percent(first['wrong_of_kept'])} of all that it kept",
        f"626 of them kept {percent(second['commands_kept'])} of the commands",
        f"1,040 kept {percent(last['commands_kept'])}",
    )
    assert [each for each in said if each not in text] == []


def test_the_measured_case_of_routing_is_the_records():
    docs = RECORDS["demo"].parents[1]
    report = json.loads((docs / "records" / "routing.json").read_text(encoding="utf-8"))["report"]
    lines = (docs / "routing.md").read_text(encoding="utf-8").splitlines()
    check, whole = report["check"], report["curve"][0]
    assert whole["threshold"] == 0.0  # every known action
    for label, found in (("every known action kept", whole), ("calibrated", check)):
        (line,) = [line for line in lines if line.startswith(f"| {label} |") and "(" in line]
        shares = (found["commands_kept"], found["open_handed_on"], found["wrong_share"], found["accuracy_routed"])
        cells = line.split("|")[2:6]
        assert [cell.split("%")[0].strip() for cell in cells] == [f"{100 * share:.1f}" for share in shares]
        assert f"({found['wrong_on_device']} of {found['answered_on_device']}" in line
    fitted = f"{report['wrong_on_device']} of {report['answered_on_device']} kept answers are wrong"
    assert any(fitted in line for line in lines)


def test_what_a_second_opinion_costs_is_the_records():
    cost = json.loads(device_results.SECOND["oos"].read_text(encoding="utf-8"))["cost"]
    text = " ".join((RECORDS["oos"].parents[1] / "routing.md").read_text(encoding="utf-8").split())
    said = (
        f"{cost['fit_seconds']} processor seconds for {cost['rows']:,} rows and {cost['actions']} actions",
        f"{cost['bytes'] / 1e6:.1f} MB for `robot_oos`",
        f"A request costs {cost['request_milliseconds']:.1f} ms more",
    )
    assert [each for each in said if each not in text] == []

"""``shadowpeft demo`` replaces nothing but an earlier demo, and measures what it says."""

import json

import pytest
import yaml
from peft import get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import save_sitting_base
from shadowpeft.apps import demo, demo_picture, demo_result
from shadowpeft.data import robot
from shadowpeft.data.second_opinion import SecondOpinion
from shadowpeft.errors import ConfigError
from shadowpeft.serve.router import Calibration
from shadowpeft.storage import LOCK, temporary_name
from shadowpeft.terminal import terminal
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.config import parse_run


class _Started(Exception):
    pass


def earlier(folder, **changes):
    content = {**demo.SETTINGS, "output": str(folder / "run"), **changes}
    content["training"] = {**demo.SETTINGS["training"], "max_steps": 7}
    (folder / "run" / "checkpoint-7").mkdir(parents=True)
    run = parse_run(content, "the test's run").model_dump()
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    (folder / "result.json").write_text("{}")
    (folder / "edge").mkdir()


@pytest.fixture
def start(monkeypatch):
    """Start the demo; training does not begin."""

    def begin(*args):
        raise _Started

    monkeypatch.setattr(demo, "_train", begin)
    return lambda folder: demo.main(str(folder), False, True)


def test_an_earlier_demo_is_replaced(tmp_path, start):
    earlier(tmp_path / "finished")
    (tmp_path / "killed" / "run").mkdir(parents=True)
    for name in ("versions.json", "data.json", LOCK):
        (tmp_path / "killed" / "run" / name).write_text("half")
    (tmp_path / "killed" / "run" / temporary_name()).mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("finished", "killed", "empty", "new"):
        with pytest.raises(_Started):
            start(tmp_path / name)
        assert not list((tmp_path / name).glob("*"))


@pytest.mark.parametrize("kind", ["notes", "other run", "other source", "own run", "no run", "damaged", "file"])
def test_what_somebody_else_put_there_stays(tmp_path, start, kind):
    folder = tmp_path / "out"
    if kind == "other run":
        earlier(folder, data={"train": "mine.jsonl"})
    elif kind == "other source":
        earlier(folder, data={"train": {"path": "mine"}})
    elif kind == "file":
        folder.write_text("precious")
    elif kind == "damaged":
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "config.yaml").write_text("base: [")
    elif kind == "notes":
        earlier(folder)
        (folder / "notes.txt").write_text("precious")
    else:
        (folder / ("run" if kind == "own run" else "edge")).mkdir(parents=True)
        (folder / ("run" if kind == "own run" else "edge") / "thesis.tex").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="something other than an earlier demo"):
        start(folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def few(monkeypatch):
    """A tiny adapted base whose device half says ``[Sit()]``, and a few rows of each split."""
    whole = {name: robot.load(name) for name in robot.SPLITS}

    def load(split):
        by_skill = sorted(whole[split], key=lambda row: (row["skill"] != "Sit", row["id"]))
        return by_skill[: 110 if split == "calibration_normal" else 12]

    monkeypatch.setattr(robot, "load", load)
    monkeypatch.setattr(demo_result, "TARGET", 0.9)
    monkeypatch.setattr(demo_result, "STRICT", 0.8)
    learnt = [{"prompt": name, "skill": name} for name in (*robot.SKILLS, "REMOTE")]
    learnt += [{"prompt": row["prompt"], "skill": "Sit"} for row in load("test_normal")]
    monkeypatch.setattr(demo_result, "rows_to_learn", lambda source: learnt)


def test_what_is_measured(tmp_path, few):
    base = save_sitting_base(tmp_path / "base")
    config = shadowpeft.ShadowPeftConfig.preset("tuned", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(tmp_path / "run" / "adapter")
    tokenizer, asked = load_tokenizer(base), ["sit down", "why?"]
    result = demo_result.measure(model, tokenizer, tmp_path, asked, terminal(stderr=True), learnt="robot")
    sits = sum(row["skill"] == "Sit" for row in robot.load("test_normal")) / 12
    for name in ("device", "second", "cloud"):
        found = result["methods"][name]
        assert found["commands"]["accuracy"] == pytest.approx(sits)
        assert found["open_handed_on"]["accuracy"] == 0.0
    assert set(result["methods"]) == {"rival", "device", "second", "cloud", "routed"}
    assert result["calibrated"]["rows"] == 110 + 12
    assert set(result["milliseconds"]) == {"rival", "device", "second", "cloud"}
    assert [row["action"] for row in result["requests"]] == ["Sit", "Sit"]
    digest = Calibration.load(tmp_path / "edge" / "routing.json").opinion
    opinion = SecondOpinion.load(tmp_path / "edge", digest)
    assert result["size"]["opinion_parameters"] == opinion.parameters
    assert result["calibrated"]["alone"].keys() < result["calibrated"].keys() == result["strict"].keys()
    assert (result["calibrated"]["target"], result["strict"]["target"]) == (0.9, 0.8)
    demo_picture.draw(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(record=True, width=200)
    demo_picture.show_tables(result, console)
    shown = console.export_text()
    assert "TF-IDF and LinearSVC" in shown
    assert shown.count("commands kept on the device") == 2
    assert "device with a second opinion" in shown
    json.dumps(result)


def test_shares_are_of_commands_and_of_open_requests():
    rows = [{"skill": s, "lang": "en"} for s in ("Sit", "Bark", "Sit", "REMOTE", "REMOTE")]
    actions = ["Sit", "Sit", "REMOTE", "REMOTE", "Sit"]
    found = demo_result.worth(rows, actions)
    assert found["commands"]["accuracy"] == pytest.approx(1 / 3)
    assert found["commands_handed_on"]["accuracy"] == pytest.approx(1 / 3)
    assert found["open_handed_on"]["accuracy"] == 0.5
    kept = demo_result.shares(rows, actions, [True, True, False, False, True])
    assert kept["commands_kept"]["accuracy"] == pytest.approx(2 / 3)
    assert kept["open_kept"]["accuracy"] == 0.5
    assert kept["wrong_of_kept"]["accuracy"] == pytest.approx(2 / 3)
    assert kept["wrong_of_kept_commands"]["accuracy"] == 0.5


def test_the_cloud_is_told_where_that_may_change_its_answer():
    rows = [{"prompt": str(n)} for n in range(5)]
    decided = [("REMOTE", 0.9), ("REMOTE", 0.9), ("REMOTE", 0.4), ("Sit", 0.4), ("REMOTE", 0.8)]
    spoken = ["Sit", None, None, "Bark", "Bark"]

    def again(asked, chances):
        assert [row["prompt"] for row in asked] == ["0", "2", "4"]
        assert chances == {"0": 0.9, "2": 0.4, "4": 0.8}
        return [None, "Sit", "Bark"]

    assert demo_result.handed_on(rows, decided, spoken, again) == [None, None, "Sit", "Bark", "Bark"]
    assert demo_result.handed_on(rows[1:2], decided[1:2], spoken[1:2], again) == [None]


def test_a_share_of_nothing_is_no_number():
    kept = demo_result.shares([{"skill": "Sit", "lang": "en"}], ["Sit"], [False])
    assert kept["wrong_of_kept"]["accuracy"] is None
    assert demo_picture.percent(kept["wrong_of_kept"]) == "-"
    json.dumps(kept, allow_nan=False)

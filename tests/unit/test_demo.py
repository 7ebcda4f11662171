"""``shadowpeft demo`` replaces nothing but an earlier demo."""

import pytest
import yaml

from shadowpeft.apps import demo
from shadowpeft.errors import ConfigError
from shadowpeft.storage import LOCK, temporary_name
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


@pytest.mark.parametrize("kind", ["notes", "other run", "own run", "no run", "damaged", "file"])
def test_what_somebody_else_put_there_stays(tmp_path, start, kind):
    folder = tmp_path / "out"
    if kind == "other run":
        earlier(folder, data={"train": "mine.jsonl"})
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

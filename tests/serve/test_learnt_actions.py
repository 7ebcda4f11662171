"""An adapter and its edge model record which actions they have learnt; a server of others is refused."""

import json
import shutil

import pytest

from chatbase import chat_tokenizer, run_file, save_base, write_rows
from shadowpeft.apps import serve as command
from shadowpeft.apps.detach import main as detach_command
from shadowpeft.errors import ConfigError
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.options import Options
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train
from webserver import Running


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter that learnt two actions, and its edge model."""
    place = tmp_path_factory.mktemp("learnt")
    base = save_base(place / "base", vocab_size=261, max_position_embeddings=1024, num_hidden_layers=7)
    chat_tokenizer().save_pretrained(base)
    (place / "names.txt").write_text("LampOn\nLampOff\n")
    answers = ("[LampOn()] on", "[LampOff()] off", "who knows")
    rows = write_rows(place / "rows.jsonl", [{"prompt": text, "response": text} for text in answers])
    data = {"tools": str(place / "names.txt"), "shadow_answers": "action"}
    train(parse_run(run_file(place / "run", base, rows, data=data, training={"max_steps": 4}), "run"))
    detach_command(str(place / "run" / "adapter"), str(place / "edge"))
    return place / "run" / "adapter", place / "edge"


def application(folder, role="edge", **options):
    given = Options(role=role, adapters=[str(folder)], auth=False, device="cpu", **options)
    return command.application(given, Keys(None, ("admin",)))


def test_they_are_recorded(folders):
    for folder, file in zip(folders, ("adapter_config.json", "config.json"), strict=True):
        assert json.loads((folder / file).read_text())["actions"] == ["LampOff", "LampOn"]


def test_others_are_refused(folders, tmp_path):
    (tmp_path / "more.txt").write_text("LampOn\nLampOf\n")
    for folder in folders:
        with pytest.raises(ConfigError, match=r"has learnt 2 actions of its own .* but the packaged ones would count"):
            application(folder)
        for role in ("edge", "cloud"):
            with pytest.raises(ConfigError, match=r"has the action LampOf, which .* has not learnt .did you mean 'LampOff'"):
                application(folder, role, skills=str(tmp_path / "more.txt"))
        assert application(folder, "cloud")


def test_its_own_are_served(folders, tmp_path):
    (tmp_path / "own.txt").write_text("LampOn\n")
    for folder in folders:
        assert application(folder, skills=str(tmp_path / "own.txt"))
    plain = json.loads((folders[1] / "config.json").read_text())
    del plain["actions"]  # as models of earlier releases
    command._check_learnt(str(tmp_path), None, packaged=True)
    (tmp_path / "config.json").write_text(json.dumps(plain))
    command._check_learnt(str(tmp_path), None, packaged=True)


@pytest.mark.parametrize("role", ["cloud", "edge"])
def test_what_comes_later_has_to_have_learnt_them_too(folders, tmp_path, role):
    """By the same check as at the start; before, an adapter of other actions was let in."""
    source, file = (folders[0], "adapter_config.json") if role == "cloud" else (folders[1], "config.json")
    for name, learnt in (("other", ["LampOff"]), ("same", ["LampOn", "LampOff"]), ("silent", None)):
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "shadowpeft-files.sha256").unlink(missing_ok=True)  # the change is meant
        content = json.loads((source / file).read_text())
        del content["actions"]
        (tmp_path / name / file).write_text(json.dumps(content | ({} if learnt is None else {"actions": learnt})))
    (tmp_path / "own.txt").write_text("LampOn\n")
    known = {"skills": str(tmp_path / "own.txt"), "versions": str(tmp_path)}
    with Running(application(source, role, **known)) as server, server.http("admin") as http:
        changes = ["/admin/adapters/default/swap", *(["/admin/adapters/more"] if role == "cloud" else [])]
        for change in changes:
            refused = http.post(change, json={"version": "other"})
            assert refused.status_code == 409
            said = refused.json()["error"]["message"]
            assert f"--skills has the action LampOn, which '{tmp_path / 'other'}' has not learnt" in said
        assert "more" not in [each["id"] for each in http.get("/v1/models").json()["data"]]
        for version in ("same", "silent"):
            for change in changes:
                done = http.post(change, json={"version": version})
                assert done.status_code == 200, done.text
            if role == "cloud":
                assert http.delete("/admin/adapters/more").status_code == 200

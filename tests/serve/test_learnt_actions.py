"""An adapter and its edge model record which actions they have learnt; a server of others is refused."""

import json

import pytest

from chatbase import chat_tokenizer, run_file, save_base, write_rows
from shadowpeft.apps import serve as command
from shadowpeft.apps.detach import main as detach_command
from shadowpeft.errors import ConfigError
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.options import Options
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train


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
    return command.application(Options(role=role, adapters=[str(folder)], auth=False, device="cpu", **options), Keys(None, ()))


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

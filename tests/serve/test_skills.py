"""Skills of one's own, from a file: calibrated, kept by the calibration, and done on the device; the rest is handed on."""

import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import chat_tokenizer, save_sitting_base, write_rows
from commands import call
from serving import Scripted, attached, detached
from shadowpeft.apps import serve as command
from shadowpeft.data.robot import SKILLS
from shadowpeft.errors import ConfigError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.router import Calibration
from shadowpeft.serve.server import Settings, build
from tiny import adapter_config
from webserver import Running

OLD = {"format": 1, "signal": "logprob", "values": [-50.0], "chances": [1.0], "threshold": 0.5, "report": {}}
"""A calibration as it was written before there were skills in it."""
NOBODY = Keys(None, ())


@pytest.fixture(scope="module")
def lamp(tmp_path_factory):
    """An adapter whose two paths always say ``[LampOn()]``, its edge model, files of skills, and rows."""
    folder = tmp_path_factory.mktemp("lamp")
    base = save_sitting_base(folder / "base", "[LampOn()]")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config(shadow_init="base_layers"))
    model.save_pretrained(folder / "adapter")
    shadowpeft.detach(model).save_pretrained(folder / "edge")
    for name in ("adapter", "edge"):
        chat_tokenizer().save_pretrained(folder / name)
    (folder / "skills.txt").write_text("LampOn\nLampOff\n")
    (folder / "same.json").write_text('["LampOff", "LampOn"]')
    (folder / "other.txt").write_text("LampOn\nLampDim\n")
    (folder / "packaged.txt").write_text("\n".join(SKILLS))
    write_rows(folder / "rows.jsonl", [{"prompt": f"light {i}, please", "skill": "LampOn"} for i in range(36)])
    asked = [{"prompt": "dark!", "skill": "LampOff"}, {"prompt": "why?", "skill": "REMOTE"}]
    write_rows(folder / "mixed.jsonl", [{"prompt": "light!", "skill": "LampOn"}, *asked])
    return folder


def say(server, text, **more):
    body = {"model": "default", "messages": [{"role": "user", "content": text}], **more}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["shadowpeft"]


def edge_options(folder, **more):
    return command.Options(adapters=[str(folder)], role="edge", auth=False, device="cpu", **more)


def test_calibrated_on_skills_of_its_own_the_edge_keeps_them(lamp, monkeypatch, capsys, tmp_path):
    code, out, err = call(
        monkeypatch,
        capsys,
        *("route", "calibrate", lamp / "adapter", "--skills", lamp / "skills.txt", "--json"),
        *("--data", lamp / "rows.jsonl", "--check", lamp / "mixed.jsonl", "--out", tmp_path, "--max-new-tokens", "12"),
        *("--target", "0.2"),  # 36 rows cannot hold 5 %
    )
    assert code == 0, err
    result = json.loads(out)
    assert result["known_actions"] == 36
    assert result["wrong_on_device"] == 0
    assert (result["accuracy_cloud"], result["check"]["accuracy_cloud"]) == (1.0, 0.3333)
    assert result["skills"] == ["LampOn", "LampOff"]
    # it says LampOn to all three, right once; one of the wrong ones is less sure than each of the 36, so it is handed on
    assert (result["check"]["answered_on_device"], result["check"]["wrong_on_device"]) == (2, 1)
    file = tmp_path / "routing.json"
    assert Calibration.load(file).skills == ("LampOn", "LampOff")

    for told in (None, str(lamp / "same.json")):  # the calibration has them; the same ones in another order are welcome
        app = command.application(edge_options(lamp / "edge", routing=str(file), skills=told), NOBODY)
        with Running(app) as server:
            content, note = say(server, "light 3, please")
        assert content.startswith("[LampOn()]")
        assert (note["where"], note["reason"], note["action"]) == ("device", "known skill", "LampOn")
        assert note["confidence"] == 1.0


def test_without_the_file_the_same_answers_are_unknown(lamp, monkeypatch, capsys, tmp_path):
    with Running(command.application(edge_options(lamp / "edge"), NOBODY)) as server:
        note = say(server, "light!")[1]
    assert (note["wanted"], note["action"]) == ("unknown answer", None)
    code, _, err = call(
        monkeypatch, capsys, "route", "calibrate", lamp / "edge", "--no-cloud", "--data", lamp / "rows.jsonl"
    )
    assert code == 2
    assert "'LampOn', which is none of the 34 known ones and not REMOTE" in err
    assert "--skills FILE" in err


@pytest.fixture
def scripted(monkeypatch):
    """The command's edge, with a model that says what a word of the prompt asks for."""
    lines = {
        "lamp": "[LampOn()] It is on.",
        "sit": "[Sit()] Here I sit.",
        "remote": "[REMOTE] Ask the cloud.",
        "words": "The capital of Italy is Rome.",
    }
    made = Scripted(detached("default"))
    made.LINES = lines
    monkeypatch.setattr(command, "_edge_backend", lambda *_: made)
    return lines


def test_the_edge_keeps_its_skills_and_hands_on_the_rest(lamp, scripted, tmp_path):
    role = CloudRole(Engine(attached(max_position_embeddings=512), EngineLimits()), system=None, default_tokens=8)
    with Running(build(role, Settings(NOBODY))) as cloud:
        options = edge_options(
            tmp_path,
            skills=str(lamp / "skills.txt"),
            free_actions=True,
            cloud_url=cloud.url,
            cloud_model="late",
            default_tokens=24,
        )
        with Running(command.application(options, NOBODY)) as server:
            kept, note = say(server, "lamp")
            assert kept == scripted["lamp"]
            assert (note["where"], note["reason"], note["action"]) == ("device", "known skill", "LampOn")
            for text, reason, action in (
                ("sit", "unknown answer", None),  # a skill of the packaged set, not of this one
                ("words", "unknown answer", None),
                ("remote", "[REMOTE]", "REMOTE"),
            ):
                said, note = say(server, text)
                assert said != scripted[text]
                assert (note["where"], note["reason"], note["action"]) == ("cloud", reason, action)
                assert "degraded" not in note


def test_an_old_calibration_means_the_packaged_skills(lamp, scripted, tmp_path):
    (tmp_path / "routing.json").write_text(json.dumps(OLD))
    assert Calibration.load(tmp_path / "routing.json").skills is None
    for skills in (None, str(lamp / "packaged.txt")):
        with Running(command.application(edge_options(tmp_path, skills=skills), NOBODY)) as server:
            assert say(server, "sit")[1]["reason"] == "known skill"
            assert say(server, "lamp")[1]["wanted"] == "unknown answer"
    with pytest.raises(ConfigError, match="has the packaged 34 skills"):
        command.application(edge_options(tmp_path, skills=str(lamp / "skills.txt")), NOBODY)


def test_a_calibration_without_skills_is_written_as_before(tmp_path):
    Calibration("logprob", (-50.0,), (1.0,), 0.5).save(tmp_path / "old.json")
    assert json.loads((tmp_path / "old.json").read_text()) == OLD
    made = Calibration("logprob", (-50.0,), (1.0,), 0.5, {"n": 1}, ("LampOn", "开灯"))
    made.save(tmp_path / "new.json")
    assert Calibration.load(tmp_path / "new.json") == made


@pytest.mark.parametrize(
    ("skills", "message"),
    [
        ([], "a calibration has no skill"),
        (None, "has skills that are no list"),
        ("LampOn", "has skills that are no list"),
        (["LampOn", "LampOn"], "'LampOn' twice"),
        (["REMOTE"], "has REMOTE"),
        ([3], "has 3, which is no identifier"),
    ],
)
def test_damaged_skills_in_a_calibration(tmp_path, skills, message):
    (tmp_path / "routing.json").write_text(json.dumps({**OLD, "skills": skills}))
    with pytest.raises(ConfigError, match=message):
        Calibration.load(tmp_path / "routing.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no skill"),
        ("Lamp On", "'Lamp On', which is no identifier"),
        ('["LampOn", "LampOn"]', "'LampOn' twice"),
        ("LampOn\nREMOTE", "REMOTE, which always means handing on"),
        (None, "cannot be read"),
    ],
)
@pytest.mark.parametrize("arguments", [("serve", "--role", "edge", "--no-auth"), ("route", "calibrate", "--no-cloud")])
def test_files_that_are_refused_end_with_2(lamp, monkeypatch, capsys, tmp_path, arguments, content, message):
    file = tmp_path / "skills.txt"
    if content is not None:
        file.write_text(content)
    code, _, err = call(monkeypatch, capsys, *arguments, lamp / "edge", "--skills", file)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_contradictions_end_with_2(lamp, monkeypatch, capsys, tmp_path):
    calibration = Calibration(**{k: tuple(v) if isinstance(v, list) else v for k, v in OLD.items() if k != "format"})
    calibration.save(tmp_path / "packaged.json")
    own = Calibration("logprob", (-50.0,), (1.0,), 0.5, skills=("LampOn", "LampOff"))
    own.save(tmp_path / "routing.json")
    edge = ("serve", lamp / "edge", "--role", "edge", "--no-auth")
    for arguments, message in (
        (
            (*edge, "--routing", tmp_path / "routing.json", "--skills", lamp / "other.txt"),
            "has its own 2 skills (LampDim",
        ),
        (
            (*edge, "--routing", tmp_path / "packaged.json", "--skills", lamp / "skills.txt"),
            "has the packaged 34 skills",
        ),
        (("route", "calibrate", lamp / "edge", "--skills", lamp / "skills.txt"), "'robot' has the packaged skills"),
    ):
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in err
        assert len(err.strip().splitlines()) == 1

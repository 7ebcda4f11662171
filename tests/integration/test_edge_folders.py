"""Commands that are given an edge folder, a detached shadow on the disk, in the place of an adapter."""

import json

import pytest

import shadowpeft
from chatbase import chat_model, chat_tokenizer, save_base, write_rows
from commands import call
from tiny import adapt


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter that was trained under a system message, and its edge folder."""
    root = tmp_path_factory.mktemp("edge")
    base, model = save_base(root / "base", max_position_embeddings=512), adapt(chat_model(max_position_embeddings=512))
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.system_message = base, "Be a dog."
    model.save_pretrained(str(root / "adapter"))
    chat_tokenizer().save_pretrained(str(root / "adapter"))
    shadowpeft.detach(model).save_pretrained(root / "edge")
    chat_tokenizer().save_pretrained(str(root / "edge"))
    return root


def answered(monkeypatch, capsys, *arguments):
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    return out


def test_an_edge_folder_says_what_the_detached_adapter_says(monkeypatch, capsys, folders):
    ask = ("who?", "--max-new-tokens", 6, "--json")
    ours = json.loads(answered(monkeypatch, capsys, "generate", folders / "edge", *ask))
    theirs = json.loads(answered(monkeypatch, capsys, "generate", folders / "adapter", *ask, "--mode", "detached"))
    assert (ours["mode"], ours["text"]) == ("detached", theirs["text"])
    other = answered(monkeypatch, capsys, "generate", folders / "edge", *ask, "--system", "")
    assert json.loads(other)["text"] != ours["text"]  # so the message of the training was there
    assert ours["text"] != json.loads(answered(monkeypatch, capsys, "generate", folders / "adapter", *ask))["text"]


def test_an_edge_folder_is_judged_as_the_detached_adapter(monkeypatch, capsys, folders, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"q{i}", "response": "a" * i} for i in range(1, 4)])
    edge = json.loads(answered(monkeypatch, capsys, "eval", folders / "edge", "--data", file, "--json"))["modes"]
    both = json.loads(answered(monkeypatch, capsys, "eval", folders / "adapter", "--data", file, "--json"))["modes"]
    assert list(edge) == ["detached"]
    assert edge["detached"]["loss"] == pytest.approx(both["detached"]["loss"], rel=1e-6)
    assert edge["detached"]["loss"] != pytest.approx(both["attached"]["loss"], rel=1e-3)


def test_a_bare_base_is_no_detached_shadow(folders):
    from shadowpeft.errors import ConfigError
    from shadowpeft.evaluate import runner_in_mode

    with pytest.raises(ConfigError, match="has no shadow adapter"), runner_in_mode(chat_model(), "detached"):
        pass


def test_an_edge_folder_is_asked_about_rows(monkeypatch, capsys, folders, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": "who?"}])
    out = ("--out", tmp_path / "out.jsonl", "--max-new-tokens", 6)
    code, _, err = call(monkeypatch, capsys, "data", "answer", folders / "edge", file, *out)
    assert (code, "no answer ended within 6 tokens" in err) == (2, True)  # this random model never ends


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("generate", "edge", "x", "--mode", "attached"), "is an edge model, a detached shadow alone; leave --mode out"),
        (("eval", "edge", "--mode", "base"), "is an edge model, a detached shadow alone; leave --mode out"),
        (("eval", "edge", "--vote"), "it is an edge model; leave it out"),
        (("eval", "edge", "--speculative"), "it is an edge model; leave it out"),
        (("eval", "edge", "--task", "clinc150"), "is an edge model; give the adapter it was made from"),
        (("generate", "edge", "x", "--base", "smollm2-135m"), "is an edge model; leave it out"),
        (("generate", "edge", "x", "--speculative"), "the shadow drafts for the attached"),
    ],
)
def test_what_needs_a_base_is_refused(monkeypatch, capsys, folders, arguments, said):
    command, _, *rest = arguments
    code, _, err = call(monkeypatch, capsys, command, folders / "edge", *rest)
    assert (code, said in " ".join(err.split())) == (2, True), err

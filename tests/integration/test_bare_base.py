"""A base that was only pretrained: its tokenizer has no chat template, and a run gives it one."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from chatbase import chat_tokenizer, plain_rows, run_file, save_base, write_rows
from commands import call
from shadowpeft.chat_template import render, render_prompt
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.tokenizer import load_tokenizer


@pytest.fixture
def bare(tmp_path):
    base = save_base(tmp_path / "base")
    words = AutoTokenizer.from_pretrained(base)
    words.chat_template = None
    for file in Path(base).glob("chat_template*"):
        file.unlink()
    words.save_pretrained(base)
    return base


def run_of(base, tmp_path, **data):
    rows = write_rows(tmp_path / "rows.jsonl", plain_rows(8))
    content = run_file(tmp_path / "run", base, rows, data=data)
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    return tmp_path / "run.yaml"


def test_without_a_template_the_run_names_the_setting(bare, tmp_path, monkeypatch, capsys):
    for command in (("train",), ("plan",), ("data", "check")):
        code, out, err = call(monkeypatch, capsys, *command, run_of(bare, tmp_path))
        assert code == 2
        assert " ".join((out + err).split()).count("set data.chat_template in the run file (plain, or a file with one)") == 1


@pytest.mark.parametrize("given", ["plain", "file"])
def test_the_template_goes_with_the_adapter_and_its_edge_model(given, bare, tmp_path, monkeypatch, capsys):
    template = given
    if given == "file":
        template = str(tmp_path / "chat.jinja")
        Path(template).write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>")
    code, _, err = call(monkeypatch, capsys, "train", run_of(bare, tmp_path, chat_template=template))
    assert code == 0, err
    adapter = tmp_path / "run" / "adapter"
    code, _, err = call(monkeypatch, capsys, "detach", adapter, tmp_path / "edge", "--base", bare)
    assert code == 0, err
    turn = [{"role": "user", "content": "sit"}]
    prompt = "### User\nsit\n### Assistant\n" if given == "plain" else f"<user>sit{chat_tokenizer().eos_token}<assistant>"
    for folder in (adapter, tmp_path / "edge"):
        assert render_prompt(load_tokenizer(str(folder)), turn) == prompt
    code, _, err = call(monkeypatch, capsys, "generate", adapter, "sit", "--base", bare, "--json")
    assert code == 0, err


def test_an_answer_ends_with_the_end_of_text(bare):
    words = load_tokenizer(bare, "plain")
    turns = [
        {"role": "system", "content": "Be a dog."},
        {"role": "user", "content": "sit"},
        {"role": "assistant", "content": "ok"},
    ]
    assert render(words, turns) == f"### System\nBe a dog.\n### User\nsit\n### Assistant\nok{words.eos_token}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "which is no readable file"),
        ("{% for m in %}", "cannot be used"),
        ("hello", "does not write what messages say"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(text, says, bare, tmp_path):
    if text is not None:
        (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_tokenizer(bare, str(tmp_path / "t.jinja"))


def test_a_bases_own_template_that_cannot_be_read_is_named():
    words = chat_tokenizer()
    words.chat_template = "{% for m in %}"
    with pytest.raises(DataError, match="the chat template of the tokenizer cannot be read"):
        render_prompt(words, [{"role": "user", "content": "a"}])

"""Ollama's Modelfile: its template writes what the tokenizer's own does, read back by a small reader of Go's templates."""

from __future__ import annotations

import json
import re

import pytest
from jinja2 import Environment

import edges
from chatbase import CHATML
from shadowpeft.chat_template import render
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import modelfile, verify

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are small.<|im_end|>\n{% endif %}" + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>\n\n{{ m['content'] | trim }}<|endoftext|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
THINKING = CHATML.replace(
    "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif"
)
TEMPLATES = {"chatml": CHATML, "default system": DEFAULT_SYSTEM, "headers and bos": HEADERS, "thinking": THINKING}
USER, ANSWER, SECOND = (
    {"role": role, "content": text}
    for role, text in (("user", "Sit down, please"), ("assistant", "[Sit()] the dog sits"), ("user", "and\nnow?"))
)
SYSTEM = {"role": "system", "content": "You are a dog."}
CHATS = {
    "one turn": [USER],
    "a system message": [SYSTEM, USER],
    "two turns": [USER, ANSWER, SECOND],
    "two turns and a system message": [SYSTEM, USER, ANSWER, SECOND],
}


def as_go_would(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template writes, for the few actions that a Modelfile of ours has; another one fails."""
    actions = {
        "range $i, $m := .Messages": "{% for m in messages %}",
        'if and (eq $i 0) (ne .Role "system")': "{% if loop.first and m.role != 'system' %}",
        'if eq .Role "system"': "{% if m.role == 'system' %}",
        'else if eq .Role "user"': "{% elif m.role == 'user' %}",
        'else if eq .Role "assistant"': "{% elif m.role == 'assistant' %}",
        ".Content": "{{ m.content }}",
    }
    opened: list[str] = []
    parts = []
    for text, action in re.findall(r"(.*?)(?:\{\{ (.+?) \}\}|$)", template, re.DOTALL):
        parts.append(text)
        if action == "end":
            parts.append({"range": "{% endfor %}", "if": "{% endif %}"}[opened.pop()])
        elif action:
            opened += [action.split()[0]] if action.split()[0] in ("range", "if") else []
            parts.append(actions[action])
    assert opened == []
    return Environment(keep_trailing_newline=True).from_string("".join(parts)).render(messages=messages)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_writes_the_tokenizers_prompt(name, chat):
    bos = name == "headers and bos"
    tokenizer = edges.tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATES[name]
    found = modelfile.pieces(tokenizer)
    expected = render(tokenizer, CHATS[chat], add_generation_prompt=True)
    if bos:  # which llama.cpp puts there
        assert expected.startswith(tokenizer.bos_token)
        expected = expected.removeprefix(tokenizer.bos_token)
    assert found.text(CHATS[chat]) == expected
    assert as_go_would(modelfile.go_template(found), CHATS[chat]) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        ("{{ messages[0]['role'] }}: {{ messages[-1]['content'] }}", "cannot be taken apart"),
        (CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ loop.index }}"), "more than a text|taken apart"),
        ("{{ '{{' }}" + CHATML, "more than a text"),
    ],
)
def test_what_a_modelfile_cannot_say_is_refused(template, says):
    tokenizer = edges.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UnsupportedModelError, match=says):
        modelfile.pieces(tokenizer)


def test_the_file_beside_the_gguf(tmp_path):
    path = modelfile.write(tmp_path / "edge.gguf", edges.tokenizer(), ["<|endoftext|>", "<|im_end|>"])
    text = path.read_text(encoding="utf-8")
    assert path.name == "edge.Modelfile"
    assert text.startswith('FROM ./edge.gguf\nTEMPLATE """')
    assert text.endswith(
        '"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\n'
    )
    (template,) = re.findall(r'TEMPLATE """(.*?)"""', text, re.DOTALL)
    assert as_go_would(template, [USER]) == render(edges.tokenizer(), [USER], add_generation_prompt=True)


def test_another_modelfile_is_not_written_over(tmp_path, monkeypatch, capsys):
    from commands import call

    edges.model().save_pretrained(tmp_path / "edge")
    edges.tokenizer().save_pretrained(tmp_path / "edge")
    own, file = tmp_path / "robot.Modelfile", tmp_path / "robot.gguf"
    own.write_text("FROM ./robot.gguf\nSYSTEM mine\n")
    arguments = ("export", tmp_path / "edge", file, "--to", "gguf", "--no-verify")
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert f"'{own}', where the Modelfile of 'robot.gguf' goes, exists and says something else" in " ".join(err.split())
    assert own.read_text() == "FROM ./robot.gguf\nSYSTEM mine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edge", "robot.Modelfile"]
    own.unlink()
    for _ in range(2):  # its own one of before is no obstacle
        assert call(monkeypatch, capsys, *arguments)[0] == 0
        file.unlink()


def test_export_writes_it_or_says_why_not(tmp_path, monkeypatch, capsys):
    from commands import call

    for name, template in (("a", CHATML), ("b", None)):
        folder = tmp_path / name
        edges.model().save_pretrained(folder)
        tokenizer = edges.tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        arguments = ("export", folder, tmp_path / f"{name}.gguf", "--to", "gguf", "--no-verify", "--json")
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == 0, err
        said = json.loads(out)["export"]["modelfile"]
        if template is None:
            assert said.startswith("none: the tokenizer has no chat template")
        else:
            assert said == "a.Modelfile"
            assert "<|im_end|>" in (tmp_path / "a.Modelfile").read_text(encoding="utf-8")
    assert not (tmp_path / "b.Modelfile").exists()


ODD = 'Say "no" \\ or {{ .Content }}.\nYou are a "dog"'


@pytest.mark.parametrize("message", [SYSTEM["content"], ODD])
def test_the_system_message_of_the_training_is_said(message, tmp_path, monkeypatch, capsys):
    from commands import call

    source = edges.model()
    source.config.system_message = message
    source.save_pretrained(tmp_path / "edge")
    words = edges.tokenizer()
    words.chat_template = DEFAULT_SYSTEM
    words.save_pretrained(tmp_path / "edge")
    file = tmp_path / "edge.gguf"
    code, out, err = call(monkeypatch, capsys, "export", tmp_path / "edge", file, "--to", "gguf", "--dtype", "f32", "--json")
    assert code == 0, err
    assert json.loads(out)["export"]["modelfile"] == "edge.Modelfile"
    text = (tmp_path / "edge.Modelfile").read_text(encoding="utf-8")
    template, said = re.fullmatch(
        r'FROM .*?\nTEMPLATE """(.*?)"""\nSYSTEM """(.*?)"""\nPARAMETER .*', text, re.DOTALL
    ).groups()
    assert said == message
    chat = [{"role": "system", "content": said}, USER]  # which is what Ollama makes of a chat that brings none
    expected = render(words, [{"role": "system", "content": message}, USER], add_generation_prompt=True)
    assert as_go_would(template, chat) == expected
    assert "You are small." not in expected


def test_a_system_message_is_written_as_the_template_writes_it():
    words = edges.tokenizer(bos=True)
    words.chat_template = HEADERS  # which trims
    found = modelfile.pieces(words)
    assert modelfile.system_line(words, found, "You are a dog.\n") == 'SYSTEM """You are a dog."""\n'
    words = edges.tokenizer()  # whose template does not
    assert modelfile.system_line(words, modelfile.pieces(words), "a dog\n") == 'SYSTEM """a dog\n"""\n'
    for none in (None, ""):
        assert modelfile.system_line(words, modelfile.pieces(words), none) == ""


@pytest.mark.parametrize(
    ("template", "message"), [(CHATML, 'Say """no""".'), (CHATML.replace("m['content']", "m['content'] | lower"), "A Dog")]
)
def test_a_system_message_that_a_modelfile_cannot_say_is_refused(template, message, tmp_path):
    words = edges.tokenizer()
    words.chat_template = CHATML
    found = modelfile.pieces(words)
    words.chat_template = template
    with pytest.raises(UnsupportedModelError, match=r"trained with the system message .*which a Modelfile does not express"):
        modelfile.system_line(words, found, message)


def test_the_comparison_asks_with_the_system_message():
    words = edges.tokenizer()
    ids = verify.encode_prompts(words, "Sit", SYSTEM["content"])
    assert words.decode(ids) == render(words, [SYSTEM, {"role": "user", "content": "Sit"}], add_generation_prompt=True)
    plain = verify.encode_prompts(words, "Sit")
    assert words.decode(plain) == render(words, [{"role": "user", "content": "Sit"}], add_generation_prompt=True)
    asked = []

    def target(input_ids, attention_mask):
        asked.append(input_ids[0].tolist())
        return source(input_ids=input_ids)

    source = edges.model()
    verify.compare(source, target, words, prompts=("Sit",), new_tokens=2, system=SYSTEM["content"])
    assert asked[0][: len(ids)] == ids

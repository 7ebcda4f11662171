"""``shadowpeft eval --data FILE --skills tools.json``: requests of one's own, judged by the calls of each answer."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import calling_tokenizer, save_sitting_adapter, write_rows
from commands import call
from shadowpeft import vote
from shadowpeft.constrained import Chosen
from shadowpeft.data.call_form import template_form
from shadowpeft.data.tasks.calling import INVALID, Calling
from shadowpeft.data.tools import tools_of
from shadowpeft.errors import DataError

pytest.importorskip("jsonschema_rs")

WALK = {
    "type": "object",
    "properties": {"direction": {"enum": ["left", "right"]}, "steps": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["direction"],
}
DEFINITIONS = [
    {"type": "function", "function": {"name": "Walk", "description": "Go.", "parameters": WALK}},
    {"type": "function", "function": {"name": "Sit", "parameters": {"type": "object", "properties": {}}}},
]
TOOLS = tools_of(DEFINITIONS)


def calling(prompt, *calls, words="", **more):
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    answer = {"role": "assistant", "content": words, **({"tool_calls": made} if made else {})}
    return {"messages": [{"role": "user", "content": prompt}, answer], **more}


ROWS = [
    calling("two steps left", ("Walk", {"steps": 2, "direction": "left"})),
    calling("sit down", ("Sit", {}), words="With pleasure."),
    calling("go right, then sit", ("Walk", {"direction": "right"}), ("Sit", {})),
    calling("who was Ada Lovelace?", words="She wrote programs.", shadow_response="[REMOTE]"),
    calling("a long way", ("Walk", {"direction": "left", "steps": 9}), path="base"),
]


def task_of(tmp_path, rows=ROWS, **more):
    return Calling(write_rows(tmp_path / "rows.jsonl", rows), TOOLS, **more)


def test_the_right_calls_are_those_of_each_path(tmp_path):
    task = task_of(tmp_path)
    examples = task.load("test")
    first = 'Walk(direction="left", steps=2)'
    assert [e.gold for e in task.for_path(examples, "base")] == [
        first,
        "Sit()",
        'Walk(direction="right"), Sit()',
        "REMOTE",
        'Walk(direction="left", steps=9)',
    ]
    assert [e.gold for e in task.for_path(examples, "shadow")][-2:] == ["REMOTE", "REMOTE"]
    assert task.chat(examples[0]) == [{"role": "user", "content": "two steps left"}]


def test_names_arguments_and_order_are_judged_apart(tmp_path):
    task = task_of(tmp_path)
    examples = task.for_path(task.load("test"), "base")
    said = [
        '[Walk(direction="left", steps=3)]',  # one argument of two
        "[Sit()] Gladly.",
        '[Sit(), Walk(direction="right")]',  # the other order
        '[Walk(direction="up")]',  # refused by its schema
        "I would rather not.",
    ]
    predictions = [task.parse(text) for text in said]
    assert predictions == ['Walk(direction="left", steps=3)', "Sit()", 'Sit(), Walk(direction="right")', INVALID, None]
    assert task.score(predictions, examples) == {
        "score": pytest.approx(1 / 5),
        "calls": pytest.approx(1 / 4),
        "names": pytest.approx(2 / 4),
        "arguments": pytest.approx(1 / 5),
        "calls_handed_on": pytest.approx(1 / 4),
        "no_call": 0.0,  # an invalid call is no answer in words
        "invalid": pytest.approx(1 / 5),
    }


def test_what_is_right_scores_one_and_words_are_right_where_no_call_is(tmp_path):
    task = task_of(tmp_path)
    examples = task.for_path(task.load("test"), "base")
    predictions = [None if e.gold == "REMOTE" else task.parse(f"[{e.gold}] ok") for e in examples]
    scores = task.score(predictions, examples)
    assert (scores["score"], scores["calls"], scores["arguments"], scores["no_call"]) == (1.0, 1.0, 1.0, 1.0)


def test_calls_of_a_chat_template_are_read_and_the_template_is_told_of_the_tools(tmp_path):
    form = template_form(calling_tokenizer())
    assert form is not None
    task = task_of(tmp_path, form=form)
    (example, *_) = task.for_path(task.load("test"), "base")
    assert task.told == {"tools": DEFINITIONS}
    text = '<call>{"name": "Walk", "arguments": {"direction": "left", "steps": 2}}</call>'
    assert task.per_example(task.parse(text), example) == 1.0
    assert task.parse("<call>{}</call>") == INVALID
    assert task.parse("No.") is None
    assert task_of(tmp_path).told == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (calling("fly", ("Fly", {})), "rows.jsonl, line 1: message 2 calls 'Fly', which is none of the tools Walk, Sit"),
        (calling("go", ("Walk", {"direction": "up"})), "rows.jsonl, line 1: message 2 calls Walk with arguments that its"),
    ],
)
def test_rows_that_call_something_else_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        task_of(tmp_path, [row])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter both halves of which say ``[Sit()]``, rows, and the tools."""
    folder = tmp_path_factory.mktemp("made")
    save_sitting_adapter(folder)
    (folder / "tools.json").write_text(json.dumps(DEFINITIONS))
    return folder, write_rows(folder / "rows.jsonl", ROWS)


def evaluated(monkeypatch, capsys, made, *more):
    folder, rows = made
    return call(
        monkeypatch, capsys, "eval", folder / "adapter", "--data", rows, "--skills", folder / "tools.json", *more
    )


def test_both_halves_are_also_held_to_valid_calls(made, monkeypatch, capsys):
    pytest.importorskip("llguidance")
    code, out, err = evaluated(monkeypatch, capsys, made, "--mode", "detached", "--mode", "attached", "--json")
    assert code == 0, err
    for mode, expected in (("detached", (1 / 5, 1 / 3)), ("attached", (1 / 5, 1 / 4))):
        record = json.loads(out)["modes"][mode]
        for scores in (record["scores"], record["constrained"]["scores"]):
            assert (scores["score"], scores["calls"]) == pytest.approx(expected)
            assert scores["invalid"] == 0.0


def test_the_table_shows_the_parts(made, monkeypatch, capsys):
    pytest.importorskip("llguidance")
    code, out, err = evaluated(monkeypatch, capsys, made, "--mode", "detached", "--limit", "3")
    assert code == 0, err
    for text in ("requests that call, right", "all names right", "invalid calls"):
        assert text in " ".join(out.split())


def test_a_lora_is_judged_by_the_same_rows(made, tmp_path, monkeypatch, capsys):
    base = str(made[0] / "base")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    lora.save_pretrained(tmp_path / "lora")
    arguments = ("--data", made[1], "--skills", made[0] / "tools.json", "--mode", "lora", "--json")
    code, out, err = call(monkeypatch, capsys, "eval", tmp_path / "lora", *arguments)
    assert code == 0, err
    record = json.loads(out)["modes"]["lora"]
    assert (record["scores"]["score"], record["scores"]["calls"]) == pytest.approx((1 / 5, 1 / 4))
    assert record["settings"]["calls"] == "compact"


def test_the_shadow_votes_on_whether_there_is_a_call(made, monkeypatch, capsys):
    pytest.importorskip("llguidance")
    adapter = made[0] / "adapter"
    chances = {"Walk": 0.0, "Sit": 0.0, "REMOTE": 1.0}

    def choose(model, tokenizer, chats, trie, **_):
        assert trie.actions == ("Walk", "Sit", "REMOTE")
        return [Chosen("REMOTE", 1.0, dict(chances))] * len(chats)

    monkeypatch.setattr(vote, "choose", choose)
    flat(monkeypatch)
    for remote, expected in ((1.0, (0.0, 1.0)), (0.0, (1.0, 0.0))):
        chances["REMOTE"] = remote
        code, out, err = evaluated(monkeypatch, capsys, made, "--mode", "attached", "--vote", "--json")
        assert code == 0, err
        record = json.loads(out)["modes"]["attached"]
        assert (record["scores"]["no_call"], 1.0 - record["scores"]["calls_handed_on"]) == (expected[1], expected[0])
        assert record["settings"]["vote"] is True
        assert record["scores"]["invalid"] == 0.0
        assert "constrained" not in record  # a vote holds the answers already
        code, out, err = call(
            monkeypatch, capsys, "generate", adapter, "sit", "--skills", made[0] / "tools.json", "--vote", "--json"
        )
        assert code == 0, err
        assert bool(json.loads(out)["calls"]) == (remote == 0.0)


def flat(monkeypatch):
    """Models that are unsure of everything, so that the vote decides."""
    load = shadowpeft.load

    def loaded(*given):
        model = load(*given)
        with torch.no_grad():
            model.get_base_model().lm_head.weight.mul_(1e-3)
        return model

    monkeypatch.setattr(shadowpeft, "load", loaded)

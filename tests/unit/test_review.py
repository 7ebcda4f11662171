"""What ``data check`` says of rows that can each be learnt: copies, contradictions, actions and how they are spelt."""

import json

import pytest

from chatbase import save_base, write_rows
from commands import call
from shadowpeft.data import chat, class_rows
from shadowpeft.data.review import Review, _alike

ON, OFF = ({"prompt": "light", "response": f"[{name}()] ok"} for name in ("LightOn", "LightOff"))


def reviewed(*rows, check=chat.check_row):
    review = Review()
    for number, row in enumerate(rows, 1):
        review.add(check(row, f"row {number}"), f"row {number}")
    return review


def test_copies_and_contradictions_name_both_rows():
    found = reviewed(ON, OFF, ON, {**ON, "prompt": " light \n"}, {**ON, "prompt": "lamp"}, OFF)
    said = "has the prompt of row 1 but another answer, '[LightOff()] ok' and not '[LightOn()] ok'"
    assert found.contradicting == [f"row 2 {said}", f"row 6 {said}"]
    assert found.repeated == ["row 3 repeats row 1", "row 4 repeats row 1"]


@pytest.mark.parametrize(
    ("rows", "repeated", "contradicting"),
    [
        ([{**ON, "path": "base"}, {**OFF, "path": "shadow"}], 0, 0),  # each path has its own answer
        ([{**ON, "path": "base"}, ON], 0, 0),  # the shadow learns it anew
        ([ON, {**ON, "path": "shadow"}], 1, 0),
        ([ON, {**OFF, "path": "shadow"}], 0, 1),
        ([{**ON, "shadow_response": "[LightOn()]"}, {**ON, "shadow_response": "[LightOff()]"}], 0, 1),
        ([{**ON, "tools": [{"name": "a"}]}, {**OFF, "tools": [{"name": "b"}]}], 0, 0),
    ],
)
def test_a_row_is_compared_with_what_its_paths_have_learnt(rows, repeated, contradicting):
    found = reviewed(*rows)
    assert (len(found.repeated), len(found.contradicting)) == (repeated, contradicting)


def test_calls_are_counted_once_for_each_row_and_what_is_none_is_not():
    calls = [{"function": {"name": "Sit", "arguments": {}}}, {"name": "Sit"}, {"function": "Fly"}]
    asked, said = {"role": "user", "content": "sit"}, {"role": "assistant", "tool_calls": calls}
    assert reviewed({"messages": [asked, said]}).actions == {"Sit": 1}


def test_texts_with_two_labels_contradict_themselves():
    found = reviewed(*({"text": "a", "label": label} for label in "xyx"), check=class_rows.check_row)
    assert found.contradicting == ["row 2 has the prompt of row 1 but another answer, 'y' and not 'x'"]
    assert found.repeated == ["row 3 repeats row 1"]


@pytest.mark.parametrize(
    ("name", "other", "alike"),
    [
        ("LigthOn", "LightOn", True),
        ("Lighton", "LightOn", True),
        ("light_on", "LightOn", True),
        ("LghtOn", "LightOn", True),
        ("Sti", "Sit", True),
        ("LightOff", "LightOn", False),
        ("LampOff", "LampOn", False),
        ("TurnLeft", "TurnRight", False),
        ("Mode2", "Mode1", False),
        ("Sit", "Sit", False),
    ],
)
def test_a_slip_of_the_hand_is_told_from_another_name(name, other, alike):
    assert _alike(name, other) is alike


def test_a_rare_name_close_to_a_frequent_one_is_asked_about():
    def row(name, n):
        return {"prompt": f"{name} {n}", "response": f"[{name}()] ok"}

    many = [row("LightOn", n) for n in range(10)]
    found = reviewed(*many, row("LigthOn", 1), {"prompt": "who?", "response": "[REMOTE]"}, {"prompt": "hi", "response": "ho"})
    assert found.actions == {"LightOn": 10, "LigthOn": 1, "REMOTE": 1}
    assert found.misspelt() == ["row 11 has the action LigthOn; did you mean LightOn? (10 rows)"]
    assert reviewed(*many, *(row("LigthOn", n) for n in range(3))).misspelt() == []  # too many to be slips


def test_data_check_warns_and_ends_well(monkeypatch, capsys, tmp_path):
    rows = [{"prompt": f"on {n}", "response": "[LightOn()] ok"} for n in range(12)]
    rows += [{"prompt": "on 3", "response": "[LigthOn()] ok"}, rows[4], {"prompt": "go", "response": '[Go(to="hall")]'}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    code, out, err = call(monkeypatch, capsys, "data", "check", file, "--show", 0)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    assert f"{file}, line 13 has the prompt of {file}, line 4 but another answer" in words
    assert f"{file}, line 14 repeats {file}, line 5" in words
    assert "has the action LigthOn; did you mean LightOn? (12 rows)" in words or "(13 rows)" in words
    assert "rows that call with arguments, which nothing checks: 1; name the tools (--tools FILE, or data.tools)" in words
    assert "│ LightOn │ 13 │" in words
    code, out, _ = call(monkeypatch, capsys, "data", "check", file, "--json")
    found = json.loads(out)
    assert (code, found["actions"]) == (0, {"LightOn": 13, "LigthOn": 1, "Go": 1})
    assert [found[key]["rows"] for key in ("contradicting", "repeated", "misspelt_actions", "unchecked_calls")] == [1] * 4
    tools = tmp_path / "tools.json"
    text = {"type": "object", "properties": {"to": {"type": "string"}}}
    tools.write_text(json.dumps([{"name": "LightOn"}, {"name": "Sit"}, {"name": "Go", "parameters": text}]))
    code, out, _ = call(monkeypatch, capsys, "data", "check", file, "--json", "--tools", tools)
    found = json.loads(out)
    assert (code, found["refused"]["rows"], found["unchecked_calls"]["rows"]) == (2, 1, 0)  # no such tool
    assert found["actions"] == {"LightOn": 13, "Go": 1, "Sit": 0}


def test_validation_rows_are_compared_with_those_of_training(monkeypatch, capsys, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    write_rows(tmp_path / "test.jsonl", [{"prompt": "c", "response": "d"}, {"prompt": "a", "response": "x"}])
    data = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "test.jsonl")}
    (tmp_path / "run.yaml").write_text(json.dumps({"base": save_base(tmp_path / "base"), "data": data}))
    code, out, _ = call(monkeypatch, capsys, "data", "check", tmp_path / "run.yaml", "--json")
    found = json.loads(out)["validation"]
    assert code == 0
    assert found["repeated"]["which"] == [f"{tmp_path / 'test.jsonl'}, line 1 repeats {tmp_path / 'train.jsonl'}, line 2"]
    assert found["contradicting"]["rows"] == 1


def test_calls_of_tools_that_are_not_named_say_once_what_to_give(monkeypatch, capsys, tmp_path):
    def row(n):
        called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "Sit", "arguments": {}}}]}
        return {"messages": [{"role": "user", "content": f"sit {n}"}, called]}

    file, tools = write_rows(tmp_path / "calls.jsonl", [*map(row, range(6)), {"prompt": ""}]), tmp_path / "tools.json"
    code, out, err = call(monkeypatch, capsys, "data", "check", file, "--show", 0)
    assert (code, "7 of 7 rows are refused" in err) == (2, True)
    assert out.count("name the tools in a file (data.tools; data check: --tools FILE)") == 1
    assert f"... as 5 more rows: {file}, line 2, {file}, line 3, {file}, line 4, ..." in out
    assert f"{file}, line 7 has the key 'prompt'" in out
    write_rows(tmp_path / "calls.jsonl", map(row, range(6)))
    tools.write_text('["Sit"]')
    code, out, _ = call(monkeypatch, capsys, "data", "check", file, "--tools", tools, "--json")
    assert (code, json.loads(out)["actions"]) == (0, {"Sit": 6})


def test_a_packaged_set_that_gives_rows_several_times_has_no_copies(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "data", "check", "robot", "--json")
    found = json.loads(out)
    assert (code, found["actions"]["Sit"]) == (0, 100)
    assert all(found[key]["rows"] == 0 for key in ("contradicting", "repeated", "misspelt_actions", "unchecked_calls"))

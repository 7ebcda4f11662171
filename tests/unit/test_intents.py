"""Rows to calibrate on: what the device would learn of a row is what it has to answer."""

import json

import pytest

from shadowpeft.apps.intents import distinct, read_intents
from shadowpeft.data.tools import read_tools, tools_of
from shadowpeft.errors import ConfigError, DataError

WALK = {"name": "Walk", "parameters": {"type": "object", "properties": {"metres": {"type": "integer"}}, "required": ["metres"]}}
SIT = {"name": "Sit", "parameters": {"type": "object", "properties": {}}}
TOOLS = tools_of([WALK, SIT])
CALL = [{"id": "1", "type": "function", "function": {"name": "Walk", "arguments": '{"metres": 2}'}}]
USER = {"role": "user", "content": "walk"}


def read(tmp_path, *rows, skills=None, tools=None):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["skill"] for row in read_intents(str(file), "fit", None, skills, tools)]


def test_a_row_is_judged_by_what_the_device_learns_of_it(tmp_path):
    answer = {"role": "assistant", "content": "Ok.", "tool_calls": CALL}
    rows = [
        {"messages": [USER, answer]},
        {"messages": [USER, answer], "shadow_response": "[REMOTE]"},
        {"messages": [USER, answer], "shadow_response": "[Sit()]"},
        {"messages": [USER, answer], "path": "base"},
        {"prompt": "walk", "response": "[Walk(metres=2.0), Sit()] Ok."},
        {"prompt": "why?", "response": "Because."},
    ]
    expected = ["Walk(metres=2)", "REMOTE", "Sit()", "REMOTE", "Walk(metres=2), Sit()", "REMOTE"]
    assert read(tmp_path, *rows, tools=TOOLS) == expected


def test_text_that_is_no_valid_call_is_not_taken_for_an_open_request(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl, line 1 begins with '\[Walk\(metres=far\)\]', which is no valid call"):
        read(tmp_path, {"prompt": "walk", "response": "[Walk(metres=far)]"}, tools=TOOLS)


def test_rows_to_train_on_calibrate_actions_without_arguments_too(tmp_path):
    sit = [{"function": {"name": "Sit", "arguments": "{}"}}]
    rows = [
        {"prompt": "sit", "skill": "Sit"},
        {"prompt": "sit", "response": "[Sit()] Ok."},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": sit}]},
        {"prompt": "why?", "response": "[REMOTE]", "path": "shadow"},
    ]
    assert read(tmp_path, *rows, skills=("Sit", "turn-over")) == ["Sit", "Sit", "Sit", "REMOTE"]
    with pytest.raises(DataError, match="the skill 'Fly', which is none of the 1 known ones"):
        read(tmp_path, {"prompt": "fly", "response": "[Fly()]"}, skills=("Sit",))


def test_a_file_of_tools_without_arguments_has_names_that_skills_may_have(tmp_path):
    file = tmp_path / "actions.json"
    file.write_text(json.dumps([{"name": "turn-over"}, SIT]), encoding="utf-8")
    assert read_tools(file).names == ("turn-over", "Sit")
    file.write_text(json.dumps([{"name": "x" * 37}]), encoding="utf-8")
    with pytest.raises(ConfigError, match="of 37 characters, but 36 are allowed"):
        read_tools(file)
    with pytest.raises(ConfigError, match=f"the actions file '{tmp_path / 'none'}' cannot be read"):
        read_tools(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "rows", "open_"), [("robot", 1040, 530), ("robot_large", 1040, 530), ("robot_oos", 1365, 855)]
)
def test_packaged_requests_and_how_many_no_skill_answers(name, rows, open_):
    found = read_intents(name, "fit", None)
    assert (len(found), sum(row["skill"] == "REMOTE" for row in found)) == (rows, open_)
    assert found[0]["where"].startswith(f"{name}, row calibration_normal-")
    with pytest.raises(ConfigError, match=f"'{name}' has the packaged skills but --skills names others"):
        read_intents(name, "fit", None, ("Sit",))


def test_copies_that_contradict_each_other_are_refused(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("prompt,skill\nsit,Sit\nup,StandUp\n sit ,Sit\nup,Sit\nup,REMOTE\n")
    rows = read_intents(str(file), "fit", None)
    problem = r"line 3 and .*line 5 have the same request \('up'\) but other right answers, StandUp and Sit, and 1 more rows"
    with pytest.raises(DataError, match=problem):
        distinct(rows)
    assert [(row["prompt"], row["times"]) for row in distinct(rows[:3])] == [("sit", 2), ("up", 1)]


def test_tables_are_read_too(tmp_path):
    file = tmp_path / "held-out.csv"
    file.write_text("prompt,skill,response\nsit down,Sit,\nwhy,REMOTE,\nup,,[StandUp()] Up!\n")
    assert [(row["prompt"], row["skill"]) for row in read_intents(str(file), "fit", None)] == [
        ("sit down", "Sit"),
        ("why", "REMOTE"),
        ("up", "StandUp"),
    ]
    (tmp_path / "rows.json").write_text('[{"prompt": "sit", "skill": "Sit"}, {"prompt": "sit"}]')
    with pytest.raises(DataError, match=r"rows.json, row 2 must have the strings 'prompt' and 'skill'"):
        read_intents(str(tmp_path / "rows.json"), "fit", None)

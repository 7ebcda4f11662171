"""Skills of one's own: the parser that they make, and the files that hold them."""

import random

import pytest

from shadowpeft.data import robot
from shadowpeft.data.actions import LONGEST_TAG, REMOTE, almost_action, only_action, parser, read_skills
from shadowpeft.data.chat_rows import check_row
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.train.rows import with_action

LAMP = ("LampOn", "LampOff", "开灯")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("[LampOn()] It is on.", "LampOn"),
        (" \n[开灯()]", "开灯"),
        ("[LampOnce()]", None),
        ("[Lamp()]", None),
        ("[lampon()]", None),
        ("[Sit()] sits", None),  # a skill of the packaged set
        ("[REMOTE] Asking.", REMOTE),
        ("[REMOTE()]", None),
        ("[LampOn]", None),
        ("[LampOn(kitchen)]", None),
        ("[LampOn(", None),
        ("[[LampOn()]]", None),
        ("Yes. [LampOn()]", None),
        ("", None),
    ],
)
def test_an_answer_starts_with_a_known_action_or_has_none(text, action):
    assert parser(LAMP)(text) == action


def test_the_packaged_parser_is_the_one_of_the_packaged_skills():
    parse = parser(robot.SKILLS)
    rng = random.Random(0)
    heads = ["[", "[[", " [", "", "x["]
    tails = ["()]", "]", "(1)]", "()", "() ]"]
    for name in [*robot.SKILLS, REMOTE, "LampOn", "", "Sit Down"]:
        for _ in range(5):
            text = rng.choice(heads) + name + rng.choice(tails) + " and so on"
            assert robot.parse_action(text) == parse(text)
        known = name in robot.SKILLS
        assert robot.parse_action(f"[{name}()] yes") == (name if known else None)


@pytest.mark.parametrize(
    "content",
    [
        "LampOn\nLampOff\n开灯\n",
        "\ufeffLampOn\r\n\r\n  LampOff  \r\n开灯",
        '["LampOn", "LampOff", "开灯"]',
        '\n [\n"LampOn",\n"LampOff",\n"\\u5f00\\u706f"\n]\n',
    ],
)
@pytest.mark.parametrize("name", ["skills.txt", "skills.json"])
def test_lines_and_lists(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_skills(tmp_path / name) == LAMP


REFUSED = [
    ("", "has no skill"),
    (" \n\n", "has no skill"),
    ("[]", "has no skill"),
    ("LampOn\nLamp Off", "'Lamp Off', which is no identifier"),
    ("LampOn()", "'LampOn()', which is no identifier"),
    ("[LampOn()]", "is not valid JSON"),
    ('{"skills": ["LampOn"]}', "is a JSON dict but must be a list"),
    ('["LampOn", 5]', "has 5, which is no identifier"),
    ('["LampOn", ["LampOff"]]', "no identifier"),
    ('["LampOn"', "is not valid JSON"),
    ("LampOn\nLampOff\nLampOn", "'LampOn' twice"),
    ('["LampOn", "LampOn"]', "'LampOn' twice"),
    ("LampOn\nREMOTE", "has REMOTE, which always means handing on"),
    ("x" * 37, "of 37 characters, but 36 are allowed"),
    ("1" * 5000, "no identifier"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_files_that_are_refused_in_one_sentence(tmp_path, content, message):
    file = tmp_path / "skills.txt"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_skills(file)
    told = str(caught.value)
    assert message in told
    assert "skills.txt" in told
    assert len(told) - len(str(file)) < 200
    assert "\n" not in told


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt' cannot be read \(No such file"):
        read_skills(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("Lämpchen".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_skills(tmp_path / "latin.txt")


def test_the_longest_name_is_still_read_before_an_answer_is_given_up():
    from shadowpeft.serve.router import settled

    name = "x" * 36
    parse, tag = parser([name]), f"[{name}()]"
    assert len(tag) == LONGEST_TAG
    assert parse(tag) == name
    assert [settled([" ", tag[:n]], parse) for n in range(len(tag) + 1)] == [False] * len(tag) + [True]


def test_skills_are_refused_wherever_they_come_from():
    with pytest.raises(ConfigError, match="skills has 'Lamp On'"):
        parser(["Lamp On"])
    with pytest.raises(ConfigError, match="no skill"):
        parser([])
    assert parser(iter(LAMP))("[LampOff()]") == "LampOff"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("[Sit()] Down I go.", "[Sit()]"),
        (" [Own()]", "[Own()]"),
        ("[REMOTE] I will ask.", "[REMOTE]"),
        ("Air scatters blue light.", "[REMOTE]"),
        ("", "[REMOTE]"),
        ("[Sit(2)] Down", "[REMOTE]"),
    ],
)
def test_only_the_action_of_an_answer(text: str, action: str) -> None:
    assert only_action(text) == action


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[Light On()] ok", "[Light On()]"),
        ("[LightOn] ok", "[LightOn]"),
        ("Sure. [LightOn()]", "[LightOn()]"),
        ("Sure,\n[walk(distance=2)]", "[walk(distance=2)]"),
        ("[LightOn(room=1)]", "[LightOn(room=1)]"),
        ("I cannot. [REMOTE]", "[REMOTE]"),
        ("[REMOTE()] ok", "[REMOTE()]"),
        ("[LightOn()] ok", None),
        ("[REMOTE]", None),
        ("Paris.", None),
        ("", None),
        ("[1] says so", None),
        ("[The manual](manual.html) says so", None),
        ("Call f(x) with [a list]", None),
        ("print() writes a line", None),
        ("[Your Name]\n[Your street]", None),
    ],
)
def test_what_almost_is_an_action(text, found):
    assert almost_action(text) == found


def test_a_row_that_almost_has_an_action_is_refused():
    row = check_row({"prompt": "light", "response": "[Light On()] ok"}, "rows.jsonl, line 3")
    with pytest.raises(DataError, match=r"rows.jsonl, line 3 has an answer with '\[Light On\(\)\]', which is no"):
        with_action(row)
    row = check_row({"prompt": "light", "response": "[LightOn()] ok", "path": "shadow"}, "here")
    assert with_action(row)["response"] == "[LightOn()]"
    row = check_row({"prompt": "light", "response": "Sure. [LightOn()]", "path": "base"}, "here")
    assert with_action(row)["response"] == "Sure. [LightOn()]"

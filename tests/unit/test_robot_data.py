"""The robot-intent data set: sizes, determinism, disjointness, and that its rows are well-formed text."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from scripts.robot_set import __main__ as command
from scripts.robot_set import phrasing, seeds
from scripts.robot_set.compose import build

from shadowpeft.data import robot
from shadowpeft.data.robot import MEANINGS

SIZES = {  # split: (English, Chinese), as in Appendix F of the paper; the other ones are ours
    "train_normal": (2074, 1326),
    "train_remote_base": (541, 459),
    "train_remote_shadow": (21, 26),
    "validation_normal": (120, 84),
    "validation_remote": (33, 27),
    "test_normal": (170, 136),
    "test_remote": (10, 8),
    "test_remote_large": (180, 140),
    "train_oos": (420, 330),
    "validation_oos": (66, 52),
    "test_oos": (117, 79),
    "calibration_normal": (283, 227),
    "calibration_remote": (300, 230),
    "calibration_oos": (195, 130),
    "more_normal": (2720, 2040),
    "more_remote": (586, 586),
}
NORMAL = [split for split in SIZES if split.endswith("_normal")]
REMOTE = [split for split in SIZES if split not in NORMAL]
KEYS = ["id", "split", "lang", "kind", "skill", "family", "style", "prompt", "response"]
MARKS = ",.?!;:\uff0c\u3002\uff1f\uff01\uff1b\uff1a"
HAN = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def data() -> dict[str, list[dict[str, str]]]:
    return {split: robot.load(split) for split in SIZES}


@pytest.fixture(scope="module")
def rows(data: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return [row for part in data.values() for row in part]


def digest(data: dict[str, list[dict[str, str]]]) -> str:
    return hashlib.sha256(json.dumps(data, ensure_ascii=False).encode()).hexdigest()


def fold(text: str) -> str:
    """Letters, digits and Han characters only, lower-case."""
    return "".join(ch for ch in text.lower() if ch.isalnum())


def part_of(split: str) -> str:
    """The part a family belongs to: the training splits share one."""
    return "train" if split.startswith("train") else split


def test_sizes(data: dict[str, list[dict[str, str]]]) -> None:
    for split, part in data.items():
        assert tuple(sum(row["lang"] == lang for row in part) for lang in ("en", "zh")) == SIZES[split]
    assert list(data) == list(SIZES)
    assert {s: (i["en"], i["zh"], i["size"]) for s, i in robot.SPLITS.items()} == {
        s: (en, zh, en + zh) for s, (en, zh) in SIZES.items()
    }


def test_rows_have_the_documented_keys_and_unique_ids(data: dict[str, list[dict[str, str]]]) -> None:
    for split, part in data.items():
        assert [row["id"] for row in part] == [f"{split}-{i:04d}" for i in range(len(part))]
        for row in part:
            assert list(row) == KEYS
            assert all(row.values()), row
            assert row["split"] == split
            assert row["kind"] == robot.SPLITS[split]["kind"]


@pytest.fixture(scope="module")
def composed() -> dict[str, list[dict[str, str]]]:
    return build()


def test_the_shipped_rows_are_what_the_seed_files_give(composed: dict[str, list[dict[str, str]]]) -> None:
    assert sorted(path.name for path in robot.ROWS.iterdir()) == sorted(f"{split}.jsonl.gz" for split in SIZES)
    for split, part in composed.items():
        packed = (robot.ROWS / f"{split}.jsonl.gz").read_bytes()
        assert gzip.decompress(packed) == robot.json_lines(part).encode(), "run python -m scripts.robot_set"
        assert packed[4:8] == bytes(4)  # no time of writing


def test_the_command_writes_the_shipped_rows_and_other_seeds_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: dict[str, list[dict[str, str]]]
) -> None:
    monkeypatch.setattr(command, "build", lambda seed: {"train_normal": composed["train_normal"][: 3 - seed]})
    monkeypatch.setattr(sys, "argv", ["robot_set", "--folder", str(tmp_path / "new"), "--seed", "1"])
    command.main()
    content = gzip.decompress((tmp_path / "new" / "train_normal.jsonl.gz").read_bytes()).decode()
    assert content == robot.json_lines(composed["train_normal"][:2])
    monkeypatch.setattr(sys, "argv", ["robot_set", "--seed", "1"])
    with pytest.raises(SystemExit):
        command.main()


def test_a_changed_row_changes_no_later_load() -> None:
    robot.load("test_remote")[0]["prompt"] = "changed"
    assert robot.load("test_remote")[0]["prompt"] != "changed"


def test_same_seed_same_rows_other_seed_other_rows(composed: dict[str, list[dict[str, str]]]) -> None:
    assert digest(build(0)) == digest(composed)
    other = build(1)
    assert digest(other) != digest(composed)
    assert {s: len(p) for s, p in other.items()} == {s: sum(n) for s, n in SIZES.items()}


def test_rows_do_not_depend_on_hash_order(composed: dict[str, list[dict[str, str]]]) -> None:
    code = "import json, sys; from scripts.robot_set.compose import build; sys.stdout.write(json.dumps(build()))"
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert digest(json.loads(done.stdout)) == digest(composed)


def test_skills_and_meanings() -> None:
    assert len(robot.SKILLS) == len(set(robot.SKILLS)) == 34
    card = (Path(robot.__file__).parent / "CARD.md").read_text(encoding="utf-8")
    for skill, meaning in MEANINGS.items():
        assert f"| `{skill}` | {meaning} |" in card


@pytest.mark.parametrize("split", NORMAL)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_skill_as_evenly_as_the_size_permits(
    data: dict[str, list[dict[str, str]]], split: str, lang: str
) -> None:
    counts = Counter(row["skill"] for row in data[split] if row["lang"] == lang)
    assert set(counts) == set(robot.SKILLS)
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(("lang", "least"), [("en", (14, 26, 3, 7, 5)), ("zh", (10, 27, 2, 5, 4))])
def test_enough_families_for_each_skill(lang: str, least: tuple[int, ...]) -> None:
    counts = Counter((family.skill, family.part) for family in seeds.families(lang))
    for skill in robot.SKILLS:
        for part, n in zip(("train", "more", "validation", "calibration", "test"), least, strict=True):
            assert counts[skill, part] >= n, (skill, part)


def test_families_are_in_one_part_only(rows: list[dict[str, str]]) -> None:
    parts: dict[str, set[str]] = {}
    for row in rows:
        parts.setdefault(row["family"], set()).add(part_of(row["split"]))
    assert {family: found for family, found in parts.items() if len(found) > 1} == {}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_core_text_is_in_one_part_and_one_skill_only(lang: str) -> None:
    owners: dict[str, set[tuple[str, str]]] = {}
    for file in ("skills", "oos"):
        for family in seeds.families(lang, file):
            for filling in family.fillings():
                owners.setdefault(fold(filling), set()).add((family.skill, family.part))
    assert {core: found for core, found in owners.items() if len(found) > 1} == {}


@pytest.mark.parametrize(("lang", "least"), [("en", (15, 4, 15, 7)), ("zh", (15, 3, 10, 5))])
def test_what_is_out_of_scope_has_enough_families_of_each_topic(lang: str, least: tuple[int, int, int, int]) -> None:
    counts = Counter((family.skill, family.part) for family in seeds.families(lang, "oos"))
    topics = {topic for topic, _ in counts}
    assert len(topics) == 13
    assert topics == {family.skill for family in seeds.families("en", "oos")}
    assert all(len(set(seeds.replies(lang, "oos")[topic])) >= 4 for topic in topics)
    for topic in topics:
        for part, n in zip(("train", "validation", "calibration", "test"), least, strict=True):
            assert counts[topic, part] >= n, (topic, part)


@pytest.mark.parametrize("part", ["train", "validation", "calibration", "test"])
def test_every_family_out_of_scope_is_asked(data: dict[str, list[dict[str, str]]], part: str) -> None:
    asked = Counter(row["family"] for row in data[f"{part}_oos"])
    assert set(asked) == {f.id for lang in seeds.LANGS for f in seeds.families(lang, "oos") if f.part == part}
    assert max(asked.values()) == (1 if part != "train" else 2)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_question_template_is_in_one_part_only(lang: str) -> None:
    """A template is one family however it is filled, and a single question is its own template."""
    parts: dict[str, set[str]] = {}
    for request in seeds.requests(lang):
        parts.setdefault(fold(request.template), set()).add(part_of(request.split))
    assert {template: found for template, found in parts.items() if len(found) > 1} == {}


def test_a_fact_is_asked_in_one_part_only() -> None:
    """Facts have one name in both languages, so a Chinese test question is no English training one either."""
    parts: dict[str, set[str]] = {}
    for lang in ("en", "zh"):
        for request in seeds.requests(lang):
            parts.setdefault(request.fact, set()).add(part_of(request.split))
    assert {fact: found for fact, found in parts.items() if len(found) > 1} == {}


def test_no_prompt_twice(rows: list[dict[str, str]]) -> None:
    counts = Counter("".join(row["prompt"].lower().split()) for row in rows)
    assert [prompt for prompt, n in counts.items() if n > 1] == []
    counts = Counter(fold(row["prompt"]) for row in rows)  # nor twice with other punctuation
    assert [prompt for prompt, n in counts.items() if n > 1] == []


EN_WRAPPING = (
    "please|pls|could you|can you|can u|would you|will you|kindly|i'd like you to|i want you to|"
    "i need you to|you can|if you could|it would be nice|for me|gonna need you to|let's see you|"
    "lemme see you|show me how you|i'd love to see you|everyone wants to see you|i think you should|"
    "how about|why don't you|i was hoping you could|maybe|now|ok|go ahead and|quick question|quick|yo|"
    "c'mon|come on|alright|hey|will ya|excuse me|i have a question|just curious|a|an|the|some|do|"
    "robot dog|robo|rex|buddy|pup|biscuit|doggo|little guy|scout|pal"
)
ZH_WRAPPING = (
    "小机器人|机器狗|小家伙|小狗|旺财|小白|狗狗|伙计|豆豆|来福|能不能|可不可以|"
    "你是不是该|大家都想看你|给大家瞧瞧|给我看看|我想让你|我想看你|我希望你|请问一下|"
    "我想问一下|有个问题|请问|麻烦你|请你|谢谢|拜托|可以|接下来|现在|马上|赶紧|快点|嘿|"
    "哥们儿|来来来|哎呀|要不你|不如|你该|好吗|一下|一段|吧|呗|嘛|呀|吗|了|快|请|能|"
    "好|你"
)


def bare(row: dict[str, str]) -> str:
    """The prompt without names, wrapper words and punctuation; written independently of the wrapper files."""
    if row["lang"] == "en":
        return fold(re.sub(rf"\b({EN_WRAPPING})\b", "", row["prompt"].lower()))
    return re.sub(ZH_WRAPPING, "", fold(row["prompt"]))


def test_no_evaluation_prompt_is_a_rewrapped_training_prompt(data: dict[str, list[dict[str, str]]]) -> None:
    learnt = ("train", "more")
    trained = {bare(row) for split in SIZES if split.startswith(learnt) for row in data[split]}
    held = [row for split in SIZES if not split.startswith(learnt) for row in data[split]]
    assert [(row["id"], row["prompt"]) for row in held if bare(row) in trained] == []


@pytest.mark.parametrize("part", ["validation", "calibration"])
def test_no_test_prompt_is_a_rewrapped_one_of_another_part(data: dict[str, list[dict[str, str]]], part: str) -> None:
    seen = {bare(row) for split in SIZES if split.startswith(part) for row in data[split]}
    held = [row for split in SIZES if split.startswith("test") for row in data[split]]
    assert [(row["id"], row["prompt"]) for row in held if bare(row) in seen] == []


def test_responses_parse_to_their_skill(data: dict[str, list[dict[str, str]]]) -> None:
    for split in NORMAL:
        for row in data[split]:
            assert robot.parse_action(row["response"]) == row["skill"]
            reply = row["response"].removeprefix(f"[{row['skill']}()] ")
            assert reply.strip("[]") == reply != "", row
            assert bool(HAN.search(reply)) == (row["lang"] == "zh"), row
    for split in REMOTE:
        for row in data[split]:
            assert row["skill"] == "REMOTE"
            if split == "train_remote_shadow":
                assert row["response"].startswith("[REMOTE] ")
                assert robot.parse_action(row["response"]) == "REMOTE"
            else:
                assert "[" not in row["response"]
                assert robot.parse_action(row["response"]) is None


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_several_replies_for_each_skill(data: dict[str, list[dict[str, str]]], lang: str) -> None:
    replies: dict[str, set[str]] = {}
    for row in data["train_normal"]:
        if row["lang"] == lang:
            replies.setdefault(row["skill"], set()).add(row["response"])
    assert all(len(replies[skill]) >= 3 for skill in robot.SKILLS)


def test_styles_are_covered(data: dict[str, list[dict[str, str]]]) -> None:
    styles = {
        "plain",
        "polite",
        "terse",
        "slangy",
        "vocative",
        "indirect",
        "contrast",
        "eager",
        "chat",
        "typo",
    }
    for split in ("train_normal", "calibration_normal", "test_normal"):
        assert {row["style"] for row in data[split]} == styles
    typos = sum(row["style"] == "typo" for row in data["train_normal"])
    assert 60 < typos < 250
    for split in ("calibration_remote", "test_remote_large"):
        assert {row["style"] for row in data[split]} == {"open", "plain", "polite", "vocative", "chat"}


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_text_is_clean(rows: list[dict[str, str]], field: str) -> None:
    for row in rows:
        text = row[field]
        assert text == text.strip(), row
        assert not re.search(rf"\s\s|[{{}}|]|[{MARKS}]{{2}}|\s[{MARKS}]", text), row
        assert not re.search(r"\b(please|now|for me|could|can)\b.*\b\1\b", text.lower()), row
        if row["lang"] == "en":
            assert text.isascii(), row
            if field == "prompt" and row["style"] not in ("chat", "typo") and re.search(r"[.?!]$", text):
                assert not text[0].islower(), row
        else:
            assert HAN.search(text), row
            assert not re.search(r"[\u4e00-\u9fff][,?!;:]|[,?!;:][\u4e00-\u9fff]", text), row


def test_typos_change_one_word_and_make_no_other_seed_word() -> None:
    rng = random.Random(0)
    words = ["please", "wiggle", "your", "front", "paws"]
    slips = [slip for _ in range(200) if (slip := phrasing.typo(" ".join(words), rng))]
    assert len(slips) > 100
    for slip in slips:
        (before, after), *more = ((a, b) for a, b in zip(words, slip.split(), strict=True) if a != b)
        assert not more
        assert abs(len(before) - len(after)) <= 1
        assert before[0] == after[0]
    assert phrasing.typo("sit down", rng) is None


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("[Tango()] Let's go.", "Tango"),
        ("  \n[Bark()]", "Bark"),
        ("[REMOTE] Asking.", "REMOTE"),
        ("[Fly()] Up.", None),
        ("[REMOTE()]", None),
        ("[Tango] Let's go.", None),
        ("[MEANINGS()]", None),
        ("Sure. [Tango()]", None),
        ("", None),
    ],
)
def test_parse_action(text: str, action: str | None) -> None:
    assert robot.parse_action(text) == action


def test_load_names_the_known_splits(data: dict[str, list[dict[str, str]]]) -> None:
    assert robot.load("test_remote") == data["test_remote"]
    with pytest.raises(ValueError, match=r"'test'.*train_normal.*test_remote_large"):
        robot.load("test")


def test_write_jsonl(tmp_path: Path, data: dict[str, list[dict[str, str]]]) -> None:
    paths = robot.write_jsonl(tmp_path / "robot")
    assert [path.name for path in paths] == [f"{split}.jsonl" for split in SIZES]
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == data[path.stem]

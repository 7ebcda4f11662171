"""Writes the rows of ``shadowpeft.data.robot_tools``: ``python -m scripts.robot_tools``. The same rows every time."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from typing import Any

from scripts.robot_tools.cloud import CLOUD, REPLIES
from scripts.robot_tools.more import MORE_CLOUD, MORE_FRAMES, MORE_JOINS, MORE_PHRASES
from scripts.robot_tools.phrases import FRAMES, JOINS, PHRASES
from scripts.robot_tools.values import degrees, fill, metres

from shadowpeft.data import robot
from shadowpeft.data.calls import Call, ordered
from shadowpeft.data.robot_tools import ROWS, tools

SPLITS = {"train": "T", "train_more": "T", "validation": "V", "test": "E"}
COUNTS = {
    "train": {"one": 800, "two": 450, "cloud": 250},
    "train_more": {"one": 4500, "two": 2750, "cloud": 1250},
    "validation": {"one": 160, "two": 80, "cloud": 60},
    "test": {"one": 240, "two": 100, "cloud": 60},
}
CLOUD_SHARES = {"range": 0.3, "missing": 0.3, "unknown": 0.2, "open": 0.2}
OPEN = {
    "train": "train_remote_base",
    "train_more": "train_remote_base",
    "validation": "validation_remote",
    "test": "test_remote_large",
}
_SLOT = re.compile(r"\{(\w+)\}")


def phrasings(text: str) -> dict[tuple[str, str, str], list[str]]:
    """Lines by (kind or action, language, split's letter)."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    name, lang = "", ""
    for line in filter(None, text.splitlines()):
        if line.startswith("#"):
            name, lang = line[2:].split()
        else:
            found[name, lang, line[0]].append(line[1:].lstrip(" "))
    return found


COMMANDS, HANDED_ON = phrasings(PHRASES), phrasings(CLOUD)
ALL_COMMANDS, ALL_HANDED_ON = phrasings(PHRASES + MORE_PHRASES), phrasings(CLOUD + MORE_CLOUD)


def around(table: dict[tuple[str, str], list[str]], more: dict[str, list[str]], lang: str, split: str) -> list[str]:
    """Frames or joins of a split."""
    return table[lang, "train"] + more[lang] if split == "train_more" else table[lang, split]


def command(action: str, lang: str, split: str, line: str, rng: random.Random) -> tuple[str, Call, bool]:
    """The words of one command, its call, and whether a frame may stand around them."""
    framed = not line.startswith("!")
    words, _, implied = line.lstrip("! ").partition(" | ")
    arguments: dict[str, Any] = {}
    for pair in filter(None, implied.split()):
        name, _, value = pair.partition("=")
        arguments[name] = int(value) if value.isdigit() else value

    def put(match: re.Match[str]) -> str:
        text, value = fill(match[1], action, lang, split, rng)
        arguments.update(value)
        return text

    text = _SLOT.sub(put, words)
    return text.replace(" to the to the", " to the"), ordered(Call(action, arguments), tools()), framed


def finished(text: str, lang: str, rng: random.Random) -> str:
    """With or without a capital and a full stop."""
    if lang == "en" and rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if text[-1] not in "?？.!" and rng.random() < 0.4:
        text += "." if lang == "en" else "。"
    return text


class Cycle:
    """Lines of a list, each once before one comes again."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.left = rng, {}  # type: ignore[var-annotated]

    def next(self, key: Any, lines: list[str]) -> str:
        if not self.left.get(key):
            self.left[key] = self.rng.sample(lines, len(lines))
        return str(self.left[key].pop())


def rows_of(split: str) -> list[dict[str, Any]]:
    """All rows of a split."""
    rng = random.Random(f"robot tools, {split}")
    cycle, letter, seen = Cycle(rng), SPLITS[split], set()
    more = split == "train_more"
    commands, handed_on = (ALL_COMMANDS, ALL_HANDED_ON) if more else (COMMANDS, HANDED_ON)
    if more:
        seen.update(row["prompt"].lower() for row in rows_of("train"))
    frames = {lang: around(FRAMES, MORE_FRAMES, lang, split) for lang in ("en", "zh")}
    joins = {lang: around(JOINS, MORE_JOINS, lang, split) for lang in ("en", "zh")}
    actions = [tool.name for tool in tools()]
    rows: list[dict[str, Any]] = []

    def one(place: int, lang: str) -> tuple[str, Call, bool, str]:
        action = actions[place % len(actions)]
        line = cycle.next((action, lang), commands[action, lang, letter])
        return *command(action, lang, split, line, rng), f"{action}: {line}"

    def add(kind: str, lang: str, prompt: str, calls: list[Call], reply: str, family: str) -> bool:
        if prompt.lower() in seen:
            return False
        seen.add(prompt.lower())
        found = [{"name": call.name, "arguments": call.arguments} for call in calls]
        rows.append(
            {
                "split": split,
                "lang": lang,
                "kind": kind,
                "family": family,
                "prompt": prompt,
                "calls": found,
                "reply": reply,
            }
        )
        return True

    def spoken(call: Call, lang: str) -> str:
        return REPLIES[call.name][lang == "zh"]

    place = tries = 0
    while sum(row["kind"] == "one" for row in rows) < COUNTS[split]["one"]:
        lang = "zh" if rng.random() < 0.4 else "en"
        words, call, framed, family = one(place, lang)
        if framed and rng.random() < 0.45:
            words = rng.choice(frames[lang]).format(words)
        tries += 1
        if add("one", lang, finished(words, lang, rng), [call], spoken(call, lang), family) or tries > 25:
            place, tries = place + 1, 0
    while sum(row["kind"] == "two" for row in rows) < COUNTS[split]["two"]:
        lang = "zh" if rng.random() < 0.4 else "en"
        a, first, plain_a, family_a = one(rng.randrange(len(actions)), lang)
        b, second, plain_b, family_b = one(rng.randrange(len(actions)), lang)
        if first.name == second.name or not (plain_a and plain_b):
            continue
        join = rng.choice(joins[lang])
        text = join.format(a=a, b=b)
        add(
            "two",
            lang,
            finished(text, lang, rng),
            [first, second],
            spoken(second, lang),
            f"{family_a} + {family_b} + {join}",
        )
    for kind, share in CLOUD_SHARES.items():
        wanted, opened = round(share * COUNTS[split]["cloud"]), robot.load(OPEN[split])
        rng.shuffle(opened)
        have = 0
        while have < wanted:
            lang = "zh" if rng.random() < 0.4 else "en"
            if kind == "open":
                row = opened.pop()
                have += add("cloud", row["lang"], row["prompt"], [], row["response"], f"open: {row['family']}")
                continue
            line = cycle.next((kind, lang), handed_on[kind, lang, letter])
            words, _, reply = line.partition(" => ")
            text = _SLOT.sub(lambda match, lang=lang: _out(match[1], lang, rng), words)
            if rng.random() < 0.6:
                text = rng.choice(frames[lang]).format(text)
            have += add("cloud", lang, finished(text, lang, rng), [], reply, f"{kind}: {words}")
    rng.shuffle(rows)
    return [{"id": f"{split}-{n:04d}", **row} for n, row in enumerate(rows, 1)]


def _out(slot: str, lang: str, rng: random.Random) -> str:
    """A value that no tool takes, or one whose tool is not told all."""
    if slot == "deg":
        return degrees(rng.choice([30, 45, 60, 90, 180]), lang, rng)
    if slot == "dist":
        return metres(rng.randint(1, 8), lang, rng)
    low, high = {"far": (11, 500), "wide": (361, 999), "many": (11, 200), "over": (101, 400), "days": (4, 48)}[slot]
    return str(rng.choice([rng.randint(low, high), rng.randint(low, min(high, 3 * low))]))


def main() -> None:
    ROWS.mkdir(exist_ok=True)
    for split in SPLITS:
        rows = rows_of(split)
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (ROWS / f"{split}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        print(split, len(rows), {lang: sum(row["lang"] == lang for row in rows) for lang in ("en", "zh")})


if __name__ == "__main__":
    main()

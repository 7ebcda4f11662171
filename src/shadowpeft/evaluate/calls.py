"""How right calls are: exactly, by name, by argument; and a rival for them: a classifier for names, patterns for arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from shadowpeft.data import robot_tools
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.calls import Call
from shadowpeft.data.tasks.calling import Calls, Judged, judge
from shadowpeft.evaluate import rival
from shadowpeft.evaluate.scores import wilson

__all__ = ["Calls", "Judged", "Patterns", "judge", "summary"]

Row = dict[str, Any]


def summary(rows: Sequence[Row], judged: Sequence[Judged]) -> dict[str, Any]:
    """Shares with their 95 % Wilson intervals: of rows that call, of their kinds and languages, and of rows for the cloud."""
    called = [(row, each) for row, each in zip(rows, judged, strict=True) if row["calls"]]
    groups: dict[str, Callable[[Row], bool]] = {
        "calls": lambda row: True,
        "one": lambda row: row["kind"] == "one",
        "two": lambda row: row["kind"] == "two",
        "en": lambda row: row["lang"] == "en",
        "zh": lambda row: row["lang"] == "zh",
    }
    result: dict[str, Any] = {
        name: _share([each.exact for row, each in called if chosen(row)]) for name, chosen in groups.items()
    }
    good, total = (sum(each.arguments[n] for _, each in called) for n in (0, 1))
    cloud = [each for row, each in zip(rows, judged, strict=True) if not row["calls"]]
    return {
        **result,
        "names": _share([each.names for _, each in called]),
        "arguments": _of(good, total),
        "calls_handed_on": _share([each.handed_on for _, each in called]),
        "cloud_handed_on": _share([each.handed_on for each in cloud]),
    }


def _share(values: Sequence[bool]) -> dict[str, Any]:
    return _of(sum(values), len(values))


def _of(good: int, total: int) -> dict[str, Any]:
    low, high = wilson(good, total)
    return {"accuracy": good / total if total else None, "interval": [round(low, 4), round(high, 4)], "n": total}


# ------------------------------------------------------------------------------------------------------------- the rival

_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_DECADES = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_TENS = {word: 10 * n for n, word in enumerate(_DECADES, 2)}
_JOIN = re.compile(
    r",? (?:and )?then | and (?!a half)|\. after that |, next |，?(?:然后|接着|随后|最后|再|之后)|，(?=第二)",
    re.IGNORECASE,
)
_ZH = {character: n for n, character in enumerate("零一二三四五六七八九")} | {"两": 2}
_FIXED = {
    "half an hour": "30 minutes",
    "a quarter of an hour": "15 minutes",
    "half a": "0.5",
    "quarter turn": "90 degrees",
    "full turn": "360 degrees",
    "once": "1 times",
    "twice": "2 times",
    "半个小时": "30分钟",
    "半小时": "30分钟",
    "一刻钟": "15分钟",
    "半圈": "180度",
    "半分钟": "30秒",
    "半米": "0.5米",
    "百分之": "%",
}
_UNITS = {
    "distance": r"(?:\s?(?:metres?|meters?|m)\b|米)",
    "seconds": r"(?:\s?sec\w*|秒)",
    "minutes": r"(?:\s?min\w*|分钟)",
    "angle": r"(?:\s?(?:degrees?|°)|度)",
    "percent": r"(?:\s?percent|%)",
    "brightness": r"(?:\s?percent|%)",
    "count": r"(?:\s?\w+|圈|下|次|声|张)?",
    "rounds": r"(?:\s?\w+|圈|遍|次)?",
}
_ENUMS: dict[str, dict[str, tuple[str, ...]]] = {
    "direction": {
        "forward": ("forward", "ahead", "straight", "前", "直走"),
        "backward": ("back", "后", "退"),
        "left": ("left", "左"),
        "right": ("right", "右"),
    },
    "side": {"left": ("left", "左"), "right": ("right", "右")},
    "speed": {
        "slow": ("slow", "careful", "慢", "缓"),
        "normal": ("normal", "正常"),
        "fast": ("quick", "fast", "full speed", "run ", "快", "全速", "跑"),
    },
    "style": {
        "waltz": ("waltz", "华尔兹"),
        "tango": ("tango", "探戈"),
        "chacha": ("cha-cha", "恰恰"),
        "hiphop": ("hip-hop", "街舞"),
    },
    "color": {
        "red": ("red", "红"),
        "green": ("green", "绿"),
        "blue": ("blue", "蓝"),
        "yellow": ("yellow", "黄"),
        "white": ("white", "白"),
        "purple": ("purple", "紫"),
    },
    "place": {
        "kitchen": ("kitchen", "厨房"),
        "living_room": ("living room", "客厅"),
        "bedroom": ("bedroom", "卧室"),
        "bathroom": ("bathroom", "浴室"),
        "garden": ("garden", "花园"),
        "garage": ("garage", "车库"),
        "door": ("door", "门口"),
        "dock": ("dock", "充电桩"),
    },
}


def with_digits(text: str) -> str:
    """A request in lower case with number words as digits."""
    text = text.lower()
    for words, digits in _FIXED.items():
        text = text.replace(words, digits)

    def english(match: re.Match[str]) -> str:
        total = 0
        for word in re.findall("[a-z]+", match[0]):
            if word == "hundred":
                total *= 100
            elif word != "and":
                total += _TENS[word] if word in _TENS else _WORDS.index(word)
        return str(total)

    word = "(?:" + "|".join((*_TENS, *_WORDS)) + ")"
    text = re.sub(rf"\b{word}(?: hundred)?(?:(?: and |-|(?<=hundred) ){word}(?:-{word})?)?\b", english, text)

    def chinese(match: re.Match[str]) -> str:
        total = digit = 0
        for character in match[0]:
            if character in "十百":
                total += (digit or 1) * (10 if character == "十" else 100)
                digit = 0
            else:
                digit = _ZH[character]
        return str(total + digit)

    return re.sub("[零一二两三四五六七八九十百]+", chinese, text)


class Patterns:
    """TF-IDF and a linear support vector machine for the name in each half of a request, patterns for the arguments.

    Where a request is cut, and the unit and words of each argument, are written by hand for this set; names and things are
    those of the training rows.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        single = [row for row in rows if len(row["calls"]) < 2]
        labels = [row["calls"][0]["name"] if row["calls"] else REMOTE for row in single]
        self._names = rival.fit([row["prompt"] for row in single], labels)
        self._words: dict[str, list[str]] = {"name": [], "object": []}
        for row in rows:
            for call in row["calls"]:
                for key, found in self._words.items():
                    if key in call["arguments"] and call["arguments"][key] not in found:
                        found.append(call["arguments"][key])

    def answers(self, prompts: Sequence[str]) -> list[Calls | None]:
        """The calls of each request, none where it is handed on; None: what was found is no valid call."""
        return [self._calls(prompt) for prompt in prompts]

    def _calls(self, prompt: str) -> Calls | None:
        parts = [part for part in _JOIN.split(prompt) if part]
        names = rival.predict(self._names, parts)[0]
        if len(parts) != 2 or REMOTE in names:
            parts, names = [prompt], rival.predict(self._names, [prompt])[0]
        if REMOTE in names:
            return ()
        calls = []
        for name, part in zip(names, parts, strict=True):
            tool = robot_tools.tools().by_name[name]
            values = {key: self._value(key, part) for key in tool.properties}
            arguments = {key: value for key, value in values.items() if value is not None}
            if tool.problem(arguments) is not None:
                return None
            calls.append(Call(name, arguments))
        return tuple(calls)

    def _value(self, key: str, text: str) -> Any:
        if key in self._words:
            found = [word for word in self._words[key] if word.lower() in text.lower()]
            return max(found, key=len, default=None)
        text = with_digits(text)
        if key in _ENUMS:
            return next((value for value, words in _ENUMS[key].items() if any(word in text for word in words)), None)
        number = r"(\d+(?:\.\d+)?)"
        for pattern in ((rf"%{number}",) if key in ("percent", "brightness") else ()) + (number + _UNITS[key],):
            match = re.search(pattern, text)
            if match is not None:
                value = float(match[1])
                return int(value) if value.is_integer() else value
        centimetres = re.search(rf"{number}\s?(?:cm|centi\w+|厘米)", text) if key == "distance" else None
        return float(centimetres[1]) / 100 if centimetres else None

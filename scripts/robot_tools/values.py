"""What fills a slot: a value, and how somebody says it in English or Chinese (digits, words, fractions, units, "a bit")."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any


def _words(text: str) -> list[str]:
    return text.split(",")


A_BIT = {"dist": 0.3, "deg": 15, "sec": 3}
"""What "a bit" means, by convention."""
NAMES = {
    "en": [
        "Anna",
        "Tom",
        "Mia",
        "Peter",
        "Lucy",
        "Sam",
        "Emma",
        "Ben",
        "Julia",
        "Max",
        "Nora",
        "Leo",
        "Sarah",
        "Paul",
        "Kate",
        "Oscar",
    ],
    "zh": ["小明", "小红", "王伟", "李娜", "张丽", "爷爷", "奶奶", "妈妈", "爸爸", "小刚", "阿强", "老师"],
}
NEW_NAMES = {"en": ["Helen", "Mark", "Ivy", "Hugo"], "zh": ["小芳", "叔叔", "阿姨"]}
"""In validation and test rows alone, beside the others."""
MORE_NAMES = {
    "en": _words(
        "Alice,Adam,Bella,Brian,Carla,Chris,Clara,David,Dora,Eddie,Ella,Eric,Eva,Felix,Finn,Fiona,George,Grace,Gina,Harry,"
        "Hannah,Henry,Iris,Isaac,Jack,Jane,Jason,Jill,Joe,Josh,Karen,Kevin,Laura,Liam,Lily,Linda,Louis,Luke,Maria,Martin,"
        "Megan,Mike,Molly,Nick,Nina,Noah,Olga,Oliver,Otto,Pia,Quinn,Rita,Rob,Rosa,Ruby,Simon,Sofia,Steve,Tina,Toby,Uma,"
        "Victor,Vera,Walter,Wendy,Yara,Zoe"
    ),
    "zh": _words(
        "小李,小王,小张,小陈,小刘,小林,小杰,小雨,小雪,小龙,大伟,建国,志强,秀英,桂花,美玲,晓东,晓燕,丽丽,婷婷,佳佳,乐乐,明明,欢欢,"
        "哥哥,姐姐,弟弟,妹妹,舅舅,姑姑,伯伯,外婆,外公,邻居,医生,客人,同学,陈老师,李先生,王女士,张师傅,阿珍,阿杰,阿华,老赵,老周"
    ),
}
"""In training rows alone, beside the others: a model that sees a name once has to copy it."""
OBJECTS = {
    "en": [
        "ball",
        "stick",
        "newspaper",
        "slippers",
        "bone",
        "remote control",
        "keys",
        "cup",
        "phone",
        "frisbee",
        "bag",
        "hat",
        "leash",
        "toy duck",
    ],
    "zh": ["球", "棍子", "报纸", "拖鞋", "骨头", "遥控器", "钥匙", "杯子", "手机", "飞盘", "包", "帽子", "玩具"],
}
NEW_OBJECTS = {"en": ["umbrella", "blanket", "pen"], "zh": ["雨伞", "毯子", "笔"]}
MORE_OBJECTS = {
    "en": _words(
        "book,towel,sock,shoe,glove,scarf,jacket,water bottle,lunch box,apple,banana,sponge,brush,comb,charger,cable,pencil,"
        "notebook,wallet,glasses,sunglasses,watch,pillow,basket,bucket,rope,plush bear,tennis ball,football,tin,plate,spoon,"
        "magazine,letter,parcel,candle,torch,screwdriver,hammer,tape,scissors,mug,napkin,teddy,puzzle,rubber duck"
    ),
    "zh": _words(
        "书,毛巾,袜子,鞋子,手套,围巾,外套,水瓶,饭盒,苹果,香蕉,海绵,刷子,梳子,充电器,电线,铅笔,本子,钱包,眼镜,墨镜,手表,枕头,篮子,水桶,"
        "绳子,小熊,网球,足球,盘子,勺子,杂志,信,快递,蜡烛,手电筒,螺丝刀,锤子,胶带,剪刀,纸巾,积木,拼图,水壶"
    ),
}
PLACES = {
    "kitchen": ("kitchen", "厨房"),
    "living_room": ("living room", "客厅"),
    "bedroom": ("bedroom", "卧室"),
    "bathroom": ("bathroom", "浴室"),
    "garden": ("garden", "花园"),
    "garage": ("garage", "车库"),
    "door": ("door", "门口"),
    "dock": ("charging dock", "充电桩"),
}
STYLES = {
    "waltz": ("waltz", "华尔兹"),
    "tango": ("tango", "探戈"),
    "chacha": ("cha-cha", "恰恰"),
    "hiphop": ("hip-hop", "街舞"),
}
COLORS = {
    "red": ("red", "红"),
    "green": ("green", "绿"),
    "blue": ("blue", "蓝"),
    "yellow": ("yellow", "黄"),
    "white": ("white", "白"),
    "purple": ("purple", "紫"),
}
SPEEDS = {
    "slow": (["slowly", "at a slow pace", "carefully"], ["慢慢", "缓缓", "慢速"]),
    "normal": (["at normal speed"], ["正常速度"]),
    "fast": (["quickly", "fast", "at full speed"], ["快速", "飞快", "全速"]),
}
DIRECTIONS = {
    "forward": (["forward", "ahead", "straight ahead", "forwards"], ["向前", "往前", "朝前"]),
    "backward": (["back", "backwards", "backward"], ["向后", "往后", "朝后"]),
    "left": (["left", "to the left"], ["向左", "往左"]),
    "right": (["right", "to the right"], ["向右", "往右"]),
}
SIDES = {"left": ("left", "左"), "right": ("right", "右")}
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ZH = "零一二三四五六七八九"


def english(n: int) -> str:
    """A whole number below 1,000 in words."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    return f"{_ONES[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")


def chinese(n: int, measure: bool = True) -> str:
    """A whole number below 1,000 in characters; before a measure word 2 is 两."""
    if n == 2 and measure:
        return "两"
    if n < 10:
        return _ZH[n]
    if n < 100:
        return (_ZH[n // 10] if n >= 20 else "") + "十" + (_ZH[n % 10] if n % 10 else "")
    rest = n % 100
    return (
        _ZH[n // 100]
        + "百"
        + (
            ""
            if not rest
            else "零" + _ZH[rest]
            if rest < 10
            else _ZH[rest // 10] + "十" + (_ZH[rest % 10] if rest % 10 else "")
        )
    )


def number(n: int, lang: str, rng: random.Random, words: float = 0.5) -> str:
    """A whole number in digits or words."""
    if rng.random() >= words:
        return str(n)
    return english(n) if lang == "en" else chinese(n)


def metres(value: float, lang: str, rng: random.Random) -> str:
    """A distance as somebody says it."""
    unit = rng.choice(["metres", "meters", "m"]) if lang == "en" else "米"
    if value == 0.5:
        return (
            rng.choice(["half a metre", "half a meter", "50 cm", "0.5 metres"])
            if lang == "en"
            else rng.choice(["半米", "50厘米", "0.5米"])
        )
    if value == 1:
        return rng.choice(["a metre", "one meter", "1 m", "1 metre"]) if lang == "en" else rng.choice(["一米", "1米"])
    if value == int(value):
        text = number(int(value), lang, rng)
        return (
            f"{text} {unit}"
            if lang == "en" and not (unit == "m" and text.isdigit() and rng.random() < 0.5)
            else f"{text}{unit}"
        )
    if value < 1 and round(value * 100) % 5 == 0 and rng.random() < 0.7:
        cm = round(value * 100)
        return (
            f"{number(cm, lang, rng, 0.3)} {rng.choice(['cm', 'centimetres', 'centimeters'])}"
            if lang == "en"
            else f"{number(cm, lang, rng, 0.3)}厘米"
        )
    if value % 1 == 0.5 and rng.random() < 0.5:
        whole = int(value)
        if lang == "zh":
            return f"{chinese(whole)}米半"
        return (
            "a metre and a half" if whole == 1 else f"{english(whole)} and a half {unit if unit != 'm' else 'metres'}"
        )
    return f"{value:g} {unit}" if lang == "en" else f"{value:g}米"


def degrees(value: int, lang: str, rng: random.Random) -> str:
    """An angle."""
    named = {
        "en": {90: ["a quarter turn"], 180: ["half a turn", "a half turn"], 360: ["a full turn"]},
        "zh": {180: ["半圈"], 360: ["一整圈"]},
    }[lang]
    if value in named and rng.random() < 0.35:
        return rng.choice(named[value])
    text = number(value, lang, rng, 0.35)
    return text + (rng.choice([" degrees", "°" if text.isdigit() else " degrees"]) if lang == "en" else "度")


def seconds(value: int, lang: str, rng: random.Random) -> str:
    """A time of up to ten minutes."""
    named = {
        "en": {
            30: ["half a minute"],
            60: ["a minute", "one minute"],
            90: ["a minute and a half"],
            120: ["two minutes", "2 minutes"],
            180: ["three minutes", "3 minutes"],
            300: ["five minutes", "5 minutes"],
        },
        "zh": {
            30: ["半分钟"],
            60: ["一分钟", "1分钟"],
            90: ["一分半钟"],
            120: ["两分钟", "2分钟"],
            180: ["三分钟", "3分钟"],
            300: ["五分钟", "5分钟"],
        },
    }[lang]
    if value in named and rng.random() < 0.7:
        return rng.choice(named[value])
    text = number(value, lang, rng)
    return text + (rng.choice([" seconds", " seconds", " secs"]) if lang == "en" else "秒")


def minutes(value: float, lang: str, rng: random.Random) -> str:
    """A time of up to three hours."""
    named = {
        "en": {
            0.5: ["half a minute", "30 seconds"],
            1: ["one minute", "1 minute"],
            15: ["a quarter of an hour"],
            30: ["half an hour"],
            60: ["an hour", "one hour"],
            90: ["an hour and a half"],
            120: ["two hours", "2 hours"],
        },
        "zh": {
            0.5: ["半分钟", "30秒"],
            1: ["一分钟"],
            15: ["一刻钟"],
            30: ["半小时", "半个小时"],
            60: ["一小时", "一个小时"],
            90: ["一个半小时"],
            120: ["两小时", "两个小时"],
        },
    }[lang]
    if value in named and (value == 0.5 or value == 1 or rng.random() < 0.6):
        return rng.choice(named[value])
    text = number(int(value), lang, rng)
    return text + (rng.choice([" minutes", " minutes", " mins"]) if lang == "en" else "分钟")


def percent(value: int, lang: str, rng: random.Random) -> str:
    """A share of the greatest."""
    if value in (50, 100) and rng.random() < 0.4:
        return {("en", 50): "half", ("en", 100): "full", ("zh", 50): "一半", ("zh", 100): "最大"}[lang, value]
    if lang == "zh":
        return f"百分之{chinese(value, False)}" if rng.random() < 0.4 else f"{value}%"
    return f"{number(value, lang, rng, 0.35)} percent" if rng.random() < 0.6 else f"{value}%"


def times(value: int, lang: str, rng: random.Random) -> str:
    """How often."""
    if lang == "zh":
        return f"{number(value, lang, rng)}次"
    return {1: "once", 2: rng.choice(["twice", "two times", "2 times"])}.get(
        value
    ) or f"{number(value, lang, rng)} times"


def _distance(rng: random.Random) -> float:
    kind = rng.random()
    if kind < 0.5:
        return rng.randint(1, 10)
    if kind < 0.65:
        return rng.choice([0.5, 1.5, 2.5, 3.5, 4.5])
    if kind < 0.85:
        return rng.choice([0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.25, 0.75, 0.35])
    return rng.randint(11, 99) / 10


def _seconds(rng: random.Random) -> int:
    return (
        rng.choice([30, 60, 90, 120, 180, 300])
        if rng.random() < 0.35
        else rng.choice([rng.randint(2, 59), rng.randint(1, 12) * 5])
    )


def _angle(rng: random.Random) -> int:
    return rng.choice([30, 45, 60, 90, 90, 120, 180, 180, 270, 360]) if rng.random() < 0.65 else rng.randint(5, 180)


def _minutes(rng: random.Random) -> float:
    return rng.choice([0.5, 1, 15, 30, 60, 90, 120]) if rng.random() < 0.4 else rng.randint(2, 59)


def _percent(rng: random.Random) -> int:
    return rng.choice([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 50, 100]) if rng.random() < 0.7 else rng.randint(1, 99)


ROUNDS = {"Patrol": "rounds"}
PERCENT = {"SetVolume": "percent"}
SIDE = {"ShakePaw": "side"}


def fill(slot: str, action: str, lang: str, split: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The words for a slot, and the argument that they mean."""
    column = 0 if lang == "en" else 1
    if slot in A_BIT and rng.random() < 0.12:
        words = {"dist": ["a bit", "a little"], "deg": ["a bit", "a little"], "sec": ["a bit", "a little while"]}[slot]
        words = (
            words
            if lang == "en"
            else {"dist": ["一点", "一点点"], "deg": ["一点", "一点点"], "sec": ["一会儿", "一下"]}[slot]
        )
        return rng.choice(words), {{"dist": "distance", "deg": "angle", "sec": "seconds"}[slot]: A_BIT[slot]}
    numbers: dict[str, tuple[str, Callable[..., Any], Callable[..., str]]] = {
        "dist": ("distance", _distance, metres),
        "deg": ("angle", _angle, degrees),
        "sec": ("seconds", _seconds, seconds),
        "min": ("minutes", _minutes, minutes),
        "pct": (PERCENT.get(action, "brightness"), _percent, percent),
        "times": (ROUNDS.get(action, "count"), lambda rng: rng.randint(1, 10), times),
        "n": (ROUNDS.get(action, "count"), lambda rng: rng.randint(2, 10), number),
    }
    if slot in numbers:
        name, draw, say = numbers[slot]
        value = draw(rng)
        return say(value, lang, rng), {name: value}
    new = not split.startswith("train") and rng.random() < 0.25
    if slot == "name":
        name = rng.choice(_listed(NAMES, NEW_NAMES, MORE_NAMES, split, new, rng)[lang])
        return name, {"name": name}
    if slot == "obj":
        thing = rng.choice(_listed(OBJECTS, NEW_OBJECTS, MORE_OBJECTS, split, new, rng)[lang])
        return thing, {"object": thing}
    if slot in ("dir", "speed"):
        table = DIRECTIONS if slot == "dir" else SPEEDS
        value = rng.choice(list(table))
        words = table[value][column]
        return rng.choice(words), {"direction" if slot == "dir" else "speed": value}
    table = {"place": PLACES, "style": STYLES, "color": COLORS, "side": SIDES}[slot]
    value = rng.choice(list(table))
    argument = SIDE.get(action, "direction") if slot == "side" else slot
    word = table[value][column]
    return word + ("色" if slot == "color" and lang == "zh" and rng.random() < 0.5 else ""), {argument: value}


def _listed(usual: Any, unseen: Any, more: Any, split: str, new: bool, rng: random.Random) -> Any:
    """What a split's rows draw a name or a thing from."""
    if split.startswith("train"):
        return more if rng.random() < 0.5 else usual
    return unseen if new else usual

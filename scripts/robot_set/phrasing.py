"""Puts a core into a wrapper ("could you ...?", "hey Rex, ..."), and makes the occasional English typo."""

from __future__ import annotations

import random
import re
from functools import cache

from scripts.robot_set.seeds import Family, families, wrappers

_SHOWS = (
    "Wallow Scrape FrontFlip FrontJump FrontPounce WiggleHips Dance DrawHeart BalanceAttitude PlayKungFu "
    "CheerLeading LionDance WaltzDance ChaChaDance Tango HipHopDance"
)
SHOWS = frozenset(_SHOWS.split())
"""Skills one watches, which "let's see you ..." fits."""

_GUARDED_EN = "now please me us for could can go come you'd love want hey ok see show give let"
_QUESTION = "at are can do does did how if in is it's on should what what's when where which who whose why"
_IMPERATIVE = (
    "a explain find give got i make my name recommend say share suggest surprise tell think translate work write"
)

NAMES = {
    "en": ("Robo", "Rex", "buddy", "pup", "Biscuit", "doggo", "little guy", "robot dog", "Scout", "pal"),
    "zh": ("小狗", "机器狗", "旺财", "小白", "狗狗", "小家伙", "伙计", "豆豆", "来福", "小机器人"),
}
GUARDED = {
    "en": frozenset(_GUARDED_EN.split()),
    "zh": frozenset("请现快给我你来吧了嘛好想看能该大"),
}
"""A wrapper is left out where it shares one of these words (for Chinese, characters) with the core."""

CLASHES = {
    "en": (
        (r"right$", r"\bnow"),  # "turn right now" could mean either
        (r"\b(lazy|slow|gently)", r"\b(quick|now|yo)"),
        (r" time$", r"\b(now|please|pls)"),
        (r"^be ", r"how you"),
    ),
    "zh": ((r"[^在从]地(?!上|板)|热烈|乖乖|老老实实|稳当", r"快|马上|赶紧"),),
}
"""(pattern in the core, pattern in the wrapper) that do not go together."""

_QUESTION_STARTS = frozenset(_QUESTION.split())
_SOFT_STARTS = _QUESTION_STARTS | frozenset(_IMPERATIVE.split())
"""First words of an English request that may be lower-cased behind a prefix."""


def normalise(text: str) -> str:
    """Letters, digits and Han characters, lower-case: prompts with the same result are the same prompt."""
    return "".join(ch for ch in text.casefold() if ch.isalnum())


def words(text: str, lang: str) -> set[str]:
    """The words of an English text or the characters of a Chinese one."""
    return set(re.findall(r"[\w'-]+", text.casefold())) if lang == "en" else set(text)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _fits(template: str, forms: str, family: Family, filling: str, lang: str) -> bool:
    core = words(filling, lang)
    is_show = family.form == "v" and family.skill in SHOWS
    if family.form not in forms and not ("V" in forms and is_show):
        return False
    shared = core & GUARDED[lang] & words(template.replace("{c}", "").replace("{n}", ""), lang)
    if shared or ("V" in forms and core & {"me", "us", "show", "give", "let", "大", "我", "给"}):
        return False
    return not any(re.search(a, filling) and re.search(b, template) for a, b in CLASHES[lang])


def phrasings(family: Family, lang: str, rng: random.Random) -> list[tuple[str, str]]:
    """Every (style, prompt) of a family in random order: each fitting wrapper around each filling."""
    out = []
    for filling in family.fillings():
        for style, forms, template in wrappers(lang):
            if not _fits(template, forms, family, filling, lang):
                continue
            for name in rng.sample(NAMES[lang], 2 if "{n}" in template else 1):
                text = template.format(c=filling, n=name)
                if style == "chat":
                    text = text.lower() if lang == "en" else text.replace("\uff0c", " ")
                elif lang == "en":
                    text = _sentence(text)
                out.append((family.style or style, text))
    rng.shuffle(out)
    return out


def ask(request: str, lang: str, rng: random.Random) -> tuple[str, str]:
    """(style, prompt) of an open-domain request: as written in about half of the draws, else wrapped."""
    templates = [(style, template) for style, forms, template in wrappers(lang) if forms == "r"]
    bare, *wrapped = templates
    first = request.split()[0].casefold() if lang == "en" else ""
    if lang == "en":
        is_question = first in _QUESTION_STARTS
    else:
        is_question = request[-1] == "\uff1f" and request[0] not in "我你来"
    draw = rng.random()
    if draw < 0.5 or (lang == "en" and first not in _SOFT_STARTS):
        return bare[0], request
    if draw < 0.65:
        chat = request.rstrip(".?\u3002\uff1f")
        return ("chat", chat.lower()) if lang == "en" else ("chat", chat)
    style, template = rng.choice(wrapped if is_question else [t for t in wrapped if t[0] == "vocative"])
    if lang == "en" and first != "i":
        request = request[0].lower() + request[1:]
    text = template.format(c=request, n=rng.choice(NAMES[lang]))
    return style, _sentence(text)


@cache
def _vocabulary() -> frozenset[str]:
    # these parts came later and must leave the others as they are
    cores = " ".join(family.core for family in families("en") if family.part not in ("calibration", "more"))
    return frozenset(re.findall(r"[a-z]+", cores.casefold()))


def typo(text: str, rng: random.Random) -> str | None:
    """``text`` with one slip of the finger in one of its longer words, or None if it has none."""
    spots = list(re.finditer(r"[a-z]{5,}", text))
    if not spots:
        return None
    spot = rng.choice(spots)
    word = spot[0]
    i = rng.randrange(1, len(word) - 1)
    slip = rng.choice(
        [
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],  # two letters swapped
            word[:i] + word[i + 1 :],  # one left out
            word[:i] + word[i] + word[i:],  # one doubled
        ]
    )
    if slip == word or slip in _vocabulary():
        return None
    return text[: spot.start()] + slip + text[spot.end() :]

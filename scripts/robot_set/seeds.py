"""Reads the hand-written seed files; their format is described at the head of each English file."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PARTS = {"T": "train", "M": "more", "V": "validation", "C": "calibration", "E": "test"}
LANGS = ("en", "zh")


@dataclass(frozen=True)
class Family:
    """One core way of asking for a skill, or for something out of scope."""

    id: str
    part: str
    """train, more (further training rows), validation, calibration or test"""
    skill: str
    """or the topic of what is out of scope"""
    form: str
    """v, n, s, q, t or e"""
    style: str
    """a style of the core itself, which wins over the wrapper's; empty if it has none"""
    core: str

    def fillings(self) -> list[str]:
        """Every text of the core, one for each way to take its ``[a|b]`` choices."""
        pieces = re.split(r"\[([^\]]*)\]", self.core)
        choices = [piece.split("|") if i % 2 else [piece] for i, piece in enumerate(pieces)]
        return ["".join(pick) for pick in itertools.product(*choices)]


@dataclass(frozen=True)
class OpenRequest:
    """One open-domain request with its answer. ``fact`` names what is asked, the same in both languages."""

    family: str
    split: str
    fact: str
    template: str
    """the request before a fact is filled in; two requests with one template are of one family"""
    prompt: str
    answers: tuple[str, ...]


def _lines(name: str) -> list[str]:
    text = (Path(__file__).parent / "seed_files" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


@cache
def families(lang: str, file: str = "skills") -> tuple[Family, ...]:
    """All phrasing families of a language: of the skills, or of what is out of scope (``oos``)."""
    out: list[Family] = []
    skill = ""
    for line in _lines(f"{file}_{lang}.txt"):
        if line.startswith("== "):
            skill, count = line[3:], dict.fromkeys(PARTS, 0)
        elif not line.startswith("R "):
            part, form, core = line.split(" ", 2)
            form, _, style = form.partition("/")
            count[part] += 1
            if form == "n" and re.search("[,\uff0c]", core):
                style = style or "contrast"  # "Don't sleep, stand up."
            named = skill if file == "skills" else f"{file}-{skill}"
            family_id = f"{lang}-{named}-{PARTS[part]}{count[part]:02d}"
            out.append(Family(family_id, PARTS[part], skill, form, style, core))
    return tuple(out)


@cache
def replies(lang: str, file: str = "skills") -> dict[str, list[str]]:
    """The spoken replies of each skill, or of each topic that is out of scope (``oos``)."""
    out: dict[str, list[str]] = {}
    for line in _lines(f"{file}_{lang}.txt"):
        if line.startswith("== "):
            skill = line[3:]
        elif line.startswith("R "):
            out.setdefault(skill, []).append(line[2:])
    return out


@cache
def requests(lang: str) -> tuple[OpenRequest, ...]:
    """All open-domain requests of a language: the single ones and each (fact, template) of the tables."""
    out: list[OpenRequest] = []
    split = topic = ""
    asks: list[str] = []
    answers: list[str] = []
    for line in _lines(f"remote_{lang}.txt"):
        mark, _, rest = line.partition(" ")
        if mark == "==":
            split, topic = rest, ""
        elif mark == "--":
            topic, asks, answers = rest, [], []
        elif mark == "?":
            asks.append(rest)
        elif mark == "!":
            answers.append(rest)
        elif mark == "=":
            cells = rest.split(" | ")
            for k, ask in enumerate(asks, 1):
                filled = tuple(_sentence(answer.format(*cells)) for answer in answers)
                fact = f"{topic}/{cells[0]}"
                prompt = _sentence(ask.format(*cells))
                out.append(OpenRequest(f"{lang}-{split}-{topic}{k}", split, fact, ask, prompt, filled))
        else:
            fact, prompt, answer = line.split(" | ")
            out.append(OpenRequest(f"{lang}-{split}-{fact}", split, fact, prompt, prompt, (answer,)))
    return tuple(out)


@cache
def wrappers(lang: str) -> tuple[tuple[str, str, str], ...]:
    """The (style, forms, template) triples of a language."""
    out = []
    for line in _lines(f"wrappers_{lang}.txt"):
        style, forms, template = line.split(" | ")
        out.append((style, forms, template))
    return tuple(out)

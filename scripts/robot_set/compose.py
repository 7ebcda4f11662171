"""Composes the rows of each split from the seeds."""

from __future__ import annotations

import random
from itertools import zip_longest

from scripts.robot_set import phrasing, seeds

from shadowpeft.data.robot import SKILLS, SPLITS, Row

TYPO_RATE = 0.07
"""Share of English skill commands with one typo."""

BARE_RATE = 0.35
"""Share of commands that are the core alone, where they are not for training."""


def build(seed: int = 0) -> dict[str, list[Row]]:
    """All splits. Every split has its own random stream, so a change in one leaves the others as they are."""
    taken: set[str] = set()
    return {split: _build_split(split, seed, taken) for split in SPLITS}


def _build_split(split: str, seed: int, taken: set[str]) -> list[Row]:
    info = SPLITS[split]
    rows: list[Row] = []
    for lang in seeds.LANGS:
        # A string seed is hashed with SHA-512 by random.Random, so it does not depend on PYTHONHASHSEED.
        rng = random.Random(f"robot/{seed}/{split}/{lang}")
        compose = {"skill": _commands, "remote": _open_requests, "oos": _out_of_scope}[str(info["kind"])]
        rows += compose(split, lang, int(info[lang]), rng, taken)
    random.Random(f"robot/{seed}/{split}").shuffle(rows)
    return [{"id": f"{split}-{i:04d}", **row} for i, row in enumerate(rows)]


def _row(split: str, lang: str, skill: str, family: str, style: str, prompt: str, response: str) -> Row:
    kind = str(SPLITS[split]["kind"])
    return {
        "split": split,
        "lang": lang,
        "kind": kind,
        "skill": skill,
        "family": family,
        "style": style,
        "prompt": prompt,
        "response": response,
    }


def _commands(split: str, lang: str, count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """``count`` commands, as evenly over the skills as the count permits, a skill's families in turn."""
    part = split.split("_")[0]
    each, extra = divmod(count, len(SKILLS))
    longer = set(rng.sample(SKILLS, extra))
    rows = []
    for skill in SKILLS:
        own = [family for family in seeds.families(lang) if family.part == part and family.skill == skill]
        rng.shuffle(own)
        replies = seeds.replies(lang)[skill]
        chosen = _take(own, lang, each + (skill in longer), rng, taken, bare_first=part in ("train", "more"))
        for family, style, prompt in chosen:
            reply = f"[{skill}()] {rng.choice(replies)}"
            rows.append(_row(split, lang, skill, family, style, prompt, reply))
    return rows


def _take(
    own: list[seeds.Family], lang: str, count: int, rng: random.Random, taken: set[str], bare_first: bool
) -> list[tuple[str, str, str]]:
    """``count`` (family id, style, prompt) with new prompts: one of each family, then a second of each ..."""
    columns = []
    for family in own:
        options = phrasing.phrasings(family, lang, rng)
        if bare_first or rng.random() < BARE_RATE:
            bare = phrasing.normalise(family.fillings()[0])
            options.sort(key=lambda option: phrasing.normalise(option[1]) != bare)  # stable: the bare ones first
        columns.append([(family.id, style, prompt) for style, prompt in options])
    out: list[tuple[str, str, str]] = []
    waiting = [iter(column) for column in columns]
    while len(out) < count and waiting:
        for column in list(waiting):
            for family_id, style, prompt in column:
                if phrasing.normalise(prompt) in taken:
                    continue
                if lang == "en" and rng.random() < TYPO_RATE and (slip := phrasing.typo(prompt, rng)):
                    style, prompt = "typo", slip
                if phrasing.normalise(prompt) in taken:
                    continue
                taken.add(phrasing.normalise(prompt))
                out.append((family_id, style, prompt))
                break
            else:
                waiting.remove(column)
            if len(out) == count:
                break
    if len(out) < count:
        raise ValueError(f"{own[0].skill} has {len(out)} {lang} prompts, {count} are needed: write more families")
    return out


def _out_of_scope(split: str, lang: str, count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """``count`` requests that no skill answers: one of each family, then a second of each ..."""
    part = split.split("_")[0]
    own = [family for family in seeds.families(lang, "oos") if family.part == part]
    topics = {family.id: family.skill for family in own}
    rng.shuffle(own)
    rows = []
    for family, style, prompt in _take(own, lang, count, rng, taken, bare_first=False):
        rows.append(_row(split, lang, "REMOTE", family, style, prompt, rng.choice(seeds.replies(lang, "oos")[topics[family]])))
    return rows


def _open_requests(split: str, lang: str, count: int, rng: random.Random, taken: set[str]) -> list[Row]:
    """``count`` open-domain requests: the single ones, then table facts, each once before any twice."""
    own = [request for request in seeds.requests(lang) if request.split == split]
    by_fact: dict[str, list[seeds.OpenRequest]] = {}
    for request in own:
        by_fact.setdefault(request.fact, []).append(request)
    singles = [group[0] for group in by_fact.values() if "/" not in group[0].fact]
    groups = [rng.sample(group, len(group)) for group in by_fact.values() if "/" in group[0].fact]
    rng.shuffle(singles)
    rng.shuffle(groups)
    rounds = [request for column in zip_longest(*groups) for request in column if request is not None]
    if split in ("calibration_remote", "test_remote_large"):
        rounds = rounds[: len(groups)]  # each fact once: another wording of one fact is little evidence
    rows: list[Row] = []
    for request in singles + rounds:
        if len(rows) == count:
            break
        style, prompt = phrasing.ask(request.prompt, lang, rng)
        if phrasing.normalise(prompt) in taken:
            continue
        taken.add(phrasing.normalise(prompt))
        rows.append(_row(split, lang, "REMOTE", request.family, style, prompt, rng.choice(request.answers)))
    if len(rows) < count:
        raise ValueError(f"{split} has {len(rows)} {lang} requests, {count} are needed")
    return rows

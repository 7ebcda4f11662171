"""Rows of the search for the detached shadow's recipe: what trains, and what chooses.

Nothing here reads a test split but :func:`test_rows`, which only the last command of the search calls.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowpeft.data import robot
from shadowpeft.data.actions import REMOTE, written
from shadowpeft.data.chat import answer_ids, prompt_ids

HELD_OUT_OPEN = 0.1
"""Share of the topics of ``train_remote_base`` that is held out of training."""


@dataclass(frozen=True)
class Split:
    """Rows of the packaged set: ``train`` is learnt, ``development`` chooses."""

    train: list[dict[str, str]]
    development: list[dict[str, str]]


def held_out_families(rows: Sequence[dict[str, str]]) -> set[str]:
    """One phrasing family of each skill and language, drawn by a hash of its id."""
    first: dict[tuple[str, str], str] = {}
    for row in rows:
        key = (row["skill"], row["lang"])
        if key not in first or _hash(row["family"]) < _hash(first[key]):
            first[key] = row["family"]
    return set(first.values())


def topic(row: dict[str, str]) -> str:
    """What an open request is about, the same in both languages and for every template that asks for it."""
    return row["family"].split("-", 2)[2].rstrip("0123456789")


def split(*, open_rows: bool = True, hold_out: bool = True, more_rows: bool = False) -> Split:
    """Training and development rows.

    Development is the packaged validation set (204 commands, 60 open requests) and, with ``hold_out``, one phrasing family of
    every skill and language of ``train_normal`` and a tenth of the topics of ``train_remote_base``: no phrasing and no topic
    stands on both sides.

    Args:
        open_rows: the open prompts of the base path's rows are learnt too, as ``[REMOTE]``.
        hold_out: False trains on every training row and leaves the packaged validation set to choose by.
        more_rows: the further rows of ``robot_large`` train too; development stays what it is.
    """
    commands, requests = robot.load("train_normal"), robot.load("train_remote_base")
    families = held_out_families(commands) if hold_out else set()
    topics = {topic(r) for r in requests if hold_out and _hash(topic(r)) < HELD_OUT_OPEN * 16**16}
    train = [row for row in commands if row["family"] not in families] + robot.load("train_remote_shadow")
    if open_rows:
        train += [row for row in requests if topic(row) not in topics]
    if more_rows:
        train += robot.load("more_normal") + (robot.load("more_remote") if open_rows else [])
    kept_back = [row for row in commands if row["family"] in families]
    kept_back += [row for row in requests if topic(row) in topics]
    return Split(train, [*robot.load("validation_normal"), *robot.load("validation_remote"), *kept_back])


def test_rows() -> list[dict[str, str]]:
    """The rows that no search looks at: 306 commands, 18 and 320 open requests."""
    return [row for name in ("test_normal", "test_remote", "test_remote_large") for row in robot.load(name)]


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


# --------------------------------------------------------------------------------------------------------------- sequences


def response(row: dict[str, str], target: str) -> str:
    """What the shadow learns to answer: the ``action`` alone, or the action and the spoken ``reply``.

    An open prompt of the base path has a real answer that the device must not give: there both are ``[REMOTE]``.
    """
    if target == "action" or (row["skill"] == REMOTE and not row["response"].startswith("[")):
        return written(row["skill"])
    return row["response"]


@dataclass(frozen=True)
class Item:
    """One sequence: its tokens, and the place of the first that is learnt."""

    ids: list[int]
    start: int


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    """A row's prompt as the device meets it."""
    return [{"role": "system", "content": robot.SYSTEM}, {"role": "user", "content": row["prompt"]}]


def encode(rows: Sequence[dict[str, str]], tokenizer: Any, target: str) -> list[Item]:
    """Prompt and answer of each row as tokens, the end of the turn included."""
    items = []
    for row in rows:
        chat = messages(row)
        prompt = prompt_ids(tokenizer, chat)
        items.append(Item(prompt + answer_ids(tokenizer, chat, response(row, target)), len(prompt)))
    return items


def shared_prefix(items: Sequence[Item]) -> list[int]:
    """The tokens that every sequence begins with."""
    return common_start([item.ids[: item.start] for item in items])


def common_start(lists: Sequence[list[int]]) -> list[int]:
    """The longest list that all of ``lists`` begin with."""
    low, high = min(lists), max(lists)
    return low[: next((i for i, token in enumerate(low) if token != high[i]), len(low))]


def batches(items: Sequence[Item], size: int, seed: str, chunk: int = 40) -> list[list[int]]:
    """Places of ``items`` in shuffled batches of rows of similar length: ``chunk`` batches are sorted at a time."""
    draw = random.Random(seed)
    order = draw.sample(range(len(items)), len(items))
    found = []
    for start in range(0, len(order), chunk * size):
        part = sorted(order[start : start + chunk * size], key=lambda i: len(items[i].ids))
        found += [part[i : i + size] for i in range(0, len(part), size)]
    draw.shuffle(found)
    return found


def padded(items: Sequence[Item], skip: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch without its first ``skip`` tokens, which all share.

    Returns:
        tokens ``(B, T)``, padded on the right (causal attention hides it); the places ``(N,)`` in ``B * T`` whose next token is
        learnt; those tokens ``(N,)``.
    """
    width = max(len(item.ids) for item in items) - skip - 1
    tokens = torch.tensor([(item.ids[skip:-1] + [pad] * width)[:width] for item in items])
    places = [b * width + t - skip for b, item in enumerate(items) for t in range(item.start - 1, len(item.ids) - 1)]
    return tokens, torch.tensor(places), torch.tensor([token for item in items for token in item.ids[item.start :]])

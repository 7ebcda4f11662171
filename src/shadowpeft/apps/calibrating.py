"""What ``shadowpeft route calibrate`` works on: its rows, the actions that are known, and what each half answers."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import shadowpeft
from shadowpeft.apps import second_opinion as second
from shadowpeft.apps.common import bar, load_tokenizer_of, placed
from shadowpeft.apps.intents import distinct, read_intents, without_prompts_of
from shadowpeft.apps.source import shown
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE, is_right, parser
from shadowpeft.data.call_guide import Engine
from shadowpeft.data.calls import CallParser
from shadowpeft.data.declined import Beginnings, DeclinedRequests, may_change
from shadowpeft.data.robot import SKILLS
from shadowpeft.data.robot_tools import tools_named
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve import scoring
from shadowpeft.serve.backend import Attached, Detached
from shadowpeft.serve.calibration import Sample, signal_areas
from shadowpeft.serve.loading import is_edge_folder, load_edge
from shadowpeft.serve.router import (
    ACTION,
    AGREEMENT,
    ALL,
    CHOSEN,
    action_probability,
    agreement,
    decisive,
    settled,
    signals,
)

if TYPE_CHECKING:
    from rich.console import Console

FREELY, CHOOSING, ALONE, CLOUD = "device", "device, choosing", "device alone", "cloud"
"""Who is asked: the device answers freely, or chooses among the known actions, with a second opinion or without it."""
LONGEST_CALLS = 96
"""Tokens of an answer that calls tools; what is longer counts as no call."""


@dataclass(frozen=True)
class Actions:
    """What the device may do."""

    names: tuple[str, ...] | None = None
    """as the user wrote them; None: the packaged skills"""
    tools: Any = None
    """the same with arguments, if any has some"""

    @classmethod
    def of(cls, skills: str | None) -> Actions:
        """Those of a file, or of a packaged set."""
        if skills in (None, "robot"):
            return cls()
        known = tools_named(str(skills))
        return cls(known.names, None if known.plain else known)

    @property
    def own(self) -> tuple[str, ...] | None:
        """The user's names without arguments."""
        return None if self.tools is not None else self.names

    @cached_property
    def parse(self) -> Any:
        """What reads the action off an answer."""
        return parser(self.own or SKILLS) if self.tools is None else CallParser(self.tools)

    def choice(self, backend: Any, opinion: Any = None) -> Any:
        """What holds an answer to these actions."""
        if self.tools is None:
            return ActionTrie.of(backend.tokenizer, self.own or SKILLS, opinion)
        vocabulary = backend.model.config.get_text_config().vocab_size
        return Engine(backend.tokenizer, vocabulary).calls(self.tools, hand_on=True)

    def tokens(self, asked: int, choice: Any) -> int:
        """How long an answer may be: long enough for its action."""
        if self.tools is not None:
            return max(asked, LONGEST_CALLS)
        return max(asked, choice.longest) if isinstance(choice, ActionTrie) else asked


def signal_for(signal: str, actions: Actions, second_opinion: str | None) -> str:
    """The signal to take: the one asked for, ``auto``, or the only one that fits.

    Raises:
        ConfigError: if it does not fit the actions, or there is no second opinion for it.
    """
    if signal not in ("auto", *ALL):
        raise ConfigError(f"signal is '{signal}' but must be auto or one of {', '.join(ALL)}")
    if second_opinion is not None:
        if actions.tools is not None:
            raise ConfigError("--second-opinion knows nothing of arguments but the actions of --skills have some; leave it out")
        if signal not in ("auto", *CHOSEN):
            raise ConfigError(f"--second-opinion weighs chosen actions but --signal is {signal}; leave one of them out")
        return AGREEMENT if signal == "auto" else signal
    if signal == AGREEMENT:
        raise ConfigError(f"signal is '{signal}' but there is no second opinion; pass --second-opinion ROWS, or another signal")
    if actions.tools is not None and signal not in ("auto", ACTION):
        raise ConfigError(
            f"signal is '{signal}' but actions with arguments are always chosen; leave it out, or set it to {ACTION}"
        )
    return ACTION if actions.tools is not None else signal


@dataclass
class Rows:
    """The rows of one calibration, each prompt once, and what the report says of them."""

    fit: list[dict[str, Any]]
    check: list[dict[str, Any]] = field(default_factory=list)
    learnt: list[dict[str, Any]] = field(default_factory=list)
    """of the second opinion"""
    about: dict[str, Any] = field(default_factory=dict)
    about_check: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        data: str,
        limit: int | None,
        actions: Actions,
        second_opinion: str | None,
        open_share: float | None,
        console: Console,
    ) -> Rows:
        """Those to calibrate on.

        Raises:
            ConfigError, DataError: as :func:`read_intents`; if a second opinion has learnt them, or another action for one of
            them; or if there are none of a kind that ``open_share`` asks for.
        """
        rows = read_intents(data, "fit", limit, actions.own, actions.tools)
        fit, copies = _each_once(rows, data, console)
        found = cls(fit, about={"data": shown(data), "copies": copies})
        if second_opinion is not None:
            found.learnt = second.learning_rows(second_opinion, actions.own)
            found.fit, found.about["learnt_already"] = second.not_learnt(found.fit, found.learnt, data, console)
        if open_share is not None:
            found.fit, left_out = with_open_share(found.fit, open_share, data, console)
            found.about |= {"open_share": open_share, "left_out_for_the_share": left_out}
        return found

    def read_check(self, check: str, limit: int | None, actions: Actions, console: Console) -> None:
        """Add rows to measure the choice on, as they come.

        Raises:
            ConfigError, DataError: as :meth:`read`, or if there are none but those that the threshold is fitted on.
        """
        rows, _ = _each_once(read_intents(check, "check", limit, actions.own, actions.tools), check, console)
        self.check, seen = _unseen(rows, self.fit, check, console)
        self.about_check = {"data": shown(check), "seen_in_data": seen}
        if self.learnt:
            self.check, learnt = second.not_learnt(self.check, self.learnt, check, console)
            self.about_check["learnt_already"] = learnt

    def parts(self) -> dict[str, list[dict[str, Any]]]:
        """``fit``, and ``check`` if there is one."""
        return {"fit": self.fit, **({"check": self.check} if self.check else {})}


def with_open_share(
    rows: list[dict[str, Any]], share: float, source: str, console: Console, seed: int = 0
) -> tuple[list[dict[str, Any]], int]:
    """As many of the rows as have this share of requests without an action at least, the others left out at random.

    A random part of the commands is a sample of the commands, so a bound on these rows holds for that mixture of the same kinds
    of requests. Copies count once here and for the traffic: how often they came was part of the mixture that is left.

    Args:
        seed: of the draw.

    Raises:
        DataError: if there are no rows of a kind that it takes, or too few.
    """
    commands = [i for i, row in enumerate(rows) if row["skill"] != REMOTE]
    others = [i for i, row in enumerate(rows) if row["skill"] == REMOTE]
    if not commands or (share and not others):
        missing = f"requests with the skill {REMOTE}" if commands else "commands"
        raise DataError(f"'{source}' has no {missing}, so no share of it can have them; add some, or leave --open-share out")
    kept_commands, kept_others = len(commands), len(others)
    if len(others) >= share * len(rows):  # enough for all commands
        kept_others = max(math.ceil(share * len(commands) / (1 - share) - 1e-9), 1 if share else 0)
    else:
        kept_commands = math.floor(len(others) * (1 - share) / share + 1e-9)
    if not kept_commands:
        raise DataError(
            f"'{source}' has {len(others)} requests with the skill {REMOTE}, too few for a share of {share:g} with a command; "
            "add some, or leave --open-share out"
        )
    draw = random.Random(seed)
    kept = {*draw.sample(commands, kept_commands), *draw.sample(others, kept_others)}
    if len(kept) < len(rows):
        console.print(
            f"'{source}': {len(rows) - len(kept)} of {len(rows)} rows are left out, drawn at random, so that no action fits "
            f"{100 * kept_others / len(kept):.3g} % of the others"
        )
    return [{**row, "times": 1} for i, row in enumerate(rows) if i in kept], len(rows) - len(kept)


def check_share(share: float | None) -> None:
    """
    Raises:
        ConfigError: if the share of open requests is not from 0 to below 1.
    """
    if share is not None and not 0.0 <= share < 1.0:
        raise ConfigError(
            f"open-share is {share} but must be from 0 to below 1: the share of requests that no action fits, such as 0.5"
        )


def _each_once(rows: list[dict[str, Any]], source: str, console: Console) -> tuple[list[dict[str, Any]], int]:
    """Rows with each prompt once, and how many copies were left out: copies are no evidence of other requests."""
    kept = distinct(rows)
    copies = len(rows) - len(kept)
    if copies:
        console.print(f"'{source}': {copies} of {len(rows)} rows repeat a prompt; each prompt counts once")
    return kept, copies


def _unseen(
    rows: list[dict[str, Any]], fitted: list[dict[str, Any]], source: str, console: Console
) -> tuple[list[dict[str, Any]], int]:
    """Rows to measure on without those whose prompt the threshold is fitted on, and how many these were.

    Raises:
        DataError: if there are no others.
    """
    kept, _ = without_prompts_of(rows, fitted)
    seen = len(rows) - len(kept)
    if not kept:
        raise DataError(
            f"every prompt of --check '{source}' is one of --data too, so it measures nothing new; give rows that had no part "
            "in the fit, or leave --check out"
        )
    if seen:
        console.print(f"'{source}': {seen} of {len(rows)} prompts are among those of --data and are left out of the check")
    return kept, seen


def backends(source: str, base: str | None, cloud: bool, where: Any) -> tuple[Any, Any]:
    """The device half of an adapter or an edge folder, and the cloud half if it is to be asked; not of what classifies."""
    if is_edge_folder(source):
        if cloud:
            raise ConfigError(
                f"'{source}' is an edge model and has no attached path; pass --no-cloud, or the adapter's folder"
            )
        model, tokenizer = load_edge(source)
        return Detached(placed(model, where), tokenizer, "edge"), None
    tokenizer = load_tokenizer_of(source, base)
    model = placed(shadowpeft.load(source, base), where)
    edge = Detached(shadowpeft.detach(model), tokenizer, "edge")
    return edge, Attached(model, tokenizer, {"default": source}, "base") if cloud else None


@dataclass(frozen=True)
class Asking:
    """How the halves are asked."""

    edge: Any
    cloud: Any
    """None: it is not asked"""
    actions: Actions
    signal: str
    plain: Any
    """What holds a chosen answer; None: the device answers freely alone."""
    opinion: Any
    system: str | None
    max_new_tokens: int
    console: Console
    quiet: bool

    def samples(self, rows: Rows) -> dict[str, dict[str, list[Any]]]:
        """What every answer is worth: by way of asking the device, by part of the rows."""
        ways = self._ways()
        found: dict[str, dict[str, list[Any]]] = {way: {} for way in ways}
        for name, part in rows.parts().items():
            asked = {way: choice for way, choice in ways.items() if way != ALONE or name == "fit"}  # told of the fit alone
            texts = {way: self._answers(self.edge, part, f"{name}, {way}", choice) for way, choice in asked.items()}
            in_cloud: list[Any] = [None] * len(part)
            if self.cloud is not None:
                in_cloud = self._answers(self.cloud, part, f"{name}, {CLOUD}", None)
            for way, answers in texts.items():
                handed = [None] * len(part) if way == FREELY else self._handed_on(part, answers, in_cloud, name)
                each = zip(part, answers, in_cloud, handed, strict=True)
                found[way][name] = [self._sample(row, answer, other, told, way) for row, answer, other, told in each]
        return found

    @cached_property
    def _begin(self) -> Beginnings:
        """What an action begins with in the cloud's tokens: a second of work for a large vocabulary."""
        return Beginnings.of(self.cloud.tokenizer, self.cloud.model.config.get_text_config().vocab_size)

    def _handed_on(self, part: list[dict[str, Any]], answers: list[Any], in_cloud: list[Any], name: str) -> list[Any]:
        """The cloud's answers where the device's ``[REMOTE]`` goes along with the request and may change them, else None."""
        if self.cloud is None:
            return [None] * len(part)
        chances: dict[str, float] = {}
        for row, (pieces, scores), other in zip(part, answers, in_cloud, strict=True):
            n, action = decisive(pieces, self.actions.parse)
            chance = action_probability(scores.first(n))
            if action == REMOTE and may_change(chance, decisive(other[0], self.actions.parse)[1] is not None):
                chances[row["prompt"]] = chance
        again = [row for row in part if row["prompt"] in chances]
        if not again:
            return [None] * len(part)
        said = self._answers(self.cloud, again, f"{name}, {CLOUD} again", DeclinedRequests(self._begin, chances))
        by_prompt = dict(zip(chances, said, strict=True))
        return [by_prompt.get(row["prompt"]) for row in part]

    def _ways(self) -> dict[str, Any]:
        """Each way of asking the device, with what holds its answers."""
        if self.opinion is not None:
            return {CHOOSING: self.actions.choice(self.edge, self.opinion), ALONE: self.plain}
        free: dict[str, Any] = {} if self.signal in CHOSEN else {FREELY: None}
        return free if self.plain is None else {**free, CHOOSING: self.plain}

    def _answers(self, backend: Any, rows: list[dict[str, Any]], label: str, choice: Any) -> list[Any]:
        with bar(self.console, label, len(rows), quiet=self.quiet) as progress:
            return scoring.scored_answers(
                backend,
                backend.names[0],
                [row["prompt"] for row in rows],
                places=[row["where"] for row in rows],
                system=self.system,
                max_tokens=self.actions.tokens(self.max_new_tokens, choice),
                until=lambda pieces, _: settled(pieces, self.actions.parse),  # what follows the action does not count
                actions=choice,
                progress=progress,
            )

    def _right(self, row: dict[str, Any], cloud: Any) -> bool | None:
        """Whether the cloud's answer to a row is right; None: it was not asked."""
        return None if cloud is None else is_right(decisive(cloud[0], self.actions.parse)[1], row["skill"])

    def _sample(self, row: dict[str, Any], answer: Any, cloud: Any, handed: Any, way: str) -> Any:
        """What the device's answer to a row is worth, and whether the cloud's, alone and with the device's word, is right."""
        pieces, scores = answer
        n, action = decisive(pieces, self.actions.parse)
        kept = action not in (None, REMOTE)
        own = scores.first(n)
        values = signals(own) if way == FREELY else {ACTION: action_probability(own)}
        values |= {AGREEMENT: agreement(own)} if self.opinion is not None and way == CHOOSING else {}
        is_open, tagged, right = row["skill"] == REMOTE, action == REMOTE, kept and action == row["skill"]
        in_cloud, told = self._right(row, cloud), self._right(row, handed)
        return Sample(kept, right, values, in_cloud, is_open, tagged, row["times"], told)


def areas(by_way: Mapping[str, Mapping[str, list[Any]]], places: Iterable[int]) -> dict[str, float | None]:
    """AUROC of the signals of every way, on these rows of the fit."""
    chosen = list(places)
    found = {k: v for parts in by_way.values() for k, v in signal_areas([parts["fit"][i] for i in chosen]).items()}
    return {name: None if area is None else round(area, 4) for name, area in found.items()}

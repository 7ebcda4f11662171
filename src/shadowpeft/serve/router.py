"""The router: what the device said and how sure it was, in; who answers and why, out. It knows nothing of models.

Procedure (the paper, Appendix F): the detached shadow answers first. A known action is kept; a ``[REMOTE]`` tag, anything that
is no known action and, with a calibration, a known action that is too likely to be wrong go to the cloud.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shadowpeft.data.actions import LONGEST_TAG, REMOTE, checked
from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json
from shadowpeft.storage import write_json

DEVICE, CLOUD = "device", "cloud"
KNOWN, TAGGED, UNKNOWN, UNSURE = "known skill", "[REMOTE]", "unknown answer", "low confidence"
ASKED = "asked for"
BASE_PATH, BARE, LORA, DETACHED = "attached", "base", "lora", "detached"
"""Which model of the cloud answered: a base with its shadow, the bare base, a LoRA or DoRA, or an edge model."""
TOO_LONG = "too long for the device"
OTHER_TOOLS, FORMAT, TOOL_RESULT = "other tools", "response format", "tool result"
CLOUD_DOWN, CLOUD_BUSY, CIRCUIT_OPEN = "cloud unavailable", "cloud busy", "circuit open"
REASONS = (
    *(KNOWN, TAGGED, UNKNOWN, UNSURE, TOO_LONG, OTHER_TOOLS, FORMAT, TOOL_RESULT, ASKED),
    *(BASE_PATH, BARE, LORA, DETACHED, CLOUD_DOWN, CLOUD_BUSY, CIRCUIT_OPEN),
)
"""Every reason an answer can carry."""

SIGNALS = ("logprob", "mean_logprob", "min_logprob", "margin", "entropy")
"""Of an answer that was given freely; see :func:`signals`."""
ACTION = "action"
"""Of an answer whose action was chosen among the known ones; see :func:`action_probability`."""
AGREEMENT = "agreement"
"""Of an answer whose action was chosen with a second opinion; see :func:`agreement`."""
CHOSEN = (ACTION, AGREEMENT)
ALL = (*SIGNALS, *CHOSEN)
FILE = "routing.json"
"""Name of a saved calibration, beside the adapter's or the edge model's files."""
_FORMAT = 1


@dataclass
class Scores:
    """What the model thought of each token it chose; lists of one length, natural logarithms.

    Where the action was chosen among the known ones, of the distribution over the tokens that could follow.
    """

    logprob: list[float] = field(default_factory=list)
    """Log-probability of the chosen token."""
    margin: list[float] = field(default_factory=list)
    """Log-probability of the likeliest token less that of the second."""
    entropy: list[float] = field(default_factory=list)
    """Entropy of the distribution, in nats."""
    judges: list[tuple[float, float]] = field(default_factory=list)
    """Log-probability of the chosen token by the model alone, and by the second opinion; zeros where none leans the choice."""

    @classmethod
    def of(cls, tokens: Iterable[Any]) -> Scores:
        """The scores of tokens that carry theirs as ``logprob``, ``margin``, ``entropy`` and ``judges``."""
        scores = cls()
        for token in tokens:
            scores.append(token)
        return scores

    def append(self, token: Any) -> None:
        """Add one token's."""
        self.logprob.append(token.logprob)
        self.margin.append(token.margin)
        self.entropy.append(token.entropy)
        self.judges.append(token.judges)

    def first(self, n: int) -> Scores:
        """The scores of the first ``n`` tokens."""
        return Scores(self.logprob[:n], self.margin[:n], self.entropy[:n], self.judges[:n])


def signals(scores: Scores) -> dict[str, float]:
    """One number a signal, each the larger the surer; an answer without tokens is as unsure as can be."""
    if not scores.logprob:
        return dict.fromkeys(SIGNALS, -math.inf)
    total = sum(scores.logprob)
    return {
        "logprob": total,
        "mean_logprob": total / len(scores.logprob),
        "min_logprob": min(scores.logprob),
        "margin": min(scores.margin),
        "entropy": -max(scores.entropy),
    }


def action_probability(scores: Scores) -> float:
    """The probability of an action among all known ones and ``[REMOTE]``, from the scores of its tokens; 0 without tokens."""
    return math.exp(sum(scores.logprob)) if scores.logprob else 0.0


def agreement(scores: Scores) -> float:
    """The mean of what model and second opinion each give the action, so that both have to be sure of it; 0 without tokens."""
    if not scores.judges:
        return 0.0
    return sum(math.exp(sum(logs)) for logs in zip(*scores.judges, strict=True)) / 2


@dataclass(frozen=True)
class Calibration:
    """A map from a signal to the chance that the device's action is right, and the least chance that is kept."""

    signal: str
    values: tuple[float, ...]
    """Values of the signal, increasing."""
    chances: tuple[float, ...]
    """The chance of a right action at each value, never decreasing; linear between, constant outside."""
    threshold: float
    """A known action is kept if its chance is at least this, or by ``least``. Above 1: nothing is."""
    report: dict[str, Any] = field(default_factory=dict)
    """How it was fitted, and what it measured."""
    skills: tuple[str, ...] | None = None
    """The actions it was made for; None: those of the packaged robot set, or ``tools``."""
    least: float | None = None
    """Least value of the signal that is kept, where a bound was tested on the signal itself; None: the chance decides."""
    tools: tuple[dict[str, Any], ...] | None = None
    """The actions with arguments that it was made for, in OpenAI's form."""
    opinion: str | None = None
    """SHA-256 of the second opinion that weighed the probabilities, a file beside it; None: the model decided alone."""

    def __post_init__(self) -> None:
        if self.signal not in ALL:
            raise ConfigError(f"signal is {self.signal!r} but must be one of {', '.join(ALL)}")
        if not self.values or len(self.values) != len(self.chances):
            raise ConfigError(
                f"a calibration has {len(self.values)} values and {len(self.chances)} chances but needs equally many, at least "
                "one; calibrate again"
            )
        if not all(math.isfinite(x) for x in (*self.values, *self.chances, self.threshold, self.least or 0.0)):
            raise ConfigError("a calibration holds a number that is not finite; calibrate again")
        rising = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        rising = rising and all(a <= b for a, b in zip(self.chances, self.chances[1:], strict=False))
        if not rising:
            raise ConfigError(
                "the values of a calibration must increase and its chances must not decrease; calibrate again"
            )
        if self.skills is not None:
            checked(self.skills, "a calibration")
        if self.tools is not None and self.skills is not None:
            raise ConfigError("a calibration has skills and also tools; calibrate again")
        if self.opinion is not None and (self.signal not in CHOSEN or self.tools is not None):
            raise ConfigError("a calibration has a second opinion but is not for chosen actions; calibrate again")

    def confidence(self, scores: Scores) -> float:
        """The chance that an action with these scores (of its own tokens) is right."""
        return self.at(self.value(scores))

    def value(self, scores: Scores) -> float:
        """The value of the signal for these scores."""
        if self.signal == AGREEMENT:
            return agreement(scores)
        return action_probability(scores) if self.signal == ACTION else signals(scores)[self.signal]

    def keeps(self, value: float) -> bool:
        """Whether a known action with this value of the signal is kept."""
        return self.at(value) >= self.threshold if self.least is None else value >= self.least

    def at(self, value: float) -> float:
        """The chance at a value of the signal; 0 for one that is not a number."""
        if math.isnan(value):
            return 0.0
        right = bisect_right(self.values, value)
        if right == 0:
            return self.chances[0]
        if right == len(self.values):
            return self.chances[-1]
        x0, x1 = self.values[right - 1], self.values[right]
        y0, y1 = self.chances[right - 1], self.chances[right]
        return y0 + (y1 - y0) * (value - x0) / (x1 - x0)

    def save(self, file: str | Path) -> None:
        """Write as JSON, without what is None: such a file is what it was before there were ``skills`` and ``least``."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        write_json(Path(file), {"format": _FORMAT, **content})

    @staticmethod
    def load(file: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: if the file is missing, damaged, or of another format.
        """
        try:
            content = parse_json(Path(file).read_bytes())
        except OSError as error:
            raise ConfigError(f"the calibration '{file}' cannot be read ({error.strerror}); calibrate again") from error
        except ValueError as error:
            raise ConfigError(f"the calibration '{file}' {error}; calibrate again") from error
        kept = ("signal", "values", "chances", "threshold", "report")
        if (
            not isinstance(content, dict)
            or content.get("format") != _FORMAT
            or content.keys() - {"skills", "least", "tools", "opinion"} != {"format", *kept}
        ):
            raise ConfigError(f"'{file}' is no calibration of format {_FORMAT}; calibrate again")
        lists = [content["values"], content["chances"], [content["threshold"], content.get("least", 0.0)]]
        if not all(isinstance(x, list) and all(type(v) in (int, float) for v in x) for x in lists):
            raise ConfigError(f"'{file}' holds something that is not a number; calibrate again")
        if not isinstance(content["report"], dict):
            raise ConfigError(f"'{file}' has a report that is no object; calibrate again")
        skills = content.get("skills")
        if "skills" in content and not isinstance(skills, list):
            raise ConfigError(f"'{file}' has skills that are no list; calibrate again")
        tools = content.get("tools")
        if "tools" in content and not isinstance(tools, list):
            raise ConfigError(f"'{file}' has tools that are no list; calibrate again")
        opinion = content.get("opinion")
        if "opinion" in content and not (isinstance(opinion, str) and re.fullmatch("[0-9a-f]{64}", opinion)):
            raise ConfigError(f"'{file}' has an opinion that is no digest; calibrate again")
        if content["signal"] == AGREEMENT and opinion is None:
            raise ConfigError(f"'{file}' has the signal {AGREEMENT} but no second opinion; calibrate again")
        content.update(values=tuple(content["values"]), chances=tuple(content["chances"]))
        numbers = {name: content[name] for name in kept}
        known = {name: None if given is None else tuple(given) for name, given in {"skills": skills, "tools": tools}.items()}
        return Calibration(**numbers, **known, least=content.get("least"), opinion=opinion)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Decision:
    """Who answers, and why."""

    where: str
    """``device`` or ``cloud``."""
    reason: str
    action: str | None = None
    """The action the device's answer starts with."""
    confidence: float | None = None
    """Chance that the action is right; None without a calibration or without an action."""
    value: float | None = None
    """What the confidence was read from: the value of the calibration's signal."""


class Router:
    """Decides on the device's answer.

    Args:
        parse: text -> the action it starts with, ``"REMOTE"``, or None; must not change its mind when text is added.
        calibration: None keeps every known action.
    """

    def __init__(self, parse: Callable[[str], str | None], calibration: Calibration | None = None) -> None:
        self.parse = parse
        self.calibration = calibration

    def decide(self, pieces: Sequence[str], scores: Scores) -> Decision:
        """Decide on an answer, given token by token.

        Args:
            pieces: the text that each token added. scores: of the same tokens. What follows the action does not count.
        """
        n, action = decisive(pieces, self.parse)
        if action is None:
            return Decision(CLOUD, UNKNOWN)
        if action == REMOTE:
            return Decision(CLOUD, TAGGED, action)
        if self.calibration is None:
            return Decision(DEVICE, KNOWN, action)
        value = self.calibration.value(scores.first(n))
        kept = self.calibration.keeps(value)
        return Decision(DEVICE if kept else CLOUD, KNOWN if kept else UNSURE, action, self.calibration.at(value), value)

    def lost(self, pieces: Sequence[str], scores: Scores) -> bool:
        """Whether an unfinished answer will go to the cloud however it goes on, so that the device may stop."""
        return settled(pieces, self.parse) and self.decide(pieces, scores).where == CLOUD


def parts_probability(pieces: Sequence[str], scores: Scores, starts: Sequence[int]) -> list[float]:
    """The probability of each part of an answer that says one thing, given those before it; their product is that of all.

    Args:
        starts: where in the text each part begins, increasing. A token belongs to the last part that begins before the token's
            end, and what stands before the first part to the first.
    """
    logs, end = [0.0] * len(starts), 0
    for piece, logprob in zip(pieces, scores.logprob, strict=True):
        end += len(piece)
        logs[max(bisect_right(starts, end - 1) - 1, 0)] += logprob
    return [math.exp(log) for log in logs]


def settled(pieces: Sequence[str], parse: Callable[[str], str | None]) -> bool:
    """Whether it is certain which action an unfinished answer has, or that it will have none."""
    text = "".join(pieces).lstrip()
    if not text:
        return False
    longest = getattr(parse, "longest", LONGEST_TAG)  # a call with arguments is longer than a tag
    return parse(text) is not None or not text.startswith("[") or len(text) > longest


def decisive(pieces: Sequence[str], parse: Callable[[str], str | None]) -> tuple[int, str | None]:
    """How many tokens it takes until the action is known, and the action; all of them and None if there is none."""
    text = ""
    for n, piece in enumerate(pieces, 1):
        text += piece
        action = parse(text)
        if action is not None:
            return n, action
    return len(pieces), None

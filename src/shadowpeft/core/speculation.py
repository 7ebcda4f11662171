"""Speculative decoding without a model: which drafted tokens stay, and when drafting one more is worth its cost.

The rule for sampling is that of speculative sampling (Leviathan et al., arXiv 2211.17192, Algorithm 1): what comes out has the
target's distribution, whatever the draft is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def accept_greedy(drafted: list[int], likeliest: list[int]) -> tuple[list[int], int]:
    """The tokens that greedy decoding would have given.

    Args:
        drafted: ``n`` tokens. likeliest: the target's choice at each of them and after the last, ``n + 1``.

    Returns:
        The new tokens, at least one: the drafted ones up to the first that differs, then the target's own; and how many of
        them were drafted.
    """
    kept = 0
    while kept < len(drafted) and drafted[kept] == likeliest[kept]:
        kept += 1
    return [*drafted[:kept], likeliest[kept]], kept


def accept_sampled(
    drafted: list[int], draft: list[Tensor], target: list[Tensor], generator: torch.Generator | None = None
) -> tuple[list[int], int]:
    """Tokens that are distributed as if each had been drawn from the target.

    A drafted token stays with probability ``min(1, p / q)``. The first that does not is drawn anew from what the target has
    more than the draft, ``max(p - q, 0)``; if all stay, one more comes from the target.

    Args:
        drafted: ``n`` tokens, each drawn from its ``draft``. draft: ``n`` distributions ``q`` ``(V,)``.
        target: ``n + 1`` distributions ``p`` ``(V,)``.
        generator: source of the random numbers; None: torch's own.

    Returns:
        As :func:`accept_greedy`.
    """
    for place, (token, q, p) in enumerate(zip(drafted, draft, target, strict=False)):
        u = torch.rand((), generator=generator, dtype=torch.float64)
        if float(u) * float(q[token]) < float(p[token]):
            continue
        left = (p - q).clamp(min=0)
        if not bool(left.sum() > 0):  # p = q but for rounding, so that nothing is left to draw from
            left = p
        return [*drafted[:place], draw(left, generator)], place
    return [*drafted, draw(target[len(drafted)], generator)], len(drafted)


def draw(weights: Tensor, generator: torch.Generator | None = None) -> int:
    """One index ``i`` with a probability proportional to ``weights[i]`` ``(V,)``, by the inverse of their running sum.

    In float64 on the CPU, so that a seed gives the same token on every device.
    """
    total = weights.double().cpu().cumsum(-1)
    u = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    place = int(torch.searchsorted(total, u, right=True))
    return min(place, int(torch.searchsorted(total, total[-1])))


_BINS = 10
_PRIOR = 4.0
"""Drafts that what is expected of a bin counts for, before any was verified.

Of a greedy draft the square of its confidence is expected to be right. A two-layer shadow of SmolLM2-135M that had learnt its
texts was right in as many cases as it was confident, and on other texts in a third to two thirds of them (LOG.md). A drawn
token of small probability is accepted if the target gives it as much, so confidence says less there: it starts halfway
between the confidence and ``_START``.
"""
_START, _MEMORY = 0.7, 0.95
"""Share of drafts accepted that is expected at first, and how slowly what is seen changes it."""
_KEPT = 0.98
"""Weight that what a bin knows keeps with each draft that falls into it."""
_WINDOW, _PAUSE = 8, 16
"""Rounds that are looked back on, and rounds without a draft after some that did not pay; doubled each time they do not."""


class Gate:
    """Decides how many tokens to draft, and when to stop before.

    A round begins with a plan: the number of drafts that promises most tokens for its cost. The draft's own confidence is no
    probability of being accepted, since a model may be sure and wrong; so the gate keeps, for each tenth of confidence, how
    many drafts were accepted. A further token is drafted while it, or the rest of the plan, is expected to save more than it
    costs. If rounds gained less than they cost, drafting is off for a while.

    Everything depends on tokens and confidences alone, never on a clock, so an answer drawn with a seed can be drawn again.

    Args:
        draft_cost: price of drafting a token. pass_costs: price of a verifying pass over 1, 2, ... tokens. Both in units of a
            pass over one token.
        sampled: whether tokens are drawn.
    """

    def __init__(self, draft_cost: float, pass_costs: Sequence[float], *, sampled: bool = False) -> None:
        self._costs = [price + place * draft_cost for place, price in enumerate(pass_costs)]
        self.draft_cost = draft_cost
        self._drafted = [_PRIOR] * _BINS
        middles = [(place + 0.5) / _BINS for place in range(_BINS)]
        self._accepted = [_PRIOR * ((middle + _START) / 2 if sampled else middle**2) for middle in middles]
        self._share = _START
        self._gains: list[float] = []
        self._left, self._pause = 0, _PAUSE
        self.pauses = 0
        """How often drafting was switched off because it did not pay."""

    def plan(self) -> int:
        """How many tokens to draft in a round, at most; called once a round."""
        if self._left:
            self._left -= 1
            return 0
        sizes = range(1, len(self._costs))
        return max(sizes, key=lambda n: self._expected(n + 1) / self._costs[n], default=0)

    def _expected(self, tokens: int) -> float:
        """``1 + a + a^2 + ...``, so many terms, of the share ``a`` that is accepted."""
        return float(sum(self._share**n for n in range(tokens)))

    def chance(self, confidence: float) -> float:
        """The probability that a draft with this confidence, in 0..1, is accepted if all before it were."""
        place = self._bin(confidence)
        return self._accepted[place] / self._drafted[place]

    @staticmethod
    def _bin(confidence: float) -> int:
        return min(int(confidence * _BINS), _BINS - 1)

    def wants(self, drafted: int, planned: int, before: float, confidence: float) -> bool:
        """Whether to draft one more token.

        Args:
            drafted: how many there are. planned: what :meth:`plan` said. before: probability that all of them are accepted.
            confidence: the draft's, in the next one; not a number (damaged weights) is no reason to draft.
        """
        if math.isnan(confidence):
            return False
        chance = before * self.chance(confidence)
        alone = self._costs[drafted + 1] - self._costs[drafted]
        rest = self._costs[planned] - self._costs[drafted]
        return chance > alone or chance * self._expected(planned - drafted) > rest

    def learn(self, confidences: list[float], accepted: int, looked: int) -> None:
        """What became of a round.

        Args:
            confidences: of its drafts. accepted: how many of them stayed. looked: times the draft's head was computed; one more
                than there are drafts if the gate then stopped.
        """
        judged = confidences[: accepted + 1]  # what comes after a rejected one was not
        for place, confidence in enumerate(judged):
            at = self._bin(confidence)
            self._drafted[at] = _KEPT * self._drafted[at] + 1.0
            self._accepted[at] = _KEPT * self._accepted[at] + (place < accepted)
            self._share = _MEMORY * self._share + (1.0 - _MEMORY) * (place < accepted)
        drafts = len(confidences)
        price = self._costs[drafts] - self._costs[0] + (looked - drafts) * self.draft_cost
        self._gains = [*self._gains[-_WINDOW + 1 :], accepted - price]
        if len(self._gains) < _WINDOW:
            return
        if sum(self._gains) < 0.0:
            self.pauses += 1
            self._left, self._pause, self._gains = self._pause, 2 * self._pause, []
        else:
            self._pause = _PAUSE


class Drafts:
    """What is drafted of one answer in one round.

    Args:
        gate: decides how much; None: ``most`` tokens. most: tokens that there is room for.

    Attributes:
        tokens: the drafts so far. shares: for each what :meth:`add` was given. looked: times the draft was asked.
    """

    def __init__(self, gate: Gate | None, most: int) -> None:
        self._gate = gate
        self.planned = 0 if most <= 0 else most if gate is None else min(most, gate.plan())
        self.tokens: list[int] = []
        self.shares: list[Any] = []
        self.looked, self._stopped = 0, False
        self._confidences: list[float] = []
        self._chance = 1.0

    @property
    def go_on(self) -> bool:
        """Whether the draft is to be asked for one more."""
        return not self._stopped and len(self.tokens) < self.planned

    def stop(self) -> None:
        """Draft no more in this round."""
        self._stopped = True

    def add(self, p: Tensor, choose: Callable[[], int], share: Any) -> None:
        """One more token, which ``choose`` gives, unless the gate wants none.

        Args:
            p: the draft's probabilities ``(V,)``. share: kept beside the token, for who verifies it.
        """
        self.looked += 1
        confidence = float(p.max())
        if self._gate is not None:
            if not self._gate.wants(len(self.tokens), self.planned, self._chance, confidence):
                self.stop()
                return
            self._chance *= self._gate.chance(confidence)
        self.tokens.append(choose())
        self.shares.append(share)
        self._confidences.append(confidence)

    def learn(self, accepted: int) -> None:
        """Tell the gate how many of the drafts stayed."""
        if self._gate is not None and self.looked:
            self._gate.learn(self._confidences, accepted, self.looked)

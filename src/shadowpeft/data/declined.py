"""What the shadow says to the attached model where an answer begins: a device's ``[REMOTE]``, or the vote of its own shadow.

The attached model answers freely, so it may begin with an action where the device rightly found none. The two are joined where
an answer begins, as a product of experts (Hinton, 2002): the odds that it begins with an action are the model's own times the
device's, ``(1 - p) / p`` for a ``[REMOTE]`` of probability ``p``. A device that is barely sure changes little, and a model
that is surer of an action than the device is of none still acts.

Without a device in front the adapter's own shadow is asked (:mod:`shadowpeft.vote`). Its chances of all actions also weigh
which one the answer begins with; of calls with arguments it weighs whether there is one, and the model writes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shadowpeft.data.action_trie import Actions, ActionTrie, Choices, Leaning
from shadowpeft.data.actions import REMOTE

_BEGINS = re.compile(r"\s*\[(?:[^\W\d]\w*)?")
_LEAST = 1e-6
"""Of either chance: no answer is ruled out by a device alone."""


class Beginnings:
    """The tokens that an action, ``[Name()]``, can begin with.

    Args:
        tokens: them. vocabulary: rows of the model's head, V.

    Attributes:
        all: every token ``(V,)``. words: the others ``(V - tokens,)``.
    """

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self.tokens, self.all = list(tokens), torch.arange(vocabulary)
        self._here = torch.zeros(vocabulary, dtype=torch.float64)
        self._here[self.tokens] = 1.0
        self.words = self.all[self._here == 0]

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> Beginnings:
        """Those of a tokenizer: the bracket, spaces aside, with nothing behind it or the beginning of a name."""
        known, special = range(min(len(tokenizer), vocabulary)), set(tokenizer.all_special_ids)
        texts = zip(known, tokenizer.batch_decode([[token] for token in known]), strict=True)
        return cls([n for n, text in texts if _BEGINS.fullmatch(text) and n not in special], vocabulary)

    def leaning(self, chance: float) -> Tensor:
        """The logarithm of the odds of an action, at the tokens that begin one, else 0: ``(V,)`` float64."""
        remote = min(max(chance, _LEAST), 1.0 - _LEAST)
        return self._here * (math.log1p(-remote) - math.log(remote))


def may_change(chance: float, acts: bool) -> bool:
    """Whether a device's ``[REMOTE]`` of that probability may change a greedy answer, by whether that acts by itself: if it is
    likelier than not, it changes no answer in words."""
    return acts or chance < 0.5


class Declined:
    """One answer to a request for which a device found no action: free, and an action is as unlikely as the device says. White
    space before an action is not looked through: no answer that was learnt begins so.

    Args:
        chance: the probability of the device's ``[REMOTE]``, 0 to 1.
    """

    def __init__(self, begin: Beginnings, chance: float) -> None:
        self._begin, self._chance = begin, chance

    def allowed(self, path: Sequence[int]) -> Any:
        """All tokens ``(V,)`` where the answer begins, since they lean; behind that none is named, so any may follow."""
        return [] if path else self._begin.all

    def forced(self, path: Sequence[int]) -> list[int]:
        """Nothing."""
        return []

    def leaning(self, path: Sequence[int]) -> Tensor | None:
        """What is added to the logits where the answer begins."""
        return None if path else self._begin.leaning(self._chance)


class InWords:
    """One answer that begins with no action, and is free after its first token."""

    def __init__(self, begin: Beginnings) -> None:
        self._words = begin.words

    def allowed(self, path: Sequence[int]) -> Any:
        """Where the answer begins all tokens but those that an action begins with; behind that none is named."""
        return [] if path else self._words

    def forced(self, path: Sequence[int]) -> list[int]:
        """Nothing."""
        return []

    def leaning(self, path: Sequence[int]) -> None:
        """Nothing."""
        return None


class DeclinedRequests:
    """The same of many requests, as :func:`shadowpeft.generate.answer` takes it.

    Args:
        chances: request -> probability of the device's ``[REMOTE]``; every request is among them.
    """

    def __init__(self, begin: Beginnings, chances: Mapping[str, float]) -> None:
        self._begin, self._chances = begin, chances

    def start(self, prompt: str = "") -> Declined:
        """Of one answer."""
        return Declined(self._begin, self._chances[prompt])


class Voted:
    """One answer that the shadow's chances weigh: free, but what begins an action goes on as one of the known.

    Args:
        trie: the known actions and ``REMOTE``. chances: the shadow's, of each of them.
        declined: the probability of a device's ``[REMOTE]``, which counts instead of the shadow's: the device is a shadow too.
    """

    def __init__(
        self, begin: Beginnings, trie: ActionTrie, chances: Mapping[str, float], declined: float | None = None
    ) -> None:
        self._first = Declined(begin, chances[REMOTE] if declined is None else declined)
        self._then = Leaning(trie, {**chances, REMOTE: 0.0})

    def allowed(self, path: Sequence[int]) -> Any:
        """All tokens ``(V,)`` where the answer begins; behind the beginning of an action those that go on with one."""
        return self._then.allowed(path) if path else self._first.allowed(path)

    def forced(self, path: Sequence[int]) -> list[int]:
        """What an action that has begun must go on with."""
        return self._then.forced(path) if path else []

    def leaning(self, path: Sequence[int]) -> Any:
        """What is added to the logits of the tokens that may follow."""
        return self._then.leaning(path) if path else self._first.leaning(path)


class VotedCalls:
    """One answer that begins a call as likely as the shadow and the model together say, and is held to valid calls from there.

    Args:
        calls: what holds an answer that has begun a call; words are free. chance: the shadow's of no call, 0 to 1, or of a
            device's ``[REMOTE]``.
    """

    def __init__(self, begin: Beginnings, calls: Choices, chance: float) -> None:
        self._first, self._then = Declined(begin, chance), calls

    def allowed(self, path: Sequence[int]) -> Any:
        """All tokens ``(V,)`` where the answer begins; behind the beginning of a call those that go on with it."""
        return self._then.allowed(path) if path else self._first.allowed(path)

    def forced(self, path: Sequence[int]) -> list[int]:
        """What a call that has begun must go on with."""
        return list(self._then.forced(path)) if path else []

    def leaning(self, path: Sequence[int]) -> Any:
        """What is added to the logits where the answer begins."""
        return self._then.leaning(path) if path else self._first.leaning(path)


class Vote:
    """The same of one prompt, as :func:`shadowpeft.generate.answer` takes it.

    Args:
        chances: the shadow's, of every action and ``REMOTE``. calls: of tools with arguments, what holds an answer that has
            begun a call.
    """

    def __init__(
        self, begin: Beginnings, trie: ActionTrie, chances: Mapping[str, float], calls: Actions | None = None
    ) -> None:
        self._begin, self._trie, self.chances, self._calls = begin, trie, chances, calls

    def start(self, prompt: str = "") -> Voted | VotedCalls:
        """Of one answer, whatever the request: the shadow has read the whole prompt."""
        if self._calls is None:
            return Voted(self._begin, self._trie, self.chances)
        return VotedCalls(self._begin, self._calls.start(prompt), self.chances[REMOTE])

"""The known actions as a tree of tokens, along which a model can choose one of them and say nothing else.

Why no grammar engine: one such as ``llguidance`` gives a mask for the next token. Here the tree itself is needed. The
probability of *every* action asks for all branches at once, and the tokens must be those that training saw, where a grammar
allows every way of cutting the text into tokens. The tree of some hundred names is a dictionary. An engine has its place where
a call has arguments, whose schema is no finite list; it stands behind ``allowed`` and ``forced`` too
(:mod:`shadowpeft.data.call_guide`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from shadowpeft.data.actions import REMOTE, checked, written
from shadowpeft.data.chat import answer_ids
from shadowpeft.data.second_opinion import check_actions
from shadowpeft.decode import decode
from shadowpeft.errors import ConfigError

if TYPE_CHECKING:
    from shadowpeft.data.second_opinion import SecondOpinion

Path = tuple[int, ...]
_LEAST = 1e-12  # a chance: no action is ruled out by an opinion alone


class Choices(Protocol):
    """What the beginning of one answer is held to: all that decoding asks of a list of actions, or of a grammar."""

    def allowed(self, path: Sequence[int]) -> Any:
        """Tokens that may follow the first tokens of an answer, a list or a tensor; empty: any may."""

    def forced(self, path: Sequence[int]) -> list[int]:
        """Tokens that must follow."""

    def leaning(self, path: Sequence[int]) -> Any:
        """What is added to the logits of the tokens that may follow, in their order, a list or a tensor; None: nothing."""


class Actions(Protocol):
    """What answers may begin with."""

    def start(self, prompt: str = "") -> Choices:
        """Of one answer to a request, the user's last message."""


class ActionTrie:
    """Actions and the tokens of each, from the first of the answer on.

    Args:
        opinion: a classifier whose chances weigh the model's, where the request is known.

    Attributes:
        actions: their names, in order.
        tokens: of each action. longest: how many the longest has.
        stem: tokens that all begin with.
        branches: each path after which several tokens may follow, and those tokens; a path comes after those it begins with.

    Raises:
        ConfigError: if there are fewer than two actions, or the tokens of one begin with all those of another.
    """

    def __init__(self, tokens: Mapping[str, Sequence[int]], opinion: SecondOpinion | None = None) -> None:
        if len(tokens) < 2:
            raise ConfigError(f"there is {len(tokens)} action to choose from; name at least two")
        self.tokens: dict[str, Path] = {name: tuple(ids) for name, ids in tokens.items()}
        for (one, short), (other, long) in pairwise(sorted(self.tokens.items(), key=lambda pair: pair[1])):
            if short == long:
                raise ConfigError(
                    f"the tokenizer writes the actions '{one}' and '{other}' with the same tokens; rename one of them"
                )
            if long[: len(short)] == short:
                raise ConfigError(
                    f"the tokens of the action '{other}' begin with all those of '{one}', which could never be chosen; rename "
                    "one of them"
                )
        self.actions, self.opinion = tuple(self.tokens), opinion
        self.longest = max(map(len, self.tokens.values()))
        following: dict[Path, set[int]] = {}
        for ids in self.tokens.values():
            for depth, token in enumerate(ids):
                following.setdefault(ids[:depth], set()).add(token)
        self._following = {path: sorted(after) for path, after in following.items()}
        wide = [(path, after) for path, after in self._following.items() if len(after) > 1]
        self.branches: dict[Path, list[int]] = dict(sorted(wide, key=lambda pair: (len(pair[0]), pair[0])))
        self.stem = min(self.branches, key=len)

    @classmethod
    def of(cls, tokenizer: Any, skills: Iterable[str], opinion: SecondOpinion | None = None) -> ActionTrie:
        """The trie of ``[Skill()]`` for each of ``skills``, and ``[REMOTE]``, as ``tokenizer`` writes them in an answer.

        Raises:
            ConfigError: as the class; if the opinion is about other actions; if a name is none; if the tokens of an action do
                not read as it, or change with what follows the action before it is told from the others.
        """
        turn = [{"role": "user", "content": "a"}]
        texts = {name: written(name) for name in (*checked(skills, "the list of actions"), REMOTE)}
        if opinion is not None:
            check_actions(opinion.actions, texts)
        trie = cls({name: answer_ids(tokenizer, turn, text, closed=False) for name, text in texts.items()}, opinion)
        for name, text in texts.items():
            ids = trie.tokens[name]
            read = decode(tokenizer, ids).strip()
            if read != text:
                raise ConfigError(
                    f"the tokenizer reads the tokens of the action '{text}' back as '{read}'; give it a name in letters that "
                    "the tokenizer knows"
                )
            decided = 1 + max(len(path) for path in trie.branches if ids[: len(path)] == path)
            before_words = answer_ids(tokenizer, turn, f"{text} a", closed=False)
            if tuple(before_words[:decided]) != ids[:decided]:
                raise ConfigError(
                    f"the tokenizer writes the action '{text}' with other tokens where words follow, so it cannot be told from "
                    "the other actions; rename it"
                )
        return trie

    def some(self, names: Iterable[str]) -> ActionTrie:
        """The same of these actions and ``[REMOTE]`` alone."""
        kept = {*names, REMOTE}
        return ActionTrie({name: ids for name, ids in self.tokens.items() if name in kept}, self.opinion)

    def start(self, prompt: str = "") -> Choices:
        """What one answer is held to: the trie has no state; with an opinion, it leans as the opinion of ``prompt`` says."""
        return self if self.opinion is None else Leaning(self, self.opinion.chances(prompt))

    def leaning(self, path: Sequence[int]) -> None:
        """Nothing: without an opinion the model decides alone."""
        return None

    def allowed(self, path: Sequence[int]) -> list[int]:
        """Tokens that may follow the first tokens of an answer; empty once an action is complete."""
        return self._following.get(tuple(path[: self.longest]), [])

    def forced(self, path: Sequence[int]) -> list[int]:
        """Tokens that must follow, up to the next branch or the end of the action."""
        whole = list(path)
        while len(after := self.allowed(whole)) == 1:
            whole += after
        return whole[len(path) :]

    @cached_property
    def steps(self) -> list[list[tuple[int, int]]]:
        """For each action the ``(branch, child)`` it takes: places in ``branches`` and in the tokens after it."""
        return [
            [
                (n, after.index(ids[len(path)]))
                for n, (path, after) in enumerate(self.branches.items())
                if ids[: len(path)] == path
            ]
            for ids in self.tokens.values()
        ]


class Leaning:
    """A trie whose branches lean to what an opinion finds likely.

    The share of a token is the sum of the chances of the actions that go on with it, of all that are still possible.
    """

    def __init__(self, trie: ActionTrie, chances: Mapping[str, float]) -> None:
        self._trie, self._chances = trie, chances

    def allowed(self, path: Sequence[int]) -> list[int]:
        return self._trie.allowed(path)

    def forced(self, path: Sequence[int]) -> list[int]:
        return self._trie.forced(path)

    def leaning(self, path: Sequence[int]) -> list[float] | None:
        after = self._trie.allowed(path)
        if len(after) < 2:
            return None
        shares, depth = dict.fromkeys(after, 0.0), len(path)
        for name, ids in self._trie.tokens.items():
            if ids[:depth] == tuple(path):
                shares[ids[depth]] += self._chances[name]
        whole = math.fsum(shares.values())
        return [math.log(max(_LEAST, share / whole if whole else 1 / len(shares))) for share in shares.values()]

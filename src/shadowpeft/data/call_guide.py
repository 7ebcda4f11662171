"""What may follow in an answer that a grammar holds: the engine ``llguidance`` behind ``allowed`` and ``forced``, which are
all that decoding asks (:mod:`shadowpeft.data.action_trie` is the special case of a list).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shadowpeft.data.call_form import COMPACT, CallForm
from shadowpeft.data.tool_grammar import MOST_CALLS, calls_grammar, refusal, schema_grammar
from shadowpeft.data.tools import Tools
from shadowpeft.errors import ConfigError
from shadowpeft.versions import require_llguidance


class Engine:
    """A tokenizer as ``llguidance`` sees it; making one takes a second.

    Args:
        tokenizer: of transformers, fast. vocabulary: rows of the model's head, if it has more than the tokenizer has tokens.

    Raises:
        ConfigError: if ``llguidance`` is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None) -> None:
        require_llguidance()
        from llguidance.hf import from_tokenizer

        self._end: int = tokenizer.eos_token_id
        try:
            self.tokenizer = from_tokenizer(
                tokenizer, max(vocabulary or 0, len(tokenizer)), eos_token=tokenizer.eos_token_id
            )
        except ValueError as error:
            raise ConfigError(
                f"llguidance cannot read the tokenizer ({str(error).splitlines()[0]}); use a fast one"
            ) from error

    def calls(
        self,
        tools: Tools,
        *,
        hand_on: bool,
        most: int = MOST_CALLS,
        optional: bool = False,
        form: CallForm = COMPACT,
    ) -> Grammar:
        """Calls of ``tools``; see :func:`~shadowpeft.data.tool_grammar.calls_grammar`, and :class:`Grammar`.

        Raises:
            ConfigError: if an argument's schema says what the engine does not know.
        """
        if optional:  # white space is the beginning of words too
            form = replace(form, lead="")
        grammar = calls_grammar(tools, hand_on=hand_on, calls=most, form=form)
        closed, trigger = None if form == COMPACT else self._end, form.trigger if form.words else None
        return Grammar(self, grammar, optional=optional, closed=closed, trigger=trigger)

    def schema(
        self, schema: dict[str, Any], tools: Tools | None = None, most: int = MOST_CALLS, form: CallForm = COMPACT
    ) -> Grammar:
        """One JSON value of a schema, or up to ``most`` calls of ``tools``, and nothing more; raises as :meth:`calls`."""
        return Grammar(self, schema_grammar(schema, tools, calls=most, form=form), closed=self._end)


class RefusedSchemaError(ConfigError):
    """The engine knows less than a schema has; ``clause`` says what."""

    def __init__(self, clause: str) -> None:
        super().__init__(f"the engine refuses the schema ({clause}); simplify it")
        self.clause = clause


class Grammar:
    """A compiled grammar.

    Args:
        optional: whether an answer may do without it: then it is held from the first token that the grammar could begin with.
        closed: the token that ends an answer behind a text of the grammar; None: what follows is free.
        trigger: of an optional one: the token from which on an answer is held, wherever it stands; None: the first.

    Raises:
        RefusedSchemaError: if the engine refuses it.
    """

    def __init__(
        self,
        engine: Engine,
        grammar: str,
        *,
        optional: bool = False,
        closed: int | None = None,
        trigger: int | None = None,
    ) -> None:
        from llguidance import LLMatcher

        self.optional, self.closed, self.trigger = optional, closed, trigger
        self._first = LLMatcher(engine.tokenizer, grammar, log_level=0)
        if self._first.is_error():
            raise RefusedSchemaError(refusal(self._first.get_error()))

    def start(self, prompt: str = "") -> Guide:
        """What one answer is held to, whatever the request."""
        return Guide(self._first.deep_copy(), optional=self.optional, closed=self.closed, trigger=self.trigger)


class Guide:
    """How far one answer is in a grammar. It follows the tokens that it is shown; an answer read again may be shorter."""

    def __init__(self, matcher: Any, *, optional: bool, closed: int | None, trigger: int | None) -> None:
        self._matcher, self._optional, self._closed, self._trigger = matcher, optional, closed, trigger
        self._read: list[int] = []

    def _held(self, path: Sequence[int]) -> Sequence[int] | None:
        """The tokens that the grammar is about; None: it has not begun."""
        if not self._optional:
            return path
        if self._trigger is None:
            return path or None
        return path[path.index(self._trigger) :] if self._trigger in path else None

    def _at(self, path: Sequence[int]) -> bool:
        """Move to after ``path``; whether the grammar goes on there."""
        pairs = enumerate(zip(self._read, path, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(self._read), len(path)))
        if same < len(self._read):
            if not self._matcher.rollback(len(self._read) - same):
                self._matcher.reset()
                same = 0
            del self._read[same:]
        for token in path[same:]:
            # what the grammar does not know is text after its end, or an answer that did without it
            if self._matcher.is_stopped() or not self._matcher.validate_tokens([token]):
                return False
            self._matcher.consume_token(token)
            self._read.append(token)
        return not self._matcher.is_stopped()

    def allowed(self, path: Sequence[int]) -> list[int] | Tensor:
        """Tokens that may follow the first tokens of an answer; empty: any may."""
        held = self._held(path)
        if held is None:
            return []
        if not self._at(held):  # an answer of which the grammar knows nothing has done without it
            return [self._closed] if self._closed is not None and (self._read or not self._optional) else []
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.flatnonzero(np.unpackbits(bits, bitorder="little")))

    def forced(self, path: Sequence[int]) -> list[int]:
        """Tokens that must follow."""
        held = self._held(path)
        return list(self._matcher.compute_ff_tokens()) if held is not None and self._at(held) else []

    def leaning(self, path: Sequence[int]) -> None:
        """Nothing: the model decides alone."""
        return None

"""How calls are written into an answer: the compact form of :mod:`shadowpeft.data.calls`, or the form of a chat template.

A template's form is read off from what it writes for calls of two probes, so no model's is listed here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from shadowpeft.chat_template import render, render_prompt
from shadowpeft.errors import DataError

_NAMES = ("probe_first", "probe_second")
_IDS = ("call00001", "call00002")
_ARGUMENTS = '{"key": 1}'
_SCHEMA = {"type": "object", "properties": {"key": {"type": "integer"}}}
_TOOLS = [{"type": "function", "function": {"name": n, "description": "", "parameters": _SCHEMA}} for n in _NAMES]


@dataclass(frozen=True)
class CallForm:
    """The fixed pieces of calls: ``begin name opens key value, key value closes [between name ...] end``."""

    begin: str = "["
    opens: str = "("
    closes: str = ")"
    between: str | None = ", "
    """None: an answer has one call at most."""
    end: str = "]"
    quoted: bool = False
    """Whether arguments are one JSON object; else they are ``name=value``."""
    words: bool = False
    """Whether words may stand before the calls."""
    tokens: tuple[tuple[str, int], ...] = ()
    """Texts in the pieces that are one token, and which: no words have them."""

    @property
    def trigger(self) -> int | None:
        """The token that calls begin with, if it is one that no words have."""
        return next((token for text, token in self.tokens if self.begin.startswith(text)), None)

    def key(self, name: str) -> str:
        """What stands before the value of an argument."""
        return f"{json.dumps(name, ensure_ascii=False)}: " if self.quoted else f"{name}="


COMPACT = CallForm()


def template_form(tokenizer: Any) -> CallForm | None:
    """How the tokenizer's chat template writes the calls of an answer.

    None: it writes none, or in a way that is not a name with a JSON object of arguments between fixed texts: with an identity
    in it, key by key, or with special tokens, which no text shows.
    """
    plain, one, two, words = (
        _tail(tokenizer, content, count) for content, count in (("b", 0), ("", 1), ("", 2), ("b", 1))
    )
    if plain is None or one is None:
        return None
    closing = plain.partition("b")[2]
    begin, named, rest = one.partition(_NAMES[0])
    middle, found, end = rest.partition(_ARGUMENTS)
    if not named or not found or not end.endswith(closing) or not begin.strip() or any(i in one for i in _IDS):
        return None
    end = end[: len(end) - len(closing)]
    between = None
    if two is not None:
        first = f"{begin}{_NAMES[0]}{middle}{_ARGUMENTS}"
        between = two[len(first) :].partition(_NAMES[1])[0]
        if two != f"{first}{between}{_NAMES[1]}{middle}{_ARGUMENTS}{end}{closing}":
            between = None
    pieces = (begin, middle, between or "", end)
    added = {
        token: each for token, each in tokenizer.added_tokens_decoder.items() if any(each.content in p for p in pieces)
    }
    if any(each.special for each in added.values()):
        return None
    return CallForm(
        begin.lstrip(),
        middle + "{",
        "}",
        between,
        end,
        quoted=True,
        words=words is not None and words.startswith("b"),
        tokens=tuple((each.content, token) for token, each in added.items()),
    )


def _tail(tokenizer: Any, content: str, count: int) -> str | None:
    """What the template writes for an answer with so many calls; None: it refuses them, or rewrites the prompt."""
    asked = [{"role": "user", "content": "a"}]
    calls = [
        {"id": identity, "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}}
        for identity, name in zip(_IDS[:count], _NAMES, strict=False)
    ]
    answer = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
    try:
        prompt = render_prompt(tokenizer, asked, tools=_TOOLS)
        whole = render(tokenizer, [*asked, answer], tools=_TOOLS)
    except (DataError, TypeError):
        return None
    return whole[len(prompt) :] if whole.startswith(prompt) else None

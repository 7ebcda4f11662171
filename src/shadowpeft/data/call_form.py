"""How calls are written into an answer: the compact form of :mod:`shadowpeft.data.calls`, or the form of a chat template.

A template's form is read off from what it writes for calls of two probes, so no model's is listed here. By hand, since the
``parse_response`` of transformers needs a description that few tokenizers bring, and no grammar can be made from that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from shadowpeft.chat_template import render, render_prompt
from shadowpeft.errors import DataError

_NAMES, _IDS = ("probe_first", "probe_second", "probe_third"), ("call00001", "call00002", "call00003")
_KEYS, _VALUES = ("key_first", "key_second"), (7301, "some words")
_SCHEMA = {"type": "object", "properties": dict(zip(_KEYS, ({"type": "integer"}, {"type": "string"}), strict=True))}
_TOOLS = [{"type": "function", "function": {"name": n, "description": "", "parameters": _SCHEMA}} for n in _NAMES]


@dataclass(frozen=True)
class CallForm:
    """The fixed pieces of calls: ``begin call [between call ...] end``. A call is ``name opens [argument joint argument ...]
    closes``, and an argument ``key_begin key key_end value value_end``."""

    lead: str = ""
    """White space that may stand before all of it."""
    begin: str = "["
    opens: str = "("
    key_begin: str = ""
    key_end: str = "="
    value_end: str = ""
    joint: str = ", "
    closes: str = ")"
    between: str | None = ", "
    """None: an answer has one call at most."""
    end: str = "]"
    raw: bool = False
    """Whether a text is written as it is; else every value is JSON."""
    words: bool = False
    """Whether words may stand before the calls."""
    tokens: tuple[tuple[str, int], ...] = ()
    """Texts in the pieces that are one token, and which: no words have them."""

    @property
    def trigger(self) -> int | None:
        """The token that calls begin with, if it is one that no words have."""
        return dict(self.tokens).get(self.mark)

    @property
    def mark(self) -> str:
        """The text by which a call is known before it is whole: that of :attr:`trigger`, or all that calls begin with."""
        return next((text for text, _ in self.tokens if self.begin.startswith(text)), self.begin.strip())

    @property
    def pieces(self) -> tuple[str, ...]:
        """The fixed texts."""
        between = self.between or ""
        return (self.begin, self.opens, self.key_begin, self.key_end, self.value_end, self.closes, between, self.end)


COMPACT = CallForm()


def template_form(tokenizer: Any) -> CallForm | None:
    """How the tokenizer's chat template writes the calls of an answer.

    None: it writes none, or neither as a name with a JSON object of arguments nor argument by argument, between fixed texts:
    with an identity or the name a second time in it, or with special tokens, which no text shows.
    """
    plain, one = _tail(tokenizer, "b"), _tail(tokenizer, "", [1])
    if plain is None or one is None:
        return None
    closing = plain.partition("b")[2]
    begin, named, rest = one.partition(_NAMES[0])
    if not named or not rest.endswith(closing) or not begin.strip() or any(each in begin + rest for each in (*_NAMES, *_IDS)):
        return None
    form = _as_object(tokenizer, rest, closing) or _by_argument(tokenizer, begin, rest, closing)
    if form is None:
        return None
    two, three = _tail(tokenizer, "", [1, 1]), _tail(tokenizer, "", [1, 1, 1])
    words = _tail(tokenizer, "b", [1])
    call = rest[: len(rest) - len(closing) - len(form.end)]  # what stands between a name and the end
    between = None
    if two is not None:
        between = two[len(begin + _NAMES[0] + call) :].partition(_NAMES[1])[0]
        joined = [f"{between}{name}{call}" for name in _NAMES[1:]]
        last = f"{form.end}{closing}"
        if (two, three) != tuple(f"{begin}{_NAMES[0]}{call}{''.join(joined[:n])}{last}" for n in (1, 2)):
            between = None
    may_speak = words is not None and words.lstrip().startswith("b")
    bare = begin.lstrip()
    form = replace(form, lead=begin[: len(begin) - len(bare)], begin=bare, between=between, words=may_speak)
    added = {t: a for t, a in tokenizer.added_tokens_decoder.items() if any(a.content in piece for piece in form.pieces)}
    if any(each.special for each in added.values()):
        return None
    return replace(form, tokens=tuple((each.content, token) for token, each in added.items()))


def _as_object(tokenizer: Any, rest: str, closing: str) -> CallForm | None:
    """The form of a call whose arguments are a JSON object, from what follows its name; None: they are none."""
    middle, found, end = rest.partition(json.dumps({_KEYS[0]: _VALUES[0]}))
    both = json.dumps(dict(zip(_KEYS, _VALUES, strict=True)))
    if not found or f"{middle}{both}{end}" not in (_tail(tokenizer, "", [2]) or ""):
        return None
    end = end[: len(end) - len(closing)]
    return CallForm(opens=middle + "{", key_begin='"', key_end='": ', closes="}", end=end)


def _by_argument(tokenizer: Any, begin: str, one: str, closing: str) -> CallForm | None:
    """The form of a call whose arguments have texts around each key and value; None: it has another."""
    zero, two = _tail(tokenizer, "", [0]), _tail(tokenizer, "", [2])
    head = begin + _NAMES[0]
    if zero is None or two is None or not zero.startswith(head) or not two.startswith(head):
        return None
    before, _, rest = one.partition(_KEYS[0])
    key_end, _, after = rest.partition(str(_VALUES[0]))
    zero, two = zero[len(head) :], two[len(head) :]
    opens = before[: next(n for n, pair in enumerate(zip_longest(before, zero)) if pair[0] != pair[1])]
    if opens.rfind("<") > opens.rfind(">"):  # the next tags begin alike
        opens = opens[: opens.rfind("<")]
    key_begin, rest = before[len(opens) :], zero[len(opens) :]
    value_end = after[: len(after) - len(rest)]
    arguments = (f"{key_begin}{key}{key_end}{value}{value_end}" for key, value in zip(_KEYS, _VALUES, strict=True))
    if not value_end.strip() or not key_begin or two != f"{opens}{''.join(arguments)}{rest}":
        return None
    end = rest[: len(rest) - len(closing)]
    return CallForm(
        opens=opens,
        key_begin=key_begin,
        key_end=key_end,
        value_end=value_end,
        joint="",
        closes="",
        end=end,
        raw=True,
    )


def _tail(tokenizer: Any, content: str, arguments: Iterable[int] = ()) -> str | None:
    """What the template writes for an answer whose calls have so many arguments; None: it refuses, or rewrites the prompt."""
    asked, pairs = [{"role": "user", "content": "a"}], [*zip(_KEYS, _VALUES, strict=True)]
    calls = [
        {"id": identity, "type": "function", "function": {"name": name, "arguments": dict(pairs[:count])}}
        for identity, name, count in zip(_IDS, _NAMES, arguments, strict=False)
    ]
    answer = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}
    try:
        prompt = render_prompt(tokenizer, asked, tools=_TOOLS)
        whole = render(tokenizer, [*asked, answer], tools=_TOOLS)
    except (DataError, TypeError):
        return None
    return whole[len(prompt) :] if whole.startswith(prompt) else None

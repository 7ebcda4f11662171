"""Tokens to text, whole or one by one. A character may lie in several tokens: no half of one is ever given out.

transformers' own clean-up of spaces (" ." to ".") is never applied: it makes text shorter while it grows, and a stream would
lose what comes after.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

_HALF = "\ufffd"
"""What tokenizers put in place of bytes that are no character, or not yet one."""
_CONTEXT = 8
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Decoder:
    """The text of tokens that come one by one; joined with the end, the pieces are :func:`decode` of all.

    Args:
        skip_special_tokens: leave out the tokenizer's special tokens, which have an empty piece then.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip, self.bytes = tokenizer, skip_special_tokens, TokenBytes(tokenizer)
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._context: list[int] = []
        """Tokens whose text was given out last: what a token means may depend on the one before it."""
        self._held: list[int] = []
        """Tokens that end in the middle of a character."""

    def push(self, token: int) -> str:
        """The text that is certain with this token; empty in the middle of a character."""
        waiting = [*self._held, token]
        held, _ = self._cut(waiting)
        ready, self._held = waiting[: len(waiting) - held], waiting[len(waiting) - held :]
        before, both = self.text(self._context), self.text([*self._context, *ready])
        # a decoder may rewrite what it gave; what is new is then the text of the new tokens alone
        new = both[len(before) :] if both.startswith(before) else self.text(ready)
        self._context = ready if new else [*self._context, *ready][-_CONTEXT:]
        return new

    def finish(self) -> str:
        """The rest of the text; a character that has not ended is left out."""
        return self._cut(self._held)[1]

    def text(self, ids: Sequence[int]) -> str:
        """The tokenizer's own text of tokens, with a replacement for each part that is no character."""
        return str(
            self._tokenizer.decode(list(ids), skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        )

    def _cut(self, ids: Sequence[int]) -> tuple[int, str]:
        """How many of the last tokens a character lies in that has not ended, and what they hold before it."""
        parts = [b"" if token in self._skipped else self.bytes(token) for token in ids]
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(b"".join(parts))
        missing, held, end = len(utf8.getstate()[0]), 0, b""
        while len(end) < missing:
            held += 1
            end = parts[-held] + end
        return held, end[: len(end) - missing].decode("utf-8", "replace")


def decode(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text of tokens; a character that has not ended is left out."""
    decoder = Decoder(tokenizer, skip_special_tokens=skip_special_tokens)
    text = decoder.text(ids)
    if _HALF not in text:
        return text
    return "".join(decoder.push(token) for token in ids) + decoder.finish()


class TokenBytes:
    """The bytes that a token stands for; those of an answer's tokens joined are the answer in UTF-8.

    Of a tokenizer that marks words by a leading space, that space belongs to the token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.loads(backend.decoder.__getstate__()) if backend is not None and backend.decoder else {}
        self._byte_level = any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ())))

    def __call__(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""  # a model may have more rows than the tokenizer has tokens
        if token in self._added:
            return piece.encode()
        if self._byte_level:
            return bytes(_BYTES[character] for character in piece if character in _BYTES)
        match = _BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level tokenizers (GPT-2): printable bytes stand for themselves, the others for 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()

"""The tokenizer of a base, an edge model or an adapter."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.aliases import looked_up, source_of
from shadowpeft.messages import shorten


class Readable:
    """Turns what a damaged tokenizer raises into a :class:`ConfigError` that starts with ``what``.

    The library behind the fast tokenizers raises ``Exception`` itself, which no ``except`` can name without naming all.

    Args:
        private: a path that is nobody's business and is left out of the message. advice: what follows it.
    """

    def __init__(self, what: str, private: str = "", advice: str = "") -> None:
        self.what, self.private, self.advice = what, private, advice

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and (kind is Exception or isinstance(error, (OSError, ValueError, KeyError, TypeError))):
            reason = shorten(error).replace(self.private, "its folder") if self.private else shorten(error)
            raise ConfigError(f"{self.what} could not be loaded: {reason}{self.advice}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an alias, a folder or a Hub id, with a pad token.

    Raises:
        ConfigError: if it cannot be loaded, or has neither a pad nor an eos token.
    """
    source = source_of(name)
    with Readable(f"the tokenizer of '{name}'", advice=looked_up(name)):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of '{name}' has neither a pad nor an eos token; give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

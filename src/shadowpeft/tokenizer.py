"""The tokenizer of a base, an edge model or an adapter."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.aliases import source_of
from shadowpeft.messages import shorten


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an alias, a folder or a Hub id, with a pad token.

    Raises:
        ConfigError: if it cannot be loaded, or has neither a pad nor an eos token.
    """
    source = source_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the tokenizer of '{name}' could not be loaded: {shorten(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of '{name}' has neither a pad nor an eos token; give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

"""Rotary positions whose frequencies depend on how long a text is."""

from __future__ import annotations

from typing import Any

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of scaling, as transformers names them, that turn long texts at other frequencies than short ones."""


def turns_by_length(config: Any) -> bool:
    """Whether a token's key depends on how long the text is that is read with it: what is read in pieces then differs from what
    is read at once, where the pieces are on both sides of a limit."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    waiting = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if found.get("rope_type", found.get("type")) in _BY_LENGTH:
                return True
            waiting += found.values()  # of each kind of layer
    return False


def limit_of(config: Any) -> int:
    """Tokens up to which the frequencies are those of short texts, where they depend on the length."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scaling = getattr(text, "rope_parameters", None) or {}
    limits = (getattr(text, "original_max_position_embeddings", None), scaling.get("original_max_position_embeddings"))
    return int(next((limit for limit in limits if limit), text.max_position_embeddings))

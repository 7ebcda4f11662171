"""Rotary positions whose frequencies depend on how long a text is."""

from __future__ import annotations

from typing import Any

_BY_LENGTH = ("dynamic", "longrope")
"""Kinds of scaling, as transformers names them, that turn long texts at other frequencies than short ones."""


def turns_by_length(config: Any) -> bool:
    """Whether a token's key depends on how long the text is that is read with it: what is read in pieces then differs from what
    is read at once, where the pieces are on both sides of a limit."""
    return limit_of(config) is not None


def limit_of(config: Any) -> int | None:
    """Tokens up to which all frequencies are those of short texts; None: they do not depend on the length."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    waiting = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    limits: list[int] = []
    while waiting:
        found = waiting.pop()
        if not isinstance(found, dict):
            continue
        kind, limit = found.get("rope_type", found.get("type")), text.max_position_embeddings
        if kind == "longrope":
            own = "original_max_position_embeddings"
            limit = found.get(own) or getattr(text, own, None) or limit
        if kind in _BY_LENGTH:
            limits.append(int(limit))
        waiting += found.values()  # of each kind of layer
    return min(limits, default=None)

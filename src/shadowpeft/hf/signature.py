"""What the forward of a transformers module takes: names differ between architectures."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

CACHE_NAMES = ("past_key_values", "cache_params")
"""What architectures call their key-value cache or recurrent state."""


class Signature:
    """The parameters of one module's forward."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(type(module).forward).parameters
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        self.names = tuple(n for n, p in parameters.items() if p.kind not in kinds)[1:]
        self.passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        """Whether it takes keyword arguments that it does not name."""
        self.cache = next((name for name in CACHE_NAMES if name in self.names), CACHE_NAMES[0])
        """The name of its key-value cache."""

    def by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Positional arguments turned into keyword arguments."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def accepts(self, name: str) -> bool:
        """Whether the forward takes a keyword argument of this name."""
        return name in self.names or self.passes_on

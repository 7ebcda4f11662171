"""Outputs whose copies keep what the shadow adds to them: its losses, logits and state, as attributes beside the fields."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any, ClassVar

import torch
from transformers.utils import ModelOutput

BESIDE = ("task_loss", "shadow_loss", "shadow_logits", "shadow_state")
"""What an output has beside its fields, in attributes."""


class _Key(str):
    """The name of an output's field, and beside it what the output holds in attributes."""

    beside: dict[str, Any]


class _Keeping:
    """Put before a class of outputs: a copy made of ``items()`` has the attributes too.

    accelerate makes such a copy to turn 16-bit outputs into float32. As fields, the shadow's losses and logits would be in
    ``to_tuple()``, and in the predictions of a Trainer.
    """

    plain: ClassVar[type]
    """The class of outputs itself."""

    def __post_init__(self) -> None:
        output: Any = self
        first = fields(output)[0].name
        given = getattr(output, first)
        beside: dict[str, Any] = {}
        if isinstance(given, dict):
            beside = next((key.beside for key in given if isinstance(key, _Key)), beside)
            setattr(output, first, {str(key): value for key, value in given.items()})
        super().__post_init__()  # type: ignore[misc]
        for name, value in beside.items():
            setattr(output, name, value)

    def items(self) -> Any:
        beside = {name: value for name, value in vars(self).items() if name in BESIDE}
        keyed = {}
        for name, value in super().items():  # type: ignore[misc]
            key = _Key(name)
            key.beside = beside
            keyed[key] = value
        return keyed.items()

    def __reduce__(self) -> Any:
        return _restored, (self.plain, {str(name): value for name, value in self.items()}, vars(self))


@cache
def _keeping(kind: type) -> type:
    """The subclass of a class of outputs whose copies keep their attributes."""
    return type(f"Shadow{kind.__name__}", (_Keeping, kind), {"__module__": __name__, "plain": kind})


def _restored(kind: type, items: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """An output as it was pickled or copied."""
    output = kind()
    for name, value in items.items():
        output[name] = value
    vars(output).update(attributes)
    return keep_beside(output)


def keep_beside(output: Any) -> Any:
    """``output`` itself, whose attributes :data:`BESIDE` outlive accelerate's copy of it. Compiled code keeps its class."""
    if isinstance(output, ModelOutput) and not isinstance(output, _Keeping) and not torch.compiler.is_compiling():
        kind: Any = type(output)
        output.__class__ = _keeping(kind)
    return output

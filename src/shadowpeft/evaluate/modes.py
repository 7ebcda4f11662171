"""A model in one of its modes: with its adapter, its shadow alone, or without adapter; or a PEFT model of another method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.helpers import DoraCaching
from torch import nn
from transformers import PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.generate import evaluating
from shadowpeft.hf.detach import DETACHED, detach
from shadowpeft.hf.layer import find_hub

MODES = ("attached", "detached", "base", "lora", "dora")


@contextmanager
def runner_in_mode(model: Any, mode: str) -> Iterator[Any]:
    """The model to run for ``mode``, in eval mode.

    ``attached``: with its shadow adapter; ``detached``: the shadow alone, or a model that is one (:func:`detach` made it);
    ``base``: adapters off; ``lora``, ``dora``: a PEFT model of that method as it is.

    Raises:
        ConfigError: for another mode, or a model of another method.
    """
    if mode not in MODES:
        raise ConfigError(f"mode is '{mode}' but must be one of {', '.join(MODES)}")
    with evaluating(model):
        if mode == "attached":
            find_hub(model)
            yield model
        elif mode == "detached":
            yield model if _is_edge(model) else detach(model).eval()
        elif mode == "base":
            if hasattr(model, "disable_adapter"):
                with model.disable_adapter():
                    yield model
            else:
                yield model
        else:
            method = _peft_method(model)
            if method != mode:
                raise ConfigError(f"mode is '{mode}' but the model is {method}; pass a PEFT model of that method")
            with norms_kept(model):
                yield model


def _is_edge(model: Any) -> bool:
    """Whether a model is a detached shadow."""
    return isinstance(model, PreTrainedModel) and bool(getattr(model.config, DETACHED, False))


@contextmanager
def norms_kept(model: nn.Module) -> Iterator[None]:
    """Inside, PEFT's DoRA layers compute the norm of their merged matrix once, not at each forward: no weight may change. Other
    models run as always; the model is in evaluation mode afterwards.

    PEFT empties what it keeps when a model goes to training; that is done before, so that no norm of older weights is used,
    and after, so that none is left.
    """
    model.train().eval()
    try:
        with DoraCaching():
            yield
    finally:
        model.train().eval()


def _peft_method(model: Any) -> str:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return f"a {type(model).__name__} without adapter"
    active = configs[model.active_adapter]
    kind = str(getattr(active.peft_type, "value", active.peft_type)).lower()
    return "dora" if kind == "lora" and getattr(active, "use_dora", False) else kind

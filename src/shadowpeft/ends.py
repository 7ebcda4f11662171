"""Where a model that leaves this package stops: at every token that ended an answer in training, not only at the base's end."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from shadowpeft.chat_template import stop_tokens


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ids of the model's own ends, the tokenizer's, and what the chat template closes a turn with, ascending.

    A template that refuses a lone user's turn does not say how it closes one, so only the first two are left.
    """
    try:
        return stop_tokens(model, tokenizer)
    except ValueError:
        return sorted({*_configured(model), tokenizer.eos_token_id} - {None})


def generation_config(model: PreTrainedModel, tokenizer: Any = None, recorded: Iterable[int] = ()) -> GenerationConfig:
    """A copy of the model's settings that names every end: its own, the tokenizer's and those ``recorded`` in training."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    ends = sorted({*_configured(model), *recorded, *(end_tokens(model, tokenizer) if tokenizer is not None else ())})
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    return config


def _configured(model: PreTrainedModel) -> set[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    return set(configured if isinstance(configured, list) else [configured]) - {None}

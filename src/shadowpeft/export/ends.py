"""Where an exported model stops: at every token that ended an answer in training, not only at the base's own end."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from shadowpeft.data.chat import stop_tokens


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Ids of the model's own ends, the tokenizer's, and what the chat template closes a turn with, ascending.

    A template that refuses a lone user's turn does not say how it closes one, so only the first two are left.
    """
    try:
        return stop_tokens(model, tokenizer)
    except ValueError:
        configured = getattr(model.generation_config, "eos_token_id", None)
        ends = configured if isinstance(configured, list) else [configured]
        return sorted({*ends, tokenizer.eos_token_id} - {None})


def generation_config(model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """A copy of the model's settings that names every end."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    ends = end_tokens(model, tokenizer)
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    return config

"""Where an exported model stops: at every token that ended an answer in training, not only at the base's own end."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from shadowpeft.data.chat import stop_tokens


def generation_config(model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """A copy of the model's settings that names every end: its own, the tokenizer's, and what closes a turn of the template."""
    config = copy.deepcopy(model.generation_config) or GenerationConfig()
    ends = stop_tokens(model, tokenizer)
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    return config

"""A folder that plain transformers loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shadowpeft.ends import generation_config

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Save weights as ``dtype`` (f32, f16 or bf16), configuration, ends and tokenizer; ``model`` stays as it was."""
    narrow: Any = copy.deepcopy(model)
    narrow.generation_config = generation_config(model, tokenizer)
    narrow.to(DTYPES[dtype]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"loads with": "transformers"}


def read(folder: Path) -> PreTrainedModel:
    """The model of a folder, in the numbers of its file."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()

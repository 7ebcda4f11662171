"""int8 and int4 weights by torchao, in a folder that transformers loads where torchao is installed.

The token table and the head are most of a shadow, so they are quantised too, always to int8 with one scale a row. A tied head
is untied first, since torchao's tensors cannot be shared in a file; the two still take half the bytes of one float32 table.

Biases stay as they are. So does a token table of a class of its own, such as Gemma 3's, which scales what it looks up: after
loading quantised weights transformers does not set the scale of such a module, which no file holds.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao import quantization
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from shadowpeft.ends import generation_config

GROUP = 32


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Quantise a copy of ``model`` to ``dtype`` (int8 or int4) and save it with its tokenizer.

    int8: one scale an output row. int4: groups of 32 inputs, or a row where 32 does not divide them, in the decoder layers;
    torchao has no packed int4 for CPUs, so a file holds a byte for each weight, and int4 is smaller only once packed for a GPU.
    """
    plain = untied(model)
    plain.generation_config = generation_config(model, tokenizer)
    rows = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=quantization.PerAxis(0))
    plan: dict[str, Any] = {}
    for name, module in plain.named_modules():
        weight = f"{name}.weight"  # the module's name would mean its bias too
        if type(module) is nn.Embedding or module is plain.get_output_embeddings():
            plan[weight] = rows
        elif isinstance(module, nn.Linear):
            plan[weight] = rows if dtype == "int8" else _int4(module.in_features)
    settings = TorchAoConfig(quantization.FqnToConfig(plan), include_input_output_embeddings=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as between:
        plain.save_pretrained(between)
        quantised = AutoModelForCausalLM.from_pretrained(between, quantization_config=settings, dtype=torch.float32)
    quantised.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"loads with": "transformers and torchao", "quantised": len(plan)}


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose head has a matrix of its own."""
    plain: Any = copy.deepcopy(model)
    if plain.config.tie_word_embeddings:
        head = plain.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        plain.config.tie_word_embeddings = False
    return plain  # type: ignore[no-any-return]


def _int4(width: int) -> Any:
    groups = quantization.PerGroup(GROUP) if width % GROUP == 0 else quantization.PerAxis(0)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)  # type: ignore[attr-defined]


def read(folder: Path) -> PreTrainedModel:
    """The quantised model of a folder."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()

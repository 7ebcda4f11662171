"""ONNX through ``torch.onnx``, scoring only: the logits of whole texts, any number of rows and tokens, for onnxruntime.

The graph has no key-value cache, so whoever generates with it reads the whole text again for each token.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.ends import generation_config
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.messages import shorten

FILE = "model.onnx"
USE = "scoring only: no key-value cache"
"""Stands in the report and in the file's metadata, under ``use``."""


class _Logits(nn.Module):
    """``input_ids`` and ``attention_mask`` ``(B, T)`` to logits ``(B, T, V)``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return out.logits  # type: ignore[no-any-return]


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Write ``model.onnx`` (weights beside it where torch puts them), configuration, ends of an answer and tokenizer.

    Raises:
        UnsupportedModelError: if torch cannot trace the architecture into a graph of free sizes.
    """
    inner = copy.deepcopy(model).eval()
    inner.set_attn_implementation("eager")
    ids = torch.arange(14).reshape(2, 7) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = ["input_ids", "attention_mask"]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                _Logits(inner).eval(),
                (ids, mask),
                dynamo=True,
                input_names=inputs,
                output_names=["logits"],
                dynamic_shapes=(free, dict(free)),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UnsupportedModelError(
            f"torch could not trace {type(model).__name__} into an ONNX graph ({shorten(error)}); choose another format"
        ) from error
    program.model.metadata_props["use"] = USE
    program.save(folder / FILE, external_data=True)
    model.config.save_pretrained(folder)
    generation_config(model, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"loads with": "onnxruntime", "inputs": inputs, "cache": "none", "use": USE}


def read(folder: Path, head_dim: int = 0) -> Callable[[Tensor, Tensor], SimpleNamespace]:
    """The graph on onnxruntime: ``input_ids`` and ``attention_mask`` ``(B, T)`` to ``.logits`` ``(B, T, V)``, float32.

    Args:
        head_dim: numbers of a head, for a graph that takes a cache; it gets an empty one.
    """
    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    heads = {entry.name: entry.shape[1] for entry in session.get_inputs() if entry.name.startswith("past_key_values.")}

    def logits(input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        inputs |= {name: np.zeros((len(input_ids), n, 0, head_dim), np.float32) for name, n in heads.items()}
        return SimpleNamespace(logits=torch.from_numpy(session.run(["logits"], inputs)[0]))

    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on operators that no language model has."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

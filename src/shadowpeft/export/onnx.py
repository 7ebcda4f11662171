"""ONNX through ``torch.onnx``: logits of a whole text, with any number of rows and tokens, for onnxruntime.

There is no key-value cache in the graph: to generate, a caller reads the whole text again for each token.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.errors import ConfigError, UnsupportedModelError

FILE = "model.onnx"
_NOISY = ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


class _Logits(nn.Module):
    """``input_ids`` and ``attention_mask`` ``(B, T)`` to logits ``(B, T, V)``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Any = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return out.logits  # type: ignore[no-any-return]


class OnnxModel:
    """An exported model on onnxruntime's CPU provider, called like a transformers model."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """``.logits`` ``(B, T, V)``, float32, of ``input_ids`` and ``attention_mask`` ``(B, T)``, int64."""
        given = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return SimpleNamespace(logits=torch.from_numpy(self.session.run(["logits"], given)[0]))


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Write ``model.onnx`` (weights beside it where torch puts them), the configuration and the tokenizer.

    Raises:
        ConfigError: if the packages are missing.
        UnsupportedModelError: if torch cannot trace the architecture into a graph of free sizes.
    """
    _packages()
    inner = copy.deepcopy(model).eval()
    inner.set_attn_implementation("eager")
    graph = _Logits(inner).eval()
    ids = torch.arange(14).reshape(2, 7) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                graph,
                (ids, mask),
                str(folder / FILE),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(free, dict(free)),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"torch could not trace {type(model).__name__} into an ONNX graph ({first}); choose another format"
        ) from error
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"loads with": "onnxruntime", "inputs": ["input_ids", "attention_mask"], "cache": "none"}


def read(folder: Path) -> OnnxModel:
    """The graph of a folder on onnxruntime."""
    runtime = _packages()
    return OnnxModel(runtime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"]))


def _packages() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the format onnx needs the package {error.name}; run: pip install 'shadowpeft[export]'"
        ) from error
    return onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on operators that no language model has."""
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    try:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

"""ONNX with a key-value cache, for onnxruntime-genai: its own model builder writes graph, configuration and tokenizer.

The builder is run as a program of its own, as its documentation does: it prints, and its modules are on ``sys.path``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.ends import generation_config
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import onnx


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Write ``model.onnx`` (inputs ids, mask and cache; outputs logits and cache), ``genai_config.json`` and the tokenizer.

    Raises:
        UnsupportedModelError: if the builder does not know the architecture, or would leave out its rotary scaling.
    """
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "llama3"):  # 0.18 builds a model with linear scaling as if it had none
        raise UnsupportedModelError(
            f"the model has rotary scaling of type '{rope}', which onnxruntime-genai may ignore; choose another format"
        )
    heads = getattr(model.config, "num_attention_heads", 1)
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    if width % 16:  # its attention with rotary positions; found by writing such a model
        raise UnsupportedModelError(
            f"the model has heads of {width} numbers, but onnxruntime's attention takes multiples of 16; choose another format"
        )
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        generation_config(model, tokenizer).save_pretrained(source)
        tokenizer.save_pretrained(source)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", str(folder)]
        options = ["-p", {"f32": "fp32"}[dtype], "-e", "cpu", "-c", f"{source}/cache"]
        run = subprocess.run([*builder, *options], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        found = re.search(r"\[Errno (\d+)\]", last)
        if found is not None and (number := int(found[1])) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise OSError(number, os.strerror(number), str(folder))  # which is not the format's fault
        raise UnsupportedModelError(
            f"onnxruntime-genai could not build {type(model).__name__} ({last[:200]}); choose another format"
        )
    generation_config(model, tokenizer).save_pretrained(folder)
    # the builder saves what AutoTokenizer makes of it, which splits text by the class of the model
    tokenizer.save_pretrained(folder)
    return {"loads with": "onnxruntime-genai", "cache": "past_key_values"}


def read(folder: Path) -> Callable[[Tensor, Tensor], SimpleNamespace]:
    """The graph on onnxruntime, from an empty cache."""
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    return onnx.read(folder, config["model"]["decoder"]["head_size"])

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
        UnsupportedModelError: if the builder does not know the architecture, or would leave out a part of it, naming what.
    """
    _check(model)
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)
        generation_config(model, tokenizer).save_pretrained(source)
        tokenizer.save_pretrained(source)
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", str(folder)]
        options = ["-p", {"f32": "fp32"}[dtype], "-e", "cpu", "-c", f"{source}/cache"]
        run = subprocess.run([*builder, *options], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
        last = last.replace(f"{source} model", "model").replace(source, "its folder")
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


def _check(model: PreTrainedModel) -> None:
    """Refuse what the builder drops without a word, and what it fails at without saying why; found by writing such models."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = any(isinstance(value, dict) for value in rope.values())  # Gemma 3: one set of numbers for each type of layer
    kind = "default" if by_layer else rope.get("rope_type", "default")
    window = window_of(config)
    trained, longest = getattr(config, "original_max_position_embeddings", None), config.max_position_embeddings
    refused = {
        f"a sliding window of {window} tokens, which onnxruntime-genai may ignore": window is not None,
        "rotary positions of more than one kind, which onnxruntime-genai's builder does not read": by_layer,
        # 0.18 builds a model with linear scaling as if it had none
        f"rotary scaling of type '{kind}', which onnxruntime-genai may ignore": kind not in ("default", "llama3"),
        f"{longest} positions but original_max_position_embeddings is {trained}, for which onnxruntime-genai's builder needs "
        "scaled rotary positions": type(model).__name__ == "Phi3ForCausalLM" and trained != longest,
    }
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    refused[f"heads of {width} numbers, but onnxruntime's attention takes multiples of 16"] = width % 16 != 0
    for feature, present in refused.items():
        if present:
            raise UnsupportedModelError(f"the {type(model).__name__} has {feature}; choose another format")


def window_of(config: Any) -> int | None:
    """How many tokens the layers with a sliding window see; None if there is no such layer, or it sees a whole text."""
    size, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    off = getattr(config, "use_sliding_window", True) is False or (types is not None and "sliding_attention" not in types)
    return None if size is None or off or size >= config.max_position_embeddings else int(size)


def read(folder: Path) -> Callable[[Tensor, Tensor], SimpleNamespace]:
    """The graph on onnxruntime, from an empty cache."""
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    return onnx.read(folder, config["model"]["decoder"]["head_size"])

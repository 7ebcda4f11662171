"""A folder that vLLM serves as it is: the base with the adapter attached, and beside them the edge model, which drafts.

The folder's own files are the base's, with a configuration that names the adapter and its class in ``shadowpeft-vllm``;
``adapter/`` is the adapter, ``edge/`` the detached model. vLLM reads the weights of the folder itself, none below it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from shadowpeft.ends import generation_config
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.export import hf
from shadowpeft.hf import formats
from shadowpeft.hf.base.aliases import source_of
from shadowpeft.hf.files.digests import write_sums
from shadowpeft.hf.files.locate import CONFIG, WEIGHTS, find_file
from shadowpeft.hf.files.reading import read_json
from shadowpeft.hf.load import named_base, read_config
from shadowpeft.messages import quote

ARCHITECTURES = {
    "llama": "ShadowPeftLlamaForCausalLM",
    "qwen2": "ShadowPeftQwen2ForCausalLM",
    "qwen3": "ShadowPeftQwen3ForCausalLM",
    "mistral": "ShadowPeftMistralForCausalLM",
    "gemma3_text": "ShadowPeftGemma3ForCausalLM",
    "qwen3_moe": "ShadowPeftQwen3MoeForCausalLM",
}
"""``model_type`` of a base -> its class in ``shadowpeft-vllm``, which a test compares with this."""
ADAPTER, EDGE = "adapter", "edge"


def attach(adapter: str, base: str | None, folder: Path) -> dict[str, Any]:
    """Put base and adapter into ``folder``, which exists. The base's weights are linked where the file system can, else copied.

    Returns:
        how many weight files of the base there are, and how many of them were copied.

    Raises:
        ConfigError: if ``adapter`` is no adapter of this package's format, or its base has no safetensors files.
        UnsupportedModelError: if ``shadowpeft-vllm`` has no class for the base, or the adapter trains modules of the base.
    """
    if formats.detect(adapter) != formats.OURS:
        raise ConfigError(
            f"'{adapter}' is not in this package's format, which vllm needs; run shadowpeft convert first"
        )
    config = read_config(adapter)
    if config.modules_to_save:
        raise UnsupportedModelError(
            f"the adapter trains modules of the base ({quote(config.modules_to_save)}), which shadowpeft-vllm cannot serve; "
            "use shadowpeft serve"
        )
    source = _folder_of(*((base, {}) if base is not None else named_base(config)))
    model = read_json(source / "config.json")
    kind = model.get("model_type")
    if kind not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the base is a {quote(kind)} model but shadowpeft-vllm serves {', '.join(ARCHITECTURES)}; use shadowpeft serve"
        )
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise ConfigError(
            f"the base in '{source}' has no safetensors files; save it with transformers and pass that with --base"
        )
    copied = sum(_bring(file, folder / file.name) for file in weights)
    for index in source.glob("*.safetensors.index.json"):
        shutil.copyfile(index, folder / index.name)
    (folder / ADAPTER).mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(find_file(adapter, name), folder / ADAPTER / name)
    model |= {"architectures": [ARCHITECTURES[kind]], "shadowpeft_adapter": ADAPTER}
    (folder / "config.json").write_text(json.dumps(model, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {"base files": len(weights), "base files copied": copied}


def _folder_of(name: str, options: dict[str, str]) -> Path:
    source = source_of(name)
    if Path(source).is_dir():
        return Path(source)
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json"]
    folder: str = snapshot_download(source, allow_patterns=patterns, revision=options.get("revision"))
    return Path(folder)


def _bring(file: Path, to: Path) -> bool:
    """Link a file, or copy it to another file system; whether it was copied."""
    try:
        os.link(file.resolve(), to)
    except OSError:
        shutil.copyfile(file, to)
        return True
    return False


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Beside what :func:`attach` wrote: ends, tokenizer, and the edge ``model`` in ``edge/`` as ``dtype``."""
    generation_config(model, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hf.write(model, tokenizer, folder / EDGE, dtype)
    write_sums(folder / EDGE)  # vLLM and a device read it without the rest
    return {"loads with": "vllm and shadowpeft-vllm", "draft model": EDGE}


def read(folder: Path) -> PreTrainedModel:
    """The edge model."""
    return hf.read(folder / EDGE)

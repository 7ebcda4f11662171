"""The models that are served or calibrated: an adapter's detached shadow, an edge model's folder, several adapters on a base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shadowpeft.errors import ConfigError


def is_edge_folder(path: str) -> bool:
    """Whether ``path`` is a stand-alone model (``shadowpeft detach``), not an adapter."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()


def load_edge(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of an edge folder.

    Raises:
        ConfigError: if it has no tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (Path(path) / "tokenizer_config.json").is_file():
        raise ConfigError(f"'{path}' has no tokenizer; make the folder with shadowpeft detach")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def load_adapters(named: dict[str, str], base: str | None) -> Any:
    """A ``PeftModel`` with every adapter of ``named`` (name -> folder) on one base."""
    import shadowpeft

    model: Any = None
    for name, folder in named.items():
        if model is None:
            model = shadowpeft.load(folder, base, adapter_name=name)
        else:
            model.load_adapter(folder, name)
    return model.eval()

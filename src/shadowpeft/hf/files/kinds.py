"""What a folder is that was given for an adapter and is none, and which one to give."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
PROJECTED = "causal_lm_with_hidden_projection"
"""``model_type`` of a projected checkpoint."""


def instead_of_adapter(folder: Path) -> str:
    """The rest of a sentence that begins with the name of ``folder``, which has no :data:`CONFIG`."""
    if (folder / "config.yaml").is_file():
        return _run(folder)
    if (folder / "config.json").is_file():
        return _model(folder)
    inside = sorted(file.parent for file in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"has no {CONFIG}, but folders in it have; give one of them, such as '{inside[0]}'"
    return f"has no {CONFIG}; give the folder that save_pretrained wrote"


def unfinished_run(path: Path) -> bool:
    """Whether ``path`` is where a run of ``shadowpeft train`` will put its adapter, and has not yet."""
    run = path.parent / "config.yaml"
    return path.name == "adapter" and not path.exists() and run.is_file() and not _pretrains(run)


def _run(folder: Path) -> str:
    adapter, shadow = folder / "adapter", folder / "shadow"
    if (adapter / CONFIG).is_file():
        return f"is the folder of a run; give its adapter, '{adapter}'"
    if _pretrains(folder / "config.yaml"):
        made = f"its shadow, '{shadow}', is what" if shadow.is_dir() else "its shadow, which is not there yet, is what"
        return f"is the folder of a pretraining run, which makes no adapter; {made} shadow.shadow_model of a run file takes"
    return "is the folder of a run that has no adapter yet; wait for its end, or go on with shadowpeft train --resume"


def _pretrains(run_file: Path) -> bool:
    try:
        return re.search(r"^backbone:", run_file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE) is not None
    except OSError:
        return False  # whoever opens it says so


def _model(folder: Path) -> str:
    content: Any = {}
    with suppress(OSError, ValueError, RecursionError):  # a damaged one says nothing of itself
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = content if isinstance(content, dict) else {}
    if "shadowpeft_adapter" in content:
        return f"is an export for vLLM; give its adapter, '{folder / 'adapter'}', or its edge model, '{folder / 'edge'}'"
    if content.get("model_type") == PROJECTED:
        return (
            f"is a pretrained shadow, a model and no adapter (it has no {CONFIG}); name it as shadow.shadow_model in a run "
            "file, or turn it into a stock model with shadowpeft convert"
        )
    if any(str(name).endswith("ForSequenceClassification") for name in content.get("architectures") or []):
        return f"is a classifier and no adapter (it has no {CONFIG}); give the adapter's folder, or load it with transformers"
    return (
        f"is a model and no adapter (it has no {CONFIG}); give the adapter's folder, or the model to a command that takes one: "
        "export, route calibrate, serve"
    )

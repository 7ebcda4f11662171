"""A run that goes on from a trained adapter: what its file need not say, since the adapter does.

Nothing here imports torch, so a wrong run file is refused at once.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json
from shadowpeft.settings import ShadowSettings

CONFIG = "adapter_config.json"
LOSSES = ("auxiliary_loss_weight", "shadow_loss")
"""Settings of the shadow that a run may change: they are of its training alone."""


def filled(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The content of a run file with base, task and shadow of the adapter that it goes on from, if it names one.

    Raises:
        ConfigError: if the adapter cannot be read, or the file says something else than it.
    """
    adapter = content.get("adapter")
    if not isinstance(adapter, str):
        return content
    saved = _saved(adapter, where)
    named = saved.get("base_alias") or saved.get("base_model_name_or_path")
    told = {**({"base": named} if named else {}), "task_type": saved.get("task_type", "CAUSAL_LM")}
    if content.get("task_type", told["task_type"]) != told["task_type"]:
        raise ConfigError(
            f"{where}: task_type is '{content['task_type']}' but the adapter '{adapter}' is for {told['task_type']}; leave it "
            "out"
        )
    given = content.get("shadow") or {}
    if not isinstance(given, dict):
        return content  # refused by its type
    own = _settings(saved)
    for key, value in given.items():
        if key in own and key not in LOSSES and value != own[key]:
            raise ConfigError(
                f"{where}: shadow.{key} is {value!r} but the adapter '{adapter}' has {own[key]!r}, which a run that goes on "
                "from it cannot change; leave it out"
            )
    return {**told, **content, "shadow": {**own, **given}}


def _saved(adapter: str, where: str) -> dict[str, Any]:
    file = Path(adapter) / CONFIG
    try:
        saved = parse_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{where}: adapter is '{adapter}', where no {CONFIG} can be read ({error.strerror}); give the folder of a trained "
            "adapter, such as run/adapter"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{where}: '{file}' {error}; save the adapter again") from error
    if not isinstance(saved, dict) or saved.get("peft_type") != "SHADOWPEFT":
        kind = saved.get("peft_type") if isinstance(saved, dict) else None
        raise ConfigError(
            f"{where}: '{adapter}' is no adapter of this package (its peft_type is {kind!r}); convert it first with shadowpeft "
            "convert, or leave 'adapter' out"
        )
    return saved


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """What a run file would have said of the shadow."""
    names = {field.name for field in fields(ShadowSettings)} - {"refined_layers"}
    own = {name: saved[name] for name in names if name in saved}
    layers = saved.get("refined_layers")
    own["last_layers"] = layers[1] - layers[0] + 1 if isinstance(layers, list) and len(layers) == 2 else None
    return own

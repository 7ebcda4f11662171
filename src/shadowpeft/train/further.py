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

    The record of a run says all of it, and is read without the adapter, which may be gone by then.

    Raises:
        ConfigError: if the adapter cannot be read, or the file says something else than it.
    """
    adapter, given = content.get("adapter"), content.get("shadow") or {}
    if not isinstance(adapter, str) or not isinstance(given, dict):
        return content  # refused by its type
    names = {field.name for field in fields(ShadowSettings)} - {"refined_layers"}
    recorded = {"base", "task_type"} <= content.keys() and names <= given.keys()
    if recorded and not (Path(adapter) / CONFIG).is_file():
        return content
    saved = _saved(adapter, where)
    base = saved.get("base_alias") or saved.get("base_model_name_or_path")  # an alias's copy is made anew where it is needed
    told = {"base": base, "task_type": saved.get("task_type", "CAUSAL_LM")}
    if content.get("task_type", told["task_type"]) != told["task_type"]:
        raise ConfigError(
            f"{where}: task_type is '{content['task_type']}' but the adapter '{adapter}' is for {told['task_type']}; leave it "
            "out"
        )
    usual = {field.name: field.default for field in fields(ShadowSettings)}
    own = {name: saved.get(name, usual[name]) for name in names} | {"last_layers": _last_layers(saved)}
    for key, value in given.items():
        if (key == "preset" and not recorded) or (key in own and key not in LOSSES and value != own[key]):
            has = "has settings of its own" if key == "preset" else f"has {own[key]!r}"
            raise ConfigError(
                f"{where}: shadow.{key} is {value!r} but the adapter '{adapter}' {has}, which a run that goes on from it "
                "cannot change; leave it out"
            )
    return {**{key: value for key, value in told.items() if value}, **content, "shadow": {**own, **given}}


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


def _last_layers(saved: dict[str, Any]) -> int | None:
    """How many of the base's last layers are corrected, if it is some of them and no others."""
    layers, shapes = saved.get("refined_layers"), (saved.get("base_fingerprint") or {}).get("shapes") or {}
    if not isinstance(layers, list) or len(layers) != 2 or layers[1] + 1 != shapes.get("num_hidden_layers"):
        return None
    return int(layers[1] - layers[0] + 1)

"""Named settings: the paper's, what makes the detached model better in short runs, and a device that chooses actions."""

from __future__ import annotations

from typing import Any

from shadowpeft.errors import ConfigError
from shadowpeft.settings import WIDTHS, ShadowSettings

_TUNED: dict[str, Any] = {
    "shadow_alpha": 0.5,
    "shadow_dropout": 0.1,
    "shadow_init": "base_layers",
    "auxiliary_loss_weight": 0.3,
}
_DEVICE: dict[str, Any] = {
    **_TUNED,
    "auxiliary_loss_weight": 1.0,
    "shadow_num_hidden_layers": 6,
    "variant": "scaled",
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {name: getattr(ShadowSettings, name) for name in _DEVICE},
    "tuned": {name: getattr(ShadowSettings, name) for name in _DEVICE} | _TUNED,
    "device": _DEVICE,
}
"""``paper``: the settings behind Table 1 where they are one for all tasks (the paper), which are the defaults. ``tuned``: for
the detached model, by the ablation of SmolLM2-135M in docs/results.md; for the attached one no gain was measured.
``device``: for a device that chooses among actions, by the search in docs/device-search.md."""
TRAINING: dict[str, dict[str, Any]] = {
    "device": {"shadow_epochs": 3, "learning_rate": 1e-2, "backbone_lr_ratio": 0.1, "warmup": 0.03},
}
"""What a run of a preset trains with, where it says nothing else."""


def preset(name: str, /, **given: Any) -> dict[str, Any]:
    """Fields of ``ShadowPeftConfig``: those of a preset, with ``given`` laid over them.

    What a preset says of a mirrored shadow's start is left out where ``given`` names a ``shadow_model`` or changes a width,
    since such a shadow has no layers to copy.

    Raises:
        ConfigError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset is {name!r} but must be one of {', '.join(PRESETS)}")
    fields = dict(PRESETS[name])
    explicit = given.get("shadow_model", "mirror") != "mirror"
    if explicit:
        fields.pop("shadow_num_hidden_layers")
    if explicit or any(given.get(width) is not None for width in WIDTHS):
        fields.pop("shadow_init", None)
    return {**fields, **given}

"""``shadowpeft info ADAPTER``: what an adapter is, without loading its base."""

from __future__ import annotations

import math
from typing import Any

from shadowpeft.apps.common import quiet_libraries, show
from shadowpeft.apps.options import Adapter, Json


def main(adapter: Adapter, as_json: Json = False) -> None:
    """What an adapter is."""
    quiet_libraries()
    from safetensors import safe_open

    from shadowpeft.hf.config import CONFIG
    from shadowpeft.hf.files.locate import find_file
    from shadowpeft.hf.load import check_weights, read_config

    config = read_config(adapter)
    weights = check_weights(adapter)
    counts: dict[str, int] = {}
    with safe_open(weights, framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            part = next((p for p in _PARTS if f"shadowpeft_{p}" in name), "modules to save")
            counts[part] = counts.get(part, 0) + math.prod(handle.get_slice(name).get_shape())
    backbone: dict[str, Any] = config.shadow_backbone_config or {}
    result = {
        "base": config.base_alias or config.base_model_name_or_path,
        "base_architecture": _base(config.base_fingerprint or {}),
        "task_type": str(getattr(config.task_type, "value", config.task_type)),
        "variant": config.variant,
        "shadow": f"{backbone.get('model_type')}, {backbone.get('num_hidden_layers')} layer(s), width "
        f"{backbone.get('hidden_size')}",
        "rank": config.r,
        "update_width": config.update_width if config.use_update else 0,
        "alpha": config.shadow_alpha,
        "lambda": config.auxiliary_loss_weight,
        **{f"parameters_{k.replace(' ', '_')}": v for k, v in sorted(counts.items())},
        "parameters": sum(counts.values()),
        "bytes": weights.stat().st_size + find_file(adapter, CONFIG).stat().st_size,
        "format_version": config.format_version,
    }
    show(result, adapter, as_json)


def _base(identity: dict[str, Any]) -> str:
    """Architecture and shape of the base, from the identity that the adapter records."""
    shapes = identity.get("shapes")
    names = {"num_hidden_layers": "layers", "hidden_size": "width", "vocab_size": "tokens"}
    sizes = [f"{name} {shapes[key]}" for key, name in names.items() if key in shapes] if isinstance(shapes, dict) else []
    return ", ".join([str(identity.get("architecture", "not recorded")), *sizes])


_PARTS = ("backbone", "projection", "norm", "head", "embedding", "injection", "update")

"""Writing the shadow of an adapter as a projected checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.head import scales_or_caps
from shadowpeft.hf.base.weights import module_for_adapter
from shadowpeft.hf.files.projected import write_projected
from shadowpeft.hf.layer import adapted_base, find_hub


def save_projected(model: PeftModel, folder: str | Path, adapter_name: str | None = None) -> None:
    """Write the shadow of an adapter as a projected checkpoint: backbone, projection and the head that reads ``s^(0)``.

    Raises:
        ConfigError: if there is no such adapter, it has no projection, or it is a classifier's.
        UnsupportedModelError: if the head has a bias, a scale or a soft-cap, which the format cannot express.
    """
    hub: Any = find_hub(model)
    base: Any = adapted_base(model)
    name = adapter_name or hub.active_adapters[0]
    if name not in hub.shadowpeft_backbone:
        raise ConfigError(f"there is no adapter '{name}'; the model has {sorted(hub.shadowpeft_backbone)}")
    if hub.is_classifier(name) or name not in hub.shadowpeft_projection:
        what = "is a classifier's" if hub.is_classifier(name) else "has a shadow of the base's width and no projection"
        raise ConfigError(f"adapter '{name}' {what}; use shadowpeft.detach, which gives a stock model")
    head = hub.lm_head(name, base)
    text = base.config.get_text_config(decoder=True)
    if getattr(head, "bias", None) is not None or scales_or_caps(text):
        raise UnsupportedModelError(
            "the base's head has a bias, a scale or a soft-cap, which a projected checkpoint cannot express; use "
            "shadowpeft.detach"
        )
    backbone = hub.shadowpeft_backbone[name]
    own = hub.embedding(name)
    table = (module_for_adapter(base.get_input_embeddings(), name) if own is None else own).weight
    write_projected(folder, backbone, table, hub.shadowpeft_projection[name].weight, head.weight, ids=text)

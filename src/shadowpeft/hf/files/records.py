"""Configurations recorded in files: what in them shapes a model, and numbers that no file can fill."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.messages import quote, shorten

MAX_COUNT = 4096
"""Layers, heads or experts that a configuration may ask for if the weights file does not hold as many tensors."""
MAX_NUMBER = 2**40
"""The largest whole number that any other setting may have."""
_COUNTS = re.compile(r"(^|_)(num|n|number)_|layers?$|heads?$|experts?$|blocks?$|depth")


def check_numbers(record: Any, tensors: int, where: str = "shadow_backbone_config") -> None:
    """Counts that the weights file cannot fill, before a model is built by them: 10**9 layers would be 10**9 objects.

    Args:
        record: JSON content. tensors: how many tensors the file holds; each layer, head list or expert list needs some.

    Raises:
        AdapterFileError: naming the setting.
    """
    for key, value in record.items() if isinstance(record, dict) else enumerate(record):
        name = f"{where}.{key}" if isinstance(record, dict) else f"{where}[{key}]"
        if isinstance(value, (dict, list)):
            check_numbers(value, tensors, name)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            limit = max(MAX_COUNT, tensors) if isinstance(key, str) and _COUNTS.search(key) else MAX_NUMBER
            if isinstance(value, int) and abs(value) > limit:
                raise AdapterFileError(
                    f"{name[:120]} is {quote(value, 40)}, which the adapter's {tensors} tensors cannot fill; its configuration "
                    "is damaged"
                )
            if isinstance(value, float) and math.isnan(value):
                raise AdapterFileError(f"{name[:120]} is NaN; the adapter's configuration is damaged")


_NOT_OF_A_BACKBONE = frozenset(
    {
        "transformers_version",
        "architectures",
        "quantization_config",
        "dtype",
        "torch_dtype",
        "num_labels",  # makes a dictionary of as many entries
        "id2label",
        "label2id",
        "trust_remote_code",
        "custom_pipelines",
        "backbone",
        "use_pretrained_backbone",
        "torchscript",
    }
)


def plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a recorded configuration that shapes a backbone.

    Left out at every depth: keys that name code (``auto_map``), where the numbers come from, how they are stored, which
    kernel computes attention (it may be the name of a repository to fetch and run), and private keys.
    """
    return {
        key: plain_record(value) if isinstance(value, dict) else value
        for key, value in record.items()
        if isinstance(key, str)
        and key not in _NOT_OF_A_BACKBONE
        and not key.startswith(("_", "auto_", "attn_implementation"))
        and not key.endswith("_implementation")
    }


def record_of(config: PreTrainedConfig) -> dict[str, Any]:
    """All settings of a configuration, as JSON."""
    record: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return record


def config_from_record(record: dict[str, Any] | None, config_class: type[PreTrainedConfig] | None) -> PreTrainedConfig:
    """The configuration in a record, of the class ``config_class``, or of the decoder that the record names.

    Raises:
        ConfigError: if it names another or no known decoder, or its values are impossible.
    """
    if not isinstance(record, dict) or not isinstance(record.get("model_type"), str):
        raise ConfigError("shadow_backbone_config must be the JSON object of a transformers configuration")
    values = plain_record(PreTrainedConfig._decode_special_floats(dict(record)))
    kind = values.pop("model_type")
    if config_class is not None and config_class.model_type != kind:
        raise ConfigError(
            f"shadow_backbone_config is of a {quote(kind)} model but a mirrored shadow of this base is "
            f"{config_class.model_type}; configuration and base do not belong together"
        )
    if config_class is None and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not kind.endswith("_text"):
        raise ConfigError(f"shadow_backbone_config is of {quote(kind)}, but transformers knows no such decoder")
    try:
        config: PreTrainedConfig = (
            AutoConfig.for_model(kind, **values) if config_class is None else config_class(**values)
        )
        inner = [config.get_text_config(), config.get_text_config(decoder=True)]  # which caches are made by
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"shadow_backbone_config is not a valid {kind} configuration: {shorten(error)}") from error
    if not all(isinstance(each, PreTrainedConfig) for each in inner):
        raise ConfigError(
            f"shadow_backbone_config is not a valid {kind} configuration: it names a part (text_config, decoder, generator or "
            "text_encoder) that is none; it is damaged"
        )
    return config

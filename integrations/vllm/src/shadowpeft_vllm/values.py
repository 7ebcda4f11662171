"""The settings of an adapter and what their values must be, before anything is computed from them; without vLLM and torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

KNOWN = frozenset(
    [
        "actions",
        "auto_mapping",
        "auxiliary_loss_weight",
        "base_alias",
        "base_fingerprint",
        "base_model_name_or_path",
        "call_form",
        "draft_tokens",
        "format_version",
        "inference_mode",
        "labels",
        "modules_to_save",
        "own_shadow_head",
        "pad_token_id",
        "peft_type",
        "peft_version",
        "projection_init",
        "r",
        "refined_layers",
        "revision",
        "shadow_alpha",
        "shadow_answers",
        "shadow_backbone_config",
        "shadow_dropout",
        "shadow_frozen",
        "shadow_head_dim",
        "shadow_hidden_size",
        "shadow_init",
        "shadow_intermediate_size",
        "shadow_loss",
        "shadow_model",
        "shadow_num_attention_heads",
        "shadow_num_hidden_layers",
        "shadow_num_key_value_heads",
        "shadow_reads_tokens",
        "share_embeddings",
        "system_message",
        "task_type",
        "trained_ends",
        "update_hidden_size",
        "use_update",
        "variant",
        "weights_sha256",
    ]
)
"""Settings that an adapter's configuration may have."""
NOT_OF_A_BACKBONE = frozenset(
    [
        "transformers_version",
        "architectures",
        "quantization_config",
        "dtype",
        "torch_dtype",
        "num_labels",
        "id2label",
        "label2id",
        "trust_remote_code",
        "custom_pipelines",
        "torchscript",
    ]
)
"""What of a shadow's recorded configuration does not shape a backbone."""


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e6 < value < 1e6  # as shadowpeft's settings


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(end) is int for end in value)


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _switch(value: Any) -> bool:
    return isinstance(value, bool)


_MUST: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format_version": (_count, "a whole number"),
    "task_type": (_text, "a text"),
    "variant": (_text, "a text"),
    "shadow_model": (_text, "a text"),
    "r": (_count, "a whole number from 1 up"),
    "update_hidden_size": (_or_null(_count), "a whole number from 1 up, or null"),
    "shadow_alpha": (_number, "a number"),
    "use_update": (_switch, "true or false"),
    "share_embeddings": (_or_null(_switch), "true, false or null"),
    "refined_layers": (_or_null(_pair), "null, or a list of two layers, the first and the last"),
    "weights_sha256": (_or_null(_text), "a text or null"),
    "shadow_backbone_config": (lambda value: isinstance(value, dict), "an object"),
    "base_fingerprint": (lambda value: isinstance(value, dict), "an object"),
}
"""Setting -> whether a value can be one, and what one is."""
_OF_A_BACKBONE = ("hidden_size", "num_hidden_layers", "vocab_size")


def problem_in(config: Mapping[str, Any]) -> str | None:
    """Why a value of ``config``, an adapter's configuration, can be none, in one sentence; None if all can be."""
    for name, (check, what) in _MUST.items():
        if name in config and not check(config[name]):
            return _sentence(name, config[name], what)
    record = config.get("shadow_backbone_config", {})
    for name in _OF_A_BACKBONE:
        if not _count(record.get(name)):
            return _sentence(f"shadow_backbone_config.{name}", record.get(name), "a whole number from 1 up")
    kinds = record.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        return _sentence("shadow_backbone_config.layer_types", kinds, "a list of texts, or null")
    return None


def _sentence(name: str, value: Any, what: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return f"the adapter's {name} is {shown} but must be {what}; copy the whole folder again"

"""Pretrained models whose every weight comes from the file; transformers draws what is missing at random and logs it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.aliases import looked_up, source_of
from shadowpeft.hf.base.structure import CLASSIFIERS, is_layer_list
from shadowpeft.hf.files.digests import check_sums
from shadowpeft.messages import shorten


def load_whole(
    auto: Any, source: str | Path, what: str | None = None, *, new: Collection[str] = (), **kwargs: Any
) -> PreTrainedModel:
    """``auto.from_pretrained(source, **kwargs)``, refused if the files lack a weight; code in the folder is never run.

    Args:
        what: how messages call the model; None: by ``source``. new: children of the model that may be missing and are then
            drawn at random, such as the head of a classifier that is to be trained.

    Raises:
        ConfigError: if it cannot be loaded, weights are missing or of other shapes than the configuration says, the files
            have more decoder layers than it says, or they are not those that the folder lists.
    """
    what = what or f"'{source}'"
    try:
        model, info = auto.from_pretrained(
            source, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{what} could not be loaded: {shorten(error)}") from error
    except RuntimeError as error:
        if "automatic conversion of the weights" not in str(error):
            raise
        raise ConfigError(
            f"{what} could not be loaded: its expert weights are incomplete or of wrong shapes; fetch or save it again"
        ) from error
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, stored, configured = wrong[0]
        raise ConfigError(
            f"{what} has {len(wrong)} weights of other shapes than its configuration says ({name}: {tuple(stored)} in the "
            f"file, {tuple(configured)} configured); configuration and weights do not belong together"
        )
    missing = {name for name in info["missing_keys"] if name.partition(".")[0] not in new}
    missing &= {name for name, _ in model.named_parameters()}  # neither buffers nor the second name of a tied weight
    if missing:
        raise ConfigError(
            f"{what} lacks {len(missing)} of its weights ({', '.join(sorted(missing)[:3])}), which would be drawn at random; "
            "fetch or save it again"
        )
    _check_depth(model, info["unexpected_keys"], what)
    check_sums(Path(source), what)  # last: what is wrong with the weights themselves says more
    return model  # type: ignore[no-any-return]


def _check_depth(model: nn.Module, unexpected: Collection[str], what: str) -> None:
    """Refuse weights that transformers left out because their decoder layer lies beyond the configured ones.

    Layers that predict several tokens at once are left out on purpose; they have tensors that no other layer has.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and is_layer_list(n)}
    left_out = [match.groups() for name in unexpected if (match := re.fullmatch(r"(.+?)\.(\d+)\.(.+)", name))]
    for path, modules in layers.items():
        own = [(int(n), tensor) for at, n, tensor in left_out if path == at or path.endswith(f".{at}")]
        ordinary = {name for layer in modules for name in layer.state_dict()}
        ordinary |= {tensor for n, tensor in own if n < len(modules)}
        beyond: dict[int, set[str]] = {}
        for n, tensor in own:
            if n >= len(modules):
                beyond.setdefault(n, set()).add(tensor)
        lost = [n for n, tensors in beyond.items() if tensors <= ordinary]
        if lost:
            raise ConfigError(
                f"{what} has weights of the decoder layers {min(lost)} to {max(lost)} but its configuration says "
                f"{len(modules)} layers; restore num_hidden_layers in config.json, or save the shorter model anew"
            )


def load_base(name: str | Path, task_type: str = "CAUSAL_LM", **kwargs: Any) -> PreTrainedModel:
    """A base model by alias (``smollm2-135m``), folder or Hub id; of a classifier, the head may be new.

    Raises:
        ConfigError: if it cannot be loaded or lacks a weight, with the reason.
    """
    source = source_of(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=kwargs.get("revision"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"base '{name}' could not be loaded: {shorten(error)}{looked_up(name)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"base '{name}' is an encoder-decoder model; a shadow needs a decoder-only model")
    if task_type == "SEQ_CLS":
        return load_whole(AutoModelForSequenceClassification, source, f"base '{name}'", new=CLASSIFIERS, **kwargs)
    return load_whole(AutoModelForCausalLM, source, f"base '{name}'", **kwargs)


def pad_with(base: Any, tokenizer: Any, *, classifies: bool) -> None:
    """Let a base pad as ``tokenizer`` does: where it names no pad token, and a classifier always, since it pools by it."""
    if classifies or getattr(base.config, "pad_token_id", None) is None:
        base.config.pad_token_id = tokenizer.pad_token_id


def of_labels(labels: Sequence[str] | None) -> dict[str, Any]:
    """What :func:`load_base` is told of a classifier's labels; nothing if they are not known."""
    if labels is None:
        return {}
    names = dict(enumerate(labels))
    return {"num_labels": len(labels), "id2label": names, "label2id": {label: i for i, label in names.items()}}

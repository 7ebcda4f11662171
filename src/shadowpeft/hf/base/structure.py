"""Where backbone, decoder layers and classifier are inside a transformers model."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.messages import did_you_mean


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder-only model that the method needs."""

    backbone: nn.Module
    """The module that owns the decoder layers, such as ``LlamaModel``."""
    backbone_name: str
    """Its name inside the whole model; empty if it is the whole model."""
    layers: nn.ModuleList
    layers_name: str
    """Name of the list of layers inside the whole model."""
    config: PreTrainedConfig
    """The text configuration."""

    @property
    def hidden_size(self) -> int:
        """``d``."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """``L``."""
        return len(self.layers)


def find_decoder(model: nn.Module) -> DecoderParts:
    """Find backbone and decoder layers of ``model``.

    Raises:
        UnsupportedModelError: for encoder-decoder models, models without decoder layers, models with one layer, and models
            whose cache is none of transformers'; for what ``torch.compile`` gave.
    """
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "the base is what torch.compile gave, which hides its parts; attach first and compile then, or use base.compile()"
        )
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"the base is a {type(model).__name__} without a transformers configuration; pass a transformers model"
        )
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; a shadow needs a decoder-only model"
        )
    length = num_decoder_layers(text)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == length and is_layer_list(name):
            parent = name.rpartition(".")[0]
            if length < 2:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has one decoder layer; a shadow corrects layers 1 to L-1 and needs two"
                )
            backbone = model.get_submodule(parent)
            if not isinstance(backbone, PreTrainedModel):
                raise UnsupportedModelError(
                    f"the decoder layers of {type(model).__name__} belong to a {type(backbone).__name__}, which is no model "
                    "by itself; a shadow needs a decoder-only transformers model"
                )
            foreign = _foreign_cache(backbone)
            if foreign is not None:
                raise UnsupportedModelError(
                    f"{type(model).__name__} keeps what it has read in a {foreign}, which is none of transformers' caches, so "
                    "there is no place in it for what its shadow has read; choose another base"
                )
            return DecoderParts(backbone, parent, module, name, text)
    raise UnsupportedModelError(
        f"no list of {length} decoder layers, each of which runs once, was found in {type(model).__name__}; only decoder-only "
        "transformers models are supported"
    )


def is_layer_list(name: str) -> bool:
    return name.rpartition(".")[2] in ("layers", "h", "blocks", "layer", "block") and "shadow_hub" not in name


def num_decoder_layers(config: PreTrainedConfig) -> int:
    """Number of decoder layers; the decoders of encoder-decoder families count them apart from the encoder's."""
    return int(getattr(config, "decoder_layers", None) or config.num_hidden_layers)


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The decoder layers of a bare backbone, of any length."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and is_layer_list(name):
            return module
    raise UnsupportedModelError(f"no decoder layers were found in {type(backbone).__name__}")


def _foreign_cache(backbone: nn.Module) -> str | None:
    """The class that an architecture keeps its state in, if it brings one that is no ``Cache`` (xLSTM, Reformer)."""
    module = type(backbone).__module__
    for name, value in vars(sys.modules[module]).items():
        own = isinstance(value, type) and value.__module__ == module
        if own and name.endswith("Cache") and not issubclass(value, (Cache, CacheLayerMixin)):
            return name
    return None


def name_of(model: nn.Module, part: nn.Module) -> str:
    """The name of ``part`` inside ``model``.

    Raises:
        UnsupportedModelError: if it is no part of it.
    """
    for name, module in model.named_modules():
        if module is part:
            return name
    raise UnsupportedModelError(
        f"a {type(part).__name__} is not part of {type(model).__name__}; pass an unmodified model"
    )


CLASSIFIERS = ("score", "classifier")


def classifier_of(model: nn.Module) -> nn.Linear:
    """The base's own linear classifier of sequences.

    Raises:
        UnsupportedModelError: if it has none, or one that classifies every token.
    """
    if any("ForTokenClassification" in kind.__name__ for kind in type(model).__mro__):  # its head is called score as well
        raise UnsupportedModelError(
            f"task_type is SEQ_CLS but {type(model).__name__} classifies every token and a shadow only whole sequences; load "
            "the base with AutoModelForSequenceClassification"
        )
    for name in CLASSIFIERS:
        head = getattr(model, name, None)
        head = getattr(head, "original_module", head)
        if isinstance(head, nn.Linear):
            return head
    raise UnsupportedModelError(
        f"task_type is SEQ_CLS but {type(model).__name__} has no linear 'score' or 'classifier'; load the base with "
        "AutoModelForSequenceClassification"
    )


def full_names(model: nn.Module, endings: list[str], *, strict: bool) -> list[str]:
    """PEFT takes every module whose name ends so, and the shadow's are named like the base's: name the base's.

    Args:
        strict: whether a name that the base does not have is refused, other than those that PEFT looks for in a classifier.

    Raises:
        ConfigError: naming it.
    """
    names = [name for name, _ in model.named_modules() if "shadow_hub" not in name and "shadow_link" not in name]
    matching = [[name for name in names if name.endswith(ending)] or [ending] for ending in endings]
    lost = next((name for (name, *_) in matching if name not in (*names, *CLASSIFIERS)), None)
    if strict and lost is not None:
        raise ConfigError(
            f"modules_to_save names '{lost}', which the base does not have{did_you_mean(lost, names)}; name a module of it"
        )
    return sorted({name for group in matching for name in group})

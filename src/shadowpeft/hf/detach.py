"""The detached shadow as an ordinary model of a stock class (Eq. 11)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from shadowpeft.core import fold_projection
from shadowpeft.ends import generation_config
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.head import logit_scale, soft_cap
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.weights import dense_weight, gather, module_for_adapter, share_weight
from shadowpeft.hf.layer import adapted_base, find_hub

SYSTEM_MESSAGE = "system_message"
"""The key of an edge model's configuration that records what its adapter was trained under."""

DETACHED = "detached"
"""The key by which an edge model's configuration says that it is one."""
ANSWERS = "answers"
"""The key that records what it learnt of answers: ``action``, an action alone."""


@torch.no_grad()
def detach(model: nn.Module, adapter_name: str | None = None, *, tokenizer: Any = None) -> PreTrainedModel:
    """A stand-alone copy of the shadow as a stock transformers model; ``model`` stays as it was.

    Backbone, embedding and head are float32 copies of what the shadow path uses: the base's frozen embedding (or the
    shadow's own), the base's complete head. A projection is folded into the head, ``W_lm W_p`` (Eq. 11), which unties a
    tied head; that product is rounded, everything else is exact.

    Args:
        model: a ``PeftModel`` with a shadow adapter, or a transformers model that carries one.
        adapter_name: which adapter; None: the active one.
        tokenizer: whose ends, and the end of turn of whose chat template, the model stops at too; needed only if the adapter
            does not record the ends it was trained with (``shadowpeft train`` and ``ShadowTrainer`` do). A classifier whose
            base has no pad token gets this one's.

    Returns:
        For example a ``LlamaForCausalLM``: it saves, reloads, generates and drafts without this package.

    Raises:
        ConfigError: if there is no such adapter.
        UnsupportedModelError: if the stock class cannot express the base's head (named in the message).
    """
    hub: Any = find_hub(model)
    base: Any = adapted_base(model)
    name: Any = adapter_name or (hub.active_adapters[0] if hub.active_adapters else None)
    if name not in hub.shadowpeft_backbone:
        raise ConfigError(f"there is no adapter '{name}'; the model has {sorted(hub.shadowpeft_backbone)}")
    parts = find_decoder(base)
    backbone: Any = hub.shadowpeft_backbone[name]
    projection = hub.shadowpeft_projection[name] if name in hub.shadowpeft_projection else None  # noqa: SIM401
    own_embedding = hub.embedding(name)
    embedding: Any = module_for_adapter(base.get_input_embeddings(), name) if own_embedding is None else own_embedding
    classifier = hub.is_classifier(name)
    head = hub.shadowpeft_head[name] if classifier else hub.lm_head(name, base)

    config = _edge_config(backbone.config, parts.config, base, None if classifier else head)
    setattr(config, DETACHED, True)
    own = hub.configs[name]
    records = {
        "call_form": own.call_form,
        "actions": own.actions,
        ANSWERS: own.shadow_answers,
        SYSTEM_MESSAGE: own.system_message,
    }
    for key, value in records.items():  # for those who serve or judge it
        if value is not None:
            setattr(config, key, value)
    if classifier:
        recorded = hub.configs[name].pad_token_id
        config.pad_token_id = config.pad_token_id if recorded is None else recorded
        if config.pad_token_id is None and tokenizer is not None:
            config.pad_token_id = tokenizer.pad_token_id
    if not classifier:
        config.tie_word_embeddings = (
            projection is None
            and own_embedding is None
            and share_weight(head, embedding, bool(getattr(parts.config, "tie_word_embeddings", False)))
            and (_scale(embedding) == 1.0 or config.model_type == parts.config.model_type)
        )
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise UnsupportedModelError(
            f"transformers has no {auto.__name__.removeprefix('AutoModelFor')} model of {type(config).__name__}, so this "
            "shadow cannot stand alone; use it attached, or give the adapter a shadow of another architecture (shadow_model)"
        )
    edge: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    edge_body = next((module for module in edge.modules() if type(module) is type(backbone)), None)
    if edge_body is None:
        raise UnsupportedModelError(
            f"{type(edge).__name__} has no {type(backbone).__name__} inside; the shadow's class has no stock model with a head"
        )

    state = {k: gather(v) for k, v in backbone.state_dict().items() if not k.startswith("shadow_embedding.")}
    missing, unexpected = edge_body.load_state_dict(state, strict=False)
    table = edge.get_input_embeddings()
    embedding_keys = {f"{n}.{k}" for n, m in edge_body.named_modules() if m is table for k in m.state_dict()}
    if unexpected or set(missing) - embedding_keys:
        raise UnsupportedModelError(
            f"the shadow backbone does not fit {type(edge).__name__}: {sorted(set(missing) - embedding_keys)[:2]} missing, "
            f"{unexpected[:2]} unknown"
        )
    rows = config.vocab_size
    with dense_weight(embedding) as weight:
        table.weight.copy_(_rows(weight, rows))
    if _scale(embedding) != _scale(table):  # Gemma multiplies inside its embedding module
        table.weight.mul_(_scale(embedding) / _scale(table))
    if classifier or not config.tie_word_embeddings:
        _set_head(edge, head, projection, classifier)
    if not hub.facts.is_linear:
        _carry_head(edge, base, name, parts.backbone_name, projection)
    edge.eval()
    if not classifier:
        edge.generation_config = copy.deepcopy(getattr(base, "generation_config", None)) or GenerationConfig()
        edge.generation_config = generation_config(edge, tokenizer, hub.configs[name].trained_ends or ())
    return edge.to(next(backbone.parameters()).device)


def _edge_config(
    shadow: PreTrainedConfig, text: PreTrainedConfig, base: PreTrainedModel, head: Any | None
) -> PreTrainedConfig:
    """Configuration of the edge model with the LM head ``head``; None: of a classifier."""
    config = copy.deepcopy(shadow)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, key, getattr(text, key, None))
    config.vocab_size = text.vocab_size if head is None else _head_rows(head)
    if head is None:
        config.num_labels = base.config.num_labels
        config.problem_type = base.config.problem_type
        config.id2label, config.label2id = dict(base.config.id2label), dict(base.config.label2id)
    elif (logit_scale(config), soft_cap(config)) != (logit_scale(text), soft_cap(text)):
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if hasattr(config, name) and getattr(text, name, None) is not None:
                setattr(config, name, getattr(text, name))
        if (logit_scale(config), soft_cap(config)) != (logit_scale(text), soft_cap(text)):
            raise UnsupportedModelError(
                f"the base's head scales or caps its logits (scale {logit_scale(text)}, soft-cap {soft_cap(text)}) and "
                f"{config.model_type} cannot; use a shadow of the base's own architecture"
            )
    for stale in ("quantization_config", "_name_or_path"):
        if hasattr(config, stale):
            delattr(config, stale)
    config.architectures = None
    return config


def _scale(embedding: nn.Module) -> float:
    return float(getattr(embedding, "embed_scale", 1.0))


def _head_rows(head: Any) -> int:
    return int(getattr(head, "out_features", head.weight.shape[0]))


def _rows(weight: Tensor, rows: int) -> Tensor:
    if weight.shape[0] < rows:
        raise UnsupportedModelError(
            f"the embedding has {weight.shape[0]} rows but the head has {rows}; resize the base's embeddings first"
        )
    return weight[:rows]


def _set_head(edge: PreTrainedModel, head: Any, projection: Any, classifier: bool) -> None:
    stock: Any = _stock_classifier(edge) if classifier else edge.get_output_embeddings()
    with dense_weight(head) as stored:
        weight = stored.float() if projection is None else fold_projection(stored.float(), gather(projection.weight))
    bias = getattr(head, "bias", None)
    if stock.weight.shape != weight.shape:
        raise UnsupportedModelError(
            f"the head has shape {tuple(weight.shape)} but {type(edge).__name__} has one of {tuple(stock.weight.shape)}"
        )
    stock.weight.copy_(weight)
    if bias is not None and stock.bias is None:
        raise UnsupportedModelError(
            f"the base's head has a bias and that of {type(edge).__name__} has none; use a shadow of the base's own class"
        )
    if stock.bias is not None:
        stock.bias.zero_() if bias is None else stock.bias.copy_(gather(bias))


def _carry_head(
    edge: PreTrainedModel, base: PreTrainedModel, adapter: str, backbone: str, projection: Tensor | None
) -> None:
    """Copy whatever else stands between backbone and logits (a dense layer, a norm); the classes must agree."""
    if type(edge) is not type(base) or projection is not None:
        raise UnsupportedModelError(
            f"the head of {type(base).__name__} is more than a matrix, which a {type(edge).__name__}"
            f"{' with a projection' if projection is not None else ''} cannot express; use a shadow of the base's own class "
            "and width"
        )
    tables = {id(m) for m in (edge.get_input_embeddings(), edge.get_output_embeddings())}
    for name, module in edge.named_modules():
        if (
            not name
            or name == backbone
            or f"{name}.".startswith(f"{backbone}.")
            or f"{backbone}.".startswith(f"{name}.")
        ):
            continue
        if id(module) not in tables:
            source: Any = base
            for part in name.split("."):
                source = module_for_adapter(getattr(source, part), adapter)
            for key, value in module.named_parameters(recurse=False):
                value.copy_(source.get_parameter(key))


def _stock_classifier(edge: PreTrainedModel) -> nn.Module:
    for name in ("score", "classifier"):
        if isinstance(getattr(edge, name, None), nn.Linear):
            return getattr(edge, name)  # type: ignore[no-any-return]
    raise UnsupportedModelError(f"{type(edge).__name__} has no linear classifier")

"""How one token flows: four hooks on the base's own modules.

``model`` (before): take the shadow's arguments out of the call, start a :class:`ShadowCall`.
``backbone`` (before): run the shadow backbone on the same input, ``s^(0)``; its cache lives in the base's cache.
``layer`` (before): refine, i.e. advance the shadow state with the layer's input and correct that input.
``model`` (after): the shadow's loss and logits from ``s^(0)``; the joint loss.

The :class:`ShadowCall` travels through the keyword arguments of the base's own forwards. Nothing is stored on a module, so
threads and interleaved generations cannot mix, and a checkpointed layer that runs again finds its own state again.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedConfig

from shadowpeft.core import Trajectory, UpdateNorm, count_targets, head_loss, joint_loss, token_cross_entropy
from shadowpeft.core.losses import IGNORE
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf import supervision
from shadowpeft.hf.cache import shadow_view
from shadowpeft.hf.head import lm_logits, pool_last
from shadowpeft.hf.layer import ShadowHub, ShadowLink
from shadowpeft.hf.weights import allow_gradients

CALL = "shadow_call"
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class ShadowCall:
    """One forward pass: which adapter, what was asked for, and the shadow states. Passed along, never stored."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.labels: Tensor | None = None
        self.shift_labels: Tensor | None = None
        self.shadow_labels: Tensor | None = None
        self.num_items: Any = None
        self.shadow_num_items: Any = None
        self.return_shadow = False
        self.fused = False
        self.logits_to_keep: Any = 0
        self.input_ids: Tensor | None = None
        self.attention_mask: Any = None
        self.trajectory: Trajectory | None = None
        self.norm: UpdateNorm | None = None


def names_of_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of ``module.forward``, in order.

    Raises:
        UnsupportedModelError: if the forward does not pass on keyword arguments it does not know.
    """
    parameters = inspect.signature(type(module).forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise UnsupportedModelError(
            f"{type(module).__name__}.forward takes no further keyword arguments, through which the shadow state travels; "
            "this architecture is not supported"
        )
    return tuple(n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD)[1:]


def _by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


# --------------------------------------------------------------------------------------------------------- whole model


def before_model(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, backbone: str, names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take out ``shadow_labels``, ``shadow_num_items_in_batch`` and ``return_shadow``; start the call."""
    kwargs = _by_name(names, args, kwargs)
    shadow_labels = kwargs.pop("shadow_labels", None)
    shadow_num_items = kwargs.pop("shadow_num_items_in_batch", None)
    return_shadow = bool(kwargs.pop("return_shadow", False))
    hub: ShadowHub = model.get_submodule(backbone).shadow_hub  # type: ignore[assignment]
    adapter = hub.active_name()
    if adapter is None:
        if return_shadow:
            raise ConfigError("return_shadow=True was passed but no adapter is enabled; enable or set one")
        return (), kwargs
    if torch.is_grad_enabled() and model.training and not torch.compiler.is_compiling():
        allow_gradients(model)
    call = ShadowCall(adapter)
    call.return_shadow = return_shadow
    call.fused = bool(kwargs.get("fused_lm_head", False))
    call.labels, call.shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
    call.shadow_labels = shadow_labels
    call.logits_to_keep = kwargs.get("logits_to_keep", 0)
    call.input_ids, call.attention_mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    call.num_items, call.shadow_num_items = kwargs.get("num_items_in_batch"), shadow_num_items
    if shadow_labels is not None and call.num_items is not None and shadow_num_items is None:
        raise ConfigError(
            "num_items_in_batch was passed with shadow_labels but shadow_num_items_in_batch was not; each path is "
            "normalised by its own targets, pass both (shadowpeft.ShadowTrainer does)"
        )
    if call.labels is not None:
        if _is_classifier(hub, adapter):
            # stock classifiers return NaN for a fully masked batch and do not rescale for gradient accumulation
            kwargs.pop("labels")
        elif not call.fused:
            count = call.num_items
            if count is None:
                count = (
                    count_targets(call.shift_labels, shifted=False)
                    if call.shift_labels is not None
                    else count_targets(call.labels, shifted=True)
                )
            kwargs["num_items_in_batch"] = torch.as_tensor(count).clamp(min=1)
    kwargs[CALL] = call
    return (), kwargs


def after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, backbone: str) -> Any:
    """Add ``task_loss``, ``shadow_loss`` and, where asked, ``shadow_logits`` and ``shadow_state``; join the losses."""
    call: ShadowCall | None = kwargs.get(CALL)
    if call is None:
        if not isinstance(output, tuple):
            output.task_loss, output.shadow_loss = getattr(output, "loss", None), None
        return output
    if call.trajectory is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not pass keyword arguments on to its backbone; this architecture is not supported"
        )
    hub: ShadowHub = model.get_submodule(backbone).shadow_hub  # type: ignore[assignment]
    weight = float(hub.configs[call.adapter].auxiliary_loss_weight)
    training = model.training and torch.is_grad_enabled()
    if call.fused:
        return _join_fused(model, call, output, weight, training)
    classifier = _is_classifier(hub, call.adapter)
    as_tuple = isinstance(output, tuple)
    if as_tuple and call.return_shadow:
        raise ConfigError("return_shadow=True needs return_dict=True")
    first = 1 if as_tuple and call.labels is not None and not classifier else 0  # where a tuple has its logits
    logits = output[first] if as_tuple else output.logits
    with torch.set_grad_enabled(torch.is_grad_enabled() and (weight > 0 or call.return_shadow)):
        shadow_loss, shadow_logits = (_classifier_path if classifier else _lm_path)(model, hub, call)
    task_loss = None
    if call.labels is not None:
        stock = output[0] if as_tuple else output.loss
        task_loss = _classification_loss(model, logits, call.labels, call.num_items) if classifier else stock

    loss = task_loss
    if task_loss is not None and training and shadow_loss is not None:
        loss = joint_loss(task_loss, shadow_loss, weight)
    elif task_loss is None and training and weight > 0 and not call.return_shadow and logits.requires_grad:
        if shadow_loss is None:
            logits = supervision.refuse_gradients(logits)
        else:
            logits, shadow_loss = supervision.demand_both(logits, shadow_loss)

    if as_tuple:
        return ((logits,) if loss is None else (loss, logits)) + tuple(output[first + 1 :])
    output.loss, output.logits = loss, logits
    # attributes, not fields: a field would turn Trainer's `predictions` into a tuple and break compute_metrics
    output.task_loss, output.shadow_loss = task_loss, shadow_loss
    if call.return_shadow:
        assert call.trajectory is not None
        output.shadow_logits, output.shadow_state = shadow_logits, call.trajectory.s0
    return output


def _join_fused(model: nn.Module, call: ShadowCall, output: Any, weight: float, training: bool) -> Any:
    """TRL's fused head gives per-token log-probabilities instead of logits; they carry the shadow's gradient."""
    output.task_loss, output.shadow_loss = output.loss, None
    if weight > 0 and (training or call.shadow_labels is None):
        if call.shadow_labels is not None:
            raise ConfigError("shadow_labels cannot be used with a fused LM head; use shadowpeft.ShadowTrainer")
        assert call.trajectory is not None
        with torch.set_grad_enabled(training):
            total = _shadow_sum(model, call.trajectory.s0, _targets(call))
        if training:
            output.log_probs = supervision.join_log_probs(output.log_probs, total, output.label_mask, weight)
        output.shadow_loss = total / output.label_mask.sum().clamp(min=1)
    return output


def _lm_path(model: nn.Module, hub: ShadowHub, call: ShadowCall) -> tuple[Tensor | None, Tensor | None]:
    """The shadow's loss (second term of Eq. 8) if there are targets, and its logits (Eq. 11) if they are asked for."""
    assert call.trajectory is not None
    s0, loss, logits = call.trajectory.s0, None, None
    if call.labels is not None or call.shadow_labels is not None:
        targets = _targets(call)
        items = call.num_items if call.shadow_labels is None else call.shadow_num_items
        items = count_targets(targets, shifted=False) if items is None else items
        total = _shadow_sum(model, s0, targets)
        loss = total / torch.as_tensor(items, device=total.device).clamp(min=1)
    if call.return_shadow:
        kept = _keep(s0, call.logits_to_keep)
        logits = lm_logits(model.get_output_embeddings(), _text_config(model), kept)  # type: ignore[operator]
    return loss, logits


def _classifier_path(model: nn.Module, hub: ShadowHub, call: ShadowCall) -> tuple[Tensor | None, Tensor | None]:
    """The shadow's loss (second term of Eq. 9) if there are targets, and its logits."""
    assert call.trajectory is not None
    pooled = pool_last(call.trajectory.s0, _text_config(model), call.input_ids, call.attention_mask)
    head = hub.shadowpeft_head[call.adapter]
    logits = head(pooled.to(head.weight.dtype))
    targets = call.labels if call.shadow_labels is None else call.shadow_labels
    if targets is None:
        return None, logits
    items = call.num_items if call.shadow_labels is None else call.shadow_num_items
    return _classification_loss(model, logits, targets, items), logits


def _text_config(model: nn.Module) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator, no-any-return]


def _is_classifier(hub: ShadowHub, adapter: str) -> bool:
    return adapter in hub.shadowpeft_head


def _targets(call: ShadowCall) -> Tensor:
    """The shadow path's target at every position, ``(B, T)``."""
    if call.shadow_labels is None and call.shift_labels is not None:
        return call.shift_labels
    labels = call.labels if call.shadow_labels is None else call.shadow_labels
    assert labels is not None
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE)


def _shadow_sum(model: nn.Module, s0: Tensor, targets: Tensor) -> Tensor:
    """Sum of the shadow path's losses over its targets (second term of Eq. 8), 0-d."""
    head = model.get_output_embeddings()  # type: ignore[operator]

    def loss(rows: Tensor, goals: Tensor) -> Tensor:
        logits = lm_logits(head, _text_config(model), rows)
        return model.loss_function(  # type: ignore[operator, no-any-return]
            logits=logits[None],
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=1,
            shift_labels=goals[None],
        )

    targets = targets.to(s0.device)
    if torch.compiler.is_compiling():  # a boolean mask has a data-dependent shape, which breaks the graph
        rows, goals = s0.reshape(-1, s0.shape[-1]), targets.reshape(-1)
    else:
        mask = targets != IGNORE
        rows, goals = s0[mask], targets[mask]
    return head_loss(rows, goals, loss, frozen=not any(p.requires_grad for p in head.parameters()))


def _classification_loss(model: nn.Module, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    """As the stock classifiers, but finite for a fully masked batch and scaled for accumulation (Eq. 9)."""
    config: Any = model.config
    single = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    if single and labels.dtype in (torch.long, torch.int):
        config.problem_type = "single_label_classification"
        count = count_targets(labels, shifted=False) if items is None else items
        return token_cross_entropy(logits.view(-1, config.num_labels), labels.view(-1).to(logits.device), count)
    loss: Tensor = model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=config)  # type: ignore[operator]
    return loss if items is None else loss * (labels.shape[0] / torch.as_tensor(items, device=loss.device))


def _keep(state: Tensor, logits_to_keep: Any) -> Tensor:
    if isinstance(logits_to_keep, int):
        return state[:, -logits_to_keep:] if logits_to_keep else state
    return state[:, logits_to_keep]


# ------------------------------------------------------------------------------------------------------------ backbone


def before_backbone(
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    names: tuple[str, ...],
    base_layers: int,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compute ``s^(0)`` (Eq. 1) from the backbone's own arguments and start the trajectory."""
    hub: ShadowHub = backbone.shadow_hub  # type: ignore[assignment]
    adapter = hub.active_name()
    if adapter is None:
        return None
    kwargs = _by_name(names, args, kwargs)
    call: ShadowCall = kwargs.get(CALL) or ShadowCall(adapter)
    config: Any = backbone.config
    cache = kwargs.get("past_key_values")
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    if getattr(backbone, "gradient_checkpointing", False) and backbone.training:
        use_cache = False
    if use_cache and cache is None:
        cache = kwargs["past_key_values"] = DynamicCache(config=config)
    shadow: Any = hub.shadowpeft_backbone[adapter]
    view = None if cache is None else shadow_view(cache, base_layers, config, shadow.config, adapter)

    embeds, embedding = kwargs.get("inputs_embeds"), hub.embedding(adapter)
    if embedding is not None:
        if kwargs.get("input_ids") is None:
            raise ConfigError(
                "inputs_embeds were passed but the shadow has an embedding table of its own and needs input_ids; use "
                "share_embeddings=True to run from embeddings"
            )
        embeds = embedding(kwargs["input_ids"])
    elif embeds is None:
        embeds = backbone.get_input_embeddings()(kwargs["input_ids"])  # type: ignore[operator]
    passed = {k: kwargs[k] for k in ("position_ids", *_PACKED) if kwargs.get(k) is not None}
    s0 = hub.initial_state(
        adapter,
        embeds,
        attention_mask=_shadow_mask(kwargs.get("attention_mask"), config, shadow.config),
        past_key_values=view,
        use_cache=view is not None,
        **passed,
    )
    norms: Any = hub.shadowpeft_norm  # a ModuleDict has no get()
    call.norm = norms[adapter] if adapter in norms else None  # noqa: SIM401
    first = hub.configs[adapter].mathematics()["first_refined_layer"]
    call.trajectory = Trajectory(first, s0, keep_all=torch.is_grad_enabled())
    kwargs[CALL] = call
    return (), kwargs


def _shadow_mask(mask: Any, base: PreTrainedConfig, shadow: PreTrainedConfig) -> Any:
    """The mask for the shadow. Masks that generation has prepared for the base (4D, or one per layer type) fit a shadow
    whose layers attend as the base's do; anything else is refused."""
    if not isinstance(mask, dict) and (mask is None or mask.dim() == 2):
        return mask
    types = set(getattr(shadow, "layer_types", None) or [_only_type(shadow)])
    if isinstance(mask, dict):
        if not types <= set(mask):
            raise UnsupportedModelError(
                f"the prepared masks cover {sorted(mask)} but the shadow attends as {sorted(types)}; pass a 2D "
                "attention_mask or use a dynamic cache"
            )
        return mask if getattr(shadow, "layer_types", None) and len(mask) > 1 else mask[next(iter(types))]
    if types != {_only_type(base)} and not set(getattr(base, "layer_types", None) or ()) >= types:
        raise UnsupportedModelError(
            f"the prepared mask is for {_only_type(base)} but the shadow attends as {sorted(types)}; pass a 2D "
            "attention_mask or use a dynamic cache"
        )
    return mask


def _only_type(config: PreTrainedConfig) -> str:
    return "sliding_attention" if getattr(config, "sliding_window", None) is not None else "full_attention"


# --------------------------------------------------------------------------------------------------------------- layer


def before_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Refine the layer's input with the shadow state (Eqs. 2-7)."""
    call: ShadowCall | None = kwargs.pop(CALL, None)
    link: ShadowLink | None = getattr(layer, "shadow_link", None)
    adapter = None if link is None else link.active_name()
    if link is None or adapter is None or adapter not in link.shadowpeft_injection:
        return args, kwargs
    if call is None or call.trajectory is None:
        raise UnsupportedModelError(
            f"decoder layer {link.layer} was called without the shadow's state; call the whole model (if you did, this "
            "architecture does not pass keyword arguments on to its layers and is not supported)"
        )
    if call.trajectory.keep_all and not torch.is_grad_enabled():
        # up to 5.22 transformers checkpoints a layer together with its hooks; a reentrant checkpoint then cuts the path
        # of gradients through the shadow state, which is no positional input of the layer
        raise UnsupportedModelError(
            f"decoder layer {link.layer} runs inside a reentrant checkpoint, which loses the shadow's gradients; use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or transformers 5.23 or newer"
        )
    h = args[0] if args else kwargs["hidden_states"]
    s = call.trajectory.read(link.layer).to(h.device)
    norm = call.norm
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        h, s = checkpoint(link, adapter, h, s, norm, use_reentrant=False)
    else:
        h, s = link(adapter, h, s, norm)
    call.trajectory.write(link.layer, s)
    if args:
        return (h, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": h}


# --------------------------------------------------------------------------------------------------- the shadow alone


def shadow_path_loss(model: nn.Module, hub: ShadowHub, batch: dict[str, Any], *, items: Any = None) -> Tensor:
    """The second term of Eq. 8 from the shadow alone: what the shadow path costs a batch, without running the base.

    Args:
        model: the transformers model that carries the adapter. batch: ``input_ids`` ``(B, T)``, ``attention_mask`` and
            ``shadow_labels`` ``(B, T)``. items: number of targets to normalise by; None: this batch's.

    Returns:
        0-d loss, not yet multiplied with lambda.
    """
    adapter = hub.active_name()
    if adapter is None:
        raise ConfigError("no adapter is enabled; enable or set one")
    embedding = hub.embedding(adapter) or model.get_input_embeddings()  # type: ignore[operator]
    passed = {"position_ids": batch["position_ids"]} if batch.get("position_ids") is not None else {}
    s0 = hub.initial_state(
        adapter, embedding(batch["input_ids"]), attention_mask=batch.get("attention_mask"), use_cache=False, **passed
    )
    targets = F.pad(batch["shadow_labels"][..., 1:], (0, 1), value=IGNORE)
    count = count_targets(targets, shifted=False) if items is None else items
    return _shadow_sum(model, s0, targets) / torch.as_tensor(count, device=s0.device).clamp(min=1)

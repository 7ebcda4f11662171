"""Every loss of a path: the task's, the shadow's, what teaches it, and how they are joined (Eqs. 8-9)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from shadowpeft.core import count_targets, distillation_kl, head_loss, joint_loss, token_cross_entropy
from shadowpeft.core.losses import IGNORE, acceptance_loss
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.head import lm_logits, pool_last
from shadowpeft.hf.forward import supervision
from shadowpeft.hf.forward.beginning import shadow_caches_in_graph, shared_tokens
from shadowpeft.hf.forward.call import AdapterWeights, Part, ShadowCall, initial_state
from shadowpeft.hf.forward.rows import BASE, as_only_adapter, assemble, weights_of
from shadowpeft.hf.layer import ShadowHub
from shadowpeft.ops import rewritten


@dataclass
class Joined:
    """What a forward pass with a shadow gives."""

    logits: Tensor | None
    """None: the base's own forward gave none (Liger's fused loss)."""
    loss: Tensor | None
    """Joint in training, the task's alone otherwise; None without labels."""
    task_loss: Tensor | None
    shadow_loss: Tensor | None
    shadow_logits: Tensor | None
    witness: Any = None
    """Of a pass with labels whose loss must contain the shadow's (:func:`shadowpeft.hf.forward.supervision.demand_both`)."""


def join_losses(
    model: nn.Module, hub: ShadowHub, call: ShadowCall, logits: Tensor | None, stock: Tensor | None
) -> Joined:
    """Both paths' losses and the joint one (Eqs. 8-9).

    Args:
        logits: the attached path's, ``(B, T, V)`` or ``(B, C)``; None where Liger's forward
            has computed the loss without them. stock: the loss that the base computed, or None.

    Raises:
        ConfigError: if there are no logits where the shadow is to learn from them.
    """
    if logits is None and (stock is None or needs_all_logits(call, model)):
        raise ConfigError(
            f"{type(model).__name__} gave no logits but the shadow learns from them, or they were asked for; pass "
            "skip_logits=False"
        )
    weight = _weight(call)
    training = model.training
    # no set_grad_enabled: a compiler may know lambda as a symbol, which is no constant
    learns = torch.is_grad_enabled() and (weight > 0 or call.return_shadow)
    with nullcontext() if learns else torch.no_grad():
        if call.is_classifier:
            shadow_loss, shadow_logits = _classifier_path(model, call)
        else:
            teacher = logits.detach() if training and logits is not None else None
            shadow_loss, shadow_logits = _lm_path(model, hub, call, teacher)
    task_loss = None
    if call.labels is not None:
        if call.is_classifier:
            assert logits is not None
            task_loss = _classification_loss(model, logits, call.labels, call.num_items)
        elif call.last_state is not None:
            task_loss = _task_loss(model, hub, call, call.last_state)
        elif hub.facts.uses_num_items:
            task_loss = stock
        else:
            assert stock is not None
            task_loss = _recount(stock, stock.nan_to_num() if logits is None else logits, call, hub.facts.label_shift)
    loss, witness = task_loss, None
    asked = asks_for_shadow_loss(model, call)
    if asked and logits is not None and logits.requires_grad:
        if shadow_loss is None:
            logits = supervision.refuse_gradients(logits)
        # a frozen shadow has no gradient; and with labels the demand would cost a compiled graph a break
        elif shadow_loss.requires_grad and (task_loss is None or not rewritten()):
            logits, shadow_loss, witness = supervision.demand_both(logits, shadow_loss)
    if task_loss is not None and training and shadow_loss is not None:
        loss = joint_loss(task_loss, shadow_loss, weight)
    return Joined(logits, loss, task_loss, shadow_loss, shadow_logits, witness)


def asks_for_shadow_loss(module: nn.Module, call: ShadowCall) -> bool:
    """Whether what trains here must train with the shadow's loss: lambda is not 0, and nobody computes both by themselves."""
    return bool(module.training and call.parts and not call.return_shadow and _weight(call) > 0)


def _weight(call: ShadowCall) -> float:
    """lambda; in training a call has one part."""
    return max(float(part.weights.config.auxiliary_loss_weight) for part in call.parts)


def join_fused(model: nn.Module, hub: ShadowHub, call: ShadowCall, output: Any) -> Any:
    """TRL's fused head gives per-token log-probabilities instead of logits; they carry the shadow's gradient."""
    weight, training = _weight(call), model.training and torch.is_grad_enabled()
    output.task_loss, output.shadow_loss = output.loss, None
    if weight > 0 and (training or call.shadow_labels is None):
        if call.shadow_labels is not None:
            raise ConfigError("shadow_labels cannot be used with a fused LM head; use shadowpeft.ShadowTrainer")
        (part,) = call.parts
        if training and part.weights.config.shadow_loss != "ce":
            raise ConfigError(
                f"shadow_loss is '{part.weights.config.shadow_loss}' but a fused LM head gives no logits to learn from; use "
                "shadow_loss='ce' or shadowpeft.ShadowTrainer"
            )
        with torch.set_grad_enabled(training):
            total = _path_sum(model, hub, lm_head(model, part.weights), part.s0, _targets(call, hub))
        if training:
            output.log_probs = supervision.join_log_probs(output.log_probs, total, output.label_mask, weight)
        output.shadow_loss = total / output.label_mask.sum().clamp(min=1)
    return output


def needs_no_logits(call: ShadowCall, model: Any, hub: ShadowHub, kwargs: dict[str, Any]) -> bool:
    """Whether this pass can do with the logits at targets, computed chunk by chunk as the shadow's (:func:`head_loss`).

    Most tokens of a chat row are the prompt's, so most of ``B x T x V`` logits would be computed for no loss.
    """
    plain = call.labels is not None and call.shift_labels is None and not call.fused and not call.return_shadow
    if not plain or call.is_classifier or call.names is not None or torch.compiler.is_compiling():
        return False
    routers = getattr(_text_config(model), "output_router_logits", False)
    return not (_teaches(call) or routers or kwargs.get("logits_to_keep") or kwargs.get("return_dict") is False)


def needs_all_logits(call: ShadowCall, model: nn.Module) -> bool:
    """Whether this pass must have the attached path's logits: a shadow learns from them, or they were asked for."""
    return call.return_shadow or (_teaches(call) and model.training)


def _teaches(call: ShadowCall) -> bool:
    """Whether a shadow of this pass learns from the attached path's logits."""
    return any(part.weights.config.shadow_loss != "ce" for part in call.parts)


def _task_loss(model: Any, hub: ShadowHub, call: ShadowCall, state: Tensor) -> Tensor:
    """The attached path's loss (first term of Eq. 8) from what the base's head reads, ``(B, T, d)``."""
    assert call.labels is not None
    targets = shift_left(call.labels, hub)
    count = count_targets(targets, shifted=False) if call.num_items is None else call.num_items
    return _mean(_path_sum(model, hub, model.get_output_embeddings(), state, targets), count)


def _mean(total: Tensor, count: Any) -> Tensor:
    """A sum over targets as a mean over ``count`` of them; 0 where there are none."""
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def _recount(loss: Tensor, connected: Tensor, call: ShadowCall, shift: int) -> Tensor:
    """A mean over this batch's own targets, as some architectures compute it, as one over ``num_items_in_batch``."""
    assert call.labels is not None
    own = count_targets(call.labels, shifted=shift == 1)
    if not int(own):
        return connected.sum() * 0.0
    return loss if call.num_items is None else loss * (own / torch.as_tensor(call.num_items, device=loss.device))


def _lm_path(
    model: nn.Module, hub: ShadowHub, call: ShadowCall, teacher: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The shadow's loss (second term of Eq. 8) if there are targets, and its logits (Eq. 11) if they are asked for.

    In a mixed batch the loss is that of all rows which have a shadow, whichever it is.

    Args:
        teacher: the attached path's logits ``(B, T, V)`` without their graph, in training; None: cross-entropy alone.
    """
    loss, logits, pieces = None, None, []
    targeted = call.labels is not None or call.shadow_labels is not None
    targets = _targets(call, hub) if targeted else None
    total: Any = 0.0
    count: Any = 0
    for part in call.parts:
        with as_only_adapter(part):
            if targets is not None:
                goals = part.pick(targets)
                distillation = None if teacher is None else _distillation(call, hub, part, teacher, targets)
                total = total + _path_sum(model, hub, lm_head(model, part.weights), part.s0, goals, distillation)
                count = count + count_targets(goals, shifted=False).to(total.device)
            if call.return_shadow:
                kept = _keep(part.s0, call.logits_to_keep)
                head = lm_head(model, part.weights)
                pieces.append(lm_logits(model, hub, head, kept.flatten(0, 1)).unflatten(0, kept.shape[:2]))
    if targets is not None:
        items = call.num_items if call.shadow_labels is None else call.shadow_num_items
        loss = _mean(total, count if items is None else items)
    if call.return_shadow:
        logits = assemble(call.parts, pieces, sum(len(piece) for piece in pieces))
    return loss, logits


def _classifier_path(model: nn.Module, call: ShadowCall) -> tuple[Tensor | None, Tensor | None]:
    """The shadow's loss (second term of Eq. 9) if there are targets, and its logits.

    In a mixed batch both are those of the rows which have a shadow, part by part.
    """
    pieces = []
    for part in call.parts:
        ids = None if call.input_ids is None else part.pick(call.input_ids)
        mask = call.attention_mask
        mask = part.pick(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else mask
        pieces.append(_classify(model, part.weights, part.s0, ids, mask))
    targets = call.labels if call.shadow_labels is None else call.shadow_labels
    loss = None
    if targets is not None:
        items = call.num_items if call.shadow_labels is None else call.shadow_num_items
        goals = torch.cat([part.pick(targets) for part in call.parts]) if call.names is not None else targets
        loss = _classification_loss(model, torch.cat(pieces) if call.names is not None else pieces[0], goals, items)
    if call.names is not None and BASE in call.names:
        return loss, None
    return loss, assemble(call.parts, pieces, sum(len(piece) for piece in pieces))


def _classify(model: nn.Module, weights: AdapterWeights, s0: Tensor, ids: Tensor | None, mask: Any) -> Tensor:
    """Logits ``(B, C)`` of the shadow's own classifier (Eq. 9)."""
    head: Any = weights.head
    logits: Tensor = head(pool_last(s0, _text_config(model), ids, mask).to(head.weight.dtype))
    return logits


def lm_head(model: Any, weights: AdapterWeights) -> Any:
    """The LM head that reads ``s^(0)``: the shadow's own (``own_shadow_head``), else the base's."""
    return model.get_output_embeddings() if weights.head is None else weights.head


def _text_config(model: nn.Module) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator, no-any-return]


def _targets(call: ShadowCall, hub: ShadowHub) -> Tensor:
    """The shadow path's target at every position, ``(B, T)``."""
    if call.shadow_labels is None and call.shift_labels is not None:
        return call.shift_labels
    labels = call.labels if call.shadow_labels is None else call.shadow_labels
    assert labels is not None
    return shift_left(labels, hub)


def _distillation(
    call: ShadowCall, hub: ShadowHub, part: Part, teacher: Tensor, targets: Tensor
) -> Distillation | None:
    """What a ``shadow_loss`` other than "ce" teaches the rows of ``part``; None for "ce".

    The attached path is the teacher wherever both paths are to say the same; where ``shadow_labels`` want something else of
    the shadow, it would teach the opposite.
    """
    kind = part.weights.config.shadow_loss
    if kind == "ce":
        return None
    if call.labels is None and call.shift_labels is None:
        raise ConfigError(
            f"shadow_loss is '{kind}' and shadow_labels were passed but labels were not, so nobody knows where both paths are "
            "to say the same; pass labels too (label smoothing and compute_loss_func take them away), or use shadow_loss='ce'"
        )
    if teacher.shape[:2] != targets.shape:
        raise ConfigError(
            f"shadow_loss is '{kind}' but the logits have shape {tuple(teacher.shape[:2])} for targets of shape "
            f"{tuple(targets.shape)}; leave out logits_to_keep"
        )
    taught = targets != IGNORE
    if call.shadow_labels is not None:
        theirs = call.shift_labels if call.shift_labels is not None else shift_left(call.labels, hub)  # type: ignore[arg-type]
        taught = taught & (targets == theirs.to(targets.device))
    divergence = acceptance_loss if kind == "lk" else distillation_kl
    return Distillation(part.pick(teacher), part.pick(taught), divergence, with_labels=kind == "both")


def shift_left(labels: Tensor, hub: ShadowHub) -> Tensor:
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE) if hub.facts.label_shift else labels


@dataclass(frozen=True)
class Distillation:
    """What the attached path teaches the shadow in one forward pass."""

    teacher: Tensor
    """Logits ``(B, T, V)``, without their graph."""
    taught: Tensor
    """``(B, T)``: where the shadow is to say what the attached path is to say."""
    divergence: Callable[[Tensor, Tensor], Tensor]
    """Of the shadow's logits ``(N, V)`` from the teacher's, ``(N,)``."""
    with_labels: bool
    """Whether the cross-entropy counts there too."""


def _path_sum(
    model: nn.Module,
    hub: ShadowHub,
    head: Any,
    states: Tensor,
    targets: Tensor,
    distillation: Distillation | None = None,
) -> Tensor:
    """Sum over its targets of the losses of a path that ends in ``states`` (either term of Eq. 8), 0-d."""
    targets = targets.to(states.device)
    plain, rows = targets.reshape(-1), states.reshape(-1, states.shape[-1])
    teacher = taught = plain[:0]
    if distillation is not None:
        teacher, taught = distillation.teacher.flatten(0, 1), distillation.taught.reshape(-1).to(states.device)
        plain = plain if distillation.with_labels else plain.masked_fill(taught, IGNORE)

    def loss(rows: Tensor, where: Tensor) -> Tensor:
        logits = lm_logits(model, hub, head, rows)
        total: Tensor = model.loss_function(  # type: ignore[operator]
            logits=logits[None],
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=1,
            shift_labels=plain[where][None],
        )
        if distillation is None:
            return total
        divergence = distillation.divergence(logits, teacher[where.to(teacher.device)])
        return total + (divergence * taught[where].to(divergence.device)).sum().to(total.device)

    where = torch.arange(len(rows), device=states.device)
    if not torch.compiler.is_compiling():  # a boolean mask has a data-dependent shape, which breaks the graph
        where = where[targets.reshape(-1) != IGNORE]
        rows = rows[where]
    frozen = hub.facts.is_linear and not any(p.requires_grad for p in head.parameters())
    return head_loss(rows, where, loss, frozen=frozen)


def _classification_loss(model: nn.Module, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
    """As the stock classifiers, but finite for a fully masked batch and scaled for accumulation (Eq. 9)."""
    config: Any = model.config
    single = config.problem_type in (None, "single_label_classification") and config.num_labels > 1
    if single and labels.dtype in (torch.long, torch.int):
        config.problem_type = "single_label_classification"
        count = count_targets(labels, shifted=False) if items is None else items
        return token_cross_entropy(logits.view(-1, config.num_labels), labels.view(-1).to(logits.device), count)
    loss: Tensor = model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=config)  # type: ignore[operator]
    if items is None:
        return loss
    # Trainer counts what labels hold: a row of several labels or targets counts as often
    return loss * (count_targets(labels, shifted=False).to(loss.device) / torch.as_tensor(items, device=loss.device))


def _keep(state: Tensor, logits_to_keep: Any) -> Tensor:
    if isinstance(logits_to_keep, int):
        return state[:, -logits_to_keep:] if logits_to_keep else state
    return state[:, logits_to_keep]


def shadow_path_loss(model: nn.Module, hub: ShadowHub, batch: dict[str, Any], *, items: Any = None) -> Tensor:
    """The second term of Eqs. 8-9 from the shadow alone: what the shadow path costs a batch, without running the base.

    Args:
        model: the transformers model that carries the adapter. batch: ``input_ids`` ``(B, T)``, ``attention_mask``, and
            ``shadow_labels`` ``(B, T)``, of a classifier ``(B,)``. items: number of targets to normalise by; None: its own.

    Returns:
        0-d loss, not yet multiplied with lambda.
    """
    adapter = hub.active_name()
    if adapter is None:
        raise ConfigError("no adapter is enabled; enable or set one")
    weights = weights_of(hub, model, adapter)
    if weights.is_classifier:
        s0 = _alone(weights, model, batch)
        logits = _classify(model, weights, s0, batch["input_ids"], batch.get("attention_mask"))
        return _classification_loss(model, logits, batch["shadow_labels"], items)
    targets = shift_left(batch["shadow_labels"], hub)
    count = count_targets(targets, shifted=False) if items is None else items
    s0 = _alone(weights, model, batch, targets)
    return _mean(_path_sum(model, hub, lm_head(model, weights), s0, targets[:, -s0.shape[1] :]), count)


def _alone(weights: AdapterWeights, model: nn.Module, batch: dict[str, Any], targets: Tensor | None = None) -> Tensor:
    """``s^(0)`` without the base, ``(B, T, d)``; with ``targets`` ``(B, T)`` from the first one on or earlier, ``(B, T', d)``.

    The tokens that all rows begin with (a system message) run once for the batch, in the same graph, through a cache of keys
    and values; so gradients are those of whole rows.
    """
    ids, takes = batch["input_ids"], weights.signature
    passed = {k: batch[k] for k in ("position_ids", "attention_mask") if batch.get(k) is not None and takes.accepts(k)}
    shared = 0
    if targets is not None and "position_ids" not in passed and shadow_caches_in_graph(weights):
        shared = shared_tokens(ids, passed.get("attention_mask"), targets)
    if not shared:
        return initial_state(weights, ids, None, model, use_cache=False, **passed)
    cache = DynamicCache(config=weights.backbone.config)
    through = {takes.cache: cache, "use_cache": True}
    initial_state(weights, ids[:1, :shared], None, model, **through)
    cache.batch_repeat_interleave(len(ids))
    return initial_state(weights, ids[:, shared:], None, model, **passed, **through)

"""How one token flows: four hooks on the base's own modules.

``model`` (before): take the shadow's arguments out of the call, start a :class:`ShadowCall`.
``backbone`` (before): run the shadow backbone on the same input, ``s^(0)``; its cache lives in the base's cache.
``layer`` (before): refine, i.e. advance the shadow state with the layer's input and correct that input.
``model`` (after): the shadow's loss and logits from ``s^(0)``; the joint loss.

The :class:`ShadowCall` travels through the keyword arguments of the base's own forwards, and where an architecture does not
hand those down, through a context variable that is set for the duration of one forward. Nothing is stored on a module, so
threads and interleaved generations cannot mix, and a checkpointed layer that runs again finds its own state again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from shadowpeft.core import Trajectory, count_targets, distillation_kl, head_loss, joint_loss, token_cross_entropy
from shadowpeft.core.losses import IGNORE
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf import call as calls
from shadowpeft.hf import mixed, supervision
from shadowpeft.hf.base.head import lm_logits, pool_last
from shadowpeft.hf.base.signature import Signature
from shadowpeft.hf.base.weights import allow_gradients
from shadowpeft.hf.cache import check_untouched, own_cache, shadow_views
from shadowpeft.hf.call import CALL, Part, ShadowCall
from shadowpeft.hf.layer import ShadowHub, ShadowLink, Step, Weights, initial_state

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


# --------------------------------------------------------------------------------------------------------- whole model


def before_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    backbone: str,
    signature: Signature,
    carried: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take out ``adapter_names``, ``shadow_labels``, ``shadow_num_items_in_batch`` and ``return_shadow``; start the call."""
    kwargs = signature.by_name(args, kwargs)
    shadow_labels = kwargs.pop("shadow_labels", None)
    shadow_num_items = kwargs.pop("shadow_num_items_in_batch", None)
    return_shadow = bool(kwargs.pop("return_shadow", False))
    hub: ShadowHub = model.get_submodule(backbone).shadow_hub  # type: ignore[assignment]
    call = _start(hub, model, kwargs)
    if call is None:
        if return_shadow:
            raise ConfigError("return_shadow=True was passed but no adapter is enabled; enable or set one")
        return (), kwargs
    if return_shadow and call.names is not None and mixed.BASE in call.names:
        raise ConfigError(
            f"return_shadow=True was passed but row {call.names.index(mixed.BASE)} is '{mixed.BASE}', which has no shadow; "
            "leave such rows out"
        )
    if torch.is_grad_enabled() and model.training:
        if "use_cache" in signature.names and kwargs.get(signature.cache) is None:
            kwargs["use_cache"] = bool(
                kwargs.get("use_cache")
            )  # a cache that nobody asked for costs memory in training
        if not torch.compiler.is_compiling():
            allow_gradients(model)
    call.return_shadow = return_shadow
    call.fused = bool(kwargs.get("fused_lm_head", False))
    if call.fused and call.names is not None:
        raise ConfigError("adapter_names cannot be used with a fused LM head; leave out fused_lm_head")
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
    if call.labels is not None and call.parts:
        if _is_classifier(call):
            # stock classifiers return NaN for a fully masked batch and do not rescale for gradient accumulation
            kwargs.pop("labels")
        elif not call.fused:
            count = call.num_items
            if count is None:
                count = (
                    count_targets(call.shift_labels, shifted=False)
                    if call.shift_labels is not None
                    else count_targets(call.labels, shifted=hub.facts.shift == 1)
                )
            if signature.passes_on:
                kwargs["num_items_in_batch"] = torch.as_tensor(count).clamp(min=1)
    if signature.passes_on:
        kwargs[CALL] = call
    if not (carried and torch.compiler.is_compiling()):
        calls.enter(call)
    return (), kwargs


def _start(hub: ShadowHub, model: nn.Module, kwargs: dict[str, Any]) -> ShadowCall | None:
    """The call of this forward pass, by row where ``adapter_names`` says so; None if the base answers alone."""
    names = kwargs.pop("adapter_names", None)
    compiling, repeats = torch.compiler.is_compiling(), False
    if compiling and (names is not None or calls.any_named):
        # not traced: the forward pass then runs as it is, where it can, and raises this where it must be one graph
        raise ConfigError("adapter_names was passed to a compiled model; call the model itself, or compile per adapter")
    asked = None if compiling else calls.request.get()
    if asked is not None and asked.model is not model:  # such as an assistant's forward inside a generation
        asked = None
    if names is None and asked is not None:
        names, repeats = asked.names, asked.repeats
    if names is None:
        adapter = hub.active_name()
        return None if adapter is None else ShadowCall([Part(mixed.held_weights(hub, model, adapter, asked))])
    mixed.check_mode(model)
    if hub.disable_adapters:
        raise ConfigError("adapter_names was passed but the adapters are disabled; enable them or leave it out")
    names = mixed.check_length(mixed.check_names(names, hub), mixed.batch_rows(kwargs), repeats=repeats)
    return mixed.mixed_call(hub, model, names, {} if asked is None else asked.held)


def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, carried: bool) -> None:
    """The forward of ``module`` has ended, also by an error: take its call out of the context."""
    if not (carried and torch.compiler.is_compiling()):
        calls.leave()


def after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, backbone: str) -> Any:
    """Add ``task_loss``, ``shadow_loss`` and, where asked, ``shadow_logits`` and ``shadow_state``; join the losses."""
    call: ShadowCall | None = kwargs.get(CALL) or calls.current()
    if call is None or not call.parts:
        if not isinstance(output, tuple):
            output.task_loss, output.shadow_loss = getattr(output, "loss", None), None
        return output
    if not call.started:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not pass keyword arguments on to its backbone; this architecture is not supported"
        )
    hub: ShadowHub = model.get_submodule(backbone).shadow_hub  # type: ignore[assignment]
    weight = max(float(part.weights.config.auxiliary_loss_weight) for part in call.parts)  # one part in training
    training = model.training and torch.is_grad_enabled()
    if call.fused:
        return _join_fused(model, hub, call, output, weight, training)
    classifier = _is_classifier(call)
    as_tuple = isinstance(output, tuple)
    if as_tuple and call.return_shadow:
        raise ConfigError("return_shadow=True needs return_dict=True")
    first = 1 if as_tuple and call.labels is not None and not classifier else 0  # where a tuple has its logits
    logits = output[first] if as_tuple else output.logits
    with torch.set_grad_enabled(torch.is_grad_enabled() and (weight > 0 or call.return_shadow)):
        if classifier:
            shadow_loss, shadow_logits = _classifier_path(model, call)
        else:
            shadow_loss, shadow_logits = _lm_path(model, hub, call, logits.detach() if training else None)
    task_loss = None
    if call.labels is not None:
        stock = output[0] if as_tuple else output.loss
        if classifier:
            task_loss = _classification_loss(model, logits, call.labels, call.num_items)
        else:
            task_loss = stock if hub.facts.counts else _recount(stock, logits, call, hub.facts.shift)

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
        output.shadow_logits = shadow_logits
        output.shadow_state = mixed.assemble(call.parts, [_s0(part) for part in call.parts], len(logits))
    return output


def _join_fused(model: nn.Module, hub: ShadowHub, call: ShadowCall, output: Any, weight: float, training: bool) -> Any:
    """TRL's fused head gives per-token log-probabilities instead of logits; they carry the shadow's gradient."""
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
            total = _shadow_sum(model, hub, part.weights, _s0(part), _targets(call, hub))
        if training:
            output.log_probs = supervision.join_log_probs(output.log_probs, total, output.label_mask, weight)
        output.shadow_loss = total / output.label_mask.sum().clamp(min=1)
    return output


def _recount(loss: Tensor, logits: Tensor, call: ShadowCall, shift: int) -> Tensor:
    """A mean over this batch's own targets, as some architectures compute it, as one over ``num_items_in_batch``."""
    assert call.labels is not None
    own = count_targets(call.labels, shifted=shift == 1)
    if not int(own):
        return logits.sum() * 0.0
    return loss if call.num_items is None else loss * (own / torch.as_tensor(call.num_items, device=loss.device))


def _s0(part: Part) -> Tensor:
    assert part.trajectory is not None
    return part.trajectory.s0


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
        with mixed.alone(part):
            if targets is not None:
                goals = part.pick(targets)
                lesson = None if teacher is None else _lesson(call, hub, part, teacher, targets)
                total = total + _shadow_sum(model, hub, part.weights, _s0(part), goals, lesson)
                count = count + count_targets(goals, shifted=False).to(total.device)
            if call.return_shadow:
                kept = _keep(_s0(part), call.logits_to_keep)
                head = _lm_head(model, part.weights)
                pieces.append(lm_logits(model, hub, head, kept.flatten(0, 1)).unflatten(0, kept.shape[:2]))
    if targets is not None:
        items = call.num_items if call.shadow_labels is None else call.shadow_num_items
        loss = total / torch.as_tensor(count if items is None else items, device=total.device).clamp(min=1)
    if call.return_shadow:
        logits = mixed.assemble(call.parts, pieces, sum(len(piece) for piece in pieces))
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
        head: Any = part.weights.head
        pieces.append(head(pool_last(_s0(part), _text_config(model), ids, mask).to(head.weight.dtype)))
    targets = call.labels if call.shadow_labels is None else call.shadow_labels
    loss = None
    if targets is not None:
        items = call.num_items if call.shadow_labels is None else call.shadow_num_items
        goals = torch.cat([part.pick(targets) for part in call.parts]) if call.names is not None else targets
        loss = _classification_loss(model, torch.cat(pieces) if call.names is not None else pieces[0], goals, items)
    if call.names is not None and mixed.BASE in call.names:
        return loss, None
    return loss, mixed.assemble(call.parts, pieces, sum(len(piece) for piece in pieces))


def _lm_head(model: Any, weights: Weights) -> Any:
    """The LM head that reads ``s^(0)``: the shadow's own (``own_shadow_head``), else the base's."""
    return model.get_output_embeddings() if weights.head is None else weights.head


def _text_config(model: nn.Module) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator, no-any-return]


def _is_classifier(call: ShadowCall) -> bool:
    return any(part.weights.is_classifier for part in call.parts)


def _targets(call: ShadowCall, hub: ShadowHub) -> Tensor:
    """The shadow path's target at every position, ``(B, T)``."""
    if call.shadow_labels is None and call.shift_labels is not None:
        return call.shift_labels
    labels = call.labels if call.shadow_labels is None else call.shadow_labels
    assert labels is not None
    return _ahead(labels, hub)


def _lesson(call: ShadowCall, hub: ShadowHub, part: Part, teacher: Tensor, targets: Tensor) -> Lesson | None:
    """What ``shadow_loss="kl"`` or "both" teaches the rows of ``part``; None for "ce".

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
        theirs = call.shift_labels if call.shift_labels is not None else _ahead(call.labels, hub)  # type: ignore[arg-type]
        taught = taught & (targets == theirs.to(targets.device))
    return Lesson(part.pick(teacher), part.pick(taught), plain=kind == "both")


def _ahead(labels: Tensor, hub: ShadowHub) -> Tensor:
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE) if hub.facts.shift else labels


@dataclass(frozen=True)
class Lesson:
    """What the attached path teaches the shadow in one forward pass."""

    teacher: Tensor
    """Logits ``(B, T, V)``, without their graph."""
    taught: Tensor
    """``(B, T)``: where the shadow is to say what the attached path is to say."""
    plain: bool
    """Whether the cross-entropy counts there too."""


def _shadow_sum(
    model: nn.Module, hub: ShadowHub, weights: Weights, s0: Tensor, targets: Tensor, lesson: Lesson | None = None
) -> Tensor:
    """Sum of the shadow path's losses over its targets (second term of Eq. 8), 0-d."""
    head = _lm_head(model, weights)
    targets = targets.to(s0.device)
    plain, rows = targets.reshape(-1), s0.reshape(-1, s0.shape[-1])
    teacher = taught = plain[:0]
    if lesson is not None:
        teacher, taught = lesson.teacher.flatten(0, 1), lesson.taught.reshape(-1).to(s0.device)
        plain = plain if lesson.plain else plain.masked_fill(taught, IGNORE)

    def loss(rows: Tensor, where: Tensor) -> Tensor:
        logits = lm_logits(model, hub, head, rows)
        total: Tensor = model.loss_function(  # type: ignore[operator]
            logits=logits[None],
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=1,
            shift_labels=plain[where][None],
        )
        if lesson is None:
            return total
        divergence = distillation_kl(logits, teacher[where.to(teacher.device)])
        return total + (divergence * taught[where].to(divergence.device)).sum().to(total.device)

    where = torch.arange(len(rows), device=s0.device)
    if not torch.compiler.is_compiling():  # a boolean mask has a data-dependent shape, which breaks the graph
        where = where[targets.reshape(-1) != IGNORE]
        rows = rows[where]
    frozen = hub.facts.plain and not any(p.requires_grad for p in head.parameters())
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
    signature: Signature,
    base_layers: int,
    carried: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compute ``s^(0)`` (Eq. 1) from the backbone's own arguments and start the trajectory."""
    hub: ShadowHub = backbone.shadow_hub  # type: ignore[assignment]
    kwargs = signature.by_name(args, kwargs)
    call: ShadowCall | None = kwargs.get(CALL)
    if call is None and not (carried and torch.compiler.is_compiling()):
        call = calls.current()
    if call is None:
        adapter = hub.active_name()
        if adapter is None:
            return None
        call = ShadowCall([Part(hub.records.get(adapter) or hub.read(adapter))])
    config: Any = backbone.config
    cache = kwargs.get(signature.cache)
    use_cache = kwargs.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    if getattr(backbone, "gradient_checkpointing", False) and backbone.training:
        use_cache = False
    if use_cache and cache is None:
        cache = kwargs[signature.cache] = own_cache(backbone)
    if cache is not None and not call.parts:
        check_untouched(cache)
    views = [None] * len(call.parts) if cache is None else shadow_views(cache, base_layers, config, call)
    for part, view in zip(call.parts, views, strict=True):
        _run_shadow(part, view, call, backbone, kwargs)
    call.streams_first = hasattr(config, "altup_num_inputs")  # shapes alone cannot tell where batch = tokens = streams
    if signature.passes_on:
        kwargs[CALL] = call
    if not (carried and torch.compiler.is_compiling()):
        calls.enter(call)
    return (), kwargs


def _run_shadow(part: Part, view: Any, call: ShadowCall, backbone: Any, kwargs: dict[str, Any]) -> None:
    """``s^(0)`` of one part (Eq. 1), from its rows of the backbone's arguments ``kwargs``."""
    weights = part.weights
    takes = weights.takes
    rows = None if part.rows is None else len(call.names or ())
    passed = {
        k: _pick(part, k, kwargs[k], rows)
        for k in ("position_ids", *_PACKED)
        if kwargs.get(k) is not None and takes.accepts(k)
    }
    if takes.accepts("attention_mask"):
        mask = _shadow_mask(kwargs.get("attention_mask"), backbone.config, weights.backbone.config)
        passed["attention_mask"] = _pick(part, "attention_mask", mask, rows)
    passed.update({takes.cache: view, "use_cache": view is not None})
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    s0 = initial_state(
        weights,
        None if ids is None else part.pick(ids),
        None if embeds is None else part.pick(embeds),
        backbone,
        **passed,
    )
    first = weights.config.mathematics()["first_refined_layer"]
    part.trajectory = Trajectory(first, s0, keep_all=torch.is_grad_enabled())


def _pick(part: Part, name: str, value: Any, rows: int | None) -> Any:
    """The part's rows of an argument of the backbone, in a batch of ``rows`` (None: the part has all)."""
    if rows is None or value is None:
        return value
    if isinstance(value, dict):
        return {key: _pick(part, name, each, rows) for key, each in value.items()}
    if isinstance(value, Tensor) and name not in _PACKED:
        axis = 1 if name == "position_ids" and value.dim() == 3 else 0  # several kinds of positions come first
        if value.shape[axis] == 1:
            return value
        if value.shape[axis] == rows:
            return part.pick(value, axis)
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UnsupportedModelError(
        f"{name} is {shape}, which cannot be divided by the {rows} rows of adapter_names; run one batch per adapter"
    )


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
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, hidden: str
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Refine the layer's input, its argument ``hidden``, with the shadow state (Eqs. 2-7)."""
    call: ShadowCall | None = kwargs.pop(CALL, None)
    link: ShadowLink | None = getattr(layer, "shadow_link", None)
    if link is None:
        return args, kwargs
    if call is None and not torch.compiler.is_compiling():
        call = calls.current()
    if call is None:
        adapter = link.active_name()
        if adapter is None or adapter not in link.shadowpeft_injection:
            return args, kwargs
        raise _without_state(link)
    h = whole = args[0] if args else kwargs[hidden]
    for part in call.parts:
        weights = part.weights
        step = weights.steps.get(link.layer) if weights.whole else link.step(weights.adapter)
        if step is not None:
            h = _refine(layer, link, call, part, step, h, whole)
    if args:
        return (h, *args[1:]), kwargs
    return args, {**kwargs, hidden: h}


def _without_state(link: ShadowLink) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"decoder layer {link.layer} was called without the shadow's state; call the whole model"
    )


def _refine(
    layer: nn.Module, link: ShadowLink, call: ShadowCall, part: Part, step: Step, h: Tensor, whole: Tensor
) -> Tensor:
    """``h`` with the rows of ``part`` corrected; ``whole`` is the layer's input before any part corrected its own."""
    if part.trajectory is None:
        raise _without_state(link)
    if part.trajectory.keep_all and not torch.is_grad_enabled():
        # up to 5.22 transformers checkpoints a layer together with its hooks; a reentrant checkpoint then cuts the path
        # of gradients through the shadow state, which is no positional input of the layer
        raise UnsupportedModelError(
            f"decoder layer {link.layer} runs inside a reentrant checkpoint, which loses the shadow's gradients; use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or transformers 5.23 or newer"
        )
    s = part.trajectory.read(link.layer).to(h.device)
    norm = part.weights.norm
    streams = None
    if h.dim() != s.dim():
        shape = s.shape if part.rows is None else (len(call.names or ()), *s.shape[1:])
        streams = _streams(h, tuple(shape), call.streams_first)
    axis = 1 if streams == 0 else 0  # of the rows of the batch
    own = part.pick(whole, axis)
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        own, s = checkpoint(link, step, own, s, norm, streams, use_reentrant=False)
    else:
        own, s = link(step, own, s, norm, streams)
    part.trajectory.write(link.layer, s)
    return own if part.rows is None else h.index_copy(axis, part.index(h.device), own)


def _streams(h: Tensor, shape: tuple[int, ...], streams_first: bool) -> int:
    """The axis of ``h`` that counts residual streams, next to batch, tokens and width (``shape``)."""
    first, last = tuple(h.shape[1:]) == shape, (*h.shape[:2], h.shape[-1]) == shape
    if h.dim() != len(shape) + 1 or not (first or last):
        raise UnsupportedModelError(
            f"a decoder layer gets hidden states of shape {tuple(h.shape)} but (batch, tokens, width) or one more axis of "
            f"streams was expected for a shadow state of {shape}; this architecture is not supported"
        )
    return 0 if first and (streams_first or not last) else 2


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
    weights = mixed.weights_of(hub, model, adapter)
    takes = weights.takes
    passed = {k: batch[k] for k in ("position_ids", "attention_mask") if batch.get(k) is not None and takes.accepts(k)}
    s0 = initial_state(weights, batch["input_ids"], None, model, use_cache=False, **passed)
    targets = _ahead(batch["shadow_labels"], hub)
    count = count_targets(targets, shifted=False) if items is None else items
    return _shadow_sum(model, hub, weights, s0, targets) / torch.as_tensor(count, device=s0.device).clamp(min=1)

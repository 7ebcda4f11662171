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

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shadowpeft.core import Trajectory, count_targets
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.signature import Signature, keeps_state
from shadowpeft.hf.base.weights import allow_gradients
from shadowpeft.hf.forward import below, losses, rows, supervision
from shadowpeft.hf.forward import call as calls
from shadowpeft.hf.forward.cache import check_untouched, own_cache, shadow_views
from shadowpeft.hf.forward.call import CALL, Part, ShadowCall, initial_state, read_weights
from shadowpeft.hf.forward.inputs import PACKED, pick_argument, shadow_mask, streams_axis
from shadowpeft.hf.forward.outputs import keep_beside
from shadowpeft.hf.forward.recurrent import goes_on
from shadowpeft.hf.layer import ShadowHub, ShadowLink, Step

NO_PAGES = (
    "generate_batch keeps a paged cache, which holds no shadow; use generate, or shadowpeft serve for many requests"
)

# --------------------------------------------------------------------------------------------------------- whole model


def before_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    backbone: str,
    signature: Signature,
    kwargs_reach_layers: bool,
    weighted: list[tuple[str, nn.Module]],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take out of the call what is the shadow's own (``adapter_names``, ``shadow_labels``, ``shadow_num_items_in_batch``,
    ``return_shadow``, ``base_state``, ``shadow_state``, ``loss_alone``); start the call."""
    kwargs = signature.by_name(args, kwargs)
    if "cache" in kwargs and "cache" not in signature.names:
        raise UnsupportedModelError(NO_PAGES)
    shadow_labels = kwargs.pop("shadow_labels", None)
    shadow_num_items = kwargs.pop("shadow_num_items_in_batch", None)
    return_shadow = bool(kwargs.pop("return_shadow", False))
    base_state, shadow_state = kwargs.pop("base_state", None), kwargs.pop("shadow_state", None)
    loss_alone = bool(kwargs.pop("loss_alone", False))
    hub: ShadowHub = model.get_submodule(backbone).shadow_hub  # type: ignore[assignment]
    call = start(hub, model, kwargs)
    if call is None:
        given = "return_shadow=True" if return_shadow else "base_state or shadow_state"
        if return_shadow or base_state is not None or shadow_state is not None:
            raise ConfigError(f"{given} was passed but no adapter is enabled; enable or set one")
        return (), kwargs
    if return_shadow and call.names is not None and rows.BASE in call.names:
        raise ConfigError(
            f"return_shadow=True was passed but row {call.names.index(rows.BASE)} is '{rows.BASE}', which has no shadow; "
            "leave such rows out"
        )
    if torch.is_grad_enabled() and model.training:
        if "use_cache" in signature.names and kwargs.get(signature.cache) is None:
            kwargs["use_cache"] = bool(
                kwargs.get("use_cache")
            )  # a cache that nobody asked for costs memory in training
        if not torch.compiler.is_compiling():
            allow_gradients(weighted)
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
    if loss_alone and "logits_to_keep" in signature.names and losses.needs_no_logits(call, model, hub, kwargs):
        call.loss_alone, kwargs["logits_to_keep"] = True, 1
        kwargs.pop("labels")
    elif call.labels is not None and call.parts:
        if call.is_classifier:
            # stock classifiers return NaN for a fully masked batch and do not rescale for gradient accumulation
            kwargs.pop("labels")
        elif not call.fused:
            if losses.needs_all_logits(call, model) and "skip_logits" in inspect.signature(model.forward).parameters:
                kwargs.setdefault("skip_logits", False)  # Liger's forward computes its loss without them
            count = call.num_items
            if count is None:
                count = (
                    count_targets(call.shift_labels, shifted=False)
                    if call.shift_labels is not None
                    else count_targets(call.labels, shifted=hub.facts.label_shift == 1)
                )
            if signature.passes_on:
                kwargs["num_items_in_batch"] = torch.as_tensor(count).clamp(min=1)
    if signature.passes_on:
        kwargs[CALL] = call
    if not (kwargs_reach_layers and torch.compiler.is_compiling()):
        calls.enter(call)
    if base_state is not None or shadow_state is not None:
        below.start_above(call, model, hub, kwargs, base_state, shadow_state)
    return (), kwargs


def start(hub: ShadowHub, model: nn.Module, kwargs: dict[str, Any]) -> ShadowCall | None:
    """The call of this forward pass, by row where ``adapter_names`` says so; None if the base answers alone."""
    names = kwargs.pop("adapter_names", None)
    compiling, repeats = torch.compiler.is_compiling(), False
    if compiling and (names is not None or calls.any_named):
        # not traced: the forward pass then runs as it is, where it can, and raises this where it must be one graph
        raise ConfigError("adapter_names was passed to a compiled model; call the model itself, or compile per adapter")
    scope = None if compiling else calls.scope.get()
    if scope is not None and scope.model is not model:  # such as an assistant's forward inside a generation
        scope = None
    if names is None and scope is not None:
        names, repeats = scope.names, scope.repeats
    if names is None:
        adapter = hub.active_name()
        return None if adapter is None else ShadowCall([Part(rows.held_weights(hub, model, adapter, scope))])
    rows.check_mode(model)
    if hub.disable_adapters:
        raise ConfigError("adapter_names was passed but the adapters are disabled; enable them or leave it out")
    names = rows.check_length(rows.check_names(names, hub), rows.batch_rows(kwargs), repeats=repeats)
    return rows.mixed_call(hub, model, names, {} if scope is None else scope.held)


def after_forward(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, kwargs_reach_layers: bool
) -> Any:
    """The forward of ``module`` has ended, also by an error: take its call out of the context."""
    if not (kwargs_reach_layers and torch.compiler.is_compiling()):
        call = calls.current()
        if call is not None:
            below.restore(call)
            if call.headless and output is not None and losses.asks_for_shadow_loss(module, call):
                # a loss from hidden states; the model's own hook, which joins the losses, will not run
                output = supervision.refuse_states(output)
            if call.loss_alone and call.last_state is None and output is not None:  # the backbone's; the model's comes later
                call.last_state = output[0]
        calls.leave()
    return output


def after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, backbone: str) -> Any:
    """Add ``task_loss``, ``shadow_loss`` and, where asked for, ``shadow_logits`` and ``shadow_state``; join the losses."""
    call: ShadowCall | None = kwargs.get(CALL)
    if call is None and not torch.compiler.is_compiling():
        call = calls.current()
    if call is None or not call.parts:
        if not isinstance(output, tuple):
            output.task_loss, output.shadow_loss = getattr(output, "loss", None), None
        return keep_beside(output)
    if not call.started:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not pass keyword arguments on to its backbone; this architecture is not supported"
        )
    hub: ShadowHub = model.get_submodule(backbone).shadow_hub  # type: ignore[assignment]
    if call.fused:
        return keep_beside(losses.join_fused(model, hub, call, output))
    as_tuple = isinstance(output, tuple)
    if as_tuple and call.return_shadow:
        raise ConfigError("return_shadow=True needs return_dict=True")
    has_loss = as_tuple and call.labels is not None and not (call.is_classifier or call.loss_alone)
    first = int(has_loss)  # where a tuple has its logits
    logits = output[first] if as_tuple else output.logits
    stock = (output[0] if has_loss else None) if as_tuple else output.loss
    result = losses.join_losses(model, hub, call, logits, stock)
    if as_tuple:
        head = (result.logits,) if result.loss is None else (result.loss, result.logits)
        return head + tuple(output[first + 1 :])
    output.loss, output.logits = result.loss, result.logits
    unseen = result.shadow_loss is None or result.witness is not None  # else the shadow is frozen, or this is compiled
    if unseen and getattr(output, "hidden_states", None) and losses.asks_for_shadow_loss(model, call):
        output.hidden_states = supervision.guard_states(output.hidden_states, result.witness)
    # attributes, not fields: a field would turn Trainer's `predictions` into a tuple and break compute_metrics
    output.task_loss, output.shadow_loss = result.task_loss, result.shadow_loss
    if call.return_shadow:
        output.shadow_logits = result.shadow_logits
        output.shadow_state = rows.assemble(call.parts, [part.s0 for part in call.parts], len(logits))
    return keep_beside(output)


# ------------------------------------------------------------------------------------------------------------ backbone


def before_backbone(
    backbone: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    signature: Signature,
    base_layers: int,
    kwargs_reach_layers: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Compute ``s^(0)`` (Eq. 1) from the backbone's own arguments and start the trajectory."""
    hub: ShadowHub = backbone.shadow_hub  # type: ignore[assignment]
    kwargs = signature.by_name(args, kwargs)
    call: ShadowCall | None = kwargs.get(CALL)
    if call is None and not (kwargs_reach_layers and torch.compiler.is_compiling()):
        call = calls.current()
    if call is None:
        adapter = hub.active_name()
        if adapter is None:
            if not torch.compiler.is_compiling():
                check_untouched(kwargs.get(signature.cache))
            return None
        call = ShadowCall([Part(hub.records.get(adapter) or read_weights(hub, adapter))])
        call.headless = True
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
    ahead = 0 if call.shadow_state is None else call.shadow_state.shape[1]
    views = [None] * len(call.parts) if cache is None else shadow_views(cache, base_layers, config, call, ahead)
    for part, view in zip(call.parts, views, strict=True):
        run_shadow(part, view, call, backbone, kwargs)
    embeds = kwargs.get("input_ids") is not None
    if embeds and backbone.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        call.embedded_in = backbone
    call.streams_first = hasattr(config, "altup_num_inputs")  # shapes alone cannot tell where batch = tokens = streams
    if signature.passes_on:
        kwargs[CALL] = call
    if not (kwargs_reach_layers and torch.compiler.is_compiling()):
        calls.enter(call)
    return (), kwargs


def run_shadow(part: Part, view: Any, call: ShadowCall, backbone: Any, kwargs: dict[str, Any]) -> None:
    """``s^(0)`` of one part (Eq. 1), from its rows of the backbone's arguments ``kwargs``."""
    weights = part.weights
    first = weights.config.mathematics.first_refined_layer
    if call.shadow_state is not None:
        part.trajectory = Trajectory(first, part.pick(call.shadow_state), keep_all=torch.is_grad_enabled())
        return
    takes = weights.signature
    batch = None if part.rows is None else len(call.names or ())
    passed = {
        k: pick_argument(part, k, kwargs[k], batch)
        for k in ("position_ids", *PACKED)
        if kwargs.get(k) is not None and takes.accepts(k)
    }
    if takes.accepts("attention_mask"):
        dtype = next(weights.backbone.parameters()).dtype
        mask = shadow_mask(kwargs.get("attention_mask"), backbone.config, weights.backbone.config, dtype)
        passed["attention_mask"] = pick_argument(part, "attention_mask", mask, batch)
    passed.update({takes.cache: view, "use_cache": view is not None})
    ids, embeds = (None if kwargs.get(k) is None else part.pick(kwargs[k]) for k in ("input_ids", "inputs_embeds"))

    def run(new: slice, **given: Any) -> Tensor:
        ids_now, embeds_now = (None if each is None else each[:, new] for each in (ids, embeds))
        return initial_state(weights, ids_now, embeds_now, backbone, **given)

    if view is not None and not weights.config.is_mirror and keeps_state(view):
        new = (embeds if ids is None else ids).shape[1]  # type: ignore[union-attr]
        s0 = goes_on(weights.backbone, run, new, passed, view)
    else:
        s0 = run(slice(None), **passed)
    part.trajectory = Trajectory(first, s0, keep_all=torch.is_grad_enabled())


# --------------------------------------------------------------------------------------------------------------- layer


def before_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, hidden: str, index: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Refine the input of layer ``index``, its argument ``hidden``, with the shadow state (Eqs. 2-7)."""
    call: ShadowCall | None = kwargs.pop(CALL, None)
    link: ShadowLink | None = getattr(layer, "shadow_link", None)
    if call is None and not torch.compiler.is_compiling():
        call = calls.current()
    h = whole = args[0] if args else kwargs[hidden]
    if call is not None and below.ends_graph(call, index, h):
        return ((h.detach(), *args[1:]), kwargs) if args else (args, {**kwargs, hidden: h.detach()})
    if link is None:
        return args, kwargs
    if call is None:
        adapter = link.active_name()
        if adapter is None or adapter not in link.shadowpeft_injection:
            return args, kwargs
        raise _without_state(link)
    if call.base_state is not None and index == call.first:
        h = whole = call.base_state.to(h.device)
    for part in call.parts:
        weights = part.weights
        step = weights.steps.get(link.layer) if weights.collected else link.step(weights.adapter)
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
    if norm is not None and "_hf_hook" in vars(norm) and norm.weight.is_meta:
        raise UnsupportedModelError(
            "accelerate has offloaded the adapter's own weights too, but the norm that all its updates share must stay; "
            "offload the base (cpu_offload, disk_offload or device_map) first, and attach or load the adapter then"
        )
    streams = None
    if h.dim() != s.dim():
        shape = s.shape if part.rows is None else (len(call.names or ()), *s.shape[1:])
        streams = streams_axis(h, tuple(shape), call.streams_first)
    axis = 1 if streams == 0 else 0  # of the rows of the batch
    own = part.pick(whole, axis)
    if getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled():
        own, s = checkpoint(link, step, own, s, norm, streams, use_reentrant=False)
    else:
        own, s = link(step, own, s, norm, streams)
    part.trajectory.write(link.layer, s)
    return own if part.rows is None else h.index_copy(axis, part.index(h.device), own)

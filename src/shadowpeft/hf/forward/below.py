"""What lies below the first refined layer: the same in every pass over the same tokens, so it can be computed once.

The shadow enters the base at its first refined layer, with ``s^(0)``; nothing below depends on the adapter. :func:`record` runs
the base up to there. A forward pass that is given what came out (``base_state=``) starts there: the layers below hand their
input on, and the first refined layer reads ``base_state`` in its place. The token embedding is still looked up (a copy of
``B x T x d`` numbers): the shadow may read it, and some bases show it to every layer. ``shadow_state=`` does the same for a
shadow that is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from shadowpeft.errors import ConfigError, ShadowPeftError, UnsupportedModelError
from shadowpeft.hf.base.signature import Signature, trial_mode
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.forward import call as calls
from shadowpeft.hf.forward.call import Part, ShadowCall
from shadowpeft.hf.forward.rows import weights_of
from shadowpeft.hf.layer import ShadowHub

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Greatest relative error of :func:`check_base`: rows run alone round otherwise than rows of a batch, by 1e-6 in float32. A
base whose layers share more than their hidden states is wrong by about 1. In 16 bits rounding reaches 1e-2: 0.1 is allowed."""
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What a base raises whose upper layers need more of the lower ones than their output."""


class _ArrivedError(Exception):
    """Ends a recording: the first refined layer is reached, and nothing above it needs to run."""


@torch.no_grad()
def record(
    model: Any, hub: ShadowHub, input_ids: Tensor, attention_mask: Tensor | None = None, *, shadow: bool = False
) -> dict[str, Tensor]:
    """What :func:`start_above` takes for these tokens, in the mode that ``model`` is in.

    Args:
        model: the transformers model that carries the adapter. input_ids, attention_mask: ``(B, T)``.
        shadow: whether ``s^(0)`` is wanted too.

    Returns:
        ``base_state`` ``(B, T, d)``, the input of the first refined layer before its correction; and ``shadow_state``
        ``(B, T, d)`` if it is wanted.
    """
    adapter = _adapter(hub)
    layer = find_decoder(model).layers[_first(hub, adapter)]
    name = Signature(layer).names[0]
    seen: list[Tensor] = []

    def arrive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs[name])
        raise _ArrivedError

    backbone = model.get_submodule(hub.backbone_name)
    takes = Signature(backbone)
    options = {"use_cache": False} if takes.accepts("use_cache") else {}
    call = ShadowCall([Part(weights_of(hub, model, adapter))] if shadow else [])
    handle = layer.register_forward_pre_hook(arrive, with_kwargs=True, prepend=True)
    calls.enter(call)
    try:
        with suppress(_ArrivedError):
            backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
    finally:
        calls.leave()
        handle.remove()
    states = {"base_state": seen[0]}
    if shadow:
        states["shadow_state"] = call.parts[0].s0
    return states


def start_above(
    call: ShadowCall, model: Any, hub: ShadowHub, kwargs: dict[str, Any], base: Tensor | None, shadow: Tensor | None
) -> None:
    """Let the pass ``call`` start from ``base`` and ``shadow``, both ``(B, T, d)``; :func:`restore` undoes it at its end.

    Args:
        kwargs: arguments of ``model``; a cache is switched off in them, unless the shadow has read ahead in one (then
            ``shadow`` are its states of the tokens that the base reads now, :mod:`shadowpeft.hf.forward.drafting`).

    Raises:
        ConfigError: if the states do not fit the pass, or what they replace is to be trained by it.
    """
    given = "base_state" if base is not None else "shadow_state"
    continues = base is None and kwargs.get("past_key_values") is not None
    if (call.names is not None and not continues) or torch.compiler.is_compiling():
        raise ConfigError(f"{given} was passed to a mixed batch or a compiled model; run one adapter, not compiled")
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if (
        ids is None
        or (kwargs.get("past_key_values") is not None and not continues)
        or kwargs.get("output_hidden_states")
    ):
        raise ConfigError(
            f"{given} was passed without input_ids, or base_state with past_key_values or either with output_hidden_states, "
            "but they hold whole rows at one layer; pass input_ids and leave the others out"
        )
    parts = find_decoder(model)
    for name, state in (("base_state", base), ("shadow_state", shadow)):
        if state is not None and tuple(state.shape) != (*ids.shape, parts.hidden_size):
            raise ConfigError(
                f"{name} has shape {tuple(state.shape)} but must be {(*ids.shape, parts.hidden_size)}, one state a token"
            )
    if continues:
        call.shadow_state = shadow
        return
    left = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all())
    if left and kwargs.get("position_ids") is None:
        raise ConfigError(
            f"{given} was passed for rows with padding on the left, which were recorded at positions from 0; pass "
            "position_ids, or pad on the right"
        )
    kwargs["use_cache"] = False
    trains = model.training and torch.is_grad_enabled()
    if shadow is not None:
        if trains and any(w.requires_grad for w in hub.shadow_weights(call.parts[0].adapter).values()):
            raise ConfigError("shadow_state was passed but the shadow trains; freeze it, or leave shadow_state out")
        call.shadow_state = shadow
    if base is None:
        return
    first = call.first
    if first == 0:
        raise ConfigError(
            "base_state was passed but the first refined layer is 0, so nothing lies below it; leave it out"
        )
    if trains and not is_frozen(parts.backbone):
        raise ConfigError("base_state was passed but modules of the base train (modules_to_save); leave it out")
    call.base_state = base
    for layer in parts.layers[:first]:
        call.skipped.append((layer, vars(layer).get("forward")))  # accelerate puts a forward of its own there
        layer.forward = _unchanged


def restore(call: ShadowCall) -> None:
    """Give the layers that were passed over their own forward back."""
    while call.skipped:
        layer, own = call.skipped.pop()
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _unchanged(*args: Any, **kwargs: Any) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def is_frozen(backbone: nn.Module) -> bool:
    """Whether no weight of the base itself trains."""
    own = (p for name, p in backbone.named_parameters() if "shadow_hub." not in name and "shadow_link." not in name)
    return not any(parameter.requires_grad for parameter in own)


def ends_graph(call: ShadowCall, index: int, h: Tensor) -> bool:
    """Whether the gradient of ``h``, the input of layer ``index``, is of no use to anybody.

    ``enable_input_require_grads``, which PEFT calls where checkpointing is on, makes the embedding's output ask for one, so
    every layer below the first refined one would be kept and run backwards for nothing.
    """
    if call.embedded_in is None or not h.requires_grad or index >= call.first or torch.compiler.is_compiling():
        return False
    return is_frozen(call.embedded_in)


@torch.no_grad()
def check_base(model: Any, hub: ShadowHub) -> None:
    """Try on two short rows whether a pass that starts above equals a whole one; all kinds of layers are judged alike.

    Raises:
        UnsupportedModelError: if it does not, as where upper layers read keys and values of lower ones; if the hidden state is
            not ``(B, T, d)``; if the base drops activations out in training; if it has a loss of its own on every router.
        ConfigError: if nothing lies below the first refined layer.
    """
    parts, kind = find_decoder(model), type(model).__name__
    if _first(hub, _adapter(hub)) == 0:
        raise ConfigError("the first refined layer is 0, so nothing lies below it; refine fewer layers")
    if getattr(parts.config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{kind} has output_router_logits set, a loss over the routers of all layers; set it to false in its configuration"
        )
    device = model.get_input_embeddings().weight.device
    ids = (torch.arange(16, device=device).reshape(2, 8) % (int(parts.config.vocab_size) - 1)) + 1
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    pad = getattr(parts.config, "pad_token_id", None)
    if pad is not None:  # classifiers find a row's last token by it
        ids[ids == pad] = 0
        ids[mask == 0] = pad
    with trial_mode(model):
        try:
            rows = [record(model, hub, ids[:1], mask[:1]), record(model, hub, ids[1:, :5], mask[1:, :5])]
            alone = [row["base_state"][0] for row in rows]
            if alone[0].dim() != 2 or alone[0].shape[-1] != parts.hidden_size:
                raise UnsupportedModelError(
                    f"the layers of {kind} take hidden states of shape {tuple(alone[0].shape)} for a row, not (tokens, width); "
                    "its activations cannot be stored"
                )
            together = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True)
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            above = model(input_ids=ids, attention_mask=mask, base_state=together).logits
        except ShadowPeftError:
            raise
        except _FAILURES as error:
            raise UnsupportedModelError(
                f"{kind} cannot start from a stored activation ({type(error).__name__}: {error}); its upper layers need more "
                "of the lower ones than their output"
            ) from error
    real = mask.bool() if whole.dim() == 3 else slice(None)
    tolerance = TOLERANCE.get(whole.dtype, 0.1)
    if not _same(above[real], whole[real], tolerance):
        raise UnsupportedModelError(
            f"{kind} gives other logits when it starts from a stored activation; its upper layers need more of the lower ones "
            "than their output"
        )
    with _training(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        dropped = record(model, hub, ids[:1], mask[:1])["base_state"][0]
    if not _same(dropped, alone[0], tolerance):
        raise UnsupportedModelError(
            f"{kind} drops activations out in training, so no two passes are the same; set the dropout rates in its "
            "configuration to 0"
        )


def _same(one: Tensor, two: Tensor, tolerance: float) -> bool:
    return float((one - two).float().norm()) <= tolerance * float(two.float().norm())


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    with trial_mode(model):
        for module in model.modules():
            module.training = True
        yield


def _adapter(hub: ShadowHub) -> str:
    name = hub.active_name()
    if name is None:
        raise ConfigError("no adapter is enabled; enable or set one")
    return name


def _first(hub: ShadowHub, adapter: str) -> int:
    return hub.configs[adapter].mathematics.first_refined_layer

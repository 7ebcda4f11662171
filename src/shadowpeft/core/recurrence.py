"""The recurrence over layers: what one forward carries, and the one step that is taken between two base layers.

The paper's loop over l = 1 .. L-1 is ``inject(l) -> base layer l -> update(l)``. Nothing reads ``s^(L-1)``, so the last
update does not exist, and what happens *between* base layers l-1 and l is ``update(l-1)`` followed by ``inject(l)``:
that pair is :func:`refine`, and it needs nothing but the hidden state and the shadow state that reach it.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn

from shadowpeft.core.modules import Injection, Update
from shadowpeft.ops import StepSettings, fits, read_streams, step
from shadowpeft.ops.fused import Weights


def refine(
    h: Tensor,
    s: Tensor,
    injection: Injection,
    alpha: float,
    update: Update | None = None,
    norm: nn.LayerNorm | None = None,
    streams: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``s^(l-1) = update(s^(l-2), h^(l-1))`` (Eqs. 5-7), then ``h~^(l-1) = inject(h^(l-1), s^(l-1))`` (Eqs. 2-4).

    Args:
        h: output of base layer l-1, ``(B, T, d)``. s: shadow state that reached it, ``(B, T, d)``.
        update: the update of layer l-1, or ``None`` at the first refined layer and in the ablation without updates.
        streams: axis of ``h`` that counts parallel residual streams (hyper-connections, AltUp), or ``None`` for the usual
            one stream. The shadow reads the mean over the streams and corrects each stream alike.

    Returns:
        the input of base layer l and the shadow state it was corrected with, both ``(B, T, d)``.
    """
    if streams is None and fits(h, s) and is_untouched(injection, update, norm):
        how = _settings(injection, alpha, update, norm)
        return step(h, s, _weights(injection, update, norm), how, training=injection.training)
    if update is not None:
        s = update(s, read_streams(h, streams), norm)
    return injection(h, s, alpha, streams), s


def is_untouched(*modules: nn.Module | None) -> bool:
    """Whether all modules compute what their class says: without hooks, and without a forward of their own (offloading)."""
    for module in modules:
        if module is not None:
            own = module.__dict__  # said one by one: this runs for every layer and token
            if type(module) not in _KINDS or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
            if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return False
    return True


_KINDS = (Injection, Update, nn.LayerNorm)


def _weights(injection: Injection, update: Update | None, norm: nn.LayerNorm | None) -> Weights:
    """All tensors of a step; read past ``nn.Module``'s own lookup, which costs a token as much as the arithmetic."""
    down, up = injection._parameters["w_down"], injection._parameters["w_up"]
    if update is None:
        return down, up, None, None, None, None, None, None  # type: ignore[return-value]
    own, shared = update._parameters, {} if norm is None else norm._parameters
    return (  # type: ignore[return-value]
        down, up, own["w_in"], own["w_out"], own.get("b_in"), own.get("b_out"), shared.get("weight"), shared.get("bias")
    )  # fmt: skip


_numbers = functools.cache(StepSettings)


def _settings(injection: Injection, alpha: float, update: Update | None, norm: nn.LayerNorm | None) -> StepSettings:
    own = (0.0, 0.0, "silu") if update is None else (update.dropout, update.gate_start, update.activation)
    dropout, gate_start, activation = own
    eps = 1e-5 if norm is None else norm.eps
    return _numbers(
        alpha, injection.dropout, dropout, injection.dropout_first, injection.normalised, eps, gate_start, activation
    )


class Trajectory:
    """What one forward pass carries from layer to layer: the shadow states by layer. Lives for that pass only.

    With gradients every state is kept (autograd holds them anyway), so that a checkpointed layer which runs again in
    the backward pass reads the same state it read before; without gradients only the newest is.
    """

    def __init__(self, first_layer: int, s0: Tensor, keep_all: bool) -> None:
        self.s0 = s0
        self.keep_all = keep_all
        self._states: dict[int, Tensor] = {first_layer - 1: s0}

    def read(self, layer: int) -> Tensor:
        """The shadow state that enters the refinement step before base layer ``layer``, ``(B, T, d)``.

        Raises:
            RuntimeError: if the layers ran out of order, so that there is no such state.
        """
        if layer - 1 not in self._states:
            raise RuntimeError(
                f"base layer {layer} ran without the shadow state of layer {layer - 1} (states of layers "
                f"{sorted(self._states)} exist); decoder layers must run once each, in order"
            )
        return self._states[layer - 1]

    def write(self, layer: int, s: Tensor) -> None:
        """Store the shadow state that base layer ``layer`` was corrected with."""
        if not self.keep_all:
            self._states.clear()
        self._states[layer] = s

"""What happens between two base layers as one step: the update (Eqs. 5-7), then the injection (Eqs. 2-4).

The numbers are those of :mod:`shadowpeft.ops.reference`, with fewer calls. For the backward pass two tensors of the size of
the hidden state are kept, ``h`` and ``s``; the rest is computed again from them and from what has rank ``r`` or ``2m``.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shadowpeft.errors import ConfigError
from shadowpeft.ops.reference import activate, discrepancy, inject, rms

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""``w_down (r, d)``, ``w_up (d, r)``; of the update, or None: ``w_in (2m, d)``, ``w_out (2, d, m)``, ``b_in (2m,)``,
``b_out (2, d)``, LayerNorm's ``weight (d,)`` and ``bias (d,)``."""


@dataclass(frozen=True)
class StepSettings:
    """The numbers of a step that are no tensors; see :func:`shadowpeft.ops.correction` and :func:`shadowpeft.ops.advance`."""

    alpha: float
    dropout: float = 0.0
    """Of the correction."""
    update_dropout: float = 0.0
    """Of the candidate."""
    dropout_first: bool = False
    normalised: bool = False
    eps: float = 1e-5
    gate_start: float = 0.0
    activation: str = "silu"


def fits(h: Tensor, s: Tensor) -> bool:
    """Whether :func:`step` takes these states: of one shape, outside autocast, and not :func:`rewritten`."""
    return not rewritten() and h.shape == s.shape and not torch.is_autocast_enabled(h.device.type)


def rewritten() -> bool:
    """Whether plain operations alone are wanted: by a compiler, which fuses by itself, by ``torch.jit.trace``, or by a
    transform of ``torch.func``; the last two take no backward pass that is written by hand."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    return traced or torch._C._functorch.peek_interpreter_stack() is not None


def step(h: Tensor, s: Tensor, weights: Weights, how: StepSettings, *, training: bool = False) -> tuple[Tensor, Tensor]:
    """``s' = update(s, h)``, then ``h' = inject(h, s')``.

    Args:
        h: output of the base layer, s: shadow state that reached it; both ``(B, T, d)``.
        training: whether the dropouts drop.

    Returns:
        ``h'`` and ``s'``, both ``(B, T, d)``; gradients of any order.
    """
    masks = _masks(h, weights, how) if training else (None, None)
    if torch.is_grad_enabled():
        out: tuple[Tensor, Tensor] = _Step.apply(h, s, how, *masks, *weights)  # type: ignore[no-untyped-call]
        return out
    after, state, _ = _kernels_or_here(h, weights)[0](h, s, how, masks, weights)
    return after, s if state is None else state


KERNELS = "SHADOWPEFT_KERNELS"
"""Environment variable: ``triton`` computes steps on CUDA by :mod:`shadowpeft.ops.kernels`."""


def _kernels() -> Any:
    """The Triton kernels where they are asked for, or None.

    Raises:
        ConfigError: if they are asked for and Triton is not installed, or if the variable has another value.
    """
    asked = os.environ.get(KERNELS, "")
    if asked not in ("", "triton"):
        raise ConfigError(f"{KERNELS} is '{asked}' but must be 'triton', or unset for plain PyTorch")
    if not asked:
        return None
    try:
        return importlib.import_module("shadowpeft.ops.kernels")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{KERNELS} is 'triton' but Triton is not installed; run: pip install 'shadowpeft[triton]', or unset it"
        ) from error


def _kernels_or_here(h: Tensor, weights: Weights) -> tuple[Any, Any]:
    """Forward and backward of a step: the kernels' where they are asked for and take it, else those of this file."""
    found = _kernels() if h.is_cuda else None
    if found is None or not found.takes(h, weights):
        return _forward, _backward
    return found.forward, found.backward


def _masks(h: Tensor, weights: Weights, how: StepSettings) -> tuple[Tensor | None, Tensor | None]:
    """What the two dropouts multiply with: 0, or ``1 / (1 - p)``."""

    def draw(p: float, width: int) -> Tensor | None:
        if not p:
            return None
        mask = torch.empty((*h.shape[:-1], width), dtype=weights[0].dtype, device=h.device)
        return mask.bernoulli_(1 - p).div_(1 - p) if p < 1 else mask.zero_()

    candidate = None if weights[2] is None else draw(how.update_dropout, weights[2].shape[0] // 2)
    return draw(how.dropout, h.shape[-1] if how.dropout_first else weights[0].shape[0]), candidate


def _update(x: Tensor, s: Tensor, how: StepSettings, mask: Tensor | None, weights: Weights) -> tuple[Tensor, ...]:
    """Eqs. 5-7: the next state, ``u (..., 2m)`` before and ``a`` after the activation, candidate and gate, and LayerNorm's
    output, mean and reciprocal deviation."""
    _, _, w_in, w_out, b_in, b_out, norm, norm_bias = weights
    assert w_in is not None
    assert w_out is not None
    y = mean = deviation = x
    if norm is not None:
        y, mean, deviation = torch.native_layer_norm(x, norm.shape, norm, norm_bias, how.eps)
    u = F.linear(y, w_in, b_in)
    a = activate(u, how.activation)
    m = w_out.shape[-1]
    if mask is not None:
        a[..., :m] *= mask
    one = a.numel() == 2 * m  # one token
    both = torch.bmm(a.view(2, 1, m) if one else a.view(-1, 2, m).transpose(0, 1), w_out.transpose(1, 2))
    if b_out is not None:
        both += b_out[:, None]
    both = both.view(2, *x.shape)
    t, g = both[0], both[1]  # no unbind: its views may not be changed in place while a graph is built
    if how.gate_start:
        g += how.gate_start
    g.sigmoid_()
    state = torch.lerp(s, t, g) if s.dtype == t.dtype else torch.lerp(s, t.to(s.dtype), g.to(s.dtype))
    return state, u, a, t, g, y, mean, deviation


def _forward(
    h: Tensor, s: Tensor, how: StepSettings, masks: tuple[Tensor | None, Tensor | None], weights: Weights
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The corrected state, the next one if there is an update, and ``z (..., r)``, what ``W_up`` reads."""
    w_down, w_up = weights[:2]
    x, state = h if h.dtype == w_down.dtype else h.to(w_down.dtype), None
    if weights[2] is not None:
        s = state = _update(x, s, how, masks[1], weights)[0]
    scale = rms(x) if how.normalised else None
    delta = discrepancy(x, s, scale)
    if masks[0] is not None and how.dropout_first:
        delta = delta * masks[0]
    z = F.linear(delta, w_down)
    if masks[0] is not None and not how.dropout_first:
        z = z * masks[0]
    c = F.linear(z, w_up)
    return inject(h, c if scale is None else c * scale, how.alpha), state, z


class _Step(torch.autograd.Function):
    """:func:`step` with gradients."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor, how: StepSettings, m0: Any, m1: Any, *weights: Any) -> tuple[Tensor, Tensor]:
        compute, ctx.differentiate = _kernels_or_here(h, weights)  # type: ignore[arg-type]
        after, state, z = compute(h, s, how, (m0, m1), weights)
        ctx.save_for_backward(h, s, z, m0, m1, *weights)
        ctx.how = how
        return after, s.view_as(s) if state is None else state

    @staticmethod
    def backward(ctx: Any, g_after: Tensor, g_state: Tensor) -> tuple[Any, ...]:
        h, s, z, m0, m1, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients themselves
            return _backward_with_graph((g_after, g_state), ctx.how, (m0, m1), [h, s, *weights], ctx.needs_input_grad)
        g_h, g_s, grads = ctx.differentiate(g_after, g_state, h, s, z, ctx.how, (m0, m1), weights, needs)
        return (g_h, g_s, None, None, None, *grads)


def _backward_with_graph(
    gradients: tuple[Tensor, Tensor], how: StepSettings, masks: Any, inputs: list[Any], needs: Any
) -> tuple[Any, ...]:
    """What :meth:`_Step.backward` returns, by autograd through the step computed again.

    Args:
        inputs: ``h``, ``s`` and the weights. needs: which arguments of :meth:`_Step.forward` need a gradient.
    """
    # aliases, since inputs depend on each other further up (h on s, both on the shared norm): that is not this step's part
    aliases: list[Any] = [each if each is None else each.view_as(each) for each in inputs]
    h, s, *weights = aliases
    after, state, _ = _forward(h, s, how, masks, weights)  # type: ignore[arg-type]
    wanted = (*needs[:2], *needs[5:])
    sources = [each for each, need in zip(aliases, wanted, strict=True) if need]
    ends = [each for each in zip((after, s if state is None else state), gradients, strict=True) if each[0].requires_grad]
    outputs, above = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(outputs, sources, above, create_graph=True, allow_unused=True))
    g_h, g_s, *grads = (next(found) if need else None for need in wanted)
    return g_h, g_s, None, None, None, *grads


def _backward(
    g_after: Tensor, g_state: Tensor, h: Tensor, s: Tensor, z: Tensor, how: StepSettings, masks: Any, weights: Any, needs: Any
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gradients of ``h`` and ``s``, both ``(B, T, d)``, and of the weights that need one."""
    grads: list[Any] = [None] * len(weights)
    x, state, made = h.to(weights[0].dtype), s, ()
    if weights[2] is not None:
        state, *made = _update(x, s, how, masks[1], weights)  # type: ignore[assignment]
    g_x, g_s = _correction_backward(g_after, x, state, z, how, masks[0], weights, grads, needs)
    g_s = g_state - g_s
    if made:
        g_s, below = _update_backward(g_s, x, s, made, how, masks[1], weights, grads, needs)
        g_x += below
    return g_after + g_x.to(h.dtype), g_s, grads


def _correction_backward(
    g_after: Tensor, x: Tensor, s: Tensor, z: Tensor, how: StepSettings, mask: Any, weights: Any, grads: list[Any], needs: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of Eqs. 2-3 for ``x``, and minus the one for ``s``."""
    w_down, w_up = weights[:2]
    scale = rms(x) if how.normalised else None
    delta = discrepancy(x, s, scale)
    above = g_after.to(w_up.dtype)
    g_c = above if scale is None else above * scale
    g_z = torch.matmul(g_c, w_up).mul_(how.alpha)
    if needs[1]:
        grads[1] = _product(g_c, z).mul_(how.alpha)
    if mask is not None and not how.dropout_first:
        g_z *= mask
    if needs[0]:
        grads[0] = _product(g_z, delta if mask is None or not how.dropout_first else delta * mask)
    g_delta = torch.matmul(g_z, w_down)
    if mask is not None and how.dropout_first:
        g_delta *= mask
    if scale is None:
        return g_delta, g_delta.to(s.dtype)
    g_x = _normalised_backward(g_delta, x, scale)
    g_scale = (above * F.linear(z, w_up)).sum(-1, keepdim=True) * how.alpha
    g_x += x * (g_scale / (scale * x.shape[-1]))
    return g_x, _normalised_backward(g_delta.to(s.dtype), s, rms(s))


def _update_backward(
    g_state: Tensor, x: Tensor, s: Tensor, made: Any, how: StepSettings, mask: Any, weights: Any, grads: list[Any], needs: Any
) -> tuple[Tensor, Tensor]:
    """Gradients of Eqs. 5-7 for ``s`` and ``x``."""
    u, a, t, g, y, mean, deviation = made
    _, _, w_in, w_out, _, _, norm, norm_bias = weights
    m, d = w_out.shape[-1], x.shape[-1]
    g_both = torch.empty((2, *x.shape), dtype=t.dtype, device=t.device)
    opened = g_state.to(t.dtype)
    torch.mul(opened, g, out=g_both[0])
    g_s = g_state - g_both[0].to(s.dtype)
    torch.ops.aten.sigmoid_backward.grad_input((t - s.to(t.dtype)).mul_(opened), g, grad_input=g_both[1])
    g_both = g_both.view(2, -1, d)
    if needs[3]:
        grads[3] = torch.bmm(g_both.transpose(1, 2), a.view(-1, 2, m).transpose(0, 1))
    if needs[5]:
        grads[5] = g_both.sum(1)
    g_a = torch.bmm(g_both, w_out).transpose(0, 1).reshape(u.shape)
    if mask is not None:
        g_a[..., :m] *= mask
    g_u = _activation_backward(g_a, u, how.activation)
    if needs[2]:
        grads[2] = _product(g_u, y)
    if needs[4]:
        grads[4] = g_u.flatten(0, -2).sum(0)
    g_y = torch.matmul(g_u, w_in)
    if norm is None:
        return g_s, g_y
    wanted = [True, bool(needs[6]), bool(needs[7])]
    g_x, grads[6], grads[7] = torch.ops.aten.native_layer_norm_backward(
        g_y, x, norm.shape, mean, deviation, norm, norm_bias, wanted
    )
    return g_s, g_x


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` over all rows: ``(a, b)`` of ``(..., a)`` and ``(..., b)``."""
    return torch.mm(left.flatten(0, -2).t(), right.flatten(0, -2))


def _normalised_backward(gradient: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Of ``x / scale`` with ``scale = rms(x)``."""
    along = (gradient * x).mean(-1, keepdim=True) / scale.square()
    return (gradient - x * along) / scale


def _activation_backward(gradient: Tensor, u: Tensor, activation: str) -> Tensor:
    backward = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}[activation]
    return backward(gradient, u)  # type: ignore[no-any-return]

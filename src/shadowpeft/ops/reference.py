"""Equations 2-7 and 13-14 of ShadowPEFT (arXiv 2604.19254), one function each, in plain PyTorch.

Alphabet used everywhere in this package: ``B`` batch, ``T`` tokens, ``d`` base width, ``r`` injection rank, ``m`` hidden
width of the update nets. Weights are stored as ``nn.Linear`` stores them, ``(out, in)``. All functions are pure: they
read no state, keep no state, and broadcast over leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def activate(x: Tensor, activation: str) -> Tensor:
    """``silu`` or ``gelu`` of ``x``."""
    return _ACTIVATIONS[activation](x)


def correction(
    h: Tensor,
    s: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    *,
    dropout: float = 0.0,
    dropout_first: bool = False,
    normalised: bool = False,
    training: bool = False,
) -> Tensor:
    """``c = Dropout((h - s) W_down) W_up`` (Eqs. 2-3).

    ``normalised`` is the variant "scaled", not in the paper: ``c = rms(h) Dropout((h / rms(h) - s / rms(s)) W_down) W_up``,
    so that neither state drowns the other, whatever their sizes.

    Args:
        h: base hidden state ``(B, T, d)``.
        s: shadow state ``(B, T, d)``.
        w_down: ``(r, d)``. w_up: ``(d, r)``.
        dropout: probability; applied after ``W_down`` as in the paper, or to the discrepancy with ``dropout_first``.

    Returns:
        the correction ``(B, T, d)`` in the dtype of the weights.
    """
    h = h.to(w_down.dtype)
    scale = rms(h) if normalised else None
    delta = discrepancy(h, s, scale)
    if dropout_first:
        c = F.linear(F.linear(F.dropout(delta, dropout, training), w_down), w_up)
    else:
        c = F.linear(F.dropout(F.linear(delta, w_down), dropout, training), w_up)
    return c if scale is None else c * scale


def discrepancy(h: Tensor, s: Tensor, scale: Tensor | None) -> Tensor:
    """``h - s`` (Eq. 2), both ``(B, T, d)``; with ``scale = rms(h)`` both states at equal size (the variant "scaled")."""
    return h - s if scale is None else h / scale - s / rms(s)


def rms(x: Tensor) -> Tensor:
    """Root mean square over the width: ``(..., d)`` to ``(..., 1)``, never 0."""
    return (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()


def read_streams(h: Tensor, streams: int | None) -> Tensor:
    """The one hidden state ``(B, T, d)`` of a decoder that carries ``n`` residual streams: their mean over axis ``streams``.

    The paper's decoders have one stream (``streams=None``), for which this is ``h`` itself.
    """
    return h if streams is None else h.mean(streams)


def inject(h: Tensor, c: Tensor, alpha: float) -> Tensor:
    """``h~ = h + alpha * c`` (Eq. 4), in the dtype of ``h``; both ``(B, T, d)``, or broadcast over residual streams."""
    return torch.add(h, c.to(h.dtype), alpha=alpha)


def candidate_and_gate(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    gate_start: float = 0.0,
    activation: str = "silu",
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """``t = W_2 Dropout(act(W_1 x))`` and ``g = sigmoid(W_4 act(W_3 x))`` (Eqs. 5-6, 13-14); the gate from ``gate_start`` on.

    ``W_1`` and ``W_3`` read the same input, so they are one matrix and one multiplication.

    Args:
        x: the (normalised) hidden state ``(B, T, d)``.
        w_in: ``(2m, d)``, rows ``W_1`` then ``W_3``. w_out: ``(2, d, m)``, ``W_2`` then ``W_4``.
        b_in: ``(2m,)`` and b_out: ``(2, d)``, only in PEFT's variant.

    Returns:
        candidate ``(B, T, d)`` and gate in (0, 1), ``(B, T, d)``.
    """
    m = w_in.shape[0] // 2
    hidden = activate(F.linear(x, w_in, b_in), activation)
    bias_t, bias_g = (None, None) if b_out is None else (b_out[0], b_out[1])
    t = F.linear(F.dropout(hidden[..., :m], dropout, training), w_out[0], bias_t)
    opens = F.linear(hidden[..., m:], w_out[1], bias_g)
    g = torch.sigmoid(opens + gate_start if gate_start else opens)
    return t, g


def gated_update(s: Tensor, t: Tensor, g: Tensor) -> Tensor:
    """``s' = (1 - g) * s + g * t`` (Eq. 7), element-wise, all ``(B, T, d)``, in the dtype of ``s``."""
    return torch.lerp(s, t.to(s.dtype), g.to(s.dtype))


def advance(
    s: Tensor,
    h: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    gate_start: float = 0.0,
    activation: str = "silu",
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Eqs. 5-7 in one call: ``s' = gated_update(s, *candidate_and_gate(LN(h)))``.

    Args:
        s: shadow state before the layer ``(B, T, d)``.
        h: output of the base layer ``(B, T, d)``.
        norm_weight: ``(d,)`` affine LayerNorm weight; ``None`` skips the norm (PEFT's variant).

    Returns:
        the shadow state after the layer ``(B, T, d)``.
    """
    x = h.to(w_in.dtype)
    if norm_weight is not None:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    t, g = candidate_and_gate(
        x,
        w_in,
        w_out,
        b_in=b_in,
        b_out=b_out,
        gate_start=gate_start,
        activation=activation,
        dropout=dropout,
        training=training,
    )
    return gated_update(s, t, g)

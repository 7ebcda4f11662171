"""One refinement step of ShadowPEFT (arXiv 2604.19254) as plain PyTorch, for tokens that stand in one row.

Alphabet: ``T`` tokens, ``d`` base width, ``r`` rank of the injection, ``m`` hidden width of the update. Weights are stored as
right factors, ``(in, out)``, not as ``nn.Linear`` does, and the two output matrices of the update are one batched product: for
29 steps of SmolLM2-135M's width on one CPU thread that takes 1.2, 2.2 and 4.4 ms instead of 1.7, 2.7 and 5.1 at 1, 8 and 32
tokens (docs/records/vllm.json). The arithmetic is that of ``shadowpeft.ops`` without dropout; a test runs both. The
distribution does not depend on ``shadowpeft``, so it is written here once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


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
    gate_start: float = 0.0,
    activation: str = "silu",
) -> Tensor:
    """``s' = (1 - g) s + g t`` with ``t = W_2 act(W_1 x)``, ``g = sigmoid(W_4 act(W_3 x) + gate_start)``, ``x = LN(h)``
    (Eqs. 5-7).

    Args:
        s: shadow state ``(T, d)``. h: output of the base layer ``(T, d)``.
        w_in: ``(d, 2m)``, columns of ``W_1`` then ``W_3``. w_out: ``(2, m, d)``, ``W_2`` then ``W_4``.
        b_in: ``(2m,)`` and b_out: ``(2, d)``, in PEFT's variant. norm_weight: ``(d,)``; None: no norm.

    Returns:
        the next shadow state ``(T, d)``.
    """
    x = h if norm_weight is None else F.layer_norm(h, norm_weight.shape, norm_weight, norm_bias, 1e-5)
    hidden = torch.mm(x, w_in) if b_in is None else torch.addmm(b_in, x, w_in)
    halves = ACTIVATIONS[activation](hidden).view(-1, 2, w_out.shape[1]).transpose(0, 1)
    out = torch.bmm(halves, w_out) if b_out is None else torch.baddbmm(b_out.unsqueeze(1), halves, w_out)
    t, g = out.unbind(0)
    return torch.lerp(s, t, torch.sigmoid(g + gate_start if gate_start else g))


def inject(h: Tensor, s: Tensor, w_down: Tensor, w_up: Tensor, *, normalised: bool = False) -> Tensor:
    """``h~ = h + W_up W_down (h - s)`` (Eqs. 2-4); ``normalised``: ``h~ = h + rms(h) W_up W_down (h / rms(h) - s / rms(s))``.

    Args:
        h: ``(T, d)``. s: ``(T, d)``. w_down: ``(d, r)``. w_up: ``(r, d)``, alpha times the trained matrix.

    Returns:
        the corrected state ``(T, d)``.
    """
    if not normalised:
        return torch.addmm(h, torch.mm(h - s, w_down), w_up)
    scale = rms(h)
    return h + scale * torch.mm(torch.mm(h / scale - s / rms(s), w_down), w_up)


def rms(x: Tensor) -> Tensor:
    """Root mean square over the width: ``(T, d)`` to ``(T, 1)``, never 0."""
    return (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()

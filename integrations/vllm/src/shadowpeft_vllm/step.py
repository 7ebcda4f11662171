"""One refinement step of ShadowPEFT (arXiv 2604.19254) as plain PyTorch, for tokens that stand in one row.

Alphabet: ``T`` tokens, ``d`` base width, ``r`` rank of the injection, ``m`` hidden width of the update. Weights are stored as
right factors, ``(in, out)``, not as ``nn.Linear`` does. Both states are changed in place, since vLLM has no other use for them.
A step stands between two layers whose weights have just passed through the caches, so that every operation and every new tensor
costs more than alone; ``benchmarks/vllm_step.py`` measures forms of it there. The arithmetic is that of ``shadowpeft.ops``
without dropout; a test runs both. The distribution does not depend on ``shadowpeft``, so it is written here once more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": partial(F.silu, inplace=True), "gelu": F.gelu}
Norm = tuple[tuple[int, ...], Tensor, Tensor, float]
"""Shape, weight, bias and epsilon of a norm."""


def advance(
    s: Tensor,
    h: Tensor,
    w_in: Tensor,
    w_t: Tensor,
    w_g: Tensor,
    *,
    b_in: Tensor | None = None,
    b_t: Tensor | None = None,
    b_g: Tensor | None = None,
    norm: Norm | None = None,
    gate_start: float = 0.0,
    activation: str = "silu",
) -> Tensor:
    """``s' = (1 - g) s + g t`` with ``t = W_2 act(W_1 x)``, ``g = sigmoid(W_4 act(W_3 x) + gate_start)``, ``x = LN(h)``
    (Eqs. 5-7).

    Args:
        s: shadow state ``(T, d)``, changed in place. h: output of the base layer ``(T, d)``.
        w_in: ``(d, 2m)``, columns of ``W_1`` then ``W_3``. w_t: ``(m, d)``, ``W_2``. w_g: ``(m, d)``, ``W_4``.
        b_in: ``(2m,)``, b_t and b_g: ``(d,)``, in PEFT's variant. norm: None: no norm.

    Returns:
        the next shadow state, which is ``s``.
    """
    x = h if norm is None else torch.native_layer_norm(h, *norm)[0]
    hidden = ACTIVATIONS[activation](torch.mm(x, w_in) if b_in is None else torch.addmm(b_in, x, w_in))
    first, second = hidden.chunk(2, -1)
    t = torch.mm(first, w_t) if b_t is None else torch.addmm(b_t, first, w_t)
    g = torch.mm(second, w_g) if b_g is None else torch.addmm(b_g, second, w_g)
    if gate_start:
        g.add_(gate_start)
    return s.lerp_(t, g.sigmoid_())


def inject(h: Tensor, s: Tensor, w_down: Tensor, w_up: Tensor, *, normalised: bool = False) -> Tensor:
    """``h~ = h + W_up W_down (h - s)`` (Eqs. 2-4); ``normalised``: ``h~ = h + rms(h) W_up W_down (h / rms(h) - s / rms(s))``.

    Args:
        h: ``(T, d)``, changed in place. s: ``(T, d)``. w_down: ``(d, r)``. w_up: ``(r, d)``, alpha times the trained matrix.

    Returns:
        the corrected state, which is ``h``.
    """
    if not normalised:
        return h.addmm_(torch.mm(h - s, w_down), w_up)
    scale = rms(h)
    return h.add_(torch.mm(torch.mm(h / scale - s / rms(s), w_down), w_up).mul_(scale))


def rms(x: Tensor) -> Tensor:
    """Root mean square over the width: ``(T, d)`` to ``(T, 1)``, never 0."""
    return (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()

"""The step of :mod:`shadowpeft.ops.fused` by the kernels of :mod:`shadowpeft.ops.triton_step`: same arguments, same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from shadowpeft.ops.fused import StepSettings, Weights
from shadowpeft.ops.reference import rms
from shadowpeft.ops.triton_step import backward_kernel, forward_kernel

BLOCK_TOKENS = 16
"""The least that a product on tensor cores takes."""
BLOCK_WIDTH = 64
STAGES = 1
"""Pieces that are loaded ahead. With Triton's three, float32 at rank 64 takes 205 KB of shared memory, and an A100 has 163."""

LEAST_ROWS = 256
"""Tokens of a pass from which the kernels are taken: a program takes 16, and too few of them leave a GPU idle."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128
"""Largest rank and width of the update's nets that are kept in registers."""


def takes(h: Tensor, weights: Weights) -> bool:
    """Whether the kernels compute a step of these states ``(B, T, d)`` and weights; a LayerNorm without bias they do not."""
    w_down, _, _, w_out, _, _, norm, norm_bias = weights
    widest = max(w_down.shape[0], 0 if w_out is None else w_out.shape[-1])
    known = h.dtype in DTYPES and w_down.dtype in DTYPES and (norm is None) == (norm_bias is None)
    return known and widest <= WIDEST and h.numel() >= LEAST_ROWS * h.shape[-1]


def _rows(x: Tensor) -> Tensor:
    """``(B, T, d)`` as contiguous rows ``(N, d)``."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _settings(h: Tensor, how: StepSettings, masks: Sequence[Tensor | None], weights: Weights) -> tuple[list[Any], Any]:
    """What both kernels take after their tensors: numbers, and what they are compiled for."""
    w_down, _, w_in, w_out, b_in, b_out, norm, _ = weights
    d, r, m = h.shape[-1], w_down.shape[0], 0 if w_out is None else w_out.shape[-1]
    how_built = {
        "UPDATE": w_in is not None,
        "NORM": norm is not None,
        "B_IN": b_in is not None,
        "B_OUT": b_out is not None,
        "SCALED": how.normalised,
        "GELU": how.activation == "gelu",
        "FIRST": how.dropout_first,
        "MASK": masks[0] is not None,
        "MASKED_CANDIDATE": masks[1] is not None,
        "BN": BLOCK_TOKENS,
        "BD": BLOCK_WIDTH,
        "RP": max(16, triton.next_power_of_2(r)),
        "MP": max(16, triton.next_power_of_2(m)),
    }
    return [h.numel() // d, d, r, m, how.alpha, how.eps, how.gate_start], how_built


def _given(h: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous; ``h`` in the place of what is not there, which no kernel then reads."""
    return [h if tensor is None else tensor.contiguous() for tensor in tensors]


def forward(
    h: Tensor, s: Tensor, how: StepSettings, masks: Sequence[Tensor | None], weights: Weights
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As ``fused._forward``: the corrected state ``(B, T, d)``, the next one or None, and ``z (B, T, r)``."""
    rows, states = _rows(h), _rows(s)
    after, state = torch.empty_like(rows), torch.empty_like(states)
    z = torch.empty((len(rows), weights[0].shape[0]), dtype=weights[0].dtype, device=h.device)
    numbers, built = _settings(h, how, masks, weights)
    tensors = _given(rows, *masks, *weights)
    grid = (triton.cdiv(len(rows), BLOCK_TOKENS),)
    forward_kernel[grid](rows, states, after, state, z, *tensors, *numbers, **built, num_stages=STAGES)
    made = state.view(s.shape) if built["UPDATE"] else None
    return after.view(h.shape), made, z.view(*h.shape[:-1], -1)


def backward(
    g_after: Tensor,
    g_state: Tensor,
    h: Tensor,
    s: Tensor,
    z: Tensor,
    how: StepSettings,
    masks: Sequence[Tensor | None],
    weights: Weights,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """As ``fused._backward``: gradients of ``h`` and ``s``, both ``(B, T, d)``, and of the weights that need one."""
    w_down, _, w_in, w_out, *_ = weights
    rows, states, above = _rows(h), _rows(s), _rows(g_after)
    numbers, built = _settings(h, how, masks, weights)
    n, d, r, m = numbers[:4]
    grid = (triton.cdiv(n, BLOCK_TOKENS),)

    def new(*shape: int, dtype: torch.dtype = w_down.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=h.device)

    g_h, g_s = torch.empty_like(rows), torch.empty_like(states)
    delta, g_z = new(n, d), new(n, r)
    some = n if built["UPDATE"] else 0  # rows of what only the update has
    y, both, g_u, a = new(some, d), new(2, some, d), new(some, 2 * m), new(some, 2 * m)
    parts = grid[0] if built["NORM"] else 0
    g_norm, g_norm_bias = (new(parts, d, dtype=torch.float32) for _ in range(2))
    backward_kernel[grid](
        rows, states, _rows(z), above, _rows(g_state), g_h, g_s, delta, y, both, g_z, g_u, a, g_norm, g_norm_bias,
        *_given(rows, *masks, *weights), *numbers, **built, num_stages=STAGES,
    )  # fmt: skip
    grads: list[Tensor | None] = [None] * len(weights)
    if needs[0]:
        grads[0] = g_z.t() @ delta
    if needs[1]:
        scaled = above.to(w_down.dtype)
        if how.normalised:
            scaled = scaled * rms(rows.float()).to(w_down.dtype)
        grads[1] = (scaled.t() @ _rows(z)).mul_(how.alpha)
    if w_in is not None and w_out is not None:
        if needs[2]:
            grads[2] = g_u.t() @ y
        if needs[3]:
            grads[3] = torch.bmm(both.transpose(1, 2), a.view(n, 2, m).transpose(0, 1))
        if needs[4]:
            grads[4] = g_u.sum(0)
        if needs[5]:
            grads[5] = both.sum(1)
        if needs[6]:
            grads[6] = g_norm.sum(0).to(w_down.dtype)
        if needs[7]:
            grads[7] = g_norm_bias.sum(0).to(w_down.dtype)
    return g_h.view(h.shape), g_s.view(s.shape), grads

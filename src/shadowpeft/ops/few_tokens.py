"""The step of :mod:`shadowpeft.ops.fused` for one to four tokens on a CPU, compiled by Numba: same arguments, same numbers.

A token's step is bound by the calls of its fourteen small operations, not by their arithmetic; here it is one call. The
first one in an installation compiles for some seconds, and Numba keeps the result on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode

from shadowpeft.ops.fused import StepSettings, Weights
from shadowpeft.ops.numba_step import step

MOST_TOKENS = 4
"""Of a pass; from five on one product for all of them is quicker than one after the other."""
_PLAIN = (Tensor, nn.Parameter)


def takes(h: Tensor, s: Tensor, masks: Sequence[Tensor | None], weights: Weights) -> bool:
    """Whether :func:`forward` computes a step of these states ``(B, T, d)`` and weights: few tokens, float32, nothing dropped,
    all in plain memory, and nobody who watches or records torch's operations."""
    if h.numel() > MOST_TOKENS * h.shape[-1] or not h.numel() or masks[0] is not None or masks[1] is not None:
        return False
    if (weights[6] is None) != (weights[7] is None):
        return False
    for tensor in (h, s, *weights):
        if tensor is not None and not (
            type(tensor) in _PLAIN and tensor.dtype is torch.float32 and tensor.is_cpu and tensor.is_contiguous()
        ):
            return False
    return not _watched()


def _watched() -> bool:
    """Whether torch must see each operation: a transform of functions, a tracer, or a mode such as a counter of operations."""
    return bool(
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or _get_current_function_mode() is not None  # type: ignore[no-untyped-call]
        or forward_ad._current_level >= 0
    )


def forward(
    h: Tensor, s: Tensor, how: StepSettings, masks: Sequence[Tensor | None], weights: Weights
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As :func:`shadowpeft.ops.fused._forward`, where :func:`takes` says so."""
    w_down, w_up, w_in, w_out, b_in, b_out, norm, norm_bias = weights
    after, z = torch.empty_like(h), h.new_empty((*h.shape[:-1], w_down.shape[0]))
    state = None if w_in is None else torch.empty_like(s)
    step(
        h.data_ptr(), s.data_ptr(), after.data_ptr(), _address(state), z.data_ptr(),
        h.numel() // h.shape[-1], h.shape[-1], w_down.shape[0], 0 if w_in is None else w_in.shape[0] // 2,
        w_down.data_ptr(), w_up.data_ptr(), _address(w_in), _address(w_out), _address(b_in), _address(b_out), _address(norm),
        _address(norm_bias), how.alpha, how.eps, how.gate_start, how.activation == "gelu", how.normalised,
    )  # fmt: skip
    return after, state, z


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

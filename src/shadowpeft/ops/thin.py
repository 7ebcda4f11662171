"""Products of two to four rows with a large matrix, which torch's own call makes slow on a CPU.

For so few rows the library brings the weight into another order first, which costs as much as the product. The same product
written from the other side does not. Passes that verify drafts, and batches of two to four requests, are such products.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_ROWS = 4
_SMALLEST = 1 << 16
"""Numbers of a weight; smaller ones are quick either way."""


def thin_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` of ``(..., d_in)`` with at most :data:`MOST_ROWS` rows, as ``(W x^T)^T``: ``(..., d_out)``.

    Three rows are computed as four, which is faster.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count == MOST_ROWS - 1:
        rows = F.pad(rows, (0, 0, 0, 1))
    product = torch.mm(weight, rows.t()).t()[:count]
    if bias is not None:
        product = product + bias
    return product.reshape(*x.shape[:-1], -1).contiguous()


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """Of a linear layer, by the number of rows that it gets."""
    few = 1 < x.numel() // module.in_features <= MOST_ROWS
    if few and x.dtype == module.weight.dtype == torch.float32 and not torch.is_grad_enabled():
        return thin_linear(x, module.weight, module.bias)
    return F.linear(x, module.weight, module.bias)


def pays_here() -> bool:
    """Whether this processor is of the kind on which thin products were measured: AVX2 and no more."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


_lock = threading.Lock()
_users: dict[int, int] = {}


@contextmanager
def thin_products(model: Any) -> Iterator[None]:
    """Inside, large linear layers of ``model`` compute products of two to four rows by :func:`thin_linear`.

    Only in float32, on a CPU where :func:`pays_here`; elsewhere nothing changes. Other threads that run the model meanwhile
    get the same numbers up to rounding. Layers that have a forward of their own keep it.
    """
    wanted = model.device.type == "cpu" and model.dtype == torch.float32 and pays_here()
    if not wanted or torch.compiler.is_compiling():
        yield
        return
    with _lock:
        _users[id(model)] = _users.get(id(model), 0) + 1
        if _users[id(model)] == 1:
            for module in model.modules():
                if type(module) is nn.Linear and module.weight.numel() >= _SMALLEST and "forward" not in vars(module):
                    module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _users[id(model)] -= 1
            if not _users[id(model)]:
                del _users[id(model)]
                for module in model.modules():
                    own = vars(module).get("forward")
                    if isinstance(own, partial) and own.func is _forward:
                        del module.forward

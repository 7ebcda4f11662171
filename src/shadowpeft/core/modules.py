"""Parameters of the refinement steps. The arithmetic is in :mod:`shadowpeft.ops`; a module only holds and initialises.

Parameter counts (the paper, Table 1): an injection has ``2 d r``, an update ``4 d m``, the shared norm ``2 d``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shadowpeft import ops


class Injection(nn.Module):
    """``W_down`` and ``W_up`` of one layer (Eqs. 2-4).

    Args:
        d: base width. r: rank. dropout: probability inside the correction.
        dropout_first: dropout before ``W_down`` (PEFT's variant) instead of after it.
        paper_init: ``W_down ~ N(0, 0.02^2)``; otherwise ``nn.Linear``'s default. ``W_up`` starts at zero either way,
            so an untrained adapter leaves the base's output unchanged to the bit.
        normalised: see :func:`shadowpeft.ops.correction`.
    """

    def __init__(
        self,
        d: int,
        r: int,
        dropout: float = 0.0,
        *,
        dropout_first: bool = False,
        paper_init: bool = True,
        normalised: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.dropout_first = dropout_first
        self.normalised = normalised
        self.w_down = nn.Parameter(torch.empty(r, d))
        self.w_up = nn.Parameter(torch.zeros(d, r))
        if paper_init:
            nn.init.normal_(self.w_down, mean=0.0, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.w_down, a=math.sqrt(5))

    def forward(self, h: Tensor, s: Tensor, alpha: float, streams: int | None = None) -> Tensor:
        """Base state ``h`` ``(B, T, d)`` and shadow state ``s`` ``(B, T, d)`` to the injected state ``(B, T, d)``.

        With ``streams``, ``h`` has an axis of residual streams there; see :func:`shadowpeft.core.refine`.
        """
        c = ops.correction(
            ops.read_streams(h, streams),
            s,
            self.w_down,
            self.w_up,
            dropout=self.dropout,
            dropout_first=self.dropout_first,
            normalised=self.normalised,
            training=self.training,
        )
        return ops.inject(h, c if streams is None else c.unsqueeze(streams), alpha)


class Update(nn.Module):
    """Transform and gate nets of one layer (Eqs. 5-7, 13-14), both with hidden width ``m``.

    Starts as four default ``nn.Linear`` layers would: uniform in ``+-1/sqrt(fan_in)``.
    """

    def __init__(
        self,
        d: int,
        m: int,
        dropout: float = 0.0,
        *,
        activation: str = "silu",
        bias: bool = False,
        gate_start: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.activation = activation
        self.gate_start = gate_start
        self.w_in = nn.Parameter(torch.empty(2 * m, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))
        self.w_out = nn.Parameter(torch.empty(2, d, m).uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m)))
        self.b_in: nn.Parameter | None = None
        self.b_out: nn.Parameter | None = None
        if bias:
            self.b_in = nn.Parameter(torch.empty(2 * m).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))
            self.b_out = nn.Parameter(torch.empty(2, d).uniform_(-1 / math.sqrt(m), 1 / math.sqrt(m)))

    def forward(self, s: Tensor, h: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        """Shadow state ``s`` and layer output ``h``, both ``(B, T, d)``, to the next shadow state ``(B, T, d)``.

        ``norm`` is the one LayerNorm that all updates of an adapter share (affine, eps 1e-5), or None for PEFT's variant.
        """
        return ops.advance(
            s,
            h,
            self.w_in,
            self.w_out,
            b_in=self.b_in,
            b_out=self.b_out,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            gate_start=self.gate_start,
            activation=self.activation,
            dropout=self.dropout,
            training=self.training,
        )

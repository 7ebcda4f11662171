"""Equations 2-7 of ShadowPEFT as pure functions of tensors."""

from shadowpeft.ops.fused import StepSettings, fits, rewritten, step
from shadowpeft.ops.reference import advance, candidate_and_gate, correction, gated_update, inject, read_streams

__all__ = [
    "StepSettings",
    "advance",
    "candidate_and_gate",
    "correction",
    "fits",
    "gated_update",
    "inject",
    "read_streams",
    "rewritten",
    "step",
]

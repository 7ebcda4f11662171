"""Hidden projection between a narrow shadow and the base's width (Eqs. 10-12)."""

from __future__ import annotations

import torch
from torch import Tensor


def pseudo_inverse_projection(w_lm: Tensor, w_small: Tensor, *, chunk: int = 8192) -> Tensor:
    """``W_p* = argmin ||W_lm W_p - W_small||_F = pinv(W_lm) W_small`` (Eq. 12), from the ``d x d`` normal equations.

    ``(W_lm^T W_lm) W_p = W_lm^T W_small`` has the same minimiser as the SVD of the ``V x d`` matrix and needs ``V d^2``
    multiply-adds and ``d^2`` memory. Accumulated in float64 over chunks of the vocabulary: the condition number is
    squared, which float32 does not survive for real heads.

    Args:
        w_lm: the base's LM head ``(V, d)``. w_small: the small model's LM head ``(V, d_s)``.
        chunk: vocabulary rows at a time.

    Returns:
        ``W_p`` ``(d, d_s)`` in the dtype of ``w_small``.

    Raises:
        ValueError: if the vocabularies differ.
    """
    if w_lm.shape[0] != w_small.shape[0]:
        raise ValueError(
            f"the heads have {w_lm.shape[0]} and {w_small.shape[0]} vocabulary rows but must have the same number; "
            "use a shadow model with the base's tokenizer"
        )
    d, d_s = w_lm.shape[1], w_small.shape[1]
    gram = torch.zeros(d, d, dtype=torch.float64, device=w_lm.device)
    right = torch.zeros(d, d_s, dtype=torch.float64, device=w_lm.device)
    for start in range(0, w_lm.shape[0], chunk):
        a = w_lm[start : start + chunk].to(torch.float64)
        gram.addmm_(a.T, a)
        right.addmm_(a.T, w_small[start : start + chunk].to(torch.float64))
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    rounding = 100 * d * torch.finfo(torch.float64).eps  # with equal columns the last pivot is rounding, not always < 0
    if int(info) == 0 and bool(pivots.min().square() > rounding * pivots.max().square()):
        solution = torch.cholesky_solve(right, factor)
    else:  # a head that is not of full column rank has many minimisers: take the one of least norm, as pinv does
        solution = torch.linalg.pinv(gram, hermitian=True) @ right
    return solution.to(w_small.dtype)


def fold_projection(w_lm: Tensor, w_p: Tensor) -> Tensor:
    """``W_lm W_p`` (Eq. 11): the head ``(V, d_s)`` with which a detached shadow needs no projection.

    Args:
        w_lm: ``(V, d)``. w_p: ``(d, d_s)``. The product is taken in float32 and returned in the dtype of ``w_p``.
    """
    return (w_lm.float() @ w_p.float()).to(w_p.dtype)

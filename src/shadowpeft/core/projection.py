"""Hidden projection between a narrow shadow and the base's width (Eqs. 10-12)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.errors import ConfigError

_BLOCK = 512
"""Columns of the Gram matrix at a time: with width ``d`` only ``(1 + _BLOCK / d) / 2`` of its products are formed."""
_CONDITION, _RESIDUAL = 300.0, 1e-3
"""Up to this condition of the head, and down to this residual, float32 products are enough. Float64 throughout would be simpler
but too slow: at 40,000 x 2,048 (one thread) it was 2.3 times as fast as ``pinv``, with float32 products 4.1 times (LOG.md)."""


@dataclass(frozen=True)
class ProjectionSolution:
    """What :func:`solve_projection` returns."""

    weight: Tensor
    """``W_p*`` ``(d, d_s)``."""
    residual: float
    """``||W_lm W_p - W_small||_F / ||W_small||_F`` of ``weight`` as it is returned, rounded to its dtype."""
    exact_residual: float
    """The same before rounding to ``dtype``: the least there is. Values below 1e-7 are rounding themselves."""
    rank: int
    """Singular values of ``W_lm`` that count."""
    condition: float
    """Largest over smallest singular value that counts; an estimate (from below, within a few per cent) for "cholesky"."""
    method: str
    """"cholesky", or "eigen" for a head that is not of full column rank."""
    products: torch.dtype
    """In which the products of the normal equations were formed."""


def solve_projection(
    w_lm: Tensor,
    w_small: Tensor,
    *,
    rows: int | None = None,
    chunk: int = 4096,
    rtol: float | None = None,
    dtype: torch.dtype | None = None,
    products: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProjectionSolution:
    """``W_p* = argmin ||W_lm W_p - W_small||_F = pinv(W_lm) W_small`` (Eq. 12), from the ``d x d`` normal equations.

    ``(W_lm^T W_lm) W_p = W_lm^T W_small`` has the same minimiser as the SVD of the ``V x d`` matrix and needs
    ``V d (d / 2 + d_s)`` multiply-adds (the Gram matrix is symmetric) and ``d (d + d_s)`` memory. Heads of any floating
    dtype are read ``chunk`` rows at a time: no copy of a head is made.

    Products within a chunk are formed in float32 and summed in float64; everything after that is float64. The normal
    equations square the condition number, so this is repeated with products in float64 (half as fast) if the head's condition
    turns out above 300 or the residual below 1e-3, and begun so for float64 heads. On the head of SmolLM2-135M, condition 91,
    float32 products cost a relative 5e-6 of the solution (``pinv`` in float32: 3e-6) and nothing of the residual (4e-14).

    The residual of any candidate follows from the same two matrices, ``||A X - B||^2 = <X, G X> - 2 <X, R> + ||B||^2``.
    Deterministic for a given number of threads.

    A head that is not of full column rank has many minimisers; the one of least norm is taken, as ``pinv`` does, from the
    eigenvectors of the Gram matrix.

    Args:
        w_lm: the base's LM head ``(V, d)``. w_small: the small model's LM head ``(V, d_s)``.
        rows: use only the first so many rows of both; then their numbers of rows may differ. None: all.
        chunk: vocabulary rows at a time.
        rtol: singular values of ``W_lm`` up to ``rtol`` times the largest count as zero. None: ``sqrt(100 d eps)`` with
            float64's eps, 1e-5 for d = 4096, the least that a Gram matrix in float64 can tell from zero.
        dtype: of the solution. None: that of ``w_small``. products: float32 or float64 without a repetition. None: as above.
        progress: called with the rows that are done and their number after every chunk; twice over if it is repeated.

    Raises:
        ConfigError: if the numbers of rows differ or are too small, or a head is not finite.
    """
    available = (w_lm.shape[0], w_small.shape[0])
    if rows is None and available[0] != available[1]:
        raise ConfigError(
            f"the heads have {available[0]} and {available[1]} vocabulary rows but must have the same number; "
            "use a shadow model with the base's tokenizer"
        )
    rows = available[0] if rows is None else rows
    if not 0 < rows <= min(available):
        raise ConfigError(
            f"rows is {rows} but the heads have {available[0]} and {available[1]}; give at most the smaller"
        )
    wide = torch.float64 in (w_lm.dtype, w_small.dtype) or rtol is not None
    tries = [products] if products else [torch.float64] if wide else [torch.float32, torch.float64]
    for kind in tries:
        gram, right, square = _normal_equations(w_lm, w_small, rows, chunk, kind, progress)
        if not bool(torch.isfinite(gram).all() and torch.isfinite(right).all()) or math.isnan(square):
            raise ConfigError(
                "a head holds values that are not finite, so Eq. 12 has no solution; load the weights anew"
            )
        last = kind == tries[-1]
        tolerance = 100 * len(gram) * torch.finfo(torch.float64).eps if rtol is None else rtol**2
        solved = _cholesky(gram, right, tolerance if last else _CONDITION**-2 / 4)
        if solved is None and not last:
            continue
        solution, rank, condition, method = _eigen(gram, right, tolerance) if solved is None else solved
        exact = _residual(solution, gram, right, square)
        if last or exact > _RESIDUAL:
            break
    rounded = solution.to(dtype or w_small.dtype)
    residual = _residual(rounded.to(torch.float64), gram, right, square)
    return ProjectionSolution(rounded.to(w_small.device), residual, exact, rank, condition, method, kind)


def _residual(x: Tensor, gram: Tensor, right: Tensor, square: float) -> float:
    """``||A x - B|| / ||B||`` from ``A^T A``, ``A^T B`` and ``||B||^2``; 0 where ``B`` is 0."""
    squared = float((x * (gram @ x - 2 * right)).sum()) + square
    return max(squared, 0.0) ** 0.5 / square**0.5 if square else 0.0


def pseudo_inverse_projection(w_lm: Tensor, w_small: Tensor, *, chunk: int = 4096) -> Tensor:
    """``W_p*`` of Eq. 12 alone, ``(d, d_s)`` in the dtype of ``w_small``; see :func:`solve_projection`."""
    return solve_projection(w_lm, w_small, chunk=chunk).weight


def _normal_equations(
    w_lm: Tensor,
    w_small: Tensor,
    rows: int,
    chunk: int,
    products: torch.dtype,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor, float]:
    """``W_lm^T W_lm`` ``(d, d)``, ``W_lm^T W_small`` ``(d, d_s)`` and ``||W_small||_F^2``, in float64."""
    d, d_s = w_lm.shape[1], w_small.shape[1]
    device = torch.device("cpu") if w_lm.device.type == "mps" else w_lm.device  # which has no float64
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    right = gram.new_zeros(d, d_s)
    square = gram.new_zeros(())
    for start in range(0, rows, chunk):
        end = min(start + chunk, rows)
        a = w_lm[start:end].to(device=device, dtype=products)
        b = w_small[start:end].to(device=device, dtype=products)
        for left in range(0, d, _BLOCK):
            right_end = min(left + _BLOCK, d)
            gram[:right_end, left:right_end] += a[:, :right_end].T @ a[:, left:right_end]
        right += a.T @ b
        square += torch.linalg.vector_norm(b, dtype=torch.float64).square()
        if progress is not None:
            progress(end, rows)
    gram.triu_()
    gram += gram.triu(1).T
    return gram, right, float(square)


_Solved = tuple[Tensor, int, float, str]
"""Solution, rank, condition of the head, and how."""


def _cholesky(gram: Tensor, right: Tensor, tolerance: float) -> _Solved | None:
    """Solution of ``gram x = right``; None if the smallest eigenvalue is not clearly above ``tolerance`` of the largest."""
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        return None
    largest, smallest = _extremes(gram, factor)
    if not smallest > 4 * tolerance * largest:  # the estimate of the smallest is from above
        return None
    return torch.cholesky_solve(right, factor), len(gram), (largest / smallest) ** 0.5, "cholesky"


def _eigen(gram: Tensor, right: Tensor, tolerance: float) -> _Solved:
    """The solution of least norm; eigenvalues up to ``tolerance`` of the largest count as zero."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > tolerance * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
    if not bool(kept.any()):  # a head of zeros
        return torch.zeros_like(right), 0, float("inf"), "eigen"
    values, vectors = values[kept], vectors[:, kept]
    solution = vectors @ ((vectors.T @ right) / values[:, None])
    return solution, int(kept.sum()), float(values[-1] / values[0]) ** 0.5, "eigen"


def _extremes(gram: Tensor, factor: Tensor) -> tuple[float, float]:
    """Largest and smallest eigenvalue by ten steps of block iteration with the matrix and its inverse."""
    start = torch.randn(len(gram), min(8, len(gram)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = []
    for step in (lambda x: gram @ x, lambda x: torch.cholesky_solve(x, factor)):
        basis = start.to(gram.device)
        for _ in range(10):
            basis = torch.linalg.qr(step(basis)).Q
        values.append(torch.linalg.eigvalsh(basis.T @ gram @ basis))
    return float(values[0][-1]), max(float(values[1][0]), 0.0)


def fold_projection(w_lm: Tensor, w_p: Tensor) -> Tensor:
    """``W_lm W_p`` (Eq. 11): the head ``(V, d_s)`` with which a detached shadow needs no projection.

    Args:
        w_lm: ``(V, d)``. w_p: ``(d, d_s)``. The product is taken in float32 and returned in the dtype of ``w_p``.
    """
    return (w_lm.float() @ w_p.float()).to(w_p.dtype)

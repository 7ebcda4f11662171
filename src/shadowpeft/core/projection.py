"""Hidden projection between a narrow shadow and the base's width (Eqs. 10-12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.errors import ConfigError

_BLOCK = 512
"""Columns of the Gram matrix at a time: with width ``d`` only ``(1 + _BLOCK / d) / 2`` of its products are formed."""


@dataclass(frozen=True)
class ProjectionSolution:
    """What :func:`solve_projection` found."""

    weight: Tensor
    """``W_p*`` ``(d, d_s)``."""
    residual: float
    """``||W_lm W_p - W_small||_F / ||W_small||_F`` of ``weight`` as it is returned, rounded to its dtype."""
    exact_residual: float
    """The same before rounding: the least there is. Values below 1e-7 are rounding themselves."""
    rank: int
    """Singular values of ``W_lm`` that count."""
    condition: float
    """Largest over smallest singular value that counts; an estimate (from below, within a few per cent) for "cholesky"."""
    method: str
    """"cholesky", or "eigen" for a head that is not of full column rank."""


def solve_projection(
    w_lm: Tensor,
    w_small: Tensor,
    *,
    rows: int | None = None,
    chunk: int = 8192,
    rtol: float | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProjectionSolution:
    """``W_p* = argmin ||W_lm W_p - W_small||_F = pinv(W_lm) W_small`` (Eq. 12), from the ``d x d`` normal equations.

    ``(W_lm^T W_lm) W_p = W_lm^T W_small`` has the same minimiser as the SVD of the ``V x d`` matrix and needs
    ``V d (d / 2 + d_s)`` multiply-adds (the Gram matrix is symmetric) and ``d (d + d_s)`` memory. Heads of any floating
    dtype are read ``chunk`` rows at a time and taken to float64 there: no copy of a head is made. float64 because the
    normal equations square the condition number, and because the residual of any candidate follows from the same two
    matrices, ``||A X - B||^2 = <X, G X> - 2 <X, R> + ||B||^2``. Deterministic for a given number of threads.

    A head that is not of full column rank has many minimisers; the one of least norm is taken, as ``pinv`` does, from the
    eigenvectors of the Gram matrix.

    Args:
        w_lm: the base's LM head ``(V, d)``. w_small: the small model's LM head ``(V, d_s)``.
        rows: use only the first so many rows of both; then their numbers of rows may differ. None: all.
        chunk: vocabulary rows at a time.
        rtol: singular values of ``W_lm`` up to ``rtol`` times the largest count as zero. None: ``sqrt(100 d eps)`` with
            float64's eps, 1e-5 for d = 4096, the least that a Gram matrix in float64 can tell from zero.
        dtype: of the solution. None: that of ``w_small``.
        progress: called with the rows that are done and their number after every chunk.

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
    gram, right, square = _normal_equations(w_lm, w_small, rows, chunk, progress)
    if not bool(torch.isfinite(gram).all() and torch.isfinite(right).all()) or square != square:
        raise ConfigError("a head holds values that are not finite, so Eq. 12 has no solution; load the weights anew")
    tolerance = 100 * len(gram) * torch.finfo(torch.float64).eps if rtol is None else rtol**2
    solution, rank, condition, method = _solve(gram, right, tolerance)

    def residual(x: Tensor) -> float:
        squared = float((x * (gram @ x - 2 * right)).sum()) + square
        return max(squared, 0.0) ** 0.5 / square**0.5 if square else 0.0

    rounded = solution.to(dtype or w_small.dtype)
    return ProjectionSolution(
        rounded.to(w_small.device), residual(rounded.to(torch.float64)), residual(solution), rank, condition, method
    )


def pseudo_inverse_projection(w_lm: Tensor, w_small: Tensor, *, chunk: int = 8192) -> Tensor:
    """``W_p*`` of Eq. 12 alone, ``(d, d_s)`` in the dtype of ``w_small``; see :func:`solve_projection`."""
    return solve_projection(w_lm, w_small, chunk=chunk).weight


def _normal_equations(
    w_lm: Tensor, w_small: Tensor, rows: int, chunk: int, progress: Callable[[int, int], None] | None
) -> tuple[Tensor, Tensor, float]:
    """``W_lm^T W_lm`` ``(d, d)``, ``W_lm^T W_small`` ``(d, d_s)`` and ``||W_small||_F^2``, in float64."""
    d, d_s = w_lm.shape[1], w_small.shape[1]
    device = torch.device("cpu") if w_lm.device.type == "mps" else w_lm.device  # which has no float64
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    right = gram.new_zeros(d, d_s)
    square = gram.new_zeros(())
    chunk = min(chunk, rows)
    wide, narrow = gram.new_empty(chunk, d), gram.new_empty(chunk, d_s)
    for start in range(0, rows, chunk):
        n = min(chunk, rows - start)
        a, b = wide[:n], narrow[:n]
        a.copy_(w_lm[start : start + n])
        b.copy_(w_small[start : start + n])
        for left in range(0, d, _BLOCK):
            end = min(left + _BLOCK, d)
            gram[:end, left:end].addmm_(a[:, :end].T, a[:, left:end])
        right.addmm_(a.T, b)
        square += torch.linalg.vector_norm(b).square()
        if progress is not None:
            progress(start + n, rows)
    gram.triu_()
    gram += gram.triu(1).T
    return gram, right, float(square)


def _solve(gram: Tensor, right: Tensor, tolerance: float) -> tuple[Tensor, int, float, str]:
    """Solution of ``gram x = right`` of least norm, rank, condition of the head, and how; see :func:`solve_projection`.

    Args:
        tolerance: eigenvalues up to this share of the largest count as zero.
    """
    d = len(gram)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) == 0:
        largest, smallest = _extremes(gram, factor)
        if smallest > 4 * tolerance * largest:  # the estimate of the smallest is from above
            return torch.cholesky_solve(right, factor), d, (largest / smallest) ** 0.5, "cholesky"
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
    found = []
    for step in (lambda x: gram @ x, lambda x: torch.cholesky_solve(x, factor)):
        basis = start.to(gram.device)
        for _ in range(10):
            basis = torch.linalg.qr(step(basis)).Q
        found.append(torch.linalg.eigvalsh(basis.T @ gram @ basis))
    return float(found[0][-1]), max(float(found[1][0]), 0.0)


def fold_projection(w_lm: Tensor, w_p: Tensor) -> Tensor:
    """``W_lm W_p`` (Eq. 11): the head ``(V, d_s)`` with which a detached shadow needs no projection.

    Args:
        w_lm: ``(V, d)``. w_p: ``(d, d_s)``. The product is taken in float32 and returned in the dtype of ``w_p``.
    """
    return (w_lm.float() @ w_p.float()).to(w_p.dtype)

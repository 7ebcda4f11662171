"""Numba code of the step between two layers: one to four tokens, one after the other (:mod:`shadowpeft.ops.few_tokens`)."""

import math

import numba
import numpy as np
from numba.extending import intrinsic

_EXACT = {"reassoc", "contract", "nsz", "arcp"}
"""What may be changed for speed: the order of sums. What is no number, or infinite, stays so."""


@intrinsic
def _at(context, address):
    """An address as a pointer to float32."""

    def build(target, builder, signature, given):
        return builder.inttoptr(given[0], target.get_value_type(signature.return_type))

    return numba.types.CPointer(numba.types.float32)(address), build


@numba.njit(fastmath=_EXACT, error_model="numpy", cache=True)
def _products(out, matrix, x):
    """``out = matrix x``."""
    for i in range(matrix.shape[0]):
        total = np.float32(0)
        for j in range(matrix.shape[1]):
            total += matrix[i, j] * x[j]
        out[i] = total


@numba.njit(fastmath=_EXACT, error_model="numpy", cache=True)
def _rms(x):
    """Root mean square, never 0."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.sqrt(total / np.float32(x.shape[0]) + np.float32(1e-12))


@numba.njit(fastmath=_EXACT, error_model="numpy", cache=True)
def _normal(out, x, weight, bias, eps):
    """LayerNorm."""
    d = np.float32(x.shape[0])
    mean = np.float32(0)
    for i in range(x.shape[0]):
        mean += x[i]
    mean /= d
    variance = np.float32(0)
    for i in range(x.shape[0]):
        variance += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1) / np.sqrt(variance / d + eps)
    for i in range(x.shape[0]):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


_ADDRESSES, _SIZES, _NUMBERS = [numba.int64] * 5, [numba.int64] * 4, [numba.float64] * 3
_SIGNATURE = numba.void(*_ADDRESSES, *_SIZES, *[numba.int64] * 8, *_NUMBERS, numba.boolean, numba.boolean)


@numba.njit(_SIGNATURE, fastmath=_EXACT, error_model="numpy", nogil=True, cache=True)
def step(
    h_at, s_at, after_at, state_at, z_at, tokens, d, r, m, down_at, up_at, in_at, out_at, b_in_at, b_out_at, norm_at, bias_at,
    alpha, eps, gate_start, gelu, normalised,
):  # fmt: skip
    """Eqs. 2-7 of each token; an address of 0 stands for what is not there."""
    one = np.float32(1)
    all_h, all_s = numba.carray(_at(h_at), (tokens, d)), numba.carray(_at(s_at), (tokens, d))
    all_after, all_z = numba.carray(_at(after_at), (tokens, d)), numba.carray(_at(z_at), (tokens, r))
    down, up = numba.carray(_at(down_at), (r, d)), numba.carray(_at(up_at), (d, r))
    x, opened, hidden = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(2 * m, np.float32)
    for token in range(tokens):
        h, state, after, z = all_h[token], all_s[token], all_after[token], all_z[token]
        if in_at:
            before, state = state, numba.carray(_at(state_at), (tokens, d))[token]
            w_in, w_out = numba.carray(_at(in_at), (2 * m, d)), numba.carray(_at(out_at), (2, d, m))
            read = h
            if norm_at:
                _normal(x, h, numba.carray(_at(norm_at), d), numba.carray(_at(bias_at), d), np.float32(eps))
                read = x
            _products(hidden, w_in, read)
            if b_in_at:
                hidden += numba.carray(_at(b_in_at), 2 * m)
            for j in range(2 * m):
                u = hidden[j]
                if gelu:
                    hidden[j] = u * np.float32(0.5) * (one + np.float32(math.erf(u * np.float32(0.7071067811865476))))
                else:
                    hidden[j] = u / (one + np.exp(-u))
            _products(x, w_out[0], hidden[:m])
            _products(opened, w_out[1], hidden[m:])
            if b_out_at:
                b_out = numba.carray(_at(b_out_at), (2, d))
                x += b_out[0]
                opened += b_out[1]
            for i in range(d):
                state[i] = before[i] + (x[i] - before[i]) / (one + np.exp(-(opened[i] + np.float32(gate_start))))
        scale = _rms(h) if normalised else one
        shrink = _rms(state) if normalised else one
        for i in range(d):
            x[i] = h[i] / scale - state[i] / shrink
        _products(z, down, x)
        _products(opened, up, z)
        for i in range(d):
            after[i] = h[i] + np.float32(alpha) * scale * opened[i]

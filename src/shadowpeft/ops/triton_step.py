"""The step of :mod:`shadowpeft.ops.fused` in Triton, forward and backward; :mod:`shadowpeft.ops.kernels` calls them.

A program takes a block of tokens and walks over the width in pieces. All is computed in float32 and rounded when it is
stored; products read their factors in the dtype of the weights. Reading ``h`` and ``s`` and writing ``h'`` and ``s'`` is all
the traffic of the forward kernel, where the plain version writes and reads some ten tensors of that size. What a weight's
gradient needs at full width is written by the backward kernel and multiplied by torch, so that no sum depends on the order in
which programs end.

Triton's interpreter runs both on a CPU (``TRITON_INTERPRET=1`` before the import).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter multiplies bfloat16 as if it were integers, so its factors are rounded and multiplied in float32."""


@triton.jit
def _load(pointer, rows, rows_ok, columns, columns_ok, width):
    """A block ``(rows, columns)`` of a matrix ``(., width)``, as float32; 0 beyond its edge."""
    ok = rows_ok[:, None] & columns_ok[None, :]
    return tl.load(pointer + rows[:, None] * width + columns[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, block, rows, rows_ok, columns, columns_ok, width):
    """Write a block ``(rows, columns)`` into a matrix ``(., width)``, in its dtype."""
    ok = rows_ok[:, None] & columns_ok[None, :]
    tl.store(pointer + rows[:, None] * width + columns[None, :], block.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def _times(left, right, weights):
    """``left @ right``: factors in the dtype of ``weights``, sums in float32."""
    kind = weights.dtype.element_ty
    if INTERPRETED:
        return tl.dot(left.to(kind).to(tl.float32), right.to(kind).to(tl.float32))
    return tl.dot(left.to(kind), right.to(kind), input_precision="ieee")


@triton.jit
def _activate(u, GELU: tl.constexpr):
    if GELU:
        return 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    return u * tl.sigmoid(u)


@triton.jit
def _slope(u, GELU: tl.constexpr):
    """Of the activation."""
    if GELU:
        normal = tl.exp(-0.5 * u * u) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * normal
    opened = tl.sigmoid(u)
    return opened * (1.0 + u * (1.0 - opened))


@triton.jit
def _moments(h, rows, rows_ok, d, eps, NORM: tl.constexpr, SCALED: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """LayerNorm's mean and reciprocal deviation, and the root mean square, of rows of ``h``: each ``(BN,)``."""
    total = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    if NORM or SCALED:
        for start in range(0, d, BD):
            columns = start + tl.arange(0, BD)
            x = _load(h, rows, rows_ok, columns, columns < d, d)
            total += tl.sum(x, 1)
            squares += tl.sum(x * x, 1)
    mean = total / d
    apart = tl.zeros((BN,), tl.float32)
    if NORM:  # centred, so that a large mean costs no digits
        for start in range(0, d, BD):
            columns = start + tl.arange(0, BD)
            x = _load(h, rows, rows_ok, columns, columns < d, d)
            x = tl.where((columns < d)[None, :], x - mean[:, None], 0.0)
            apart += tl.sum(x * x, 1)
    return mean, tl.rsqrt(apart / d + eps), tl.sqrt(squares / d + 1e-12)


@triton.jit
def _normed(x, mean, deviation, norm, norm_bias, columns, columns_ok, NORM: tl.constexpr):
    """LayerNorm of a block; the block itself where there is none."""
    if NORM:
        weight = tl.load(norm + columns, mask=columns_ok, other=0.0).to(tl.float32)
        bias = tl.load(norm_bias + columns, mask=columns_ok, other=0.0).to(tl.float32)
        return (x - mean[:, None]) * deviation[:, None] * weight[None, :] + bias[None, :]
    return x


@triton.jit
def _nets(
    h, m1, w_in, b_in, norm, norm_bias, mean, deviation, rows, rows_ok, units, units_ok, d, m,
    UPDATE: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, MASKED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    """Of candidate and gate ``u`` before and ``a`` after the activation, and the candidate's mask: each ``(BN, MP)``."""
    u_t = tl.zeros((BN, MP), tl.float32)
    u_g = tl.zeros((BN, MP), tl.float32)
    a_t, a_g, kept = u_t, u_g, u_t
    if UPDATE:
        for start in range(0, d, BD):
            columns = start + tl.arange(0, BD)
            ok = columns < d
            y = _normed(_load(h, rows, rows_ok, columns, ok, d), mean, deviation, norm, norm_bias, columns, ok, NORM)
            u_t += _times(y, tl.trans(_load(w_in, units, units_ok, columns, ok, d)), w_in)
            u_g += _times(y, tl.trans(_load(w_in + m * d, units, units_ok, columns, ok, d)), w_in)
        if BIAS:
            u_t += tl.load(b_in + units, mask=units_ok, other=0.0).to(tl.float32)[None, :]
            u_g += tl.load(b_in + m + units, mask=units_ok, other=0.0).to(tl.float32)[None, :]
        a_t, a_g = _activate(u_t, GELU), _activate(u_g, GELU)
        if MASKED:
            kept = _load(m1, rows, rows_ok, units, units_ok, m)
            a_t *= kept
    return u_t, u_g, a_t, a_g, kept


@triton.jit
def _place(n, r, m, BN: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr):
    """Rows, ranks and units of the program, each with what of it there is."""
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    ranks, units = tl.arange(0, RP), tl.arange(0, MP)
    return rows, rows < n, ranks, ranks < r, units, units < m


@triton.jit
def _states(
    s, a_t, a_g, w_out, b_out, gate_start, rows, rows_ok, columns, columns_ok, units, units_ok, d, m,
    UPDATE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """The state before, candidate, gate, and the state after, rounded as it is stored: each a block ``(BN, BD)``."""
    before = _load(s, rows, rows_ok, columns, columns_ok, d)
    t, g, now = before, before, before
    if UPDATE:
        t = _times(a_t, tl.trans(_load(w_out, columns, columns_ok, units, units_ok, m)), w_out)
        g = _times(a_g, tl.trans(_load(w_out + d * m, columns, columns_ok, units, units_ok, m)), w_out)
        if BIAS:
            t += tl.load(b_out + columns, mask=columns_ok, other=0.0).to(tl.float32)[None, :]
            g += tl.load(b_out + d + columns, mask=columns_ok, other=0.0).to(tl.float32)[None, :]
        g = tl.sigmoid(g + gate_start)
        now = (before + g * (t - before)).to(s.dtype.element_ty).to(tl.float32)
        now = tl.where(columns_ok[None, :], now, 0.0)
    return before, t, g, now


@triton.jit
def _through_w_down(
    g_z, w_down, m0, rows, rows_ok, ranks, ranks_ok, columns, columns_ok, d, MASKED: tl.constexpr
):  # fmt: skip
    """The gradient of the discrepancy, a block ``(BN, BD)``."""
    gradient = _times(g_z, _load(w_down, ranks, ranks_ok, columns, columns_ok, d), w_down)
    if MASKED:
        gradient *= _load(m0, rows, rows_ok, columns, columns_ok, d)
    return gradient


@triton.jit
def _through_w_in(g_u_t, g_u_g, w_in, units, units_ok, columns, columns_ok, d, m):
    """The gradient of what ``W_1`` and ``W_3`` read, a block ``(BN, BD)``."""
    gradient = _times(g_u_t, _load(w_in, units, units_ok, columns, columns_ok, d), w_in)
    return gradient + _times(g_u_g, _load(w_in + m * d, units, units_ok, columns, columns_ok, d), w_in)


@triton.jit
def forward_kernel(
    h, s, after, state, z_out, m0, m1, w_down, w_up, w_in, w_out, b_in, b_out, norm, norm_bias,
    n, d, r, m, alpha, eps, gate_start,
    UPDATE: tl.constexpr, NORM: tl.constexpr, B_IN: tl.constexpr, B_OUT: tl.constexpr, SCALED: tl.constexpr,
    GELU: tl.constexpr, FIRST: tl.constexpr, MASK: tl.constexpr, MASKED_CANDIDATE: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    rows, rows_ok, ranks, ranks_ok, units, units_ok = _place(n, r, m, BN, RP, MP)
    mean, deviation, size = _moments(h, rows, rows_ok, d, eps, NORM, SCALED, BD, BN)
    _u_t, _u_g, a_t, a_g, _kept = _nets(
        h, m1, w_in, b_in, norm, norm_bias, mean, deviation, rows, rows_ok, units, units_ok, d, m,
        UPDATE, NORM, B_IN, GELU, MASKED_CANDIDATE, BN, BD, MP,
    )  # fmt: skip
    z = tl.zeros((BN, RP), tl.float32)
    z_state = tl.zeros((BN, RP), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for start in range(0, d, BD):
        columns = start + tl.arange(0, BD)
        ok = columns < d
        x = _load(h, rows, rows_ok, columns, ok, d)
        _before, _t, _g, now = _states(
            s, a_t, a_g, w_out, b_out, gate_start, rows, rows_ok, columns, ok, units, units_ok, d, m, UPDATE, B_OUT
        )
        if UPDATE:
            _store(state, now, rows, rows_ok, columns, ok, d)
        down = tl.trans(_load(w_down, ranks, ranks_ok, columns, ok, d))
        left, right = x, now
        if MASK and FIRST:
            kept = _load(m0, rows, rows_ok, columns, ok, d)
            left, right = left * kept, right * kept
        if SCALED:  # both states at equal size; the size of the new one is known only after the last piece
            z += _times(left, down, w_down)
            z_state += _times(right, down, w_down)
            squares += tl.sum(now * now, 1)
        else:
            z += _times(left - right, down, w_down)
    if SCALED:
        z = z / size[:, None] - z_state / tl.sqrt(squares / d + 1e-12)[:, None]
    if MASK and not FIRST:
        z *= _load(m0, rows, rows_ok, ranks, ranks_ok, r)
    _store(z_out, z, rows, rows_ok, ranks, ranks_ok, r)
    for start in range(0, d, BD):
        columns = start + tl.arange(0, BD)
        ok = columns < d
        c = _times(z, tl.trans(_load(w_up, columns, ok, ranks, ranks_ok, r)), w_up)
        if SCALED:
            c *= size[:, None]
        x = _load(h, rows, rows_ok, columns, ok, d)
        _store(after, x + alpha * c, rows, rows_ok, columns, ok, d)


@triton.jit
def backward_kernel(
    h, s, z_in, g_after, g_state, g_h, g_s, delta_out, y_out, both_out, g_z_out, g_u_out, a_out, g_norm, g_norm_bias,
    m0, m1, w_down, w_up, w_in, w_out, b_in, b_out, norm, norm_bias,
    n, d, r, m, alpha, eps, gate_start,
    UPDATE: tl.constexpr, NORM: tl.constexpr, B_IN: tl.constexpr, B_OUT: tl.constexpr, SCALED: tl.constexpr,
    GELU: tl.constexpr, FIRST: tl.constexpr, MASK: tl.constexpr, MASKED_CANDIDATE: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, RP: tl.constexpr, MP: tl.constexpr,
):  # fmt: skip
    rows, rows_ok, ranks, ranks_ok, units, units_ok = _place(n, r, m, BN, RP, MP)
    mean, deviation, size = _moments(h, rows, rows_ok, d, eps, NORM, SCALED, BD, BN)
    u_t, u_g, a_t, a_g, kept_t = _nets(
        h, m1, w_in, b_in, norm, norm_bias, mean, deviation, rows, rows_ok, units, units_ok, d, m,
        UPDATE, NORM, B_IN, GELU, MASKED_CANDIDATE, BN, BD, MP,
    )  # fmt: skip
    # through W_up: the gradient of z, and of the size that the correction is scaled back to
    z = _load(z_in, rows, rows_ok, ranks, ranks_ok, r)
    g_z = tl.zeros((BN, RP), tl.float32)
    of_size = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for start in range(0, d, BD):
        columns = start + tl.arange(0, BD)
        ok = columns < d
        above = _load(g_after, rows, rows_ok, columns, ok, d)
        up = _load(w_up, columns, ok, ranks, ranks_ok, r)
        if SCALED:
            of_size += tl.sum(above * _times(z, tl.trans(up), w_up), 1)
            _before, _t, _g, now = _states(
                s, a_t, a_g, w_out, b_out, gate_start, rows, rows_ok, columns, ok, units, units_ok, d, m, UPDATE, B_OUT
            )
            squares += tl.sum(now * now, 1)
            above *= size[:, None]
        g_z += _times(above, up, w_up)
    g_z *= alpha
    if MASK and not FIRST:
        g_z *= _load(m0, rows, rows_ok, ranks, ranks_ok, r)
    _store(g_z_out, g_z, rows, rows_ok, ranks, ranks_ok, r)
    size_state = tl.sqrt(squares / d + 1e-12)
    along = tl.zeros((BN,), tl.float32)
    along_state = tl.zeros((BN,), tl.float32)
    if SCALED:
        for start in range(0, d, BD):
            columns = start + tl.arange(0, BD)
            ok = columns < d
            g_delta = _through_w_down(g_z, w_down, m0, rows, rows_ok, ranks, ranks_ok, columns, ok, d, MASK and FIRST)
            _before, _t, _g, now = _states(
                s, a_t, a_g, w_out, b_out, gate_start, rows, rows_ok, columns, ok, units, units_ok, d, m, UPDATE, B_OUT
            )
            along += tl.sum(g_delta * _load(h, rows, rows_ok, columns, ok, d), 1)
            along_state += tl.sum(g_delta * now, 1)
    # through the discrepancy and the gated update, into s, W_2 and W_4
    g_a_t = tl.zeros((BN, MP), tl.float32)
    g_a_g = tl.zeros((BN, MP), tl.float32)
    for start in range(0, d, BD):
        columns = start + tl.arange(0, BD)
        ok = columns < d
        x = _load(h, rows, rows_ok, columns, ok, d)
        before, t, g, now = _states(
            s, a_t, a_g, w_out, b_out, gate_start, rows, rows_ok, columns, ok, units, units_ok, d, m, UPDATE, B_OUT
        )
        delta = x - now
        g_x = _through_w_down(g_z, w_down, m0, rows, rows_ok, ranks, ranks_ok, columns, ok, d, MASK and FIRST)
        below = g_x
        if SCALED:
            delta = x / size[:, None] - now / size_state[:, None]
            below = (below - now * (along_state / (d * size_state * size_state))[:, None]) / size_state[:, None]
            g_x = (g_x - x * (along / (d * size * size))[:, None]) / size[:, None]
            g_x += x * (of_size * alpha / (size * d))[:, None]
        if MASK and FIRST:
            delta *= _load(m0, rows, rows_ok, columns, ok, d)
        _store(delta_out, delta, rows, rows_ok, columns, ok, d)
        g_x += _load(g_after, rows, rows_ok, columns, ok, d)
        _store(g_h, g_x, rows, rows_ok, columns, ok, d)
        g_now = _load(g_state, rows, rows_ok, columns, ok, d) - below
        if UPDATE:
            g_t = g_now * g
            g_g = tl.where(ok[None, :], g_now * (t - before) * g * (1.0 - g), 0.0)
            g_a_t += _times(g_t, _load(w_out, columns, ok, units, units_ok, m), w_out)
            g_a_g += _times(g_g, _load(w_out + d * m, columns, ok, units, units_ok, m), w_out)
            _store(both_out, g_t, rows, rows_ok, columns, ok, d)
            _store(both_out, g_g, rows + n, rows_ok, columns, ok, d)
            g_now -= g_t
        _store(g_s, g_now, rows, rows_ok, columns, ok, d)
    if UPDATE:  # through W_1 and W_3 and the LayerNorm
        if MASKED_CANDIDATE:
            g_a_t *= kept_t
        g_u_t, g_u_g = g_a_t * _slope(u_t, GELU), g_a_g * _slope(u_g, GELU)
        _store(a_out, a_t, rows, rows_ok, units, units_ok, 2 * m)
        _store(a_out + m, a_g, rows, rows_ok, units, units_ok, 2 * m)
        _store(g_u_out, g_u_t, rows, rows_ok, units, units_ok, 2 * m)
        _store(g_u_out + m, g_u_g, rows, rows_ok, units, units_ok, 2 * m)
        middle = tl.zeros((BN,), tl.float32)
        turned = tl.zeros((BN,), tl.float32)
        if NORM:
            for start in range(0, d, BD):
                columns = start + tl.arange(0, BD)
                ok = columns < d
                x = _load(h, rows, rows_ok, columns, ok, d)
                g_y = _through_w_in(g_u_t, g_u_g, w_in, units, units_ok, columns, ok, d, m)
                weight = tl.load(norm + columns, mask=ok, other=0.0).to(tl.float32)
                standard = (x - mean[:, None]) * deviation[:, None]
                middle += tl.sum(g_y * weight[None, :], 1)
                turned += tl.sum(g_y * weight[None, :] * standard, 1)
        tl.debug_barrier()  # what other threads of this program have written into g_h is read below
        for start in range(0, d, BD):
            columns = start + tl.arange(0, BD)
            ok = columns < d
            x = _load(h, rows, rows_ok, columns, ok, d)
            g_y = _through_w_in(g_u_t, g_u_g, w_in, units, units_ok, columns, ok, d, m)
            _store(y_out, _normed(x, mean, deviation, norm, norm_bias, columns, ok, NORM), rows, rows_ok, columns, ok, d)
            if NORM:
                standard = (x - mean[:, None]) * deviation[:, None]
                part = tl.program_id(0).to(tl.int64) * d + columns
                inside = rows_ok[:, None]
                tl.store(g_norm + part, tl.sum(tl.where(inside, g_y * standard, 0.0), 0), mask=ok)
                tl.store(g_norm_bias + part, tl.sum(tl.where(inside, g_y, 0.0), 0), mask=ok)
                weight = tl.load(norm + columns, mask=ok, other=0.0).to(tl.float32)
                g_y = g_y * weight[None, :] - (middle / d)[:, None] - standard * (turned / d)[:, None]
                g_y *= deviation[:, None]
            g_x = _load(g_h, rows, rows_ok, columns, ok, d) + g_y
            _store(g_h, g_x, rows, rows_ok, columns, ok, d)

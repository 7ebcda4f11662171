"""Eqs. 2-7, 13-14 against their formulas written with numpy-like float64 arithmetic."""

import math

import pytest
import torch
from torch import Tensor

from shadowpeft import ops

B, T, D, R, M = 2, 3, 8, 4, 5


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_correction_is_equations_2_and_3():
    h, s, down, up = rand(B, T, D), rand(B, T, D), rand(R, D), rand(D, R)
    expected = torch.einsum("btd,rd->btr", h - s, down)
    expected = torch.einsum("btr,dr->btd", expected, up)
    torch.testing.assert_close(ops.correction(h, s, down, up), expected)


@pytest.mark.parametrize("first", [False, True])
def test_dropout_stands_where_the_variant_puts_it(first):
    h, s, down, up = rand(1, 1, D), rand(1, 1, D), rand(R, D), rand(D, R)
    torch.manual_seed(5)
    mask = torch.nn.functional.dropout(torch.ones(1, 1, D if first else R, dtype=torch.float64), 0.5, True)
    torch.manual_seed(5)
    found = ops.correction(h, s, down, up, dropout=0.5, dropout_first=first, training=True)
    delta = h - s
    expected = ((delta * mask) @ down.T if first else (delta @ down.T) * mask) @ up.T
    torch.testing.assert_close(found, expected)
    plain = ops.correction(h, s, down, up, dropout=0.5, dropout_first=first, training=False)
    torch.testing.assert_close(plain, delta @ down.T @ up.T)


def test_inject_is_equation_4_and_keeps_the_dtype_of_h():
    h, c = rand(B, T, D), rand(B, T, D)
    torch.testing.assert_close(ops.inject(h, c, 0.3), h + 0.3 * c)
    assert ops.inject(h.bfloat16(), c.float(), 0.3).dtype == torch.bfloat16


def test_inject_of_zero_changes_no_bit():
    h = rand(B, T, D).float()
    assert torch.equal(ops.inject(h, torch.zeros_like(h), 0.3), h)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
def test_candidate_and_gate_are_equations_5_6_13_14(activation, bias):
    x, w_in, w_out = rand(B, T, D), rand(2 * M, D), rand(2, D, M)
    b_in, b_out = (rand(2 * M), rand(2, D)) if bias else (None, None)

    def act(v: Tensor) -> Tensor:
        return v / (1 + torch.exp(-v)) if activation == "silu" else v * 0.5 * (1 + torch.erf(v / math.sqrt(2)))

    one, three = x @ w_in[:M].T, x @ w_in[M:].T
    if bias:
        one, three = one + b_in[:M], three + b_in[M:]
    t_expected, g_expected = act(one) @ w_out[0].T, act(three) @ w_out[1].T
    if bias:
        t_expected, g_expected = t_expected + b_out[0], g_expected + b_out[1]
    t, g = ops.candidate_and_gate(x, w_in, w_out, b_in=b_in, b_out=b_out, activation=activation)
    torch.testing.assert_close(t, t_expected)
    torch.testing.assert_close(g, 1 / (1 + torch.exp(-g_expected)))


def test_only_the_transform_net_has_dropout():
    x, w_in, w_out = rand(B, T, D), rand(2 * M, D), rand(2, D, M)
    _, quiet = ops.candidate_and_gate(x, w_in, w_out)
    t, g = ops.candidate_and_gate(x, w_in, w_out, dropout=0.5, training=True)
    assert torch.equal(g, quiet)
    assert not torch.allclose(t, ops.candidate_and_gate(x, w_in, w_out)[0])


def test_gated_update_is_equation_7():
    s, t, g = rand(B, T, D), rand(B, T, D), torch.rand(B, T, D, dtype=torch.float64)
    torch.testing.assert_close(ops.gated_update(s, t, g), (1 - g) * s + g * t)
    torch.testing.assert_close(ops.gated_update(s, t, torch.ones_like(g)), t)
    assert torch.equal(ops.gated_update(s, t, torch.zeros_like(g)), s)


def test_gated_update_takes_the_dtype_of_the_state():
    s = rand(B, T, D).float()
    assert ops.gated_update(s, rand(B, T, D).bfloat16(), torch.rand(B, T, D).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("norm", [False, True])
def test_advance_is_equations_5_to_7_on_the_normalised_state(norm):
    s, h, w_in, w_out = rand(B, T, D), rand(B, T, D), rand(2 * M, D), rand(2, D, M)
    weight, bias = (rand(D), rand(D)) if norm else (None, None)
    x = h
    if norm:
        variance = h.var(-1, keepdim=True, correction=0)
        x = (h - h.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt() * weight + bias
    t, g = ops.candidate_and_gate(x, w_in, w_out)
    found = ops.advance(s, h, w_in, w_out, norm_weight=weight, norm_bias=bias)
    torch.testing.assert_close(found, (1 - g) * s + g * t)


def test_gradients_of_the_whole_step():
    def step(
        h: Tensor, s: Tensor, down: Tensor, up: Tensor, w_in: Tensor, w_out: Tensor, w: Tensor, b: Tensor
    ) -> Tensor:
        s = ops.advance(s, h, w_in, w_out, norm_weight=w, norm_bias=b)
        return ops.inject(h, ops.correction(h, s, down, up), 0.3) + s

    shapes = [(1, 2, D), (1, 2, D), (R, D), (D, R), (2 * M, D), (2, D, M), (D,), (D,)]
    assert torch.autograd.gradcheck(step, [rand(*shape).requires_grad_(True) for shape in shapes])


def test_operations_broadcast_over_leading_dimensions():
    s, h, w_in, w_out = rand(B, T, D), rand(B, T, D), rand(2 * M, D), rand(2, D, M)
    whole = ops.advance(s, h, w_in, w_out)
    parts = torch.stack([torch.stack([ops.advance(s[i, j], h[i, j], w_in, w_out) for j in range(T)]) for i in range(B)])
    torch.testing.assert_close(whole, parts)


def test_the_scaled_correction_does_not_depend_on_the_size_of_the_shadow_state():
    h, s, down, up = rand(B, T, D), rand(B, T, D), rand(R, D), rand(D, R)
    c = ops.correction(h, s, down, up, normalised=True)
    torch.testing.assert_close(ops.correction(h, 1e-3 * s, down, up, normalised=True), c, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ops.correction(7 * h, s, down, up, normalised=True), 7 * c)
    size = [x.square().mean(-1, keepdim=True).sqrt() for x in (h, s)]
    torch.testing.assert_close(c, size[0] * ((h / size[0] - s / size[1]) @ down.T @ up.T))
    assert ops.correction(torch.zeros_like(h), torch.zeros_like(s), down, up, normalised=True).isfinite().all()
    inputs = [x.requires_grad_(True) for x in (rand(1, 2, D), rand(1, 2, D), rand(R, D), rand(D, R))]
    assert torch.autograd.gradcheck(lambda *x: ops.correction(*x, normalised=True), inputs)


def test_a_gate_that_starts_nearly_closed_keeps_the_state():
    s, h, w_in, w_out = rand(B, T, D), rand(B, T, D), 0.1 * rand(2 * M, D), 0.1 * rand(2, D, M)
    _, g = ops.candidate_and_gate(h, w_in, w_out, gate_start=-4.0)
    _, half = ops.candidate_and_gate(h, w_in, w_out)
    torch.testing.assert_close(torch.logit(g), torch.logit(half) - 4.0)
    kept = ops.advance(s, h, w_in, w_out, gate_start=-4.0)
    assert (kept - s).norm() < 0.1 * s.norm()
    assert (ops.advance(s, h, w_in, w_out) - s).norm() > 0.3 * s.norm()

"""Eq. 12 from the normal equations: against a float64 SVD, on deficient, 16-bit, tied and padded heads."""

import pytest
import torch

from shadowpeft.core import solve_projection


def heads(rows=300, d=16, d_s=6, *, seed=0, condition=1.0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), d, dtype=torch.float64)
    large = torch.randn(rows, d, generator=generator, dtype=torch.float64) * scales
    return large, torch.randn(rows, d_s, generator=generator, dtype=torch.float64)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def missed(large, small, weight):
    large, small = large.double(), small.double()
    return float((large @ weight.double() - small).norm() / small.norm())


@pytest.mark.parametrize("d", [16, 600, 1100])  # 1100: several blocks of columns, the last one narrower
def test_it_is_the_pseudo_inverse_whatever_the_chunks(d):
    large, small = heads(1300, d)
    expected = torch.linalg.pinv(large) @ small
    for chunk in (70, 1024, 8192):
        found = solve_projection(large, small, chunk=chunk)
        assert relative(found.weight, expected) < 1e-10
        assert (found.rank, found.method) == (d, "cholesky")
        assert found.residual == pytest.approx(missed(large, small, expected), rel=1e-9)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_condition_and_accuracy_of_a_float32_head(condition):
    large, small = heads(condition=condition)
    large, small = large.float(), small.float()
    found = solve_projection(large, small, dtype=torch.float64)
    assert found.products == (torch.float32 if condition < 300 else torch.float64)
    singular = torch.linalg.svdvals(large.double())
    assert found.condition == pytest.approx(float(singular[0] / singular[-1]), rel=0.05)
    expected = torch.linalg.pinv(large.double()) @ small.double()
    if found.products == torch.float32:
        assert relative(found.weight, expected) < 1e-7 * condition  # as bad as a float32 SVD
        assert found.exact_residual == pytest.approx(missed(large, small, expected), rel=1e-6)
        found = solve_projection(large, small, dtype=torch.float64, products=torch.float64)
    # the condition number squared times float64's 1e-16
    assert relative(found.weight, expected) < 1e-14 * condition**2 + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_16_bit_head_is_solved_exactly_and_its_rounding_reported(dtype):
    large, small = (x.to(dtype) for x in heads())
    expected = torch.linalg.pinv(large.double()) @ small.double()
    exact = solve_projection(large, small, dtype=torch.float64, products=torch.float64)
    assert relative(exact.weight, expected) < 1e-10
    default = solve_projection(large, small, dtype=torch.float64)
    assert default.products == torch.float32
    assert relative(default.weight, expected) < 1e-6
    assert default.exact_residual == pytest.approx(exact.exact_residual, rel=1e-6)
    found = solve_projection(large, small, products=torch.float64)
    assert found.weight.dtype == dtype
    assert torch.equal(found.weight, exact.weight.to(dtype))
    assert found.exact_residual == exact.residual == exact.exact_residual
    assert found.residual == pytest.approx(missed(large, small, found.weight), rel=1e-9)
    assert dtype == torch.float32 or found.residual > found.exact_residual


def test_a_consistent_system_has_no_residual_but_that_of_rounding():
    large, _ = heads()
    true = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = solve_projection(large, large @ true, dtype=torch.bfloat16)
    assert found.exact_residual < 1e-7
    assert 1e-4 < found.residual < 1e-2  # bfloat16 has 8 bits
    single = solve_projection(large.float(), (large @ true).float())
    assert single.products == torch.float64  # float32 products could not tell so small a residual
    assert single.residual < 1e-6


@pytest.mark.parametrize(
    ("spoil", "rank"),
    [
        (lambda x: x.index_copy(1, torch.tensor([15]), x[:, :1]), 15),  # equal columns
        (lambda x: x * (torch.arange(16) != 3), 15),  # a column of zeros
        (lambda x: x[:, :5] @ torch.eye(16, dtype=x.dtype)[:5], 5),
        (lambda x: x[:, :9].float() @ torch.randn(9, 16, generator=torch.Generator().manual_seed(2)), 9),  # float32
    ],
)
def test_a_deficient_head_gives_the_solution_of_least_norm(spoil, rank):
    large, small = heads()
    large = spoil(large)
    expected = torch.linalg.pinv(large.double(), rtol=1e-6) @ small
    found = solve_projection(large, small)
    assert (found.rank, found.method) == (rank, "eigen")
    assert relative(found.weight, expected) < 1e-6
    assert found.residual == pytest.approx(missed(large, small, expected), rel=1e-9)
    single = solve_projection(large.float(), small.float())  # first tried with float32 products
    assert (single.rank, single.method, single.products) == (rank, "eigen", torch.float64)
    assert relative(single.weight, expected) < 1e-5


def test_fewer_rows_than_columns():
    large, small = heads(rows=10)
    found = solve_projection(large, small)
    assert found.rank == 10
    assert relative(found.weight, torch.linalg.pinv(large) @ small) < 1e-6
    assert found.residual < 1e-6


def test_a_threshold_of_ones_own_cuts_small_singular_values():
    large, small = heads(condition=1e3)
    found = solve_projection(large, small, rtol=0.1)
    assert found.rank == int((torch.linalg.svdvals(large) > 0.1 * torch.linalg.svdvals(large)[0]).sum()) < 16
    assert relative(found.weight, torch.linalg.pinv(large, rtol=0.1) @ small) < 1e-8


def test_a_head_of_zeros_and_one_that_is_zero():
    large, small = heads()
    nothing = solve_projection(torch.zeros_like(large), small)
    assert (nothing.rank, nothing.residual) == (0, 1.0)
    assert not bool(nothing.weight.any())
    assert solve_projection(large, torch.zeros_like(small)).residual == 0.0


def test_one_head_for_both_models_gives_the_identity():
    large, _ = heads()  # a tied pair: the small model's head is the base's own
    found = solve_projection(large, large)
    torch.testing.assert_close(found.weight, torch.eye(16, dtype=torch.float64), atol=1e-9, rtol=0)
    assert found.residual < 1e-7


def test_rows_beyond_the_tokens_take_no_part():
    large, small = heads()
    wide = torch.cat([large, torch.full((20, 16), 1e3, dtype=torch.float64)])
    narrow = torch.cat([small, torch.full((4, 6), -7.0, dtype=torch.float64)])
    found, plain = solve_projection(wide, narrow, rows=300), solve_projection(large, small)
    assert torch.equal(found.weight, plain.weight)
    assert found.residual == plain.residual
    with pytest.raises(ValueError, match="rows is 305 but the heads have 320 and 304"):
        solve_projection(wide, narrow, rows=305)
    with pytest.raises(ValueError, match="320 and 304"):
        solve_projection(wide, narrow)


def test_values_that_are_not_finite_are_refused():
    large, small = heads()
    for head in (large, small):
        kept = float(head[7, 3])
        head[7, 3] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            solve_projection(large, small)
        head[7, 3] = kept


def test_progress_and_repeatability():
    large, small = heads()
    seen = []
    first = solve_projection(large, small, chunk=128, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(128, 300), (256, 300), (300, 300)]
    assert torch.equal(first.weight, solve_projection(large, small, chunk=128).weight)

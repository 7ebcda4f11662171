"""Modules, projection (Eqs. 10-12), losses (8-9) and the recurrence's bookkeeping."""

import pytest
import torch
import torch.nn.functional as F

from shadowpeft.core import (
    Injection,
    Trajectory,
    Update,
    count_targets,
    fold_projection,
    head_loss,
    joint_loss,
    pseudo_inverse_projection,
    refine,
    token_cross_entropy,
)

D, R, M = 16, 4, 5


def count(module):
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------------------------- modules


def test_parameter_counts():
    assert count(Injection(D, R)) == 2 * D * R
    assert count(Update(D, M)) == 4 * D * M
    assert count(Update(D, M, bias=True)) == 4 * D * M + 2 * M + 2 * D


def test_injection_starts_as_the_paper_says():
    torch.manual_seed(0)
    injection = Injection(512, 64)
    assert torch.count_nonzero(injection.w_up) == 0
    assert (
        abs(float(injection.w_down.detach().std()) - 0.02) < 4e-4
    )  # 32,768 draws: the standard error of a std is 0.4 %
    assert abs(float(injection.w_down.detach().mean())) < 5e-4


def test_update_starts_as_four_default_linear_layers():
    torch.manual_seed(0)
    update = Update(400, 100)
    for weight, fan_in in ((update.w_in, 400), (update.w_out, 100)):
        bound = fan_in**-0.5
        assert float(weight.detach().abs().max()) <= bound
        assert abs(float(weight.detach().std()) - bound / 3**0.5) < 0.02 * bound


def test_refine_updates_before_it_injects():
    h, s = torch.randn(2, 3, D), torch.randn(2, 3, D)
    injection, update, norm = Injection(D, R), Update(D, M), torch.nn.LayerNorm(D)
    torch.nn.init.normal_(injection.w_up)
    corrected, advanced = refine(h, s, injection, 0.5, update, norm)
    torch.testing.assert_close(advanced, update(s, h, norm))
    torch.testing.assert_close(corrected, h + 0.5 * (h - advanced) @ injection.w_down.T @ injection.w_up.T)
    _, kept = refine(h, s, injection, 0.5)
    assert torch.equal(kept, s)


def test_trajectory_reads_what_was_written_and_refuses_gaps():
    s0, s1 = torch.zeros(1), torch.ones(1)
    trajectory = Trajectory(1, s0, keep_all=True)
    assert trajectory.read(1) is s0
    trajectory.write(1, s1)
    assert trajectory.read(2) is s1
    assert trajectory.read(1) is s0
    with pytest.raises(RuntimeError, match="layer 4"):
        trajectory.read(4)


def test_trajectory_keeps_only_the_newest_without_gradients():
    trajectory = Trajectory(1, torch.zeros(1), keep_all=False)
    trajectory.write(1, torch.ones(1))
    with pytest.raises(RuntimeError):
        trajectory.read(1)
    assert trajectory.s0 is not None


# ---------------------------------------------------------------------------------------------------------- projection


def test_projection_is_the_pseudo_inverse():
    large, small = torch.randn(300, D, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)
    found = pseudo_inverse_projection(large, small, chunk=70)
    torch.testing.assert_close(found, torch.linalg.pinv(large) @ small)


def test_projection_of_an_ill_conditioned_float32_head():
    scales = torch.logspace(0, -4, D, dtype=torch.float64)
    large = (torch.randn(300, D, dtype=torch.float64) * scales).float()
    small = torch.randn(300, 6)
    expected = torch.linalg.pinv(large.double()) @ small.double()
    found = pseudo_inverse_projection(large, small)
    # condition 1e4 squared is 1e8, of float64's 1e16; the result is rounded to float32 (6e-8)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_projection_of_a_rank_deficient_head_has_least_norm():
    large = torch.randn(300, D, dtype=torch.float64)
    large[:, -1] = large[:, 0]
    small = torch.randn(300, 6, dtype=torch.float64)
    expected = torch.linalg.pinv(large) @ small
    torch.testing.assert_close(pseudo_inverse_projection(large, small), expected, rtol=1e-6, atol=1e-8)


def test_projection_minimises_the_residual():
    large, small = torch.randn(300, D, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)
    best = pseudo_inverse_projection(large, small)
    residual = (large @ best - small).norm()
    for _ in range(5):
        assert (large @ (best + 1e-3 * torch.randn_like(best)) - small).norm() > residual


def test_projection_refuses_other_vocabularies():
    with pytest.raises(ValueError, match="300 and 299"):
        pseudo_inverse_projection(torch.randn(300, D), torch.randn(299, 6))


def test_folding_is_the_product_of_head_and_projection():
    head, projection, state = torch.randn(300, D), torch.randn(D, 6), torch.randn(2, 6)
    expected = (state.double() @ projection.double().T) @ head.double().T
    folded = fold_projection(head, projection)
    assert folded.dtype == projection.dtype
    torch.testing.assert_close((state @ folded.T).double(), expected, rtol=1e-4, atol=1e-4)  # float32 sums of 16 terms


# -------------------------------------------------------------------------------------------------------------- losses


def test_count_of_targets():
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 3]])
    assert int(count_targets(labels, shifted=True)) == 3
    assert int(count_targets(labels, shifted=False)) == 4
    assert int(count_targets(torch.tensor([1, -100]), shifted=False)) == 1


def test_cross_entropy_is_the_mean_over_targets():
    logits, targets = torch.randn(4, 9), torch.tensor([1, -100, 3, 4])
    expected = F.cross_entropy(logits[[0, 2, 3]].double(), targets[[0, 2, 3]])
    torch.testing.assert_close(token_cross_entropy(logits, targets, 3).double(), expected, rtol=1e-6, atol=1e-6)


def test_cross_entropy_of_nothing_is_a_connected_zero():
    logits = torch.randn(4, 9, requires_grad=True)
    loss = token_cross_entropy(logits, torch.full((4,), -100), 0)
    loss.backward()
    assert float(loss) == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_joint_loss():
    assert float(joint_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5)) == 3.5


@pytest.mark.parametrize("rows", [0, 1, 7, 20])
@pytest.mark.parametrize("frozen", [True, False])
def test_chunked_head_loss_is_plain_autograd(rows, frozen):
    head = torch.nn.Linear(D, 11, bias=True).requires_grad_(not frozen)
    targets = torch.randint(0, 11, (rows,))

    def loss(states, goals):
        return F.cross_entropy(head(states), goals, reduction="sum")

    mine = torch.randn(rows, D, requires_grad=True)
    plain = mine.detach().clone().requires_grad_(True)
    found = head_loss(mine, targets, loss, frozen=frozen, chunk=6)
    found.mul(0.7).backward()
    weight = head.weight.grad
    head.zero_grad()
    expected = loss(plain, targets)
    expected.mul(0.7).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine.grad, plain.grad)
    if frozen:
        assert weight is None
    else:
        torch.testing.assert_close(weight, head.weight.grad)


def test_chunked_head_loss_never_sees_more_than_a_chunk():
    seen = []

    def loss(states, goals):
        seen.append(len(states))
        return states.square().sum()

    head_loss(torch.randn(20, D, requires_grad=True), torch.zeros(20), loss, frozen=True, chunk=6)
    assert seen == [6, 6, 6, 2]


def test_head_loss_without_gradients_is_only_computed():
    rows = torch.randn(5, D, requires_grad=True)
    with torch.no_grad():
        found = head_loss(rows, torch.zeros(5), lambda x, _: x.square().sum(), frozen=True)
    assert not found.requires_grad
    torch.testing.assert_close(found, rows.detach().square().sum())

"""The step between two layers as one: numbers and gradients of the plain functions, and what it keeps for the backward pass."""

import itertools
from functools import partial

import pytest
import torch

from products import covering
from shadowpeft import ops
from shadowpeft.core import Injection, Update, refine
from shadowpeft.core.recurrence import is_untouched
from shadowpeft.ops import StepSettings, fused
from steps import weights_of_a_step

D, R, M = 8, 3, 4
KINDS = list(itertools.product((True, False), (True, False), (True, False), ("silu", "gelu"), (True, False)))


weights = partial(weights_of_a_step, d=D, r=R, m=M, dtype=torch.float64, requires_grad=True)


def states(requires_grad=True):
    return (torch.randn(2, 5, D, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2))


def plain(h, s, w, how):
    """The step by the functions of the equations, one after the other."""
    down, up, w_in, w_out, b_in, b_out, norm, norm_bias = w
    if w_in is not None:
        s = ops.advance(
            s, h, w_in, w_out, b_in=b_in, b_out=b_out, norm_weight=norm, norm_bias=norm_bias, eps=how.eps,
            gate_start=how.gate_start, activation=how.activation,
        )  # fmt: skip
    return ops.inject(h, ops.correction(h, s, down, up, normalised=how.normalised), how.alpha), s


@pytest.mark.parametrize(("update", "bias", "norm", "activation", "normalised"), KINDS)
def test_numbers_and_gradients_are_the_equations(update, bias, norm, activation, normalised):
    torch.manual_seed(0)
    w, (h, s) = weights(update, bias, norm), states()
    how = StepSettings(0.5, normalised=normalised, activation=activation, gate_start=-1.0)
    inputs = [h, s, *(each for each in w if each is not None)]

    def gradients(step):
        after, state = step(h, s, w, how)
        return [after, state, *torch.autograd.grad((after.sin() * after).sum() + state.cos().sum(), inputs)]

    for ours, theirs in zip(gradients(ops.step), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(ops.step(h, s, w, how), plain(h, s, w, how), rtol=1e-12, atol=1e-12)
        one = h[:1, :1], s[:1, :1]
        torch.testing.assert_close(ops.step(*one, w, how), plain(*one, w, how), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("normalised", "dropout_first"), covering([True, False], [True, False]))
def test_gradients_with_dropout_are_those_of_differences(dropout_first, normalised):
    torch.manual_seed(1)
    w, (h, s) = weights(True, True, True), states()
    how = StepSettings(0.5, 0.4, 0.3, dropout_first, normalised)
    masks = fused._masks(h, w, how)
    assert masks[0].shape[-1] == (D if dropout_first else R)
    assert sorted(masks[0].unique().tolist()) == pytest.approx([0, 1 / 0.6])
    assert sorted(masks[1].unique().tolist()) == pytest.approx([0, 1 / 0.7])
    assert torch.autograd.gradcheck(lambda h, s, *w: fused._Step.apply(h, s, how, *masks, *w), (h, s, *w))


def test_masks_drop_the_stated_share_and_keep_the_mean():
    torch.manual_seed(2)
    h = torch.zeros(50, 200, D)
    mask, candidate = fused._masks(h, weights(True, False, False), StepSettings(0.5, 0.25, 0.1))
    assert (mask == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert mask.mean().item() == pytest.approx(1, abs=0.01)
    assert (candidate == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)


def test_nothing_drops_in_evaluation():
    torch.manual_seed(3)
    w, (h, s) = weights(True, False, True), states()
    how = StepSettings(0.5, 0.5, 0.5)
    torch.testing.assert_close(ops.step(h, s, w, how), plain(h, s, w, how))
    assert not torch.equal(ops.step(h, s, w, how, training=True)[0], ops.step(h, s, w, how)[0])


def test_two_states_are_kept_for_the_backward_pass():
    injection, update, norm = Injection(D, R, 0.1), Update(D, M, 0.1), torch.nn.LayerNorm(D)
    h, s = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 5, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        refine(h, s, injection, 0.5, update, norm)
    large = {t.data_ptr() for t in kept if t.numel() == h.numel()}
    assert large == {h.data_ptr(), s.data_ptr()}


def test_frozen_weights_get_no_gradient():
    torch.manual_seed(4)
    w, (h, s) = weights(True, True, True), states()
    for each in w[2:]:
        each.requires_grad_(False)
    after, state = ops.step(h, s, w, StepSettings(0.5))
    (after.sum() + state.sum()).backward()
    assert w[0].grad is not None
    assert w[2].grad is None
    expected = torch.autograd.grad(sum(x.sum() for x in plain(h, s, w, StepSettings(0.5))), [h, s, w[0], w[1]])
    for tensor, gradient in zip([h, s, w[0], w[1]], expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("of_shadow", "of_weights"),
    [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)],
)
def test_dtypes_are_those_of_the_equations(of_base, of_shadow, of_weights):
    torch.manual_seed(5)
    injection, update, norm = (m.to(of_weights) for m in (Injection(D, R), Update(D, M), torch.nn.LayerNorm(D)))
    torch.nn.init.normal_(injection.w_up)
    h = torch.randn(2, 5, D).to(of_base).requires_grad_()
    s = torch.randn(2, 5, D).to(of_shadow).requires_grad_()
    after, state = refine(h, s, injection, 0.5, update, norm)
    advanced = update(s, h, norm)
    expected = injection(h, advanced, 0.5)
    assert (after.dtype, state.dtype) == (of_base, of_shadow) == (expected.dtype, advanced.dtype)
    exact = of_base == of_shadow == of_weights == torch.float32
    torch.testing.assert_close((after, state), (expected, advanced), rtol=1e-5 if exact else 2e-2, atol=1e-5 if exact else 2e-2)
    (after.float().sum() + state.float().sum()).backward()
    assert h.grad.dtype == of_base
    assert s.grad.dtype == of_shadow
    assert update.w_in.grad.dtype == of_weights


def test_autocast_takes_the_plain_functions():
    injection, update, norm = Injection(D, R), Update(D, M), torch.nn.LayerNorm(D)
    torch.nn.init.normal_(injection.w_up)
    h, s = torch.randn(2, 5, D), torch.randn(2, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops.fits(h, s)
        ours = refine(h, s, injection, 0.5, update, norm)
        torch.testing.assert_close(ours[0], injection(h, update(s, h, norm), 0.5))
    assert ops.fits(h, s)
    assert not ops.fits(h, s[:1])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_hooks_on_the_modules_are_called(which):
    modules = Injection(D, R), Update(D, M), torch.nn.LayerNorm(D)
    torch.nn.init.normal_(modules[0].w_up)
    h, s, seen = torch.randn(2, 5, D), torch.randn(2, 5, D), []
    before = refine(h, s, modules[0], 0.5, *modules[1:])
    hook = modules[which].register_forward_hook(lambda module, args, out: seen.append(out) or (out + 1 if which else out))
    after = refine(h, s, modules[0], 0.5, *modules[1:])
    assert len(seen) == (which < 2)  # the norm lends its weights and is never called
    assert torch.allclose(before[0], after[0]) == (which != 1)
    hook.remove()
    modules[which].forward = lambda *args: args[0]
    assert not is_untouched(*modules)


@pytest.mark.parametrize(("update", "bias", "norm", "activation", "normalised"), KINDS)
def test_gradients_of_gradients_are_the_equations(update, bias, norm, activation, normalised):
    torch.manual_seed(6)
    w, (x, y) = weights(update, bias, norm), states()
    how = StepSettings(0.5, normalised=normalised, activation=activation, gate_start=-1.0)
    inputs = [x, y, *(each for each in w if each is not None)]

    def second(step):
        first = step(x, y, w, how)
        after, state = step(first[0].sin(), first[1] + first[0], w, how)  # the states depend on each other and on the weights
        gradients = torch.autograd.grad(after.sin().sum() + state.cos().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    for ours, theirs in zip(second(ops.step), second(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)  # differences that cancel twice


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("update", [False, True])
def test_second_differences_with_dropout_and_frozen_weights(frozen, update):
    torch.manual_seed(7)
    w, (h, s) = weights(update, True, True), states()
    how = StepSettings(0.5, 0.4, 0.3)
    masks = fused._masks(h, w, how)
    if frozen:
        w, s = (w[0], *(each if each is None else each.detach() for each in w[1:])), s.detach()
    assert torch.autograd.gradgradcheck(lambda h, s, *w: fused._Step.apply(h, s, how, *masks, *w), (h, s, *w))

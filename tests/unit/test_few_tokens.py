"""The compiled step of few tokens: the plain numbers, taken where it is asked for and right, and left where torch must see."""

import itertools
import sys

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import save_base
from shadowpeft.errors import ConfigError
from shadowpeft.ops import StepSettings, fused
from steps import weights_of_a_step

few_tokens = pytest.importorskip("shadowpeft.ops.few_tokens", reason="needs numba")

D, R, M = 40, 3, 5
NONE = (None, None)


@pytest.fixture
def asked(monkeypatch):
    """Numba's step is asked for; the list holds how many tokens it was given."""
    taken = []
    own = few_tokens.forward

    def count(h, *given):
        taken.append(h.numel() // h.shape[-1])
        return own(h, *given)

    monkeypatch.setenv(fused.KERNELS, "numba")
    monkeypatch.setattr(few_tokens, "forward", count)
    return taken


def states(*shape):
    return torch.randn(*shape, D), torch.randn(*shape, D)


@pytest.mark.parametrize(
    ("update", "bias", "norm", "activation", "normalised"),
    list(itertools.product((True, False), (True, False), (True, False), ("silu", "gelu"), (True, False))),
)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 3)])
def test_the_numbers_are_those_of_float64(asked, shape, update, bias, norm, activation, normalised):
    torch.manual_seed(0)
    w, (h, s) = weights_of_a_step(update, bias, norm, d=D, r=R, m=M), states(*shape)
    how = StepSettings(0.5, normalised=normalised, activation=activation, gate_start=-1.0)
    with torch.no_grad():
        found = fused.step(h, s, w, how)
        doubled = [None if each is None else each.double() for each in w]
        expected = fused._forward(h.double(), s.double(), how, NONE, doubled)
        z = few_tokens.forward(h, s, how, NONE, w)[2]
    assert asked == [shape[0] * shape[1]] * 2
    torch.testing.assert_close(found[0].double(), expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(z.double(), expected[2], rtol=2e-5, atol=2e-5)
    if update:
        torch.testing.assert_close(found[1].double(), expected[1], rtol=2e-5, atol=2e-5)
    else:
        assert found[1] is s


def test_what_is_no_number_or_infinite_stays_so(asked):
    torch.manual_seed(1)
    w = weights_of_a_step(True, False, True, d=D, r=R, m=M)
    how = StepSettings(0.5)
    with torch.no_grad():
        for value in (float("nan"), float("inf"), 1e30, -1e30):
            h, s = states(1, 1)
            h[0, 0, 3] = value
            for ours, plain in zip(fused.step(h, s, w, how), fused._forward(h, s, how, NONE, w), strict=False):
                assert torch.equal(ours.isfinite(), plain.isfinite())
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert len(asked) == 4


def test_gates_and_activations_at_their_ends(asked):
    """Exponentials that overflow give 0 and 1."""
    w = [each if each is None else each * 1e4 for each in weights_of_a_step(True, True, False, d=D, r=R, m=M)]
    h, s = states(1, 2)
    with torch.no_grad():
        found, expected = fused.step(h, s, w, StepSettings(0.5)), fused._forward(h, s, StepSettings(0.5), NONE, w)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_what_it_does_not_take(asked):
    w, how = weights_of_a_step(True, True, True, d=D, r=R, m=M), StepSettings(0.5, dropout=0.5)
    small = [each if each is None else each.bfloat16() for each in w]
    h, s = states(1, 1)
    given = {
        "many tokens": (*states(1, 5), w),
        "no tokens": (*states(0, 1), w),
        "float64": (h.double(), s.double(), [each.double() for each in w]),
        "a base of 16 bits": (h.bfloat16(), s, w),
        "weights of 16 bits": (h, s.bfloat16(), small),
        "strides": (torch.randn(1, D, 2).transpose(1, 2)[:, :1], s, w),
        "a norm without bias": (h, s, [*w[:7], None]),
    }
    with torch.no_grad():
        for h_, s_, weights in given.values():
            fused.step(h_, s_, weights, how)
        fused.step(h, s, w, how, training=True)
        with FlopCounterMode(display=False) as counted:
            fused.step(h, s, w, how)
        assert counted.get_total_flops() > 0
        traced = torch.jit.trace(lambda h, s: fused.step(h, s, w, how), (h, s), check_trace=False)
        each = torch.func.vmap(lambda h, s: fused.step(h, s, w, how))(*states(3, 1, 1))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(h, torch.ones_like(h))
            tangent = torch.autograd.forward_ad.unpack_dual(fused.step(dual, s, w, how)[0]).tangent
    assert asked == []
    assert tangent is not None
    assert each[0].shape == (3, 1, 1, D)
    other = states(1, 1)
    with torch.no_grad():
        torch.testing.assert_close(traced(*other)[0], fused._forward(*other, how, NONE, w)[0])


def test_gradients_of_few_tokens_are_the_plain_ones(asked):
    torch.manual_seed(2)
    w, (h, s) = weights_of_a_step(True, True, True, d=D, r=R, m=M, requires_grad=True), states(1, 3)
    inputs = [h.requires_grad_(), s.requires_grad_(), *w]

    def gradients():
        after, state = fused.step(h, s, w, StepSettings(0.5))
        return torch.autograd.grad(after.square().sum() + state.sin().sum(), inputs)

    ours = gradients()
    assert asked == [3]
    torch.testing.assert_close(ours, fused_plain(gradients), rtol=1e-4, atol=1e-5)


def fused_plain(compute):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(fused.KERNELS)
        return compute()


def test_a_model_generates_the_same_with_it(asked, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path))
    model = get_peft_model(base, shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=4)).eval()
    for name, p in model.named_parameters():
        if "w_up" in name:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.randint(5, 60, (1, 7))
    generate = lambda: model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, output_logits=True,  # noqa: E731
                                      return_dict_in_generate=True)  # fmt: skip
    ours = generate()
    assert set(asked) == {1}
    plain = fused_plain(generate)
    assert torch.equal(ours.sequences, plain.sequences)
    torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-4, atol=1e-4)


def test_what_is_asked_for_and_not_there_is_said(monkeypatch):
    monkeypatch.setenv(fused.KERNELS, "cutlass")
    with pytest.raises(ConfigError, match="SHADOWPEFT_KERNELS is 'cutlass' but must be 'triton' or 'numba', or both"):
        fused._kernels("numba")
    monkeypatch.setenv(fused.KERNELS, "triton, numba")
    assert fused._kernels("numba") is few_tokens
    fused._imported.cache_clear()
    monkeypatch.setitem(sys.modules, "shadowpeft.ops.few_tokens", None)
    with pytest.raises(ConfigError, match=r"pip install 'shadowpeft\[numba\]'"):
        fused._kernels("numba")
    monkeypatch.setenv(fused.KERNELS, "")
    assert fused._kernels("numba") is None

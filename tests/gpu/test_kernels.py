"""The step's Triton kernels beside the plain version: in Triton's interpreter on a CPU (``make triton``), and on CUDA."""

import itertools
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from shadowpeft.core import Injection, Update, refine
from shadowpeft.errors import ConfigError
from shadowpeft.ops import StepSettings, fused
from steps import weights_of_a_step

ROOT = Path(__file__).parents[2]
DEVICES = [pytest.param("cpu", marks=pytest.mark.triton), pytest.param("cuda", marks=pytest.mark.gpu)]
D, R, M = 72, 3, 5  # no power of two: every block has an edge
KINDS = [
    kind
    for kind in itertools.product((True, False), repeat=7)
    if kind[0] or not any(kind[1:4])  # biases, norm and activation are the update's
]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cpu":
        assert os.environ.get("TRITON_INTERPRET") == "1", "run it with: make triton"
    return torch.device(request.param)


@pytest.fixture
def kernels(device):
    from shadowpeft.ops import kernels

    return kernels


weights = partial(weights_of_a_step, d=D, r=R, m=M, scale=0.3)


def compare(ours, theirs, bound):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
            assert float((mine.float() - other.float()).abs().max()) <= bound * float(other.float().abs().max())


def both_ways(kernels, h, s, above, of_state, how, masks, w, bound):
    """Forward and backward of the kernels beside those of the plain version."""
    plain = fused._forward(h, s, how, masks, w)
    compare(kernels.forward(h, s, how, masks, w), plain, bound)
    for needs in ([each is not None for each in w], [False] * 8):
        given = (above, of_state, h, s, plain[2], how, masks, w, needs)
        (mine_h, mine_s, mine), (h_, s_, theirs) = kernels.backward(*given), fused._backward(*given)
        wanted = [each if need else None for each, need in zip(theirs, needs, strict=True)]
        compare([mine_h, mine_s, *mine], [h_, s_, *wanted], bound)


@pytest.mark.parametrize(("update", "bias", "norm", "gelu", "normalised", "first", "drops"), KINDS)
def test_numbers_and_gradients_are_those_of_the_plain_version(
    device, kernels, update, bias, norm, gelu, normalised, first, drops
):
    torch.manual_seed(0)
    w = weights(update, bias, norm, device=device)
    h, s, above, of_state = (2 * torch.randn(2, 11, D).to(device) for _ in range(4))
    activation, dropped = "gelu" if gelu else "silu", (0.4, 0.3) if drops else (0.0, 0.0)
    how = StepSettings(0.5, *dropped, first, normalised, 1e-5, -1.0, activation)
    both_ways(kernels, h, s, above, of_state, how, fused._masks(h, w, how), w, 5e-6)


@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("of_weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalised", [True, False])
def test_lower_precision_is_no_further_from_float64_than_the_plain_version(
    device, kernels, of_base, of_weights, normalised
):
    torch.manual_seed(1)
    w = weights(True, True, True, device=device, dtype=of_weights)
    of_shadow = of_base if of_weights == torch.float32 else of_weights
    h, s, above, of_state = (torch.randn(40, D).to(device, dtype) for dtype in (of_base, of_shadow) * 2)
    how = StepSettings(0.5, normalised=normalised)
    none = (None, None)
    exact = fused._forward(h.double(), s.double(), how, none, tuple(x if x is None else x.double() for x in w))
    plain, ours = fused._forward(h, s, how, none, w), kernels.forward(h, s, how, none, w)
    for mine, other, right in zip(ours, plain, exact, strict=True):
        assert mine.dtype == other.dtype
        far = [float((found.double() - right).square().mean().sqrt()) for found in (mine, other)]
        # the interpreter cuts bfloat16 off where a GPU rounds, which doubles the error
        cuts = device.type == "cpu" and torch.bfloat16 in (of_base, of_weights)
        assert far[0] <= (2.5 if cuts else 1.1) * far[1] + 1e-6
    given = (above, of_state, h, s, plain[2], how, none, w, [True] * 8)
    mine, other = kernels.backward(*given), fused._backward(*given)
    compare([*mine[:2], *mine[2]], [*other[:2], *other[2]], 6e-2 if torch.bfloat16 in (of_base, of_weights) else 1e-2)


def test_they_are_taken_where_they_are_asked_for(device, kernels, monkeypatch):
    """Through the modules, with gradients; too few tokens, and a CPU, keep the plain version."""
    monkeypatch.setenv(fused.KERNELS, "triton")
    torch.manual_seed(2)
    injection, update, norm = Injection(D, R).to(device), Update(D, M).to(device), torch.nn.LayerNorm(D).to(device)
    torch.nn.init.normal_(injection.w_up)
    taken = []
    monkeypatch.setattr(kernels, "forward", lambda *given, own=kernels.forward: taken.append(1) or own(*given))
    for rows in (kernels.LEAST_ROWS // 2 - 1, kernels.LEAST_ROWS // 2):
        h, s = (torch.randn(2, rows, D, device=device, requires_grad=True) for _ in range(2))
        found = refine(h, s, injection, 0.5, update, norm)
        state = update(s, h, norm)
        expected = injection(h, state, 0.5), state
        wanted = [h, s, *injection.parameters(), *update.parameters(), *norm.parameters()]
        gradients = [torch.autograd.grad(sum(x.square().sum() for x in pair), wanted) for pair in (found, expected)]
        torch.testing.assert_close([*found, *gradients[0]], [*expected, *gradients[1]], rtol=2e-4, atol=2e-4)
    assert len(taken) == (1 if device.type == "cuda" else 0)


def test_what_is_asked_for_and_not_there_is_said(monkeypatch):
    monkeypatch.setenv(fused.KERNELS, "cutlass")
    with pytest.raises(ConfigError, match="SHADOWPEFT_KERNELS is 'cutlass' but must be 'triton'"):
        fused._kernels()
    monkeypatch.setenv(fused.KERNELS, "triton")
    monkeypatch.setitem(__import__("sys").modules, "shadowpeft.ops.kernels", None)
    with pytest.raises(ConfigError, match=r"pip install 'shadowpeft\[triton\]'"):
        fused._kernels()
    monkeypatch.setenv(fused.KERNELS, "")
    assert fused._kernels() is None


def test_the_page_says_what_the_kernels_take():
    record = json.loads((ROOT / "docs" / "records" / "triton-compiled.json").read_text(encoding="utf-8"))
    largest = max(max(case["shared_bytes"].values()) for case in record["compiled"] if case["capability"] == 80)
    assert f"at most {largest / 1000:.0f} KB of shared memory" in (ROOT / "docs" / "running.md").read_text(encoding="utf-8")

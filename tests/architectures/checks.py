"""What one architecture must do with a shadow; each step raises with its name if it fails."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import zoo
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import shadowpeft
from shadowpeft import ShadowPeftConfig

STEPS = ("attach", "identity", "gradients", "effect", "cache", "detach", "reload", "disable", "unload")
NEW_TOKENS = 8


class StepFailed(AssertionError):
    """One step of the checks failed. ``step`` is its name, ``refused`` whether shadowpeft itself said no."""

    def __init__(self, step: str, error: BaseException) -> None:
        self.step = step
        self.refused = isinstance(error, shadowpeft.errors.ShadowPeftError)
        self.reason = " ".join(f"{error}".split())
        super().__init__(f"{step}: {type(error).__name__}: {error}")


@contextmanager
def step(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StepFailed(name, error) from error


def logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def greedy(model: Any, ids: Tensor, use_cache: bool) -> Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
    )


def check(name: str, build: Callable[[str], Any] = zoo.build) -> dict[str, Any]:
    """Run every step on the tiny instance of ``name`` that ``build`` makes.

    Returns:
        ``shadow``: class of the detached model.

    Raises:
        StepFailed: at the first step that fails.
    """
    base = build(name)
    ids = torch.randint(2, zoo.VOCAB - 2, (2, 12), generator=torch.Generator().manual_seed(3))
    plain, keys = logits(base, ids), set(base.state_dict())
    before, has_cache = copy.deepcopy(base.state_dict()), _has_cache(base, ids)
    with step("attach"):
        torch.manual_seed(5)
        config = ShadowPeftConfig(
            task_type="CAUSAL_LM", r=4, shadow_alpha=0.5, shadow_dropout=0.0, auxiliary_loss_weight=0.5
        )
        model = get_peft_model(base, config)
    with step("identity"):
        assert torch.equal(logits(model.eval(), ids), plain), "logits differ from the base's before training"
    with step("gradients"):
        _train(model, ids)
    with step("effect"):
        trained = logits(model.eval(), ids)
        assert bool(torch.isfinite(trained).all()), "logits are not finite after training"
        assert (trained - plain).abs().max() > 1e-4, "training changed nothing"
    with step("cache"):
        cached, full = greedy(model, ids, True), greedy(model, ids, False)
        assert torch.equal(cached, full), f"cached {cached[:, 12:].tolist()} != uncached {full[:, 12:].tolist()}"
        if has_cache:
            gap = float((_in_parts(model, ids) - trained).abs().max())
            assert gap < 1e-3 * float(trained.abs().max().clamp(min=1)), f"cached logits differ by {gap:.1e}"
    with step("detach"):
        edge = shadowpeft.detach(model)
        with torch.no_grad():
            expected = model(input_ids=ids, return_shadow=True).shadow_logits
        assert torch.allclose(logits(edge, ids), expected, atol=1e-5), "detached logits are not the shadow's"
        assert torch.equal(greedy(edge, ids, True), greedy(edge, ids, False)), "detached: cached != uncached"
    with step("reload"), tempfile.TemporaryDirectory() as folder:
        edge.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(logits(again, ids), logits(edge, ids)), "reloaded edge model gives other logits"
    with step("disable"), model.disable_adapter():
        assert torch.equal(logits(model, ids), plain), "disabled adapter still changes the logits"
    with step("unload"):
        restored = model.unload()
        assert set(restored.state_dict()) == keys, "unload left or lost parameters"
        assert all(torch.equal(before[k], v) for k, v in restored.state_dict().items()), "the base's weights changed"
        assert torch.equal(logits(restored, ids), plain), "the unloaded base gives other logits"
    return {"shadow": type(edge).__name__}


def _caches(output: Any) -> dict[str, Any]:
    """The cache in an output under the name of its argument, or nothing if the architecture (openai-gpt) has none."""
    return {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}


def _has_cache(model: nn.Module, ids: Tensor) -> bool:
    with torch.no_grad():
        return bool(_caches(model(input_ids=ids, use_cache=True)))


def _in_parts(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a prompt of seven tokens and of the rest one token at a time."""
    parts, cache = [], {}
    for part in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
        with torch.no_grad():
            out = model(input_ids=part, use_cache=True, **cache)
        cache = _caches(out)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def caches_like_the_whole(model: nn.Module, ids: Tensor) -> bool:
    """Whether the logits of a prompt in parts are those of the whole; so too of a model without a cache."""
    if not _has_cache(model, ids):
        return True
    whole = logits(model, ids)
    return float((_in_parts(model, ids) - whole).abs().max()) < 1e-3 * float(whole.abs().max().clamp(min=1))


def _train(model: Any, ids: Tensor) -> None:
    """A few optimiser steps; every trainable tensor must get a gradient that is not zero, no base tensor any."""
    model.train()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all("shadowpeft_" in n for n in trainable), "a base parameter is trainable"
    optimiser = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.0)
    seen: set[str] = set()
    for _ in range(4):
        optimiser.zero_grad()
        out = model(input_ids=ids, labels=ids)
        assert bool(torch.isfinite(out.loss)), "the loss is not finite"
        out.loss.backward()
        missing = [n for n, p in trainable.items() if p.grad is None]
        assert not missing, f"{len(missing)} trainable tensors get no gradient, such as {missing[0]}"
        seen |= {n for n, p in trainable.items() if bool(p.grad.abs().max() > 0)}
        optimiser.step()
    zero = sorted(set(trainable) - seen)
    assert not zero, f"{len(zero)} trainable tensors only get zero gradients, such as {zero[0]}"
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable), (
        "a base tensor has a gradient"
    )

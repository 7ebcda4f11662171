"""A base whose own forward computes its loss without logits, as Liger's fused heads do: the losses and gradients are the same.

A stand-in with Liger's interface runs by default; Liger itself runs in Triton's interpreter (``make triton``).
"""

import os
from types import MethodType

import pytest
import torch
from transformers import Trainer, TrainingArguments

from products import covering
from shadowpeft.errors import ConfigError
from shadowpeft.train.trainer import ShadowTrainer
from tiny import adapt, base, tokens

IGNORE = -100
KINDS = ["ce", "kl", "both", "lk"]


def without_logits(model):
    """Gives ``model`` a forward that leaves the logits out in training, unless ``skip_logits=False``."""
    stock = type(model).forward

    def forward(self, input_ids=None, attention_mask=None, labels=None, skip_logits=None, **kwargs):
        output = stock(self, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
        skip = self.training and labels is not None if skip_logits is None else skip_logits
        if skip:
            output.logits = None
        return output

    model.forward = MethodType(forward, model)


def by_liger(model):
    """Liger's own forward of this architecture, on this instance."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "run it with: make triton"
    liger = pytest.importorskip("liger_kernel.transformers")
    parts = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    liger.apply_liger_kernel_to_llama(**parts, fused_linear_cross_entropy=True, model=model)


@pytest.fixture(params=[without_logits, pytest.param(by_liger, marks=pytest.mark.triton)])
def patch(request):
    return request.param


def passed(model, **given):
    """Losses and gradients of a pass over two rows, the first of which begins with four tokens that are no targets."""
    ids = tokens()
    labels = ids.clone()
    labels[0, :4] = IGNORE
    out = model(input_ids=ids, **{"labels": labels, **given})
    out.loss.backward()
    losses = [float(each.detach()) for each in (out.loss, out.task_loss, out.shadow_loss)]
    return out, losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "items"), covering(KINDS, [None, 40]))
def test_losses_and_gradients_are_those_with_logits(patch, kind, items):
    given = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    patched = base()
    patch(patched)
    (_, wanted, theirs), (out, found, ours) = (
        passed(adapt(model, shadow_loss=kind).train(), **given) for model in (base(), patched)
    )
    assert found == pytest.approx(wanted, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6)
    assert (out.logits is None) == (kind == "ce")  # those who learn from them get them


def test_evaluation_has_its_logits(patch):
    model = base()
    patch(model)
    adapted = adapt(model).eval()
    with torch.no_grad():
        assert adapted(input_ids=tokens(), labels=tokens()).logits.shape[:2] == tokens().shape


def test_no_target_is_a_connected_zero(patch):
    model = base()
    patch(model)
    out, losses, gradients = passed(adapt(model).train(), labels=torch.full_like(tokens(), IGNORE))
    assert out.logits is None
    assert losses == [0.0, 0.0, 0.0]
    assert all(bool((gradient == 0).all()) for gradient in gradients.values())


def test_logits_that_are_wanted_and_left_out_are_an_error():
    model = base()
    without_logits(model)
    with pytest.raises(ConfigError, match="gave no logits but the shadow learns from them, or they were asked for"):
        passed(adapt(model, shadow_loss="kl").train(), skip_logits=True)


@pytest.mark.parametrize("trainer", [Trainer, ShadowTrainer])
def test_trainers_reach_the_same_weights(trainer, patch, tmp_path):
    ids = tokens(4, 9)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    ends = []
    for place, change in enumerate((None, patch)):
        model = base()
        if change is not None:
            change(model)
        adapted = adapt(model)
        arguments = TrainingArguments(
            str(tmp_path / str(place)), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer(model=adapted, args=arguments, train_dataset=rows).train()
        ends.append({name: p.detach() for name, p in adapted.named_parameters() if p.requires_grad})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)

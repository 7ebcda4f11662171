"""Gradients of gradients, gradients of one path alone, and gradients through a traced model."""

import pytest
import torch
from torch import nn

from shadowpeft.core import recurrence
from shadowpeft.errors import ConfigError
from tiny import adapt, base, tokens


def exact(**fields):
    """An adapted model in float64 whose attention has a gradient of its gradient."""
    return adapt(base("llama", attn_implementation="eager").double(), **fields).double().train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def penalty(model):
    """Gradients of the length of the loss's gradient, for every weight that trains."""
    out = model(input_ids=tokens(), return_shadow=True)
    loss = sum(logits.log_softmax(-1)[..., 5].mean() for logits in (out.logits, out.shadow_logits))
    first = torch.autograd.grad(loss, trained(model), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), trained(model))


@pytest.mark.parametrize("fields", [{}, {"variant": "scaled"}], ids=["paper", "scaled"])
def test_a_gradient_of_a_gradient_is_that_of_the_plain_operations(monkeypatch, fields):
    model = exact(**fields)
    found = penalty(model)
    monkeypatch.setattr(recurrence, "fits", lambda h, s: False)
    for ours, theirs in zip(found, penalty(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert all(bool(g.any()) for g in found)


def test_it_is_refused_for_a_loss_that_keeps_only_the_first():
    model = exact(auxiliary_loss_weight=0.5)
    with pytest.raises(ConfigError, match=r"create_graph=True.*return_shadow=True without labels"):
        torch.autograd.grad(model(input_ids=tokens(), labels=tokens()).loss, trained(model), create_graph=True)
    model = exact(auxiliary_loss_weight=0.0)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    torch.autograd.grad(loss, trained(model), create_graph=True, allow_unused=True)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_task_loss_alone_has_the_gradients_of_lambda_zero(task):
    labels = tokens() if task == "CAUSAL_LM" else torch.tensor([0, 2, 1])
    gradients = []
    for weight in (0.5, 0.0):
        model = adapt(base("llama", task=task), task_type=task, auxiliary_loss_weight=weight).train()
        out = model(input_ids=tokens(), labels=labels)
        (out.task_loss if weight else out.loss).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name])


class Logits(nn.Module):
    """What ``torch.jit.trace`` takes: tensors to a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("graph", [True, False])
def test_a_traced_model_gives_the_same_numbers_and_gradients(graph):
    model = Logits(adapt(base("llama")).get_base_model())
    with torch.set_grad_enabled(graph):
        traced = torch.jit.trace(model, tokens(), check_trace=False)
        for ids in (tokens(), tokens(seed=8)):
            torch.testing.assert_close(traced(ids), model(ids), rtol=1e-4, atol=1e-5)
        if graph:
            ours, theirs = (torch.autograd.grad(m(tokens()).square().mean(), trained(m)) for m in (traced, model))
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

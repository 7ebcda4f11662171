"""The shadow's loss without the base: what all rows begin with runs once, and neither loss nor gradients change."""

import pytest
import torch

from shadowpeft.hf.forward import beginning
from shadowpeft.hf.forward.losses import shadow_path_loss
from shadowpeft.hf.layer import adapted_base, find_hub
from tiny import adapt, base, padded, tokens

SHARED = 12


def batch(counts, shared=SHARED, target=14):
    ids = tokens(4, 20)
    ids[:, :shared] = ids[0, :shared]
    ids, mask = padded(ids, counts)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :target] = -100
    return {"input_ids": ids, "attention_mask": mask, "shadow_labels": labels}


def loss_and_gradients(model, rows):
    seen = []
    backbone = find_hub(model).shadowpeft_backbone["default"]
    handle = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    model.zero_grad()
    loss = shadow_path_loss(adapted_base(model), find_hub(model), rows)
    loss.backward()
    handle.remove()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, seen


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [0, 3, 1, 5]], ids=["even", "padded"])
def test_a_shared_start_runs_once(name, counts, monkeypatch):
    model = adapt(base(name).double(), shadow_num_hidden_layers=2).double()
    rows = batch(counts)
    loss, gradients, runs = loss_and_gradients(model, rows)
    assert runs == [(1, SHARED), (4, 20 - SHARED)]
    monkeypatch.setattr(beginning, "WORTH_SHARING", 1000)
    plain, expected, runs = loss_and_gradients(model, rows)
    assert runs == [(4, 20)]
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        # these norms compute in float32, whatever goes in: gradients of 0.3 differ by 1.5e-8
        torch.testing.assert_close(gradients[key], value, rtol=0, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    "rows",
    [
        batch([0, 0, 0, 0], shared=7),
        batch([0, 0, 0, 0], target=6),
        {key: value[:1] for key, value in batch([0, 0, 0, 0]).items()},
        {key: value.flip(1) for key, value in batch([0, 3, 1, 5]).items()},
    ],
    ids=["too short", "holds a target", "one row", "padded on the left"],
)
def test_whole_rows_run_where_nothing_can_be_shared(rows):
    model = adapt(base())
    loss, _, runs = loss_and_gradients(model, rows)
    assert runs == [tuple(rows["input_ids"].shape)]
    assert loss.isfinite()


def test_checkpointed_layers_run_whole():
    model = adapt(base())
    find_hub(model).shadowpeft_backbone["default"].gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert loss_and_gradients(model, batch([0, 0, 0, 0]))[2] == [(4, 20)]

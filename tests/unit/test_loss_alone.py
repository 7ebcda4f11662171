"""A training step that nobody asks for logits computes them where there are targets alone; losses and gradients stay."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from products import covering
from shadowpeft import ShadowLossMixin, ShadowTrainer
from shadowpeft.hf.layer import adapted_base
from tiny import adapt, base, padded, tokens


def batch():
    ids, mask = padded(tokens(4, 12), [0, 3, 1, 5])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model, rows, **options):
    model.zero_grad()
    output = model(**rows, **options)
    output.loss.backward()
    return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("items", "name"),
    covering(
        [None, 40],
        ["llama", "llama_tied", "qwen3", "gemma3", "mistral", "gpt2", "mixtral"],
    ),
)
def test_losses_and_gradients_are_those_with_logits(name, items):
    model = adapt(base(name), auxiliary_loss_weight=0.7).train()
    options = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    rows = batch()
    torch.manual_seed(0)
    whole, expected = step(model, rows, **options)
    torch.manual_seed(0)
    lean, gradients = step(model, rows, **options, loss_alone=True)
    assert lean.logits.shape[1] == 1
    for key in ("loss", "task_loss", "shadow_loss"):
        torch.testing.assert_close(lean[key] if key == "loss" else getattr(lean, key), getattr(whole, key))
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=1e-6, msg=key)


class Reads(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Below(ShadowLossMixin, Reads):
    pass


@pytest.mark.parametrize(
    ("cls", "fields", "smoothing", "lean"),
    [
        (ShadowTrainer, {}, 0.0, True),
        (ShadowTrainer, {"shadow_loss": "kl"}, 0.0, False),
        (ShadowTrainer, {}, 0.1, False),
        (Below, {}, 0.0, False),
    ],
    ids=["plain", "teaching", "smoothing", "another trainer's loss"],
)
def test_who_trains_without_logits(tmp_path, cls, fields, smoothing, lean):
    model = adapt(base("llama"), **fields)
    seen = []
    adapted_base(model).register_forward_hook(lambda module, args, output: seen.append(output.logits.shape[1]))
    rows = batch()
    data = [{key: value[i] for key, value in rows.items()} for i in range(4)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        label_smoothing_factor=smoothing,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    cls(model=model, args=args, train_dataset=data).train()
    assert seen == [1 if lean else 12]

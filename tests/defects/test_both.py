"""Defects 25-26 of docs/defects.md, which both public implementations share: ours is right. `make compare` measures theirs."""

import inspect
import threading

import pytest
import torch
from transformers import Trainer, TrainingArguments

from shadowpeft import ShadowTrainer
from shadowpeft.errors import UnsupervisedShadowError
from shadowpeft.train import run as training
from tiny import adapt, adapter_config, base, tokenizer, tokens

DENORMAL = 1e-39
"""Below float32's smallest normal number, 1.18e-38."""


@pytest.fixture
def denormals():
    """Leaves the processor as it was."""
    before = float(torch.tensor(DENORMAL) * 1.0) == 0.0
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(before)


def flushed():
    return float(torch.tensor([DENORMAL]).mul(1.0)) == 0.0


def test_defect_25_runs_flush_denormal_numbers(denormals, tmp_path, monkeypatch):
    assert not flushed()
    training.prepare_cpu()
    if not flushed():
        pytest.skip("this processor cannot flush denormal numbers")
    seen = []
    worker = threading.Thread(target=lambda: seen.append(flushed()))
    worker.start()
    worker.join()
    assert seen == [True]  # threads started later inherit it
    # every command that computes prepares the processor before it loads a model
    from shadowpeft.apps import demo, doctor, evaluate, generate

    for module in (demo, doctor, evaluate, generate, training):
        assert "prepare_cpu(" in inspect.getsource(module), module.__name__


# --------------------------------------------------------------------------------------------------------------- 26


def rows():
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tokens(8, 9)]


def update(model, trainer):
    """How the shadow backbone moves in the trainer's one step (plain SGD)."""
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "layers" in n}
    trainer.train()
    return torch.cat([(p.detach() - start[n]).flatten() for n, p in model.named_parameters() if n in start])


SETTINGS = {
    "per_device_train_batch_size": 8,
    "learning_rate": 0.01,
    "max_steps": 1,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def loss_of_ones_own(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    total = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def trained(model, folder, cls, way):
    more = {"label_smoothing_factor": 0.1} if way == "smoothing" else {}
    options = {"compute_loss_func": loss_of_ones_own} if way == "own loss" else {}
    torch.manual_seed(0)
    arguments = TrainingArguments(output_dir=str(folder), **SETTINGS, **more)
    return update(model, cls(model=model, args=arguments, train_dataset=rows(), **options))


@pytest.mark.parametrize("way", ["smoothing", "own loss"])
def test_defect_26_lambda_takes_effect_whoever_computes_the_main_loss(tmp_path, way):
    small, large = (
        trained(adapt(base("llama"), auxiliary_loss_weight=w), tmp_path, ShadowTrainer, way) for w in (0.05, 100.0)
    )
    assert float((large - small).norm() / small.norm()) > 10
    with pytest.raises(UnsupervisedShadowError):  # stock Trainer takes the labels away: no silent loss of lambda
        trained(adapt(base("llama")), tmp_path, Trainer, way)


def test_defect_26_lambda_takes_effect_in_trls_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    words = tokenizer()
    data = Dataset.from_list([{"text": " ".join(f"w{int(i)}" for i in row)} for row in tokens(8, 9)])

    def sft(model):
        arguments = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, max_length=16, **SETTINGS)
        return update(model, trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=words))

    small, large = (sft(adapt(base("llama"), auxiliary_loss_weight=w)) for w in (0.05, 100.0))
    assert float((large - small).norm() / small.norm()) > 10


def test_defect_26_shadow_labels_reach_the_model_and_predictions_stay_a_tensor(tmp_path):
    own = [{**row, "shadow_labels": torch.full_like(row["labels"], 7)} for row in rows()]
    arguments = TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    plain, other = adapt(base("llama"), auxiliary_loss_weight=1.0), adapt(base("llama"), auxiliary_loss_weight=1.0)
    a = update(plain, ShadowTrainer(model=plain, args=arguments, train_dataset=rows()))
    b = update(other, ShadowTrainer(model=other, args=arguments, train_dataset=own))
    assert float((a - b).norm() / a.norm()) > 0.1
    predicted = ShadowTrainer(model=plain, args=arguments).predict(rows()[:4]).predictions
    assert not isinstance(predicted, tuple)
    assert predicted.shape == (4, 9, 61)
    assert adapter_config().auxiliary_loss_weight == 0.05

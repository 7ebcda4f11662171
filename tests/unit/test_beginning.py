"""What all rows begin with runs once through base and shadow in training, and neither losses nor gradients change."""

import pytest
import torch
from transformers import TrainingArguments

from shadowpeft import ShadowTrainer
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.forward import beginning
from shadowpeft.hf.layer import adapted_base
from tiny import adapt, base, padded, tokens

SHARED = 12


def batch(counts=(0, 3, 1, 5), shared=SHARED, target=14, side="right"):
    ids = tokens(4, 20)
    ids[:, :shared] = ids[0, :shared]
    ids, mask = padded(ids, list(counts), side)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :target] = -100
    own = labels.clone()
    own[:, 17:] = -100  # the shadow learns less of the answer
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "shadow_labels": own}


def trainer_of(model, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    return ShadowTrainer(model=model, args=args)


def loss_and_gradients(model, rows, tmp_path):
    """Of one step, and the shapes that the base's first layer has seen."""
    seen = []
    handle = find_decoder(adapted_base(model)).layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])),
        with_kwargs=True,
    )
    model.train()
    model.zero_grad()
    trainer = trainer_of(model, tmp_path)
    trainer._shadow_num_items = torch.tensor(11)
    loss = trainer.compute_loss(model, dict(rows), num_items_in_batch=torch.tensor(17))
    loss.backward()
    handle.remove()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, seen, dict(trainer._sums)


@pytest.mark.parametrize(
    "fields",
    [{}, {"variant": "scaled"}, {"refined_layers": [2, 3]}, {"shadow_model": "small_llama"}, {"shadow_loss": "both"}],
    ids=["paper", "scaled", "last layers", "explicit", "distilled"],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (0, 3, 1, 5)], ids=["even", "padded"])
def test_loss_and_gradients_are_those_of_whole_rows(name, fields, counts, monkeypatch, tmp_path):
    model = adapt(base(name).double(), **fields).double()
    rows = batch(counts)
    loss, gradients, runs, logged = loss_and_gradients(model, rows, tmp_path)
    assert runs == [(1, SHARED), (4, 20 - SHARED)]
    monkeypatch.setattr(beginning, "WORTH_SHARING", 1000)
    plain, expected, runs, whole = loss_and_gradients(model, rows, tmp_path)
    assert runs == [(4, 20)]
    # norms and the divergence compute in float32, whatever goes in, and processors add up in different orders
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    assert logged == pytest.approx(whole, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.parametrize(
    "rows",
    [
        batch(shared=7),
        batch(target=6),
        {key: value[:1] for key, value in batch().items()},
        batch(side="left", target=0),
        {**batch(), "position_ids": torch.arange(20).expand(4, 20)},
    ],
    ids=["too short", "holds a target", "one row", "padded on the left", "positions of its own"],
)
def test_whole_rows_run_where_nothing_can_be_shared(rows, tmp_path):
    loss, _, runs, _ = loss_and_gradients(adapt(base()), rows, tmp_path)
    assert runs == [tuple(rows["input_ids"].shape)]
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2"])
def test_bases_whose_caches_cannot_be_carried_in_a_graph_run_whole(name, tmp_path):
    assert loss_and_gradients(adapt(base(name)), batch(), tmp_path)[2] == [(4, 20)]


def test_checkpointed_layers_run_whole(tmp_path):
    model = adapt(base())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert loss_and_gradients(model, batch(), tmp_path)[2][0] == (4, 20)


def test_a_step_of_the_trainer_shares_and_the_evaluation_does_not(tmp_path):
    model = adapt(base())
    rows = batch()
    data = [{key: value[n] for key, value in rows.items()} for n in range(4)]
    seen = []
    adapted_base(model).model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(args[0].shape[:2])), with_kwargs=True
    )
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = ShadowTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert seen == [(1, SHARED), (4, 8)]
    trainer.evaluate()
    assert seen[2:] == [(4, 20)]

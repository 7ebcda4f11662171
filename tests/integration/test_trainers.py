"""lambda takes effect whoever computes the main loss: the gradients of one optimiser step equal the naive loop's.

Every test runs a trainer for one step over the whole data set, so the order of rows does not matter, and compares the
gradients it hands to the optimiser.
"""

import copy
import pickle

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from naive import NaiveShadow, assert_same_gradients
from products import covering
from shadowpeft import ShadowLossMixin, ShadowTrainer
from shadowpeft.errors import ConfigError, NonFiniteLossError, UnsupervisedShadowError
from tiny import adapt, adapter_config, base, padded, skip_reentrant, tokenizer, tokens

LAMBDA = 0.7


class KeepGradients(TrainerCallback):
    """Copies the gradients just before the optimiser uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
        }


def rows(shadow_labels=False, uneven=True):
    """Four rows with very different numbers of targets."""
    ids, mask = padded(tokens(4, 10), [0, 4, 1, 0])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    if uneven:
        labels[0, :7] = -100
        labels[2, :4] = -100
    made = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(4)]
    if shadow_labels:
        for i, row in enumerate(made):
            row["shadow_labels"] = labels[i].roll(1).masked_fill(mask[i] == 0, -100)
            row["shadow_labels"][:4] = -100
    return made


def whole(data):
    return {k: torch.stack([row[k] for row in data]) for k in data[0]}


def arguments(folder, cls=TrainingArguments, **more):
    made = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "remove_unused_columns": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**made, **more})


def in_pieces(micro):
    """The four rows of a step, so many at a time."""
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}


def train(cls, model, data, folder, trainer_options=None, args_cls=TrainingArguments, **more):
    keep = KeepGradients()
    trainer = cls(
        model=model,
        args=arguments(folder, args_cls, **more),
        train_dataset=data,
        callbacks=[keep],
        **(trainer_options or {}),
    )
    trainer.train()
    return keep.gradients, trainer


def check(model, start, gradients, smoothing=0.0, **batch):
    """``gradients`` are the naive loop's at the weights ``start`` (an adapted model before the step)."""
    naive = NaiveShadow(model, start)
    naive(batch.pop("input_ids"), batch.pop("labels"), smoothing=smoothing, **batch).loss.backward()
    for name, parameter in start.named_parameters():
        parameter.grad = gradients.get(name)
    assert_same_gradients(start, naive)
    return naive


def pair(name="llama", weight=LAMBDA, **fields):
    model = base(name)
    made = [adapt(model, auxiliary_loss_weight=weight, **fields) for _ in range(2)]
    return model, *made


# ------------------------------------------------------------------------------------------------------ stock Trainer


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["no clipping", "clipping"])
def test_a_gradient_that_is_not_finite_never_reaches_a_weight(tmp_path, clip):
    _, model, undisturbed = pair()
    options = {"max_grad_norm": clip, "lr_scheduler_type": "constant"}
    spoilt = next(p for n, p in model.named_parameters() if "shadowpeft_" in n and p.requires_grad)
    seen = []
    spoilt.register_hook(lambda gradient: (seen.append(1), gradient * float("nan") if len(seen) == 2 else gradient)[1])
    with pytest.raises(NonFiniteLossError, match="norm became nan in step 2; the run was stopped and no checkpoint"):
        train(ShadowTrainer, model, rows(), tmp_path, max_steps=3, **options)
    assert len(seen) == 2
    train(ShadowTrainer, undisturbed, rows(), tmp_path, max_steps=1, **options)
    for (name, weight), other in zip(model.named_parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("cls", [Trainer, ShadowTrainer])
@pytest.mark.parametrize("weight", [LAMBDA, 100.0])
@pytest.mark.parametrize("kind", [{}, {"shadow_model": "small_llama"}], ids=["mirror", "explicit"])
def test_one_step(tmp_path, cls, kind, weight):
    model, start, adapted = pair(weight=weight, **kind)
    gradients, _ = train(cls, adapted, rows(), tmp_path)
    check(model, start, gradients, **whole(rows()))


@pytest.mark.parametrize(
    ("cls", "checkpointing", "kind"),
    covering([Trainer, ShadowTrainer], [None, True, False], [{}, {"shadow_model": "small_llama"}]),
)
def test_micro_batches_are_the_whole_batch(tmp_path, cls, checkpointing, kind):
    skip_reentrant(checkpointing)
    model, start, adapted = pair(**kind)
    more = {}
    if checkpointing is not None:
        more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    gradients, _ = train(
        cls, adapted, rows(), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **more
    )
    check(model, start, gradients, **whole(rows()))


def test_classification_micro_batches(tmp_path):
    model = base("llama", task="SEQ_CLS")
    start, adapted = (adapt(model, task_type="SEQ_CLS", auxiliary_loss_weight=LAMBDA) for _ in range(2))
    data = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows())]
    gradients, _ = train(Trainer, adapted, data, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    check(model, start, gradients, **whole(data))


@pytest.mark.parametrize(
    ("problem", "micro", "cls"),
    covering(
        ["multi_label_classification", "regression"],
        [1, 4],
        [Trainer, ShadowTrainer],
        strength=1,
    ),
)
def test_rows_with_several_labels_or_targets(tmp_path, problem, micro, cls):
    """Trainer counts what labels hold, and the loss is the mean over as many."""
    model = base("llama", task="SEQ_CLS")
    model.config.problem_type = problem
    start, adapted = (adapt(model, task_type="SEQ_CLS", auxiliary_loss_weight=LAMBDA) for _ in range(2))
    goals = torch.randn(4, model.config.num_labels, generator=torch.Generator().manual_seed(1))
    goals = goals if problem == "regression" else (goals > 0).float()
    data = [{**row, "labels": goal} for row, goal in zip(rows(), goals, strict=True)]
    gradients, trainer = train(cls, adapted, data, tmp_path, **in_pieces(micro))
    given = whole([{name: row[name] for name in row if name != "labels"} for row in data])
    found = start(**given, return_shadow=True)
    of_rows = torch.nn.functional.mse_loss if problem == "regression" else torch.nn.functional.binary_cross_entropy_with_logits
    loss = of_rows(found.logits, goals) + LAMBDA * of_rows(found.shadow_logits, goals)
    loss.backward()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro", [1, 4])
def test_classes_that_the_shadow_alone_learns(tmp_path, micro):
    model = base("llama", task="SEQ_CLS")
    start, adapted = (adapt(model, task_type="SEQ_CLS", auxiliary_loss_weight=LAMBDA) for _ in range(2))
    data = [{**row, "labels": torch.tensor(i % 3), "shadow_labels": torch.tensor(i % 3)} for i, row in enumerate(rows())]
    for row in data[:2]:
        row["labels"] = torch.tensor(-100)
    lengths = []
    adapted.base_model.model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(len(args[0])))
    gradients, _ = train(ShadowTrainer, adapted, data, tmp_path, **in_pieces(micro))
    assert sum(lengths) == 2  # rows that ran the base
    check(model, start, gradients, **whole(data))


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_two_targets_through_the_trainer(tmp_path, micro):
    model, start, adapted = pair()
    data = rows(shadow_labels=True)
    gradients, _ = train(ShadowTrainer, adapted, data, tmp_path, **in_pieces(micro))
    check(model, start, gradients, **whole(data))


def test_stock_trainer_drops_shadow_labels(tmp_path):
    """docs/running.md says so: if this fails, the page has to change."""
    model, start, adapted = pair()
    data = rows(shadow_labels=True)
    gradients, _ = train(Trainer, adapted, data, tmp_path)
    check(model, start, gradients, **{k: v for k, v in whole(data).items() if k != "shadow_labels"})
    with pytest.raises(ConfigError, match="ShadowTrainer does"):
        train(Trainer, adapted, data, tmp_path, remove_unused_columns=False)


@pytest.mark.parametrize("micro", [1, 4])
def test_rows_that_one_path_alone_learns(tmp_path, micro):
    model, start, adapted = pair()
    data = rows(shadow_labels=True)
    data[0]["labels"] = torch.full_like(data[0]["labels"], -100)
    data[3]["shadow_labels"] = torch.full_like(data[3]["shadow_labels"], -100)
    gradients, _ = train(ShadowTrainer, adapted, data, tmp_path, **in_pieces(micro))
    check(model, start, gradients, **whole(data))


@pytest.mark.parametrize("micro", [1, 4])
def test_label_smoothing_shapes_the_task_loss_alone(tmp_path, micro):
    model, start, adapted = pair()
    gradients, _ = train(
        ShadowTrainer,
        adapted,
        rows(),
        tmp_path,
        label_smoothing_factor=0.2,
        **in_pieces(micro),
    )
    naive = check(model, start, gradients, smoothing=0.2, **whole(rows()))
    assert naive.config.auxiliary_loss_weight == LAMBDA


def mean_cross_entropy(outputs, labels, num_items_in_batch=None):
    logits = outputs["logits"][:, :-1]
    goals = labels[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), goals.flatten(), reduction="sum")
    return total / ((goals != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("micro", [1, 4])
def test_compute_loss_func(tmp_path, micro):
    model, start, adapted = pair()
    gradients, _ = train(
        ShadowTrainer,
        adapted,
        rows(),
        tmp_path,
        {"compute_loss_func": mean_cross_entropy},
        **in_pieces(micro),
    )
    check(model, start, gradients, **whole(rows()))


def test_lambda_changes_the_backbones_update(tmp_path):
    found = {}
    for weight in (0.05, 100.0):
        _, _, adapted = pair(weight=weight)
        gradients, _ = train(Trainer, adapted, rows(), tmp_path)
        found[weight] = torch.cat([g.flatten() for n, g in gradients.items() if "shadowpeft_backbone" in n])
    assert float(found[100.0].norm()) > 10 * float(found[0.05].norm())


def test_evaluation_reports_the_task_loss_and_predictions_stay_a_tensor(tmp_path):
    _, _, adapted = pair()
    trainer = Trainer(
        model=adapted,
        args=arguments(tmp_path, per_device_eval_batch_size=4, eval_strategy="no"),
        eval_dataset=rows(),
        compute_metrics=lambda p: {"rank": p.predictions.ndim},
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        out = adapted.eval()(**whole(rows()))
    assert metrics["eval_rank"] == 3
    assert metrics["eval_loss"] == pytest.approx(float(out.task_loss), rel=1e-5)
    assert float(out.shadow_loss) > 0


@pytest.mark.parametrize("again", [lambda out: out, copy.copy, lambda out: pickle.loads(pickle.dumps(out))])
def test_both_losses_outlive_mixed_precision_and_predictions_stay_a_tensor(tmp_path, again):
    """accelerate replaces a 16-bit output by a copy of its fields in float32."""
    _, _, adapted = pair()
    trainer = Trainer(
        model=adapted,
        args=arguments(tmp_path, per_device_eval_batch_size=4, eval_strategy="no", bf16=True),
        eval_dataset=rows(),
        compute_metrics=lambda p: {"rank": p.predictions.ndim},
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = adapted(**whole(rows()), return_shadow=True, use_cache=False)
    assert plain.logits.dtype == torch.bfloat16
    assert trainer.evaluate()["eval_rank"] == 3
    with torch.no_grad():
        out = again(adapted(**whole(rows()), return_shadow=True, use_cache=False))
    assert out.logits.dtype == torch.float32
    for name in ("loss", "task_loss", "shadow_loss", "shadow_logits", "shadow_state"):
        assert torch.equal(getattr(out, name), getattr(plain, name)), name
    assert list(out) == list(plain) == [name for name, _ in out.items()] == ["loss", "logits"]
    assert len(out) == len(out.to_tuple()) == 2
    assert out[1] is out["logits"] is out.logits
    adapted.train()
    trained = adapted(**whole(rows()))
    trained.loss.backward()
    assert trained.shadow_loss.requires_grad
    with torch.no_grad(), adapted.disable_adapter():
        out = adapted(**whole(rows()))
    assert torch.equal(out.task_loss, out.loss)
    assert out.shadow_loss is None


# ----------------------------------------------------------------------------------------------------------- refusals


def test_stock_trainer_with_label_smoothing_is_refused(tmp_path):
    _, _, adapted = pair()
    with pytest.raises(UnsupervisedShadowError, match="ShadowTrainer"):
        train(Trainer, adapted, rows(), tmp_path, label_smoothing_factor=0.1)


def test_stock_trainer_with_compute_loss_func_is_refused(tmp_path):
    _, _, adapted = pair()
    with pytest.raises(UnsupervisedShadowError):
        train(Trainer, adapted, rows(), tmp_path, {"compute_loss_func": mean_cross_entropy})


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_loss_from_logits_alone_is_refused(task):
    adapted = adapt(base("llama", task=task), task_type=task).train()
    loss = adapted(input_ids=tokens()).logits.square().mean()
    with pytest.raises(UnsupervisedShadowError, match="labels"):
        loss.backward()


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_loss_of_ones_own_beside_labels_is_refused(task):
    """Many weight their classes so: the labels reach the model, but its loss is not taken."""
    adapted = adapt(base("llama", task=task), task_type=task).train()
    labels = tokens() if task == "CAUSAL_LM" else torch.tensor([0, 1, 2])[: len(tokens())]
    out = adapted(input_ids=tokens(), labels=labels)
    with pytest.raises(UnsupervisedShadowError, match="compute_loss_func"):
        out.logits.div_(2).square().mean().backward()
    adapted.zero_grad()
    out = adapted(input_ids=tokens(), labels=labels)
    (out.loss + out.logits.square().mean()).backward()  # what is added to the joint loss is nobody's business
    out = adapted(input_ids=tokens(), labels=labels)
    out.task_loss.backward(retain_graph=True)  # whoever names a path means it
    out.shadow_loss.mul_(0.5).backward()


def test_a_trainer_whose_own_loss_forgets_the_shadow_is_refused(tmp_path):
    class Weighted(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs)
            loss = mean_cross_entropy(out, inputs["labels"])
            return (loss, out) if return_outputs else loss

    class Mixed(ShadowLossMixin, Weighted):
        pass

    for kind in (Weighted, Mixed):
        _, _, adapted = pair()
        with pytest.raises(UnsupervisedShadowError, match="compute_loss_func"):
            train(kind, adapted, rows(), tmp_path / kind.__name__)


def test_a_loss_that_leaves_the_shadows_out_is_refused():
    adapted = adapt(base("llama")).train()
    out = adapted(input_ids=tokens(), shadow_labels=tokens())
    with pytest.raises(UnsupervisedShadowError, match="shadow_loss"):
        out.logits.square().mean().backward()
    adapted.zero_grad()
    out = adapted(input_ids=tokens(), shadow_labels=tokens())
    (out.logits.square().mean() + 0.1 * out.shadow_loss).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_the_mixin_alone_is_refused():
    class Lonely(ShadowLossMixin):
        pass

    with pytest.raises(ConfigError, match=r"declare it as class Lonely\(ShadowLossMixin, Trainer\)"):
        Lonely()


def test_lambda_zero_needs_no_supervision(tmp_path):
    model, start, adapted = pair(weight=0.0)
    gradients, _ = train(Trainer, adapted, rows(), tmp_path, label_smoothing_factor=0.2)
    check(model, start, gradients, smoothing=0.2, **whole(rows()))
    adapted.train()(input_ids=tokens()).logits.square().mean().backward()


def test_both_losses_by_hand_are_allowed():
    adapted = adapt(base("llama")).train()
    out = adapted(input_ids=tokens(), return_shadow=True)
    (out.logits.square().mean() + out.shadow_logits.square().mean()).backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------------- TRL


def sft(cls, model, folder, trainer_options=None, **more):
    from datasets import Dataset
    SFTConfig = pytest.importorskip("trl").SFTConfig

    data = Dataset.from_list([{k: v.tolist() for k, v in row.items() if k == "input_ids"} for row in plain_rows()])
    options = {"processing_class": tokenizer(), **(trainer_options or {})}
    return train(cls, model, data, folder, options, SFTConfig, max_length=None, **{"bf16": False, **more})


def plain_rows():
    """Rows without padding, of two lengths: TRL's own collator pads and masks."""
    ids = tokens(4, 10)
    return [{"input_ids": ids[i][: 10 if i % 2 else 5]} for i in range(4)]


def plain_whole():
    data = plain_rows()
    ids = torch.zeros(4, 10, dtype=torch.long)
    mask = torch.zeros(4, 10, dtype=torch.long)
    for i, row in enumerate(data):
        ids[i, : len(row["input_ids"])] = row["input_ids"]
        mask[i, : len(row["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize(
    ("base_and_weight", "micro", "mixin"),
    covering([("llama", LAMBDA), ("llama", 100.0), ("gemma3", LAMBDA)], [1, 4], [False, True]),
)
def test_sft_trainer(tmp_path, base_and_weight, micro, mixin):
    name, weight = base_and_weight
    SFTTrainer = pytest.importorskip("trl").SFTTrainer

    cls = type("Mixed", (ShadowLossMixin, SFTTrainer), {}) if mixin else SFTTrainer
    model, start, adapted = pair(name, weight)
    gradients, _ = sft(
        cls, adapted, tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=4 // micro
    )
    check(model, start, gradients, **plain_whole())


def test_sft_trainer_with_peft_config_feels_lambda(tmp_path):
    SFTTrainer = pytest.importorskip("trl").SFTTrainer

    found = {}
    for weight in (0.05, 100.0):
        torch.manual_seed(3)
        options = {"peft_config": adapter_config(auxiliary_loss_weight=weight)}
        gradients, trainer = sft(SFTTrainer, base("llama"), tmp_path, options)
        found[weight] = gradients
        assert trainer.model.peft_config["default"].auxiliary_loss_weight == weight
    backbone = [n for n in found[0.05] if "shadowpeft_backbone" in n]
    assert backbone
    # W_up is zero, so the backbone's only gradient is lambda times the shadow's: exactly proportional
    for name in backbone:
        torch.testing.assert_close(found[100.0][name], 2000.0 * found[0.05][name], rtol=1e-3, atol=1e-5)
    assert sum(float(found[0.05][n].norm()) for n in backbone) > 0


def test_sft_trainer_with_weighted_tokens_is_refused(tmp_path):
    SFTTrainer = pytest.importorskip("trl").SFTTrainer

    _, _, adapted = pair()
    with pytest.raises(UnsupervisedShadowError, match="weights the tokens"):
        sft(SFTTrainer, adapted, tmp_path, loss_type="dft")


def test_sft_trainer_with_label_smoothing_is_refused(tmp_path):
    # it takes a second forward for its metrics and hands out neither the first one's outputs nor its graph
    SFTTrainer = pytest.importorskip("trl").SFTTrainer

    _, _, adapted = pair()
    with pytest.raises(UnsupervisedShadowError):
        sft(SFTTrainer, adapted, tmp_path, label_smoothing_factor=0.1)


# the user asks for what TRL will drop; TRL blames its caller, which is the mixin
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("micro", [1, 4])
def test_sft_trainer_with_label_smoothing_and_the_mixin(tmp_path, micro):
    SFTTrainer = pytest.importorskip("trl").SFTTrainer

    cls = type("Mixed", (ShadowLossMixin, SFTTrainer), {})
    model, start, adapted = pair()
    gradients, _ = sft(
        cls,
        adapted,
        tmp_path,
        label_smoothing_factor=0.1,
        **in_pieces(micro),
    )
    check(model, start, gradients, smoothing=0.1, **plain_whole())


def test_sft_trainer_under_autocast(tmp_path):
    SFTTrainer = pytest.importorskip("trl").SFTTrainer

    model, start, adapted = pair()
    gradients, _ = sft(SFTTrainer, adapted, tmp_path, bf16=True)
    naive = NaiveShadow(model, start)
    naive(**plain_whole()).loss.backward()
    expected = torch.cat([g.flatten() for g in naive.grads().values()])
    found = torch.cat([gradients[n].flatten() for n in naive.grads()])
    assert all(g.dtype == torch.float32 for g in gradients.values())
    # bfloat16 has 8 bits; over four layers the direction of the whole gradient stays
    assert float(torch.nn.functional.cosine_similarity(found, expected, dim=0)) > 0.99
    assert 0.9 < float(found.norm() / expected.norm()) < 1.1

"""The shadow learns from the attached path: divergences against float64 sums, and the joint loss against the naive loop."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from naive import NaiveShadow, assert_same_gradients
from products import covering
from shadowpeft import ShadowPeftConfig
from shadowpeft.core import distillation_kl, teacher_loss, topk_kl
from shadowpeft.core.losses import acceptance_loss
from shadowpeft.errors import ConfigError
from shadowpeft.train.config import parse_run
from shadowpeft.train.trainer import ShadowTrainer
from tiny import adapt, base, padded, tokens

IGNORE = -100


def naive_kl(teacher, logits, temperature=1.0):
    """sum_i p_i (log p_i - log q_i) by row, one token at a time, in float64."""
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, logits))
    return temperature**2 * sum(p[:, i] * (p[:, i].log() - q[:, i].log()) for i in range(p.shape[-1]))


# ------------------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_of_all_tokens(temperature):
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 17, requires_grad=True), torch.randn(5, 17, requires_grad=True)
    found = distillation_kl(student, teacher, temperature=temperature)
    torch.testing.assert_close(found.double(), naive_kl(teacher, student, temperature), rtol=1e-5, atol=1e-6)
    found.sum().backward()
    assert teacher.grad is None
    # d KL / d logits = t (q - p)
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-4, atol=1e-6)
    assert float(distillation_kl(teacher, teacher).detach().abs().max()) < 1e-6


def naive_lk(teacher, logits):
    """-log sum_i min(p_i, q_i) by row, one token at a time, in float64."""
    p, q = (x.double().softmax(-1) for x in (teacher, logits))
    return -sum(torch.minimum(p[:, i], q[:, i]) for i in range(p.shape[-1])).log()


def test_acceptance_of_drafts():
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(5, 17, requires_grad=True), torch.randn(5, 17, requires_grad=True)
    found = acceptance_loss(student, teacher)
    expected = naive_lk(teacher.detach(), student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0].float(), rtol=1e-4, atol=1e-6)
    # what it stands for: the share of drawn tokens that the rule of speculative sampling keeps
    p, q = teacher[0].softmax(-1), student[0].softmax(-1)
    drawn = torch.multinomial(q, 40_000, replacement=True)
    kept = torch.rand(40_000) < (p / q)[drawn]
    assert float(kept.float().mean()) == pytest.approx(float((-found[0]).detach().exp()), abs=0.01)  # four standard errors
    assert float(acceptance_loss(teacher, teacher).detach().abs().max()) < 1e-6


def test_acceptance_of_almost_no_draft_has_a_gradient():
    """Two distributions without a token in common in float32: their overlap is 0 there, its logarithm is not."""
    teacher, student = torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]], requires_grad=True)
    found = acceptance_loss(student, teacher)
    assert found.item() == pytest.approx(200.0 - math.log(2.0), abs=1e-3)
    found.sum().backward()
    assert float(student.grad[0, 0]) < -0.4
    assert float(student.grad[0, 1]) > 0.4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 16, 17])
def test_divergence_of_the_known_tokens_and_the_rest_as_one(k, temperature):
    torch.manual_seed(0)
    teacher, student = 3 * torch.randn(5, 17), torch.randn(5, 17, requires_grad=True)
    log_probs, ids = (teacher / temperature).log_softmax(-1).topk(k)
    found = topk_kl(student, ids, log_probs, temperature=temperature)
    p, q = ((x.detach().double() / temperature).softmax(-1) for x in (teacher, student))
    for row in range(5):
        known = ids[row].tolist()
        others = [i for i in range(17) if i not in known]
        total = sum(p[row, i] * (p[row, i] / q[row, i]).log() for i in known)
        if others:
            total = total + p[row, others].sum() * (p[row, others].sum() / q[row, others].sum()).log()
        torch.testing.assert_close(found[row].double(), temperature**2 * total, rtol=1e-4, atol=1e-5)
    whole = distillation_kl(student, teacher, temperature=temperature)
    assert bool((found <= whole + 1e-5).all())  # the log-sum inequality
    if k >= 16:  # one event is left, or none
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert bool(torch.isfinite(student.grad).all())


def test_rounded_log_probs_that_add_up_to_more_than_one():
    student = torch.randn(2, 9, requires_grad=True)
    ids = torch.tensor([[0, 1], [3, 2]])
    log_probs = torch.tensor([[0.6, 0.4001], [1.0, 1e-30]]).log()
    found = topk_kl(student, ids, log_probs)
    found.sum().backward()
    assert bool(torch.isfinite(found).all() and torch.isfinite(student.grad).all())


@pytest.mark.parametrize("frozen", [True, False])
def test_teacher_loss_by_chunks_equals_all_logits_at_once(frozen):
    torch.manual_seed(0)
    head = nn.Linear(8, 17, bias=False).requires_grad_(not frozen)
    rows = torch.randn(13, 8, requires_grad=True)
    log_probs, ids = torch.randn(13, 17).log_softmax(-1).topk(5)
    sizes = []

    def logits(part):
        sizes.append(len(part))
        return head(part)

    found = teacher_loss(rows, ids, log_probs, logits, frozen=frozen, chunk=4)
    assert sizes == ([4, 4, 4, 1] if frozen else [13])
    (gradient,) = torch.autograd.grad(found, rows)
    expected = topk_kl(head(rows), ids, log_probs).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, rows)[0])
    nothing = teacher_loss(rows[:0], ids[:0], log_probs[:0], head, frozen=frozen)
    assert (float(nothing), nothing.requires_grad) == (0.0, True)


# ---------------------------------------------------------------------------------------------------------- fine-tuning


def naive_joint(naive, kind, ids, labels, mask=None, shadow_labels=None, items=None, shadow_items=None):
    """The joint loss from the naive loop's logits, position by position."""
    out = naive(ids, labels, mask, shadow_labels=shadow_labels, items=items, shadow_items=shadow_items)
    own = labels if shadow_labels is None else shadow_labels
    total, count = 0.0 * out.shadow_logits.sum(), 0
    for b in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            goal = int(own[b, t + 1])
            if goal == IGNORE:
                continue
            count += 1
            taught = goal == int(labels[b, t + 1])
            student = out.shadow_logits[b, t]
            teaches = {"kl": naive_kl, "both": naive_kl, "lk": naive_lk}.get(kind) if taught else None
            if kind in ("ce", "both") or teaches is None:
                total = total - student.log_softmax(-1)[goal]
            if teaches is not None:
                total = total + teaches(out.logits[b, t].detach()[None], student[None])[0]
    shadow = total / (shadow_items or items or max(count, 1))
    return shadow, out.task_loss + naive.config.auxiliary_loss_weight * shadow


@pytest.mark.parametrize(("kind", "name"), covering(["ce", "kl", "both", "lk"], ["llama", "gemma3", "gpt2"]))
def test_joint_loss_and_gradients_are_the_naive_loops(name, kind):
    model = base(name)
    adapted = adapt(model, shadow_loss=kind, auxiliary_loss_weight=0.6).train()
    naive = NaiveShadow(model, adapted)
    ids, mask = padded(tokens(), [0, 3, 0])
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[2, :6] = IGNORE
    own = labels.clone()
    own[0, 3:6] = torch.tensor([7, 8, 9])  # the shadow is to say something else
    own[1] = IGNORE
    own[2, 5] = 11  # and more
    for shadow_labels, items, shadow_items in ((None, None, None), (own, None, None), (own, 40, 30)):
        adapted.zero_grad()
        naive.base.zero_grad()
        for leaf in naive.leaves.values():
            leaf.grad = None
        given = {} if shadow_labels is None else {"shadow_labels": shadow_labels}
        if items:
            given.update(num_items_in_batch=torch.tensor(items), shadow_num_items_in_batch=torch.tensor(shadow_items))
        out = adapted(input_ids=ids, attention_mask=mask, labels=labels, **given)
        shadow, joint = naive_joint(naive, kind, ids, labels, mask, shadow_labels, items, shadow_items)
        torch.testing.assert_close(out.shadow_loss.double(), shadow.double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.loss.double(), joint.double(), rtol=1e-4, atol=1e-5)
        out.loss.backward()
        joint.backward()
        assert_same_gradients(adapted, naive)


def test_evaluation_reports_the_cross_entropy_whatever_it_was_trained_with():
    model, ids = base(), tokens()
    losses = [adapt(model, shadow_loss=kind)(input_ids=ids, labels=ids).shadow_loss for kind in ("ce", "kl", "both", "lk")]
    assert len({float(loss) for loss in losses}) == 1


def test_nothing_to_learn_is_a_connected_zero():
    adapted = adapt(base(), shadow_loss="both").train()
    ids = tokens()
    out = adapted(input_ids=ids, labels=torch.full_like(ids, IGNORE))
    out.loss.backward()
    assert float(out.shadow_loss) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in adapted.parameters() if p.requires_grad)


def test_the_gradient_does_not_reach_the_teacher():
    """With labels masked but for the shadow's divergence, nothing of the injections learns from it at lambda alone."""
    adapted = adapt(base(), shadow_loss="kl").train()
    ids = tokens()
    out = adapted(input_ids=ids, labels=ids)
    names = [n for n, p in adapted.named_parameters() if p.requires_grad and "shadowpeft_injection" in n]
    gradients = torch.autograd.grad(
        out.shadow_loss, [p for n, p in adapted.named_parameters() if n in names], allow_unused=True
    )
    assert names
    assert all(gradient is None for gradient in gradients)


@pytest.mark.parametrize("kind", ["kl", "lk"])
def test_learning_from_the_attached_path_brings_the_paths_together(kind):
    adapted = adapt(base(), trained=False, shadow_loss=kind, auxiliary_loss_weight=1.0).train()
    ids = tokens(4, 12)
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        out = adapted(input_ids=ids, labels=ids)
        out.loss.backward()
        optimiser.step()
        losses.append(float(out.shadow_loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow  # torch.compile
def test_one_graph_with_divergence():
    adapted = adapt(base(), shadow_loss="both").train().get_base_model()
    ids = tokens()
    expected = adapted(input_ids=ids, labels=ids).loss
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids).loss, expected)


def test_the_trainer_counts_targets_over_the_accumulated_batch(tmp_path):
    rows = [{"input_ids": r, "labels": r.clone(), "shadow_labels": r.clone()} for r in tokens(4, 10)]
    rows[0]["shadow_labels"][:7] = IGNORE
    rows[1]["labels"][:] = IGNORE  # only the shadow learns it: no teacher
    moved = []
    for batch, accumulation in ((4, 1), (1, 4)):
        adapted = adapt(base(), shadow_loss="kl", auxiliary_loss_weight=0.8)
        before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(batch)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        ShadowTrainer(model=adapted, args=arguments, train_dataset=rows).train()
        moved.append({n: p.detach() - before[n] for n, p in adapted.named_parameters() if p.requires_grad})
    assert max(float(v.abs().max()) for v in moved[0].values()) > 1e-3
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-3, atol=1e-6)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="shadow_loss is 'mse' but must be 'ce', 'kl', 'both' or 'lk'"):
        ShadowPeftConfig(task_type="CAUSAL_LM", shadow_loss="mse")
    with pytest.raises(ConfigError, match="classifier's shadow"):
        ShadowPeftConfig(task_type="SEQ_CLS", shadow_loss="kl")
    adapted, ids = adapt(base(), shadow_loss="kl").train(), tokens()
    with pytest.raises(ConfigError, match="pass labels too"):
        adapted(input_ids=ids, shadow_labels=ids)
    with pytest.raises(ConfigError, match="leave out logits_to_keep"):
        adapted(input_ids=ids, shadow_labels=ids, labels=ids[:, -2:], logits_to_keep=2)


def test_a_run_file_says_it_too():
    run = {"base": "b", "data": {"train": "t"}, "shadow": {"shadow_loss": "kl", "shadow_init": "base_layers_spread"}}
    assert parse_run(run, "x").shadow.shadow_loss == "kl"
    for part, message in (
        ({"training": {"label_smoothing": 0.1}}, "training.label_smoothing is set; set one of them"),
        ({"shadow": {"shadow_init": "base_layers_spread", "shadow_model": "m"}}, "base_layers_spread fills a mirrored"),
        ({"shadow": {"shadow_init": "base_layers_spread", "shadow_head_dim": 8}}, "shadow.shadow_head_dim is set"),
        ({"shadow": {"shadow_loss": "mse"}}, "'ce', 'kl', 'both' or 'lk'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_run({**run, **part}, "x")


def test_the_setting_is_saved_and_old_files_are_cross_entropy(tmp_path):
    adapted = adapt(base(), shadow_loss="both")
    adapted.save_pretrained(tmp_path)
    found = ShadowPeftConfig.from_pretrained(tmp_path)
    assert found.shadow_loss == "both"
    record = copy.deepcopy(found.to_dict())
    del record["shadow_loss"]
    assert ShadowPeftConfig(**record).shadow_loss == "ce"

"""Properties 1, 2 and 4: the base's own logits at the start, the naive loop's numbers afterwards, gradients everywhere."""

import copy

import pytest
import torch

from naive import NaiveShadow, assert_same_gradients
from products import covering
from tiny import ARCHITECTURES, KINDS, adapt, base, padded, randomise, tokens

# float32, four layers of width 32: the fused and the naive order of summation differ by a few units of 1e-6 per layer
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
WIDER = (*ARCHITECTURES, "mixtral", "qwen3_next")


def batch(side="right"):
    ids, mask = padded(tokens(), [0, 3, 1], side)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return ids, mask, labels


def compare(model, adapted, ids, mask, labels, **extra):
    naive = NaiveShadow(model, adapted)
    found = adapted(input_ids=ids, attention_mask=mask, labels=labels, return_shadow=True, **extra)
    expected = naive(ids, labels, mask, **extra)
    rows = (mask if mask is not None else torch.ones_like(ids)).bool()
    pick = (lambda x: x[rows]) if found.logits.dim() == 3 else (lambda x: x)
    torch.testing.assert_close(pick(found.logits), pick(expected.logits), **CLOSE)
    torch.testing.assert_close(pick(found.shadow_logits), pick(expected.shadow_logits), **CLOSE)
    torch.testing.assert_close(found.task_loss, expected.task_loss, **CLOSE)
    torch.testing.assert_close(found.shadow_loss, expected.shadow_loss, **CLOSE)
    return naive, found, expected


# --------------------------------------------------------------------------------------- property 1: the base's logits


@pytest.mark.parametrize(("name", "kind"), covering(WIDER, KINDS))
def test_untrained_and_disabled_adapters_change_no_bit(name, kind):
    model = base(name)
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        adapted = adapt(model, trained=False, **KINDS[kind])
        assert torch.equal(adapted(input_ids=ids, attention_mask=mask).logits, expected)
        randomise(adapted)
        assert not torch.equal(adapted(input_ids=ids, attention_mask=mask).logits, expected)
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids, attention_mask=mask).logits, expected)
        assert torch.equal(adapted.unload()(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_untrained_classifier_changes_no_bit(name):
    model = base(name, task="SEQ_CLS")
    ids, mask, _ = batch()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        adapted = adapt(model, trained=False, task_type="SEQ_CLS")
        assert torch.equal(adapted(input_ids=ids, attention_mask=mask).logits, expected)


# ------------------------------------------------------------------------------------- property 2: equals the formulas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WIDER)
def test_logits_losses_and_gradients_equal_the_naive_loop(name, kind):
    model = base(name)
    adapted = adapt(model, **KINDS[kind], auxiliary_loss_weight=0.3)
    ids, mask, labels = batch()
    compare(model, adapted, ids, mask, labels)
    adapted.train()
    naive, found, expected = compare(model, adapted, ids, mask, labels)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    assert_same_gradients(adapted, naive)
    assert all(p.grad is None for n, p in adapted.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_update": False},
        {"variant": "peft"},
        {"variant": "authors"},
        {"variant": "scaled"},
        {"variant": "scaled", "use_update": False, "refined_layers": [2, 3]},
        {"update_hidden_size": 3},
        {"share_embeddings": False},
        {"shadow_hidden_size": 16, "share_embeddings": False, "shadow_head_dim": 8},
        {"shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1, "shadow_head_dim": 16},
        {"variant": "peft", "use_update": False},
        {"refined_layers": [0, 2]},
        {"refined_layers": [2, 2]},
        {"variant": "peft", "refined_layers": [1, 3]},
        {"own_shadow_head": True},
    ],
    ids=str,
)
def test_every_option_equals_the_naive_loop(fields):
    model = base("qwen3")
    adapted = adapt(model, **fields, auxiliary_loss_weight=0.3)
    ids, mask, labels = batch()
    adapted.train()
    naive, found, expected = compare(model, adapted, ids, mask, labels)
    found.loss.backward()
    expected.loss.backward()
    assert_same_gradients(adapted, naive)


def test_float64_equality_is_tight():
    # GPT-2 is the one architecture here whose norms do not fall back to float32 inside
    model = base("gpt2").double()
    adapted = adapt(model).double()
    ids, _, _ = batch()
    expected, s0 = NaiveShadow(model, adapted).states(ids)
    found = adapted(input_ids=ids, return_shadow=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.shadow_state, s0, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layers", [2, 3])
def test_short_bases(layers):
    model = base("llama", num_hidden_layers=layers)
    adapted = adapt(model).train()
    assert any("shadowpeft_norm" in n for n, _ in adapted.named_parameters()) == (layers > 2)
    ids, mask, labels = batch()
    naive, found, expected = compare(model, adapted, ids, mask, labels)
    found.loss.backward()
    expected.loss.backward()
    assert_same_gradients(adapted, naive)


@pytest.mark.parametrize(("name", "kind", "side"), covering(["llama", "gpt2", "qwen3"], KINDS, ["right", "left"]))
def test_classification_equals_the_naive_loop(name, kind, side):
    model = base(name, task="SEQ_CLS")
    adapted = adapt(model, task_type="SEQ_CLS", auxiliary_loss_weight=0.3, **KINDS[kind])
    ids, mask, _ = batch(side)
    labels = torch.tensor([2, 0, 1])
    for train in (False, True):
        adapted.train(train)
        naive, found, expected = compare(model, adapted, ids, mask, labels)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
    found.loss.backward()
    expected.loss.backward()
    assert_same_gradients(adapted, naive)


def test_classification_head_starts_as_a_copy():
    adapted = adapt(base("llama", task="SEQ_CLS"), trained=False, task_type="SEQ_CLS")
    heads = {n: p for n, p in adapted.named_parameters() if "shadowpeft_head" in n or "score.modules_to_save" in n}
    assert len(heads) == 2
    assert all(p.requires_grad for p in heads.values())
    first, second = heads.values()
    assert torch.equal(first, second)


def test_classification_mask_that_disagrees_with_padding_is_refused():
    adapted = adapt(base("llama", task="SEQ_CLS"), task_type="SEQ_CLS")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="row 1"):
        adapted(input_ids=ids, attention_mask=mask)


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_loss_is_joint_in_training_and_the_task_alone_in_evaluation(task):
    adapted = adapt(base("llama", task=task), task_type=task, auxiliary_loss_weight=0.5)
    ids, mask, labels = batch()
    labels = torch.tensor([0, 1, 2]) if task == "SEQ_CLS" else labels
    out = adapted(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(out.loss, out.task_loss)
    assert float(out.shadow_loss) > 0
    out = adapted.train()(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, out.task_loss + 0.5 * out.shadow_loss)
    out = adapted(input_ids=ids, attention_mask=mask)
    assert out.loss is None


def test_disabled_adapter_gives_the_bases_loss():
    model = base("llama")
    adapted = adapt(model).train()
    ids, mask, labels = batch()
    with adapted.disable_adapter():
        out = adapted(input_ids=ids, attention_mask=mask, labels=labels)
    assert torch.equal(out.loss, model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    assert torch.equal(out.task_loss, out.loss)
    assert out.shadow_loss is None


@pytest.mark.parametrize("as_dict", [True, False])
def test_the_shadow_path_has_targets_of_its_own(as_dict):
    model = base("llama")
    adapted = adapt(model, auxiliary_loss_weight=0.5).train()
    ids, mask, labels = batch()
    other = labels.clone()
    other[0, 5:] = -100
    other[1, 4] = 17
    naive = NaiveShadow(model, adapted)
    expected = naive(ids, labels, mask, shadow_labels=other)
    out = adapted(input_ids=ids, attention_mask=mask, labels=labels, shadow_labels=other, return_dict=as_dict)
    loss = out.loss if as_dict else out[0]
    torch.testing.assert_close(loss, expected.loss, **CLOSE)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(adapted, naive)


def test_each_path_is_normalised_by_its_own_count_over_the_accumulated_batch():
    model = base("llama")
    adapted = adapt(model, auxiliary_loss_weight=0.5).train()
    ids, mask, labels = batch()
    other = labels.clone()
    other[0] = -100
    counts = [int((x[:, 1:] != -100).sum()) for x in (labels, other)]
    naive = NaiveShadow(model, adapted)
    whole = naive(ids, labels, mask, shadow_labels=other)
    whole.loss.backward()
    total = 0.0
    for row in range(3):
        cut = slice(row, row + 1)
        out = adapted(
            input_ids=ids[cut],
            attention_mask=mask[cut],
            labels=labels[cut],
            shadow_labels=other[cut],
            num_items_in_batch=counts[0],
            shadow_num_items_in_batch=torch.tensor(counts[1]),
        )
        out.loss.backward()
        total += float(out.loss.detach())
    assert total == pytest.approx(float(whole.loss.detach()), rel=1e-4)
    assert_same_gradients(adapted, naive)


def test_one_count_for_two_different_targets_is_refused():
    adapted = adapt(base("llama")).train()
    ids, mask, labels = batch()
    with pytest.raises(ValueError, match="shadow_num_items_in_batch"):
        adapted(input_ids=ids, attention_mask=mask, labels=labels, shadow_labels=labels, num_items_in_batch=9)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("masked", ["task", "shadow", "both"])
def test_a_path_without_targets_gives_a_connected_zero(task, masked):
    adapted = adapt(base("llama", task=task), task_type=task, auxiliary_loss_weight=0.5).train()
    ids, mask, labels = batch()
    labels = torch.tensor([0, 1, 2]) if task == "SEQ_CLS" else labels
    nothing = torch.full_like(labels, -100)
    out = adapted(
        input_ids=ids,
        attention_mask=mask,
        labels=labels if masked == "shadow" else nothing,
        shadow_labels=labels if masked == "task" else nothing,
    )
    assert float(out.task_loss.detach()) == 0.0 or masked == "shadow"
    assert float(out.shadow_loss.detach()) == 0.0 or masked == "task"
    out.loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients.values()), [
        n for n, g in gradients.items() if g is None
    ]
    if masked == "both":
        assert all(torch.count_nonzero(g) == 0 for g in gradients.values())


def test_a_fully_masked_row_does_not_count():
    model = base("llama")
    adapted = adapt(model).train()
    ids, mask, labels = batch()
    labels[1] = -100
    _, found, expected = compare(model, adapted, ids, mask, labels)
    keep = torch.tensor([0, 2])
    alone = adapted(input_ids=ids[keep], attention_mask=mask[keep], labels=labels[keep])
    torch.testing.assert_close(found.loss, alone.loss, **CLOSE)
    torch.testing.assert_close(found.loss, expected.loss, **CLOSE)


def test_shift_labels_replace_labels_for_both_paths():
    adapted = adapt(base("llama"), auxiliary_loss_weight=0.5).train()
    ids, mask, labels = batch()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    one = adapted(input_ids=ids, attention_mask=mask, labels=labels)
    two = adapted(input_ids=ids, attention_mask=mask, labels=labels, shift_labels=shifted)
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.shadow_loss, two.shadow_loss)


def test_lambda_zero_leaves_the_shadow_without_its_own_gradient():
    model = base("llama")
    adapted = adapt(model, auxiliary_loss_weight=0.0).train()
    ids, mask, labels = batch()
    naive, found, expected = compare(model, adapted, ids, mask, labels)
    torch.testing.assert_close(found.loss, found.task_loss)
    assert float(found.shadow_loss) > 0
    found.loss.backward()
    expected.task_loss.backward()
    assert_same_gradients(adapted, naive)


def test_extra_outputs_do_not_become_fields():
    adapted = adapt(base("llama"))
    ids, mask, labels = batch()
    out = adapted(input_ids=ids, attention_mask=mask, labels=labels, return_shadow=True)
    assert set(out.keys()) <= {"loss", "logits", "past_key_values"}
    assert out.shadow_state.shape == (3, 10, 32)


def test_logits_to_keep_keeps_the_same_shadow_logits():
    adapted = adapt(base("llama"))
    ids = tokens()
    whole = adapted(input_ids=ids, return_shadow=True)
    last = adapted(input_ids=ids, return_shadow=True, logits_to_keep=2)
    torch.testing.assert_close(last.shadow_logits, whole.shadow_logits[:, -2:])


# ------------------------------------------------------------------------------------------------ property 4: gradients


@pytest.mark.parametrize(("name", "kind", "task"), covering(["llama", "gemma3", "gpt2"], KINDS, ["CAUSAL_LM", "SEQ_CLS"]))
def test_every_trainable_tensor_has_a_gradient_from_the_first_step(name, kind, task):
    model = base(name, task=task)
    adapted = adapt(model, trained=False, task_type=task, **KINDS[kind]).train()
    ids, mask, labels = batch()
    labels = torch.tensor([0, 1, 2]) if task == "SEQ_CLS" else labels
    adapted(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    trainable = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    randomise(adapted)
    adapted(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    zero = [n for n in trainable if torch.count_nonzero(dict(adapted.named_parameters())[n].grad) == 0]
    assert not zero


@pytest.mark.parametrize("name", ["mixtral", "qwen3_next"])
def test_every_trainable_tensor_of_sparse_and_hybrid_bases_has_a_gradient(name):
    adapted = adapt(base(name), trained=False).train()
    ids = tokens(4, 24)
    for trained in (False, True):
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        missing = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        if not trained:
            randomise(adapted)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)


def test_only_the_adapter_is_trainable():
    model = base("llama")
    adapted = adapt(model, trained=False)
    trainable = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all("shadowpeft_" in n for n in trainable)
    explicit = adapt(model, trained=False, shadow_model="small_llama")
    frozen = [n for n, p in explicit.named_parameters() if not p.requires_grad and "shadowpeft_" in n]
    assert frozen
    assert all("shadowpeft_embedding" in n for n in frozen)


def test_the_base_is_left_as_it_was():
    model = base("llama")
    before = copy.deepcopy(model.state_dict())
    adapted = adapt(model, copy_base=False).train()
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    ids = tokens()
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    restored = adapted.unload()
    assert list(restored.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in restored.state_dict().items())

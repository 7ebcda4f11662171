"""A base that is corrected in its last layers only: nothing below keeps a graph, and stored states stand for it exactly."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

import tiny
from products import covering
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.forward import below
from shadowpeft.hf.layer import adapted_base, find_hub
from tiny import adapt, base, padded, skip_reentrant, tokens

LAST = {"refined_layers": [2, 3], "auxiliary_loss_weight": 0.5}
SAME = 2e-5
"""Relative error of gradients in float32: rows run alone and in a batch sum in another order."""


def layers_of(model):
    return below.find_decoder(adapted_base(model)).layers


def alone(model, ids, mask, shadow=False):
    """States of each row run by itself without padding, put where the batch has the row."""
    states = {}
    for i, (row, keep) in enumerate(zip(ids, mask.bool(), strict=True)):
        recorded = below.record(adapted_base(model), find_hub(model), row[None, keep], shadow=shadow)
        for name, state in recorded.items():
            states.setdefault(name, torch.zeros(*ids.shape, state.shape[-1]))[i, keep] = state[0]
    return states


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return SimpleNamespace(loss=out.loss.item(), named=named)


def assert_same(one, two):
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert one.named.keys() == two.named.keys() != set()
    for name, gradient in two.named.items():
        assert float(gradient.norm()) > 0, name
        assert float((one.named[name] - gradient).norm()) <= SAME * float(gradient.norm()), name


def batch(side="right"):
    ids, mask = padded(tokens(3, 9), [0, 3, 5], side)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs["labels"][mask.cumsum(-1) <= 1] = -100  # nothing real predicts the first token of a row
    return inputs


# ----------------------------------------------------------------------------------------------------- no graph below


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpoints", "reentrant"])
def test_nothing_below_the_first_refined_layer_is_in_the_graph(checkpointing):
    skip_reentrant(checkpointing)
    model = adapt(base(), **LAST).train()
    plain = gradients(model, **batch())
    adapted_base(model).enable_input_require_grads()  # as PEFT does where checkpointing is on
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    wants, runs = {}, [0] * 4
    for i, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda module, args, out, i=i: wants.__setitem__(i, out.requires_grad))
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: runs.__setitem__(i, runs[i] + 1))
    assert_same(gradients(model, **batch()), plain)
    assert wants == {0: False, 1: False, 2: True, 3: True}
    assert runs == [1, 1, *([1, 1] if checkpointing is None else [2, 2])]


def test_a_trained_module_below_keeps_its_gradient():
    model = adapt(base(), **LAST, modules_to_save=["0.mlp.up_proj"]).train()
    plain = gradients(model, **batch())
    assert any(".0.mlp.up_proj" in name for name in plain.named)
    adapted_base(model).enable_input_require_grads()
    assert_same(gradients(model, **batch()), plain)


def test_passed_embeddings_keep_their_gradient():
    def grad(cut):
        model = adapt(base(), **LAST).train()
        if cut:  # the shadow still reads them, so some gradient is left
            layers_of(model)[0].register_forward_pre_hook(lambda module, args: (args[0].detach(), *args[1:]))
        embeds = model.get_input_embeddings()(tokens()).detach().requires_grad_(True)
        model(inputs_embeds=embeds, labels=tokens()).loss.backward()
        return embeds.grad

    whole, partial = grad(cut=False), grad(cut=True)
    assert float((whole - partial).norm()) > 0.1 * float(whole.norm())


# ------------------------------------------------------------------------------------------- a pass that starts above


@pytest.mark.parametrize(("name", "side"), covering([*tiny.ARCHITECTURES, "mixtral"], ["right", "left"]))
def test_stored_states_give_the_same_loss_and_gradients(name, side):
    model = adapt(base(name), **LAST).train()
    inputs = batch(side)
    plain = gradients(model, **inputs)
    states = alone(model.eval(), inputs["input_ids"], inputs["attention_mask"])
    model.train()
    runs = []
    for i, layer in enumerate(layers_of(model)):
        next(layer.children()).register_forward_hook(lambda module, args, out, i=i: runs.append(i))
    assert_same(gradients(model, **inputs, **states), plain)
    assert sorted(set(runs)) == [2, 3]


def test_stored_states_with_checkpointing():
    model = adapt(base(), **LAST).train()
    plain = gradients(model, **batch())
    states = alone(model.eval(), batch()["input_ids"], batch()["attention_mask"])
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(model, **batch(), **states), plain)


def test_a_frozen_shadow_needs_no_run_either():
    model = adapt(base(), **LAST, shadow_num_hidden_layers=2).train()
    hub = find_hub(model)
    hub.freeze_shadow("default")
    plain = gradients(model, **batch())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("shadow_link" in name or "shadowpeft_norm" in name for name in trained)
    model.set_adapter("default")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    states = alone(model.eval(), batch()["input_ids"], batch()["attention_mask"], shadow=True)
    runs = []
    hub.shadowpeft_backbone["default"].register_forward_hook(lambda *parts: runs.append(parts))
    model.train()
    assert_same(gradients(model, **batch(), **states), plain)
    assert runs == []
    model.add_adapter("second", tiny.adapter_config())
    model.set_adapter("second")
    assert all(weight.requires_grad for weight in hub.shadow_weights("second").values() if weight.is_floating_point())


def test_the_base_is_as_before_also_after_an_error():
    model = adapt(base(), **LAST).train()
    inputs = batch()
    wanted = model(**inputs).loss
    states = alone(model.eval(), inputs["input_ids"], inputs["attention_mask"])
    model.train()
    layers = layers_of(model)
    own = layers[0].forward
    layers[1].forward = replaced = lambda *args, **kwargs: type(layers[1]).forward(layers[1], *args, **kwargs)
    handle = layers[3].register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, **states)
    handle.remove()
    assert "forward" not in vars(layers[0])
    assert layers[0].forward == own
    assert layers[1].forward is replaced
    assert torch.equal(model(**inputs).loss, wanted)
    copy.deepcopy(model)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_state": torch.zeros(3, 9, 31)}, r"base_state has shape \(3, 9, 31\) but must be \(3, 9, 32\)"),
        ({"base_state": torch.zeros(2, 9, 32)}, r"base_state has shape \(2, 9, 32\)"),
        ({"shadow_state": torch.zeros(3, 8, 32)}, r"shadow_state has shape \(3, 8, 32\)"),
        ({"shadow_state": torch.zeros(3, 9, 32)}, "the shadow trains; freeze it"),
        ({"output_hidden_states": True}, "leave the others out"),
        ({"position_ids": None}, "padding on the left"),
        ({"position_ids": None, "base_state": None, "shadow_state": torch.zeros(3, 9, 32)}, "padding on the left"),
    ],
)
def test_states_that_do_not_fit_are_refused(changes, message):
    model = adapt(base(), **LAST).train()
    with pytest.raises(ConfigError, match=message):
        model(**{**batch("left"), "base_state": torch.zeros(3, 9, 32), **changes})
    assert "forward" not in vars(layers_of(model)[0])


def test_states_are_refused_where_nothing_lies_below_or_the_base_trains():
    state = torch.zeros(3, 9, 32)
    with pytest.raises(ConfigError, match="the first refined layer is 0"):
        adapt(base(), refined_layers=[0, 3])(**batch(), base_state=state)
    with pytest.raises(ConfigError, match="modules of the base train"):
        adapt(base(), **LAST, modules_to_save=["0.mlp"]).train()(**batch(), base_state=state)
    model = adapt(base(), **LAST)
    with model.disable_adapter(), pytest.raises(ConfigError, match="no adapter is enabled"):
        model(**batch(), base_state=state)


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "mixtral", "qwen3_next"])
def test_bases_that_can_start_above(name):
    model = adapt(base(name), **LAST)
    below.check_base(adapted_base(model), find_hub(model))
    assert not model.training


def gemma3n():
    """Its upper layers read keys and values of lower ones, and it has several residual streams."""
    shape = {k: v for k, v in tiny._SHAPE.items() if k not in ("eos_token_id",)}
    kinds = ["sliding_attention", "full_attention"] * 3
    own = {"num_hidden_layers": 6, "layer_types": kinds, "num_kv_shared_layers": 2, "head_dim": 8, "laurel_rank": 8}
    own |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": tiny.V, "sliding_window": 6}
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(Gemma3nTextConfig(**{**shape, **own})).eval()


def with_router_loss():
    model = adapt(base("mixtral"), **LAST)
    adapted_base(model).config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: adapt(gemma3n(), refined_layers=[4, 5]), UnsupportedModelError, "Gemma3nForCausalLM"),
        (
            lambda: adapt(base(attention_dropout=0.1), **LAST),
            UnsupportedModelError,
            "drops activations out in training.*dropout rates",
        ),
        (with_router_loss, UnsupportedModelError, "output_router_logits"),
        (lambda: adapt(base(), refined_layers=[0, 3]), ConfigError, "nothing lies below it"),
    ],
    ids=["gemma3n", "dropout", "routers", "nothing below"],
)
def test_bases_that_cannot_are_refused_by_name(make, error, message):
    model = make()
    with pytest.raises(error, match=message):
        below.check_base(adapted_base(model), find_hub(model))


def test_upper_layers_that_read_a_lower_one_are_found():
    """Value residuals: the last layer adds what the first one gave."""
    model = adapt(base(), **LAST)
    kept, layers = {}, layers_of(model)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: kept.clear())
    layers[0].mlp.register_forward_hook(lambda module, args, out: kept.update(value=out))
    handle = layers[3].register_forward_hook(lambda module, args, out: out + kept["value"])
    with pytest.raises(UnsupportedModelError, match="cannot start from a stored activation"):
        below.check_base(adapted_base(model), find_hub(model))
    handle.remove()
    below.check_base(adapted_base(model), find_hub(model))
    layers[3].register_forward_hook(lambda module, args, out: out + kept.get("value", 0.0))
    with pytest.raises(UnsupportedModelError, match="gives other logits"):
        below.check_base(adapted_base(model), find_hub(model))


# ------------------------------------------------------------------------------------------------ logits at targets only


@pytest.mark.parametrize("name", [*tiny.ARCHITECTURES, "mixtral"])
@pytest.mark.parametrize("own_targets", [False, True], ids=["labels", "shadow labels"])
def test_a_pass_whose_loss_alone_is_wanted(name, own_targets):
    model = adapt(base(name), **LAST, shadow_num_hidden_layers=1).train()
    inputs = {**batch(), "num_items_in_batch": torch.tensor(17)}
    inputs["labels"][:, :4] = -100
    if own_targets:
        inputs["shadow_labels"] = inputs["labels"].clone()
        inputs["shadow_labels"][1] = -100
        inputs["shadow_num_items_in_batch"] = torch.tensor(13)
    plain, whole = gradients(model, **inputs), model(**inputs)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out.numel() // tiny.V))
    out = model(**inputs, loss_alone=True)
    assert (
        sum(rows) < 3 + 2 * int((inputs["labels"] != -100).sum()) + 1
    )  # one a row that is not looked at, and both paths'
    assert out.logits.shape == (3, 1, tiny.V)
    assert out.task_loss.item() == pytest.approx(whole.task_loss.item(), rel=1e-6)
    assert out.shadow_loss.item() == pytest.approx(whole.shadow_loss.item(), rel=1e-6)
    assert_same(gradients(model, **inputs, loss_alone=True), plain)


def test_logits_are_kept_where_they_are_needed():
    ids = batch()["input_ids"]
    model = adapt(base(), shadow_loss="kl").train()  # the attached path's logits teach the shadow
    assert model(**batch(), loss_alone=True).logits.shape == (*ids.shape, tiny.V)
    plain = adapt(base()).train()
    assert plain(**batch(), return_shadow=True, loss_alone=True).logits.shape == (*ids.shape, tiny.V)
    assert plain(input_ids=ids, loss_alone=True).logits.shape == (*ids.shape, tiny.V)
    without = {k: v.masked_fill(v == v, -100) if k == "labels" else v for k, v in batch().items()}
    out = plain(**without, loss_alone=True)
    out.loss.backward()
    assert out.loss.item() == 0.0
    classifier = adapt(base(task="SEQ_CLS"), task_type="SEQ_CLS").train()
    assert classifier(input_ids=ids, labels=torch.tensor([0, 1, 2]), loss_alone=True).logits.shape == (3, 3)

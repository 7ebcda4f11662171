"""Add, switch, delete, disable: adapters that refine different layers, classifiers included."""

import pytest
import torch

import shadowpeft
from products import covering
from several import ADAPTERS, BASE, classifiers, each_alone, rows_of, several
from shadowpeft.errors import CacheMismatchError, ConfigError
from tiny import adapt, adapter_config, base, randomise, tokens

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32: see test_mixed_batch
TASKS = ["CAUSAL_LM", "SEQ_CLS"]


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=tokens(), **inputs).logits


def made(task):
    if task == "SEQ_CLS":
        return classifiers()
    plain = base("llama")
    return plain, several(plain)


def outputs(model):
    found = {}
    for name in model.peft_config:
        model.set_adapter(name)
        found[name] = logits(model)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_switching_in_any_order(task):
    plain, model = made(task)
    first = outputs(model)
    assert len({float(out.sum()) for out in first.values()}) == len(ADAPTERS)
    for name in [*ADAPTERS, *reversed(ADAPTERS), "late", "default", "late"]:
        model.set_adapter(name)
        assert torch.equal(logits(model), first[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), first[name])


def test_several_names_are_refused_by_transformers_way_of_setting_too():
    model = base("llama")
    for name in ("q", "z"):
        model.add_adapter(adapter_config(), name)
    with torch.no_grad():
        model.set_adapter(["q"])
        before = logits(model)
        with pytest.raises(ConfigError, match="2 adapters were given but only one shadow can be active"):
            model.set_adapter(["q", "z"])
        assert torch.equal(logits(model), before)
    assert model.active_adapters() == ["q"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".z." in n)


def test_only_refined_layers_hold_an_adapter():
    _, model = made("CAUSAL_LM")
    layers = model.get_base_model().model.layers
    held = {name: [name in layer.shadow_link.shadowpeft_injection for layer in layers] for name in ADAPTERS}
    assert held["late"] == [False, False, True, True]
    assert held["early"] == [True] * 4
    assert held["default"] == held["explicit"] == held["deep"] == [False, True, True, True]


@pytest.mark.parametrize(("task", "gone"), covering(TASKS, list(ADAPTERS)))
def test_deleting_one_leaves_the_others_to_the_bit(task, gone):
    """Active or not, whichever layers it refines."""
    plain, model = made(task)
    before = outputs(model)  # the last one is active now
    model.delete_adapter(gone)
    assert gone not in model.peft_config
    assert not any(f".{gone}." in name for name, _ in model.named_parameters())
    assert model.active_adapter != gone
    fallback = logits(model)
    assert torch.equal(fallback, before[model.active_adapter])
    after = outputs(model)
    assert set(after) == set(before) - {gone}
    assert all(torch.equal(after[name], before[name]) for name in after)
    with pytest.raises(ConfigError, match=f"'{gone}', which is not loaded"):
        model(input_ids=tokens(2), adapter_names=[gone, BASE])
    names = [*after, BASE]
    ids = tokens(len(names))
    expected = rows_of(each_alone(model, plain, names, input_ids=ids), names)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids, adapter_names=names).logits, expected, **CLOSE)


def test_deleting_the_active_adapter():
    _, model = made("CAUSAL_LM")
    before = outputs(model)
    model.set_adapter("late")
    model.delete_adapter("late")
    assert torch.equal(logits(model), before[model.active_adapter])
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(f".{model.active_adapter}." in n for n in learning)
    model.set_adapter("explicit")
    model.delete_adapter("early")
    assert model.active_adapter == "explicit"
    assert torch.equal(logits(model), before["explicit"])


def test_a_name_used_again_is_the_new_adapter():
    plain, model = made("CAUSAL_LM")
    before = outputs(model)
    ids = tokens(2, 6)
    model.set_adapter("late")
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.delete_adapter("late")
    torch.manual_seed(50)
    model.add_adapter("late", adapter_config(r=1))
    model.set_adapter("late")
    assert torch.equal(logits(model), logits(plain))  # untrained
    randomise(model, seed=51)
    assert not torch.equal(logits(model), before["late"])
    with pytest.raises(CacheMismatchError, match="replaced after this cache"):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    model.set_adapter("default")
    assert torch.equal(logits(model), before["default"])


def test_adding_while_another_trains():
    plain = base("llama")
    model = adapt(plain).train()
    model.add_adapter("second", adapter_config(variant="peft", refined_layers=[0, 1]))
    assert model.active_adapter == "default"
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert not any(".second." in n for n in learning)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in learning)
    hub = model.get_base_model().model.shadow_hub
    assert hub.shadowpeft_backbone["second"].training
    model.eval()
    assert not hub.shadowpeft_backbone["second"].training
    ids = tokens(3)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=["second", BASE, "default"]).logits
        assert torch.equal(found[:2], plain(input_ids=ids).logits[:2])  # the second has not been trained


def test_adding_to_a_disabled_model():
    plain = base("llama")
    model = adapt(plain)
    alone = logits(model)
    with model.disable_adapter():
        model.add_adapter("second", adapter_config(variant="peft"))
        assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    randomise(model)
    assert not torch.equal(logits(model), alone)


@pytest.mark.parametrize("task", TASKS)
def test_saved_and_loaded_side_by_side(tmp_path, task):
    plain, model = made(task)
    before = outputs(model)
    model.save_pretrained(tmp_path)
    again = shadowpeft.load(tmp_path, base("llama", task=task))
    for name in list(ADAPTERS)[1:]:
        again.load_adapter(tmp_path / name, adapter_name=name)
    after = outputs(again)
    assert all(torch.equal(after[name], before[name]) for name in ADAPTERS)
    names = ["late", BASE, "explicit"]
    with torch.no_grad():
        found = [m(input_ids=tokens(), adapter_names=names).logits for m in (model, again)]
    assert torch.equal(*found)
    assert torch.equal(logits(again.unload()), logits(plain))


def test_unload_after_a_mixed_batch_with_trained_modules():
    plain = base("llama")
    keys = list(plain.state_dict())
    model = several(plain, {"default": {"modules_to_save": ["model.norm"]}, "second": {}})
    logits(model, adapter_names=["default", "second", BASE])
    restored = model.unload()
    assert list(restored.state_dict()) == keys
    assert torch.equal(logits(restored), logits(plain))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_adapter_attached_where_no_gradients_are_kept_trains_afterwards(mode):
    model = base("llama")
    with mode():
        adapted = adapt(model, copy_base=False, trained=False)
    randomise(adapted)
    adapted.train()
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []

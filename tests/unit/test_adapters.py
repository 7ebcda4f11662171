"""Property 7: adapters never leak into each other; unload gives the base back."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from shadowpeft.errors import ConfigError
from shadowpeft.hf.layer import find_hub
from tiny import adapt, adapter_config, base, randomise, tokens


@torch.no_grad()
def logits(model):
    return model(input_ids=tokens()).logits


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def two():
    model = adapt(base("llama"))
    torch.manual_seed(9)
    model.add_adapter("second", adapter_config(r=2, shadow_model="small_llama", use_update=False))
    model.set_adapter("second")
    randomise(model, seed=8)
    return model


def test_two_adapters_do_not_mix():
    plain = logits(base("llama"))
    alone = logits(adapt(base("llama")))
    model = two()
    second = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), alone)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not torch.equal(second, alone)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), alone)
    assert not any("second" in name for name, _ in model.named_parameters())
    assert "second" not in model.peft_config


def test_deleting_the_active_adapter_falls_back_to_the_other():
    model = two()
    model.delete_adapter("default")
    second = logits(model)
    model.add_adapter("third", adapter_config())
    assert torch.equal(logits(model), second)


def test_only_the_active_adapter_trains():
    model = two()
    for name, other in (("default", "second"), ("second", "default")):
        model.set_adapter(name)
        model.zero_grad()
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        assert any(p.grad is not None for n, p in model.named_parameters() if f".{name}." in n)
        assert all(p.grad is None for n, p in model.named_parameters() if f".{other}." in n)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_explicit_embeddings_stay_frozen_through_switching():
    model = two()
    for name in ("default", "second", "default"):
        model.set_adapter(name)
    model.set_adapter("second")
    embedding = [p for n, p in model.named_parameters() if "shadowpeft_embedding" in n]
    assert embedding
    assert not any(p.requires_grad for p in embedding)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_unload_gives_the_base_back(name, task):
    model = base(name, task=task)
    expected, keys, hooks = logits(model), list(model.state_dict()), count_hooks(model)
    modules = [type(m) for m in model.modules()]
    adapted = adapt(model, copy_base=False, task_type=task)
    assert adapted.get_base_model() is model
    assert not torch.equal(logits(adapted), expected)
    restored = adapted.unload()
    assert restored is model
    assert list(restored.state_dict()) == keys
    assert count_hooks(restored) == hooks
    assert [type(m) for m in restored.modules()] == modules
    assert torch.equal(logits(restored), expected)
    assert not hasattr(restored, "peft_config")


def test_unload_restores_modules_to_save():
    model = base("llama")
    expected, keys = logits(model), list(model.state_dict())
    adapted = adapt(model, copy_base=False, modules_to_save=["norm"])
    restored = adapted.unload()
    assert list(restored.state_dict()) == keys
    assert torch.equal(logits(restored), expected)


def test_a_base_can_be_adapted_again_and_by_another_method():
    model = base("llama")
    expected = logits(adapt(model))
    restored = adapt(model, copy_base=False).unload()
    assert torch.equal(logits(adapt(restored)), expected)
    lora = get_peft_model(restored, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    assert torch.equal(logits(lora), logits(base("llama")))


def test_merging_is_refused():
    model = two()
    for call in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(ConfigError, match="merge"):
            call()
    with pytest.raises(ConfigError, match="a weighted sum of shadows is no shadow"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "third")
    with pytest.raises(ConfigError, match="one shadow"):
        model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="return_shadow"), model.disable_adapter():
        model(input_ids=tokens(), return_shadow=True)


def test_unknown_adapter_names_are_refused():
    model = two()
    with pytest.raises(ValueError, match="nobody"):
        model.set_adapter("nobody")


def test_transformers_own_adapter_api():
    model = base("llama")
    plain = logits(model)
    torch.manual_seed(5)
    model.add_adapter(adapter_config())
    assert torch.equal(logits(model), plain)
    randomise(model)
    adapted = logits(model)
    assert not torch.equal(adapted, plain)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), adapted)
    assert all("shadowpeft_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_classification_adapters_have_heads_of_their_own():
    model = adapt(base("llama", task="SEQ_CLS"), task_type="SEQ_CLS")
    first = logits(model)
    model.add_adapter("second", adapter_config(task_type="SEQ_CLS"))
    model.set_adapter("second")
    randomise(model, seed=12)
    assert not torch.equal(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_a_configuration_may_be_used_for_one_model_after_another():
    """What it records of a base is that base's; the models before keep what it said of them."""

    def classifier(labels, pad):
        model = base("llama", task="SEQ_CLS", labels=len(labels), pad_token_id=pad)
        model.config.id2label = dict(enumerate(labels))
        return model

    config = adapter_config(task_type="SEQ_CLS", modules_to_save=["input_layernorm"])
    first = get_peft_model(classifier(["ham", "spam"], 7), config)
    another = classifier(["up", "down", "aside"], None)
    second = get_peft_model(another, config)
    assert another.config.pad_token_id is None
    assert second.peft_config["default"] is config
    assert (config.labels, config.pad_token_id) == (["up", "down", "aside"], None)
    kept = first.peft_config["default"]
    assert (kept.labels, kept.pad_token_id) == (["ham", "spam"], 7)
    assert find_hub(first).configs["default"] is kept
    deeper = get_peft_model(base("llama", task="SEQ_CLS", num_hidden_layers=6), config)
    trained = [[name for name, _ in m.named_parameters() if ".modules_to_save.default." in name] for m in (first, deeper)]
    assert [len(names) for names in trained] == [4 + 1, 6 + 1]  # one a layer, and the head


@pytest.mark.parametrize("before", ["unloaded", "failed", "transformers"])
def test_so_may_it_after_other_fates_of_the_model_before(before):
    """An unloaded model, an attempt that failed, and a model of transformers' own ``add_adapter``."""
    config = adapter_config()
    model = base("llama")
    if before == "unloaded":
        first = get_peft_model(model, config)
        model = first.unload()
    elif before == "failed":
        config.modules_to_save = ["misspelt"]
        with pytest.raises(ConfigError, match="misspelt") as kept:
            get_peft_model(model, config)
        config.modules_to_save = None
        assert kept.value.__traceback__  # which holds the failed tuner
    else:
        other = base("llama")
        other.add_adapter(config, "default")
    second = get_peft_model(model, config)
    assert second.peft_config["default"] is config
    if before == "transformers":
        assert other.peft_config["default"] is not config
        assert find_hub(other).configs["default"] is other.peft_config["default"]


def test_what_a_training_records_stays_with_its_model():
    config = adapter_config(trained_ends=[1])
    first = get_peft_model(base("llama"), config)
    config.note("trained_ends", [2])
    config.note("trained_ends", [3])
    get_peft_model(base("llama"), config)
    assert config.trained_ends == [1]
    assert first.peft_config["default"].trained_ends == [3]

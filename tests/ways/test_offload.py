"""``device_map`` with weights on the CPU or on disk: the adapter is real, beside its layer, and nothing else changes."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import shadowpeft
from naive import NaiveShadow, assert_same_gradients
from products import covering
from shadowpeft.errors import ConfigError, UnsupportedModelError
from tiny import KINDS, adapt, adapter_config, base, tokens

PARTS = ["model.embed_tokens", *[f"model.layers.{i}" for i in range(4)], "model.norm", "model.rotary_emb", "lm_head"]
MAPS = {
    "cpu": {"": "cpu"},
    "some layers on disk": {part: "disk" if part in ("model.layers.1", "model.layers.2") else "cpu" for part in PARTS},
    "everything on disk": {"": "disk"},
}
CLASSIFIER = {"all but the classifier on disk": {"model": "disk", "score": "cpu"}}


def offloaded(folder, where, auto=AutoModelForCausalLM):
    return auto.from_pretrained(
        folder / "base", device_map={**MAPS, **CLASSIFIER}[where], offload_folder=folder / "offload"
    ).eval()


@pytest.fixture(params=["llama", "llama_tied"])
def plain(request, tmp_path):
    model = base(request.param)
    model.save_pretrained(tmp_path / "base")
    return model


@torch.no_grad()
def outputs(model):
    out = model(input_ids=tokens(), return_shadow=True)
    return out.logits, out.shadow_logits


def own(model):
    return {n: p for n, p in model.named_parameters() if "shadowpeft_" in n}


@pytest.mark.parametrize("where", MAPS)
def test_attaching_to_an_offloaded_base(plain, tmp_path, where):
    with torch.no_grad():
        expected = plain(tokens()).logits
    model = offloaded(tmp_path, where)
    assert any(p.is_meta for p in model.parameters()) == (where != "cpu")
    adapted = adapt(model, copy_base=False, trained=False)
    assert own(adapted)
    assert not any(p.is_meta for p in own(adapted).values())
    assert torch.equal(outputs(adapted)[0], expected)


@pytest.mark.parametrize(("where", "kind"), covering(MAPS, KINDS))
def test_loading_generating_and_saving_again(plain, tmp_path, where, kind):
    trained = adapt(plain, **KINDS[kind])
    trained.save_pretrained(tmp_path / "adapter")
    model = offloaded(tmp_path, where)
    adapted = shadowpeft.load(tmp_path / "adapter", model)
    for found, expected in zip(outputs(adapted), outputs(trained), strict=True):
        assert torch.equal(found, expected)
    assert getattr(model, "hf_device_map", None) is not None or where == "cpu"
    options = {"input_ids": tokens(2, 5), "max_new_tokens": 5, "pad_token_id": 0}
    assert torch.equal(adapted.generate(**options), trained.generate(**options))

    adapted.save_pretrained(tmp_path / "again")
    with (
        safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as before,
        safe_open(tmp_path / "again" / "adapter_model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in list(before.keys()):
            assert torch.equal(before.get_tensor(name), after.get_tensor(name)), name


@pytest.mark.parametrize("where", MAPS)
def test_training_on_an_offloaded_base_equals_the_naive_loop(plain, tmp_path, where):
    adapted = adapt(offloaded(tmp_path, where), copy_base=False, auxiliary_loss_weight=0.5).train()
    naive = NaiveShadow(plain, adapted)
    naive(input_ids=tokens(), labels=tokens()).loss.backward()
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    assert_same_gradients(adapted, naive)


@pytest.mark.parametrize(("where", "kind"), covering(MAPS, ["mirror", "explicit"]))
def test_detaching_from_an_offloaded_base(plain, tmp_path, where, kind):
    adapted = adapt(offloaded(tmp_path, where), copy_base=False, **KINDS[kind])
    edge = shadowpeft.detach(adapted)
    reference = shadowpeft.detach(adapt(plain, **KINDS[kind]))
    assert edge.config.tie_word_embeddings == reference.config.tie_word_embeddings
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in edge.state_dict().items())


def test_classifier_with_its_backbone_on_disk(tmp_path):
    plain = base("llama", task="SEQ_CLS")
    plain.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = plain(tokens()).logits
    auto = AutoModelForSequenceClassification
    model = offloaded(tmp_path, "all but the classifier on disk", auto)
    adapted = adapt(model, copy_base=False, trained=False, task_type="SEQ_CLS")
    head = adapted.base_model.model.model.shadow_hub.shadowpeft_head["default"].weight
    assert torch.equal(head, plain.score.weight)
    with torch.no_grad():
        assert torch.equal(adapted(tokens()).logits, expected)
    with pytest.raises(ConfigError, match=r"modules_to_save.*offloaded"):  # it trains, so it needs real weights
        adapt(offloaded(tmp_path, "everything on disk", auto), copy_base=False, task_type="SEQ_CLS")


def test_identity_of_an_offloaded_base_is_checked(plain, tmp_path):
    adapt(plain).save_pretrained(tmp_path / "adapter")
    base("llama", seed=99).save_pretrained(tmp_path / "base")
    with pytest.raises(shadowpeft.errors.BaseMismatchError, match="other weights"):
        shadowpeft.load(tmp_path / "adapter", offloaded(tmp_path, "everything on disk"))


def test_copying_layers_that_are_offloaded_is_refused(plain, tmp_path):
    model = offloaded(tmp_path, "everything on disk")
    with pytest.raises(ConfigError, match="offloaded"):
        adapt(model, copy_base=False, shadow_init="base_layers")


def test_training_further_modules_of_an_offloaded_base_is_refused(plain, tmp_path):
    model = offloaded(tmp_path, "everything on disk")
    with pytest.raises(ConfigError, match=r"modules_to_save.*offloaded"):
        adapt(model, copy_base=False, modules_to_save=["norm"])


def test_a_second_adapter_on_an_offloaded_base(plain, tmp_path):
    reference, model = copy.deepcopy(plain), offloaded(tmp_path, "some layers on disk")
    logits = []
    for each in (reference, model):
        adapted = adapt(each, copy_base=False)
        torch.manual_seed(6)
        adapted.add_adapter("second", adapter_config(r=2))
        adapted.set_adapter("second")
        assert not any(p.is_meta for p in own(adapted).values())
        logits.append(outputs(adapted)[0])
    assert torch.equal(*logits)


OFFLOAD = {
    "cpu": lambda model, folder: cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder / "offload"), torch.device("cpu")),
}


@pytest.mark.parametrize("where", OFFLOAD)
def test_offloading_the_base_before_and_the_adapter_never(plain, tmp_path, where):
    trained = adapt(plain)
    trained.save_pretrained(tmp_path / "adapter")
    expected = outputs(trained)
    OFFLOAD[where](trained, tmp_path / "trained")
    with pytest.raises(UnsupportedModelError, match=r"offload the base .* first, and attach or load the adapter then"):
        outputs(trained)
    model = copy.deepcopy(plain)
    OFFLOAD[where](model, tmp_path / "plain")
    found = outputs(shadowpeft.load(tmp_path / "adapter", model))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_an_adapter_without_a_shared_norm_may_be_offloaded(plain):
    adapted = adapt(plain, variant="peft")
    expected = outputs(adapted)
    cpu_offload(adapted, torch.device("cpu"))
    assert all(torch.equal(*pair) for pair in zip(outputs(adapted), expected, strict=True))

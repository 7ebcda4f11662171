"""Fields that other packages' adapters need, and conversion without those packages."""

import copy
import json

import pytest
import torch
from peft import get_peft_model

import shadowpeft
from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf import formats
from tiny import adapt, adapter_config, base, small_llama, tokens


def state(model):
    return {n: p.detach() for n, p in model.named_parameters() if "shadowpeft_" in n or "modules_to_save" in n}


@pytest.mark.parametrize(
    ("task", "name", "fields"),
    [
        ("CAUSAL_LM", "llama", {}),
        ("CAUSAL_LM", "gpt2", {"shadow_num_hidden_layers": 2, "update_hidden_size": 2}),
        ("CAUSAL_LM", "qwen3", {"shadow_intermediate_size": 24, "shadow_num_key_value_heads": 1}),
        ("CAUSAL_LM", "llama", {"own_shadow_head": True, "modules_to_save": ["lm_head"]}),
        ("CAUSAL_LM", "llama_tied", {"own_shadow_head": True}),
        ("CAUSAL_LM", "llama", {"shadow_model": "small_llama"}),
        ("SEQ_CLS", "llama", {}),
    ],
    ids=str,
)
def test_to_the_authors_format_and_back_to_the_bit(tmp_path, task, name, fields):
    plain = base(name, task=task)
    ours = adapt(plain, task_type=task, variant="authors", **fields)
    formats.write(ours, tmp_path, "authors")
    given = {"shadow_model": small_llama()} if "shadow_model" in fields else {}
    assert formats.detect(tmp_path) == "authors"
    again = shadowpeft.load(tmp_path, copy.deepcopy(plain), **given)
    expected, found = state(ours), state(again)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with torch.no_grad():
        a, b = (m(input_ids=tokens(), return_shadow=True) for m in (ours, again))
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.shadow_logits, b.shadow_logits)


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("CAUSAL_LM", {}),
        ("CAUSAL_LM", {"refined_layers": [1, 3], "auxiliary_loss_weight": 0.7}),
        ("CAUSAL_LM", {"share_embeddings": False, "shadow_hidden_size": 16, "shadow_num_attention_heads": 2}),
        ("CAUSAL_LM", {"modules_to_save": ["lm_head"]}),
        ("SEQ_CLS", {}),
    ],
    ids=str,
)
def test_to_peft_s_format_and_back_to_the_bit(tmp_path, task, fields):
    plain = base("llama", task=task)
    ours = adapt(plain, task_type=task, variant="peft", **fields)
    formats.write(ours, tmp_path, "peft")
    assert formats.detect(tmp_path) == "peft"
    again = shadowpeft.load(tmp_path, copy.deepcopy(plain))
    expected, found = state(ours), state(again)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    for key in ("r", "shadow_alpha", "auxiliary_loss_weight", "refined_layers", "update_width", "shares_embeddings"):
        mine, theirs = (getattr(m.peft_config["default"], key) for m in (ours, again))
        assert mine == theirs, key


def test_formats_are_told_apart(tmp_path):
    adapt(base("llama")).save_pretrained(tmp_path)
    assert formats.detect(tmp_path) == "shadowpeft"
    with pytest.raises(AdapterFileError, match=f"there is no '{tmp_path}/nothing' in the folder '{tmp_path}'"):
        formats.detect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match=r"has no adapter_config.json"):
        formats.detect(tmp_path / "empty")
    with pytest.raises(ConfigError, match="leave it out"):
        shadowpeft.load(tmp_path, base("llama"), shadow_model="anything")


@pytest.mark.parametrize("layers", [[2, 1], [-1, 2], [1], "1", [0.0, 1], [True, 2]])
def test_refined_layers_are_two_whole_numbers_in_order(layers):
    with pytest.raises(ConfigError, match="refined_layers is"):
        adapter_config(refined_layers=layers)


def test_refined_layers_must_exist():
    with pytest.raises(ConfigError, match="layers 0 to 3"):
        get_peft_model(base("llama"), adapter_config(refined_layers=[1, 4]))


@pytest.mark.parametrize(("value", "task"), [("yes", "CAUSAL_LM"), (True, "SEQ_CLS")])
def test_a_head_of_its_own_is_a_language_model_s(value, task):
    with pytest.raises(ConfigError, match="own_shadow_head is"):
        adapter_config(own_shadow_head=value, task_type=task)


def test_a_head_of_its_own_starts_as_the_base_s_and_trains(tmp_path):
    plain = base("llama_tied")
    adapted = adapt(plain, own_shadow_head=True, trained=False)
    with torch.no_grad():
        shared = adapt(plain, trained=False)(input_ids=tokens(), return_shadow=True).shadow_logits
        torch.manual_seed(0)
        found = adapted(input_ids=tokens(), return_shadow=True).shadow_logits
    assert found.shape == shared.shape
    (head,) = [p for n, p in adapted.named_parameters() if "shadowpeft_head" in n]
    assert torch.equal(head, plain.lm_head.weight)
    assert head.data_ptr() != adapted.get_base_model().lm_head.weight.data_ptr()
    adapted.train()
    adapted(input_ids=tokens(), labels=tokens()).loss.backward()
    assert float(head.grad.norm()) > 0


def test_an_older_file_without_the_new_fields_still_loads(tmp_path):
    ours = adapt(base("llama"))
    ours.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["refined_layers"], content["own_shadow_head"]
    path.write_text(json.dumps(content))
    with torch.no_grad():
        found = shadowpeft.load(tmp_path, base("llama"))(input_ids=tokens()).logits
        assert torch.equal(found, ours(input_ids=tokens()).logits)

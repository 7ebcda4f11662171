"""A configuration or a model that has been used before, and what a classifier's file says of its base."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

import shadowpeft
from shadowpeft.errors import BaseMismatchError, ConfigError, UnsupportedModelError
from shadowpeft.hf.base.structure import decoder_layers
from shadowpeft.hf.layer import find_hub
from tiny import adapt, base, tokens


def attached(config: shadowpeft.ShadowPeftConfig, model: torch.nn.Module | None = None) -> PeftModel:
    return get_peft_model(model if model is not None else base("llama"), config)


def backbone(model: PeftModel) -> torch.nn.Module:
    return find_hub(model).shadowpeft_backbone["default"]


def copies_its_base(model: PeftModel) -> bool:
    mine, theirs = decoder_layers(backbone(model))[0], model.get_base_model().model.layers[0]
    return torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


def used(**fields: object) -> shadowpeft.ShadowPeftConfig:
    config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=4, **fields)
    attached(config)
    return config


def test_a_changed_copy_of_a_used_configuration_builds_what_it_says(tmp_path: Path) -> None:
    config = used()
    other = attached(replace(config, shadow_num_hidden_layers=2, shadow_intermediate_size=24))
    assert [layer.mlp.up_proj.out_features for layer in decoder_layers(backbone(other))] == [24, 24]
    other.save_pretrained(tmp_path)
    loaded = shadowpeft.load(tmp_path, base("llama"))
    assert len(decoder_layers(backbone(loaded))) == 2
    config.shadow_num_hidden_layers = 3
    assert len(decoder_layers(backbone(attached(config)))) == 3
    changed = loaded.peft_config["default"]
    changed.shadow_num_hidden_layers = 1
    with pytest.raises(ConfigError, match=r"records a shadow with 2; .*replace\(config, shadow_num_hidden_layers=1\)"):
        attached(changed)
    assert len(decoder_layers(backbone(attached(replace(changed, shadow_num_hidden_layers=1))))) == 1


def test_copies_of_a_used_configuration_start_from_the_layers_of_their_base(tmp_path: Path) -> None:
    config = used(shadow_init="base_layers")
    attached(config).save_pretrained(tmp_path)
    for made in (replace(config, r=8), shadowpeft.ShadowPeftConfig(**config.to_dict())):
        assert made.base_fingerprint is None
        assert copies_its_base(attached(made, base("llama", seed=5)))
    for saved in (PeftConfig.from_pretrained(tmp_path), shadowpeft.ShadowPeftConfig.from_pretrained(tmp_path)):
        assert copies_its_base(attached(saved))
    with pytest.raises(BaseMismatchError):  # what a file says is of its own base
        attached(PeftConfig.from_pretrained(tmp_path), base("llama", seed=5))


def test_pefts_factories_make_a_configuration() -> None:
    given = {"peft_type": "SHADOWPEFT", "task_type": "CAUSAL_LM", "r": 8, "base_model_name_or_path": "someone/base"}
    for made in (peft.get_peft_config(dict(given)), PeftConfig.from_peft_type(**given)):
        assert (type(made), made.r) == (shadowpeft.ShadowPeftConfig, 8)
        assert made.base_fingerprint is None


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_peft_model_is_no_base(tmp_path: Path) -> None:
    adapt(base("llama")).save_pretrained(tmp_path)
    model = adapt(base("llama"))
    expected = model(input_ids=tokens()).logits
    for load in (lambda: shadowpeft.load(tmp_path, model), lambda: PeftModel.from_pretrained(model, tmp_path)):
        with pytest.raises(ConfigError, match=r"its load_adapter\(folder, name\)"):
            load()
    assert torch.equal(model(input_ids=tokens()).logits, expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
def test_a_base_with_another_methods_layers_is_refused(tmp_path: Path) -> None:
    adapt(base("llama")).save_pretrained(tmp_path)
    lora = get_peft_model(base("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for attach in (lambda: attached(used(), lora.get_base_model()), lambda: shadowpeft.load(tmp_path, lora.get_base_model())):
        with pytest.raises(UnsupportedModelError, match=r"carries LORA adapters.*merge them into it"):
            attach()
    shadowpeft.load(tmp_path, lora.unload())


def test_a_classifier_says_how_many_classes_its_base_has(tmp_path: Path) -> None:
    model = base("llama", task="SEQ_CLS")
    count = model.config.num_labels
    assert count != 2
    model.save_pretrained(tmp_path / "base")
    adapted = adapt(model, task_type="SEQ_CLS")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(input_ids=tokens()).logits
    found = shadowpeft.load(tmp_path / "adapter")
    assert torch.equal(found(input_ids=tokens()).logits, expected)
    assert found.peft_config["default"].labels == [f"LABEL_{i}" for i in range(count)]
    file = tmp_path / "adapter" / "adapter_config.json"
    text = file.read_text(encoding="utf-8")
    labels = text[text.index('"labels"') :]
    file.write_text(text.replace(labels[: labels.index("]") + 1], '"labels": null'), encoding="utf-8")  # an older file
    assert torch.equal(shadowpeft.load(tmp_path / "adapter")(input_ids=tokens()).logits, expected)

"""Presets: the paper's numbers are those of the paper, and what a user says goes before a preset."""

from __future__ import annotations

import pytest

from shadowpeft import ShadowPeftConfig
from shadowpeft.errors import ConfigError
from shadowpeft.presets import PRESETS, preset
from shadowpeft.train.config import ShadowSection, parse_run


def test_the_papers_preset_is_the_default_of_the_configuration():
    assert ShadowPeftConfig.preset("paper", task_type="CAUSAL_LM") == ShadowPeftConfig(task_type="CAUSAL_LM")


def test_every_preset_makes_a_configuration_and_a_run():
    for name, fields in PRESETS.items():
        config = ShadowPeftConfig.preset(name)
        section = ShadowSection.model_validate({"preset": name})
        for key, value in fields.items():
            assert getattr(config, key) == getattr(section, key) == value
        assert ShadowPeftConfig(**section.fields) == config


def test_a_run_without_a_word_about_it_takes_the_tuned_settings():
    run = parse_run({"base": "x", "data": {"train": "rows.jsonl"}}, "run")
    assert run.shadow.preset == "tuned"
    assert (run.training.shadow_epochs, run.training.learning_rate) == (0, 1e-3)
    assert run.shadow.shadow_alpha == PRESETS["tuned"]["shadow_alpha"] != PRESETS["paper"]["shadow_alpha"]


@pytest.mark.parametrize("data", [{"train": "robot"}, {"train": "rows.jsonl", "shadow_answers": "action"}])
def test_a_run_that_teaches_actions_takes_the_devices_settings(data):
    run = parse_run({"base": "x", "data": data, "shadow": {"r": 4}, "training": {"learning_rate": 0.5}}, "run")
    assert (run.shadow.preset, run.shadow.variant, run.shadow.shadow_num_hidden_layers, run.shadow.r) == (
        "device",
        "scaled",
        6,
        4,
    )
    assert (run.training.shadow_epochs, run.training.learning_rate, run.training.backbone_lr_ratio) == (3, 0.5, 0.1)
    assert parse_run(run.model_dump(), "again") == run
    plain = parse_run({"base": "x", "data": {**data, "shadow_answers": "whole"}}, "run")
    assert (plain.shadow.preset, plain.training.shadow_epochs) == ("tuned", 0)


def test_a_base_with_fewer_layers_than_the_device_copies_is_told_which_setting_brings_them():
    content = {"base": "x", "data": {"train": "rows.jsonl", "shadow_answers": "action"}}
    run = parse_run(content, "run")
    with pytest.raises(ConfigError) as refused:
        run.shadow.fields_for(3)
    said = "the preset 'device', where runs that teach actions start, sets shadow.shadow_num_hidden_layers to 6, as many"
    assert str(refused.value).startswith(said)
    assert str(refused.value).endswith("but the base has 3; set shadow.shadow_num_hidden_layers to 3 or less")
    assert run.shadow.fields_for(6) == run.shadow.fields
    own = parse_run({**content, "shadow": {"shadow_num_hidden_layers": 4}}, "run").shadow
    with pytest.raises(ConfigError, match=r"^shadow\.shadow_num_hidden_layers is 4, as many"):
        own.fields_for(3)
    assert own.fields_for(4)["shadow_num_hidden_layers"] == 4


def test_what_is_given_goes_before_a_preset():
    section = ShadowSection.model_validate({"preset": "paper", "shadow_alpha": 2.0})
    assert (section.shadow_alpha, section.shadow_dropout) == (2.0, 0.2)


@pytest.mark.parametrize("given", [{"shadow_model": "some/model"}, {"shadow_intermediate_size": 64}])
def test_a_shadow_with_no_layers_to_copy_gets_no_such_start(given):
    assert preset("tuned", **given).get("shadow_init", "random") == "random"
    assert ShadowSection.model_validate(given).shadow_init == "random"


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match="preset is 'best' but must be one of paper, tuned, device"):
        ShadowPeftConfig.preset("best")
    with pytest.raises(ConfigError, match=r"shadow\.preset"):
        parse_run({"base": "x", "data": {"train": "robot"}, "shadow": {"preset": "best"}}, "run")

"""Defects of the two public implementations that lie in files (docs/defects.md): ours refuses, and the peer really does it."""

import json
import shutil
import sys
import warnings

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import shadowpeft
from shadowpeft import ShadowTrainer
from shadowpeft.errors import AdapterFileError, BaseMismatchError, ConfigError, ShadowPeftError
from tiny import adapt, base, tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A trained adapter of ours for ``base("llama")``."""
    adapt(base("llama")).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def theirs(tmp_path):
    """The authors' adapter for ``base("llama")``, saved by their package."""
    authors = pytest.importorskip("shadow_peft")
    torch.manual_seed(5)
    made = authors.get_shadow_model(base("llama"), authors.ShadowConfig(injection_hidden_size=4, gate_hidden_size=4))
    made.save_pretrained(tmp_path / "theirs")
    return authors, tmp_path / "theirs"


@pytest.fixture
def other(tmp_path):
    """An adapter of PEFT's own shadow method for ``base("llama")``."""
    torch.manual_seed(5)
    made = get_peft_model(base("llama"), peft.ShadowConfig(task_type="CAUSAL_LM", r=4))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    made.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def edit(file, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            del content[key]
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def spoil(file, value=float("nan")):
    content = load_file(file)
    name = sorted(content)[-1]
    content[name].view(-1)[0] = value
    save_file(content, file)


def refused(folder, model, error, message):
    """By our loader and through PEFT's own, and the base is as it was."""
    with torch.no_grad():
        before = model(tokens()).logits
    for load in (shadowpeft.load, lambda f, m: PeftModel.from_pretrained(m, f)):
        with pytest.raises(error, match=message) as caught:
            load(folder, model)
        assert "\n" not in str(caught.value)
        assert not any("shadow" in key for key in model.state_dict())
        assert not hasattr(model, "peft_config")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)


def rows():
    ids = tokens(8, 9)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[-1] % 3} for row in ids]


def arguments(folder, **more):
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.1,
        max_steps=2,
        save_steps=1,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )


@pytest.mark.parametrize("cls", [ShadowTrainer, Trainer])
def test_defect_13_every_trainer_checkpoint_holds_the_trained_heads(tmp_path, cls):
    model = adapt(base("llama", task="SEQ_CLS"), task_type="SEQ_CLS", modules_to_save=["model.norm"]).train()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = cls(model=model, args=arguments(tmp_path), train_dataset=rows())
    trainer.train()
    heads = [n for n in names if "score" in n or "shadowpeft_head" in n or "norm.modules_to_save" in n]
    assert len(heads) == 3
    for name in heads:
        assert not torch.equal(model.get_parameter(name), start[name]), f"{name} did not learn"
    for step in (1, 2):
        stored = load_file(tmp_path / f"checkpoint-{step}" / WEIGHTS)
        assert len(stored) == len(names)
    # a fresh process that resumes from the last checkpoint has the heads of the end of training
    fresh = shadowpeft.load(tmp_path / "checkpoint-2", base("llama", task="SEQ_CLS"))
    for name in heads:
        assert torch.equal(fresh.get_parameter(name), model.get_parameter(name)), name


def test_defect_13_the_authors_trainer_checkpoints_lack_the_trained_heads(tmp_path):
    authors = pytest.importorskip("shadow_peft")
    torch.manual_seed(5)
    config = authors.ShadowConfig(injection_hidden_size=4, gate_hidden_size=4)
    inner = authors.get_shadow_model(base("llama", task="SEQ_CLS"), config)
    model = authors.ShadowForSequenceClassification(inner)
    assert model.shadow_classifier_head.weight.requires_grad
    trainer = Trainer(model=model, args=arguments(tmp_path, remove_unused_columns=False), train_dataset=rows())
    trainer.train()
    files = list((tmp_path / "checkpoint-2").glob("*.safetensors"))
    assert files
    assert not [name for file in files for name in load_file(file) if "classifier_head" in name]


def test_defect_17_unknown_keys_are_refused(folder, theirs):
    edit(folder / CONFIG, shadow_alpah=0.9)
    refused(folder, base("llama"), ConfigError, r"'shadow_alpah'.*did you mean 'shadow_alpha'")

    authors, path = theirs
    edit(path / "shadow_config.json", alpah=0.9)
    assert authors.ShadowPeftModel.from_pretrained(base("llama"), path).shadow_config.alpha == 0.1  # not a word


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoConfig": "bomb.explode", "AutoModel": "bomb.explode"}),
        ("model_type", "causal_lm_with_hidden_projection"),
        ("hidden_act", "bomb.explode"),
        ("torch_dtype", "bomb.explode"),
        ("_attn_implementation", "owner/bomb"),
        ("shadow_model_config_class", "bomb:explode"),
        ("architectures", ["bomb.explode"]),
    ],
)
@pytest.mark.parametrize("kind", ["mirror", "explicit"])
def test_defect_20_no_callable_named_in_a_file_is_imported(tmp_path, monkeypatch, kind, key, value):
    adapt(base("llama"), shadow_model="mirror" if kind == "mirror" else "small_llama").save_pretrained(tmp_path / "a")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bomb.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'bang')!r}).touch()\nexplode = print"
    )
    record = json.loads((tmp_path / "a" / CONFIG).read_text())["shadow_backbone_config"]
    edit(tmp_path / "a" / CONFIG, shadow_backbone_config={**record, key: value, "trust_remote_code": True})
    for load in (shadowpeft.load, lambda f, m: PeftModel.from_pretrained(m, f)):
        if key in ("model_type", "hidden_act"):
            with pytest.raises(ShadowPeftError, match="shadow_backbone_config"):
                load(tmp_path / "a", base("llama"))
        else:  # no part of a backbone: left out
            load(tmp_path / "a", base("llama"))
        assert "bomb" not in sys.modules
        assert not (tmp_path / "bang").exists()


def test_defect_20_the_authors_import_and_call_what_a_file_names(tmp_path, monkeypatch):
    authors = pytest.importorskip("shadow_peft.projected_causal_lm")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bomb_of_the_authors.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'bang')!r}).touch()"
    )
    config = authors.AutoModelForCausalLMWithHiddenProjectionConfig(
        shadow_model_class="bomb_of_the_authors:x",
        shadow_model_config_class="bomb_of_the_authors:x",
        shadow_model_config={"hidden_size": 8},
        base_hidden_size=8,
        vocab_size=61,
    )
    with pytest.raises(AttributeError):  # the module has run; only then is the name in it missed
        authors.AutoModelForCausalLMWithHiddenProjection(config)
    assert (tmp_path / "bang").exists()


@pytest.mark.parametrize("key", ["shadow_alpha", "r", "variant"])
def test_defect_22_a_missing_setting_is_refused(folder, theirs, other, key):
    edit(folder / CONFIG, **{key: ...})
    refused(folder, base("llama"), ConfigError, key)
    if key == "shadow_alpha":
        authors, path = theirs
        edit(path / "shadow_config.json", alpha=...)
        assert authors.ShadowPeftModel.from_pretrained(base("llama"), path).shadow_config.alpha == 0.1
        edit(other / CONFIG, shadow_alpha=...)
        PeftModel.from_pretrained(base("llama"), other)  # the class's default instead of the run's


def test_defect_22_a_misspelt_alpha_is_refused(folder, other):
    edit(folder / CONFIG, shadow_alpha=..., shadow_alfa=0.7)
    refused(folder, base("llama"), ConfigError, r"'shadow_alfa'.*did you mean 'shadow_alpha'")
    edit(other / CONFIG, shadow_alpha=..., shadow_alfa=0.7)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base("llama"), other)  # loads, with a warning at most


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_defect_22_weights_that_are_no_numbers_are_refused(folder, theirs, other, value):
    spoil(folder / WEIGHTS, value)
    refused(folder, base("llama"), AdapterFileError, "NaN or infinite")
    authors, path = theirs
    spoil(path / "shadow_adapter.safetensors", value)
    authors.ShadowPeftModel.from_pretrained(base("llama"), path)
    spoil(other / WEIGHTS, value)
    PeftModel.from_pretrained(base("llama"), other)


def test_defect_22_an_adapter_for_four_layers_on_a_base_of_six_is_refused(folder, other):
    long = base("llama", num_hidden_layers=6)
    refused(folder, long, BaseMismatchError, "num_hidden_layers = 4")
    # also if somebody has edited the record of the base
    found = adapt(long).peft_config["default"].base_fingerprint
    edit(folder / CONFIG, base_fingerprint=found)
    refused(folder, long, AdapterFileError, "missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = PeftModel.from_pretrained(base("llama", num_hidden_layers=6), other)
    assert made.peft_config["default"].r == 4  # layers 4 and 5 start as new


def test_defect_9_another_base_of_the_same_shape_is_refused(folder, theirs, other):
    refused(folder, base("llama", seed=5), BaseMismatchError, "other weights")
    authors, path = theirs
    authors.ShadowPeftModel.from_pretrained(base("llama", seed=5), path)
    PeftModel.from_pretrained(base("llama", seed=5), other)


@pytest.mark.parametrize("value", [None, {}, {"architecture": "llama"}, "removed"])
def test_defect_9_an_adapter_without_its_bases_identity_is_refused(folder, value):
    edit(folder / CONFIG, base_fingerprint=... if value == "removed" else value)
    refused(folder, base("llama", seed=5), ShadowPeftError, "base_fingerprint")


def test_pickled_weights_beside_a_configuration_are_never_read(folder):
    shutil.move(folder / WEIGHTS, folder / "adapter_model.bin")
    refused(folder, base("llama"), AdapterFileError, "safetensors")

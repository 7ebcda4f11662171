"""Defects that lie in files (docs/defects.md), of both public implementations: ours refuses. `make compare` measures theirs."""

import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
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


def test_defect_17_unknown_keys_are_refused(folder):
    edit(folder / CONFIG, shadow_alpah=0.9)
    refused(folder, base("llama"), ConfigError, r"'shadow_alpah'.*did you mean 'shadow_alpha'")


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


@pytest.mark.parametrize("key", ["shadow_alpha", "r", "variant"])
def test_defect_22_a_missing_setting_is_refused(folder, key):
    edit(folder / CONFIG, **{key: ...})
    refused(folder, base("llama"), ConfigError, key)


def test_defect_22_a_misspelt_alpha_is_refused(folder):
    edit(folder / CONFIG, shadow_alpha=..., shadow_alfa=0.7)
    refused(folder, base("llama"), ConfigError, r"'shadow_alfa'.*did you mean 'shadow_alpha'")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_defect_22_weights_that_are_no_numbers_are_refused(folder, value):
    spoil(folder / WEIGHTS, value)
    refused(folder, base("llama"), AdapterFileError, "NaN or infinite")


def test_defect_22_an_adapter_for_four_layers_on_a_base_of_six_is_refused(folder):
    long = base("llama", num_hidden_layers=6)
    refused(folder, long, BaseMismatchError, "num_hidden_layers = 4")
    # also if somebody has edited the record of the base
    of_long = adapt(long).peft_config["default"].base_fingerprint
    edit(folder / CONFIG, base_fingerprint=of_long)
    refused(folder, long, AdapterFileError, "missing")


def test_defect_9_another_base_of_the_same_shape_is_refused(folder):
    refused(folder, base("llama", seed=5), BaseMismatchError, "other weights")


@pytest.mark.parametrize("value", [None, {}, {"architecture": "llama"}, "removed"])
def test_defect_9_an_adapter_without_its_bases_identity_is_refused(folder, value):
    edit(folder / CONFIG, base_fingerprint=... if value == "removed" else value)
    refused(folder, base("llama", seed=5), ShadowPeftError, "base_fingerprint")


def test_pickled_weights_beside_a_configuration_are_never_read(folder):
    shutil.move(folder / WEIGHTS, folder / "adapter_model.bin")
    refused(folder, base("llama"), AdapterFileError, "safetensors")

"""Wrong models, wrong settings, damaged files: each is refused with one sentence that says what to do."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForTokenClassification,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import shadowpeft
from shadowpeft import ShadowPeftConfig
from shadowpeft.apps import doctor
from shadowpeft.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    ShadowPeftError,
    UnsupportedModelError,
)
from shadowpeft.hf import formats
from shadowpeft.hf.base import vocabulary
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.files import locate
from shadowpeft.hf.formats.common import explicit_config
from shadowpeft.hf.load import read_config
from shadowpeft.messages import shorten
from shadowpeft.tokenizer import load_tokenizer
from tiny import adapt, adapter_config, base, small_llama, tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_tokens_of(name):
    return vocabulary._tokenizer_of(SimpleNamespace(name_or_path=name))


def shadow_of(name):
    return adapt(base("llama"), shadow_model=name)


# --------------------------------------------------------------------------------------------------------------- models


def test_base_with_one_layer():
    with pytest.raises(UnsupportedModelError, match="one decoder layer"):
        adapt(base("llama", num_hidden_layers=1))


def test_encoder_decoder_base():
    config = T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=61)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        adapt(T5ForConditionalGeneration(config))


def test_bare_backbone():
    with pytest.raises(UnsupportedModelError, match="bare backbone"):
        adapt(AutoModel.from_config(base("llama").config))


def test_a_model_that_is_not_transformers():
    with pytest.raises(ShadowPeftError, match="transformers"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), adapter_config())


def test_layers_that_belong_to_a_part_of_a_model():
    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, is_decoder=True
    )
    with pytest.raises(UnsupportedModelError, match="BertEncoder"):
        adapt(BertLMHeadModel(config))


def test_task_and_head_must_fit():
    with pytest.raises(UnsupportedModelError, match="AutoModelForSequenceClassification"):
        adapt(base("llama"), task_type="SEQ_CLS")
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        adapt(base("llama", task="SEQ_CLS"), task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_classifier_of_tokens_is_no_classifier_of_sequences(name):
    model = AutoModelForTokenClassification.from_config(base(name).config)
    with pytest.raises(UnsupportedModelError, match=r"classifies every token.*AutoModelForSequenceClassification"):
        adapt(model, task_type="SEQ_CLS")


def test_failed_attaching_leaves_the_base_clean():
    model = base("llama", task="SEQ_CLS")
    keys = list(model.state_dict())
    with pytest.raises(UnsupportedModelError):
        adapt(model, copy_base=False, task_type="CAUSAL_LM")
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert model(tokens()).logits.shape == (3, 3)
    assert not hasattr(model, "peft_config")


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"r": None}, "r is None"),
        ({"update_hidden_size": 0}, "update_hidden_size is 0"),
        ({"shadow_alpha": 0.0}, "shadow_alpha is 0.0"),
        ({"shadow_alpha": float("nan")}, "shadow_alpha is nan"),
        ({"shadow_alpha": "0.1"}, "shadow_alpha is '0.1'"),
        ({"shadow_dropout": 1.0}, "shadow_dropout is 1.0"),
        ({"shadow_dropout": -0.1}, "shadow_dropout"),
        ({"auxiliary_loss_weight": -1}, "auxiliary_loss_weight is -1"),
        ({"auxiliary_loss_weight": float("inf")}, "auxiliary_loss_weight is inf"),
        ({"variant": "papre"}, "variant is 'papre'"),
        ({"shadow_init": "zeros"}, "shadow_init"),
        ({"projection_init": "pseudo_inverse"}, "explicit shadow_model"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
        ({"shadow_model": 3}, "shadow_model is int"),
        ({"shadow_model": "x/y", "shadow_num_hidden_layers": 1}, "shadow_num_hidden_layers"),
        ({"shadow_model": "x/y", "shadow_init": "base_layers"}, "base_layers"),
        ({"shadow_init": "base_layers", "shadow_intermediate_size": 8}, "shadow_intermediate_size"),
        ({"format_version": 2}, "format version 2"),
    ],
    ids=str,
)
def test_impossible_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        adapter_config(**fields)


def test_unknown_settings_come_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"'shadow_alfa'.*did you mean 'shadow_alpha'"):
        ShadowPeftConfig(task_type="CAUSAL_LM", shadow_alfa=0.1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task_type": None}, "task_type"),
        ({"shadow_num_attention_heads": 3, "shadow_num_key_value_heads": 2}, "does not divide"),
        ({"shadow_hidden_size": 16}, "cannot share embeddings"),
        ({"shadow_model": "small_llama", "share_embeddings": True}, "cannot share embeddings"),
        ({"shadow_model": small_llama(vocab_size=60)}, "vocabulary of 60"),
        ({"shadow_model": torch.nn.Linear(2, 2)}, "Linear"),
        ({"shadow_init": "base_layers", "shadow_num_hidden_layers": 9}, "9 layers"),
        ({"modules_to_save": ["lm_head"], "shadow_model": "no/such-model"}, "no/such-model"),
        ({"modules_to_save": ["lm_haed"]}, "names 'lm_haed', which the base does not have.*did you mean 'lm_head'"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_the_base(fields, message):
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        adapt(base("llama"), **fields)


@pytest.mark.filterwarnings("ignore:You are trying to modify|Already found a `peft_config`")
def test_a_shadow_beside_a_shadow_is_refused_where_it_is_attached():
    """As when a cell of a notebook runs a second time: what would be saved could not be loaded."""
    with pytest.raises(ConfigError, match="the base is a PeftModel, which holds adapters already"):
        adapt(adapt(base("llama")))


def test_widths_that_the_architecture_does_not_have():
    with pytest.raises(ConfigError, match="shadow_num_key_value_heads"):
        adapt(base("gpt2"), shadow_num_key_value_heads=2)


def test_prompt_longer_than_the_context():
    adapted = adapt(base("gpt2"))
    ids = torch.randint(2, 61, (1, 257))
    with pytest.raises((IndexError, ValueError)):
        adapted(input_ids=ids)
    with pytest.raises((IndexError, ValueError)):
        base("gpt2")(input_ids=ids)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def adapter(tmp_path):
    adapted = adapt(base("llama"))
    adapted.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def both_loaders(folder, model, error, message):
    """Our loader and PEFT's own refuse alike."""
    with pytest.raises(error, match=message):
        shadowpeft.load(folder, model)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(model, folder)


def edit(folder, **changes):
    content = json.loads((folder / CONFIG).read_text())
    for key, value in changes.items():
        if value is ...:
            del content[key]
        else:
            content[key] = value
    (folder / CONFIG).write_text(json.dumps(content))


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing", "folder"])
def test_damaged_weights(adapter, damage):
    path = adapter / WEIGHTS
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 999}[damage])
    with pytest.raises(AdapterFileError, match=WEIGHTS):
        shadowpeft.load(adapter, base("llama"))


def test_a_file_without_tensors(adapter):
    save_file({}, adapter / WEIGHTS)
    with pytest.raises(AdapterFileError, match="no tensors"):
        shadowpeft.load(adapter, base("llama"))


class Bomb:
    exploded = False

    def __reduce__(self):
        return (exec, ("import test_bad_input; test_bad_input.Bomb.exploded = True",))


def test_a_pickle_is_never_read(adapter):
    (adapter / WEIGHTS).unlink()
    torch.save({"x": Bomb()}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="safetensors"):
        shadowpeft.load(adapter, base("llama"))
    shutil.copy(adapter / "adapter_model.bin", adapter / WEIGHTS)
    with pytest.raises(AdapterFileError):
        shadowpeft.load(adapter, base("llama"))
    assert not Bomb.exploded


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"peft_type": "SHADOWPEFT"'], ids=str)
def test_garbage_configuration(adapter, content):
    (adapter / CONFIG).write_bytes(content)
    with pytest.raises(AdapterFileError, match=CONFIG):
        shadowpeft.load(adapter, base("llama"))


def test_an_enormous_configuration(adapter):
    (adapter / CONFIG).write_text(json.dumps({"x": "y" * 5_000_000}))
    with pytest.raises(AdapterFileError, match="bytes"):
        shadowpeft.load(adapter, base("llama"))


def test_another_methods_adapter(adapter):
    edit(adapter, peft_type="LORA")
    with pytest.raises(AdapterFileError, match="LORA"):
        shadowpeft.load(adapter, base("llama"))


@pytest.mark.parametrize("where", ["nowhere", "./a/b", "/no/such/folder", "a/b/c", ""])
def test_no_such_adapter(where):
    with pytest.raises(AdapterFileError):
        shadowpeft.load(where, base("llama"))


def test_a_folder_that_is_no_adapter_is_named_for_what_it_is(tmp_path, monkeypatch):
    def said(name, read=read_config):
        with pytest.raises(AdapterFileError) as refused:
            read(name)
        return str(refused.value)

    monkeypatch.setattr(locate, "hf_hub_download", lambda *_: pytest.fail("the Hub was asked"))
    monkeypatch.chdir(tmp_path)
    files = {
        "edge/config.json": '{"model_type": "llama"}',
        "vl/config.json": '{"model_type": "llama", "shadowpeft_adapter": "adapter"}',
        "p1/config.yaml": "base: b\nbackbone: {count: 2, layers: first}\n",
        "p1/shadow/config.json": '{"model_type": "causal_lm_with_hidden_projection"}',
        "half/config.yaml": "base: b\n",
        "run/config.yaml": "base: b\n",
        "run/adapter/adapter_config.json": "{}",
        "two/a/adapter_config.json": "{}",
        "damaged/config.json": "[",
    }
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    assert "'edge' is a model and no adapter" in said("edge")
    assert "'damaged' is a model and no adapter" in said("damaged")
    assert "'vl' is an export for vLLM; give its adapter, 'vl/adapter'" in said("vl")
    assert "pretraining run, which makes no adapter; its shadow, 'p1/shadow', is what shadow.shadow_model" in said("p1")
    assert "'p1/shadow' is a pretrained shadow, a model and no adapter" in said("p1/shadow")
    assert "'run' is the folder of a run; give its adapter, 'run/adapter'" in said("run")
    assert "'half' is the folder of a run that has no adapter yet" in said("half", formats.detect)
    assert "give one of them, such as 'two/a'" in said("two")
    for read in (read_config, formats.detect):
        assert "the run in 'half' has no adapter yet, so there is no 'half/adapter'" in said("half/adapter", read)
        assert "there is no 'edge/one' in the folder 'edge'; check the path" in said("edge/one", read)


def test_unknown_keys(adapter):
    edit(adapter, shadow_alpah=0.3)
    both_loaders(adapter, base("llama"), ConfigError, r"'shadow_alpah'.*did you mean 'shadow_alpha'")


@pytest.mark.parametrize("key", ["shadow_alpha", "r", "variant", "task_type", "base_fingerprint", "format_version"])
def test_missing_keys(adapter, key):
    edit(adapter, **{key: ...})
    both_loaders(adapter, base("llama"), ConfigError, key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "16"),
        ("shadow_alpha", None),
        ("shadow_dropout", []),
        ("variant", {}),
        ("shadow_backbone_config", 3),
        ("shadow_backbone_config", {"model_type": "no_such_model"}),
        ("shadow_backbone_config", None),
        ("shadow_backbone_config", {"model_type": "llama", "hidden_size": "wide"}),
        ("modules_to_save", 7),
        ("use_update", "yes"),
        ("share_embeddings", "no"),
        ("task_type", "NONSENSE"),
        ("shadow_init", ["random"]),
        ("base_fingerprint", {"architecture": "llama"}),
        ("base_fingerprint", None),
        ("target_modules", ["q_proj"]),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind(adapter, key, value):
    edit(adapter, **{key: value})
    with pytest.raises(ShadowPeftError, match=key):
        shadowpeft.load(adapter, base("llama"))


def test_configuration_and_weights_of_different_adapters(adapter):
    edit(adapter, r=5)
    both_loaders(adapter, base("llama"), AdapterFileError, "shape")


@pytest.mark.parametrize("part", ["text_config", "decoder", "generator", "text_encoder"])
@pytest.mark.parametrize("value", [3, "x", {"model_type": "llama"}])
def test_a_shadows_record_that_names_a_part_which_is_none(adapter, part, value):
    """Caches are made by such a part, so the first forward pass would fail, long after loading."""
    record = json.loads((adapter / CONFIG).read_text())["shadow_backbone_config"]
    edit(adapter, shadow_backbone_config={**record, part: value})
    both_loaders(adapter, base("llama"), ConfigError, "not a valid llama configuration")


@pytest.mark.parametrize("change", ["missing", "unknown", "nan", "integer", "inf"])
def test_tensors_that_do_not_fit(adapter, change):
    tensors = load_file(adapter / WEIGHTS)
    name = next(key for key in tensors if "w_down" in key)
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors[name.replace("w_down", "w_sideways")] = tensors[name].clone()
    elif change == "integer":
        tensors[name] = tensors[name].int()
    else:
        tensors[name][0, 0] = float(change)
    save_file(tensors, adapter / WEIGHTS)
    message = {"missing": "missing", "unknown": "unknown", "integer": "int32"}.get(change, "NaN or infinite")
    both_loaders(adapter, base("llama"), AdapterFileError, message)


def test_a_classifier_without_its_trained_head(tmp_path):
    adapt(base("llama", task="SEQ_CLS"), task_type="SEQ_CLS").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(key for key in tensors if key.endswith("score.weight"))
    whole = tensors.pop(name)
    save_file(tensors, tmp_path / WEIGHTS)
    model = base("llama", task="SEQ_CLS")
    keys = list(model.state_dict())
    with pytest.raises(AdapterFileError, match=r"score\.weight"):
        shadowpeft.load(tmp_path, model)
    assert list(model.state_dict()) == keys
    save_file({**tensors, name: whole * float("nan")}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterFileError, match="NaN"):
        shadowpeft.load(tmp_path, model)


def test_a_base_weight_smuggled_into_the_file(adapter):
    tensors = load_file(adapter / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(61, 32)
    save_file(tensors, adapter / WEIGHTS)
    model = base("llama")
    before = model.lm_head.weight.clone()
    with pytest.raises(AdapterFileError, match="lm_head"):
        shadowpeft.load(adapter, model)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: base("llama", seed=5), "other weights"),
        (lambda: base("llama", num_hidden_layers=5), "num_hidden_layers = 4"),
        (lambda: base("llama", hidden_size=64), "hidden_size = 32"),
        (lambda: base("llama", vocab_size=60), "vocab_size = 61"),
        (lambda: base("qwen3"), "llama model, this base is qwen3"),
    ],
)
def test_another_base(adapter, other, message):
    both_loaders(adapter, other(), BaseMismatchError, message)


@pytest.mark.parametrize("why", ["other base", "other weights"])
def test_a_refused_adapter_leaves_the_base_usable(adapter, why):
    other = base("llama", seed=5 if why == "other base" else 1)
    if why == "other weights":
        edit(adapter, r=5)
    with torch.no_grad():
        expected = other(tokens()).logits
        with pytest.raises((BaseMismatchError, AdapterFileError)):
            shadowpeft.load(adapter, other)
        assert torch.equal(other(tokens()).logits, expected)
    assert not any("shadow" in key for key in other.state_dict())
    assert not hasattr(other, "peft_config")


def test_a_related_base_gives_a_warning(adapter):
    model = base("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std(correction=0))
    with pytest.warns(UserWarning, match="differ"):
        shadowpeft.load(adapter, model)


def test_base_that_is_not_named(adapter):
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="base="):
        shadowpeft.load(adapter)
    for read in (lambda name: shadowpeft.load(adapter, name), load_tokenizer):
        with pytest.raises(ConfigError, match=r"could not be loaded: .*; there is no folder '.*nothing' here, so it was taken"):
            read(str(adapter.parent / "nothing"))


@pytest.mark.parametrize(
    "read",
    [load_base, load_tokenizer, explicit_config, formats._task_of, doctor._tokenizer, has_tokens_of, shadow_of],
    ids=["base", "tokenizer", "shadow's configuration", "task", "doctor", "vocabulary", "shadow"],
)
def test_code_in_a_folder_is_never_run_nor_asked_about(tmp_path, monkeypatch, read):
    mark = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    classes = {"AutoConfig": "code.C", "AutoModel": "code.M", "AutoModelForCausalLM": "code.M"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": classes}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.T", None]}}))
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    with contextlib.suppress(ConfigError):
        read(str(tmp_path))
    assert asked == []
    assert not mark.exists()


def test_a_tokenizer_that_its_library_cannot_read_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    rest = '"single_word": false, "lstrip": false, "rstrip": false, "normalized": false'  # and no "special"
    added = f'[{{"id": 0, "content": "<e>", {rest}}}]'
    model = '{"type": "WordLevel", "vocab": {"<e>": 0}, "unk_token": "<e>"}'
    (tmp_path / "tokenizer.json").write_text(f'{{"version": "1.0", "added_tokens": {added}, "model": {model}}}')
    with pytest.raises(ConfigError, match=r"tokenizer of .* could not be loaded: missing field `special`"):
        load_tokenizer(str(tmp_path))


def test_a_missing_key_is_no_reason_by_itself():
    assert shorten(KeyError(1)) == "KeyError(1)"
    assert shorten(ValueError("no such layer\nin the cache")) == "no such layer"

"""Property 6: every loader gives the same bits back; adapter files hold the adapter and nothing else."""

import json
import shutil
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import edges
import shadowpeft
from products import covering
from shadowpeft.errors import CacheMismatchError, ConfigError
from shadowpeft.export import gguf
from shadowpeft.hf import load as checkpoint
from shadowpeft.hf.base import aliases as bases
from shadowpeft.hf.base.load import load_base
from tiny import KINDS, adapt, adapter_config, base, padded, randomise, small_llama, tokenizer, tokens

OPTIONS = {
    **KINDS,
    "own_table": {"share_embeddings": False},
    "narrow_width": {"shadow_hidden_size": 16, "share_embeddings": False},
    "no_update": {"use_update": False},
    "peft": {"variant": "peft"},
    "scaled": {"variant": "scaled"},
    "some_layers": {"refined_layers": [1, 2]},
    "own_head": {"own_shadow_head": True},
}


@pytest.fixture
def saved(tmp_path):
    """A base on disk and a function that saves a trained adapter for it."""

    def save(name="llama", task="CAUSAL_LM", **fields):
        base(name, task=task).save_pretrained(tmp_path / "base")
        kind = {"CAUSAL_LM": AutoModelForCausalLM, "SEQ_CLS": peft.auto.AutoModelForSequenceClassification}[task]
        plain = kind.from_pretrained(tmp_path / "base")
        adapted = adapt(plain, task_type=task, **fields)
        adapted.save_pretrained(tmp_path / "adapter")
        return plain, adapted, tmp_path / "adapter"

    return save


@torch.no_grad()
def outputs(model):
    out = model(input_ids=tokens(), return_shadow=True)
    return out.logits, out.shadow_logits


def assert_same(model, adapted):
    for found, expected in zip(outputs(model), outputs(adapted), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "option"), covering(["llama", "gpt2"], OPTIONS))
def test_every_loader_is_exact(saved, name, option):
    if name == "gpt2" and option == "narrow_width":
        option = "mirror"
    plain, adapted, folder = saved(name, **OPTIONS[option])
    assert_same(PeftModel.from_pretrained(base(name), folder), adapted)
    assert_same(PeftModel.from_pretrained(base(name), folder, adapter_name="other"), adapted)
    assert_same(shadowpeft.load(folder, base(name)), adapted)
    assert_same(shadowpeft.load(folder, str(folder.parent / "base"), adapter_name="x"), adapted)
    assert_same(shadowpeft.load(folder), adapted)
    assert_same(AutoPeftModelForCausalLM.from_pretrained(folder), adapted)
    assert_same(AutoModelForCausalLM.from_pretrained(folder), adapted)
    plain.load_adapter(str(folder))
    assert_same(plain, adapted)


def test_loading_into_a_model_that_has_an_adapter(saved):
    _, adapted, folder = saved()
    other = adapt(base("llama"), r=2)
    before = outputs(other)
    other.load_adapter(folder, adapter_name="second")
    assert torch.equal(outputs(other)[0], before[0])
    other.set_adapter("second")
    assert_same(other, adapted)


@pytest.mark.parametrize("where", ["loaded", "attached"])
def test_an_adapter_that_describes_no_model_leaves_the_others_as_they_are(saved, where):
    _, adapted, folder = saved()
    other = shadowpeft.load(folder) if where == "loaded" else adapted
    before = outputs(other)[0]
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"rope_type": "default"', '"rope_type": "de&ault"'))
    with pytest.raises(ConfigError, match="describes no model that can be built"):
        other.load_adapter(folder, "second")
    assert torch.equal(outputs(other)[0], before)
    assert list(other.peft_config) == ["default"]


def test_weights_loaded_over_an_adapter_do_not_go_on_from_its_cache(saved):
    _, adapted, folder = saved()
    model = adapt(base("llama"))
    ids = tokens(2, 6)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    model.load_adapter(folder, "default")
    with pytest.raises(CacheMismatchError, match="were replaced after this cache was filled"):
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert_same(model, adapted)


@pytest.mark.parametrize("name", ["default", "shadowpeft_backbone", "w_up", "weight", "модель"])
def test_adapter_names(tmp_path, name):
    model = base("llama")
    from peft import get_peft_model

    adapted = get_peft_model(model, adapter_config(shadow_model="small_llama"), adapter_name=name).eval()
    randomise(adapted)
    adapted.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert_same(shadowpeft.load(folder, base("llama"), adapter_name="again"), adapted)
    assert_same(shadowpeft.load(folder, base("llama"), adapter_name=name), adapted)


@pytest.mark.parametrize("option", OPTIONS)
def test_files_hold_the_adapter_alone(saved, option):
    plain, adapted, folder = saved(**OPTIONS[option])
    assert {f.name for f in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("shadowpeft_" in key for key in tensors)
    assert not any("default" in key for key in tensors)
    own = {n for n, _ in adapted.named_parameters() if "shadowpeft_" in n}
    assert len(tensors) == len(own)
    ours = [t for t in tensors.values() if t.dim() == 2]
    assert not any(t.shape == p.shape and torch.equal(t, p) for p in plain.parameters() if p.dim() == 2 for t in ours)


def test_explicit_shadow_needs_neither_its_source_nor_its_table(saved, tmp_path):
    source = base("llama", seed=2, hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    source.save_pretrained(tmp_path / "small")
    _, adapted, folder = saved(shadow_model=str(tmp_path / "small"))
    shutil.rmtree(tmp_path / "small")
    assert_same(shadowpeft.load(folder, base("llama")), adapted)
    assert any("shadowpeft_embedding" in key for key in load_file(folder / "adapter_model.safetensors"))


def test_a_source_folder_gives_its_weights(tmp_path):
    source = base("llama", seed=2, hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    source.save_pretrained(tmp_path / "small")
    from_folder = adapt(base("llama"), trained=False, shadow_model=str(tmp_path / "small"))
    from_module = adapt(base("llama"), trained=False, shadow_model=source)
    for model in (from_folder, from_module):
        state = model.base_model.model.model.shadow_hub.shadowpeft_backbone["default"].state_dict()
        for key, value in source.model.state_dict().items():
            if not key.startswith("embed_tokens"):
                assert torch.equal(state[key], value), key
    with torch.no_grad():
        expected = source.model(tokens()).last_hidden_state
        hub = from_module.base_model.model.model.shadow_hub
        s0 = from_module(tokens(), return_shadow=True).shadow_state
        assert torch.equal(s0, hub.shadowpeft_projection["default"](expected))


def test_a_module_given_as_shadow_is_copied():
    source = base("llama", seed=2, hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    adapt(base("llama"), shadow_model=source)
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    assert list(before) == list(source.state_dict())


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "gpt2"], KINDS))
def test_classification_with_trained_heads(saved, name, kind):
    _, adapted, folder = saved(name, "SEQ_CLS", **KINDS[kind])
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum("shadowpeft_head" in key for key in tensors) == 1
    assert sum(key.endswith("score.weight") for key in tensors) == 1
    assert_same(PeftModel.from_pretrained(base(name, task="SEQ_CLS", seed=1), folder), adapted)
    assert_same(shadowpeft.load(folder), adapted)
    assert_same(shadowpeft.load(folder, base(name, task="SEQ_CLS"), adapter_name="other"), adapted)


def test_the_recorded_revision_of_the_base_is_loaded(saved, monkeypatch):
    plain, adapted, folder = saved()
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "me/base", "revision": "v1"}))
    asked = []

    def from_hub(name, task_type, **options):
        asked.append((name, task_type, options))
        return plain

    monkeypatch.setattr(checkpoint, "load_base", from_hub)
    assert_same(shadowpeft.load(folder), adapted)
    assert asked == [("me/base", "CAUSAL_LM", {"revision": "v1"})]


def test_a_base_is_read_at_one_revision(saved, monkeypatch):
    _, _, folder = saved()
    asked = []
    real = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: asked.append(k.get("revision")) or real(*a, **k))
    load_base(folder.parent / "base", revision="v1")
    assert set(asked) == {"v1"}


@pytest.mark.parametrize("name", ["norm", "lm_head", "embed_tokens"])
def test_modules_to_save_come_back(saved, name):
    _, adapted, folder = saved(modules_to_save=[name])
    keys = list(load_file(folder / "adapter_model.safetensors"))
    assert any(key.endswith(f"{name}.weight") and "shadowpeft_" not in key for key in keys)
    loaded = shadowpeft.load(folder, base("llama"))
    assert_same(loaded, adapted)
    with torch.no_grad():
        expected = shadowpeft.detach(adapted)(tokens()).logits
        assert torch.equal(shadowpeft.detach(loaded)(tokens()).logits, expected)
        torch.testing.assert_close(expected, outputs(adapted)[1], rtol=1e-5, atol=1e-5)


def test_loaded_for_inference_is_frozen_and_for_training_is_not(saved):
    _, adapted, folder = saved()
    frozen = shadowpeft.load(folder, base("llama"))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    trainable = shadowpeft.load(folder, base("llama"), is_trainable=True)
    names = {n for n, p in trainable.named_parameters() if p.requires_grad}
    assert names == {n for n, p in adapted.named_parameters() if p.requires_grad}


def test_loading_is_silent_and_saving_twice_gives_the_same_bytes(saved, tmp_path):
    _, _, folder = saved(shadow_model="small_llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = shadowpeft.load(folder, base("llama"))
    again.save_pretrained(tmp_path / "twice")
    first, second = (f / "adapter_model.safetensors" for f in (folder, tmp_path / "twice"))
    assert first.read_bytes() == second.read_bytes()
    ours, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "twice"))
    assert {k for k in ours if ours[k] != theirs[k]} <= {"inference_mode", "base_model_name_or_path"}


def test_configuration_is_complete_json(saved):
    _, _, folder = saved(
        shadow_model=base("llama", seed=4, hidden_size=24, num_attention_heads=2, num_key_value_heads=2)
    )
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["peft_type"] == "SHADOWPEFT"
    assert content["format_version"] == 1
    assert isinstance(content["shadow_model"], str)
    assert content["shadow_backbone_config"]["hidden_size"] == 24
    assert content["base_fingerprint"]["architecture"] == "llama"


def test_low_memory_loading(saved):
    _, adapted, folder = saved()
    assert_same(PeftModel.from_pretrained(base("llama"), folder, low_cpu_mem_usage=True), adapted)


def test_low_memory_loading_of_a_classifier(saved):
    _, adapted, folder = saved(task="SEQ_CLS")
    model = PeftModel.from_pretrained(base("llama", task="SEQ_CLS"), folder, low_cpu_mem_usage=True)
    assert_same(model, adapted)


def test_padded_batches_survive_a_round_trip(saved):
    _, adapted, folder = saved("gemma3")
    ids, mask = padded(tokens(), [0, 3, 1], "left")
    loaded = shadowpeft.load(folder, base("gemma3"))
    with torch.no_grad():
        assert torch.equal(
            loaded(input_ids=ids, attention_mask=mask).logits, adapted(input_ids=ids, attention_mask=mask).logits
        )


def test_bfloat16_base_keeps_float32_adapter_weights_in_the_file(tmp_path):
    adapted = adapt(base("llama").bfloat16())
    adapted.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the same weights in bfloat16 are the same base
        assert_same(shadowpeft.load(tmp_path, base("llama").bfloat16()), adapted)
        shadowpeft.load(tmp_path, base("llama"))


def without(folder, ending):
    """Take one tensor out of a saved model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [key for key in tensors if key.endswith(ending)]
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("named", [True, False])
def test_a_base_without_one_of_its_weights_is_refused(saved, named):
    _, _, folder = saved()
    without(folder.parent / "base", "layers.0.mlp.down_proj.weight")
    with pytest.raises(
        ConfigError, match=r"base '.*' lacks 1 of its weights \(model\.layers\.0\.mlp\.down_proj\.weight\)"
    ):
        shadowpeft.load(folder, folder.parent / "base" if named else None)


def test_a_damaged_base_is_refused(tmp_path):
    base("llama").save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"base '.*cut' could not be loaded: .*not fully covered"):
        load_base(tmp_path / "cut")
    base("mixtral").save_pretrained(tmp_path / "experts")
    without(tmp_path / "experts", "layers.0.block_sparse_moe.experts.1.w1.weight")
    with pytest.raises(ConfigError, match="expert weights are incomplete"):
        load_base(tmp_path / "experts")


def add_layer(folder, index, **more):
    """Write the tensors of the first layer once more as those of layer ``index``, and ``more`` beside them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    first = {key: value for key, value in tensors.items() if "layers.0." in key}
    more = {f"model.layers.0.{key.replace('__', '.')}": value for key, value in more.items()}
    tensors |= {key.replace("layers.0.", f"layers.{index}."): value.clone() for key, value in {**first, **more}.items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_a_configuration_with_fewer_layers_than_the_file_is_refused(tmp_path, task):
    base("llama").save_pretrained(tmp_path / "cut")
    record = json.loads((tmp_path / "cut" / "config.json").read_text())
    depth = record["num_hidden_layers"]
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**record, "num_hidden_layers": 2}))
    with pytest.raises(
        ConfigError,
        match=rf"'.*cut' has weights of the decoder layers 2 to {depth - 1} but its configuration says 2 layers",
    ):
        load_base(tmp_path / "cut", task)
    (tmp_path / "cut" / "config.json").write_text(json.dumps(record))
    assert load_base(tmp_path / "cut", task).config.num_hidden_layers == depth


def test_a_layer_that_predicts_a_second_token_and_old_buffers_are_left_out(tmp_path):
    """DeepSeek-V3 and GLM-4.5 ship such a layer behind the last one; old Llama files have a buffer in each layer."""
    model = base("llama")
    model.save_pretrained(tmp_path / "more")
    depth, width = model.config.num_hidden_layers, model.config.hidden_size
    add_layer(tmp_path / "more", depth, eh_proj__weight=torch.zeros(width, 2 * width), enorm__weight=torch.ones(width))
    assert len(load_base(tmp_path / "more").model.layers) == depth
    add_layer(tmp_path / "more", depth + 1)
    with pytest.raises(ConfigError, match=f"decoder layers {depth + 1} to {depth + 1} "):
        load_base(tmp_path / "more")


def test_what_a_whole_base_may_lack(tmp_path):
    base("llama_tied").save_pretrained(tmp_path / "tied")  # the file holds one of two names
    assert load_base(tmp_path / "tied").lm_head.weight.shape == (61, 32)
    new = load_base(tmp_path / "tied", "SEQ_CLS", num_labels=3)
    assert new.score.out_features == 3
    new.save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"other shapes .*score\.weight: \(3, 32\) in the file, \(4, 32\) configured"):
        load_base(tmp_path / "three", "SEQ_CLS", num_labels=4)
    without(tmp_path / "tied", "layers.1.input_layernorm.weight")
    with pytest.raises(ConfigError, match="lacks 1 of its weights"):
        load_base(tmp_path / "tied", "SEQ_CLS", num_labels=3)


def test_a_source_folder_without_one_of_its_weights_is_refused(tmp_path):
    small_llama().save_pretrained(tmp_path / "small")
    without(tmp_path / "small", "layers.1.self_attn.o_proj.weight")
    with pytest.raises(ConfigError, match=r"shadow_model '.*small' lacks 1 of its weights"):
        adapt(base("llama"), trained=False, shadow_model=str(tmp_path / "small"))


@pytest.mark.parametrize("there", ["nothing", "half", "meanwhile"])
def test_an_alias_is_materialised_once(tmp_path, monkeypatch, there):
    folder = tmp_path / "smollm2-135m"
    if there == "half":
        folder.mkdir()
        (folder / "model.safetensors").write_text("cut")

    def from_another_process(target):
        tokenizer().save_pretrained(target)
        if there == "meanwhile":
            folder.mkdir()
            for name in ("model.safetensors", "tokenizer.json"):
                (folder / name).write_text("theirs")

    monkeypatch.setenv("SHADOWPEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(bases, "gguf_file", lambda alias: tmp_path / "x.gguf")
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: base("llama"))
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *a, **k: SimpleNamespace(save_pretrained=from_another_process)
    )
    assert bases.materialise("smollm2-135m") == folder
    theirs = (folder / "tokenizer.json").read_text() == "theirs"
    assert theirs == (there == "meanwhile")
    assert (folder / "model.safetensors").stat().st_size > 1000 or theirs
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2-135m"]


def test_an_alias_is_read_from_its_package_whatever_stands_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "package").mkdir()
    packaged, other = edges.model("llama"), edges.model("llama", num_hidden_layers=1)
    gguf.write(packaged, edges.tokenizer(), tmp_path / "package" / "x.gguf", "f32")
    gguf.write(other, edges.tokenizer("smollm"), tmp_path / "x.gguf", "f32")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHADOWPEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bases, "gguf_file", lambda alias: tmp_path / "package" / "x.gguf")
    made = bases.materialise("smollm2-135m")
    again = AutoModelForCausalLM.from_pretrained(made).state_dict()
    assert again.keys() == packaged.state_dict().keys()
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in packaged.state_dict().items())
    tokens = AutoTokenizer.from_pretrained(made).tokenize("30 = 42")
    assert tokens == edges.tokenizer().tokenize("30 = 42") != edges.tokenizer("smollm").tokenize("30 = 42")

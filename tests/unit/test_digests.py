"""Files that belong together: an adapter's weights and configuration, and all files of a folder made to be carried."""

import json
import shutil
import subprocess

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments

import shadowpeft
from chatbase import chat_tokenizer
from shadowpeft import export
from shadowpeft.apps.detach import save_edge
from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.base.load import load_whole
from shadowpeft.hf.files.digests import KEY, SUMS, tensors_sha256
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.loading import load_edge
from tiny import adapt, adapter_config, base, randomise, tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIXED = "does not hold the weights that adapter_config.json beside it was saved with"


def adapter(folder, seed, **fields):
    """A saved adapter; those of one shape differ in all weights, and their configurations fit one another's weights."""
    model = get_peft_model(base("llama"), adapter_config(**fields))
    randomise(model, seed=seed)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture
def two(tmp_path):
    adapter(tmp_path / "a", 1, shadow_alpha=0.1)
    adapter(tmp_path / "b", 2, shadow_alpha=0.9)
    return tmp_path / "a", tmp_path / "b"


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS])
def test_the_configuration_of_one_adapter_with_the_weights_of_another_is_refused(two, which):
    one, other = two
    shadowpeft.load(one, base("llama"))
    shutil.copy(other / which, one / which)
    model = base("llama")
    keys = list(model.state_dict())
    with pytest.raises(AdapterFileError, match=MIXED):
        shadowpeft.load(one, model)
    with pytest.raises(AdapterFileError, match=MIXED):
        PeftModel.from_pretrained(base("llama"), str(one))
    assert list(model.state_dict()) == keys
    loaded = shadowpeft.load(other, base("llama"))
    before = loaded(input_ids=tokens()).logits
    with pytest.raises(AdapterFileError, match=MIXED):
        shadowpeft.swap(loaded, one)
    with pytest.raises(AdapterFileError, match=MIXED):
        loaded.load_adapter(str(one), "second")
    assert torch.equal(loaded(input_ids=tokens()).logits, before)


def test_what_the_configuration_says_beside_the_digest_can_be_edited(two):
    one, _ = two
    content = config_of(one)
    (one / CONFIG).write_text(json.dumps({**content, "base_model_name_or_path": "/elsewhere", "shadow_dropout": 0.0}))
    assert shadowpeft.load(one, base("llama")).peft_config["default"].base_model_name_or_path == "/elsewhere"


def test_weights_that_were_changed_on_purpose_load_once_the_digest_is_deleted(two):
    one, _ = two
    half = {name: value.bfloat16() for name, value in load_file(one / WEIGHTS).items()}
    save_file(half, one / WEIGHTS)
    with pytest.raises(AdapterFileError, match=f"delete {KEY} from {CONFIG}"):
        shadowpeft.load(one, base("llama"))
    content = config_of(one)
    del content[KEY]
    (one / CONFIG).write_text(json.dumps(content))
    shadowpeft.load(one, base("llama"))


def test_the_same_tensors_in_another_file_are_the_same_weights(two):
    one, _ = two
    tensors = load_file(one / WEIGHTS)
    save_file(dict(reversed(tensors.items())), one / WEIGHTS, {"by": "another program"})
    assert tensors_sha256(one / WEIGHTS) == config_of(one)[KEY]
    shadowpeft.load(one, base("llama"))
    name = min(tensors)
    for other in ({**tensors, name: tensors[name].double()}, {**tensors, name: tensors[name].flatten()}):
        save_file(other, one / WEIGHTS)
        assert tensors_sha256(one / WEIGHTS) != config_of(one)[KEY]


def test_saving_again_renews_the_digest(two):
    """In each way: by PEFT over an older save, by transformers over it, as pickle over it, and the configuration alone."""
    one, other = two
    loaded = shadowpeft.load(other, base("llama"))
    expected = loaded(input_ids=tokens()).logits

    def same():
        return torch.equal(shadowpeft.load(one, base("llama"))(input_ids=tokens()).logits, expected)

    loaded.save_pretrained(one)
    assert config_of(one)[KEY] == config_of(other)[KEY]
    assert same()
    adapter(one, 1)
    with pytest.warns(UserWarning, match="asks for pickle"):
        loaded.save_pretrained(one, safe_serialization=False)
    assert config_of(one)[KEY] == config_of(other)[KEY]
    assert not (one / "adapter_model.bin").exists()
    assert same()
    adapter(one, 1)
    plain = AutoModelForCausalLM.from_pretrained(_base_folder(one.parent))
    plain.load_adapter(str(other))
    plain.save_pretrained(one)
    assert config_of(one)[KEY] is None
    assert same()
    config = shadowpeft.ShadowPeftConfig.from_pretrained(other)
    assert config.weights_sha256 == config_of(other)[KEY]
    config.save_pretrained(one)
    assert config_of(one)[KEY] is None
    assert same()


def _base_folder(parent):
    base("llama").save_pretrained(parent / "base")
    return parent / "base"


def test_a_checkpoint_that_mixes_two_steps_is_not_resumed_from(tmp_path):
    model = adapt(base("llama"))
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    args = TrainingArguments(tmp_path, max_steps=2, save_steps=1, report_to=[], learning_rate=0.1, use_cpu=True)
    shadowpeft.ShadowTrainer(model=model, args=args, train_dataset=rows).train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert config_of(first)[KEY] != config_of(second)[KEY]
    shutil.copy(first / WEIGHTS, second / WEIGHTS)
    args.max_steps = 3
    again = shadowpeft.ShadowTrainer(model=adapt(base("llama")), args=args, train_dataset=rows)
    with pytest.raises(AdapterFileError, match="checkpoint-2.*" + MIXED):
        again.train(resume_from_checkpoint=str(second))
    again.train(resume_from_checkpoint=str(first))
    assert again.state.global_step == 3


# ------------------------------------------------------------------------------------------------------- carried folders


@pytest.fixture
def edges(tmp_path):
    """Two edge models of one shape, as ``shadowpeft detach`` writes them."""
    for name, seed in (("one", 1), ("two", 2)):
        model = get_peft_model(base("llama"), adapter_config())
        randomise(model, seed=seed)
        save_edge(shadowpeft.detach(model), chat_tokenizer(), tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def test_the_list_names_every_file_and_ordinary_tools_read_it(edges):
    one, _ = edges
    listed = {line.split("  ")[1] for line in (one / SUMS).read_text().splitlines()}
    assert listed == {f.name for f in one.iterdir()} - {SUMS}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= listed
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=one, check=True)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", SUMS])
def test_an_edge_model_of_two_saves_is_neither_loaded_nor_swapped_in(edges, name):
    one, two = edges
    settings = json.loads((two / "generation_config.json").read_text())
    (two / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [0, 1]}))
    backend = Detached(*load_edge(str(one)), "edge", str(one))
    running = backend.model
    mixed = shutil.copytree(one, one.parent / "mixed")
    load_edge(str(mixed))
    shutil.copy(two / name, mixed / name)
    wrong = "model.safetensors" if name == SUMS else name
    for attempt in (load_edge, lambda folder: backend.swap("edge", folder)):
        with pytest.raises(ConfigError, match=f"another {wrong} than it has now.*copy the whole folder again"):
            attempt(str(mixed))
    assert backend.model is running
    lines = [line for line in (mixed / SUMS).read_text().splitlines() if wrong not in line]
    (mixed / SUMS).write_text("\n".join(lines))  # the way out that the message names
    load_edge(str(mixed))


def test_a_model_that_others_saved_has_no_list_and_one_that_is_damaged_is_told(edges, tmp_path):
    one, _ = edges
    model = load_whole(AutoModelForCausalLM, one)
    model.save_pretrained(tmp_path / "stock")
    assert not (tmp_path / "stock" / SUMS).exists()
    load_whole(AutoModelForCausalLM, tmp_path / "stock")
    for line in ("", "x" * 64 + "  config.json", "0" * 64 + "  ../one/config.json", "0" * 64 + "  /etc/hostname"):
        (one / SUMS).write_text(line + "\n")
        with pytest.raises(ConfigError, match="damaged list of its files"):
            load_whole(AutoModelForCausalLM, one)


def test_an_exported_folder_is_compared_too(edges, tmp_path):
    one, two = edges
    for name, source in (("hf", one), ("other", two)):
        (tmp_path / name).mkdir()
        export.write("hf", load_whole(AutoModelForCausalLM, source), chat_tokenizer(), tmp_path / name, "f16")
    export.read("hf", tmp_path / "hf")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"another model\.safetensors than it has now"):
        export.read("hf", tmp_path / "hf")

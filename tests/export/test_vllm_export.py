"""``shadowpeft export --to vllm``: base, adapter and edge model in one folder, as ``shadowpeft-vllm`` reads it."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from shadowpeft_vllm.adapter import read_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import edges
import shadowpeft
from commands import call
from shadowpeft.errors import ConfigError
from shadowpeft.export import vllm
from shadowpeft.hf.files.digests import check_sums
from shadowpeft.serve.loading import load_edge
from tiny import adapt, base


@pytest.fixture
def run(monkeypatch, capsys):
    def export(*arguments):
        return call(monkeypatch, capsys, "export", *arguments)

    return export


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter on a base of several files."""
    folder = tmp_path_factory.mktemp("vllm")
    model = edges.model(num_hidden_layers=3)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    made = adapt(AutoModelForCausalLM.from_pretrained(folder / "base"))
    made.peft_config["default"].trained_ends = [2]
    edges.save_pair(folder, made)
    return folder


def test_one_folder_holds_all_that_vllm_needs(folders, run, tmp_path):
    code, out, err = run(folders / "adapter", tmp_path / "o", "--to", "vllm", "--json")
    assert (code, err) == (0, "")
    report, made = json.loads(out), tmp_path / "o"
    shards = sorted((folders / "base").glob("*.safetensors"))
    assert (report["export"]["base files"], len(shards) > 1) == (len(shards), True)
    assert report["verify"]["tokens_equal"] == report["verify"]["tokens"]
    for shard in shards:
        assert (made / shard.name).read_bytes() == shard.read_bytes()
    assert json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == [vllm.ARCHITECTURES[config["model_type"]]]
    facts = {key: config[key] for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}
    adapter = read_adapter(made / config["shadowpeft_adapter"], facts)  # the plugin takes it
    assert adapter.d == config["hidden_size"]
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == edges.tokenizer().eos_token_id
    assert (
        AutoTokenizer.from_pretrained(made)("sit").input_ids
        == AutoTokenizer.from_pretrained(made / "edge")("sit").input_ids
    )
    ids = edges.ids()
    with torch.no_grad():
        drafted = AutoModelForCausalLM.from_pretrained(made / "edge")(input_ids=ids).logits
        assert torch.equal(drafted, AutoModelForCausalLM.from_pretrained(folders / "edge")(input_ids=ids).logits)
    check_sums(made, "the export")
    load_edge(made / "edge")
    wrong = json.loads((made / "edge" / "generation_config.json").read_text())
    (made / "edge" / "generation_config.json").write_text(json.dumps({**wrong, "eos_token_id": 5}))
    with pytest.raises(ConfigError, match=r"was saved with another generation_config\.json"):
        load_edge(made / "edge")


def test_another_file_system_gets_a_copy(folders, monkeypatch, tmp_path):
    def fails(*_):
        raise OSError("another device")

    monkeypatch.setattr(vllm, "os", SimpleNamespace(link=fails))
    placed = vllm.attach(str(folders / "adapter"), None, tmp_path)
    assert placed["base files copied"] == placed["base files"] > 1
    name = sorted((folders / "base").glob("*.safetensors"))[0].name
    assert load_file(tmp_path / name).keys() == load_file(folders / "base" / name).keys()
    assert os.stat(tmp_path / name).st_nlink == 1


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("edge", (), "is an edge model but vllm serves the attached one"),
        ("adapter", ("--vocab-from", "robot"), "--vocab-from changes the edge model's tokens"),
    ],
)
def test_refusals(source, arguments, message, folders, run, tmp_path):
    code, _, err = run(folders / source, tmp_path / "o", "--to", "vllm", *arguments)
    assert (code, message in " ".join(err.split())) == (2, True)
    assert not (tmp_path / "o").exists()


def test_a_family_without_a_class_is_refused(tmp_path):
    model = base("mixtral")
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapt(model, copy_base=False).save_pretrained(tmp_path / "adapter")
    (tmp_path / "o").mkdir()
    with pytest.raises(
        shadowpeft.errors.UnsupportedModelError, match="the base is a 'mixtral' model but shadowpeft-vllm serves llama"
    ):
        vllm.attach(str(tmp_path / "adapter"), str(tmp_path / "base"), tmp_path / "o")

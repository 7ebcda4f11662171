"""``shadowpeft export``: from an adapter and from an edge folder, what it reports, what it refuses, what it leaves behind."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import edges
from chatbase import write_rows
from commands import call
from shadowpeft import export
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import gguf, hf
from tiny import adapt


@pytest.fixture
def run(monkeypatch, capsys):
    def export(*arguments):
        return call(monkeypatch, capsys, "export", *arguments)

    return export


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adapter with its base and tokenizer, the edge model it detaches to, and data."""
    folder = tmp_path_factory.mktemp("export")
    base = edges.model(num_hidden_layers=3, tie_word_embeddings=True)
    base.save_pretrained(folder / "base")
    edges.save_pair(folder, adapt(AutoModelForCausalLM.from_pretrained(folder / "base")))
    write_rows(folder / "data.jsonl", [{"prompt": "Sit down, please", "response": "[Sit()] the dog sits"}])
    return folder


def test_an_adapter_as_a_stock_folder(folders, run, tmp_path):
    code, out, err = run(folders / "adapter", tmp_path / "o", "--to", "hf", "--base", folders / "base", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["verify"]["tokens_equal"] == report["verify"]["tokens"] == 128
    assert report["verify"]["max_logit_difference"] < 1e-4  # one side reads with a cache
    assert report["export"]["bytes"] == (tmp_path / "o" / "model.safetensors").stat().st_size
    ids = edges.ids()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folders / "edge")(input_ids=ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "o")(input_ids=ids).logits, expected)


def test_a_calibration_that_stays_behind_is_told(folders, run, tmp_path):
    shutil.copytree(folders / "edge", tmp_path / "edge")
    (tmp_path / "edge" / "routing.json").write_text("{}")
    code, out, err = run(tmp_path / "edge", tmp_path / "o", "--to", "hf", "--no-verify", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["export"]["calibration"]
    assert told == f"stays in {tmp_path / 'edge' / 'routing.json'}; see docs/export.md"


def test_heads_that_onnxruntime_cannot_attend_with_are_refused(tmp_path):
    model = edges.model("qwen3", head_dim=24)
    with pytest.raises(UnsupportedModelError, match="heads of 24 numbers"):
        export.write("onnx-genai", model, edges.tokenizer(), tmp_path / "o", "f32")


@pytest.mark.parametrize("arguments", [("gguf",), ("gguf", "--dtype", "q8_0"), ("hf", "--dtype", "f16"), ("int8",)])
def test_an_edge_folder_with_fewer_tokens(arguments, folders, run, tmp_path):
    target = tmp_path / ("m.gguf" if arguments[0] == "gguf" else "o")
    code, out, err = run(folders / "edge", target, "--to", *arguments, "--vocab-from", folders / "data.jsonl", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["export"]["vocabulary"] < report["source"]["vocabulary"] == 452
    assert report["export"]["bytes"] < report["source"]["bytes"]
    assert report["verify"]["tokens"] == 128
    assert target.exists()
    beside = ["m.Modelfile"] if arguments[0] == "gguf" else []  # Ollama's, in test_modelfile.py
    assert sorted(f.name for f in tmp_path.iterdir()) == [*beside, target.name]


def test_a_folder_with_half_precision_loads_in_it(folders, run, tmp_path):
    assert run(folders / "edge", tmp_path / "o", "--to", "hf", "--dtype", "bf16", "--no-verify", "--json")[0] == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "o")) == len(edges.tokenizer())


@pytest.mark.parametrize("dtype", ["f32", "q4_0"])
def test_a_wrong_file_is_not_written(dtype, folders, run, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "neighbours", lambda weight, heads: weight)  # the classic mistake of a converter
    code, _, err = run(folders / "edge", tmp_path / "m.gguf", "--to", "gguf", "--dtype", dtype, "--json")
    assert code == 1
    assert "has a matrix that is 1." in err
    assert "was not written" in err
    assert list(tmp_path.iterdir()) == []
    assert run(folders / "edge", tmp_path / "m.gguf", "--to", "gguf", "--no-verify", "--json")[0] == 0


def test_other_tokens_than_the_sources_are_refused(folders, run, tmp_path, monkeypatch):
    real = hf.read

    def broken(folder):
        model = real(folder)
        model.model.norm.weight.data.neg_()  # no matrix
        return model

    monkeypatch.setattr(hf, "read", broken)
    code, _, err = run(folders / "edge", tmp_path / "o", "--to", "hf", "--json")
    assert code == 1
    assert "of 128 greedy tokens" in err
    assert "matrix" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_contradicts_itself_is_named(folders, run, tmp_path, monkeypatch):
    """As Bamba of transformers 5.23, which chooses other tokens with its cache than without: no fault of a file."""
    real = LlamaForCausalLM.forward

    def forward(self, *args, past_key_values=None, **kwargs):
        goes_on = past_key_values is not None and past_key_values.get_seq_length() > 0
        out = real(self, *args, past_key_values=past_key_values, **kwargs)
        out.logits = -out.logits if goes_on else out.logits
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    code, _, err = run(folders / "edge", tmp_path / "o", "--to", "hf")
    assert code == 1
    assert "a LlamaForCausalLM chooses other tokens with its cache than without" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_scores_before_and_after(folders, run, tmp_path):
    code, out, err = run(
        folders / "edge", tmp_path / "o", "--to", "int8", "--no-verify", "--evaluate", "robot", "--limit", "1", "--json"
    )
    assert code == 0, err
    found = json.loads(out)["evaluate"]
    assert found["task"] == "robot"
    assert found["before"]["n"] == found["after"]["n"] == 1
    assert found["before"]["score"] == found["after"]["score"] == 0  # a random model knows no skill


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("o", "--to", "tflite"), "must be one of hf, vllm, gguf"),
        (("o", "--to", "onnx", "--dtype", "f16"), "only has f32"),
        (("o", "--to", "gguf"), "does not end in .gguf"),
        (("o", "--to", "GGUF", "--dtype", "F16"), "does not end in .gguf"),
        (("o", "--to", "ONNX", "--dtype", "F16"), "the format 'onnx' only has f32"),
        (("o", "--to", "GGFU"), "the format is 'GGFU' but must be one of"),
        (("o", "--to", "onnx", "--evaluate", "robot"), "leave it out"),
        (("o", "--to", "hf", "--vocab-from", "nowhere.jsonl"), "does not exist"),
        (("o", "--to", "hf", "--skills", "actions.json"), "--skills names the tools that the rows of --vocab-from call"),
        ((".", "--to", "hf"), "exists"),
        (("o", "--to", "hf", "--limit", "5"), "--limit says how many rows --evaluate scores"),
        (("o", "--to", "hf", "--base", "somewhere"), "--base is the base of an adapter, but"),
    ],
)
def test_wrong_usage(arguments, says, folders, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(folders / "edge", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "package"), [("gguf", "gguf"), ("onnx", "onnxscript"), ("int8", "torchao")])
def test_a_missing_package_is_named(to, package, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run("nowhere", tmp_path / "m.gguf", "--to", to)
    assert (code, out) == (2, "")
    assert err == f"error: the format '{to}' needs the package {package}; run: pip install 'shadowpeft[export]'\n"


def test_a_classifier_is_refused(run, tmp_path):
    from tiny import base, tokenizer

    base("llama", task="SEQ_CLS").save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapt(plain, task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    code, _, err = run(tmp_path / "adapter", tmp_path / "o", "--to", "hf", "--base", tmp_path / "base")
    assert code == 1
    assert "classifier" in err
    tokenizer().save_pretrained(tmp_path / "base")
    code, _, err = run(tmp_path / "base", tmp_path / "o", "--to", "hf")
    assert code == 1
    assert "LlamaForSequenceClassification" in err
    assert not (tmp_path / "o").exists()


def test_a_quantised_folder_is_no_source(folders, run, tmp_path):
    assert run(folders / "edge", tmp_path / "q", "--to", "int8", "--no-verify")[0] == 0
    code, _, err = run(tmp_path / "q", tmp_path / "o", "--to", "hf")
    assert code == 2
    assert "quantised" in err


def test_a_folder_without_tokenizer(folders, run, tmp_path):
    code, _, err = run(folders / "base", tmp_path / "o", "--to", "hf")
    assert code == 2
    assert "tokenizer" in err


def test_a_folder_without_one_of_its_weights(folders, run, tmp_path):
    shutil.copytree(folders / "edge", tmp_path / "edge")
    tensors = load_file(tmp_path / "edge" / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "edge" / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run(tmp_path / "edge", tmp_path / "o", "--to", "hf")
    assert code == 2
    assert "lacks 1 of its weights (model.layers.0.mlp.down_proj.weight)" in err
    assert not (tmp_path / "o").exists()


def test_a_folder_that_cannot_be_written(folders, run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = run(folders / "edge", tmp_path / "file" / "o", "--to", "hf")
    assert code == 1
    assert "could not be written" in err


def test_the_table(folders, run, tmp_path):
    code, out, _ = run(folders / "edge", tmp_path / "m.gguf", "--to", "gguf")
    assert code == 0
    assert "verify: tokens equal" in out
    assert "llama.cpp" in out


@pytest.mark.parametrize(("given", "found"), [("Q8_0", "q8_0"), ("float16", "f16"), ("F32", "f32")])
def test_number_types_may_be_spelled_as_torch_and_llama_cpp_do(given, found):
    assert export.find("gguf", given)[1] == found

"""``shadowpeft convert``: every pair of formats, refusals, and folders that are not touched in vain."""

import copy
import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

import shadowpeft
from chatbase import chat_model, chat_tokenizer, plain_rows, run_file, save_base, write_rows
from commands import call
from shadowpeft.hf import formats
from shadowpeft.hf.formats import projected_writer
from tiny import adapt, base, small_llama, tokenizer, tokens


@pytest.fixture
def run(monkeypatch, capsys):
    def convert(*arguments, command="convert"):
        return call(monkeypatch, capsys, command, *arguments)

    return convert


@pytest.fixture
def folders(tmp_path):
    """A base, an adapter of it per variant, one with an explicit shadow, all on disk."""
    base("llama").save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(plain, variant="authors").save_pretrained(tmp_path / "authors")
    adapt(plain, variant="peft").save_pretrained(tmp_path / "peft")
    adapt(plain, shadow_model="small_llama").save_pretrained(tmp_path / "explicit")
    small_llama().save_pretrained(tmp_path / "small")
    tokenizer().save_pretrained(tmp_path / "peft")
    return tmp_path


def logits(adapter, plain, **options):
    with torch.no_grad():
        out = shadowpeft.load(adapter, copy.deepcopy(plain), **options)(input_ids=tokens(), return_shadow=True)
    return torch.cat([out.logits, out.shadow_logits])


@pytest.mark.parametrize("kind", ["authors", "peft"])
def test_there_and_back(folders, run, kind):
    plain = base("llama")
    expected = logits(folders / kind, plain)
    code, out, err = run(folders / kind, folders / "there", "--to", kind, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["from"], report["to"]) == ("shadowpeft", kind)
    assert any("filled with zeros" in note for note in report["notes"])
    assert formats.detect(folders / "there") == kind
    assert torch.equal(logits(folders / "there", plain), expected)
    code, out, err = run(folders / "there", folders / "back", "--base", folders / "base", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["from"], report["to"]) == (kind, "shadowpeft")
    assert any("last update" in line for line in report["dropped"])
    assert torch.equal(logits(folders / "back", plain), expected)
    assert torch.equal(logits(folders / "back", None), expected)  # the base's path is recorded
    assert (folders / "back" / "tokenizer.json").is_file() == (kind == "peft")
    assert not [f for f in folders.iterdir() if f.name.startswith(".")]


def test_the_table_names_what_was_dropped(folders, run):
    run(folders / "peft", folders / "there", "--to", "peft")
    code, out, _ = run(folders / "there", folders / "back")
    assert code == 0
    assert "last update" in " ".join(out.split())


def test_explicit_shadows(folders, run):
    plain = base("llama")
    expected = logits(folders / "explicit", plain)
    code, out, _ = run(folders / "explicit", folders / "there", "--to", "authors", "--json")
    assert code == 0
    assert any("shadow is explicit" in note for note in json.loads(out)["notes"])
    code, _, err = run(folders / "there", folders / "back", "--base", folders / "base")
    assert code == 2
    assert "--shadow-model" in err
    assert not (folders / "back").exists()
    options = ("--base", folders / "base", "--shadow-model", folders / "small")
    assert run(folders / "there", folders / "back", *options)[0] == 0
    assert torch.equal(logits(folders / "back", plain), expected)


def test_projected_and_stock(folders, run):
    code, out, _ = run(folders / "explicit", folders / "projected", "--to", "projected", "--json")
    assert code == 0
    assert formats.detect(folders / "projected") == "projected"
    code, out, _ = run(folders / "projected", folders / "stock", "--json")
    assert code == 0
    assert json.loads(out)["to"] == "stock"
    stock = AutoModelForCausalLM.from_pretrained(folders / "stock")
    assert type(stock) is LlamaForCausalLM
    with torch.no_grad():
        shadow = logits(folders / "explicit", base("llama"))[3:]
        torch.testing.assert_close(stock(tokens()).logits, shadow, atol=1e-4, rtol=0)  # the folded head is rounded
    words = chat_tokenizer(eos="<eos>")  # its template closes a turn with <|im_end|>
    words.save_pretrained(folders / "projected")
    assert run(folders / "projected", folders / "chat")[0] == 0
    ends = GenerationConfig.from_pretrained(folders / "chat").eos_token_id
    assert set(ends) >= {words.eos_token_id, words.convert_tokens_to_ids("<|im_end|>")}
    assert AutoTokenizer.from_pretrained(folders / "chat").chat_template == words.chat_template
    code, _, err = run(folders / "projected", folders / "x", "--to", "authors")
    assert code == 2
    assert "becomes 'stock'" in err
    code, _, err = run(folders / "explicit", folders / "x", "--to", "stock")
    assert code == 2
    assert "shadowpeft detach" in err


def test_folders_are_not_overwritten_unasked(folders, run):
    target = folders / "there"
    target.mkdir()
    assert run(folders / "peft", target, "--to", "peft")[0] == 0  # empty is as good as new
    (target / "precious.txt").write_text("x")
    code, _, err = run(folders / "peft", target, "--to", "peft")
    assert code == 2
    assert "--force" in err
    code, _, err = run(folders / "peft", target, "--to", "authors", "--force")
    assert code == 2
    assert "variant='peft'" in err
    assert (target / "precious.txt").is_file()  # what cannot be expressed leaves the folder as it was
    assert run(folders / "peft", target, "--to", "peft", "--force")[0] == 0
    assert not (target / "precious.txt").exists()
    for inside in (target, folders):
        code, _, err = run(target, inside, "--force")
        assert code == 2
        assert "holds the source" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing", "out"], 1, "neither a folder nor a Hub id"),
        (["peft", "out", "--to", "gguf"], 2, "--to is 'gguf'"),
        (["peft", "base/config.json"], 2, "is a file"),
        (["base", "out"], 1, "has no adapter_config.json"),
        (["peft", "out", "--shadow-model", "small"], 2, "leave it out"),
    ],
)
def test_wrong_calls_are_one_sentence(folders, run, monkeypatch, arguments, code, said):
    monkeypatch.chdir(folders)
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (folders / "out").exists()


def test_an_unwritable_parent(folders, run):
    (folders / "file").write_text("x")
    code, _, err = run(folders / "peft", folders / "file" / "out")
    assert code == 1
    assert "could not be written" in err


@pytest.mark.parametrize("out", [".", "..", "inner/.."])
def test_the_working_directory_is_not_replaced(folders, run, monkeypatch, out):
    here = folders / "here"
    (here / "inner").mkdir(parents=True)
    (here / "precious.txt").write_text("x")
    monkeypatch.chdir(here)
    code, _, err = run(folders / "peft", out, "--force")
    assert code == 2
    assert "working directory" in err
    assert (here / "precious.txt").is_file()
    assert (folders / "peft" / "adapter_config.json").is_file()


def test_what_was_there_survives_a_failed_rename(folders, run, monkeypatch):
    target = folders / "kept"
    target.mkdir()
    (target / "precious.txt").write_text("x")
    rename = os.rename

    def refuse(source, to):
        if Path(to) == target and Path(source).name == "kept" and Path(source).parent.parent == folders:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, to)

    monkeypatch.setattr(os, "rename", refuse)
    code, _, err = run(folders / "peft", target, "--force")
    assert code == 1
    assert "Device or resource busy" in err
    assert "free some space or choose another folder" in err
    assert [f.name for f in target.iterdir()] == ["precious.txt"]
    assert not [f.name for f in folders.iterdir() if "kept" in f.name and f != target]


def test_a_run_starts_from_a_projected_checkpoint(tmp_path, run):
    """``shadow.shadow_model`` of a run file: planned, trained, and needed no more afterwards."""
    small = chat_model(hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    base_folder = save_base(tmp_path / "base")
    start = adapt(chat_model(), shadow_model=small)
    projected_writer.save_projected(start, tmp_path / "projected")
    chat_tokenizer().save_pretrained(tmp_path / "projected")
    content = run_file(tmp_path / "run", base_folder, write_rows(tmp_path / "rows.jsonl", plain_rows()))
    content["shadow"] = {"r": 4, "shadow_model": str(tmp_path / "projected")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    counts = []
    for command in ("plan", "train"):
        code, out, err = run(tmp_path / "run.yaml", "--json", command=command)
        assert (code, err) == (0, "")
        counts.append(json.loads(out)["trainable_parameters"])
    assert counts[0] == counts[1]
    (tmp_path / "projected" / "model.safetensors").unlink()
    hub = shadowpeft.load(tmp_path / "run" / "adapter").base_model.model.model.shadow_hub
    trained = hub.shadowpeft_projection["default"].weight
    began = start.base_model.model.model.shadow_hub.shadowpeft_projection["default"].weight
    assert (
        0 < float((trained - began).detach().norm()) < 0.3 * float(began.detach().norm())
    )  # from there, not from anew

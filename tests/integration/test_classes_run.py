"""Run files for texts with a label: labels in the adapter, both paths judged, detached."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import shadowpeft
from chatbase import run_file, save_base, write_rows
from commands import call
from shadowpeft.apps.plan import plan
from shadowpeft.data import class_rows
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.hf.load import read_config
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train
from webserver import free_port

WORDS = {"hot": ["aaaa", "aaa a", "aa aa", "a aaa"], "cold": ["zzzz", "zz zz", "z zzz", "zzz z"], "wet": ["mm", "m m", "mmm"]}


def rows(n=36):
    labels = list(WORDS)
    return [{"text": WORDS[labels[i % 3]][i // 3 % 3], "label": labels[i % 3], "id": i} for i in range(n)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    found = {
        "base": save_base(folder / "base"),
        "train": write_rows(folder / "train.jsonl", rows()),
        "test": write_rows(folder / "test.jsonl", rows(9)),
    }
    run = config(found, folder / "run", data={"validation": found["test"]}, training={"max_steps": 40})
    found["summary"] = train(run, quiet=True)
    found["adapter"] = found["summary"]["adapter"]
    return found


def config(made, folder, **sections):
    content = run_file(folder, made["base"], made["train"], task_type="SEQ_CLS", **sections)
    return parse_run(content, "the test's run")


def test_both_paths_learn_and_are_judged(made):
    summary = made["summary"]
    assert summary["accuracy"]["attached"] == 1.0
    assert summary["accuracy"]["detached"] >= 0.8
    assert summary["eval_task_loss"] < 0.5
    card = (Path(made["adapter"]) / "README.md").read_text()
    assert "text-classification" in card
    assert "| attached | 100.00% |" in card


def test_the_labels_are_in_the_adapter_and_in_the_edge_model(made, monkeypatch, capsys, tmp_path):
    assert read_config(made["adapter"]).labels == ["cold", "hot", "wet"]
    model = shadowpeft.load(made["adapter"])
    assert model.config.id2label == {0: "cold", 1: "hot", 2: "wet"}
    code, _, err = call(monkeypatch, capsys, "detach", made["adapter"], tmp_path / "edge")
    assert (code, err) == (0, "")
    edge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "edge")
    assert edge.config.label2id == {"cold": 0, "hot": 1, "wet": 2}
    words = load_tokenizer(made["adapter"])
    found = [int(edge(**words(row["text"], return_tensors="pt")).logits.argmax()) for row in rows(9)]
    right = [edge.config.id2label[i] == row["label"] for i, row in zip(found, rows(9), strict=True)]
    assert sum(right) / 9 == pytest.approx(made["summary"]["accuracy"]["detached"])


@pytest.mark.parametrize("edge", [False, True])
def test_a_classifier_answers_nothing_in_words(made, monkeypatch, capsys, tmp_path, edge):
    source = made["adapter"]
    if edge:
        source = tmp_path / "edge"
        assert call(monkeypatch, capsys, "detach", made["adapter"], source)[0] == 0
    write_rows(tmp_path / "requests.jsonl", [{"prompt": "a", "skill": "REMOTE"}])
    commands = [("serve", f"a={source}", "--role", role, "--no-auth", "--port", free_port()) for role in ("cloud", "edge")]
    commands.append(("route", "calibrate", source, "--data", tmp_path / "requests.jsonl", "--no-cloud", "--no-bound"))
    if not edge:
        commands += [("generate", source, "hello"), ("chat", source)]
    for command in commands:
        code, _, err = call(monkeypatch, capsys, *command)
        assert code == 2
        assert err.startswith(f"error: '{source}' is a classifier, which finds labels and answers nothing in words; "), command
        assert err.count("\n") == 1


@pytest.mark.parametrize("frozen", [False, True])
def test_stored_activations_change_nothing(made, tmp_path, frozen):
    """A classifier trains from stored activations as from its base; a frozen shadow keeps its head too."""
    found = []
    for stored in (False, True):
        training = {"max_steps": 6, "freeze_shadow": frozen, "cache_activations": stored}
        summary = train(config(made, tmp_path / str(stored), shadow={"last_layers": 1}, training=training), quiet=True)
        found.append(load_file(Path(summary["adapter"]) / "adapter_model.safetensors"))
    assert (tmp_path / "True" / "activations" / "activations.json").is_file()
    plain, ours = found
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    train(config(made, tmp_path / "one", shadow={"last_layers": 1}, training={**training, "max_steps": 1}), quiet=True)
    early = load_file(tmp_path / "one" / "adapter" / "adapter_model.safetensors")
    moved = {name for name, value in ours.items() if not torch.equal(value, early[name])}
    assert any("link" in name for name in moved)
    assert any("hub" in name for name in moved) != frozen
    assert any("hub" in name for name in ours)


def test_weights_of_other_labels_are_not_swapped_in(made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made["adapter"], other)
    model = shadowpeft.load(made["adapter"])
    shadowpeft.swap(model, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "labels": ["a", "b", "c"]}))
    with pytest.raises(ConfigError, match="is loaded with labels"):
        shadowpeft.swap(model, other)


def test_eval_of_a_file(made, monkeypatch, capsys, tmp_path):
    file = tmp_path / "test.csv"
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=["text", "label"])
        writer.writeheader()
        writer.writerows({"text": row["text"], "label": row["label"]} for row in rows(9))
    code, out, err = call(monkeypatch, capsys, "eval", made["adapter"], "--data", file, "--json")
    assert (code, err) == (0, "")
    modes = json.loads(out)["modes"]
    assert modes.keys() == {"attached", "detached"}
    assert modes["attached"]["score"] == 1.0
    other = write_rows(tmp_path / "other.jsonl", [{"text": "a", "label": "dry"}])
    code, _, err = call(monkeypatch, capsys, "eval", made["adapter"], "--data", other)
    assert code == 2
    assert "has the label 'dry', which the adapter has not learnt" in err


def test_a_path_without_validation_rows_is_not_judged(made, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**row, "path": "shadow"} for row in rows(6)])
    summary = train(config(made, tmp_path / "run", data={"validation": file}), quiet=True)
    assert summary["accuracy"].keys() == {"detached"}
    assert "eval_task_loss" not in summary


def test_the_shadow_first_rows_of_one_path_and_resume(made, tmp_path):
    mixed = [{**row, "path": ("both", "base", "shadow")[i % 3 if i > 8 else 0]} for i, row in enumerate(rows())]
    file = write_rows(tmp_path / "rows.jsonl", mixed)
    settings = {"max_steps": 20, "shadow_epochs": 1, "save_every": 10, "seed": 3}
    once = config({**made, "train": file}, tmp_path / "a", training=settings)
    train(once, quiet=True)
    again = config({**made, "train": file}, tmp_path / "b", training=settings)
    train(again, quiet=True)
    for path in (tmp_path / "b" / "checkpoint-20").iterdir():
        path.unlink()
    (tmp_path / "b" / "checkpoint-20").rmdir()
    train(again, resume=True, quiet=True)
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert any("score" in key for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_plan_counts_a_classifier(made, tmp_path):
    made_plan = plan(config(made, tmp_path / "run"))
    assert made_plan["labels"] == ["cold", "hot", "wet"]
    assert made_plan["trainable_parameters"] == made["summary"]["trainable_parameters"]


def test_long_texts_are_refused_left_out_or_cut(made):
    words = load_tokenizer(made["base"])
    long = [class_rows.check_row({"text": "x" * n, "label": str(n % 2)}, f"row {n}") for n in (4, 9, 40)]
    with pytest.raises(DataError, match=r"row 40 has 40 tokens .*set data\.too_long to cut or skip"):
        class_rows.encode(long, words, ["0", "1"], max_length=16)
    skipped = class_rows.encode(long, words, ["0", "1"], max_length=16, too_long="skip")
    assert (len(skipped), skipped.skipped.rows, skipped.skipped.first) == (2, 1, "row 40")
    assert [len(s.ids) for s in class_rows.encode(long, words, ["0", "1"], max_length=16, too_long="cut")] == [4, 9, 16]


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        ((10, 2, "1"), ["1", "2", "10"]),
        ((10, -2, "1"), ["-2", "1", "10"]),
        (("²", "3"), ["3", "²"]),
        (("--5", "3", "10"), ["--5", "10", "3"]),
        (("-", "3"), ["-", "3"]),
        (("1" * 5000, "2"), ["1" * 5000, "2"]),
    ],
)
def test_labels_that_are_numbers_are_in_their_order(given, ordered):
    found = [class_rows.check_row({"text": "a", "label": n}, "here") for n in given]
    assert class_rows.labels_of(found) == ordered


def test_a_class_whose_rows_are_all_left_out_is_refused(made, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*rows(9), {"text": "x" * 500, "label": "dry"}])
    run = config({**made, "train": file}, tmp_path / "run", data={"too_long": "skip"})
    with pytest.raises(DataError, match=r"the label 'dry' is longer than data\.max_length = 128 and left out"):
        train(run, quiet=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "needs 'text' and 'label'; rename them, or write {path: FILE, columns: {text: YOUR_NAME, label: "),
        ({"text": 1, "label": "a"}, "'text' must be a string"),
        ({"text": "a", "label": 0.5}, "'label' is 0.5 but must be a string or a whole number"),
        ({"text": "a", "label": True}, "'label' is True"),
        ({"text": "a", "label": "b", "path": "all"}, "'path' is 'all'"),
        ([], "must be an object"),
    ],
)
def test_what_is_wrong_with_a_row(row, message):
    with pytest.raises(DataError) as refused:
        class_rows.check_row(row, "here")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"system": "a dog"}}, "task_type is SEQ_CLS but data.system is of conversations"),
        ({"data": {"packing": True}}, "data.packing is of conversations"),
        ({"data": {"train": "robot"}}, "name a file"),
        ({"data": {"streaming": True}}, "hides which labels there are"),
        ({"shadow": {"shadow_loss": "kl"}}, "has no teacher there"),
        ({"task_type": "CAUSAL_LM", "data": {"too_long": "cut"}}, "takes an answer's end away"),
    ],
)
def test_what_cannot_be(made, tmp_path, sections, message):
    with pytest.raises(ConfigError) as refused:
        parse_run({**run_file(tmp_path, made["base"], made["train"], **{"task_type": "SEQ_CLS", **sections})}, "here")
    assert message in str(refused.value)


def test_the_pad_token_of_training_stays_with_the_adapter(made, tmp_path, monkeypatch, capsys):
    """The configuration of many bases names none; then no batch of texts could be classified after the training."""
    base = tmp_path / "base"
    shutil.copytree(made["base"], base)
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "pad_token_id": None}))
    adapter = train(config({**made, "base": str(base)}, tmp_path / "run", training={"max_steps": 2}), quiet=True)["adapter"]
    tokenizer = load_tokenizer(adapter)
    assert read_config(adapter).pad_token_id == tokenizer.pad_token_id
    texts = ["aaaa", "zz zz z zz"]
    batch, alone = tokenizer(texts, return_tensors="pt", padding=True), [tokenizer(t, return_tensors="pt") for t in texts]
    model = shadowpeft.load(adapter)
    assert call(monkeypatch, capsys, "detach", adapter, tmp_path / "edge")[0] == 0
    edge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "edge")
    for each in (model, shadowpeft.detach(model), edge):
        wanted = torch.cat([each(**one).logits for one in alone])
        torch.testing.assert_close(each(**batch).logits, wanted, atol=1e-5, rtol=1e-5)
    model.get_base_model().config.pad_token_id = 0  # a base of the user's own says otherwise
    assert shadowpeft.detach(model).config.pad_token_id == tokenizer.pad_token_id
    model.get_base_model().config.pad_token_id = model.peft_config["default"].pad_token_id = None  # from before the record
    assert shadowpeft.detach(model).config.pad_token_id is None
    assert shadowpeft.detach(model, tokenizer=tokenizer).config.pad_token_id == tokenizer.pad_token_id


def test_eval_says_what_it_cannot_read(made, tmp_path, monkeypatch, capsys):
    edge = tmp_path / "edge"
    assert call(monkeypatch, capsys, "detach", made["adapter"], edge)[0] == 0
    refused = call(monkeypatch, capsys, "eval", edge, "--data", made["test"])
    assert refused[0] == 2
    assert "is an edge model that classifies; give the adapter it was made from" in " ".join(refused[2].split())
    folder = call(monkeypatch, capsys, "eval", made["adapter"], "--data", tmp_path)
    assert folder[0] == 2
    assert "is a folder; give one file of it" in " ".join(folder[2].replace("\u2502", " ").split())
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": "aa", "label": "dry"}])
    err = call(monkeypatch, capsys, "eval", made["adapter"], "--data", odd)[2]
    assert "has not learnt; it knows 'cold', 'hot', 'wet'" in err

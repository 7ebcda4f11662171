"""A run that goes on from a trained adapter: what it starts with, what its file need not say, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import shadowpeft
from chatbase import plain_rows, run_file, save_base, write_rows
from commands import call
from shadowpeft.errors import ConfigError
from shadowpeft.hf.layer import find_hub
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.config import parse_run, read_run
from shadowpeft.train.run import build_model, train

SHAPE = {"shadow_num_hidden_layers": 2, "shadow_init": "base_layers", "variant": "scaled", "last_layers": 2, "r": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    found = {"base": save_base(folder / "base"), "rows": write_rows(folder / "rows.jsonl", plain_rows(12))}
    train(parse_run(run_file(folder / "first", found["base"], found["rows"], shadow=SHAPE), "first"), quiet=True)
    return {**found, "folder": folder, "adapter": str(folder / "first" / "adapter")}


def further(made, out, **sections):
    """A run file that says no more than it has to."""
    content = {"adapter": made["adapter"], "data": {"train": made["rows"], "max_length": 128}, "output": str(out)}
    settings = {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "threads": 1}
    return {**content, "training": settings, **sections}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_it_starts_where_the_adapter_ended(made, tmp_path):
    run = parse_run(further(made, tmp_path), "here")
    tokenizer = load_tokenizer(run.base)
    model, ended = build_model(run, tokenizer), shadowpeft.load(made["adapter"])
    for (name, mine), (other, theirs) in zip(model.named_parameters(), ended.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)
    anew = build_model(parse_run(run_file(tmp_path, made["base"], made["rows"], shadow=SHAPE), "anew"), tokenizer)
    assert trainable(model) == trainable(anew)
    assert (run.shadow.variant, run.shadow.last_layers, run.shadow.r) == ("scaled", 2, 3)
    assert run.base == made["base"]


def test_its_adapter_is_whole_and_another(made, tmp_path):
    summary = train(parse_run(further(made, tmp_path / "out"), "here"), quiet=True)
    assert summary["steps"] == 2
    before, after = (load_file(Path(f) / "adapter_model.safetensors") for f in (made["adapter"], summary["adapter"]))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    first, last = (json.loads((Path(f) / "adapter_config.json").read_text()) for f in (made["adapter"], summary["adapter"]))
    differing = {key for key in first | last if first.get(key) != last.get(key)}
    assert differing <= {"weights_sha256", "draft_tokens"}
    stored = tmp_path / "out" / "config.yaml"
    assert read_run(stored) == parse_run(yaml.safe_load(stored.read_text()), "again")
    losses = [
        [row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for folder in (made["folder"] / "first", tmp_path / "out")
    ]
    assert losses[1][0] < losses[0][0]


def test_losses_may_change_and_a_frozen_shadow_stays(made, tmp_path):
    content = further(made, tmp_path / "out", shadow={"auxiliary_loss_weight": 0.7})
    content["training"] |= {"freeze_shadow": True}
    run = parse_run(content, "here")
    model = build_model(run, load_tokenizer(run.base))
    assert model.peft_config["default"].auxiliary_loss_weight == 0.7
    assert not any(p.requires_grad for p in find_hub(model).shadowpeft_backbone["default"].parameters())
    summary = train(run, quiet=True)
    before, after = (load_file(Path(f) / "adapter_model.safetensors") for f in (made["adapter"], summary["adapter"]))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "shadowpeft_backbone" in name} <= same < set(before)


def test_the_commands_take_it(made, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(further(made, tmp_path / "out")))
    code, out, _ = call(monkeypatch, capsys, "plan", str(file), "--json")
    assert code == 0
    assert json.loads(out)["trainable_parameters"] == sum(
        p.numel() for p in shadowpeft.load(made["adapter"], is_trainable=True).parameters() if p.requires_grad
    )
    assert call(monkeypatch, capsys, "train", str(file))[0] == 0
    assert call(monkeypatch, capsys, "train", str(file), "training.max_steps=3", "--resume")[0] == 2


def test_a_run_is_resumed_with_the_adapter_it_began_with(made, tmp_path):
    content = further(made, tmp_path / "out")
    content["training"] |= {"save_every": 1}
    train(parse_run(content, "here"), quiet=True)
    shutil.copytree(made["adapter"], tmp_path / "copy")
    with pytest.raises(ConfigError, match="adapter"):
        train(parse_run({**content, "adapter": str(tmp_path / "copy")}, "here"), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"shadow": {"r": 4}}, "shadow.r is 4 but the adapter '.*' has 3, which a run that goes on from it cannot change"),
        ({"shadow": {"last_layers": 1}}, "shadow.last_layers is 1 but the adapter '.*' has 2"),
        ({"shadow": {"variant": "paper"}}, "shadow.variant is 'paper' but"),
        ({"shadow": {"preset": "paper"}}, "shadow.preset is 'paper' but the adapter '.*' has settings of its own"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS' but the adapter '.*' is for CAUSAL_LM"),
        ({"adapter": "nowhere"}, "adapter is 'nowhere', where no adapter_config.json can be read"),
        ({"adapter": 3}, "'adapter' is 3 but must be"),
        ({"shadow": 3}, "'shadow' is 3 but must be a section"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(made, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        parse_run(further(made, tmp_path, base=made["base"], **sections), "here")


@pytest.mark.parametrize(
    ("content", "message"), [('{"peft_type": "LORA"}', "peft_type is 'LORA'"), ("[1", "save the adapter again")]
)
def test_a_folder_that_holds_no_adapter_of_ours_is_refused(made, tmp_path, content, message):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_run({**further(made, tmp_path), "adapter": str(tmp_path)}, "here")


def test_a_classifier_goes_on_with_its_own_labels(made, tmp_path):
    def rows(name, labels):
        return write_rows(tmp_path / name, [{"text": f"{label} {n}", "label": label} for n in range(4) for label in labels])

    first = run_file(tmp_path / "first", made["base"], rows("a.jsonl", ["x", "y"]), task_type="SEQ_CLS", shadow={"r": 2})
    train(parse_run(first, "first"), quiet=True)
    adapter = str(tmp_path / "first" / "adapter")
    again = further({"adapter": adapter, "rows": rows("b.jsonl", ["y", "x"])}, tmp_path / "b")
    assert train(parse_run(again, "again"), quiet=True)["steps"] == 2
    for labels in (["x", "z"], ["x", "y", "z"]):
        other = further({"adapter": adapter, "rows": rows("c.jsonl", labels)}, tmp_path / "c")
        with pytest.raises(ConfigError, match=r"has the labels \['x', 'y'\] but the rows have "):
            train(parse_run(other, "other"), quiet=True)


def test_the_chat_template_is_the_adapter_s(made, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    data = {"chat_template": str(tmp_path / "own.jinja")}
    first = run_file(tmp_path / "first", made["base"], made["rows"], shadow=SHAPE, data=data)
    adapter = train(parse_run(first, "first"), quiet=True)["adapter"]
    again = train(parse_run(further({**made, "adapter": adapter}, tmp_path / "again"), "again"), quiet=True)["adapter"]
    templates = [load_tokenizer(name).chat_template for name in (adapter, again, made["base"])]
    assert templates[0] == templates[1] != templates[2]


def test_the_record_of_a_run_is_read_without_its_adapter(made, tmp_path):
    shutil.copytree(made["adapter"], tmp_path / "copy")
    content = further({**made, "adapter": str(tmp_path / "copy")}, tmp_path / "out")
    train(parse_run(content, "here"), quiet=True)
    recorded = read_run(tmp_path / "out" / "config.yaml")
    shutil.rmtree(tmp_path / "copy")
    assert read_run(tmp_path / "out" / "config.yaml") == recorded
    with pytest.raises(ConfigError, match=r"no adapter_config\.json can be read"):
        parse_run(content, "here")

"""Stored activations: whole runs with and without them, killed and resumed, and folders that are of something else."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import shadowpeft
from chatbase import mixed_rows, plain_rows, run_file, save_base, write_rows
from products import usual
from shadowpeft.apps.detach import save_edge
from shadowpeft.data.chat import read_file
from shadowpeft.data.padding import pad_inputs
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError, UnsupportedModelError
from shadowpeft.hf.layer import adapted_base, find_hub
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train import activations
from shadowpeft.train.activations import RECORD, prepare
from shadowpeft.train.config import parse_run
from shadowpeft.train.progress import RunCallback, read_metrics
from shadowpeft.train.run import build_model, train
from tiny import adapt, base

LAYERS = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return SimpleNamespace(
        base=save_base(folder / "base", num_hidden_layers=LAYERS),
        other=save_base(folder / "other", num_hidden_layers=LAYERS, rms_norm_eps=1e-3),
        rows=write_rows(folder / "train.jsonl", plain_rows(10) + mixed_rows()),
        more=write_rows(folder / "more.jsonl", plain_rows(11) + mixed_rows()),
    )


def config(made, folder, rows=None, base=None, last=2, data=None, shadow=None, **training):
    shadow = {"r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0, "last_layers": last, **(shadow or {})}
    training = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, **training}
    content = run_file(folder, base or made.base, rows or made.rows, shadow=shadow, training=training, data=data or {})
    return parse_run(content, "the test's run")


def start(made, folder, resume=False, **options):
    return train(config(made, folder, **options), resume=resume, quiet=True)


def tensors(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def assert_close(one, two, tolerance=1e-4):
    """Steps of AdamW on gradients that differ in the last bits."""
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert float((one[name] - value).norm()) <= tolerance * float(value.norm().clamp(min=1e-3)), name


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix == ".safetensors"}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(activations, "SHARD", 100 * 32 * 4)  # 100 tokens


# --------------------------------------------------------------------------------------------------------------- runs


MORE = [{}, {"gradient_accumulation": 2, "group_by_length": False}, {"label_smoothing": 0.1}]


@pytest.mark.parametrize("extra", usual(MORE, MORE[1:2]))
def test_a_run_with_stored_activations_ends_as_one_without(made, tmp_path, extra, monkeypatch):
    plain = start(made, tmp_path / "plain", **extra)
    ran = []
    whole = activations.Activations.batch

    def counted(self, *args):
        ran.append(1)
        return whole(self, *args)

    monkeypatch.setattr(activations.Activations, "batch", counted)
    stored = start(made, tmp_path / "stored", cache_activations=True, **extra)
    assert len(ran) >= 6
    assert stored["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
    assert_close(tensors(tmp_path / "stored"), tensors(tmp_path / "plain"))
    record = json.loads((tmp_path / "stored" / "adapter" / "adapter_config.json").read_text())
    assert record["refined_layers"] == [LAYERS - 2, LAYERS - 1]
    assert "last_layers" not in record


def test_the_base_below_runs_once_a_row(made, tmp_path, monkeypatch):
    tokens, batches = [], activations.record

    def counted(base, hub, input_ids, attention_mask, **options):
        tokens.append(int(attention_mask.sum()))
        return batches(base, hub, input_ids, attention_mask, **options)

    monkeypatch.setattr(activations, "record", counted)
    start(made, tmp_path / "run", cache_activations=True, max_steps=3)
    (shard,) = contents(tmp_path / "run" / "activations")
    stored = load_file(tmp_path / "run" / "activations" / shard)
    assert list(stored) == ["base_state"]
    ends = tokens[-2:]  # two rows are compared
    assert sum(tokens) - sum(ends) == len(stored["base_state"])


def test_a_folder_that_several_runs_share(made, tmp_path, small_shards):
    folder = str(tmp_path / "shared")
    start(made, tmp_path / "one", cache_activations=folder)
    before = {p: p.stat().st_mtime_ns for p in Path(folder).iterdir()}
    assert len(before) > 3
    start(made, tmp_path / "two", cache_activations=folder, learning_rate=0.02)
    assert {p: p.stat().st_mtime_ns for p in Path(folder).iterdir()} == before
    assert not (tmp_path / "one" / "activations").exists()


def test_a_frozen_shadow_is_stored_too(made, tmp_path, capfd):
    plain = start(made, tmp_path / "plain", freeze_shadow=True, save_every=3)
    assert "rows for the shadow alone are left out" in capfd.readouterr().err
    stored = start(made, tmp_path / "stored", freeze_shadow=True, cache_activations=True)
    assert plain["train_loss"] == pytest.approx(stored["train_loss"], rel=1e-5)
    assert_close(tensors(tmp_path / "stored"), tensors(tmp_path / "plain"))
    (shard,) = (tmp_path / "stored" / "activations").glob("*.safetensors")
    assert sorted(load_file(shard)) == ["base_state", "shadow_state"]

    first = config(made, tmp_path / "x", freeze_shadow=True)
    untouched = build_model(first, load_tokenizer(made.base)).state_dict()
    shadow = {k: v for k, v in tensors(tmp_path / "plain").items() if "shadowpeft_backbone" in k}
    assert shadow
    for name, value in shadow.items():
        assert torch.equal(value, untouched[name.replace("shadowpeft_backbone.", "shadowpeft_backbone.default.")]), name


def test_the_shadow_first_and_then_the_rest(made, tmp_path):
    """The two stages of docs/last-layers.md; the second trains nothing that the edge model consists of."""
    only = write_rows(tmp_path / "only.jsonl", [{**row, "path": "shadow"} for row in plain_rows(10)])
    start(made, tmp_path / "one", rows=only)
    edge = shadowpeft.detach(shadowpeft.load(tmp_path / "one" / "adapter"))
    save_edge(edge, load_tokenizer(made.base), tmp_path / "edge")
    shadow = {"shadow_model": str(tmp_path / "edge"), "share_embeddings": True}
    before = start(made, tmp_path / "zero", shadow=shadow, freeze_shadow=True, cache_activations=True, max_steps=1)
    after = start(made, tmp_path / "two", shadow=shadow, freeze_shadow=True, cache_activations=True, max_steps=30)
    assert after["train_loss"] < before["train_loss"]
    again = shadowpeft.detach(shadowpeft.load(tmp_path / "two" / "adapter"))
    ids = torch.arange(4, 24)[None]
    assert torch.equal(again(ids).logits, edge(ids).logits)


def test_a_frozen_shadow_stays_frozen_when_the_run_is_resumed(made, tmp_path, monkeypatch):
    options = {"freeze_shadow": True, "cache_activations": True, "save_every": 3}
    start(made, tmp_path / "whole", **options)
    half = config(made, tmp_path / "half", **options)
    original = RunCallback.on_step_end

    def stop(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunCallback, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(half, quiet=True)
    train(half, resume=True, quiet=True)
    assert_close(tensors(tmp_path / "half"), tensors(tmp_path / "whole"), tolerance=0.0)


@pytest.mark.parametrize("stops_at", [None, 3, 7])
def test_the_shadow_trains_first_and_is_frozen_then(made, tmp_path, monkeypatch, capfd, stops_at):
    """4 steps of the shadow alone, 4 of the rest: its weights are those after the first four, injections are not."""
    learns = sum(row["path"] != "base" for row in read_file(made.rows))
    options = {"shadow_epochs": 1, "batch_size": learns // 4, "freeze_shadow": True, "max_steps": 8, "save_every": 1}
    weights = {}
    original = RunCallback.on_step_end

    def watch(self, args, state, control, model=None, **kwargs):
        original(self, args, state, control, model=model, **kwargs)
        weights[state.global_step] = {k: v.clone() for k, v in model.state_dict().items() if "shadowpeft_" in k}
        if state.global_step == stops_at and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    stopped = [] if stops_at else [True]
    monkeypatch.setattr(RunCallback, "on_step_end", watch)
    if stops_at:
        with pytest.raises(KeyboardInterrupt):
            start(made, tmp_path / "run", **options)
    start(made, tmp_path / "run", resume=stops_at is not None, **options)
    assert "3 rows for the shadow alone are left out once it is frozen" in capfd.readouterr().err
    assert len(weights) == 8
    alone = math.ceil(learns / (learns // 4))
    assert 3 < alone < 7
    of_shadow = [name for name in weights[8] if "shadowpeft_backbone" in name]
    assert any(not torch.equal(weights[1][name], weights[alone][name]) for name in of_shadow)
    for name, value in weights[8].items():
        assert torch.equal(value, weights[alone][name]) == (name in of_shadow), name
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run") if "learning_rate" in record]
    assert len(rates) == 8


# ------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.slow
def test_killed_while_storing_and_resumed(made, tmp_path, small_shards):
    """A process is killed after it has written two shards and begun a third; the next one keeps the two."""
    start(made, tmp_path / "whole", cache_activations=True)
    folder = tmp_path / "killed"
    run = config(made, folder, cache_activations=True)
    program = f"""
import json, os, signal
from shadowpeft.train import activations
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.config import parse_run
from shadowpeft.train.progress import RunCallback, read_metrics
from shadowpeft.train.run import build_model, train
activations.SHARD = {activations.SHARD}
write, count = activations.save_file, []
def killing(states, path):
    count.append(1)
    write(states, path)
    if len(count) == 3:
        with open(path, "r+b") as file:
            file.truncate(200)
        os.kill(os.getpid(), signal.SIGKILL)
activations.save_file = killing
train(parse_run(json.loads({json.dumps(run.model_dump_json())}), "run"), quiet=True)
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ}, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept = contents(folder / "activations")
    assert len(kept) == 2
    assert not (folder / "adapter").exists()
    train(run, resume=True, quiet=True)
    assert contents(folder / "activations") == contents(tmp_path / "whole" / "activations")
    assert not [p for p in (folder / "activations").iterdir() if p.name.startswith(".")]
    assert_close(tensors(folder), tensors(tmp_path / "whole"), tolerance=0.0)


# ------------------------------------------------------------------------------------------------ of something else


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rows": "more"}, "rows"),
        ({"base": "other"}, "configuration"),
        ({"last": 3}, "base and other first_layer"),
        ({"precision": "bfloat16"}, "precision"),
        ({"freeze_shadow": True}, "configuration and other shadow"),
    ],
    ids=["rows", "base", "layers", "precision", "shadow"],
)
def test_activations_of_something_else_are_refused(made, tmp_path, changes, named):
    folder = str(tmp_path / "activations")
    start(made, tmp_path / "one", cache_activations=folder)
    before = contents(Path(folder))
    changes = {k: getattr(made, v) if k in ("rows", "base") else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=f"stored with other .*{named}.*remove the folder"):
        start(made, tmp_path / "two", cache_activations=folder, **changes)
    assert contents(Path(folder)) == before


ROWS = [[5, 6, 7], [8, 9, 10, 11, 12], [8, 9, 10], [5, 6, 7]]


def model(**fields):
    return adapt(base(), **{"refined_layers": [2, 3], **fields})


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_one_changed_weight_below_is_another_base(tmp_path, name):
    one, two = base(), base()
    prepare(adapt(one, refined_layers=[2, 3]), ROWS, tmp_path / "a")
    with torch.no_grad():
        two.get_parameter(name).view(-1)[7] += 1e-3
    with pytest.raises(ConfigError, match="stored with other base; remove"):
        prepare(adapt(two, refined_layers=[2, 3]), ROWS, tmp_path / "a")
    with torch.no_grad():
        one.model.layers[2].mlp.up_proj.weight.view(-1)[7] += 1e-3  # above: not what was stored
    prepare(adapt(one, refined_layers=[2, 3]), ROWS, tmp_path / "a")


def test_another_attention_or_release_is_another_setting(tmp_path, monkeypatch):
    prepare(model(), ROWS, tmp_path / "a")
    eager = model()
    eager.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match=r"stored with other .*attention"):
        prepare(eager, ROWS, tmp_path / "a")
    monkeypatch.setattr(activations, "package_versions", lambda names: {"torch": "1.0"})
    with pytest.raises(ConfigError, match="stored with other versions"):
        prepare(model(), ROWS, tmp_path / "a")


def test_damaged_folders(tmp_path):
    folder = tmp_path / "a"
    prepare(model(), ROWS, folder)
    (shard,) = folder.glob("*.safetensors")
    whole = load_file(shard)
    save_file({"base_state": whole["base_state"] * 1.5}, shard)
    with pytest.raises(ConfigError, match="are not what the base computes now"):
        prepare(model(), ROWS, folder)
    save_file({"base_state": whole["base_state"][1:]}, shard)
    with pytest.raises(ConfigError, match=r"holds .* tokens instead of 11"):
        prepare(model(), ROWS, folder)
    shard.write_bytes(b"x" * 40)
    with pytest.raises(ConfigError, match=r"cannot be read.*remove it"):
        prepare(model(), ROWS, folder)
    shard.unlink()
    prepare(model(), ROWS, folder)
    assert torch.equal(load_file(shard)["base_state"], whole["base_state"])
    (folder / RECORD).write_text("[1")
    with pytest.raises(ConfigError, match="cannot be read"):
        prepare(model(), ROWS, folder)
    (folder / RECORD).unlink()
    with pytest.raises(ConfigError, match=f"has no {RECORD} but holds"):
        prepare(model(), ROWS, folder)


# ---------------------------------------------------------------------------------------------------- reading, room


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_put_together_on_either_side(tmp_path, side, monkeypatch):
    monkeypatch.setattr(activations, "SHARD", 4 * 32 * 4)
    made = model(shadow_num_hidden_layers=1)
    find_hub(made).freeze_shadow("default")
    stored = prepare(made, ROWS, tmp_path / "a", shadow=True)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == 3
    rows = [ROWS[1], ROWS[0]]
    batch = pad_inputs(rows, 0, side)
    states = stored.batch(**batch)
    assert list(states) == ["base_state", "shadow_state"]
    for i, row in enumerate(rows):
        alone = activations.record(adapted_base(made), find_hub(made), torch.tensor([row]), shadow=True)
        keep = batch["attention_mask"][i].bool()
        for name, state in alone.items():
            assert torch.allclose(states[name][i, keep], state[0], atol=1e-5), name
            assert not states[name][i, ~keep].any()


def test_a_row_that_is_not_stored(tmp_path):
    stored = prepare(model(), ROWS, tmp_path / "a")
    with pytest.raises(DataError, match="a row of 2 tokens has no stored activations"):
        stored.batch(**pad_inputs([[5, 6]], 0))


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    told = []
    prepare(model(), ROWS, tmp_path / "a", tell=told.append)
    assert len(told) == 1
    assert "11 tokens of 3 rows take 0 MB" in told[0]
    monkeypatch.setattr(activations.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(ShadowPeftError, match=r"11 tokens of 3 rows .*name a folder with more room"):
        prepare(model(), ROWS, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*.safetensors"))


def test_bases_and_settings_that_cannot_be_stored(made, tmp_path):
    with pytest.raises(UnsupportedModelError, match="drops activations out"):
        prepare(adapt(base(attention_dropout=0.1), refined_layers=[2, 3]), ROWS, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with pytest.raises(
        ConfigError, match=r"last_layers is 5 but the base has 5 layers, of which .* corrects 4; give at most 4"
    ):
        start(made, tmp_path / "run", last=5)
    with pytest.raises(ConfigError, match=r"cache_activations is set but shadow\.last_layers is not"):
        config(made, tmp_path / "run", last=None, cache_activations=True)
    with pytest.raises(ConfigError, match="frozen shadow learns nothing"):
        config(made, tmp_path / "run", freeze_shadow=True, data={"shadow_repeats": 1})
    only = write_rows(tmp_path / "only.jsonl", [{"prompt": "a", "response": "b", "path": "shadow"}])
    with pytest.raises(DataError, match="no row is for the base path"):
        start(made, tmp_path / "none", rows=only, cache_activations=True)
    with pytest.raises(DataError, match=r"every row of data.train is for the shadow alone"):
        start(made, tmp_path / "run", rows=only, freeze_shadow=True)

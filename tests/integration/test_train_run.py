"""Whole runs on a tiny base: what they leave behind, how they stop, resume and fail, and what they compute."""

import copy
import errno
import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

import shadowpeft
from chatbase import chat_tokenizer, mixed_rows, plain_rows, run_file, save_base, save_run_data, write_rows
from shadowpeft import ShadowTrainer, storage
from shadowpeft.apps.detach import save_edge
from shadowpeft.data import chat
from shadowpeft.data.robot import SKILLS
from shadowpeft.errors import BaseMismatchError, ConfigError, DataError, ShadowPeftError
from shadowpeft.presets import PRESETS
from shadowpeft.storage import temporary_name
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train import checkpoints
from shadowpeft.train import run as run_module
from shadowpeft.train.config import parse_run, read_run
from shadowpeft.train.progress import RunCallback, read_metrics
from shadowpeft.train.rows import load_run_data, read_rows
from shadowpeft.train.run import train
from tiny import adapt, adapter_config, base


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base folder and data files, shared by the runs of this module."""
    return save_run_data(tmp_path_factory.mktemp("made"))


def config(made, folder, **sections):
    return parse_run(run_file(folder, made["base"], made["train"], **sections), "the test's run")


def start(made, folder, resume=False, **sections):
    return train(config(made, folder, **sections), resume=resume, quiet=True)


def tensors(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_identical(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


# --------------------------------------------------------------------------------------------------- what a run leaves


def test_the_folder_of_a_run(made, tmp_path):
    folder = tmp_path / "run"
    summary = start(
        made,
        folder,
        data={"validation": made["validation"]},
        training={"max_steps": 8, "eval_every": 4, "save_every": 4, "keep_checkpoints": 1},
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter",
        "checkpoint-8",
        "config.yaml",
        "data.json",
        "loss.png",
        "metrics.jsonl",
        "summary.json",
        "versions.json",
    ]
    assert read_run(folder / "config.yaml").model_dump()["data"]["train"] == made["train"]
    versions = json.loads((folder / "versions.json").read_text())
    # the package of a build for CUDA does not name it
    public = [text.partition("+")[0] for text in (versions["torch"], torch.__version__)]
    assert public[0] == public[1]
    record = json.loads((folder / "data.json").read_text())
    assert record["train"]["rows"] == 16
    assert len(record["validation"]["sha256"]) == 64

    records = read_metrics(folder)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 9))
    for r in training:
        assert r["loss"] == pytest.approx(
            r["task_loss"] + PRESETS["tuned"]["auxiliary_loss_weight"] * r["shadow_loss"], rel=1e-3
        )
        assert r["tokens_per_second"] > 0
    evaluated = [r for r in records if "eval_task_loss" in r]
    assert [r["step"] for r in evaluated] == [4, 8, 8]  # every fourth step, and once more at the end
    assert all(r["eval_shadow_loss"] > 0 for r in evaluated)
    assert evaluated[1]["eval_task_loss"] < evaluated[0]["eval_task_loss"]
    assert evaluated[1]["eval_shadow_loss"] < evaluated[0]["eval_shadow_loss"]

    from matplotlib import image

    picture = image.imread(folder / "loss.png")
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.shape[0] > 300
    assert picture[..., :3].std() > 0.01  # something is drawn

    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["steps"], summary["interrupted"]) == (8, False)
    assert summary["eval_task_loss"] == evaluated[-1]["eval_task_loss"]
    card = (folder / "adapter" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert f"| attached | {summary['eval_task_loss']:.4f} |" in card
    assert f"| detached | {summary['eval_shadow_loss']:.4f} |" in card
    assert record["train"]["sha256"][:16] in card

    model = shadowpeft.load(folder / "adapter")
    own = {k for k in tensors(folder / "adapter") if "shadowpeft" in k}
    assert own == set(tensors(folder / "adapter"))  # no base weight
    assert sum(v.numel() for v in tensors(folder / "adapter").values()) == summary["trainable_parameters"]
    assert chat.render_prompt(load_tokenizer(str(folder / "adapter")), [{"role": "user", "content": "x"}])
    assert_identical(tensors(folder / "adapter"), tensors(folder / "checkpoint-8"))
    assert type(shadowpeft.detach(model)).__name__ == "LlamaForCausalLM"


def test_the_last_steps_are_logged_however_long_log_every_is(made, tmp_path):
    start(made, tmp_path / "run", training={"log_every": 100, "max_steps": 3})
    (one,) = [r for r in read_metrics(tmp_path / "run") if "task_loss" in r]
    assert one["step"] == 3
    start(made, tmp_path / "each", training={"log_every": 1, "max_steps": 3})
    each = [r["task_loss"] for r in read_metrics(tmp_path / "each") if "task_loss" in r]
    assert one["task_loss"] == pytest.approx(np.mean(each), rel=1e-5)  # the mean of the steps since the last log


def test_rows_that_are_too_long_are_told_and_not_counted(made, tmp_path, capsys):
    rows = [{"prompt": "hi", "response": "ok"}] * 5 + [{"prompt": "x" * 300, "response": "ok"}] * 7
    file = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": file, "max_length": 128, "too_long": "skip"}
    run = config(made, tmp_path / "run", data=data, training={"max_steps": 1, "batch_size": 2})
    train(run, quiet=True)
    told = "7 of 12 rows are longer than data.max_length = 128 and are left out; the longest has "
    assert told in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    assert (record["rows"], record["skipped"]["rows"], record["skipped"]["first"]) == (5, 7, f"{file}, line 6")
    assert "(5 rows, sha256" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_epochs_and_the_packaged_set(made, tmp_path):
    run = config(made, tmp_path / "run", training={"max_steps": None, "epochs": 1.0, "batch_size": 3})
    assert train(run, quiet=True)["steps"] == 6  # 17 sequences: one row has an answer for each path
    robot = config(made, tmp_path / "robot", data={"train": "robot", "max_length": 512})
    data = load_run_data(robot, load_tokenizer(made["base"]), print)
    sequences = data.training
    assert data.record["train"]["rows"] == 4447
    assert len(sequences) == 5447  # 1,000 open requests: in words for the base, [REMOTE] for the shadow
    assert data.validation
    text = chat_tokenizer().decode(sequences[0].ids)
    assert text.startswith("<|im_start|>system\nYou are a robot dog.<|im_end|>")
    kinds = {(s.base, s.shadow) for s in sequences}
    assert kinds == {(True, True), (True, False), (False, True)}
    learnt = {chat_tokenizer().decode([t for t in s.features()["shadow_labels"] if t != -100]) for s in sequences}
    assert learnt == {"", "[REMOTE]<|im_end|>", *(f"[{skill}()]<|im_end|>" for skill in SKILLS)}
    whole = config(made, tmp_path / "w", data={"train": "robot", "max_length": 512, "shadow_answers": "whole"})
    assert len(read_rows(whole.data.train, "train")) == 4447 + 9 * 47
    assert len(read_rows("robot_oos", "train", actions=True)) == 4447 + 750
    assert len(read_rows("robot_large", "train", actions=True)) == 4447 + 4760 + 1172
    assert [row.get("path") for row in read_rows("robot_large", "train")[-1172:]] == ["base"] * 1172
    handed_on = read_rows("robot_oos", "train")[-750:]
    assert all(row["shadow_response"] == f"[REMOTE] {row['response']}" for row in handed_on)


@pytest.mark.parametrize("freeze", [True, False])
def test_all_of_the_shadow_trains_in_its_own_epochs(made, tmp_path, freeze):
    """The projection is the shadow path's (Eq. 9), so it learns before the base is there, with a warm-up too."""
    shadow = {"preset": "paper", "shadow_hidden_size": 16, "share_embeddings": False}
    options = {"max_steps": 7, "shadow_epochs": 1, "batch_size": 3, "warmup": 0.3, "freeze_shadow": freeze}
    weights = []
    for rate in (1e-2, 1e-12):
        run = config(made, tmp_path / str(rate), shadow=shadow, training={**options, "learning_rate": rate})
        train(run, quiet=True)
        weights.append(tensors(tmp_path / str(rate) / "adapter"))
    for part in ("backbone", "projection"):
        names = [name for name in weights[0] if f"shadowpeft_{part}" in name]
        assert names
        assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in names) > 5e-3, part


def test_the_shadow_alone_trains_first(made, tmp_path):
    """3 epochs of 15 rows for the shadow without the base, then one of 17 for both, 3 a step."""
    options = {"max_steps": None, "epochs": 1.0, "batch_size": 3, "shadow_epochs": 3, "log_every": 1}
    run = config(made, tmp_path / "run", training=options)
    assert train(run, quiet=True)["steps"] == 15 + 6
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "shadow_loss" in line and "step" in line]
    assert [line["step"] for line in steps] == list(range(1, 22))
    assert not any("task_loss" in line for line in steps[:15])
    assert sum("task_loss" in line for line in steps[15:]) >= 4  # 13 of the 17 sequences are the base's
    assert steps[14]["shadow_loss"] < steps[0]["shadow_loss"]
    assert all(line["backbone_learning_rate"] > 0 for line in steps[:-1])
    assert not any(line["learning_rate"] for line in steps[:14])  # of all else
    assert all(line["learning_rate"] > 0 for line in steps[16:-1])
    shown = RunCallback(tmp_path, 1.0, None, True)
    assert [shown.newest(line).split()[::2] for line in steps[:1] + steps[-1:]] == [["shadow"], ["task", "shadow"]]


def test_all_but_the_backbone_begins_its_course_after_the_shadows_steps(made, tmp_path, monkeypatch):
    rates = {}

    class Watch(RunCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for group in kwargs["optimizer"].param_groups:
                rates[group["is_backbone"], state.global_step] = group["lr"]  # of the step after
            return super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(run_module, "RunCallback", Watch)
    options = {"max_steps": 25, "batch_size": 3, "shadow_epochs": 3, "backbone_lr_ratio": 0.5, "warmup": 2}
    train(config(made, tmp_path / "run", training=options), quiet=True)
    backbone, others = ([rates[kind, n] for n in range(1, 26)] for kind in (True, False))
    assert backbone[:2] == pytest.approx([0.0025, 0.005])
    assert backbone[2:] == pytest.approx([0.005 * (25 - n) / 23 for n in range(3, 26)])
    assert others[:15] == [0.0] * 15
    assert others[15:17] == pytest.approx([0.005, 0.01])
    assert others[17:] == pytest.approx([0.01 * (10 - n) / 8 for n in range(3, 11)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 15, "shadow_epochs": 3}, "max_steps is 15 but 3 epochs of the shadow alone take 15 steps"),
        ({"shadow_epochs": 1, "group_by_length": False}, "shadow_epochs is set and group_by_length is off"),
    ],
)
def test_impossible_shadow_epochs(made, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(config(made, tmp_path / "run", training={"batch_size": 3, **options}), quiet=True)


def test_a_tool_call_is_no_action(tmp_path):
    call = {"function": {"name": "Sit", "arguments": {}}}
    turns = [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    with pytest.raises(DataError, match=r"rows.jsonl, line 1 has 'tool_calls' but data.shadow_answers is 'action'"):
        read_rows(file, "train", actions=True)


def test_evaluation_costs_no_training_if_it_fails(made, tmp_path, monkeypatch):
    def fails(self, *args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(ShadowTrainer, "evaluate", fails)
    with pytest.raises(MemoryError):
        start(made, tmp_path / "run", data={"validation": made["validation"]})
    assert shadowpeft.load(tmp_path / "run" / "adapter").peft_config["default"].r == 4


# ------------------------------------------------------------------------------------------------------------ resuming

LONG = {"max_steps": 6, "save_every": 1, "keep_checkpoints": 9, "gradient_accumulation": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    """Six steps, three an epoch."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    start(made, folder, training=LONG, data={"validation": made["validation"]})
    return folder


def cut(undisturbed, tmp_path, at):
    """A copy of the folder as a kill after the checkpoint of step ``at`` leaves it."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for name in ("adapter", "summary.json", "loss.png", *(f"checkpoint-{s}" for s in range(1, 7) if s > at)):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 6, "lo')  # killed in the middle of a line
    (folder / temporary_name() / f"checkpoint-{at + 1}").mkdir(parents=True)  # and in the middle of a checkpoint
    return folder


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_ends_as_an_undisturbed_one(made, undisturbed, tmp_path, at):
    folder = cut(undisturbed, tmp_path, at)
    summary = start(made, folder, resume=True, training=LONG, data={"validation": made["validation"]})
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "adapter"))
    assert summary["steps"] == 6

    assert losses(folder) == losses(undisturbed)


def losses(folder):
    keys = ("step", "loss", "task_loss", "shadow_loss")
    return [{k: r[k] for k in keys} for r in read_metrics(folder) if "loss" in r]


def test_a_resumed_run_without_grouping_by_length(made, tmp_path):
    options = {**LONG, "group_by_length": False}
    start(made, tmp_path / "whole", training=options)
    folder = cut(tmp_path / "whole", tmp_path, 4)
    start(made, folder, resume=True, training=options)
    assert_identical(tensors(folder / "adapter"), tensors(tmp_path / "whole" / "adapter"))
    assert losses(folder) == losses(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(made, undisturbed, tmp_path):
    folder = cut(undisturbed, tmp_path, 0)
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        start(made, folder, training=LONG, data={"validation": made["validation"]})
    start(made, folder, resume=True, training=LONG, data={"validation": made["validation"]})
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "adapter"))
    assert losses(folder) == losses(undisturbed)


def test_what_a_kill_before_the_first_step_leaves_is_no_run_yet(made, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("versions.json", "data.json", storage.LOCK):
        (tmp_path / "run" / name).write_text("half")
    (tmp_path / "run" / temporary_name()).mkdir()
    start(made, tmp_path / "run", training={"max_steps": 1})
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_finished_run_that_is_resumed_takes_no_further_step(made, undisturbed, tmp_path):
    folder = cut(undisturbed, tmp_path, 6)
    summary = start(made, folder, resume=True, training=LONG, data={"validation": made["validation"]})
    assert summary["steps"] == 6
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "adapter"))
    before, after = (json.loads((f / "summary.json").read_text()) for f in (undisturbed, folder))
    assert after["train_loss"] == before["train_loss"]  # of the whole run, not of what came after the kill
    assert len(read_metrics(folder)) == len(read_metrics(undisturbed))


@pytest.mark.parametrize("at", [0, 4, 6])
def test_the_seconds_of_a_run_are_those_of_all_its_sessions(made, undisturbed, tmp_path, at):
    folder = cut(undisturbed, tmp_path, at)
    records = read_metrics(folder)
    assert [r["seconds"] for r in records if "loss" in r] == sorted(r["seconds"] for r in records if "loss" in r)
    longer = [{**r, "seconds": r["seconds"] + 1000} if "seconds" in r else r for r in records]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in longer))
    summary = start(made, folder, resume=True, training=LONG, data={"validation": made["validation"]})
    assert 1000 < summary["seconds"] < 1600
    again = read_metrics(folder)[-2]
    assert again["seconds"] > 1000  # for the session that follows


def test_a_checkpoint_is_written_over_without_a_moment_in_which_half_of_it_is_left(
    made, undisturbed, tmp_path, monkeypatch
):
    """The older one is renamed before it is deleted; a deletion never happens under a checkpoint's name."""
    deleted = []
    stock = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **more: (deleted.append(Path(path).name), stock(path, **more)))
    start(made, tmp_path / "run", training={**LONG, "keep_checkpoints": 1})
    assert len(deleted) > 5
    assert [name for name in deleted if not storage.is_temporary(name)] == []
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-6"]


def test_a_run_folder_has_one_writer(made, tmp_path):
    """Also where the second run looks before the first has written anything."""
    with storage.exclusive(tmp_path / "run"), pytest.raises(ConfigError, match="another process is writing to"):
        start(made, tmp_path / "run", training={"max_steps": 1})
    start(made, tmp_path / "run", training={"max_steps": 1})
    assert not list((tmp_path / "run").glob(".shadowpeft-*"))


def test_settings_that_change_nothing_may_change(made, undisturbed, tmp_path):
    folder = cut(undisturbed, tmp_path, 4)
    options = {**LONG, "log_every": 2, "save_every": 3}
    start(made, folder, resume=True, training=options, data={"validation": made["validation"]})
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "adapter"))


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("shadow", {"r": 8}, "shadow.r"),
        ("training", {"learning_rate": 0.5}, "training.learning_rate"),
        ("training", {"max_steps": 60}, "training.max_steps"),
        ("data", {"system": "new"}, "data.system"),
    ],
)
def test_resuming_with_other_settings_is_refused(made, undisturbed, section, values, named):
    sections = {"training": LONG, "data": {"validation": made["validation"]}}
    sections[section] = {**sections.get(section, {}), **values}
    with pytest.raises(ConfigError, match=rf"other settings \({named}\)"):
        start(made, undisturbed, resume=True, **sections)


def test_resuming_with_other_data_is_refused(made, undisturbed, tmp_path):
    folder = cut(undisturbed, tmp_path, 4)
    data = {"train": str(tmp_path / "train.jsonl"), "validation": made["validation"]}
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    stored["data"]["train"] = data["train"]
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    write_rows(tmp_path / "train.jsonl", plain_rows(10) + mixed_rows()[:-1])
    with pytest.raises(ConfigError, match=r"train data .* has changed"):
        start(made, folder, resume=True, training=LONG, data=data)
    assert not (folder / "adapter").exists()


def test_resuming_with_a_damaged_record_is_refused(made, undisturbed, tmp_path):
    folder = cut(undisturbed, tmp_path, 4)
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml', the record of the run to resume, cannot be read"):
        start(made, folder, resume=True, training=LONG)


def test_a_folder_that_holds_something_is_refused(made, undisturbed, tmp_path):
    before = (undisturbed / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"not empty.*--resume"):
        start(made, undisturbed)
    assert (undisturbed / "config.yaml").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty.*no checkpoint"):
        start(made, tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        start(made, tmp_path / "notes.txt")


def test_nothing_to_resume(made, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint .* to resume from"):
        start(made, tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match=r"no checkpoint .* to resume from"):
        start(made, tmp_path, resume=True)


# ------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_end(made, undisturbed, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    stock = RunCallback.on_log

    def press(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return stock(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunCallback, "on_log", press)
    folder = tmp_path / "run"
    options = {**LONG, "save_every": 5}
    summary = start(made, folder, training=options, data={"validation": made["validation"]})
    assert (summary["steps"], summary["planned_steps"], summary["interrupted"]) == (4, 6, True)
    assert "eval_task_loss" not in summary
    assert (folder / "checkpoint-4" / "optimizer.pt").is_file()
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "checkpoint-4"))
    assert signal.getsignal(signal.SIGINT) is handler

    monkeypatch.undo()
    summary = start(made, folder, resume=True, training=options, data={"validation": made["validation"]})
    assert not summary["interrupted"]
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "adapter"))


def test_a_second_ctrl_c_stops_at_once(made, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)

    def press_twice(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunCallback, "on_log", press_twice)
    with pytest.raises(KeyboardInterrupt):
        start(made, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler  # given back although the run ended with an error


# ----------------------------------------------------------------------------------------------------------- full disk


def full_disk(monkeypatch, module, name, after):
    """``module.name`` raises what a full disk raises, from call ``after`` on."""
    stock, calls = getattr(module, name), []

    def write(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, name, write)


@pytest.mark.parametrize("what", ["optimiser", "sync"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(made, undisturbed, tmp_path, monkeypatch, what):
    folder = tmp_path / "run"
    if what == "optimiser":  # torch.save writes optimiser, scheduler, scaler, RNG state and arguments
        stock = torch.save

        def save(content, file, *args, **kwargs):
            if "checkpoint-4" in str(file) and "optimizer" in str(file):
                raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
            return stock(content, file, *args, **kwargs)

        monkeypatch.setattr(torch, "save", save)
    else:
        full_disk(monkeypatch, checkpoints, "sync_tree", after=1)
    options = {**LONG, "save_every": 2}
    with pytest.raises(ShadowPeftError, match=r"checkpoint-4 could not be written .* untouched") as caught:
        start(made, folder, training=options, data={"validation": made["validation"]})
    assert "\n" not in str(caught.value)
    assert [p.name for p in folder.iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]
    monkeypatch.undo()
    start(made, folder, resume=True, training=LONG, data={"validation": made["validation"]})
    assert_identical(tensors(folder / "adapter"), tensors(undisturbed / "adapter"))


ELSEWHERE = [
    RuntimeError("Some tensors share memory, this will lead to duplicate memory on disk"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", ELSEWHERE, ids=["shared", "memory", "cuda"])
def test_what_is_no_failure_to_write_is_not_called_one(tmp_path, error):
    def fail(*args, **kwargs):
        raise error

    with pytest.raises(type(error)) as caught, storage.written_whole(tmp_path / "kept"):
        fail()
    assert caught.value is error
    with pytest.raises(type(error)) as caught, checkpoints.WholeCheckpoints()._all_or_none("checkpoint-2", tmp_path):
        fail()
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        save_edge(SimpleNamespace(save_pretrained=fail, can_generate=lambda: False), None, tmp_path / "edge")
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_torch_save_is_called_one(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    said = pytest.raises(ShadowPeftError, match=r"could not be written .*inline_container")
    with said, storage.written_whole(tmp_path / "kept"):
        torch.save({"weight": torch.zeros(100_000)}, "/dev/full")


@pytest.mark.parametrize("moment", ["tensors", "sync", "rename"])
def test_a_full_disk_leaves_the_previous_adapter_whole(made, undisturbed, tmp_path, monkeypatch, moment):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    before = {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
    model = shadowpeft.load(folder / "adapter")
    arguments = (
        model,
        chat_tokenizer(),
        folder / "adapter",
        read_run(folder / "config.yaml"),
        json.loads((folder / "summary.json").read_text()),
        json.loads((folder / "data.json").read_text()),
    )
    if moment == "tensors":  # a real failure: no file may grow beyond 8 KiB, and safetensors raises an error of its own
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            with pytest.raises(ShadowPeftError, match=r"adapter could not be written .* untouched") as caught:
                run_module.save_adapter(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        if moment == "sync":
            full_disk(monkeypatch, storage, "sync_tree", after=0)
        else:  # the old one is moved aside, then the new one cannot take its place
            stock = os.rename

            def rename(source, target):
                if Path(source).name == "adapter" and storage.is_temporary(Path(source).parent.name):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return stock(source, target)

            monkeypatch.setattr(os, "rename", rename)
        with pytest.raises(ShadowPeftError, match=r"adapter could not be written .* untouched") as caught:
            run_module.save_adapter(*arguments)
    assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()} == before
    assert not [p.name for p in folder.iterdir() if p.name.startswith(".shadowpeft-")]


# ------------------------------------------------------------------------------------------------- refused before training


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"base": "no/such-base"}, ConfigError, "tokenizer of 'no/such-base' could not be loaded"),
        ({"data": {"train": "nothing.jsonl"}}, DataError, "does not exist"),
        ({"data": {"max_length": 20}}, DataError, "data.max_length is 20"),
        ({"shadow": {"shadow_num_attention_heads": 3}}, ConfigError, "does not divide"),
        ({"training": {"report_to": ["wandb"]}}, ConfigError, r"wandb, which is not installed; run: pip install"),
    ],
)
def test_a_run_that_cannot_be_leaves_no_folder(made, tmp_path, monkeypatch, sections, error, message):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    with pytest.raises(error, match=message):
        start(made, tmp_path / "run", **sections)
    assert not (tmp_path / "run").exists()


def test_rows_longer_than_the_base_reads(made, tmp_path):
    rows = write_rows(tmp_path / "long.jsonl", [{"prompt": "hi", "response": "x" * 250}])
    with pytest.raises(DataError, match=r"the base reads, which is 256 .*; lower data\.max_length to 256"):
        start(made, tmp_path / "run", data={"train": rows, "max_length": 512})


def test_a_tokenizer_without_pad_and_end(tmp_path):
    base_folder = save_base(tmp_path / "base")
    chat_tokenizer(eos=None, pad=None).save_pretrained(base_folder)
    with pytest.raises(ConfigError, match="neither a pad nor an eos token"):
        load_tokenizer(base_folder)


def test_an_adapter_of_another_base_is_refused(made, undisturbed, tmp_path):
    other = save_base(tmp_path / "other", hidden_size=48, num_attention_heads=4)
    with pytest.raises(BaseMismatchError):
        shadowpeft.load(undisturbed / "adapter", other)


# ------------------------------------------------------------------------------------------------- what a run computes


def test_bfloat16_base(made, tmp_path):
    summary = start(made, tmp_path / "run", training={"precision": "bfloat16"}, data={"validation": made["validation"]})
    losses = [r["task_loss"] for r in read_metrics(tmp_path / "run") if "task_loss" in r]
    assert losses[-1] < losses[0]
    assert all(v.dtype == torch.float32 for v in tensors(tmp_path / "run" / "adapter").values())
    plain = start(made, tmp_path / "plain", data={"validation": made["validation"]})
    # 8 bits of mantissa, four steps: the losses agree to a few per cent
    assert summary["eval_task_loss"] == pytest.approx(plain["eval_task_loss"], rel=0.05)
    assert summary["eval_shadow_loss"] == pytest.approx(plain["eval_shadow_loss"], rel=0.05)


def test_gradient_checkpointing_changes_nothing(made, tmp_path):
    for name, on in (("on", True), ("off", False)):
        # without checkpoints what all rows begin with runs once, and draws its dropout once
        start(made, tmp_path / name, training={"gradient_checkpointing": on}, shadow={"shadow_dropout": 0.0})
    for key, value in tensors(tmp_path / "off" / "adapter").items():
        # what is recomputed is added up in another order
        torch.testing.assert_close(tensors(tmp_path / "on" / "adapter")[key], value, rtol=1e-4, atol=1e-5)


def test_tensorboard(made, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(made, tmp_path / "run", training={"report_to": ["tensorboard"]})
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"train/task_loss", "train/shadow_loss"} <= set(events.Tags()["scalars"])
    logged = [r["task_loss"] for r in read_metrics(tmp_path / "run") if "task_loss" in r]
    assert [s.value for s in events.Scalars("train/task_loss")] == pytest.approx(logged)


def test_label_smoothing_is_for_training_alone(made, tmp_path):
    summary = start(
        made,
        tmp_path / "run",
        training={"label_smoothing": 0.3, "max_steps": 1},
        data={"validation": made["validation"]},
    )
    model = shadowpeft.load(tmp_path / "run" / "adapter")
    batch = whole(encoded(mixed_rows()))
    with torch.no_grad():
        out = model(**batch)
    assert summary["eval_task_loss"] == pytest.approx(float(out.task_loss), rel=1e-5)
    assert summary["eval_shadow_loss"] == pytest.approx(float(out.shadow_loss), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- the trainer


class KeepGradients(TrainerCallback):
    """Copies the gradients just before the optimiser uses them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
        }


def encoded(rows):
    checked = [chat.check_row(row, "row") for row in rows]
    return [s.features() for s in chat.encode(checked, chat_tokenizer(), max_length=128)]


def whole(features):
    return chat.ChatCollator(0)(features)


def arguments(folder, **more):
    plain = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**plain, **more})


def adapted(**fields):
    return adapt(base("llama", vocab_size=260), **{"auxiliary_loss_weight": 0.7, **fields})


def trainer_of(model, folder, rows, cls=ShadowTrainer, options=None, **more):
    keep = KeepGradients()
    made = cls(
        model=model,
        args=arguments(folder, **more),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=chat.ChatCollator(0),
        callbacks=[keep],
        **(options or {}),
    )
    return made, keep


def joint_gradients(model, features):
    """Gradients of the joint loss of the whole, unsplit batch, taken by the model alone."""
    model = copy.deepcopy(model).train()
    model(**whole(features)).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def count_base_rows(model):
    """Rows that each decoder layer of the base reads, one entry a call."""
    seen = []
    layers = model.get_base_model().model.layers
    layers[0].register_forward_hook(lambda module, args, kwargs, out: seen.append(args[0].shape[0]), with_kwargs=True)
    return seen


@pytest.mark.parametrize(("micro", "rows_per_call"), [(8, [5]), (4, None), (1, [1] * 5)])
@pytest.mark.parametrize("kind", [{}, {"shadow_num_hidden_layers": 2}])
def test_micro_batches_are_the_unsplit_batch_and_shadow_rows_never_run_the_base(tmp_path, micro, rows_per_call, kind):
    rows = encoded([*mixed_rows(), {"prompt": "roll", "response": "[Wallow()]"}])
    model = adapted(**kind)
    expected = joint_gradients(model, rows)
    seen = count_base_rows(model)
    trainer, keep = trainer_of(
        model, tmp_path, rows, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro
    )
    trainer.train()
    assert sum(seen) == 5  # eight sequences, three of them for the shadow alone
    assert rows_per_call is None or seen == rows_per_call
    assert keep.gradients.keys() == expected.keys()
    for name, value in expected.items():
        # another order of summation over rows and shorter padding: float32 rounding
        torch.testing.assert_close(keep.gradients[name], value, rtol=1e-4, atol=1e-6)


def test_a_batch_for_the_shadow_alone(tmp_path):
    rows = encoded([row for row in mixed_rows() if row.get("path") == "shadow"])
    model = adapted()
    expected = joint_gradients(model, rows)
    seen = count_base_rows(model)
    trainer, keep = trainer_of(model, tmp_path, rows, logging_strategy="steps", logging_steps=1)
    trainer.train()
    assert seen == []
    learned = {n for n in expected if float(expected[n].abs().max()) > 0}
    assert learned
    assert all("shadowpeft_backbone" in n for n in learned)
    for name in learned:
        torch.testing.assert_close(keep.gradients[name], expected[name], rtol=1e-4, atol=1e-6)
    (logged,) = [r for r in trainer.state.log_history if "shadow_loss" in r]
    assert logged["loss"] == pytest.approx(0.7 * logged["shadow_loss"], rel=1e-3)


def test_lambda_zero_still_reports_the_shadows_loss(tmp_path):
    rows = encoded(mixed_rows())
    model = adapted(auxiliary_loss_weight=0.0)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(**whole(rows)).shadow_loss
    trainer, _ = trainer_of(model, tmp_path, rows, logging_strategy="steps", logging_steps=1)
    trainer.train()
    (logged,) = [r for r in trainer.state.log_history if "shadow_loss" in r]
    assert logged["shadow_loss"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("head", [{"task_type": "SEQ_CLS"}, {"own_shadow_head": True}], ids=["classes", "own"])
def test_the_shadows_head_is_of_its_own_epochs(tmp_path, head):
    task = head.get("task_type", "CAUSAL_LM")
    model = adapt(base(task=task), **head).train()
    trainer = ShadowTrainer(model, TrainingArguments(str(tmp_path), report_to=[]), train_dataset=[], shadow_steps=3)
    own = {id(p) for g in trainer.create_optimizer().param_groups if g["is_shadow"] for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in own}
    parts = ("shadowpeft_backbone", "shadowpeft_projection", "shadowpeft_head")
    assert names == {n for n, p in model.named_parameters() if p.requires_grad and any(part in n for part in parts)}
    assert any("shadowpeft_head" in n for n in names)


def test_the_backbones_learning_rate(tmp_path):
    model = adapted()
    trainer, _ = trainer_of(
        model,
        tmp_path,
        encoded(mixed_rows()),
        options={"backbone_lr_ratio": 0.05},
        learning_rate=0.02,
        weight_decay=0.1,
    )
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable)
    for name, parameter in trainable.items():
        expected = 0.02 * 0.05 if "shadowpeft_backbone." in name else 0.02
        assert rates[id(parameter)] == pytest.approx(expected), name
    before = {n: p.detach().clone() for n, p in trainable.items()}
    trainer.train()
    moved = {n: p.detach() - before[n] for n, p in trainable.items()}
    name = next(n for n in moved if "shadowpeft_backbone" in n and "up_proj" in n)
    plain, keep = trainer_of(adapted(), tmp_path, encoded(mixed_rows()), learning_rate=0.02)
    plain.train()
    assert float(moved[name].norm()) > 0
    torch.testing.assert_close(
        moved[name], -0.02 * 0.05 * (keep.gradients[name] + 0.1 * before[name]), rtol=1e-2, atol=1e-7
    )


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_ratio(tmp_path, ratio):
    with pytest.raises(ConfigError, match="backbone_lr_ratio"):
        trainer_of(adapted(), tmp_path, encoded(mixed_rows()), options={"backbone_lr_ratio": ratio})


def test_evaluation_reports_each_path_without_lambda(tmp_path):
    rows = encoded(mixed_rows())
    model = adapted()
    with torch.no_grad():
        out = copy.deepcopy(model).eval()(**whole(rows))
    for size in (8, 3, 1):  # however the rows fall into batches, some of them without a target for one path
        trainer, _ = trainer_of(model, tmp_path, rows, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        assert metrics["eval_task_loss"] == pytest.approx(float(out.task_loss), rel=1e-5)
        assert metrics["eval_shadow_loss"] == pytest.approx(float(out.shadow_loss), rel=1e-5)
        if size == 8:
            assert metrics["eval_loss"] == pytest.approx(float(out.task_loss), rel=1e-5)


def test_predictions_stay_a_plain_array(tmp_path):
    rows = encoded(plain_rows(4))
    shapes = {}

    def metrics(prediction):
        shapes["predictions"] = prediction.predictions.shape
        return {"right": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    trainer, _ = trainer_of(adapted(), tmp_path, rows, options={"compute_metrics": metrics})
    found = trainer.evaluate()
    assert shapes["predictions"] == (4, max(len(r["input_ids"]) for r in rows), 260)
    assert 0 <= found["eval_right"] <= 1
    assert isinstance(trainer.predict(rows).predictions, np.ndarray)


@pytest.mark.parametrize("names", [["default"], ["robot"], ["default", "robot"], ["robot", "dog"]], ids="+".join)
def test_the_best_checkpoint_keeps_its_name_and_is_loaded(tmp_path, names):
    """Also of adapters that are not called ``default``; the last of ``names`` trains."""
    rows = encoded(plain_rows(8))
    model = get_peft_model(base("llama", vocab_size=260), adapter_config(auxiliary_loss_weight=0.7), names[0])
    for name in names[1:]:
        model.add_adapter(name, adapter_config(auxiliary_loss_weight=0.7))
        model.set_adapter(name)
    trainer, _ = trainer_of(
        model,
        tmp_path,
        rows,
        max_steps=4,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    losses = iter([3.0, 1.0, 2.0, 4.0])  # the second checkpoint is the best, the last one stays too
    stock = trainer.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        output = stock(*args, **kwargs)
        output.metrics["eval_loss"] = next(losses)
        return output

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best == tmp_path / "checkpoint-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    stored = json.loads((best / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(best)
    own = trainer.model.state_dict()
    for name in names:
        part = Path(name if name != "default" else "")
        kept, last = (tensors(tmp_path / f"checkpoint-{n}" / part) for n in (2, 4))
        kept = {key: value for key, value in kept.items() if "shadowpeft_injection" in key}
        assert kept
        for key, value in kept.items():
            container, _, rest = key.partition("shadowpeft_injection.")
            assert torch.equal(own[f"{container}shadowpeft_injection.{name}.{rest}"], value)
        assert any(not torch.equal(value, last[key]) for key, value in kept.items()) is (name == names[-1])


def test_rows_that_are_learnt_and_judged_are_counted(made, tmp_path, capsys):
    both = write_rows(tmp_path / "both.jsonl", [*plain_rows(4)[2:], {"prompt": "new", "response": "one"}])
    start(made, tmp_path / "run", data={"validation": both})
    assert "data.validation: 2 of 3 rows are among those of data.train" in " ".join(capsys.readouterr().err.split())

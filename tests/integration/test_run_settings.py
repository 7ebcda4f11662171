"""What a run file says of its optimisation: when it stops, which adapter it keeps, whose optimiser, noise, seeds, time."""

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from experiments.spec import NEWEST
from safetensors.torch import load_file

from chatbase import run_file, save_run_data, write_rows
from shadowpeft.errors import ConfigError
from shadowpeft.train import optimisers, speed
from shadowpeft.train import run as run_module
from shadowpeft.train.arguments import training_arguments
from shadowpeft.train.config import parse_run
from shadowpeft.train.optimisers import MuonWithAdamW, of_matrices
from shadowpeft.train.progress import read_metrics
from shadowpeft.train.run import train
from shadowpeft.train.sections import TrainingSection


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_run_data(tmp_path_factory.mktemp("made"))


def start(made, folder, resume=False, console=None, **sections):
    run = parse_run(run_file(folder, made["base"], made["train"], **sections), "the test's run")
    return train(run, resume=resume, quiet=True, console=console)


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def losses(folder, key="eval_task_loss"):
    return [record[key] for record in read_metrics(folder) if key in record]


# ------------------------------------------------------------------------------------------------ stopping, the best one

DIVERGING = {"max_steps": 12, "eval_every": 2, "learning_rate": 3.0, "scheduler": "constant", "warmup": 0.0}
"""A rate at which the validation loss soon goes up."""


@pytest.mark.parametrize(("path", "key"), [("attached", "eval_task_loss"), ("detached", "eval_shadow_loss")])
def test_the_best_adapter_by_either_path_and_an_early_stop(made, tmp_path, path, key):
    folder = tmp_path / "run"
    # room for any order of so wild losses, which rounding decides
    settings = {**DIVERGING, "max_steps": 60, "patience": 2, "load_best": True, "best_by": path}
    summary = start(made, folder, data={"validation": made["validation"]}, training=settings)
    values = losses(folder, key)
    during = values[:-1]  # the last is the final evaluation, of the adapter that is kept
    best = during.index(min(during))
    assert summary["stopped_early"] is True
    assert summary["interrupted"] is False
    assert summary["steps"] == 2 * len(during) < 60
    assert len(during) - 1 - best == 2  # two evaluations after the best one
    assert summary["best_step"] == 2 * (best + 1)
    assert summary[key] == pytest.approx(during[best], rel=1e-5)
    kept = load_file(folder / f"checkpoint-{summary['best_step']}" / "adapter_model.safetensors")
    assert same(weights(folder), kept)


def test_patience_counts_over_an_interruption(made, tmp_path):
    settings = {**DIVERGING, "save_every": 2, "keep_checkpoints": 9}
    data = {"validation": made["validation"]}
    whole = start(made, tmp_path / "whole", data=data, training={**settings, "patience": 2})
    assert whole["stopped_early"]
    stops_at = whole["steps"]
    folder = tmp_path / "cut"
    start(made, folder, data=data, training=settings)
    for name in range(stops_at, 13, 2):  # as if it had been killed one evaluation before the end
        for file in sorted((folder / f"checkpoint-{name}").glob("*")):
            file.unlink()
        (folder / f"checkpoint-{name}").rmdir()
    again = start(made, folder, resume=True, data=data, training={**settings, "patience": 2})
    assert (again["steps"], again["stopped_early"]) == (stops_at, True)


def test_an_improving_run_is_not_stopped(made, tmp_path):
    summary = start(
        made,
        tmp_path / "run",
        data={"validation": made["validation"]},
        training={"max_steps": 6, "eval_every": 2, "patience": 1, "load_best": True},
    )
    assert (summary["steps"], summary["stopped_early"], summary["best_step"]) == (6, False, 6)


# ------------------------------------------------------------------------------------------------------------ optimisers


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("adamw", marks=pytest.mark.slow),  # every other run has it
        "adamw_bnb_8bit",
        pytest.param("adamw_torch_8bit", marks=pytest.mark.slow),  # torchao compiles its step
        "adafactor",
        "muon",
    ],
)
def test_optimisers_by_name_train_and_resume(made, tmp_path, name):
    package = {"adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    settings = {"optimizer": name, "max_steps": 6, "save_every": 3, "backbone_lr_ratio": 0.5}
    start(made, tmp_path / "whole", training=settings)
    task = losses(tmp_path / "whole", "task_loss")
    assert task[-1] < task[0]
    cut = tmp_path / "cut"
    start(made, cut, training=settings)
    for file in (cut / "checkpoint-6").iterdir():
        file.unlink()
    (cut / "checkpoint-6").rmdir()
    start(made, cut, resume=True, training=settings)
    assert same(weights(cut), weights(tmp_path / "whole"))


def test_muon_has_the_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(5, 4), "layer": torch.nn.Linear(4, 4), "lm_head": torch.nn.Linear(4, 5, bias=False)}
    )
    assert of_matrices(model) == {id(model["layer"].weight)}
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    made = MuonWithAdamW(groups, 1e-2, 0.0, of_matrices(model))
    assert [(g["muon"], len(g["params"]), g["weight_decay"]) for g in made.param_groups] == [(True, 1, 0.1), (False, 3, 0.1)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model["lm_head"](model["layer"](model["embed"](torch.arange(5)))).square().sum().backward()
    alone = [before["layer.weight"].clone().requires_grad_()]
    alone[0].grad = model["layer"].weight.grad.clone()
    other = [before["layer.bias"].clone().requires_grad_()]
    other[0].grad = model["layer"].bias.grad.clone()
    made.step()
    torch.optim.Muon(alone, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    torch.optim.AdamW(other, lr=1e-2, weight_decay=0.1).step()
    assert torch.equal(model["layer"].weight, alone[0])
    assert torch.equal(model["layer"].bias, other[0])


def test_an_optimiser_that_is_not_installed_is_refused_by_name(made, tmp_path, monkeypatch):
    monkeypatch.setattr(optimisers.importlib.util, "find_spec", lambda name: None)
    for name, package in (("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")):
        with pytest.raises(ConfigError, match=f"{name}, which needs {package}, and that is not installed"):
            start(made, tmp_path / "run", training={"optimizer": name})
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"which torch has from 2\.9 on"):
        start(made, tmp_path / "run", training={"optimizer": "muon"})
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------- noise, compiling, seeds


def test_neftune_adds_noise_in_training_alone(made, tmp_path):
    data = {"validation": made["validation"]}
    for name, more in (("plain", {}), ("noisy", {"neftune": 5.0}), ("again", {"neftune": 5.0})):
        start(made, tmp_path / name, data=data, training={"learning_rate": 1e-12, **more})
    plain, noisy, again = (losses(tmp_path / name, "task_loss") for name in ("plain", "noisy", "again"))
    assert noisy == again
    assert noisy[0] != pytest.approx(plain[0], rel=1e-4)
    assert losses(tmp_path / "noisy")[-1] == pytest.approx(losses(tmp_path / "plain")[-1], rel=1e-5)


@pytest.mark.slow
def test_a_compiled_run_computes_the_same(made, tmp_path, monkeypatch):
    still = {"shadow": {"shadow_dropout": 0.0}}  # a compiled model draws dropout in another order
    start(made, tmp_path / "plain", **still)
    known = run_module.training_arguments

    def without_a_compiler(*args, **kwargs):
        made = known(*args, **kwargs)
        assert made.torch_compile
        made.torch_compile_backend = "eager"
        return made

    monkeypatch.setattr(run_module, "training_arguments", without_a_compiler)
    start(made, tmp_path / "compiled", training={"compile": True}, **still)
    assert losses(tmp_path / "compiled", "task_loss") == pytest.approx(losses(tmp_path / "plain", "task_loss"), rel=1e-4)


@pytest.mark.parametrize("grouped", [True, False])
def test_the_seed_of_the_order_is_apart_from_that_of_the_weights(made, tmp_path, grouped):
    still = {"shadow": {"shadow_dropout": 0.0, "shadow_init": "random"}}

    def first_loss(name, seed, data_seed):
        settings = {"seed": seed, "data_seed": data_seed, "max_steps": 1, "group_by_length": grouped}
        start(made, tmp_path / name, training=settings, **still)
        return losses(tmp_path / name, "task_loss"), weights(tmp_path / name)

    rows, new = first_loss("a", 1, 7)
    same_rows, other = first_loss("b", 2, 7)
    other_rows, again = first_loss("c", 1, 8)
    assert rows == same_rows  # an untrained adapter is the base, so the first loss is that of the rows
    assert rows != other_rows
    name = next(name for name in new if "injection" in name and "down" in name)
    assert torch.allclose(new[name], again[name], atol=0.05)  # one step away from the same start
    assert not torch.allclose(new[name], other[name], atol=0.05)


# ------------------------------------------------------------------------------------------------------------------- time


def test_the_steps_that_fit_into_a_time(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "ENOUGH", 0.2)
    settings = {"max_steps": None, "target_minutes": 0.04, "scheduler": "linear", "save_every": 5}
    summary = start(made, tmp_path / "run", training=settings)
    assert summary["steps"] == summary["planned_steps"] > 5
    assert summary["seconds"] < 10 * 2.4  # other work may share the processor
    rates = losses(tmp_path / "run", "learning_rate")
    assert rates[-1] < 0.1 * max(rates)  # the schedule ends where the run ends
    assert "steps fit into 0.04 minutes" in capsys.readouterr().err

    counted = start(made, tmp_path / "counted", training={"max_steps": summary["steps"], "save_every": 5})
    assert counted["steps"] == summary["steps"]
    assert same(weights(tmp_path / "run"), weights(tmp_path / "counted"))  # the trial leaves nothing behind


def test_a_timed_run_resumes_with_the_steps_it_had_chosen(made, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ENOUGH", 0.1)
    settings = {"max_steps": None, "target_minutes": 0.02, "save_every": 4, "keep_checkpoints": 99}
    first = start(made, tmp_path / "run", training=settings)
    last = max(int(p.name.partition("-")[2]) for p in (tmp_path / "run").glob("checkpoint-*"))
    assert json.loads((tmp_path / "run" / f"checkpoint-{last}" / "trainer_state.json").read_text())["max_steps"] == (
        first["steps"]
    )
    monkeypatch.setattr(run_module, "steps_in_time", lambda *args: pytest.fail("measured again"))
    again = start(made, tmp_path / "run", resume=True, training=settings)
    assert again["planned_steps"] == first["steps"]


def test_the_shadows_epochs_are_part_of_the_time(made, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ENOUGH", 0.1)
    settings = {"max_steps": None, "target_minutes": 0.03, "shadow_epochs": 2}
    summary = start(made, tmp_path / "run", training=settings)
    assert summary["steps"] > 2 * 15 // 4
    with pytest.raises(ConfigError, match=r"epochs of the shadow alone take .* minutes; raise it"):
        start(made, tmp_path / "short", training={**settings, "target_minutes": 1e-5})


# ----------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"max_steps": 4, "target_minutes": 1.0}, "max_steps and target_minutes are both set; keep one"),
        ({"patience": 2}, "training.patience is set but training.eval_every is not"),
        ({"load_best": True}, "training.load_best is set but training.eval_every is not"),
        ({"load_best": True, "eval_every": 2, "save_every": 3}, "leave save_every out"),
        ({"neftune": 5.0, "cache_activations": True}, "stored activations have no noise"),
        ({"optimizer": "adam"}, "'training.optimizer' is 'adam'"),
        (
            {"freeze_shadow": True, "eval_every": 2, "load_best": True, "best_by": "detached"},
            "training.freeze_shadow is set, so nothing trains it",
        ),
    ],
)
def test_what_cannot_be(made, tmp_path, training, message):
    with pytest.raises(ConfigError) as refused:
        start(made, tmp_path / "run", data={"validation": made["validation"]}, training=training)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("shadow", "training", "data", "message"),
    [
        (
            {"auxiliary_loss_weight": 0.0},
            {"eval_every": 2, "load_best": True, "best_by": "detached"},
            {},
            "compares the detached path (training.best_by) but shadow.auxiliary_loss_weight is 0",
        ),
        ({"auxiliary_loss_weight": 0.0}, {"shadow_epochs": 2}, {}, "training.shadow_epochs is 2 but shadow.auxiliary"),
        ({"auxiliary_loss_weight": 0.0}, {}, {"shadow_repeats": 1}, "data.shadow_repeats is 1 but shadow.auxiliary"),
    ],
)
def test_what_a_shadow_without_its_loss_cannot(made, tmp_path, shadow, training, data, message):
    with pytest.raises(ConfigError) as refused:
        start(made, tmp_path / "run", data={"validation": made["validation"], **data}, shadow=shadow, training=training)
    assert message in str(refused.value)


def test_a_run_of_one_step_has_a_rate(made, tmp_path):
    start(made, tmp_path / "run", training={"max_steps": None, "epochs": 0.01, "warmup": 0.01})
    assert losses(tmp_path / "run", "learning_rate") == [0.01]
    made_for = training_arguments(TrainingSection(warmup=0.01), tmp_path, evaluates=False)
    assert [made_for.get_warmup_steps(steps) for steps in (1, 2, 100, 101)] == [0, 1, 1, 2]  # others have it as ever


def of_path(file, path):
    return write_rows(file, [{"prompt": f"say {i}", "response": "ok", "path": path} for i in range(4)])


@pytest.mark.parametrize("key", ["load_best", "patience"])
@pytest.mark.parametrize(("best_by", "path"), [("attached", "shadow"), ("detached", "base")])
def test_an_evaluation_without_targets_is_not_compared(made, tmp_path, key, best_by, path):
    file = of_path(tmp_path / "rows.jsonl", path)
    settings = {"eval_every": 2, key: True if key == "load_best" else 1, "best_by": best_by}
    for part, data in (("validation", {"validation": file}), ("train", {"train": file, "validation": made["validation"]})):
        with pytest.raises(ConfigError) as refused:
            start(made, tmp_path / "run", data=data, training=settings)
        assert f"training.{key} compares the {best_by} path" in str(refused.value)
        assert f"every row of data.{part} has path: {path}" in str(refused.value)
        assert not (tmp_path / "run").exists()


def test_a_path_without_targets_has_no_loss(made, tmp_path):
    data = {"validation": of_path(tmp_path / "rows.jsonl", "shadow")}
    summary = start(made, tmp_path / "run", data=data, training={"max_steps": 2, "eval_every": 1})
    assert summary["eval_shadow_loss"] > 0
    assert "eval_task_loss" not in summary
    assert losses(tmp_path / "run", "eval_shadow_loss")
    assert not losses(tmp_path / "run", "eval_task_loss")


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_rows_that_nothing_learns(made, tmp_path, task):
    rows = [{"prompt": "a", "response": "b", "text": "a" * (1 + i), "label": i, "path": "shadow"} for i in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError, match=r"auxiliary_loss_weight is 0 but every row of data\.train is for the shadow alone"):
        start(made, tmp_path / "run", task_type=task, data={"train": file}, shadow={"auxiliary_loss_weight": 0.0})


def test_a_run_that_was_started_before_these_settings_existed_resumes(made, tmp_path):
    folder = tmp_path / "run"
    settings = {"max_steps": 2, "save_every": 1}
    start(made, folder, training=settings)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["task_type"]
    for key in ("assistant_only_loss", "packing", "streaming", "shuffle_buffer"):
        del config["data"][key]
    for key in NEWEST:
        del config["training"][key]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(folder / "checkpoint-2")
    assert start(made, folder, resume=True, training=settings)["steps"] == 2
    with pytest.raises(ConfigError, match=r"started with other settings \(training\.optimizer\)"):
        start(made, folder, resume=True, training={**settings, "optimizer": "adafactor"})

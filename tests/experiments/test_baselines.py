"""Budgets are matched, and shadow, LoRA and DoRA see the same rows in the same order for the same number of steps."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from faketask import Fake
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from chatbase import chat_model, chat_tokenizer, save_base
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import answer_loss
from shadowpeft.train import baselines
from shadowpeft.train.baselines import attach, count_trainable, match_rank, shadow_parameters
from shadowpeft.train.config import TrainingSection
from shadowpeft.train.progress import read_metrics
from tiny import base

SHADOW = {"r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0}


@pytest.fixture(scope="module")
def wide():
    """Wide enough that a rank more is a small step."""
    return base("llama", hidden_size=64, num_hidden_layers=5)


# ------------------------------------------------------------------------------------------------------------- the matcher


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_the_matched_adapter_has_the_shadows_parameters_within_three_percent(method, task):
    plain = base("llama", task=task, hidden_size=64, num_hidden_layers=5)
    budget = count_trainable(attach(copy.deepcopy(plain), "shadow", SHADOW))
    assert shadow_parameters(plain, SHADOW) == budget
    config = match_rank(plain, method, budget, target_modules=["q_proj", "v_proj"])
    built = count_trainable(get_peft_model(copy.deepcopy(plain), config))
    assert abs(built / budget - 1) <= 0.03
    assert config.use_dora == (method == "dora")
    assert config.lora_alpha == 2 * config.r


@settings(max_examples=8, deadline=None)
@given(target=st.integers(min_value=1_000, max_value=300_000), dora=st.booleans())
def test_no_other_rank_is_nearer_to_the_target(target, dora):
    plain = base("llama", hidden_size=64)
    method = "dora" if dora else "lora"
    config = match_rank(plain, method, target, target_modules=["q_proj"], tolerance=1e9)

    def distance(rank):
        other = copy.deepcopy(config)
        other.r = rank
        return abs(baselines.count_adapter(plain, other) - target)

    assert distance(config.r) <= distance(config.r + 1)
    assert config.r == 1 or distance(config.r) <= distance(config.r - 1)


def test_an_impossible_budget_is_refused_with_the_nearest_rank(wide):
    per_rank = baselines.count_adapter(wide, match_rank(wide, "lora", 1, target_modules=["q_proj"], tolerance=1e9))
    with pytest.raises(ConfigError, match=rf"nearest is r = 1 with {per_rank:,} \(\+100.0%\)"):
        match_rank(wide, "lora", per_rank // 2, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"r = 1[12] with .*choose other target_modules"):
        match_rank(wide, "lora", int(11.5 * per_rank), target_modules=["q_proj"])


def test_unknown_modules_and_methods_are_refused_by_name(wide):
    with pytest.raises(ConfigError, match="none of the modules \\['nowhere'\\]"):
        match_rank(wide, "lora", 10_000, target_modules=["nowhere"])
    with pytest.raises(ConfigError, match="'prefix'"):
        match_rank(wide, "prefix", 10_000)
    with pytest.raises(ConfigError, match="got neither"):
        attach(wide, "lora", {})


def test_matching_leaves_the_base_alone(wide):
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    match_rank(wide, "dora", shadow_parameters(wide, SHADOW), target_modules=["q_proj", "v_proj"])
    after = wide.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# -------------------------------------------------------------------------------------------------------- equal conditions


@pytest.mark.parametrize("setting", [{"shadow_epochs": 1}, {"freeze_shadow": True}, {"cache_activations": True}])
def test_settings_that_it_does_not_know_are_refused(tmp_path, setting):
    (key,) = setting
    with pytest.raises(ConfigError, match=f"training.{key} is set, but"):
        baselines.train_task(None, None, None, TrainingSection(max_steps=1, **setting), tmp_path)


def trained(method, task, folder, *, seed=0, steps=5, deadline=None, lr=0.01, save_every=None, alpha=0.7):
    tokenizer = chat_tokenizer()
    if task.kind == "classify":
        plain = baselines.load_task_base(save_base(folder / "base"), task, tokenizer, seed=seed)
    else:
        plain = chat_model()
    fields = {**SHADOW, "shadow_alpha": alpha} if method == "shadow" else {"r": 2}
    model = attach(plain, method, fields, seed=seed)
    data = baselines.encode_examples(task, task.load("train"), tokenizer, max_length=128)
    section = TrainingSection(
        max_steps=steps, batch_size=4, learning_rate=lr, log_every=1, threads=1, seed=seed, save_every=save_every
    )
    return model, baselines.train_task(model, tokenizer, data, section, folder / "run", deadline=deadline, quiet=False)


@pytest.mark.parametrize("kind", ["generate", "classify"])
def test_every_method_sees_the_same_rows_in_the_same_order(kind, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    plain = baselines.TaskTrainer.training_step

    def watch(self, model, inputs, *args, **kwargs):
        seen.setdefault(current, []).append(inputs["input_ids"].clone())
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(baselines.TaskTrainer, "training_step", watch)
    summaries = {}
    for current in baselines.METHODS:
        _, summaries[current] = trained(current, Fake(kind), tmp_path / current, steps=8)
    assert len(seen["shadow"]) == 8  # 24 rows in batches of 4: more than one epoch
    for method in ("lora", "dora"):
        assert all(torch.equal(a, b) for a, b in zip(seen["shadow"], seen[method], strict=True))
        assert summaries[method]["order"] == summaries["shadow"]["order"]
    _, other = trained("lora", Fake(kind), tmp_path / "other", seed=1, steps=1)
    assert other["order"] != summaries["lora"]["order"]


@pytest.mark.parametrize("method", baselines.METHODS)
def test_training_lowers_the_loss_and_moves_the_adapter_alone(method, tmp_path):
    before = {n: p.clone() for n, p in chat_model().named_parameters()}
    data = baselines.encode_examples(Fake("generate"), Fake("generate").load("train"), chat_tokenizer(), max_length=128)
    model, summary = trained(method, Fake("generate"), tmp_path, steps=12, lr=0.003)
    assert summary["finished"]
    assert summary["steps"] == 12
    after, start = (answer_loss(m, data.sequences, 0)["loss"] for m in (model, chat_model()))
    assert after < start
    assert ("shadow_loss" in summary) == (method == "shadow")
    inner = dict(model.get_base_model().named_parameters())
    for name, value in before.items():
        now = inner.get(name, inner.get(name.replace("_proj.weight", "_proj.base_layer.weight")))
        assert torch.equal(value, now), name


def history(folder):
    return [r for r in read_metrics(folder / "run") if "task_loss" in r]


def test_the_head_of_a_classifier_starts_equal_for_every_method(tmp_path):
    task, where = Fake("classify"), save_base(tmp_path)
    heads = []
    for method in baselines.METHODS:
        plain = baselines.load_task_base(where, task, chat_tokenizer(), seed=3)
        model = attach(plain, method, SHADOW if method == "shadow" else {"r": 2}, seed=3)
        heads.append(next(p for n, p in model.named_parameters() if "score" in n and p.requires_grad))
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_rows_for_the_shadow_alone_leave_lora_at_rest(tmp_path):
    class Shadow(Fake):
        def rows(self, split):
            made, origin = super().rows(split)
            return [row for row in made if row["path"] == "shadow"], origin

    model, summary = trained("lora", Shadow("generate", paths=True), tmp_path, steps=3)
    assert summary["train_loss"] == 0.0
    assert all(bool((p == 0).all()) for n, p in model.named_parameters() if "lora_B" in n)


def test_both_methods_learn_a_row_of_the_base_path(tmp_path):
    _, ours = trained("shadow", Fake("generate", paths=True), tmp_path / "a", steps=4)
    _, theirs = trained("lora", Fake("generate", paths=True), tmp_path / "b", steps=4)
    assert ours["order"] == theirs["order"]
    # both start from the base's own logits, so the first step's task loss is the same number (dropout off, float32 noise);
    # the shadow's rows are batched apart from those it learns alone, LoRA's are not
    first = [history(tmp_path / d)[0]["task_loss"] for d in "ab"]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize("method", ["shadow", "lora"])
def test_a_run_stopped_by_its_deadline_goes_on_to_the_same_weights(method, tmp_path):
    whole, _ = trained(method, Fake("generate"), tmp_path / "whole", steps=6)
    _, cut = trained(method, Fake("generate"), tmp_path / "cut", steps=6, deadline=time.monotonic())
    assert not cut["finished"]
    assert cut["steps"] == 1
    resumed, summary = trained(method, Fake("generate"), tmp_path / "cut", steps=6)
    assert summary["finished"]
    assert summary["steps"] == 6
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_trained_adapter_is_loaded_by_peft(tmp_path):
    task, where = Fake("classify"), save_base(tmp_path / "b")
    for method in baselines.METHODS:
        model, _ = trained(method, task, tmp_path / method, steps=2)
        model.save_pretrained(tmp_path / f"{method}-saved")
        plain = baselines.load_task_base(where, task, chat_tokenizer(), seed=9)
        loaded = PeftModel.from_pretrained(plain, tmp_path / f"{method}-saved").eval()
        ids = torch.tensor([[5, 9, 30, 7]])
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# ---------------------------------------------------------------------------------------------------------- learning rates


def test_the_best_finite_rate_is_chosen_and_an_edge_is_named():
    values = {1e-4: 0.2, 1e-3: 0.7, 1e-2: float("nan")}
    found = baselines.choose_rate([1e-3, 1e-4, 1e-2], values.__getitem__)
    assert found["chosen"] == 1e-3
    assert not found["at_edge"]
    assert found["trials"] == [
        {"learning_rate": 1e-4, "value": 0.2},
        {"learning_rate": 1e-3, "value": 0.7},
        {"learning_rate": 1e-2, "value": None},
    ]
    assert baselines.choose_rate([1e-4, 1e-3], values.__getitem__)["at_edge"]
    with pytest.raises(ConfigError, match="diverged"):
        baselines.choose_rate([1e-2], values.__getitem__)


@pytest.mark.parametrize("split", ["test", "train"])
def test_rates_are_never_chosen_on_test_or_training_rows(split):
    with pytest.raises(DataError, match=f"chosen on the {split} split"):
        baselines.check_splits(Fake("generate"), choose_on=split)


def test_a_validation_split_made_of_test_rows_is_refused():
    class Leaky(Fake):
        def rows(self, split):
            return super().rows("test" if split == "validation" else split)

    baselines.check_splits(Fake("generate"), choose_on="validation")
    with pytest.raises(DataError, match=r"100.0% of the validation rows .* test split"):
        baselines.check_splits(Leaky("generate"), choose_on="validation")

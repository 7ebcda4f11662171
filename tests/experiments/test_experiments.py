"""A tiny experiment from its spec to its page, through the runner that makes the real ones."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from experiments.__main__ import main
from experiments.report import Page
from experiments.report.records import columns, difference, interval_of
from experiments.report.tables import differences_table
from experiments.runner import Runner
from experiments.spec import _LATER as LATER
from experiments.spec import KINDS, SPECS, cells, merge, names, read_spec
from experiments.training import predictions
from faketask import Fake

import shadowpeft
from chatbase import save_base
from experiments import report
from pages import facts, numbers, rows
from shadowpeft.errors import ConfigError, NonFiniteLossError
from shadowpeft.evaluate import evaluate_task
from shadowpeft.train import baselines
from shadowpeft.train.sections import TrainingSection

TASKS = {"classify": Fake("classify"), "generate": Fake("generate"), "robot": Fake("generate", paths=True)}
SHADOW = {"r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.1}


def tiny_spec(base: str, **changes):
    content = {
        "name": "tiny",
        "title": "A tiny table",
        "kind": "table1",
        "base": base,
        "seeds": [0],
        "train": {"batch_size": 4, "log_every": 1, "threads": 1, "max_length": 128, "tokens": 600},
        "rates": {"grid": [1e-3, 1e-2], "budget_share": 0.5, "rows": 6},
        "methods": {
            "shadow": {"method": "shadow", "fields": SHADOW},
            "lora": {"method": "lora", "match": "shadow", "fields": {"tolerance": 0.1}},
        },
        "tasks": {"classify": {}},
    }
    return merge(content, changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


class Place:
    """A folder with one spec, its records, its work and its page."""

    def __init__(self, folder: Path, *specs: dict) -> None:
        self.folder = folder
        (folder / "specs").mkdir()
        for spec in specs:
            (folder / "specs" / f"{spec['name']}.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
        self.page = Page(folder / "records", folder / "specs", folder / "docs")

    def runner(self, **options) -> Runner:
        where = {"records": self.folder / "records", "work": self.folder / "work", "specs": self.folder / "specs"}
        tools = {"get_task": TASKS.__getitem__}
        return Runner(**{**where, **tools, "quiet": True, **options})

    def record(self, name: str) -> dict:
        return json.loads((self.folder / "records" / f"{name}.json").read_text())


# ------------------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def ran(base, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("ran"), tiny_spec(base))
    outcome = place.runner().run("tiny")
    assert outcome == {"done": [], "ran": ["classify-shadow-s0", "classify-lora-s0"], "left": []}
    return place


def test_a_record_says_all_that_made_its_number(ran):
    record = ran.record("tiny/classify-shadow-s0")
    assert record["id"] == "tiny/classify-shadow-s0"
    assert record["results"].keys() == {"classify-attached", "classify-detached"}
    result = record["results"]["classify-attached"]
    assert result["interval"][0] <= result["score"] <= result["interval"][1]
    assert result["n"] == 12
    for key, found in record["results"].items():
        values = [float(v) for v in record["values"][key].split()]
        assert len(values) == 12
        assert sum(values) / 12 == pytest.approx(found["score"])
    for key in ("versions", "processor", "finished", "settings", "settings_sha256"):
        assert record[key]
    history = Path(shadowpeft.__file__).parents[2] / ".git"  # a wheel, or a copy without history, has none
    assert bool(record["commit"]) == history.exists()
    training = record["training"]
    assert training["steps"] == training["planned_steps"]
    assert training["tokens"] >= 600  # the budget, and less than a step beyond it
    assert training["tokens"] - 600 < 4 * 10
    assert training["train"]["fingerprint"] == TASKS["classify"].source("train")["fingerprint"]


def test_both_methods_had_equal_conditions(ran):
    ours, theirs = (ran.record(f"tiny/classify-{name}-s0") for name in ("shadow", "lora"))
    for key in ("order", "steps", "rows", "tokens", "seed", "train"):
        assert ours["training"][key] == theirs["training"][key]
    assert abs(theirs["training"]["trainable_parameters"] / ours["training"]["trainable_parameters"] - 1) <= 0.1
    assert theirs["training"]["budget"] == ours["training"]["trainable_parameters"]


def test_rates_are_searched_on_the_same_grid_at_half_the_budget_on_validation_rows(ran):
    for name in ("shadow", "lora"):
        rate = ran.record(f"tiny/classify-{name}-rate")
        assert [t["learning_rate"] for t in rate["trials"]] == [1e-3, 1e-2]
        best = max(rate["trials"], key=lambda t: t["value"])
        assert rate["chosen"] == best["learning_rate"]
        assert rate["validation"]["fingerprint"] == TASKS["classify"].source("validation")["fingerprint"]
        record = ran.record(f"tiny/classify-{name}-s0")
        assert record["rate"]["record"] == rate["id"]
        assert record["training"]["learning_rate"] == rate["chosen"]
        assert all(d["steps"] == pytest.approx(record["training"]["steps"] / 2, abs=0.5) for d in rate["details"])


def test_a_rate_that_diverges_at_full_length_gives_way_to_the_next_lower_one(ran):
    runner = ran.runner()
    runner.trained = lambda cell, task, rate, seed: (rate, {}, ran.folder)
    runner.judged = lambda cell, rates, model, task, folder: ("score", worth[model], model in guessing)
    (cell,) = [c for c in cells(read_spec("tiny", runner.specs)) if c.name == "lora"]

    def used(**trials):
        rate = {
            "chosen": 1e-2,
            "judged": {},
            "trials": {1e-2: trials["high"], 3e-3: trials["middle"], 1e-3: trials["low"]},
        }
        runner.trained_stably(cell, None, rate)
        assert "trials" not in rate
        assert rate["value"] == worth[rate["used"]]
        return rate["used"], [d["learning_rate"] for d in rate["diverged"]]

    worth, guessing = {1e-2: 0.2, 3e-3: 0.5, 1e-3: 0.8}, set()  # scores
    assert used(high=0.2, middle=0.9, low=0.9) == (1e-2, [])
    assert used(high=0.22, middle=0.9, low=0.9) == (1e-2, [])
    assert used(high=0.3, middle=0.4, low=0.9) == (3e-3, [1e-2])
    assert used(high=0.3, middle=0.9, low=0.9) == (1e-3, [1e-2, 3e-3])  # there is no lower one
    worth = {1e-2: -5.0, 3e-3: -2.1, 1e-3: -1.0}  # cross-entropies
    assert used(high=-4.6, middle=-1.0, low=-1.0) == (1e-2, [])
    assert used(high=-4.0, middle=-2.0, low=-1.0) == (3e-3, [1e-2])
    guessing = {1e-2, 1e-3}  # a classifier that learnt nothing, whose trial had learnt nothing either
    assert used(high=-5.1, middle=-2.0, low=-1.0) == (3e-3, [1e-2])


def test_a_rate_whose_loss_is_not_finite_is_not_chosen_and_gives_way(ran):
    def trained(cell, task, rate, seed, share=1.0):
        if rate > limit:
            raise NonFiniteLossError("the gradient's norm became nan")
        return None, {}, ran.folder

    runner = ran.runner()
    runner.trained = trained
    runner.judged = lambda *arguments: ("score", 1.0, False)
    (cell,) = [c for c in cells(read_spec("tiny", runner.specs)) if c.name == "lora"]
    limit = 0.0
    details = []
    assert math.isnan(runner.trial(cell, TASKS["classify"], 1e-2, details))
    assert details == [{"learning_rate": 1e-2, "by": "diverged", "error": "the gradient's norm became nan"}]
    limit = 5e-3
    rate = {"chosen": 1e-2, "judged": {}, "trials": {1e-2: 1.0, 1e-3: 1.0}}
    runner.trained_stably(cell, None, rate)
    assert rate["used"] == 1e-3
    assert rate["diverged"] == [{"learning_rate": 1e-2, "value": None, "trial": 1.0}]
    limit = 0.0
    with pytest.raises(NonFiniteLossError):  # there is no lower one
        runner.trained_stably(cell, None, {"chosen": 1e-3, "judged": {}, "trials": {1e-3: 1.0}})


def test_a_classifiers_rate_can_be_chosen_by_the_likelihood_of_the_classes(base, ran, tmp_path):
    place = Place(tmp_path, tiny_spec(base, rates={"by": "loss"}))
    (cell,) = [c for c in cells(read_spec("tiny", place.page.specs)) if c.name == "lora"]
    runner = ran.runner()  # whose adapters of the trials are there
    task, details = TASKS["classify"], []
    value = runner.trial(cell, task, 1e-3, details)
    (trained,) = details
    rows = predictions(runner.work / "train" / trained["key"] / "evaluations" / "validation-6")
    golds = {e.id: e.answer for e in task.load("validation")}
    assert value == pytest.approx(sum(r["scores"][task.labels.index(golds[r["id"]])] for r in rows) / 6)
    assert value < 0
    assert trained["by"] == "loss"
    model, _, folder = runner.trained(cell, task, 1e-3, seed=0, share=0.5)
    _, again, guesses = runner.judged(cell, cell.rates, model, task, folder)
    assert (again, guesses) == (value, value <= -math.log(3))


def test_an_adapter_of_other_prompts_is_not_taken_for_this_one(ran, monkeypatch):
    (cell,) = [c for c in cells(read_spec("tiny", ran.page.specs)) if c.name == "lora"]
    task, runner = TASKS["classify"], ran.runner()
    before = runner.trained(cell, task, 1e-3, seed=0, share=0.5)[2]
    assert before == runner.trained(cell, task, 1e-3, seed=0, share=0.5)[2]
    load = task.load
    changed = lambda *a, **k: [replace(e, prompt=e.prompt[::-1]) for e in load(*a, **k)]  # noqa: E731
    monkeypatch.setattr(task, "load", changed)
    assert before != runner.trained(cell, task, 1e-3, seed=0, share=0.5)[2]


def test_a_second_run_does_nothing(ran):
    def refuse(*args, **kwargs):
        raise AssertionError("evaluated again")

    assert ran.runner(evaluate=refuse).run("tiny")["done"] == ["classify-shadow-s0", "classify-lora-s0"]


def test_the_page_holds_the_numbers_of_the_records_and_links_to_them(ran):
    written = report.write(ran.page)
    page = (ran.folder / "docs" / "results.md").read_text()
    assert {p.name for p in written} == {"results.md", "tiny.png"}
    links = re.findall(r"\[([^\]]+)\]\((\.\./records/[^)]+)\)", page)
    scores = 0
    for shown, target in links:
        record = json.loads((ran.folder / "docs" / target).read_text())
        if re.fullmatch(r"\d+\.\d", shown):
            scores += 1
            assert float(shown) in [round(100 * r["score"], 1) for r in record["results"].values()]
    assert scores == 3  # attached, detached, LoRA
    assert "2 of 2 cells run" in page
    assert report.text(ran.page) == page


def test_records_of_other_test_rows_are_named(ran):
    record = ran.folder / "records" / "tiny" / "classify-lora-s0.json"
    before = record.read_text()
    assert "must not be compared" not in report.text(ran.page)
    changed = json.loads(before)
    changed["results"]["classify-lora"]["settings"]["examples"] = "other rows"
    record.write_text(json.dumps(changed))
    try:
        assert "since their test rows differ: classify: classify." in report.text(ran.page)
    finally:
        record.write_text(before)


def test_a_score_without_spread_shows_wilsons_interval():
    result = {"score": 0.0, "interval": [0.0, 0.0], "wilson_interval": [0.0, 0.037]}
    assert interval_of(result) == [0.0, 0.037]
    assert interval_of({**result, "interval": [0.0, 0.1]}) == [0.0, 0.1]


def test_rows_are_compared_with_lora_on_equal_examples_and_seeds_alone(base, ran, tmp_path):
    place = Place(tmp_path, tiny_spec(base, seeds=[0, 1, 2]))
    made = {
        ("shadow", 0): "1 1 1 0 0 1",
        ("lora", 0): "0 0 1 0 0 0",
        ("shadow", 1): "1 1 1 1 0 1",
        ("lora", 1): "0 0 1 0 0 0",
        ("shadow", 2): "0 0 0 0 0 0",  # whose LoRA saw other rows
        ("lora", 2): "1 1 1 1 1 1",
    }
    for (name, seed), values in made.items():
        record = ran.record(f"tiny/classify-{name}-s0")
        record["values"] = dict.fromkeys(record["results"], values)
        for result in record["results"].values():
            result["settings"]["examples"] = "other" if (name, seed) == ("lora", 2) else "same"
        path = tmp_path / "records" / "tiny" / f"classify-{name}-s{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    spec = read_spec("tiny", place.page.specs)
    told, _, _, attached, detached = [row for row in differences_table(place.page, spec) if row]
    assert "Points above LoRA on the same test rows" in told
    gaps = [
        (100 * (a - b) + 100 * (c - b)) / 2
        for a, b, c in zip(
            *([int(v) for v in made[key].split()] for key in (("shadow", 0), ("lora", 0), ("shadow", 1))), strict=True
        )
    ]
    mean = sum(gaps) / 6
    assert mean == pytest.approx(58.3, abs=0.1)
    assert attached.startswith(f"| Shadow, attached | **{mean:+.1f} [+")
    assert attached.endswith(", 2 seeds |")
    assert detached.startswith("| Shadow, detached | **")
    assert (
        difference(
            place.page,
            spec,
            columns(spec)[0],
            ("shadow", "attached"),
            ("shadow", "detached"),
        )
        == "+0.0 [+0.0, +0.0], 3 seeds"
    )


# --------------------------------------------------------------------------------------------------------- interruptions


def test_a_killed_run_continues_and_ends_with_the_same_numbers(base, ran, tmp_path):
    place = Place(tmp_path, tiny_spec(base))
    calls = []

    def dies(*args, **kwargs):
        calls.append(kwargs["mode"])
        if len(calls) == 4:  # two trials and the attached evaluation are done
            raise KeyboardInterrupt
        return evaluate_task(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        place.runner(evaluate=dies).run("tiny")
    assert not (place.folder / "records" / "tiny" / "classify-shadow-s0.json").exists()
    assert (place.folder / "records" / "tiny" / "classify-shadow-rate.json").exists()
    trained = {p: p.stat().st_mtime_ns for p in (place.folder / "work").rglob("adapter_model.safetensors")}
    place.runner().run("tiny")
    assert trained  # and none of them was trained again
    assert all(p.stat().st_mtime_ns == then for p, then in trained.items())
    for name in ("shadow", "lora"):
        one, two = (p.record(f"tiny/classify-{name}-s0")["results"] for p in (place, ran))
        assert {k: v["score"] for k, v in one.items()} == {k: v["score"] for k, v in two.items()}


def test_the_time_limit_leaves_cells_and_stops_in_the_middle_of_training(base, tmp_path):
    place = Place(tmp_path, tiny_spec(base, rates=None, train={"learning_rate": 1e-3}))
    assert place.runner(limit_minutes=0.0).run("tiny")["left"] == ["classify-shadow-s0", "classify-lora-s0"]
    runner = place.runner()
    runner.check_time = lambda: setattr(runner, "deadline", 0.0)  # the time is up once training begins
    assert runner.run("tiny", "*-shadow-*")["left"] == ["classify-shadow-s0"]
    assert list((place.folder / "work" / "train").glob("*/checkpoint-1"))
    assert place.runner().run("tiny", "*-shadow-*")["ran"] == ["classify-shadow-s0"]
    assert not list((place.folder / "work").rglob("checkpoint-*"))


def test_ctrl_c_ends_the_command_and_not_only_the_cell(base, tmp_path, monkeypatch, capsys):
    place = Place(tmp_path, tiny_spec(base, rates=None, train={"learning_rate": 1e-3}))
    monkeypatch.setattr(baselines, "train_task", lambda *a, **k: {"finished": False})  # as after the first Ctrl-C
    with pytest.raises(KeyboardInterrupt):
        place.runner().run("tiny")
    monkeypatch.setattr(Runner, "run", lambda self, name, pattern: {"done": [], "ran": [], "left": ["a"]})
    assert main(["run", "tiny"]) == 3
    monkeypatch.setattr(Runner, "run", lambda self, name, pattern: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["run", "tiny"]) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_a_record_of_other_settings_is_refused_and_named(base, ran, tmp_path):
    place = Place(tmp_path, tiny_spec(base))
    shutil.copytree(ran.folder / "records", tmp_path / "records")
    file = tmp_path / "specs" / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_spec(base, train={"tokens": 900}), sort_keys=False))
    with pytest.raises(
        ConfigError, match=r"tiny/classify-shadow-s0 was made with other settings .*\(tokens\); delete it"
    ):
        place.runner().run("tiny")
    page = report.text(place.page)
    assert "Records of other settings than the spec has now: classify-shadow-s0, classify-lora-s0" in page


# ------------------------------------------------------------------------------------------------------------ other kinds


@pytest.mark.slow
def test_transfer_uses_the_adapter_and_the_rate_of_the_table(base, tmp_path):
    first = tiny_spec(base, name="first", tasks={"classify": None, "generate": {}}, rates={"grid": [1e-3]})
    first["methods"]["base"] = {"method": "base"}
    evaluate = [{"task": "generate"}, {"task": "robot", "shots": 2}]
    second = {**first, "name": "second", "kind": "ood", "rates": {"from": "first"}, "paper": "Qwen3-4B"}
    second["tasks"] = {"generate": {"evaluate": evaluate}}
    place = Place(tmp_path, first, second)
    with pytest.raises(ConfigError, match="takes its learning rate from first/generate-shadow-rate"):
        place.runner().run("second")
    place.runner().run("first")
    trained = len(list((tmp_path / "work").rglob("adapter_model.safetensors")))
    place.runner().run("second")
    assert len(list((tmp_path / "work").rglob("adapter_model.safetensors"))) == trained
    record = place.record("second/generate-shadow-s0")
    assert record["rate"]["record"] == "first/generate-shadow-rate"
    assert record["results"].keys() == {
        "generate-attached",
        "generate-detached",
        "robot-attached-2shot",
        "robot-detached-2shot",
    }
    page = report.text(place.page)
    assert "| Robot intents, 2-shot (n = " in page


@pytest.mark.slow
def test_latency_and_scaling_and_system_reach_the_page(base, tmp_path):
    fixed = {"rates": None, "train": {"learning_rate": 1e-3, "tokens": 300}}
    latency = tiny_spec(base, name="speed", kind="latency", latency={"repeats": 2, "warmup": 0}, **fixed)
    latency["tasks"] = {"generate": {}}
    scaling = tiny_spec(base, name="depth", kind="scaling", **fixed)
    scaling["methods"]["dora"] = {"method": "dora", "match": "shadow", "fields": {"tolerance": 0.2}}
    scaling["methods"]["shadow-2"] = {"like": "shadow", "fields": {"shadow_num_hidden_layers": 2}}
    system = tiny_spec(base, name="dog", kind="system", **fixed)
    system["tasks"] = {"robot": {}}
    place = Place(tmp_path, latency, scaling, system)
    for name in ("speed", "depth", "dog"):
        assert not place.runner().run(name)["left"]
    speed = place.record("speed/generate-shadow-s0")["results"]
    assert speed.keys() == {"base", "attached", "detached"}
    assert all(r["n"] == 2 and r["milliseconds"] > 0 for r in speed.values())
    one, two = (
        place.record(f"depth/classify-{n}-s0")["training"]["trainable_parameters"] for n in ("shadow", "shadow-2")
    )
    assert two > one
    dog, lora = (place.record(f"dog/robot-{n}-s0")["results"]["all"] for n in ("shadow", "lora"))
    assert dog["handed_on"] == 0  # every letter is a "known skill"
    assert lora["handed_on"] == 0
    written = report.write(place.page)
    assert {p.name for p in written} == {"results.md", "speed.png", "depth.png", "dog.png"}


def test_what_the_shadow_does_not_know_is_answered_by_the_attached_model(base, tmp_path):
    class Unsure(Fake):
        def parse(self, text):
            return None

    system = tiny_spec(base, name="dog", kind="system", rates=None, train={"learning_rate": 1e-3, "tokens": 100})
    system["tasks"] = {"robot": {}}
    place = Place(tmp_path, system)
    place.runner(get_task=lambda name: Unsure("generate")).run("dog", "*shadow*")
    results = place.record("dog/robot-shadow-s0")["results"]
    assert results["all"]["handed_on"] == 1.0
    assert results["all"]["score"] == 0.0


# ------------------------------------------------------------------------------------------------------------- the specs


@pytest.mark.parametrize("name", names())
def test_every_spec_is_valid_and_every_trained_cell_has_a_budget(name):
    spec = read_spec(name)
    assert spec.kind in KINDS
    found = cells(spec)
    assert len({cell.id for cell in found}) == len(found)
    for cell in found:
        if cell.method != "base" and spec.kind != "latency":
            budgets = (cell.tokens, cell.train.get("epochs"), cell.train.get("max_steps"))
            assert sum(b is not None for b in budgets) == 1, cell.id
            assert cell.rates is None or cell.rates["split"] == "validation"


def test_methods_of_a_table_are_searched_on_one_grid_and_trained_on_one_budget():
    for name in ("table1-smollm2", "table1-smollm2-cpu", "fig3a-scaling-smollm2"):
        by_task: dict[str, set[str]] = {}
        for cell in cells(read_spec(name)):
            if cell.method != "base":
                same = [cell.rates, cell.tokens, {**cell.train, "seed": None}, cell.max_length]
                by_task.setdefault(cell.task, set()).add(json.dumps(same, sort_keys=True))
        assert all(len(kinds) == 1 for kinds in by_task.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"tokens": None}}, "needs exactly one budget"),
        ({"train": {"learning_rate": 1e-3}}, "needs either rates or a train.learning_rate"),
        ({"methods": {"lora": {"match": "nobody"}}}, "match names 'nobody'"),
        ({"methods": {"shadow": {"fields": {"shadow_alhpa": 1.0}}}}, "shadow_alhpa"),
        ({"tasks": {"classify": {"methods": {"dora": {}}}}}, "changes the method 'dora'"),
        ({"train": {"lerning_rate": 1.0}}, "lerning_rate"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_impossible_specs_are_refused_by_name(changes, message, tmp_path):
    place = Place(tmp_path, tiny_spec("anything", **changes))
    with pytest.raises(ConfigError, match=message):
        read_spec("tiny", place.folder / "specs")


def test_unknown_names_and_patterns_exit_with_2(capsys):
    assert main(["run", "nothing"]) == 2
    assert main(["run", "table1-smollm2", "--cells", "nothing-*"]) == 2
    assert main(["list", "table1-smollm2"]) == 0
    assert "not run" in capsys.readouterr().out or any((SPECS.parent / "records").rglob("*.json"))


# --------------------------------------------------------------------------------------------------- the committed report


def test_the_committed_pages_hold_the_numbers_of_the_committed_records():
    page = Page()
    results = (page.docs / "results.md").read_text(encoding="utf-8")
    assert len(numbers(results)) > 500
    assert facts(results) == facts(report.text(page)), "run `python -m experiments report` and commit docs/results.md"
    content = page.compared.read_text(encoding="utf-8")
    scores, again = (
        text.split(report.SCORES_MARKS[0])[1].split(report.SCORES_MARKS[1])[0]
        for text in (content, report.compared(page, content))
    )
    assert facts(scores) == facts(again), "run `python -m experiments report` and commit docs/compared.md"
    (lora,) = [row for row in rows(scores) if row[0] == "LoRA"]
    assert len(numbers(" ".join(lora))) >= 3 * len(lora[1:])  # a score and both ends of its interval in each column


def test_settings_of_training_that_came_later_change_no_committed_cell():
    files = (Path(__file__).parents[2] / "experiments" / "records").glob("*/*-s0.json")
    first = {key for file in files for key in json.loads(file.read_text())["settings"].get("train", {})}
    assert len(first) > 15
    assert set(TrainingSection.model_fields) - first <= set(LATER)  # whatever is new is left out of a cell at its default

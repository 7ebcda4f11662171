"""Trainings that their validation score ends: equal for every method, exact where states are stored, killed without a loss."""

from __future__ import annotations

import json

import pytest
import torch
from experiments.converged import PLAN, Cell, Converging, final, run, waiting
from experiments.device_plan import Cell as Searched
from experiments.device_plan import read_cells
from experiments.device_search import Training
from experiments.report import converged as report
from experiments.report.records import Page
from faketask import Fake
from test_device_search import strip

import shadowpeft
from chatbase import save_base
from experiments import converged, device_problems
from shadowpeft.data.padding import pad_inputs
from shadowpeft.errors import ConfigError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture
def cell(monkeypatch, base, tmp_path):
    """Cells on a tiny base; the shadow's start is trained first."""
    monkeypatch.setattr(device_problems, "get_task", lambda name: Fake("classify"))
    start = Searched(name="start", problem="clinc150", base=base, layers=2, batch_size=4, rate=0.01, passes=2)
    monkeypatch.setattr(converged, "SEARCHED", tmp_path / "searched")
    monkeypatch.setattr(converged, "read_plan", lambda: [start])
    assert Training(start, tmp_path / "searched", tmp_path / "searched").run()
    usual = {"name": "cell", "base": base, "batch_size": 4, "rate": 0.01, "most": 4, "average": 0.5, "r": 4}
    shadow = {"method": "shadow", "last": 2}
    own = {"shadow": {**shadow, "shadow": "start"}, "joint": {**shadow, "joint": 2}}
    return lambda method="lora", **fields: Cell(**{**usual, **own.get(method, {"method": method}), **fields})


@pytest.mark.parametrize(
    "method", ["shadow", "joint", "lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dora", "rslora"))]
)
def test_a_killed_training_goes_on_as_if_nothing_had_been(cell, tmp_path, method):
    whole = Converging(cell(method), tmp_path / "a", tmp_path / "ra")
    assert whole.run()
    kills, parts = 0, (cell(method), tmp_path / "b", tmp_path / "rb")
    while not (part := Converging(*parts)).run(lambda part=part: part.at["steps"] % 3 == 0):
        kills += 1
    assert kills > 1
    pairs = zip(whole.named, part.named, strict=True)
    assert all(torch.equal(a, b) and name == other for (name, a), (other, b) in pairs)
    assert strip(whole.curve) == strip(part.curve)
    assert [point["pass"] for point in part.curve] == [0.5 * (i + 1) for i in range(len(part.curve))]
    assert [point["steps"] for point in part.curve][:2] == [3, 6]  # 24 rows, four a step


def scores(training, values):
    """Judgements that find these scores, one after the other."""
    found = iter(values)

    def worth(greedy):
        score = next(found)
        return {"constrained": {"all": {"score": score}, "values": f"of {score}"}}

    training.problem.development = lambda *, greedy: worth(greedy)


def test_patience_ends_it_and_the_best_average_is_kept(cell, tmp_path):
    training = Converging(cell(patience=2, most=9), tmp_path / "w", tmp_path / "r")
    scores(training, [0.2, 0.5, 0.3, 0.4, 0.9])
    kept = []
    judge = training.judge

    def watch(loss):
        judge(loss)
        kept.append([mean.clone() for mean in training.averaged])

    training.judge = watch
    assert training.run()
    record = json.loads((tmp_path / "r" / "cell.json").read_text())
    assert record["ended"] == "2 judgements without a new best"
    assert [point["constrained"]["all"]["score"] for point in record["curve"]] == [0.2, 0.5, 0.3, 0.4]
    assert record["best"]["constrained"] == {"all": {"score": 0.5}, "values": "of 0.5"}
    assert ["values" in point["constrained"] for point in record["curve"]] == [False, True, False, False]
    training.place_best()
    assert all(torch.equal(p, mean) for (_, p), mean in zip(training.named, kept[1], strict=True))
    assert not all(torch.equal(p, mean) for (_, p), mean in zip(training.named, kept[3], strict=True))


def test_a_score_that_rises_to_the_end_is_ended_by_number(cell, tmp_path):
    training = Converging(cell(most=3), tmp_path / "w", tmp_path / "r")
    scores(training, [0.2, 0.5, 0.6])
    assert training.run()
    assert training.ended() == "3 judgements"


def test_stored_states_change_nothing_and_the_shadow_stays(cell, tmp_path):
    training = Converging(cell("shadow", dropout=0.0), tmp_path / "w", tmp_path / "r")
    problem, places = training.problem, [0, 5, 11]
    assert problem.stored is not None
    assert not any("backbone" in name or "head" in name for name, _ in training.named)
    assert any("injection" in name or "link" in name for name, _ in training.named)
    training.model.train()
    stored, problem.stored = problem.stored, None
    gradients = []
    for states in (stored, None):
        problem.stored = states
        training.model.zero_grad()
        loss = problem.loss(places)
        loss.backward()
        gradients.append([loss.detach()] + [p.grad.clone() for _, p in training.named])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-6)
    assert sum(float(g.abs().sum()) for g in gradients[0][1:]) > 0


def test_the_detached_half_is_the_model_that_it_started_from(cell, tmp_path):
    attached = cell("shadow")
    assert run(attached, lambda: False, tmp_path / "w", tmp_path / "r")
    record = json.loads((tmp_path / "r" / "cell.json").read_text())
    started = json.loads((tmp_path / "searched" / "start.json").read_text())["curve"][-1]["constrained"]
    assert record["detached"]["values"] == started["values"]
    assert record["detached"]["log_loss"] == pytest.approx(started["log_loss"], abs=1e-4)
    assert record["test"] is None


def test_a_joint_cell_trains_both_halves_on_both_losses(cell, tmp_path):
    training = Converging(cell("joint", dropout=0.0), tmp_path / "w", tmp_path / "r")
    problem, places = training.problem, [0, 5, 11]
    assert problem.stored is not None
    names = [name for name, _ in training.named]
    assert all(any(part in name for name in names) for part in ("backbone", "shadowpeft_head", "injection", "score"))
    assert not any("embed_tokens" in name for name in names)
    training.model.train()
    loss = problem.loss(places)
    problem.stored = None
    ids, gold = [problem.items[i].ids for i in places], torch.tensor([problem.examples[i].gold for i in places])
    attached = problem.forward(ids).logits
    alone = shadowpeft.detach(training.model)(**pad_inputs(ids, int(problem.tokenizer.pad_token_id))).logits
    losses = [torch.nn.functional.cross_entropy(logits, gold).item() for logits in (attached, alone)]
    assert losses[0] != losses[1]
    assert loss.item() == pytest.approx(sum(losses), rel=1e-4)
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for name, p in training.named if "backbone" in name and "layers.0" in name)
    assert run(cell("joint", name="both", most=1), lambda: False, tmp_path / "w", tmp_path / "r")
    record = json.loads((tmp_path / "r" / "both.json").read_text())
    assert record["detached"]["all"]["n"] == 10
    assert record["started_processor_seconds"] is None


def test_test_rows_are_read_once_for_a_method_and_seed(cell, tmp_path):
    work, folder = tmp_path / "w", tmp_path / "r"
    with pytest.raises(ConfigError, match="has not ended"):
        final(cell(), work, folder)
    for one in (cell("shadow", most=1), cell(name="lora", most=1)):
        assert run(one, lambda: False, work, folder)
        found = final(one, work, folder)
        assert found["attached"]["all"]["n"] == 12
        assert ("detached" in found) == (one.method == "shadow")
    other = cell("shadow", name="other", rate=0.02, most=1)
    assert run(other, lambda: False, work, folder)
    with pytest.raises(ConfigError, match="already been tested"):
        final(other, work, folder)


def test_what_the_plan_asks_for(cell, tmp_path):
    planned = read_cells(PLAN, Cell)
    assert {one.method for one in planned.values()} >= {"shadow", "lora"}
    one = cell(most=1)
    assert waiting({"cell": one}, tmp_path) == [one]
    assert run(one, lambda: False, tmp_path / "w", tmp_path)
    assert waiting({"cell": one}, tmp_path) == []
    with pytest.raises(ConfigError, match="other settings"):
        waiting({"cell": cell(most=1, rate=0.02)}, tmp_path)
    with pytest.raises(ConfigError, match="impossible"):
        cell("lora", shadow="start")
    with pytest.raises(ConfigError, match="does not have"):
        Converging(cell("shadow", shadow="nowhere"), tmp_path / "w", tmp_path / "r")


def judged(hits, n=4):
    share = {"score": hits / n, "interval": [0.1, 0.9], "n": n}
    values = " ".join("1" if i < hits else "0" for i in range(n))
    return {"in_scope": share, "oos_recall": share, "all": share, "values": values}


def a_record(name, method, scores, test=None, **settings):
    curve = [
        {"pass": (i + 1) / 2, "processor_seconds": 60.0 * (i + 1), "constrained": judged(hits)} for i, hits in enumerate(scores)
    ]
    return {
        "id": f"converged/{name}",
        "name": name,
        "ended": "3 judgements without a new best",
        "curve": curve,
        "best": max(curve, key=lambda point: point["constrained"]["all"]["score"]),
        "test": None if test is None else {"attached": judged(test)},
        "started_processor_seconds": 600.0 if method == "shadow" else None,
        "trained_parameters": 1_500_000,
        "settings": {"method": method, "seed": 0, "rate": 0.001, **settings},
    }


def test_the_page_names_what_each_reached_and_how_they_differ(tmp_path):
    page = Page(records=tmp_path / "records", docs=tmp_path / "docs")
    assert report.section(page) == []
    assert report.figure(page, tmp_path) == []
    (tmp_path / "records" / "converged").mkdir(parents=True)
    records = [
        {**a_record("ours", "shadow", [1, 3, 2], test=4, shadow="before"), "detached": judged(2)},
        {**a_record("gentle", "shadow", [1, 1, 1], rate=0.0001, shadow="before"), "detached": judged(2)},
        {**a_record("both", "shadow", [1, 2], shadow="", joint=2), "detached": judged(1), "started_processor_seconds": None},
        a_record("theirs", "lora", [2, 2, 1], test=2),
        a_record("slower", "lora", [1, 1, 1], rate=0.0003),
        {**a_record("going", "dora", [1]), "ended": None},
    ]
    for record in records:
        (tmp_path / "records" / "converged" / f"{record['name']}.json").write_text(json.dumps(record))
    (tmp_path / "records" / "device").mkdir()
    alone = {"trained_parameters": 35_000_000, "curve": [{"processor_seconds": 600.0}]}
    (tmp_path / "records" / "device" / "before.json").write_text(json.dumps(alone))
    text = "\n".join(report.section(page))
    assert "| shadow, attached | 0.001 | 1.5 + 35 | 1 of 1.5 | 2 + 10 | 75.0 [10.0, 90.0] | 100.0 [10.0, 90.0] |" in text
    assert "| LoRA | 0.001 | 1.5 | 0.5 of 1.5 | 1 | 50.0 [10.0, 90.0] | 50.0 [10.0, 90.0] |" in text
    assert "| LoRA | 0.0003 |" in text
    assert text.count("| the frozen shadow, detached |  | 35 |  | 10 | 50.0 [10.0, 90.0] | - | - |") == 1
    assert "both.json) | its shadow, detached |  |  |  | the same | 25.0 [10.0, 90.0] | - | - |" in text
    assert "going" not in text
    assert "On all 4 test rows, in and out of scope, the attached shadow has +50.0 points more right than LoRA" in text
    for record in records:
        untested = {**record, "test": None}
        (tmp_path / "records" / "converged" / f"{record['name']}.json").write_text(json.dumps(untested))
    text = "\n".join(report.section(page))
    assert "On all 4 validation rows, in and out of scope, ours has +25.0 points more right than theirs" in text
    assert "only 2 of LoRA's rates has ended" not in text
    assert "2 of LoRA's rates have ended" in text
    (file,) = report.figure(page, tmp_path)
    assert file.read_bytes()[:4] == b"\x89PNG"

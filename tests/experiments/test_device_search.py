"""The search for the device's recipe: what it may look at, that its shortcuts are exact, and that a kill costs nothing."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
import yaml
from experiments.device_plan import Cell
from experiments.device_problems import judged, shares
from experiments.device_rows import Item, padded
from experiments.device_search import Training
from faketask import Fake
from scripts.robot_set import phrasing, seeds

from chatbase import save_base
from experiments import device_page, device_plan, device_problems, device_rows, device_search
from shadowpeft.data import robot
from shadowpeft.data.actions import REMOTE, written
from shadowpeft.data.chat import prompt_ids
from shadowpeft.errors import ConfigError

# -------------------------------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="module", params=[False, True], ids=["", "more rows"])
def parts(request):
    return device_rows.split(more_rows=request.param)


def test_no_phrasing_topic_or_prompt_stands_on_both_sides(parts):
    train, chosen_on = (
        {phrasing.normalise(row["prompt"]) for row in rows} for rows in (parts.train, parts.development)
    )
    assert not train & chosen_on
    for kind, key in (("skill", lambda row: row["family"]), ("remote", device_rows.topic)):
        sides = [{key(row) for row in rows if row["kind"] == kind} for rows in (parts.train, parts.development)]
        assert not sides[0] & sides[1]
    fillings: dict[str, set[str]] = {}
    for lang in seeds.LANGS:
        for family in seeds.families(lang):
            for filling in family.fillings():
                fillings.setdefault(phrasing.normalise(filling), set()).add(family.id)
    held = {row["family"] for row in parts.development if row["kind"] == "skill"}
    learnt = {row["family"] for row in parts.train if row["kind"] == "skill"}
    assert not [ids for ids in fillings.values() if ids & held and ids & learnt]


def test_every_skill_is_learnt_and_chosen_on_in_both_languages(parts):
    for rows in (parts.train, parts.development):
        found = {(row["skill"], row["lang"]) for row in rows}
        assert found >= {(skill, lang) for skill in (*robot.SKILLS, REMOTE) for lang in seeds.LANGS}
    assert len(parts.development) > 600


def test_test_rows_are_nowhere(parts):
    test = {row["id"] for row in device_rows.test_rows()}
    assert len(test) == 306 + 18 + 320
    assert not test & {row["id"] for row in (*parts.train, *parts.development)}


def test_open_rows_and_holding_out_can_be_left_out():
    bare = device_rows.split(open_rows=False)
    assert sum(row["skill"] == REMOTE for row in bare.train) == 47
    whole = device_rows.split(hold_out=False)
    assert len(whole.train) == 3400 + 1000 + 47
    assert {row["split"] for row in whole.development} == {"validation_normal", "validation_remote"}
    large = device_rows.split(more_rows=True)
    assert len(large.train) == len(device_rows.split().train) + 4760 + 1172
    assert large.development == device_rows.split().development


def test_an_open_prompt_of_the_base_path_is_handed_on_in_both_targets():
    request = {"skill": REMOTE, "response": "Because of the air."}
    note = {"skill": REMOTE, "response": "[REMOTE] let me ask"}
    command = {"skill": "Sit", "response": "[Sit()] Sitting."}
    assert [device_rows.response(row, "reply") for row in (request, note, command)] == [
        "[REMOTE]",
        "[REMOTE] let me ask",
        "[Sit()] Sitting.",
    ]
    assert [device_rows.response(row, "action") for row in (request, note, command)] == [
        "[REMOTE]",
        "[REMOTE]",
        "[Sit()]",
    ]


def test_a_batch_learns_the_answers_tokens_and_nothing_else():
    items = [Item([9, 9, 1, 2, 3], 3), Item([9, 9, 4, 5, 6, 7, 8], 4)]
    tokens, places, targets = padded(items, 2, 0)
    assert tokens.tolist() == [[1, 2, 0, 0], [4, 5, 6, 7]]
    assert targets.tolist() == [2, 3, 6, 7, 8]
    assert tokens.flatten()[places].tolist() == [1, 2, 5, 6, 7]  # the token before each target


def test_batches_hold_each_row_once_in_an_order_of_their_seed():
    items = [Item(list(range(3 + i % 17)), 1) for i in range(103)]
    found = device_rows.batches(items, 8, "0/0", chunk=4)
    assert sorted(i for batch in found for i in batch) == list(range(103))
    assert found == device_rows.batches(items, 8, "0/0", chunk=4)
    assert found != device_rows.batches(items, 8, "0/1", chunk=4)
    spread = [max(len(items[i].ids) for i in b) - min(len(items[i].ids) for i in b) for b in found]
    assert sum(spread) / len(spread) < 8  # of 17


# ------------------------------------------------------------------------------------------------------------------ judging


def test_scores_of_constrained_choice():
    rows = [
        {"skill": "Sit", "lang": "en", "split": "validation_normal"},
        {"skill": "Bark", "lang": "zh", "split": "train_normal"},
        {"skill": "Bark", "lang": "zh", "split": "train_normal"},
        {"skill": REMOTE, "lang": "en", "split": "validation_remote"},
        {"skill": REMOTE, "lang": "en", "split": "validation_remote"},
    ]
    chances = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.1, 0.1, 0.8], [0.5, 0.2, 0.3]])
    found = judged(rows, ["Sit", "Bark", REMOTE], chances.double())
    assert found["commands"]["score"] == pytest.approx(2 / 3, abs=1e-4)
    assert (found["en"]["n"], found["en"]["score"], found["zh"]["n"], found["zh"]["score"]) == (1, 1.0, 2, 0.5)
    assert found["held_out"]["n"] == 2
    assert found["open_handed_on"]["score"] == 0.5
    assert found["commands_handed_on"]["score"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["log_loss_commands"] == pytest.approx(
        -sum(map(torch.log, torch.tensor([0.9, 0.7, 0.3]))).item() / 3, abs=1e-4
    )
    # the likeliest skills are 0.9 right, 0.7 right, 0.3 right, 0.1 and 0.5 of open requests: 5 of 6 pairs in order
    assert found["auroc"] == pytest.approx(5 / 6, abs=1e-4)
    assert found["kept"] == pytest.approx(2 / 3, abs=1e-4)  # 0.9 and 0.7; 0.5 would be a wrong one in three
    assert found["values"] == "1 1 0 1 0"
    assert shares(rows, ["Sit", None, "Bark", None, REMOTE])["open_handed_on"]["score"] == 1.0


# ------------------------------------------------------------------------------------------------------- the two problems


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def small(monkeypatch, base, parts):
    """Few rows of the real set on a tiny base, and no way to the test rows."""

    def refuse():
        raise AssertionError("the search looked at test rows")

    few = device_rows.Split(parts.train[::200], parts.development[::60])
    monkeypatch.setattr(device_rows, "split", lambda **options: few)
    monkeypatch.setattr(device_rows, "test_rows", refuse)
    monkeypatch.setattr(device_problems, "get_task", lambda name: Fake("classify"))
    return lambda **fields: Cell(**{"name": "cell", "base": base, "layers": 2, "batch_size": 4, "rate": 0.01, **fields})


@pytest.mark.parametrize("target", ["action", "reply"])
def test_loss_and_gradients_are_those_of_the_stock_model(small, tmp_path, target):
    training = Training(small(target=target), tmp_path, tmp_path)
    problem, model = training.problem, training.model
    assert len(problem.prefix.ids) > 10
    loss = problem.loss(range(5))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in training.named}
    model.zero_grad()
    items = problem.items[:5]
    width = max(len(item.ids) for item in items)
    ids = torch.tensor([item.ids + [0] * (width - len(item.ids)) for item in items])
    labels = torch.full_like(ids, -100)
    for row, item in zip(labels, items, strict=True):
        row[item.start : len(item.ids)] = torch.tensor(item.ids[item.start :])
    mask = torch.tensor([[1] * len(item.ids) + [0] * (width - len(item.ids)) for item in items])
    stock = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    stock.backward()
    assert loss.item() == pytest.approx(stock.item(), rel=1e-5)
    for name, p in training.named:
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5)  # another order of summing


def test_probabilities_of_actions_are_those_of_their_tokens(small, tmp_path):
    """The oracle walks each action's tokens through the stock model, and at each leaves only what continues some action."""
    problem = Training(small(), tmp_path, tmp_path).problem
    rows = problem.split.development[:3]
    ours = problem.chances(rows)
    assert ours.sum(1).tolist() == pytest.approx([1.0] * 3)
    texts = {name: written(name) for name in problem.trie.actions}
    tokens = {name: problem.tokenizer(text, add_special_tokens=False).input_ids for name, text in texts.items()}
    row, name = rows[1], "Sit"
    for name in ("Sit", "WaltzDance", REMOTE):
        chance, ids = 1.0, prompt_ids(problem.tokenizer, device_rows.messages(row))
        for depth, token in enumerate(tokens[name]):
            allowed = sorted({other[depth] for other in tokens.values() if other[:depth] == tokens[name][:depth]})
            logits = problem.model.eval()(torch.tensor([ids])).logits[0, -1, allowed].double()
            chance *= logits.softmax(-1)[allowed.index(token)].item()
            ids = [*ids, token]
        assert ours[1, problem.trie.actions.index(name)].item() == pytest.approx(chance, rel=1e-4)


def test_only_the_shadows_layers_and_norm_train(small, tmp_path):
    training = Training(small(frozen_layers=1), tmp_path, tmp_path)
    before = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    for places in ([0, 1, 2], [3, 4]):
        training.step(places, 10)
    moved = {name for name, p in training.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in training.named}
    assert any("layers.1." in name for name in moved)
    assert not any("embed" in name or "lm_head" in name or "layers.0." in name for name in moved)


def test_a_classifier_trains_its_layers_and_head(small, tmp_path):
    training = Training(small(problem="clinc150", layers=1), tmp_path, tmp_path)
    names = {name for name, _ in training.named}
    assert "score.weight" in names
    assert not any("embed" in name for name in names)
    assert training.run()
    (point,) = training.curve
    assert point["constrained"]["all"]["n"] == 10
    assert training.problem.worth("validation")["constrained"]["log_loss"] > 0
    stock = training.model.eval()
    ids = [problem_ids.ids for problem_ids in training.problem.items[:4]]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        torch.testing.assert_close(
            training.problem._logits(ids), stock(input_ids=batch, attention_mask=(batch != 0).long()).logits
        )


# --------------------------------------------------------------------------------------------------------- the search itself


def weights(training: Training) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p in training.named] + training.averaged


def strip(curve: list[dict]) -> list[dict]:
    """A curve without what a clock measured."""
    return [{key: value for key, value in point.items() if "seconds" not in key} for point in curve]


def test_a_killed_cell_goes_on_as_if_nothing_had_been(small, tmp_path, monkeypatch):
    cell = small(passes=2, dropout=0.1, token_dropout=0.1)
    whole = Training(cell, tmp_path / "a", tmp_path / "ra")
    assert whole.run()
    kills = 0
    while not (part := Training(cell, tmp_path / "b", tmp_path / "rb")).run(
        lambda part=part: part.at["steps"] % 4 == 0
    ):
        kills += 1
    assert kills > 1
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(part), strict=True))
    assert strip(whole.curve) == strip(part.curve)
    assert [point["pass"] for point in part.curve] == [1, 2]
    assert "greedy" in part.curve[-1]
    assert "greedy" not in part.curve[0]


def test_a_cell_that_is_carried_on_is_the_longer_cell(small, tmp_path):
    whole = Training(small(passes=2), tmp_path / "a", tmp_path / "ra")
    assert whole.run()
    assert Training(small(passes=1), tmp_path / "b", tmp_path / "rb").run()
    longer = Training(small(passes=2), tmp_path / "b", tmp_path / "rb")
    assert len(longer.curve) == 1
    assert longer.run()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(longer), strict=True))


def test_a_cell_can_start_from_another_and_end_it_with_a_falling_rate(small, tmp_path):
    first = Training(small(passes=2), tmp_path / "w", tmp_path / "r")
    assert first.run()
    other = small(name="other", passes=3, schedule="linear", start="cell")
    second = Training(other, tmp_path / "w", tmp_path / "r")
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    begun, total = second.at["steps"], 3 * second.at["steps"] // 2
    assert second.rate(total) == pytest.approx(0.01 * min(1.0, (begun + 1) / 25))
    second.at["steps"] = total - 1
    assert second.rate(total) == pytest.approx(0.01 * min(1.0, total / 25) / (total - begun))
    assert Training(other, tmp_path / "w", tmp_path / "r").run()
    record = device_plan.record_of("other", tmp_path / "r")
    assert [point["pass"] for point in record["curve"]] == [1, 2, 3]
    assert device_plan.record_of("cell", tmp_path / "r")["passes"] == 2


def test_training_lowers_the_loss_and_what_is_judged_is_the_average(small, tmp_path):
    training = Training(small(passes=4, average=0.5), tmp_path, tmp_path)
    assert training.run()
    assert training.curve[-1]["train_loss"] < 0.7 * training.curve[0]["train_loss"]
    own = [p.detach().clone() for _, p in training.named]
    with training.judged_weights():
        assert all(torch.equal(p, mean) for (_, p), mean in zip(training.named, training.averaged, strict=True))
    assert all(torch.equal(p, mine) for (_, p), mine in zip(training.named, own, strict=True))
    assert not all(torch.equal(mean, mine) for mean, mine in zip(training.averaged, own, strict=True))


def test_a_linear_schedule_ends_at_nothing_and_a_constant_one_stays(small, tmp_path):
    for schedule in ("linear", "constant"):
        training = Training(small(schedule=schedule, warmup=4), tmp_path / schedule, tmp_path)
        rates = []
        for training.at["steps"] in range(20):
            rates.append(training.rate(20))
        assert rates[0] < rates[1] < rates[3] <= 0.01
        tail = list(pairwise(rates[4:]))
        assert all(b < a for a, b in tail) if schedule == "linear" else set(rates[4:]) == {0.01}


def test_a_state_of_other_rows_or_settings_is_refused(small, tmp_path, monkeypatch, parts):
    assert Training(small(), tmp_path, tmp_path).run()
    with pytest.raises(ConfigError, match="is of other settings or rows"):
        Training(small(rate=0.02), tmp_path, tmp_path)
    few = device_rows.Split(parts.train[1::200], parts.development[::60])
    monkeypatch.setattr(device_rows, "split", lambda **options: few)
    with pytest.raises(ConfigError, match="is of other settings or rows"):
        Training(small(), tmp_path, tmp_path)


def plan_file(folder, *cells, **defaults):
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({"defaults": defaults, "cells": list(cells)}))
    return file


def test_the_plan_is_run_in_order_and_may_change_meanwhile(small, tmp_path, base, monkeypatch):
    usual = {"base": base, "layers": 1, "batch_size": 8}
    file = plan_file(tmp_path, {"name": "a"}, {"name": "b", "rate": 0.002}, {"name": "a", "passes": 2}, **usual)
    ran = []
    plain = Training.run

    def watch(self, is_over):
        ran.append((self.cell.name, self.cell.passes))
        if len(ran) == 2:
            plan_file(
                tmp_path, {"name": "a", "passes": 2}, {"name": "b", "rate": 0.002}, {"name": "c", "layers": 2}, **usual
            )
        return plain(self, is_over)

    monkeypatch.setattr(Training, "run", watch)
    monkeypatch.setattr(device_search.signal, "signal", lambda *_: None)
    folder = tmp_path / "records"
    assert device_search.run(file, None, tmp_path / "work", folder) == 0
    assert ran == [("a", 1), ("b", 1), ("a", 2), ("c", 1)]
    record = json.loads((folder / "a.json").read_text())
    assert record["passes"] == 2
    assert [point["pass"] for point in record["curve"]] == [1, 2]
    assert "values" not in record["curve"][0]["constrained"]
    assert record["test"] is None
    for key in ("settings", "settings_sha256", "data", "versions", "processor", "finished", "trained_parameters"):
        assert record[key]
    assert device_search.run(file, 0.0, tmp_path / "work", folder) == 0
    assert len(ran) == 4


def test_a_plan_must_make_sense(tmp_path, small):
    with pytest.raises(ConfigError, match="unknown key 'depth'"):
        device_plan.read_plan(plan_file(tmp_path, {"name": "a", "depth": 2}))
    with pytest.raises(ConfigError, match="stands for two recipes"):
        device_plan.read_plan(plan_file(tmp_path, {"name": "a"}, {"name": "a", "rate": 0.5}))
    with pytest.raises(ConfigError, match="unknown"):
        Cell("a", target="all")
    cells = device_plan.read_plan(
        plan_file(tmp_path, {"name": "a", "rate": 0.5}, {"name": "a", "passes": 3}, layers=4)
    )
    assert [(cell.passes, cell.rate, cell.layers) for cell in cells] == [(1, 0.5, 4), (3, 0.5, 4)]
    assert cells[0].digest() == cells[1].digest()
    assert Cell("a", schedule="linear").digest() != Cell("a", schedule="linear", passes=2).digest()


def test_records_of_other_settings_stop_the_search(small, tmp_path):
    assert Training(small(), tmp_path / "w", tmp_path / "r").run()
    with pytest.raises(ConfigError, match="give the cell a new name"):
        device_plan.waiting([small(rate=0.02)], tmp_path / "r")


def test_the_test_rows_are_looked_at_once(small, tmp_path, monkeypatch, parts):
    where = {"work": tmp_path / "w", "folder": tmp_path / "r"}
    for name in ("one", "two"):
        assert Training(small(name=name), *where.values()).run()
    with pytest.raises(AssertionError, match="looked at test rows"):  # only this command gets to the fixture's guard
        device_search.final(small(name="one"), **where)
    monkeypatch.setattr(device_rows, "test_rows", lambda: parts.development[::80])
    with pytest.raises(ConfigError, match="has not reached 2 passes"):
        device_search.final(small(name="one", passes=2), **where)
    found = device_search.final(small(name="one"), **where)
    assert found["constrained"]["commands"]["n"] + found["constrained"]["open_handed_on"]["n"] == len(
        parts.development[::80]
    )
    assert json.loads((tmp_path / "r" / "one.json").read_text())["test"] == found
    with pytest.raises(ConfigError, match="looked at once"):
        device_search.final(small(name="two"), **where)


# -------------------------------------------------------------------------------------------------------------------- page


def test_the_page_shows_the_records_best_first(small, tmp_path):
    folder, page = tmp_path / "records" / "device", tmp_path / "docs" / "device-search.md"
    for name, passes in (("one", 1), ("two", 2)):
        assert Training(small(name=name, passes=passes, rate=0.002 * passes), tmp_path / "w", folder).run()
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two")}
    blank = "\n".join(f"{a}\n{b}" for a, b in device_page.MARKS.values())
    made = device_page.text(blank, page, folder, tmp_path / "records" / "rivals")
    best, worst = sorted(records.values(), key=device_page.value, reverse=True)
    assert made.index(f"[{best['name']}](../records/device/") < made.index(f"[{worst['name']}](../records/device/")
    for record in records.values():
        low, high = record["curve"][-1]["constrained"]["commands"]["interval"]
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in made
    assert "| two | " in made  # the curve of the one with two passes
    assert "No cell yet." in made  # of CLINC150
    assert device_page.text(made, page, folder, tmp_path / "records" / "rivals") == made
    with pytest.raises(ConfigError, match="lacks the marks"):
        device_page.text("nothing", page, folder, tmp_path)


def test_the_committed_page_is_what_the_committed_records_say():
    content = device_page.PAGE.read_text(encoding="utf-8")
    assert device_page.text(content) == content

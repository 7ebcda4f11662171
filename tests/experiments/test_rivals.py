"""The rival learns what it is given, is chosen on validation rows alone, and its records have the form of the others'."""

from __future__ import annotations

import json
import statistics

import pytest
from faketask import Fake

from experiments import device_rows, rivals
from shadowpeft.data import robot
from shadowpeft.data.actions import REMOTE
from shadowpeft.evaluate import rival

WORDS = {
    "Sit": ("sit down", "坐下"),
    "Bark": ("bark loud", "叫两声"),
    REMOTE: ("why is the sky blue", "天空为什么是蓝的"),
}


def rows(kind: str, count: int) -> list[dict[str, str]]:
    """Commands and open requests in two languages."""
    return [
        {"id": f"{kind}-{i}-{skill}", "split": f"{kind}_normal", "lang": lang, "skill": skill, "prompt": f"{text} {i}"}
        for i in range(count)
        for skill, texts in WORDS.items()
        for lang, text in zip(("en", "zh"), texts, strict=True)
    ]


@pytest.fixture
def tiny(monkeypatch):
    """Two tasks of a few rows instead of the real ones; the C that each fit was given."""

    def split(*, open_rows: bool = True, hold_out: bool = True, more_rows: bool = False) -> device_rows.Split:
        return device_rows.Split(rows("train", 6 if hold_out else 8), rows("validation", 2))

    monkeypatch.setattr(device_rows, "split", split)
    monkeypatch.setattr(rivals, "get_task", lambda name: Fake("classify"))


def test_words_and_characters_of_both_languages_are_learnt():
    train, asked = rows("train", 5), rows("validation", 9)
    model = rivals.fit([r["prompt"] for r in train], [r["skill"] for r in train])
    labels, margins = rivals.predict(model, [r["prompt"] for r in asked])
    assert labels == [r["skill"] for r in asked]
    assert min(margins) > 0
    far = rivals.predict(model, ["zzz"])[1][0]
    assert far < statistics.mean(margins)


def test_two_classes_have_a_margin_too():
    model = rivals.fit(["sit down", "sit now", "bark", "bark loud"], ["Sit", "Sit", "Bark", "Bark"])
    labels, margins = rivals.predict(model, ["sit", "bark"])
    assert labels == ["Sit", "Bark"]
    assert min(margins) > 0


def test_equal_fits_give_equal_predictions():
    texts, labels = [r["prompt"] for r in rows("train", 4)], [r["skill"] for r in rows("train", 4)]
    asked = ["sit", "叫", "sky", "loud"]
    assert rivals.predict(rivals.fit(texts, labels), asked) == rivals.predict(rivals.fit(texts, labels), asked)


def test_c_is_the_best_of_the_validation_rows_and_the_nearest_to_1_of_equals():
    train = [("one", 0), ("two", 1), ("six", 2)] * 3
    easy = rivals.Problem("p", "t", "fake", train, [("one", 0), ("two", 1), ("six", 2)])
    found = rivals.choose_c(easy)
    assert found["chosen"] == 1.0
    assert not found["at_edge"]
    assert [trial["score"] for trial in found["trials"]] == [1.0] * len(rivals.GRID)
    assert found["n"] == 3
    wrong = rivals.choose_c(rivals.Problem("p", "t", "fake", train, [("one", 1), ("two", 1)]), grid=(0.1, 1.0))
    assert max(trial["score"] for trial in wrong["trials"]) == 0.5


def test_a_record_has_the_form_of_the_other_methods(tiny, tmp_path):
    made = rivals.record(rivals.class_problem("fake"))
    result = made["results"][f"{made['task']}-svc"]
    assert result["n"] == 12
    values = [float(v) for v in made["values"][f"{made['task']}-svc"].split()]
    assert sum(values) / len(values) == pytest.approx(result["score"])
    assert result["score"] > 0.9  # one letter fills each text
    assert result["interval"][0] <= result["score"] <= result["interval"][1]
    assert made["rate"]["chosen"] in rivals.GRID
    assert made["training"]["rows"] == 24
    for key in ("id", "spec", "task", "method", "seed", "settings_sha256", "versions", "processor", "finished"):
        assert made[key] is not None
    json.dumps(made)


def test_test_rows_do_not_choose(tiny, monkeypatch):
    """With other test rows, C, training rows and validation rows stay."""
    before = rivals.record(rivals.class_problem("fake"))
    plain = Fake.rows
    monkeypatch.setattr(Fake, "rows", lambda self, split: plain(self, "train" if split == "test" else split))
    after = rivals.record(rivals.class_problem("fake"))
    assert before["results"] != after["results"]
    assert before["rate"] == after["rate"]
    assert before["training"]["sha256"] == after["training"]["sha256"]


def test_the_robots_c_is_chosen_on_held_out_phrasings_and_fitted_on_all_rows(tiny):
    problem = rivals.robot_problem("robot-svc-open")
    assert len(problem.train) == len(rows("train", 6))
    assert [label for _, label in problem.validation] == [row["skill"] for row in rows("validation", 2)]
    assert len(rivals.final_rows(problem)) == len(rows("train", 8))
    found = rivals.development(problem, 1.0)
    assert found["commands"]["score"] == 1.0
    assert found["open_handed_on"] == {**found["open_handed_on"], "score": 1.0, "n": 4}


def test_records_that_are_there_are_not_made_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "problems", lambda: [rivals.class_problem("fake")])
    assert rivals.main(["--records", str(tmp_path)]) == 0
    (file,) = (tmp_path / "rivals").glob("*.json")
    before = file.stat().st_mtime_ns
    assert rivals.main(["--records", str(tmp_path)]) == 0
    assert file.stat().st_mtime_ns == before


def test_the_packaged_rival_is_the_recorded_one():
    """The demo and the system test fit it anew, with the C that its record chose."""
    stored = json.loads((rivals.RECORDS / rivals.SPEC / "robot-svc-open.json").read_text())
    assert stored["rate"]["chosen"] == rival.ROBOT_C
    assert stored["training"]["rows"] == 4447
    commands = [r for r in robot.load("validation_normal") if r["lang"] == "en"][:40]
    labels, _ = rivals.predict(rival.fit_robot(), [r["prompt"] for r in commands])
    assert sum(a == r["skill"] for a, r in zip(labels, commands, strict=True)) >= 30

"""``shadowpeft eval --data FILE --skills FILE``: requests of one's own, judged by the action of each answer."""

import json

import pytest

from chatbase import save_sitting_adapter, write_rows
from commands import call
from shadowpeft.data.tasks.base import Example
from shadowpeft.data.tasks.intents import Intents

ROWS = [
    {"prompt": "sit down", "skill": "Sit"},
    {"prompt": "take a seat", "skill": "Sit"},
    {"prompt": "say something", "skill": "Bark"},
    {"prompt": "who was Ada Lovelace?", "skill": "REMOTE"},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter both halves of which say ``[Sit()]``, requests, and the names of the actions."""
    folder = tmp_path_factory.mktemp("made")
    adapter = save_sitting_adapter(folder)
    (folder / "actions.txt").write_text("Sit\nBark\n")
    rows = write_rows(folder / "held-out.jsonl", ROWS)
    return {"adapter": adapter, "rows": rows, "actions": folder / "actions.txt"}


def evaluated(monkeypatch, capsys, made, *more):
    return call(monkeypatch, capsys, "eval", made["adapter"], "--data", made["rows"], "--skills", made["actions"], *more)


def test_each_half_is_judged_by_its_actions(made, monkeypatch, capsys):
    code, out, _ = evaluated(monkeypatch, capsys, made, "--mode", "detached", "--mode", "attached", "--json")
    assert code == 0
    found = json.loads(out)
    for mode in ("detached", "attached"):
        scores = found["modes"][mode]["scores"]
        assert (scores["score"], scores["skill"], scores["remote"]) == (0.5, pytest.approx(2 / 3), 0.0)
    assert found["modes"]["detached"]["constrained"]["score"] == 0.5
    assert "constrained" not in found["modes"]["attached"]
    assert "loss" not in found["modes"]["detached"]


def test_the_table_names_the_file(made, monkeypatch, capsys):
    code, out, _ = evaluated(monkeypatch, capsys, made, "--mode", "detached", "--limit", "3")
    assert code == 0
    assert "constrained" in out
    assert "held-out.jsonl" in "".join(out.split())


def test_rows_to_train_on_have_their_action_in_the_answer(made, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "sit", "response": "[Sit()] ok"}, {"prompt": "who?", "response": "Ada.", "shadow_response": "[REMOTE]"}]
    own = {**made, "rows": write_rows(tmp_path / "rows.jsonl", rows)}
    code, out, _ = evaluated(monkeypatch, capsys, own, "--mode", "detached", "--json")
    assert code == 0
    assert json.loads(out)["modes"]["detached"]["scores"] == {"score": 0.5, "skill": 1.0, "remote": 0.0, "tagged": 0.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--skills", "robot"], "has the skill 'Nod', which is none of the 34 known ones"),
        (["--method", "likelihood"], "--skills judges what is generated but --method is likelihood"),
        (["--data", "robot"], "a task and robot have their own"),
    ],
)
def test_what_cannot_be_judged_is_refused(made, tmp_path, monkeypatch, capsys, more, message):
    own = {**made, "rows": write_rows(tmp_path / "rows.jsonl", [{"prompt": "nod", "skill": "Nod"}])}
    code, _, err = evaluated(monkeypatch, capsys, own, *more)
    assert code == 2
    assert message in " ".join(err.split())


def test_words_are_right_where_no_action_is():
    task = Intents("x", ROWS, ["Sit", "Bark"], None)
    examples = [Example(str(n), row["prompt"], "", row["skill"]) for n, row in enumerate(ROWS)]
    said = [task.parse(text) for text in ("[Sit()] ok", "[Nod()]", "[Bark()]", "She wrote programs.")]
    assert said == ["Sit", None, "Bark", None]
    assert task.score(said, examples) == {"score": 0.75, "skill": pytest.approx(2 / 3), "remote": 1.0, "tagged": 0.0}

"""``shadowpeft plan`` counts the rows that the steps reach, in the order of training."""

import json

import pytest

from chatbase import run_file, save_base, write_rows
from commands import call
from shadowpeft.apps.plan import Shape, shape_of
from shadowpeft.data import chat


def sequence(length, base, shadow):
    """Learnt from its second token on."""
    return chat.Sequence(list(range(length)), 1, base, shadow)


ALONE = [sequence(5, False, True)] * 8
BOTH = [sequence(11, True, True), sequence(21, True, False)] * 5


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (4, Shape(5, 5, 0, 4 / 5)),
        (8, Shape(5, 5, 0, 4 / 5)),
        (13, Shape((40 + 80) / 13, 21, 80 / 120, (32 + 25) / 120)),
        (18, Shape(200 / 18, 21, 160 / 200, (32 + 50) / 200)),
        (1000, Shape(200 / 18, 21, 160 / 200, (32 + 50) / 200)),
        (None, Shape(200 / 18, 21, 160 / 200, (32 + 50) / 200)),
    ],
)
def test_the_shadows_own_rows_come_first(drawn, expected):
    found = shape_of(chat.ChatDataset(ALONE + BOTH, [8, 10]), drawn)
    assert vars(found) == pytest.approx(vars(expected))


def test_some_rows_of_one_part_are_like_all_of_it():
    rows = chat.ChatDataset(BOTH)
    assert vars(shape_of(rows, 3)) == pytest.approx(vars(shape_of(rows, None)))


def test_a_plan_that_ends_early(tmp_path, monkeypatch, capsys):
    long = {"prompt": "why " + "is " * 25, "response": "because", "path": "base"}
    short = {"prompt": "sit", "response": "[Sit()]", "path": "shadow"}
    settings = {"batch_size": 4, "shadow_epochs": 1, "freeze_shadow": True, "max_steps": 3}
    base = save_base(tmp_path / "base")

    def planned(steps):
        train = write_rows(tmp_path / "train.jsonl", [short] * 8 + [long] * 8)
        content = run_file(tmp_path / "run", base, train, training={**settings, "max_steps": steps})
        (tmp_path / "run.yaml").write_text(json.dumps(content))
        code, out, err = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "--json")
        assert code == 0, err
        return json.loads(out)

    early, whole = planned(3), planned(4)
    assert early["longest_tokens"] == whole["longest_tokens"]
    both = whole["longest_tokens"]
    alone = 2 * whole["mean_tokens"] - both  # eight rows of each
    assert alone < both / 2
    assert early["mean_tokens"] == pytest.approx((8 * alone + 4 * both) / 12, abs=0.06)
    assert early["tokens"] == pytest.approx(8 * alone + 4 * both, abs=1)

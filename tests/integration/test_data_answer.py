"""``shadowpeft data answer``: rows with what a model says, for the shadow to learn."""

import errno
import json

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import shadowpeft
from chatbase import save_sitting_base
from commands import call
from shadowpeft.apps import answer_rows
from shadowpeft.data.chat_rows import check_row, read_file
from shadowpeft.generate import Answer

HISTORY = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
OPEN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
SAID = "[Sit()]"
ROWS = [
    {"prompt": "sit", "response": "I sit."},
    {"prompt": "only the base", "response": "yes", "path": "base"},
    {"prompt": "why?", "response": "Because.", "shadow_response": "[REMOTE]"},
    {"messages": [*HISTORY, {"role": "assistant", "content": "ok"}]},
    {"prompt": "unlabelled"},
    {"messages": OPEN},
    {"prompt": "its own", "response": "[Bark()]", "path": "shadow"},
]
EXPECTED = [
    {**ROWS[0], "shadow_response": SAID},
    *ROWS[1:3],
    {**ROWS[3], "shadow_response": SAID},
    {"prompt": "unlabelled", "response": SAID, "path": "shadow"},
    {"messages": [*OPEN, {"role": "assistant", "content": SAID}], "path": "shadow"},
    ROWS[6],
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An untrained adapter, so that it says what its base says: ``SAID``, and ends."""
    folder = tmp_path_factory.mktemp("answers")
    base = AutoModelForCausalLM.from_pretrained(save_sitting_base(folder / "base"))
    config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=2)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder / "adapter"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(monkeypatch, capsys, adapter, file, out, *more):
    return call(monkeypatch, capsys, "data", "answer", adapter, file, "--out", out, *more)


@pytest.mark.parametrize("mode", ["attached", "base"])
def test_each_row_gets_what_the_model_says_where_it_is_asked(monkeypatch, capsys, tmp_path, adapter, mode):
    file = write(tmp_path / "rows.jsonl", ROWS)
    code, out, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", "--mode", mode, "--json")
    assert code == 0, err
    counts, made = json.loads(out), lines(tmp_path / "said.jsonl")
    assert (counts["rows"], counts["answered"] + counts["cut"] + counts["empty"], counts["kept"]) == (7, 4, 3)
    assert len(read_file(tmp_path / "said.jsonl")) == len(made)  # training reads it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "said.jsonl"]
    assert made == EXPECTED


def test_an_answer_that_does_not_end_is_not_learnt(monkeypatch, capsys, tmp_path, adapter):
    file = write(tmp_path / "rows.jsonl", ROWS)
    code, out, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", "--max-new-tokens", 3)
    assert (code, out) == (2, "")
    assert "no answer ended within 3 tokens, so nothing is written; raise --max-new-tokens" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    said = len(SAID) + 1  # a token a byte, and the end
    code, _, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", "--max-new-tokens", said)
    assert code == 0, err
    assert lines(tmp_path / "said.jsonl") == EXPECTED
    counts = answer_rows._Counts()
    cut, bare = (Answer("half", 3, 0.0, ended=False) for _ in range(2))
    assert json.loads(counts.add(answer_rows._Row("1", ROWS[0], []), cut)) == ROWS[0]
    assert counts.add(answer_rows._Row("2", ROWS[4], [], bare=True), bare) == ""
    assert (counts.rows, counts.cut, counts.answered) == (2, 2, 0)


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1.0, "--seed", 4, "--max-new-tokens", 60)])
def test_a_stopped_command_goes_on_and_ends_as_one_that_was_not(monkeypatch, capsys, tmp_path, adapter, sampling):
    monkeypatch.setattr(answer_rows, "_CHUNK", 2)
    file = write(tmp_path / "rows.jsonl", ROWS)
    assert run(monkeypatch, capsys, adapter, file, tmp_path / "whole.jsonl", *sampling)[0] == 0
    stop, calls = answer_rows.write_json, []

    def dying(path, content):
        calls.append(path)
        if len(calls) == 4:  # the settings, two chunks, and the third one's rows without their state
            raise KeyboardInterrupt
        stop(path, content)

    monkeypatch.setattr(answer_rows, "write_json", dying)
    assert run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", *sampling)[0] != 0
    assert not (tmp_path / "said.jsonl").exists()
    monkeypatch.setattr(answer_rows, "write_json", stop)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "said.jsonl.begun").glob("*.json")}
    assert len(kept) == 3
    for more, problem in ((("--mode", "base"), "other mode;"), (("--system", "x"), "other system;")):
        code, _, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", *sampling, *more)
        assert code == 2
        assert problem in " ".join(err.split())
    code, out, _ = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", "--json", *sampling)
    assert code == 0
    assert json.loads(out)["rows"] == 7
    assert (tmp_path / "said.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "said.jsonl.begun").exists()


def test_drafts_change_no_answer(monkeypatch, capsys, tmp_path, adapter):
    file = write(tmp_path / "rows.jsonl", ROWS)
    code, _, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl", "--speculative")
    assert code == 0, err
    assert lines(tmp_path / "said.jsonl") == EXPECTED


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": "x", "response": "y", "path": "base"}], "no row that both paths learn"),
        ([{"prompt": "x", "response": "y", "tools": [{"type": "function"}]}], "line 1 has tools or calls"),
        ([{"prompt": 5}], "must be strings"),
        ([{"prompt": "x", "weight": 1}], "has the key 'weight'"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "line 1"),
        ([7], "line 1 is a JSON int"),
        ([{"prompt": "x", "shadow_response": "y"}], "line 1"),
        ([{"messages": OPEN, "shadow_response": "y"}], "line 1 has no answer, so the model's is for the shadow alone"),
        ([{"prompt": "x", "path": "base"}], "line 1 has no answer, so the model's is for the shadow alone"),
        ([{"prompt": [{"role": "assistant", "content": "x"}]}], "line 1 has a prompt that ends with an answer"),
        ([{"prompt": "x"}] * 70 + [{"prompt": "y" * 2000}], "line 71: a prompt has 20"),
    ],
)
def test_what_training_would_refuse_is_refused(monkeypatch, capsys, tmp_path, adapter, rows, problem):
    code, _, err = run(monkeypatch, capsys, adapter, write(tmp_path / "r.jsonl", rows), tmp_path / "said.jsonl")
    assert code == 2
    assert problem in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_rows_keep_their_form_and_all_that_stands_in_them(monkeypatch, capsys, tmp_path, adapter):
    bad = {"role": "assistant", "content": "bad", "weight": 0}
    weighted = [*HISTORY, bad, *OPEN[2:], {"role": "assistant", "content": "d"}]
    talk = {"conversations": [{"from": "human", "value": "x"}]}
    rows = [
        {"id": 8, "source": "s", "prompt": "x", "response": "y", "path": "base"},
        {"messages": weighted, "note": "n"},
        {**talk, "id": 1},
        {"instruction": "x", "input": "z", "output": None},
        {"prompt": OPEN},
        {"instruction": "x", "output": "y"},
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    code, _, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl")
    assert code == 0, err
    assert lines(tmp_path / "said.jsonl") == [
        rows[0],
        {**rows[1], "shadow_response": SAID},
        {"conversations": [*talk["conversations"], {"from": "gpt", "value": SAID}], "id": 1, "path": "shadow"},
        {"instruction": "x", "input": "z", "output": SAID, "path": "shadow"},
        {"prompt": OPEN, "completion": [{"role": "assistant", "content": SAID}], "path": "shadow"},
        {**rows[5], "shadow_response": SAID},
    ]
    assert len([check_row(row, "x", every_turn=True) for row in lines(tmp_path / "said.jsonl")]) == 6


def test_a_command_that_was_stopped_at_its_very_end_is_finished_by_the_next(monkeypatch, capsys, tmp_path, adapter):
    file, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "said.jsonl"
    discard = answer_rows.discard

    def dying(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(answer_rows, "discard", dying)
    assert run(monkeypatch, capsys, adapter, file, out)[0] != 0
    monkeypatch.setattr(answer_rows, "discard", discard)
    assert (tmp_path / "said.jsonl.begun").exists()
    code, _, err = run(monkeypatch, capsys, adapter, file, out)
    assert code == 0
    assert "was complete already" in " ".join(err.split())
    assert (lines(out), (tmp_path / "said.jsonl.begun").exists()) == (EXPECTED, False)


@pytest.mark.parametrize("settings", [None, "[]", "{"])
def test_a_folder_that_is_somebody_elses_stays(monkeypatch, capsys, tmp_path, adapter, settings):
    file, begun = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "said.jsonl.begun"
    begun.mkdir()
    write(begun / "mine.jsonl", ROWS)
    if settings is not None:
        (begun / "settings.json").write_text(settings)
    code, _, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl")
    assert code == 2
    assert "is not what this command has begun" in " ".join(err.split())
    assert lines(begun / "mine.jsonl") == ROWS


def test_what_is_written_does_not_lie_among_what_is_read(monkeypatch, capsys, tmp_path, adapter):
    write(tmp_path / "rows.jsonl", ROWS)
    code, _, err = run(monkeypatch, capsys, adapter, tmp_path, tmp_path / "said.jsonl")
    assert code == 2
    assert "whose files are the rows; choose another --out" in " ".join(err.split())


def test_a_full_disk_keeps_what_was_answered(monkeypatch, capsys, tmp_path, adapter):
    file = write(tmp_path / "rows.jsonl", ROWS)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(answer_rows, "write_text", full)
    code, _, err = run(monkeypatch, capsys, adapter, file, tmp_path / "said.jsonl")
    assert code == 2
    assert "what was answered is kept there: give the command again when it can" in " ".join(err.split())


def test_nothing_is_overwritten(monkeypatch, capsys, tmp_path, adapter):
    file = write(tmp_path / "rows.jsonl", ROWS)
    code, _, err = run(monkeypatch, capsys, adapter, file, file)
    assert (code, lines(file)) == (2, ROWS)
    assert "exists; choose another --out" in " ".join(err.split())


def test_a_packaged_set_is_asked_under_its_system_message(monkeypatch, capsys, tmp_path, adapter):
    monkeypatch.setattr("shadowpeft.train.rows.packaged_rows", lambda source, split: [dict(PACKAGED)])
    code, _, err = run(monkeypatch, capsys, adapter, "robot", tmp_path / "said.jsonl", "--system", "You are a dog.")
    assert code == 0, err
    assert "train with data.system: \"You are a dog.\"" in " ".join(err.split())
    assert lines(tmp_path / "said.jsonl") == [{"prompt": "sit", "response": "[Sit()] I sit.", "shadow_response": SAID}]


PACKAGED = {
    "messages": [{"role": "user", "content": "sit"}],
    "response": "[Sit()] I sit.",
    "shadow_response": None,
    "path": "both",
}

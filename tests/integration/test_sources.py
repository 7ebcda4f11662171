"""Training rows from data sets of ``datasets``, with columns of other names, from its cache without network, and streamed."""

import json
import shutil

import datasets
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from chatbase import plain_rows, run_file, save_base, write_rows
from commands import call
from shadowpeft.data import chat, sources
from shadowpeft.data import streamed as streaming
from shadowpeft.data.sources import Source, rows_of
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.train import speed
from shadowpeft.train.config import parse_run, read_run
from shadowpeft.train.rows import load_run_data
from shadowpeft.train.run import train

QUESTIONS = [{"question": f"say {'ab' * (1 + i % 4)}", "answer": f"ok {'x' * (i % 5)}", "id": i} for i in range(12)]
COLUMNS = {"prompt": "question", "response": "answer"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    data = folder / "questions"
    data.mkdir()
    write_rows(data / "train.jsonl", QUESTIONS)
    write_rows(data / "test.jsonl", QUESTIONS[:4])
    return {
        "base": save_base(folder / "base"),
        "folder": str(data),
        "rows": write_rows(folder / "rows.jsonl", plain_rows(30)),
        "plain": write_rows(folder / "plain.jsonl", [{k: row[v] for k, v in COLUMNS.items()} for row in QUESTIONS]),
    }


def run(made, folder, train, **sections):
    content = run_file(folder, made["base"], "", **sections)
    content["data"]["train"] = train
    return parse_run(content, "here")


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


# ------------------------------------------------------------------------------------------------------------ data sets


def test_a_pattern_is_said_to_be_none(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="does not exist, and patterns are not read; give a file, or a folder"):
        next(rows_of(Source(path=str(tmp_path / "*.jsonl"))))


def test_a_folder_of_datasets_with_other_columns_trains_as_the_same_rows_of_a_file(made, tmp_path):
    given = {"path": made["folder"], "columns": COLUMNS}
    sections = {"data": {"validation": {**given, "split": "test"}}}
    summary = train(run(made, tmp_path / "set", given, **sections), quiet=True)
    train(run(made, tmp_path / "file", made["plain"]), quiet=True)
    assert same(weights(tmp_path / "set"), weights(tmp_path / "file"))
    assert summary["eval_task_loss"] > 0
    record = json.loads((tmp_path / "set" / "data.json").read_text())
    assert record["train"]["source"] == f"{made['folder']} (train)"
    assert (record["train"]["rows"], record["validation"]["rows"]) == (12, 4)
    assert read_run(tmp_path / "set" / "config.yaml").data.train.columns == COLUMNS


@pytest.fixture
def cached(made, tmp_path, monkeypatch):
    """A data set of the Hub as an earlier run has left it in the cache, and no network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.load_dataset("json", data_files={"train": f"{made['folder']}/train.jsonl"}, cache_dir=str(cache))
    (digest,) = (cache / "json").glob("default-*/0.0.0/*[!k]")
    there = cache / "someone___questions" / "default" / "0.0.0" / digest.name
    there.parent.mkdir(parents=True)
    shutil.copytree(digest, there)
    (there / "json-train.arrow").rename(there / "questions-train.arrow")
    shutil.rmtree(cache / "json")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return {"hub": "someone/questions", "columns": COLUMNS}


def test_a_data_set_of_the_hub_comes_from_the_cache_without_network(made, tmp_path, cached):
    train(run(made, tmp_path / "hub", cached), quiet=True)
    train(run(made, tmp_path / "file", made["plain"]), quiet=True)
    assert same(weights(tmp_path / "hub"), weights(tmp_path / "file"))
    record = json.loads((tmp_path / "hub" / "data.json").read_text())
    assert record["train"]["source"] == "someone/questions (train)"


def test_what_is_not_in_the_cache_is_named_with_the_way_out(made, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as refused:
        list(rows_of(Source(hub="nobody/nothing", revision="v2")))
    assert "the data set 'nobody/nothing' is not in the cache of this machine" in str(refused.value)
    assert "fetch it once with the network, or give files" in str(refused.value)
    with pytest.raises(DataError, match=r"its split is 'validation' .*leave it out"):
        list(rows_of(Source(path=made["folder"], split="validation")))


def test_everything_that_a_run_names_is_asked_for(monkeypatch):
    asked = {}

    def load(name, config, **rest):
        asked.update(name=name, config=config, **rest)
        return datasets.Dataset.from_list([{"text": "a", "kind": 1}]).cast_column(
            "kind", datasets.ClassLabel(names=["cold", "hot"])
        )

    monkeypatch.setattr(sources, "load", lambda source, streaming: load("x", None))
    source = Source(hub="a/b", config="en", split="test[:5]", revision="abc", columns={"text": "text", "label": "kind"})
    assert list(rows_of(source)) == [("a/b@abc (en, test[:5]), row 1", {"text": "a", "label": "hot"})]
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load_dataset", load)
    list(rows_of(source, streaming=True))
    assert asked == {"name": "a/b", "config": "en", "split": "test[:5]", "revision": "abc", "streaming": True}


def test_a_part_of_a_single_file_is_what_its_split_names(made, tmp_path):
    from shadowpeft.tokenizer import load_tokenizer

    whole = [row for _, row in rows_of(Source(path=made["rows"]))]
    parts = {"train": "train[:75%]", "validation": "train[75%:]"}
    given = {part: {"path": made["rows"], "split": split} for part, split in parts.items()}
    rows = {part: list(rows_of(Source(**source))) for part, source in given.items()}
    assert (len(whole), len(rows["train"]), len(rows["validation"])) == (30, 22, 8)
    assert [row for part in parts for _, row in rows[part]] == whole
    assert rows["validation"][0][0] == f"{made['rows']}, line 23"
    record = load_run_data(
        run(made, tmp_path, given["train"], data={"validation": given["validation"]}), load_tokenizer(made["base"]), print
    ).record
    assert [record[part]["rows"] for part in parts] == [22, 8]
    assert [record[part]["source"] for part in parts] == [f"{made['rows']} ({split})" for split in parts.values()]
    assert record["train"]["sha256"] != record["validation"]["sha256"]
    assert [row for _, row in rows_of(Source(path=made["rows"], split="train[-2:]+train[:1]"))] == [*whole[-2:], whole[0]]


@pytest.mark.parametrize("split", ["test", "train[:3", "train[:3](closest)"])
def test_a_split_that_a_single_file_does_not_have_is_refused(made, split):
    with pytest.raises(DataError) as refused:
        list(rows_of(Source(path=made["rows"], split=split)))
    assert f"'{made['rows']}' is a single file, all 30 rows of which are the split 'train'" in str(refused.value)
    assert f"but its split is '{split}'" in str(refused.value)
    with pytest.raises(DataError, match="from its beginning to its end but its split is"):
        next(rows_of(Source(path=made["rows"], split=split), streaming=True))


def test_a_missing_column_names_those_there_are(made):
    with pytest.raises(DataError, match=r"line 1 has no column 'questoin' \(did you mean 'question'\?\); there are answer, id"):
        list(rows_of(Source(path=made["folder"], columns={"prompt": "questoin", "response": "answer"})))
    with pytest.raises(DataError, match=r"line 1 has no column 'a'"):
        list(rows_of(Source(path=made["plain"], columns={"prompt": "a"})))


def test_a_column_that_may_be_absent_may_be_so_in_some_rows_but_not_in_all(tmp_path):
    columns = {"prompt": "q", "response": "a", "shadow_response": "s"}
    table, lines = tmp_path / "rows.csv", tmp_path / "rows.jsonl"
    table.write_text("q,a,s\nhi,yo,\nho,yu,S\n")
    write_rows(lines, [{"q": "hi", "a": "yo"}, {"q": "ho", "a": "yu", "s": "S"}])
    for file in (table, lines):
        found = [chat.check_row(row, where) for where, row in rows_of(Source(path=str(file), columns=columns))]
        assert [row["shadow_response"] for row in found] == [None, "S"]
    columns["shadow_response"] = "ss"
    for file, place in ((table, f"{table}, line 2"), (lines, str(lines))):
        with pytest.raises(DataError) as refused:
            list(rows_of(Source(path=str(file), columns=columns)))
        assert str(refused.value) == (
            f"{place} has no column 'ss' (did you mean 's'?); there are a, q, s, correct data's 'columns'"
        )
    table.write_text("q,a\nhi,yo\nho,\n")  # there is the column: the row lacks the answer
    _, (where, row) = rows_of(Source(path=str(table), columns={"prompt": "q", "response": "a"}))
    with pytest.raises(DataError, match="line 3 has nothing as 'response'; write it, or leave the row out"):
        chat.check_row(row, where)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "c", "columns": {"prompt": "q", "paht": "a"}}, "columns has the key 'paht' (did you mean 'path'?)"),
        ({"hub": "a/b", "path": "c"}, "hub and path are both set"),
        ({"split": "train"}, "hub and path are not set"),
        ({"path": "c", "revision": "main"}, "revision and config are of a data set on the Hub"),
        ({"hub": "a/b", "splitt": "x"}, "unknown key 'data.train.splitt' (did you mean 'split'?)"),
        (7, "'data.train' is 7"),
    ],
)
def test_a_wrong_source_is_refused(made, tmp_path, given, message):
    with pytest.raises(ConfigError) as refused:
        run(made, tmp_path, given)
    assert message in str(refused.value)
    assert str(refused.value).count("data.train") == message.count("data.train")  # one problem, told once


def test_a_hub_id_as_a_file_name_says_how_to_write_it(made, tmp_path):
    with pytest.raises(DataError, match=r"'someone/questions' does not exist; .*write \{hub: someone/questions\} in its place"):
        train(run(made, tmp_path / "run", "someone/questions"), quiet=True)


# -------------------------------------------------------------------------------------------------------------- streamed


def streamed(made, folder, train_on=None, **training):
    data = {"streaming": True, "shuffle_buffer": 8, **training.pop("data", {})}
    return run(made, folder, train_on or made["rows"], data=data, training={"max_steps": 12, **training})


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_streamed_run_over_several_passes_resumes_exactly(made, tmp_path, packing):
    settings = {"save_every": 6, "data": {"packing": packing}}
    train(streamed(made, tmp_path / "whole", **settings), quiet=True)
    cut = streamed(made, tmp_path / "cut", **settings)
    train(cut, quiet=True)
    for path in (tmp_path / "cut" / "checkpoint-12").iterdir():
        path.unlink()
    (tmp_path / "cut" / "checkpoint-12").rmdir()
    train(cut, resume=True, quiet=True)
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    other = streamed(made, tmp_path / "other", data_seed=5, **settings)
    train(other, quiet=True)
    assert not same(weights(tmp_path / "other"), weights(tmp_path / "whole"))


def test_rows_are_read_as_they_are_needed(made, tmp_path, monkeypatch):
    endless = tmp_path / "endless.jsonl"
    endless.write_text("")
    read = []

    def rows(source, *, streaming):
        assert streaming
        for n in range(10**9):
            read.append(n)
            yield f"row {n}", {"prompt": f"say {n}", "response": "ok"}

    monkeypatch.setattr("shadowpeft.train.rows.rows_of", rows)
    summary = train(streamed(made, tmp_path / "run", str(endless), max_steps=3, batch_size=4), quiet=True)
    assert summary["steps"] == 3
    assert len(read) < 512 + 512 + 8 + 5 * 4  # the sample, and what three steps, the buffer and one batch ahead need


def test_every_row_of_a_pass_comes_once_in_another_order_each_time(made):
    from shadowpeft.tokenizer import load_tokenizer

    data = load_run_data(streamed(made, "unused"), load_tokenizer(made["base"]), print)
    seen = iter(data.stream)
    passes = [[tuple(next(seen)["input_ids"]) for _ in range(30)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(tuple(s.ids) for s in data.training)
    assert passes[0] != passes[1]


def test_rows_that_are_left_out_are_counted_and_a_damaged_one_is_named(made, tmp_path, capsys):
    file = write_rows(tmp_path / "rows.jsonl", [*plain_rows(6), {"prompt": "a" * 200, "response": "b"}])
    with pytest.raises(DataError, match=r"line 7 has \d+ tokens but data.max_length is 128"):
        train(streamed(made, tmp_path / "a", file), quiet=True)
    summary = train(streamed(made, tmp_path / "b", file, data={"too_long": "skip"}), quiet=True)
    assert summary["rows_left_out"] == 1
    card = (tmp_path / "b" / "adapter" / "README.md").read_text()
    assert "(streamed, sha256" in card


def test_a_changed_file_is_noticed_when_a_streamed_run_is_resumed(made, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", plain_rows(8))
    made_run = streamed(made, tmp_path / "run", file, save_every=6)
    train(made_run, quiet=True)
    write_rows(tmp_path / "rows.jsonl", plain_rows(9))
    with pytest.raises(ConfigError, match="has changed since the run"):
        train(made_run, resume=True, quiet=True)


def test_rows_that_are_too_long_may_come_first(made, tmp_path, monkeypatch):
    from shadowpeft.tokenizer import load_tokenizer

    monkeypatch.setattr(streaming, "SAMPLE", 3)
    long = {"prompt": "a" * 200, "response": "b"}
    file = write_rows(tmp_path / "rows.jsonl", [*[long] * 5, *plain_rows(4)])
    tokenizer = load_tokenizer(made["base"])
    data = load_run_data(streamed(made, tmp_path, file, data={"too_long": "skip"}), tokenizer, print)
    assert len(data.training) == 1
    write_rows(tmp_path / "rows.jsonl", [long] * 5)
    with pytest.raises(DataError, match="holds no rows that can be learnt"):
        load_run_data(streamed(made, tmp_path, file, data={"too_long": "skip"}), tokenizer, print)


def test_a_run_that_a_row_ended_before_its_first_checkpoint_goes_on_with_the_row_corrected(made, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SAMPLE", 3)
    file = write_rows(tmp_path / "rows.jsonl", [*plain_rows(20), {"prompt": "a"}])
    with pytest.raises(DataError, match="line 21 has the key 'prompt' but needs"):
        train(streamed(made, tmp_path / "run", file), quiet=True)
    write_rows(tmp_path / "rows.jsonl", plain_rows(21))
    with pytest.raises(ConfigError, match="is not empty; choose another output, or continue with --resume"):
        train(streamed(made, tmp_path / "run", file), quiet=True)
    train(streamed(made, tmp_path / "run", file), resume=True, quiet=True)
    train(streamed(made, tmp_path / "new", file), quiet=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "new"))
    record = [json.loads((tmp_path / name / "data.json").read_text())["train"]["sha256"] for name in ("run", "new")]
    assert record[0] == record[1]


def test_a_streamed_run_by_time(made, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "ENOUGH", 0.1)
    summary = train(streamed(made, tmp_path / "run", max_steps=None, target_minutes=0.01), quiet=True)
    assert summary["steps"] == summary["planned_steps"] >= 1


def test_the_plan_of_streamed_rows_says_what_cannot_be_known(made, tmp_path, monkeypatch, capsys):
    content = run_file(tmp_path / "run", made["base"], made["rows"], data={"streaming": True})
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    code, out, _ = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["sequences"] == "not known (streamed)"
    assert "lengths are those of the first 30" in found["streaming"]
    assert found["steps"] == 4


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"max_steps": None}}, "the number of rows is not known; set training.max_steps or target_minutes"),
        ({"training": {"shadow_epochs": 1}}, "training.shadow_epochs needs all rows at hand"),
        ({"data": {"shadow_repeats": 1}}, "data.shadow_repeats needs all rows at hand"),
        ({"shadow": {"last_layers": 1}, "training": {"cache_activations": True}}, "leave it or data.streaming out"),
    ],
)
def test_what_cannot_be_streamed(made, tmp_path, sections, message):
    sections = {**sections, "data": {"streaming": True, **sections.get("data", {})}}
    with pytest.raises(ConfigError) as refused:
        run(made, tmp_path, made["rows"], **sections)
    assert message in str(refused.value)




def folder_of(tmp_path, files):
    folder = tmp_path / "rows"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_cells_of_a_folder_are_those_of_its_files(tmp_path):
    """The datasets library would read numbers, absent values and one kind of file alone."""
    table = "prompt,response\n2+2,04\nnothing?,null\n"
    folder = folder_of(tmp_path, {"a.csv": table, "b.jsonl": '{"prompt": "c", "response": "d"}\n'})
    for name in ("README.md", "NOTES.md", "LICENSE"):
        (folder / name).write_text("# Rows")
    rows = [(row["prompt"], row["response"]) for _, row in rows_of(Source(path=str(folder)))]
    assert sorted(rows) == [("2+2", "04"), ("c", "d"), ("nothing?", "null")]
    assert len(list(rows_of(Source(path=str(folder), split="train[:2]")))) == 2
    (folder / "a.csv").write_text("prompt,response\na,b,c\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2 has 3 cells but the header has 2 names"):
        list(rows_of(Source(path=str(folder))))
    kept = [row for _, row in rows_of(Source(path=str(folder)), keep_damaged=True)]
    assert sorted(isinstance(row, DataError) for row in kept) == [False, True]


def test_splits_of_a_folder_are_those_of_its_names(tmp_path):
    line = '{"prompt": "%s", "response": "b"}\n'
    parts = ("train", "test")
    folder = folder_of(tmp_path, {f"{part}/{part}-{n}.jsonl": line % f"{part}{n}" for part in parts for n in (1, 2)})
    for part in parts:
        rows = [row["prompt"] for _, row in rows_of(Source(path=str(folder), split=part))]
        assert sorted(rows) == [f"{part}1", f"{part}2"]
    for split, count in (("train+test", 4), ("train[:1]+test", 3), ("test[50%:]", 1)):
        assert len(list(rows_of(Source(path=str(folder), split=split)))) == count
    with pytest.raises(DataError, match=r"is a folder, 4 rows of which are the splits test, train, but its split is 'dev'"):
        list(rows_of(Source(path=str(folder), split="dev")))


def test_a_file_of_two_splits_is_in_both(tmp_path):
    line = '{"prompt": "a", "response": "b"}\n'
    folder = folder_of(tmp_path, {"train.jsonl": line, "train-test.jsonl": line * 2})
    assert len(list(rows_of(Source(path=str(folder))))) == 3


def test_a_file_that_is_of_no_split_is_named(tmp_path):
    line = '{"prompt": "a", "response": "b"}\n'
    folder = folder_of(tmp_path, {"train.jsonl": line, "more.jsonl": line})
    with pytest.raises(DataError, match=r"has the file 'more.jsonl', which is of none of the splits .* \(train\); name it"):
        list(rows_of(Source(path=str(folder))))


def test_what_datasets_cannot_read_says_why(tmp_path):
    folder = folder_of(tmp_path, {"a.xml": '"a'})
    with pytest.raises(DataError, match="; correct them, or the files"):
        list(rows_of(Source(path=str(folder))))
    datasets.Dataset.from_list([{"prompt": "a", "response": "b"}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="was written by save_to_disk, which keeps no splits"):
        list(rows_of(Source(path=str(tmp_path / "saved"))))


ROWS = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(6)]


def written(folder, name, rows):
    table, file = pd.DataFrame(rows), folder / name
    kinds = {".csv": lambda: table.to_csv(file, index=False), ".parquet": lambda: table.to_parquet(file)}
    kinds |= {".jsonl": lambda: table.to_json(file, orient="records", lines=True)}
    kinds |= {".json": lambda: table.to_json(file, orient="records")}
    kinds[file.suffix]()


@pytest.mark.parametrize(
    "kinds", [(".csv", ".parquet"), (".jsonl", ".parquet"), (".json", ".csv"), (".jsonl", ".json", ".parquet")]
)
def test_a_folder_of_several_kinds_loses_no_row(tmp_path, kinds):
    for n, kind in enumerate(kinds):
        written(tmp_path, f"part{n}{kind}", ROWS[2 * n : 2 * n + 2])
    for name in ("notes.pdf", "notes.txt", "LICENSE.txt", "config.json"):
        (tmp_path / name).write_text("no rows")
    found = [row for _, row in rows_of(Source(path=str(tmp_path)))]
    assert sorted(row["prompt"] for row in found) == [f"q{n}" for n in range(2 * len(kinds))]
    assert {tuple(row) for row in found} == {("prompt", "response")}


def test_named_classes_of_parquet_alone_stay_names_beside_a_licence(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    made = datasets.Dataset.from_list([{"text": "a", "label": 0}, {"text": "b", "label": 1}], features=features)
    made.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "LICENSE.txt").write_text("MIT")
    assert [row["label"] for _, row in rows_of(Source(path=str(tmp_path)))] == ["neg", "pos"]


@pytest.mark.parametrize("beside", ["more.ndjson", "more.jsonl.gz", "old.tsv", "all.tar"])
def test_a_kind_that_is_not_read_beside_others_is_named(tmp_path, beside):
    written(tmp_path, "a.csv", ROWS)
    (tmp_path / beside).write_text("something")
    with pytest.raises(DataError, match=f"'{beside}' cannot be read beside the others"):
        list(rows_of(Source(path=str(tmp_path))))


@pytest.mark.parametrize("name", ["train.tsv", "train.xlsx", "train.jsonl.gz", "deep/train.tsv"])
def test_a_folder_of_what_no_file_may_be_is_refused_as_that_file_is(tmp_path, name):
    """The datasets library would guess what the cells of a ``.tsv`` mean."""
    folder = folder_of(tmp_path, {name: "prompt\tresponse\na\t04\n"})
    said = []
    for given in (folder, folder / name):
        with pytest.raises(DataError) as refused:
            list(rows_of(Source(path=str(given))))
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"data file '{folder / name}' ends in ")


def test_message_lists_that_a_table_holds_as_text_are_refused(tmp_path):
    asked, said = [{"role": "user", "content": "turn on"}], [{"role": "assistant", "content": "on"}]
    for write in (json.dumps, str):
        written(tmp_path, "a.csv", [{"prompt": write(asked), "completion": write(said)}])
        with pytest.raises(DataError, match="'prompt' is a list of messages written as text"):
            list(chat.read_file(tmp_path / "a.csv"))
    written(tmp_path, "a.csv", [{"prompt": "[x] and {y}", "completion": "[1]"}])
    assert len(list(chat.read_file(tmp_path / "a.csv"))) == 1


def test_texts_of_json_lists_in_a_folder_stay_texts(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "when", "response": "2020-01-01"}]')
    assert [row for _, row in rows_of(Source(path=str(tmp_path)))] == [{"prompt": "when", "response": "2020-01-01"}]


def test_an_address_is_no_file():
    with pytest.raises(DataError, match="is an address but rows are read from files; download it"):
        list(rows_of(Source(path="https://example.com/a.jsonl")))

"""Rows as commands are told of them: a file, or a mapping as in a run file."""

import json

import pytest

from chatbase import write_rows
from commands import call
from shadowpeft.apps.answer_rows import read
from shadowpeft.apps.intents import read_intents
from shadowpeft.apps.source import shown, source_named
from shadowpeft.data.chat_rows import read_file
from shadowpeft.data.sources import Source
from shadowpeft.data.tasks.rows import Rows
from shadowpeft.errors import ConfigError, DataError


def test_a_name_is_a_file_and_a_mapping_is_read_as_in_a_run_file():
    assert source_named("a b.csv") == Source(path="a b.csv")
    told = source_named("{path: rows.csv, split: test, columns: {prompt: question, response: answer}}")
    assert told == Source(path="rows.csv", split="test", columns={"prompt": "question", "response": "answer"})
    assert source_named('{"hub": "owner/name", "split": "validation"}') == Source(hub="owner/name", split="validation")
    assert (shown("/far/away/rows.csv"), shown("{path: folder, split: test}")) == ("rows.csv", "folder (test)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{path: x, spilt: test}", "unknown key 'spilt' (did you mean"),
        ("{path: x, hub: y}", "hub and path are both set"),
        ("{split: test}", "hub and path are not set"),
        ("{path: x", "is not valid YAML"),
        ("{path: x, path: y}", "path"),
        ("{path: x, columns: {promt: question}}", "did you mean 'prompt'"),
        ("{path: x, columns: {skill: intent}}", "columns has the key 'skill'"),
        ("{path: x, columns: [a]}", "'columns' is"),
    ],
)
def test_what_describes_no_source_is_refused(text, said):
    with pytest.raises(ConfigError) as caught:
        source_named(text)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"'{text}'")


def test_intents_of_a_table_with_other_columns(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("utterance,intent\nsit down,Sit\nwho?,REMOTE\n")
    told = f"{{path: {file}, columns: {{prompt: utterance, skill: intent}}}}"
    rows = read_intents(told, "fit", None, ("Sit",))
    assert [(row["prompt"], row["skill"], row["where"]) for row in rows] == [
        ("sit down", "Sit", f"{file}, line 2"),
        ("who?", "REMOTE", f"{file}, line 3"),
    ]
    with pytest.raises(DataError, match="no column 'utterances'"):
        read_intents(told.replace("utterance", "utterances"), "fit", None, ("Sit",))


def test_rows_of_a_folder_by_split(tmp_path):
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"q": f"{split}?", "a": "yes"}])
    told = f"{{path: {tmp_path}, split: test, columns: {{prompt: q, response: a}}}}"
    assert [row["messages"][-1]["content"] for row in read_file(source_named(told))] == ["test?"]
    assert Rows(source_named(told)).name == f"{tmp_path} (test)"
    assert [row.prompt[-1]["content"] for row in read(told)] == ["test?"]
    with pytest.raises(DataError, match="test, train"):
        read_file(source_named(told.replace("split: test", "split: dev")))


def test_the_commands_name_the_form(monkeypatch, capsys, tmp_path):
    write_rows(tmp_path / "test.jsonl", [{"prompt": "a", "response": "b"}])
    code, _, err = call(monkeypatch, capsys, "eval", "nothing", "--data", tmp_path)
    assert (code, "a split of it as" in " ".join(err.split())) == (2, True)
    told = f"{{path: {tmp_path}}}"
    code, _, err = call(monkeypatch, capsys, "data", "answer", "nothing", told, "--out", tmp_path / "out.jsonl")
    assert (code, "lies in the folder" in err) == (2, True)
    long = f"{{path: {tmp_path}, columns: {{prompt: {'q' * 400}}}}}"
    code, _, err = call(monkeypatch, capsys, "eval", "nothing", "--data", long)
    assert (code, "names no split, which would be train" in " ".join(err.split())) == (2, True)
    code, _, err = call(monkeypatch, capsys, "eval", "nothing", "--data", f"{{path: {tmp_path}, splt: test}}")
    assert (code, "unknown key 'splt'" in err) == (2, True)


def test_an_adapter_is_judged_on_a_table_with_other_columns(monkeypatch, capsys, tmp_path):
    from chatbase import chat_model, chat_tokenizer, save_base
    from tiny import adapt

    base, model = save_base(tmp_path / "base", max_position_embeddings=512), adapt(chat_model(max_position_embeddings=512))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(tmp_path / "adapter"))
    chat_tokenizer().save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "rows.csv").write_text("question,answer,note\na,b,c\nd,e,f\n")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "d", "response": "e"}])
    told = f"{{path: {tmp_path / 'rows.csv'}, columns: {{prompt: question, response: answer}}}}"
    found = [
        json.loads(call(monkeypatch, capsys, "eval", tmp_path / "adapter", "--data", data, "--mode", "attached", "--json")[1])
        for data in (tmp_path / "rows.jsonl", told)
    ]
    losses = [record["modes"]["attached"]["loss"] for record in found]
    assert losses[0] == losses[1]
    assert [record["rows"] for record in found] == [2, 2]

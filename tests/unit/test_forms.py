"""Data as people have them: files of four kinds, rows of TRL, Alpaca and ShareGPT; and what is wrong with them, by place."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatbase import save_base
from commands import call
from shadowpeft.data import chat
from shadowpeft.data.chat_rows import check_row
from shadowpeft.data.forms import forms_of, rows_in
from shadowpeft.errors import DataError

PAIR = {"prompt": "sit", "response": "[Sit()] ok"}
FORMS = {
    "prompt, completion": [
        {"prompt": "sit", "completion": "[Sit()] ok"},
        {
            "prompt": [{"role": "user", "content": "sit"}],
            "completion": [{"role": "assistant", "content": "[Sit()] ok"}],
        },
    ],
    "instruction, input, output": [
        {"instruction": "sit", "output": "[Sit()] ok"},
        {"instruction": "sit", "input": "", "output": "[Sit()] ok"},
        {"instruction": "sit", "input": None, "output": "[Sit()] ok", "text": "all of it"},
    ],
    "conversations": [
        {"conversations": [{"from": "human", "value": "sit"}, {"from": "gpt", "value": "[Sit()] ok"}]},
        {
            "conversations": [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "[Sit()] ok"}],
            "id": 7,
        },
    ],
    "prompt, response": [PAIR],
    "messages": [{"messages": [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "[Sit()] ok"}]}],
}


@pytest.mark.parametrize(("form", "row"), [(form, row) for form, rows in FORMS.items() for row in rows])
def test_a_form_is_recognised_and_means_the_same(form, row):
    found = chat.check_row(row, "here")
    assert found == chat.check_row(PAIR, "here")
    assert found.form == form


def test_systems_inputs_and_several_turns_are_kept():
    found = chat.check_row({"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"}, "here")
    assert found["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add\n\n1 2"}]
    turns = [("human", "hi"), ("gpt", "hello"), ("human", "sit"), ("gpt", "ok")]
    row = {"system": "a dog", "conversations": [{"from": who, "value": text} for who, text in turns]}
    found = chat.check_row(row, "here")
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "user"]
    assert found["response"] == "ok"
    found = chat.check_row({"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}, "here")
    assert [(m["role"], m["content"]) for m in found["messages"]] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert found["response"] == "d"


def test_what_a_turn_of_sharegpt_has_beside_its_text_is_that_of_its_message():
    call = {"type": "function", "function": {"name": "sit", "arguments": "{}"}}
    beside = {"tool_calls": [call], "reasoning_content": "a dog sits"}
    for turns in (
        [{"from": "human", "value": "sit"}, {"from": "gpt", "value": None, **beside}],
        [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "", **beside}],
    ):
        found = chat.check_row({"conversations": turns}, "here")
        assert (found["response"], found["answer"]) == ("", beside)


def test_a_function_call_of_sharegpt_is_an_answer_of_calls():
    one = {"name": "sit", "arguments": {"for": 2}}
    two = {"name": "bark", "arguments": "{}"}
    turns = [("human", "sit"), ("function_call", json.dumps(one)), ("observation", "ok"), ("gpt", "done")]
    made = lambda turns: {"conversations": [{"from": who, "value": text} for who, text in turns]}  # noqa: E731
    found = chat.check_row({**made(turns), "tools": json.dumps([{"name": "sit", "parameters": {}}])}, "here")
    assert [m["role"] for m in found["messages"]] == ["user", "assistant", "tool"]
    assert found["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": one}],
    }
    assert (found["response"], found["tools"][0]["name"]) == ("done", "sit")
    found = chat.check_row(made([("human", "sit, bark"), ("function_call", json.dumps([one, two]))]), "here")
    assert [call["function"] for call in found["answer"]["tool_calls"]] == [one, two]
    for text, message in (
        ("sit()", "turn 2 of 'conversations' is a function_call, whose value must be its calls as JSON, but it is not"),
        ('{"name": "sit"}', "an object with 'name' and 'arguments', or a list of such; got '{\"name\": \"sit\"}'"),
        ("[]", "or a list of such; got '[]'"),
    ):
        with pytest.raises(DataError) as caught:
            chat.check_row(made([("human", "sit"), ("function_call", text)]), "here")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": ["b"]}, "must both be strings or both be lists"),
        ({"instruction": "a", "output": 3}, "must be strings"),
        ({"conversations": "a"}, "must be a list of objects with 'from' and 'value'"),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, "turn 1 of 'conversations' needs"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "must end with an 'assistant' message"),
        ({"prompt": "a", "response": "b", "completion": "c"}, "'completion', which training does not use"),
        ({"instruction": "a", "output": "b", "response": "c"}, "needs 'messages', or 'prompt' and 'response'"),
        ({"text": "a"}, "a form of docs/data.md"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "'history' must be a list of [question, answer]"),
        ({**PAIR, "history": [["a", "b"]]}, "'history', which training does not use"),
        (
            {"instruction": "a", "output": "b", "conversations": []},
            "has 'instruction' and 'output' and also 'conversations', which are two forms; keep one",
        ),
        ({**PAIR, "instruction": "a", "output": "b"}, "which are two forms"),
        ({**PAIR, "Path": "base"}, "has the key 'Path'; did you mean 'path'?"),
        ({"prompt": "a", " response": "b"}, "has the key ' response'; did you mean 'response'?"),
        ({"conversations": [{"from": "human", "value": "a", "loss": 0}]}, "turn 1 of 'conversations' has the key 'loss'"),
        (
            {"conversations": [{"from": "human", "value": "a", "role": "user"}]},
            "turn 1 of 'conversations' has 'from' and also 'role'; keep one",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
            "the answer has weight 0",
        ),
        ({"conversations": [{"from": ["gpt"], "value": "b"}]}, "turn 1 of 'conversations' needs"),
        (
            {"messages": [{"role": "asistant", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "message 1 has the role 'asistant' (did you mean 'assistant'?); known are system, developer, user",
        ),
        ({"messages": [{"role": "User", "content": "a"}]}, "message 1 has the role 'User' (did you mean 'user'?)"),
    ],
)
def test_what_is_wrong_is_named(row, message):
    with pytest.raises(DataError) as refused:
        chat.check_row(row, "here")
    assert str(refused.value).startswith("here")
    assert message in str(refused.value)


def written(tmp_path, suffix, rows):
    file = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        with file.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, fieldnames=sorted({key for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        lines = suffix == ".jsonl"
        file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_of_every_kind_hold_the_same_rows(tmp_path, suffix):
    rows = [
        {"prompt": "sit, please", "response": "line one\nline two", "shadow_response": None},
        {"prompt": "站起来", "response": "好", "shadow_response": "[StandUp()]"},
    ]
    found = chat.read_file(written(tmp_path, suffix, rows))
    assert found == [chat.check_row(row, "") for row in rows]
    assert found[1].where.startswith(str(tmp_path / f"rows{suffix}"))
    assert forms_of(found) == {"prompt, response": 2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"prompt": "a"}', "must hold a list of rows"),
        ("a.json", b'[{"prompt": "a"}\n{"prompt": "b"}', "is not valid JSON"),
        ("a.csv", b"prompt,response\na,b,c\n", "line 2 has 3 cells but the header has 2 names"),
        ("a.csv", b'prompt,response\n"a,b\n', "is not valid CSV"),
        ("a.csv", b"prompt,response\na,b\n\xff,b\n", "line 3 is not valid CSV in UTF-8 (byte 0xff, which is"),
        (
            "a.csv",
            "prompt;response\nschön;b\n".encode("cp1252"),
            "line 2 is not valid CSV in UTF-8 (byte 0xf6, which is 'ö' in cp1252, Excel's plain CSV); save the file as UTF-8, "
            "in Excel as 'CSV UTF-8'",
        ),
        ("a.csv", b"prompt,response\na\x81,b\n", "(byte 0x81); save the file as UTF-8"),
        ("a.csv", "prompt,response\na,b\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("a.csv", b"prompt;response\na;b;c\n", "line 2 has 3 cells but the header has 2 names; quote semicolons in texts"),
        ("a.csv", b"prompt\tresponse\na\tb\n", r"commas have to stand between columns, not '\t'; save the file with commas"),
        ("a.csv", b"sep=;\nprompt;response\na;b\n", "line 1 has one column, 'sep=;'"),
        ("a.csv", b'prompt,response\na,b\n"c,d\ne,f\n', "lines 3 to 4 are not valid CSV in UTF-8"),
        ("a.csv", b"prompt,response,prompt\na,b,c\n", "line 1 names the column 'prompt' twice"),
        ("a.jsonl", b'{"prompt": "a", "response": "b", "prompt": "c"}', "line 1 names the key 'prompt' twice"),
        ("a.json", b'[{"prompt": "a", "response": "b", "x": {"y": 1, "y": 2}}]', "names the key 'y' twice"),
        ("a.parquet", b"PAR1 nothing", "is not a readable parquet file"),
        ("a.csv", b"prompt,response\n", "holds no rows"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        chat.read_file(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)
    assert message in str(refused.value)


def test_a_table_as_excel_writes_it_with_semicolons(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes("\ufeffprompt;response\r\nschön, bitte;[Sit()] ja\r\n\"a;b\nc\";d,e\r\n".encode())
    assert [(row["messages"][0]["content"], row["response"]) for row in chat.read_file(file)] == [
        ("schön, bitte", "[Sit()] ja"),
        ("a;b\nc", "d,e"),
    ]
    file.write_text("prompt,a;b,response\nx;y,1,z\n")  # the header has commas
    assert next(iter(rows_in(file)))[1] == {"prompt": "x;y", "a;b": "1", "response": "z"}


def test_a_cell_may_be_as_long_as_a_conversation(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(f"prompt,response\n{'a' * 200_000},b\n")
    (row,) = chat.read_file(file)
    assert len(row["messages"][0]["content"]) == 200_000


# ------------------------------------------------------------------------------------------------------------ data check


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt"\n{"prompt": "a", "response": "b"}\n[1]\n', [2, 4]),
        ("a.csv", 'prompt,response\na,b\na,b,c\n"a"x,b\na,b\n', [3, 4]),
    ],
)
def test_data_check_goes_on_after_a_line_that_cannot_be_read(monkeypatch, capsys, tmp_path, name, content, refused):
    (tmp_path / name).write_text(content)
    code, out, err = call(monkeypatch, capsys, "data", "check", tmp_path / name, "--json")
    found = json.loads(out)
    assert (code, found["rows"], found["tokens"]["sum"] > 0) == (2, 4, True)
    assert "2 of 4 rows are refused" in err
    places = [f"{tmp_path / name}, line {number} " for number in refused]
    assert all(why.startswith(place) for why, place in zip(found["refused"]["why"], places, strict=True))
    with pytest.raises(DataError, match=f"line {refused[0]}"):  # a run stops at the first
        chat.read_file(tmp_path / name)


def test_data_check_shows_what_is_learnt_and_every_row_that_is_refused(monkeypatch, capsys, tmp_path):
    rows = [PAIR, {"instruction": "sing", "output": "la " * 40}, {"prompt": "a"}, {"prompt": "b", "response": 3}]
    file = written(tmp_path, ".jsonl", rows)
    code, out, err = call(monkeypatch, capsys, "data", "check", file, "--max-length", 60, "--json")
    found = json.loads(out)
    assert code == 2
    assert "2 of 4 rows are refused" in err
    assert (found["rows"], found["refused"]["rows"]) == (4, 2)
    assert found["forms"] == {"prompt, response": 1, "instruction, input, output": 1}
    assert found["longer_than_max_length"]["rows"] == 1
    assert found["longer_than_max_length"]["first"].endswith("line 2")
    assert [problem.partition(" ")[0] for problem in found["refused"]["why"]] == [str(file) + ","] * 2
    assert found["learnt_tokens"]["sum"] < found["tokens"]["sum"]
    code, out, err = call(monkeypatch, capsys, "data", "check", written(tmp_path, ".csv", [PAIR] * 3), "--show", 1)
    assert (code, err) == (0, "")
    assert "learnt by base and shadow" in out
    assert "[Sit()] ok" in out
    assert "form: prompt, response (3)" in out


def test_data_check_of_the_packaged_set(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "data", "check", "robot", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["refused"]["rows"] == 0
    assert found["paths"]["base"] == 1000


def test_data_check_of_a_run_file_shows_what_that_run_would_learn(monkeypatch, capsys, tmp_path):
    talk = {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello you"},
            {"role": "user", "content": "sit"},
            {"role": "assistant", "content": "ok " * 40},
        ]
    }
    rows = written(tmp_path, ".jsonl", [talk, {**PAIR, "path": "base"}, {**PAIR, "path": "shadow"}])
    table = tmp_path / "t.csv"
    table.write_text("question,answer\nsit,ok\nstand,up\n")
    content = {
        "base": "smollm2-135m",
        "data": {
            "train": str(rows),
            "validation": {"path": str(table), "columns": {"prompt": "question", "response": "answer"}},
            "assistant_only_loss": True,
            "max_length": 60,
            "too_long": "skip",
        },
    }
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    code, out, _ = call(monkeypatch, capsys, "data", "check", tmp_path / "run.yaml", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["train"]["rows"], found["validation"]["rows"]) == (3, 2)
    (long,) = found["train"]["longer_than_max_length"]["which"]
    assert long.startswith(f"{rows}, line 1 has ")
    assert long.endswith("more than max_length = 60: left out")
    code, out, _ = call(monkeypatch, capsys, "data", "check", tmp_path / "run.yaml", "--show", 3)
    words = " ".join(out.split())
    assert "(green by both paths)" in words
    assert "(blue by the base alone)" in words
    assert "(yellow by the shadow alone)" in words
    code, _, err = call(monkeypatch, capsys, "data", "check", tmp_path / "run.yaml", "--assistant-only-loss")
    assert (code, "a run file says how its rows are read" in err) == (2, True)
    code, out, _ = call(monkeypatch, capsys, "data", "check", tmp_path / "run.yaml", "data.max_length=50", "--json")
    assert (code, json.loads(out)["train"]["longer_than_max_length"]["max_length"]) == (0, 50)
    code, _, err = call(monkeypatch, capsys, "data", "check", rows, "data.max_length=50")
    assert (code, "'data.max_length=50' was given beside" in err) == (2, True)


@pytest.mark.parametrize("command", [("data", "check"), ("plan",), ("train",)])
def test_rows_that_the_base_cannot_read_are_refused_by_every_command(command, monkeypatch, capsys, tmp_path):
    base = save_base(tmp_path / "base", max_position_embeddings=64)
    rows = written(tmp_path, ".jsonl", [PAIR, {**PAIR, "prompt": "sit " * 80}])
    content = {"base": base, "data": {"train": str(rows), "max_length": 4000}, "output": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    code, _, err = call(monkeypatch, capsys, *command, tmp_path / "run.yaml")
    assert code == 2
    assert "1 of 2 rows have more tokens than the base reads, which is 64" in " ".join(err.split())
    assert "lower data.max_length to 64" in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_what_is_learnt_has_the_colour_of_who_learns_it():
    from chatbase import chat_tokenizer
    from shadowpeft.apps.data import coloured

    words = chat_tokenizer()
    row = {"prompt": "sit", "response": "[Sit()] ok", "shadow_response": "[Sit()]"}
    (sequence,) = chat.encode([chat.check_row(row, "here")], words, max_length=99)
    text = coloured(sequence, words)
    spans = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    # at the place after its action the shadow learns the end of the turn, the base what follows
    assert list(spans.values()) == ["dim", "green", "blue"]
    assert list(spans)[1].startswith("[Sit()]")
    assert list(spans)[2].endswith("<|im_end|>")
    row = {"prompt": "坐", "response": "[Sit()]好的", "shadow_response": "[Sit()]"}
    (sequence,) = chat.encode([chat.check_row(row, "here")], words, max_length=99)
    shown = coloured(sequence, words).plain  # 好 is three tokens of two colours
    assert "[Sit()]好的" in shown
    assert "\ufffd" not in shown


def test_data_check_of_texts_with_labels(monkeypatch, capsys, tmp_path):
    rows = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}, {"text": "x", "label": ""}]
    file = written(tmp_path, ".csv", rows)
    code, out, err = call(monkeypatch, capsys, "data", "check", file, "--task-type", "SEQ_CLS")
    assert code == 2
    assert "labels: a (1), b (1)" in out
    assert "line 4 has nothing as 'label'; write it" in " ".join(out.split())
    assert "1 of 3 rows are refused" in err
    _, out, _ = call(monkeypatch, capsys, "data", "check", file)
    assert "line 2 has 'text' and 'label', which a classifier learns from" in " ".join(out.split())
    assert "--task-type SEQ_CLS" in out  # lines of problems are not broken


@pytest.mark.parametrize(
    ("train", "validation", "settings", "message"),
    [
        ("", None, {}, "holds no rows"),
        ("text,label\n", None, {}, "holds no rows"),
        ("text,label\na,x\nb,x\n", None, {}, "have the label 'x' alone; a classifier needs two at least"),
        ("text,label\na,x\nb,y\n", "text,label\na,z\n", {}, "has the label 'z', which no training row has"),
        ("text,label\na,x\n" + "b" * 99 + ",y\n", None, {"too_long": "skip"}, "row with the label 'y' is longer"),
        ("text,label\na,x\n" + "b " * 99 + ",y\n", None, {"too_long": "error"}, "tokens but data.max_length is 32"),
    ],
)
def test_data_check_and_train_have_one_verdict(monkeypatch, capsys, tmp_path, train, validation, settings, message):
    content = {"base": save_base(tmp_path / "base"), "task_type": "SEQ_CLS", "output": str(tmp_path / "run")}
    content["data"] = {"train": str(tmp_path / "train.csv"), "max_length": 32, **settings}
    (tmp_path / "train.csv").write_text(train)
    if validation is not None:
        (tmp_path / "validation.csv").write_text(validation)
        content["data"]["validation"] = str(tmp_path / "validation.csv")
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    for command in (("data", "check"), ("train",)):
        code, _, err = call(monkeypatch, capsys, *command, tmp_path / "run.yaml")
        assert (code, message in err) == (2, True), (command, err)
    if validation is None and not settings:  # without a run file too
        code, _, err = call(
            monkeypatch, capsys, "data", "check", tmp_path / "train.csv", "--base", content["base"], "--task-type", "SEQ_CLS"
        )
        assert (code, message in err) == (2, True)


def test_data_check_of_a_run_that_would_train_nothing(monkeypatch, capsys, tmp_path):
    rows = written(tmp_path, ".jsonl", [{**PAIR, "path": "shadow"}])
    content = {"base": save_base(tmp_path / "base"), "data": {"train": str(rows)}, "shadow": {"auxiliary_loss_weight": 0.0}}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    code, _, err = call(monkeypatch, capsys, "data", "check", tmp_path / "run.yaml")
    assert (code, "every row of data.train is for the shadow alone" in err) == (2, True)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "input": "b", "response": "c"}, "has the key 'input', which is read beside 'instruction'"),
        ({"prompt": "a", "completion": "c", "input": "b"}, "has the key 'input', which is read beside 'instruction'"),
        ({"prompt": "a", "completion": "rude", "label": False}, "says by 'label' that its answer is bad"),
        ({"prompt": "a", "completion": "rude", "label": "False"}, "says by 'label' that its answer is bad"),
        ({"text": "a", "label": True}, "give a run file with task_type: SEQ_CLS"),
        ({"messages": [], "chosen": "d"}, "write the answer to learn as the last message"),
        ({"prompt": "a", "response": "c", "chosen": "d"}, "has the key 'chosen', which is a preference"),
        ({"messages": [], "chat_template_kwargs": {"enable_thinking": False}}, "has the key 'chat_template_kwargs'"),
    ],
)
def test_what_would_be_dropped_is_refused(row, says):
    with pytest.raises(DataError, match=says):
        check_row(row, "x")


def test_empty_columns_and_named_labels_are_left_alone():
    labels = ({"label": label} for label in ("travel", True, 0))
    for more in ({"input": ""}, *labels, {"output": "d"}, {"chat_template_kwargs": {}}, {"id": 3}):
        row = check_row({"prompt": "a", "response": "c", **more}, "x")
        assert (row["messages"][0]["content"], row["response"]) == ("a", "c")
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]
    assert check_row({"messages": said, "instruction": "a", "input": "b"}, "x")["response"] == "c"


@pytest.mark.parametrize(
    ("name", "says"),
    [("a.jsonl.gz", "unpack it"), ("a.tsv", "save it as CSV"), ("a.xlsx", "save it as CSV"), ("a.arrow", "save it as parquet")],
)
def test_files_of_other_kinds_are_refused_by_their_kind(name, says, tmp_path):
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=rf"ends in \.\w+ but JSON lines .* are read; {says}"):
        list(rows_in(tmp_path / name))


@pytest.mark.parametrize("mark", ["|", "\t"])
def test_another_mark_between_columns_is_named(mark, tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt{mark}response\na{mark}b\n")
    with pytest.raises(DataError, match=r"has one column, .* save the file with commas"):
        list(rows_in(tmp_path / "a.csv"))


def test_json_lines_may_be_called_json(tmp_path):
    (tmp_path / "a.json").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    found = list(rows_in(tmp_path / "a.json"))
    assert [(where.rpartition(", ")[2], row["prompt"]) for where, row in found] == [("line 1", "a"), ("line 3", "b")]

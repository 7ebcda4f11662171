"""Chat data: who learns what, where the prompt ends, what a malformed file says, and how batches are padded."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatbase import CHATML, chat_model, chat_tokenizer, write_rows
from commands import call
from shadowpeft.data import chat, chat_rows
from shadowpeft.data.classify import ClassDataset
from shadowpeft.errors import DataError
from shadowpeft.train.rows import told

END = 3
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def sequences(rows, tokenizer=None, **options):
    checked = [chat.check_row(row, f"row {i}") for i, row in enumerate(rows, 1)]
    return chat.encode(checked, tokenizer or chat_tokenizer(), **{"max_length": 256, **options})


def learned(features, key, tokenizer):
    """The text that a path is trained to say, from its unmasked labels."""
    return tokenizer.decode([token for token in features[key] if token != -100])


# --------------------------------------------------------------------------------------------------------------- rows


def test_both_forms_are_one():
    short = chat.check_row({"prompt": "hi", "response": "ho"}, "here")
    long = chat.check_row(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, "here"
    )
    assert short == long
    assert short == {
        "messages": [{"role": "user", "content": "hi"}],
        "response": "ho",
        "shadow_response": None,
        "path": "both",
    }


@pytest.mark.parametrize(("path", "base", "shadow"), [("both", 1, 1), ("base", 1, 0), ("shadow", 0, 1)])
def test_path_says_who_learns(path, base, shadow):
    tokenizer = chat_tokenizer()
    (only,) = sequences([{"prompt": "hi", "response": "ho", "path": path}], tokenizer)
    features = only.features()
    assert learned(features, "labels", tokenizer) == "ho<|im_end|>" * base
    assert learned(features, "shadow_labels", tokenizer) == "ho<|im_end|>" * shadow


def test_a_shadow_response_makes_two_sequences_each_masking_the_other_path():
    tokenizer = chat_tokenizer()
    first, second = (
        s.features() for s in sequences([{"prompt": "hi", "response": "long", "shadow_response": "[R]"}], tokenizer)
    )
    assert tokenizer.decode(first["input_ids"]) == PROMPT + "long<|im_end|>"
    assert tokenizer.decode(second["input_ids"]) == PROMPT + "[R]<|im_end|>"
    assert learned(first, "labels", tokenizer) == "long<|im_end|>"
    assert learned(second, "shadow_labels", tokenizer) == "[R]<|im_end|>"
    assert set(first["shadow_labels"]) == set(second["labels"]) == {-100}


@pytest.mark.parametrize("answer", ["[Sit()]", "[Sit()] Down", ""])
def test_a_shadow_response_that_begins_the_answer_needs_one_sequence(answer):
    tokenizer = chat_tokenizer()
    row = {"prompt": "hi", "response": "[Sit()] Down I go.", "shadow_response": answer}
    (one,) = sequences([row], tokenizer)
    features = one.features()
    assert tokenizer.decode(features["input_ids"]) == PROMPT + "[Sit()] Down I go.<|im_end|>"
    assert learned(features, "labels", tokenizer) == "[Sit()] Down I go.<|im_end|>"
    assert learned(features, "shadow_labels", tokenizer) == answer + "<|im_end|>"
    assert features["shadow_labels"].index(features["shadow_labels"][one.start]) == one.start
    assert len(features["shadow_labels"]) == len(features["input_ids"])
    alone = one.alone().features()
    assert tokenizer.decode(alone["input_ids"]) == PROMPT + answer + "<|im_end|>"
    assert learned(alone, "shadow_labels", tokenizer) == answer + "<|im_end|>"
    assert set(alone["labels"]) == {-100}


@pytest.mark.parametrize(("actions", "answer"), [(False, ""), (True, "[REMOTE]")])
def test_an_empty_shadow_response_is_an_answer_of_no_words(actions, answer):
    """So it begins with no action; null is what is absent."""
    row = {"prompt": "hi", "response": "[Sit()] Down.", "shadow_response": ""}
    made = told(chat.check_row(row, "here"), actions=actions, tools=None, compact=True)
    assert made["shadow_response"] == answer
    made = told(chat.check_row({**row, "shadow_response": None}, "here"), actions=actions, tools=None, compact=True)
    assert made["shadow_response"] == ("[Sit()]" if actions else None)


def test_the_prompt_is_masked_exactly_up_to_the_generation_prompt():
    tokenizer = chat_tokenizer()
    (one,) = sequences([{"prompt": "hi", "response": "ho\n"}], tokenizer)
    assert tokenizer.decode(one.ids[: one.start]) == PROMPT
    assert tokenizer.decode(one.ids[one.start :]) == "ho\n<|im_end|>"
    assert one.ids[-1] == END
    labels = one.features()["labels"]
    assert labels[: one.start] == [-100] * one.start
    assert labels[one.start :] == one.ids[one.start :]


def test_only_the_last_turn_of_many_is_learned():
    tokenizer = chat_tokenizer()
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    (one,) = sequences([{"messages": [{"role": r, "content": c} for r, c in turns]}], tokenizer)
    assert learned(one.features(), "labels", tokenizer) == "d<|im_end|>"
    assert tokenizer.decode(one.ids[: one.start]).count("<|im_start|>") == 4


def test_system_message_only_where_a_row_brings_none():
    tokenizer = chat_tokenizer()
    own = {
        "messages": [
            {"role": "system", "content": "mine"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho"},
        ]
    }
    first, second = sequences([{"prompt": "hi", "response": "ho"}, own], tokenizer, system="yours")
    assert tokenizer.decode(first.ids).startswith("<|im_start|>system\nyours<|im_end|>")
    assert tokenizer.decode(second.ids).startswith("<|im_start|>system\nmine<|im_end|>")
    assert "yours" not in tokenizer.decode(second.ids)


def test_a_template_that_rewrites_the_prompt_is_closed_by_hand():
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    tokenizer = chat_tokenizer(thinking)
    (one,) = sequences([{"prompt": "hi", "response": "ho"}], tokenizer)
    assert tokenizer.decode(one.ids) == PROMPT + "<think></think>ho<|im_end|>"


def test_a_template_that_closes_no_turn_gets_the_end_token():
    bare = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = chat_tokenizer(bare, eos="<eos>")
    (one,) = sequences([{"prompt": "hi", "response": "ho"}], tokenizer)
    assert tokenizer.decode(one.ids) == "user: hi\nassistant: ho<eos>"


def test_stop_tokens_are_the_tokenizers_the_models_and_the_templates():
    model = chat_model(eos_token_id=1)
    assert chat.stop_tokens(model, chat_tokenizer(eos="<eos>")) == [1, END]
    model.generation_config.eos_token_id = [0, 1]
    assert chat.stop_tokens(model, chat_tokenizer()) == [0, 1, END]


def test_no_chat_template():
    with pytest.raises(DataError, match="no chat template"):
        sequences([{"prompt": "hi", "response": "ho"}], chat_tokenizer(template=None))


def test_named_chat_templates_need_a_default():
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "hi", "response": "ho"}]
    plain = sequences(rows)
    tokenizer.chat_template = {"rag": CHATML, "chat": CHATML}
    with pytest.raises(
        DataError, match=r"templates chat, rag but none is called 'default'; set .*chat_template\['chat'\]"
    ):
        sequences(rows, tokenizer)
    with pytest.raises(DataError, match="none is called 'default'"):
        chat.stop_tokens(chat_model(), tokenizer)
    tokenizer.chat_template = {"rag": "x", "default": CHATML}
    assert [one.ids for one in sequences(rows, tokenizer)] == [one.ids for one in plain]


def test_a_template_that_refuses_the_roles():
    picky = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"roles system, user .*no system"):
        sequences([{"prompt": "hi", "response": "ho"}], chat_tokenizer(picky), system="be good")


# --------------------------------------------------------------------------------------------------------- too long


def test_too_long_is_an_error_that_names_the_row():
    rows = [{"prompt": "hi", "response": "ho"}, {"prompt": "hi", "response": "o" * 50}]
    with pytest.raises(DataError, match=r"row 2 has \d+ tokens but data.max_length is 64"):
        sequences(rows, max_length=64)


def test_too_long_rows_are_skipped():
    rows = [{"prompt": "hi", "response": "o" * 50}, {"prompt": "hi", "response": "ho"}]
    kept = sequences(rows, max_length=64, too_long="skip")
    assert len(kept) == 1
    assert chat_tokenizer().decode(kept[0].ids).endswith("ho<|im_end|>")
    with pytest.raises(DataError, match="no row is left: all 2"):
        sequences(rows, max_length=8, too_long="skip")


def test_a_row_of_just_the_longest_length_is_kept():
    (one,) = sequences([{"prompt": "hi", "response": "ho"}])
    assert len(sequences([{"prompt": "hi", "response": "ho"}], max_length=len(one.ids))) == 1
    with pytest.raises(DataError, match="max_length"):
        sequences([{"prompt": "hi", "response": "ho"}], max_length=len(one.ids) - 1)


def test_rows_that_were_left_out_are_told():
    rows = [{"prompt": "hi", "response": "ho"}] * 3 + [{"prompt": "hi", "response": "o" * n} for n in (50, 70, 60)]
    rows.append({"prompt": "hi", "response": "ho", "shadow_response": "o" * 55})  # half of it is trained
    kept = sequences(rows, max_length=64, too_long="skip")
    longest = len(sequences(rows[4:5])[0].ids)
    assert (len(kept), kept.rows) == (4, 4)
    assert kept.record() == {
        "rows": 4,
        "skipped": {"rows": 4, "of": 7, "longest": longest, "first": "row 4", "max_length": 64},
    }
    assert str(kept.skipped) == (
        "4 of 7 rows are longer than data.max_length = 64 and are left out; "
        f"the longest has {longest} tokens, the first is row 4"
    )
    assert sequences(rows[:3], max_length=64, too_long="skip").record() == {"rows": 3}


# --------------------------------------------------------------------------------------- tools, calls and what was thought

TOOLS = (
    "{% if tools %}<|im_start|>system\nTOOLS {{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m['role'] }}\n{% if m.get('reasoning_content') %}THINK {{ m['reasoning_content'] }} {% endif %}{{ m['content'] }}"
    "{% for c in m.get('tool_calls') or [] %}CALL {{ c['function']['name'] }} {{ c['function']['arguments'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = [{"id": "1", "type": "function", "function": {"name": "sit", "arguments": "{}"}}]


def conversation(**answer):
    return {"messages": [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "", **answer}]}


@pytest.mark.parametrize(
    ("row", "target"),
    [
        ({**conversation(tool_calls=CALL), "tools": [{"name": "sit"}]}, "CALL sit {}<|im_end|>"),
        (conversation(content=None, tool_calls=CALL), "CALL sit {}<|im_end|>"),
        (conversation(content="4", reasoning_content="two and two"), "THINK two and two 4<|im_end|>"),
        (conversation(content="ok", weight=1, tool_calls=[], name=None), "ok<|im_end|>"),
    ],
)
def test_what_an_answer_has_beside_its_text_is_learned(row, target):
    tokenizer = chat_tokenizer(TOOLS)
    (one,) = sequences([row], tokenizer)
    assert tokenizer.decode(one.ids[one.start :]) == target
    assert ('TOOLS [{"name": "sit"}]' in tokenizer.decode(one.ids[: one.start])) == ("tools" in row)


def test_calls_and_results_of_earlier_turns_are_in_the_prompt():
    turns = [*conversation(tool_calls=CALL)["messages"], {"role": "tool", "content": "done", "tool_call_id": "1"}]
    tokenizer = chat_tokenizer(TOOLS)
    (one,) = sequences([{"messages": [*turns, {"role": "assistant", "content": "sat"}]}], tokenizer)
    assert "CALL sit {}<|im_end|>\n<|im_start|>tool\ndone" in tokenizer.decode(one.ids[: one.start])
    assert tokenizer.decode(one.ids[one.start :]) == "sat<|im_end|>"


@pytest.mark.parametrize(
    ("row", "key"),
    [
        (conversation(tool_calls=CALL), "tool_calls"),
        (conversation(content="4", reasoning_content="two and two"), "reasoning_content"),
        ({"prompt": "a", "response": "b", "tools": [{"name": "sit"}]}, "tools"),
        (
            {"messages": [*conversation(tool_calls=CALL)["messages"], *conversation(content="x")["messages"]]},
            "tool_calls",
        ),
    ],
)
def test_what_the_template_would_not_write_is_refused(row, key):
    with pytest.raises(DataError, match=f"row 1 has '{key}' but the tokenizer's chat template does not write it") as refused:
        sequences([row])
    assert ("name the tools in a file (data.tools; data check: --tools FILE)" in str(refused.value)) == ("tool" in key)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@settings(deadline=None)
@given(
    row=st.sampled_from(
        [
            {"prompt": "hi", "response": "ho"},
            conversation(content="ho"),
            {"prompt": "hi", "response": "ho", "path": "base"},
        ]
    ),
    absent=st.sets(
        st.sampled_from(
            ["messages", "prompt", "response", "shadow_response", "path", "tools", "weight", "system", "id"]
        )
    ),
)
def test_null_means_absent(row, absent):
    filled = {**dict.fromkeys(absent), **row}
    assert chat.check_row(filled, "here") == chat.check_row(row, "here")


@settings(deadline=None)
@given(key=st.sampled_from(chat_rows.WRITTEN) | st.text(min_size=1), value=JSON)
def test_a_key_of_a_message_is_used_refused_by_name_or_null(key, value):
    row = conversation(content="ho", **{key: value})
    try:
        answer, message = chat.check_row(row, "here").get("answer", {}), ""
    except DataError as error:
        answer, message = {}, str(error)
    unsaid = {"role", "content", "weight", "name", "tool_call_id"}  # they are no part of what is learned
    assert (
        value in (None, [])
        or key in unsaid
        or answer == {key: chat_rows.without_null(value)}
        or (message.startswith("here") and repr(key)[1:41].rstrip("'\"") in message)  # long ones are cut
    )


# ------------------------------------------------------------------------------------------------------------- files

GOOD = json.dumps({"prompt": "hi", "response": "ho"})
ANSWER = {"role": "assistant", "content": "ho"}


def turns(*messages):
    return json.dumps({"messages": [{"role": "user", "content": "hi"}, *messages]})


def test_a_file_with_blank_lines_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("﻿" + GOOD + "\n\n" + GOOD.replace("hi", "站起来") + "\n", encoding="utf-8")
    rows = chat.read_jsonl(file)
    assert [row["messages"][0]["content"] for row in rows] == ["hi", "站起来"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "hi", ', "not valid JSON .* at column"),
        ("[1, 2]", "a JSON list but must be an object"),
        ('{"prompt": "hi"}', "has the key 'prompt' but needs 'messages', or 'prompt' and 'response'"),
        ('{"prompt": "hi", "response": null}', "has nothing as 'response'; write it, or leave the row out"),
        ('{"prompt": " \\n", "response": "ho"}', "line 3 has an empty prompt; write what is asked, or leave the row out"),
        ('{"instruction": "", "input": "", "output": "ho"}', "line 3 has an empty prompt; write what is asked"),
        (turns({"role": "system", "content": "a dog"}, {"role": "user", "content": ""}, ANSWER), "an empty message 3, which"),
        ('{"prompt": "hi", "response": 3}', "must be strings"),
        ('{"prompt": ["hi"], "response": "ho"}', "must be strings"),
        ('{"messages": "hi"}', "must be a list of objects"),
        ('{"messages": []}', "must be a list of objects"),
        ('{"messages": [{"role": "user"}]}', "must be a list of objects"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "must end with an 'assistant' message"),
        ('{"messages": [{"role": "assistant", "content": "hi"}]}', "after at least one other"),
        ('{"prompt": "hi", "response": "ho", "shadow_response": 3}', "'shadow_response' must be a string"),
        (
            '{"prompt": "hi", "response": "ho", "path": "cloud"}',
            "'path' is 'cloud' but must be one of both, base, shadow",
        ),
        ('{"prompt": "hi", "response": "ho", "path": ["base"]}', "'path' is .* but must be one of"),
        ('{"prompt": "hi", "response": "ho", "shadow_response": "x", "path": "base"}', "contradicts itself"),
        ('{"prompt": "hi", "response": "ho", "shadow_reponse": "x"}', "did you mean 'shadow_response'"),
        ('{"prompt": "hi", "messages": []}', "keep one form"),
        (r'{"prompt": "hi \ud83d", "response": "ho"}', "half a surrogate pair"),
        ('{"prompt": "hi", "response": "ho", "n": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"),
        (
            '{"prompt": "hi", "response": "ho", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "nests brackets more deeply",
        ),
        ('{"prompt": "hi", "response": "ho", "weight": 0}', "the key 'weight', which training does not use"),
        ('{"prompt": "hi", "response": "ho", "tools": {"name": "sit"}}', "'tools' must be a list of objects"),
        (turns({"role": "assistant", "content": "ho", "weight": 0}), "the answer has weight 0"),
        (
            turns({"role": "assistant", "content": "x", "weight": 1}, ANSWER),
            "message 2 has weight 1 but only the last answer",
        ),
        (
            turns({"role": "assistant", "content": "ho", "refusal": "no"}),
            "message 2 has the key 'refusal', which nothing reads",
        ),
        (turns({"role": "assistant", "content": None}), "must be a list of objects"),
        (turns({"role": "assistant", "tool_calls": "sit"}), "'tool_calls' of message 2 must be a list"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(GOOD + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        chat.read_jsonl(file)
    assert str(caught.value).startswith(f"{file}, line 3")
    assert "\n" not in str(caught.value)


def test_an_empty_message_is_refused_where_its_answer_is_learnt():
    row = json.loads(turns({"role": "user", "content": ""}, {**ANSWER, "weight": 0}, {"role": "user", "content": "so"}, ANSWER))
    assert chat.check_row(row, "here", every_turn=True)["messages"][1]["content"] == ""
    del row["messages"][2]["weight"]
    assert chat.check_row(row, "here")["messages"][1]["content"] == ""  # the last answer alone is learnt
    with pytest.raises(DataError, match="here has an empty message 2, which is answered"):
        chat.check_row(row, "here", every_turn=True)


def test_rows_of_other_columns_name_them_and_the_way_to_map_them(monkeypatch, capsys, tmp_path):
    (tmp_path / "rows.csv").write_text("id,question,answer\n1,hi,ho\n")
    code, out, _ = call(monkeypatch, capsys, "data", "check", tmp_path / "rows.csv", "--json")
    (said,) = json.loads(out)["refused"]["why"]
    assert code == 2
    assert "has the keys 'id', 'question', 'answer' but needs 'messages'" in said
    assert "{path: FILE, columns: {prompt: YOUR_NAME, response: YOUR_NAME}} in the place of the file" in said
    mapping = f"{{path: {tmp_path / 'rows.csv'}, columns: {{prompt: question, response: answer}}}}"  # as it says
    code, out, _ = call(monkeypatch, capsys, "data", "check", mapping, "--json")
    assert (code, json.loads(out)["rows"]) == (0, 1)
    code, out, _ = call(monkeypatch, capsys, "data", "check", tmp_path / "rows.csv", "--json", "--task-type", "SEQ_CLS")
    (said,) = json.loads(out)["refused"]["why"]
    assert (code, "columns: {text: YOUR_NAME, label: YOUR_NAME}" in said) == (2, True)


def test_not_utf8_names_the_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD.encode() + b"\n" + '{"prompt": "grün", "response": "ja"}'.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match="line 2 is not UTF-8 text"):
        chat.read_jsonl(file)


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_file(tmp_path, content):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        chat.read_jsonl(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl' does not exist"):
        chat.read_jsonl(tmp_path / "nothing.jsonl")


def test_the_fingerprint_follows_the_data(tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    changes = [
        rows[::-1],
        rows[:1],
        [rows[0], {**rows[1], "response": "e"}],
        [rows[0], {**rows[1], "path": "base"}],
        [rows[0], {**rows[1], "shadow_response": "e"}],
    ]

    def of(content):
        return chat.rows_digest(chat.read_jsonl(write_rows(tmp_path / "rows.jsonl", content)))

    assert of(rows) == of([dict(reversed(row.items())) for row in rows])  # the order of keys says nothing
    found = [of(rows), *(of(change) for change in changes)]
    assert len(set(found)) == len(found)


# ---------------------------------------------------------------------------------------------------------- batches


def test_the_collator_pads_and_masks():
    tokenizer = chat_tokenizer()
    rows = [{"prompt": "hi", "response": "h"}, {"prompt": "longer", "response": "answer", "path": "base"}]
    made = sequences(rows, tokenizer)
    batch = chat.ChatCollator(tokenizer.pad_token_id)([s.features() for s in made])
    short, long = len(made[0].ids), len(made[1].ids)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "shadow_labels"}
    assert all(v.shape == (2, long) and v.dtype == torch.long for v in batch.values())
    assert batch["input_ids"][0].tolist() == made[0].ids + [0] * (long - short)
    assert batch["attention_mask"].tolist() == [[1] * short + [0] * (long - short), [1] * long]
    for key in ("labels", "shadow_labels"):
        assert (batch[key][0, short:] == -100).all()
        assert (batch[key][0, made[0].start : short] == torch.tensor(made[0].ids[made[0].start :])).all()
    assert (batch["shadow_labels"][1] == -100).all()
    assert batch["labels"][1, made[1].start :].tolist() == made[1].ids[made[1].start :]


def test_a_padding_token_that_is_the_end_token_stays_a_target():
    tokenizer = chat_tokenizer(pad="<|im_end|>")
    made = sequences([{"prompt": "hi", "response": "h"}, {"prompt": "hi", "response": "longer"}], tokenizer)
    batch = chat.ChatCollator(tokenizer.pad_token_id)([s.features() for s in made])
    assert (batch["labels"] == END).sum(-1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(-1).tolist() == [len(s.ids) for s in made]


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_class_dataset_ends_and_begins_with_the_shadow_alone(epochs):
    rows = list(ClassDataset([[1, 2], [3]], [1, 0], epochs))
    assert len(rows) == 2 * (epochs + 1)
    assert [row["labels"] for row in rows] == [-100] * 2 * epochs + [1, 0]
    assert [row.get("shadow_labels") for row in rows[: 2 * epochs]] == [1, 0] * epochs


# ------------------------------------------------------------------------------------------------------------ tables

WALK = {"name": "Walk", "parameters": {"type": "object", "properties": {"distance": {"type": "number"}}}}
SAY = {
    "name": "Say",
    "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "to": {"type": ["string", "null"]}}},
}
ACTING = [
    {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": given}}]},
        ],
        "tools": [{"type": "function", "function": tool} for tool in (WALK, SAY)],
    }
    for text, name, given in (("walk", "Walk", {"distance": 2}), ("hi", "Say", {"text": "hi", "to": None}))
]


def test_a_table_says_what_its_rows_say(tmp_path):
    """Arrow gives every row every key: arguments of other tools, and keywords of other schemas, as null."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ACTING), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ACTING)))
    table, lines = (chat.read_file(tmp_path / f"rows.{kind}") for kind in ("parquet", "jsonl"))
    assert table == lines
    calls = [row["answer"]["tool_calls"][0]["function"]["arguments"] for row in table]
    assert calls == [{"distance": 2}, {"text": "hi", "to": None}]
    assert table[0]["tools"][0]["function"] == WALK


def test_null_stays_where_it_is_a_value():
    a = {"default": None, "enum": [None, {"k": None}], "const": {"y": None}}
    schema = {"type": "object", "properties": {"a": {**a, "minimum": None}, "default": None}}
    found = chat_rows.without_null({"parameters": schema, "b": None})
    assert found == {"parameters": {"type": "object", "properties": {"a": a}}}


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ({"type": "function", "function": "f"}, "f"),
        ({"type": "function", "function": {"name": ["f"]}}, "f"),
        ({"name": "f", "parameters": {"properties": ["a"]}}, "f"),
        ({"name": "f", "parameters": {"properties": {}}}, ["f"]),
    ],
)
def test_tools_that_are_none_stay_for_whoever_writes_them(tool, name):
    row = conversation(tool_calls=[{"type": "function", "function": {"name": name, "arguments": {"a": None}}}])
    checked = chat.check_row({**row, "tools": [tool]}, "here")
    assert checked["answer"]["tool_calls"][0]["function"]["arguments"] == {"a": None}


def test_a_column_of_one_name_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    cells = [pyarrow.array([text]) for text in "abc"]
    pyarrow.parquet.write_table(pyarrow.table(cells, names=["prompt", "response", "response"]), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="has the column 'response' twice"):
        chat.read_file(tmp_path / "rows.parquet")


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_without_arguments_is_one(arguments):
    called = {"type": "function", "function": {"name": "sit", "arguments": arguments}}
    (one,) = sequences([conversation(tool_calls=[called])], chat_tokenizer(TOOLS))
    assert "CALL sit {}" in chat_tokenizer(TOOLS).decode(one.ids[one.start :])


def test_arguments_that_are_none_name_the_row():
    called = {"type": "function", "function": {"name": "sit", "arguments": "{distance: 2}"}}
    with pytest.raises(DataError, match=r"row 1: a call of sit has the arguments '\{distance: 2\}', which are no JSON object"):
        sequences([conversation(tool_calls=[called])], chat_tokenizer(TOOLS))


def test_content_in_parts_and_tools_as_text():
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]}
    checked = chat.check_row({**row, "tools": json.dumps([{"type": "function", "function": WALK}])}, "here")
    assert (checked["messages"][0]["content"], checked["response"]) == ("a\nb", "b")
    assert checked["tools"][0]["function"] == WALK
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    for wrong in ([{"role": "user", "content": picture}], [{"role": "user", "content": [*parts, "c"]}]):
        with pytest.raises(DataError, match="string 'role' and 'content'"):
            chat.check_row({"messages": [*wrong, {"role": "assistant", "content": "x"}]}, "here")
    for text, said in (("{", "is a text and no JSON"), ('"x"', "must be a list of objects")):
        with pytest.raises(DataError, match=said):
            chat.check_row({**row, "tools": text}, "here")


def test_kinds_of_file_that_are_no_json_lines_are_named_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text(GOOD + "\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"rows\.jsonl is UTF-16 text; save it as UTF-8"):
        chat.read_file(tmp_path / "rows.jsonl")
    (tmp_path / "rows.feather").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match=r"ends in \.feather .*; save it as parquet"):
        chat.read_file(tmp_path / "rows.feather")

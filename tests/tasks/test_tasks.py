"""Prompts are the paper's, rows come from where they are said to, splits do not overlap; on inline samples."""

import gzip
import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from chatbase import chat_tokenizer
from shadowpeft.data.tasks import TASKS, class_ids, get_task, source, training_rows
from shadowpeft.errors import ConfigError, DataError

MMLU = {"question": "What is light?", "subject": "s", "choices": ["wave", "ray", "both", "none"], "answer": 2}
CONTEXT = "Oil rose in October 1973."


def write(folder, name, rows):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with a few rows of every task."""
    monkeypatch.setenv("SHADOWPEFT_DATA", str(tmp_path))
    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "folder")
    questions = [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(400)]
    write(tmp_path, "gsm8k/train.jsonl.gz", questions)
    write(tmp_path, "gsm8k/test.jsonl.gz", questions[:7])
    for name in ("auxiliary_train_subset", "validation", "test"):
        write(tmp_path, f"mmlu/{name}.jsonl.gz", [MMLU])
    spans = [
        {"id": "a", "context": CONTEXT, "question": "When?", "answers": {"text": ["October 1973", "1973"]}},
        {"id": "b", "context": CONTEXT, "question": "Why?", "answers": {"text": []}},
    ]
    for name in ("train_first10articles", "train_extra_answerable_only", "validation"):
        write(tmp_path, f"squad_v2/{name}.jsonl.gz", spans)
    for name in ("train", "test"):
        write(tmp_path, f"squad_v2_devsplit/{name}.jsonl.gz", spans)
        write(tmp_path, f"20news/{name}.jsonl.gz", [{"text": "puck\u2028ice", "label": 10}])
    for name in ("train", "validation", "test"):
        write(tmp_path, f"clinc150/{name}.jsonl.gz", [{"text": "wake me", "intent": "alarm"}])
        write(tmp_path, f"amazon_reviews/{name}.jsonl.gz", [{"text": "fine", "label": 3}])
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- prompts


def test_mmlu_prompt(folder):
    plain = (
        "Question: What is light?\nOptions:\nA: wave\nB: ray\nC: both\nD: none\nInstructions: Answer with ONLY the letter "
        "(A, B, C, or D). Do not include any explanation, reasoning, or additional text.\nAnswer:"
    )
    example = get_task("mmlu").load("test")[0]
    assert (example.prompt, example.answer, example.gold, example.choices) == (plain, "C", "C", ("A", "B", "C", "D"))
    few = get_task("mmlu").load("test", shots=2)[0].prompt
    assert few == (
        "Examples of correct response format:\nWhat is 2+2? (A: 3, B: 4, C: 5, D: 6) Answer: B\n"
        "What color is the sky? (A: Green, B: Blue, C: Red, D: Yellow) Answer: B\nNow answer the following question:\n"
        + plain
    )
    with pytest.raises(DataError, match=r"shots is 5 but .* exactly 2"):
        get_task("mmlu").load("test", shots=5)


def test_gsm8k_prompt(folder):
    example = get_task("gsm8k").load("test")[3]
    assert example.prompt == "Question: How many is 3?\nAnswer:"
    assert (example.answer, example.gold) == ("It is 3.\n#### 3", "3")


def test_squad_prompt(folder):
    answerable, not_answerable = get_task("squad_v2").load("test")
    assert answerable.prompt == (
        "Answer with the exact span from the context. If the question is unanswerable from the context, respond with exactly: "
        f"unanswerable\nContext: {CONTEXT}\nQuestion: When?\nAnswer (span or 'unanswerable' only):"
    )
    assert (answerable.answer, answerable.gold) == ("October 1973", ("October 1973", "1973"))
    assert (not_answerable.answer, not_answerable.gold) == ("unanswerable", ())


def test_worked_examples_come_from_the_training_rows_and_follow_the_seed(folder):
    task = get_task("gsm8k")
    zero, two, again, other = (
        task.load("test", shots=s, seed=seed)[0].prompt for s, seed in ((0, 0), (2, 0), (2, 0), (2, 1))
    )
    assert two == again != other
    assert two.endswith("\n\n" + zero)
    assert two.count("#### ") == two.count("\n\n") == 2
    train = {e.prompt: e.answer for e in task.load("train")}
    for block in two.split("\n\n")[:2]:
        prompt, _, answer = block.partition("Answer:")
        assert train[prompt + "Answer:"] == answer[1:]
    with pytest.raises(DataError, match="classifies and has no form with worked examples"):
        get_task("newsgroups").load("test", shots=1)
    with pytest.raises(DataError, match="shots is -1"):
        task.load("test", shots=-1)


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_right_by_its_own_scorer(folder, name):
    task = get_task(name)
    for split in ("train", "test"):
        examples = task.load(split)
        said = [e.gold if task.kind == "classify" else task.parse(e.answer) for e in examples]
        assert task.score(said, examples)["score"] == 1.0
        assert len({e.id for e in examples}) == len(examples) or name.startswith("squad")  # the sample's repeat


def test_training_rows_have_the_system_message_and_the_path(folder):
    task = get_task("robot")
    examples = task.load("train")
    rows = training_rows(task, examples)
    assert [r["path"] for r in rows].count("base") == 1000
    assert [r["path"] for r in rows].count("shadow") == 47
    assert rows[0]["messages"] == [
        {"role": "system", "content": "You are a robot dog."},
        {"role": "user", "content": examples[0].prompt},
    ]
    plain = training_rows(get_task("mmlu"), get_task("mmlu").load("train"))[0]
    assert [m["role"] for m in plain["messages"]] == ["user"]
    assert plain["response"] == "C"


# ---------------------------------------------------------------------------------------------------------------- splits


def test_the_held_out_rows_are_no_training_rows(folder):
    task = get_task("gsm8k")
    train, validation = ({e.prompt for e in task.load(s)} for s in ("train", "validation"))
    assert not train & validation
    assert len(train | validation) == 400
    assert 5 < len(validation) < 40  # 5 % of 400
    write(folder, "gsm8k/train.jsonl.gz", [{"question": f"How many is {i}?", "answer": "#### 1"} for i in range(800)])
    assert validation < {e.prompt for e in task.load("validation")}  # a row's side does not depend on the others


def test_equal_groups_stay_on_one_side(folder):
    rows = [
        {"id": f"{c}-{q}", "context": f"text {c}", "question": f"q{q}", "answers": {"text": []}}
        for c in range(100)
        for q in range(3)
    ]
    write(folder, "squad_v2_devsplit/train.jsonl.gz", rows)
    task = get_task("squad_v2_devsplit")
    train, validation = ({e.id.split("-")[0] for e in task.load(s)} for s in ("train", "validation"))
    assert validation
    assert not train & validation


def test_limit_is_a_repeatable_draw(folder):
    task = get_task("gsm8k")
    some = task.load("train", limit=20, seed=1)
    assert some == task.load("train", limit=20, seed=1) != task.load("train", limit=20, seed=2)
    everything = task.load("train")
    assert [e for e in everything if e in some] == some  # in the order of the data, under the same ids
    assert task.load("test", limit=100) == task.load("test")
    with pytest.raises(DataError, match="limit is 0"):
        task.load("test", limit=0)


def test_robot_has_the_papers_splits(folder):
    task = get_task("robot")
    assert [len(task.load(s)) for s in ("train", "validation", "test", "test_large")] == [4447, 264, 324, 626]
    assert task.source("test")["from"] == "package"
    with pytest.raises(DataError, match="split is 'tset' but task 'robot' has train"):
        task.load("tset")
    with pytest.raises(DataError, match="has no form with worked examples"):
        task.load("test", shots=2)


# --------------------------------------------------------------------------------------------------------------- sources


def test_the_source_says_folder_files_fingerprint_and_what_is_missing(folder):
    whole, part = get_task("gsm8k").source("test"), get_task("squad_v2").source("train")
    assert (whole["from"], whole["path"], whole["partial"], whole["rows"]) == (
        "folder",
        ["gsm8k/test.jsonl.gz"],
        False,
        7,
    )
    assert part["partial"]
    assert "no random sample" in part["lacks"]
    write(folder, "gsm8k/test.jsonl.gz", [{"question": "other", "answer": "#### 1"}])
    assert get_task("gsm8k").source("test")["fingerprint"] != whole["fingerprint"]
    train, held = get_task("gsm8k").source("train"), get_task("gsm8k").source("validation")
    assert train["fingerprint"] != held["fingerprint"]
    assert "cut off the training rows" in held["split"]


def test_the_hub_is_read_when_it_is_there(monkeypatch):
    asked = []
    features = Features({"text": Value("string"), "intent": ClassLabel(names=["zebra", "alarm", "oos"])})

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return Dataset.from_dict({"text": ["wake me", "?"], "intent": [1, 2]}, features=features)

    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "hub")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = get_task("clinc150")
    examples = task.load("test")
    assert asked == [("clinc/clinc_oos", "plus", "test")]
    assert [e.answer for e in examples] == ["alarm", "oos"]  # the Hub's numbers are in another order than our classes
    assert [e.gold for e in examples] == [task.labels.index("alarm"), 150]
    origin = task.source("test")
    assert (origin["from"], origin["name"], origin["partial"]) == ("hub", ["clinc/clinc_oos:plus:test"], False)


def test_the_folder_that_is_named_is_read_else_the_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("SHADOWPEFT_DATA_FROM", raising=False)
    monkeypatch.setenv("SHADOWPEFT_DATA", str(tmp_path))
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert not source.use_hub()
    monkeypatch.delenv("SHADOWPEFT_DATA")
    assert source.use_hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="HF_HUB_OFFLINE is set and no data folder is named; set SHADOWPEFT_DATA, or unset"
    ):
        get_task("gsm8k").load("test")
    with pytest.raises(DataError, match="no data folder is named; set SHADOWPEFT_DATA"):
        get_task("squad_v2_devsplit").load("test")  # not on the Hub
    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "hub")
    assert source.use_hub()
    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "both")
    with pytest.raises(ConfigError, match="SHADOWPEFT_DATA_FROM is 'both' but must be hub or folder"):
        source.use_hub()


def test_a_hub_that_does_not_answer(monkeypatch):
    def load_dataset(name, configuration, split):
        raise ConnectionError("no route")

    monkeypatch.setenv("SHADOWPEFT_DATA_FROM", "hub")
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"'openai/gsm8k' cannot be read from the Hub \(no route\); check the network, or set"
    ):
        get_task("gsm8k").load("test")


def test_missing_and_damaged_files(folder):
    file = folder / "gsm8k/test.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test.jsonl.gz' is damaged after line"):
        get_task("gsm8k").load("test")
    with gzip.open(file, "wt") as handle:
        handle.write('{"question": "q", "answer": "#### 1"}\n{"question"\n')
    with pytest.raises(DataError, match="damaged after line 1"):
        get_task("gsm8k").load("test")
    file.unlink()
    with pytest.raises(DataError, match=r"test.jsonl.gz' does not exist; set SHADOWPEFT_DATA to a folder"):
        get_task("gsm8k").load("test")
    with pytest.raises(DataError, match="split is 'dev' but task 'gsm8k' has train, validation, test"):
        get_task("gsm8k").load("dev")


def test_a_line_separator_in_a_text_ends_no_row(folder):
    assert get_task("newsgroups").load("test")[0].prompt == "puck\u2028ice"


def test_class_ids_truncate_and_are_never_empty():
    tokenizer = chat_tokenizer()
    assert len(class_ids(tokenizer, "x" * 50, 20)) == 20
    assert class_ids(tokenizer, "abc", 20) == tokenizer("abc").input_ids
    assert class_ids(tokenizer, "", 20) == class_ids(tokenizer, " \n", 20) == tokenizer("\n").input_ids

"""Parsers and scorers against the published definitions: SQuAD v2's evaluation script, GSM8K's answer rule, MMLU's letter.

The SQuAD vectors are worked by hand from the definition (lower case, ASCII punctuation out, the words a/an/the out, white
space single; F1 over bags of words; an empty side scores 1 only against an empty side).
"""

import math

import pytest

from shadowpeft.data.tasks import TASKS, Example, get_task
from shadowpeft.data.tasks.squad_v2 import exact, f1, normalise
from shadowpeft.errors import ConfigError


def squad(*golds):
    return Example("q", "", "", tuple(golds), (), {"answerable": bool(golds)})


# ---------------------------------------------------------------------------------------------------------------- SQuAD


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("  in  the\tlate 1990s. ", "in late 1990s"),
        ("U.S.", "us"),  # punctuation is removed, not replaced by a space
        ("well-known", "wellknown"),
        ("a.n apple", "apple"),  # punctuation goes first: "a.n" becomes the article "an"
        ("another theme", "another theme"),  # only whole words are articles
        ("$1,000", "1000"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation counts
        ("The", ""),
        ("", ""),
    ],
)
def test_squad_normalisation(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("said", "gold", "em", "f"),
    [
        ("the Broncos", "Broncos!", 1.0, 1.0),
        ("Denver Broncos", "Broncos", 0.0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("cat cat dog", "cat dog dog", 0.0, 2 / 3),  # bags: one cat, one dog in common
        ("blue", "red", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("", "red", 0.0, 0.0),
        ("red", "", 0.0, 0.0),
        ("the", "", 1.0, 1.0),  # nothing is left of an article
    ],
)
def test_squad_exact_match_and_f1(said, gold, em, f):
    assert exact(said, gold) == em
    assert f1(said, gold) == pytest.approx(f)


def test_squad_takes_the_best_gold_and_splits_by_answerability():
    task = get_task("squad_v2")
    examples = [squad("October 1973", "1973"), squad("Paris"), squad(), squad()]
    said = [task.parse(t) for t in ("in 1973", "Unanswerable.", "unanswerable", "London")]
    assert said == ["in 1973", "", "", "London"]
    found = task.score(said, examples)
    assert [task.per_example(p, e) for p, e in zip(said, examples, strict=True)] == [0.0, 0.0, 1.0, 0.0]
    best = 2 * (1 / 2) * 1 / (1 / 2 + 1)  # "in 1973" against "1973"; against "October 1973" it is 1/2
    assert found["f1"] == pytest.approx((best + 0 + 1 + 0) / 4)
    assert found["score"] == found["exact"] == pytest.approx(1 / 4)
    assert found["has_answer_exact"] == 0.0
    assert found["has_answer_f1"] == pytest.approx(best / 2)
    assert found["no_answer_exact"] == found["no_answer_f1"] == 0.5


def test_squad_drops_gold_answers_that_normalise_to_nothing():
    task = get_task("squad_v2")
    assert task.per_example("", squad("the", "sea")) == 0.0  # "the" is no gold answer
    assert task.per_example("", squad("the")) == 1.0  # none is left: as unanswerable


def test_squad_parts_without_examples_are_left_out():
    found = get_task("squad_v2").score(["x"], [squad("x")])
    assert not [key for key in found if key.startswith("no_answer")]


# ---------------------------------------------------------------------------------------------------------------- GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("#### 1,450,000", "1450000"),
        ("#### -7", "-7"),
        ("#### 2.5", "2.5"),
        ("#### 18\nQuestion: next\n#### 20", "18"),  # the first one
        ("#### 18.", "18."),  # the published rule keeps a closing full stop, and so fails it
        ("####18", None),  # and asks for the space
        ("#### $18", None),
        ("The answer is 18", None),
    ],
)
def test_gsm8k_reads_the_number_as_the_published_rule(text, number):
    assert get_task("gsm8k").parse(text) == number


def test_gsm8k_without_a_number_is_wrong():
    task = get_task("gsm8k")
    example = task.example({"question": "q", "answer": "so it is\n#### 1,018"}, "0")
    assert example.gold == "1018"
    assert task.score(["1018", None], [example, example]) == {"score": 0.5, "answered": 0.5}


# ----------------------------------------------------------------------------------------------------------------- MMLU


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(C)", "C"),
        ("D. because", "D"),
        ("A: 3", "A"),
        ("**B**", "B"),
        ("Answer: C", "C"),
        ("The correct answer is (A).", "A"),
        ("B\nC", "B"),
        ("A cat", None),  # an article
        ("Because", None),
        ("E", None),
        ("", None),
        ("Both A and B", None),
    ],
)
def test_mmlu_letter(text, letter):
    assert get_task("mmlu").parse(text) == letter


def test_mmlu_subject_mean_weighs_subjects_alike():
    task = get_task("mmlu")
    row = {"question": "q", "choices": ["w", "x", "y", "z"], "answer": 1}
    examples = [task.example({**row, "subject": s}, s) for s in ("law", "law", "law", "art")]
    found = task.score(["B", "B", "A", None], examples)
    assert found["score"] == 0.5
    assert found["subject_mean"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["answered"] == 0.75


# ------------------------------------------------------------------------------------------------------- classification


def test_clinc_tells_scope_from_out_of_scope():
    task = get_task("clinc150")
    assert len(task.labels) == 151
    assert len(set(task.labels)) == 151
    examples = [task.example({"text": "t", "intent": i}, i) for i in ("accept_reservations", "yes", "oos")]
    assert [e.gold for e in examples] == [0, 149, 150]
    assert task.score([0, 150, 150], examples) == pytest.approx({"score": 2 / 3, "in_scope": 0.5, "oos_recall": 1.0})


def test_classes_are_complete_and_ordered():
    groups = get_task("newsgroups").labels
    assert len(groups) == 20
    assert list(groups) == sorted(groups)
    assert get_task("amazon_reviews").example({"text": "bad", "label": 0}, "0").answer == "1 star"


def test_robot_judges_both_paths_by_one_rule():
    task = get_task("robot")
    skill = Example("s", "", "", "Sit", (), {"lang": "en"})
    remote = Example("r", "", "", "REMOTE", (), {"lang": "zh"})
    texts = ["[Sit()] ok", "[Dance()] ok", "sit", "[REMOTE] later", "Paris, of course.", "[Sit()] ok"]
    examples = [skill, skill, skill, remote, remote, remote]
    said = [task.parse(text) for text in texts]
    assert [task.per_example(p, e) for p, e in zip(said, examples, strict=True)] == [1, 0, 0, 1, 1, 0]
    assert task.score(said, examples) == pytest.approx(
        {"score": 0.5, "skill": 1 / 3, "remote": 2 / 3, "en": 1 / 3, "zh": 2 / 3, "tagged": 1 / 3}
    )


# --------------------------------------------------------------------------------------------------------------- common


def test_the_score_is_the_mean_of_the_examples():
    """What the bootstrap resamples is what is reported."""
    cases = {
        "mmlu": ([Example("0", "", "", "A", (), {"subject": "s"})] * 3, ["A", None, "B"]),
        "gsm8k": ([Example("0", "", "", "1")] * 3, ["1", None, "2"]),
        "squad_v2": ([squad("x"), squad(), squad("y")], ["x", "x", "x"]),
        "robot": ([Example("0", "", "", "Sit", (), {"lang": "en"})] * 3, ["Sit", None, "REMOTE"]),
        "clinc150": ([Example("0", "", "", 3)] * 3, [3, 4, 150]),
        "newsgroups": ([Example("0", "", "", 3)] * 3, [3, 4, 5]),
        "amazon_reviews": ([Example("0", "", "", 3)] * 3, [3, 4, 1]),
    }
    assert {*cases, "squad_v2_devsplit"} == set(TASKS)
    for name, (examples, said) in cases.items():
        task = get_task(name)
        found = task.score(said, examples)
        assert found["score"] == pytest.approx(1 / 3), name
        assert sum(task.per_example(p, e) for p, e in zip(said, examples, strict=True)) == pytest.approx(1), name
        assert all(0 <= value <= 1 for value in found.values())


def test_a_missing_prediction_is_an_error():
    with pytest.raises(ConfigError, match="1 predictions for 2 examples"):
        get_task("newsgroups").score([1], [Example("0", "", "", 3)] * 2)
    assert math.isnan(get_task("newsgroups").score([], [])["score"])


def test_unknown_task():
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        get_task("gsm8")
    with pytest.raises(ConfigError, match="choose from mmlu, gsm8k"):
        get_task("chess")

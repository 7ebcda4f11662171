"""The router decides by text and scores alone; its calibration is a monotone map that survives its file."""

import json
import math

import pytest

from shadowpeft.data.robot import parse_action
from shadowpeft.errors import ConfigError
from shadowpeft.generate import routing_reason
from shadowpeft.serve.router import SIGNALS, Calibration, Router, Scores, decisive, signals

TAG = ["[", "Sit", "()", "]", " fine", "."]


def scores(*logprobs):
    return Scores(list(logprobs), [1.0] * len(logprobs), [0.5] * len(logprobs))


def calibration(threshold=0.9):
    return Calibration("logprob", (-4.0, -2.0, -1.0), (0.2, 0.6, 1.0), threshold)


@pytest.mark.parametrize("text", ["[Sit()] ok", "[REMOTE] later", "[Fly()] no such", "words", "", "  [Bark()]"])
def test_without_calibration_it_is_the_papers_procedure(text):
    decision = Router(parse_action).decide([text], scores(-9.0))
    assert decision.reason == routing_reason(parse_action(text))
    assert decision.where == ("device" if decision.reason == "known skill" else "cloud")
    assert decision.confidence is None


def test_only_the_tokens_of_the_action_count():
    sure_tag = scores(-0.1, -0.1, -0.1, -0.1, -9.0, -9.0)
    unsure_tag = scores(-0.1, -4.0, -0.1, -0.1, -0.0, -0.0)
    router = Router(parse_action, calibration())
    kept, handed = router.decide(TAG, sure_tag), router.decide(TAG, unsure_tag)
    assert (kept.where, kept.reason, kept.action, kept.confidence) == ("device", "known skill", "Sit", 1.0)
    assert (handed.where, handed.reason, handed.action) == ("cloud", "low confidence", "Sit")
    assert handed.confidence == pytest.approx(0.2)
    assert decisive(TAG, parse_action) == (4, "Sit")
    assert decisive(["no", " tag"], parse_action) == (2, None)


def test_the_threshold_itself_is_kept():
    router = Router(parse_action, calibration(0.6))
    assert router.decide(TAG[:4], scores(-0.5, -0.5, -0.5, -0.5)).where == "device"
    assert router.decide(TAG[:4], scores(-0.5, -0.5, -0.5, -0.501)).where == "cloud"


@pytest.mark.parametrize(
    ("pieces", "lost"),
    [
        ([], False),
        ([" "], False),
        (["["], False),
        (["[", "RE"], False),
        (["[", "REMOTE"], False),
        (["[REMOTE]"], True),
        (["The"], True),
        (["[Sit()]"], False),
        (["[Fly()] and more words"], False),
        (["[" + "x" * 50], True),
    ],
)
def test_an_answer_is_given_up_only_when_it_is_lost(pieces, lost):
    assert Router(parse_action).lost(pieces, scores(*[-0.1] * len(pieces))) is lost


def test_an_answer_given_up_would_have_gone_to_the_cloud_however_it_went_on():
    texts = ["[Sit()] ok", "[REMOTE] a", "[Fly()] b", "plain words", " [Bark()]", "[Si", "[[Sit()]]", "[" + "a" * 60]
    for router in (Router(parse_action), Router(parse_action, calibration())):
        for text in texts:
            for value in (-0.01, -2.0):
                s = Scores([value] * len(text), [1.0] * len(text), [0.0] * len(text))
                final = router.decide(list(text), s).where
                for n in range(len(text) + 1):
                    if router.lost(list(text[:n]), s.first(n)):
                        assert final == "cloud"


def test_an_unsure_action_is_lost_at_once():
    assert Router(parse_action, calibration()).lost(TAG[:4], scores(-3.0, 0.0, 0.0, 0.0))


def test_signals_by_hand():
    s = Scores([-1.0, -3.0], [0.5, 2.0], [0.1, 0.7])
    assert signals(s) == {"logprob": -4.0, "mean_logprob": -2.0, "min_logprob": -3.0, "margin": 0.5, "entropy": -0.7}
    assert set(signals(Scores())) == set(SIGNALS)
    assert calibration().confidence(Scores()) == 0.2  # nothing said: as unsure as can be


@pytest.mark.parametrize(
    ("value", "chance"), [(-9, 0.2), (-4, 0.2), (-3, 0.4), (-2, 0.6), (-1.5, 0.8), (0, 1.0), (math.nan, 0.0)]
)
def test_interpolation_by_hand(value, chance):
    assert calibration().at(value) == pytest.approx(chance)


def test_a_file_comes_back_as_it_was(tmp_path):
    made = Calibration("margin", (0.1, 1 / 3), (0.25, 0.75), 0.5, {"n": 3})
    made.save(tmp_path / "routing.json")
    assert Calibration.load(tmp_path / "routing.json") == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "no calibration of format 1"),
        ({"extra": 1}, "no calibration of format 1"),
        ({"signal": "luck"}, "signal is 'luck'"),
        ({"values": [1.0]}, "equally many"),
        ({"values": [2.0, 1.0]}, "must increase"),
        ({"chances": [0.9, 0.1]}, "must not decrease"),
        ({"values": ["a", "b"]}, "not a number"),
        ({"values": [True, 2]}, "not a number"),
        ({"threshold": float("nan")}, "not finite"),
        ({"report": 3}, "no object"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    file = tmp_path / "routing.json"
    Calibration("margin", (0.1, 0.2), (0.25, 0.75), 0.5).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        Calibration.load(file)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        Calibration.load(tmp_path / "x.json")

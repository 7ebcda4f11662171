"""The bound of a calibration holds whatever the confidence is worth: thousands of calibrations where the true error is known.

Here runs the part of ``calibrate`` that decides, and a few times the whole, which must decide the same. ``python -m
scripts.calibration_bound`` does it a thousand times a cell for docs/routing.md.
"""

import json
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest
from scripts.calibration_bound import CURVES, LEVEL, RECORD, ROWS, TARGETS, Draw, World, cell

from shadowpeft.apps.calibrating import with_open_share
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve.bound import choosing_rows, fewest_kept, require_rows, strictest, strictest_to_laxest
from shadowpeft.serve.calibration import Sample, calibrate
from shadowpeft.serve.router import SIGNALS, Calibration, Router, Scores
from shadowpeft.terminal import terminal

RUNS = {"informative": 100, "mislabelled": 100, "weak": 100, "worst": 500, "tied": 100}
"""Where confidence says nothing the bound is closest to its level."""


def unlikely(runs):
    """More misses than this come once in 10,000 cells whose bound holds."""
    return int(binom.ppf(0.9999, runs, 1 - LEVEL))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "curve", [pytest.param(c, marks=[pytest.mark.slow] * (c != "worst")) for c in CURVES]
)
def test_the_true_error_exceeds_the_target_in_one_calibration_of_twenty_at_most(curve, target):
    world = World(curve, target)
    made = {n: cell(world, n, RUNS[curve], 2, bound=True) for n in ROWS}
    missed = {n: result["missed"] for n, result in made.items()}
    assert max(missed.values()) <= unlikely(RUNS[curve]), missed
    if curve == "informative":
        # a bound that keeps nothing would hold, too; 1 % takes 299 answers without a wrong one, 5 % takes 59
        assert made[3000]["kept"] > (0.35 if target == 0.01 else 0.85) * world.most
    if curve == "mislabelled" and target > 0.01:
        # a sequence that starts where no wrong answer is allowed keeps 0.64 and 0.75 of that, half of the time nothing
        assert made[3000]["kept"] > 0.8 * world.most


def test_the_first_threshold_may_keep_a_wrong_answer_where_rows_allow():
    assert [strictest(rows, 0.05, 0.95) for rows in (50, 150, 233, 309, 310, 500)] == [59, 59, 93, 93, 124, 150]
    x, wrong = -np.arange(247.0), np.zeros(247)
    wrong[40] = 1  # one of the surest 59
    assert strictest_to_laxest(x, wrong, target=0.05, level=0.95).kept == 247
    assert strictest_to_laxest(x[:150], wrong[:150], target=0.05, level=0.95).kept == 0


def test_the_simulation_sees_a_rule_whose_guarantee_does_not_survive_the_choice():
    """The laxest threshold whose interval holds, also if a stricter one fails: the rule of ``--bound`` until November 2026."""
    world, missed = World("worst", 0.05), 0
    for run in range(200):
        values, right = world.draw(1000, np.random.default_rng(run))
        wrong = np.cumsum(1 - right[np.argsort(-values[SIGNALS[0]])])
        missed += bool((binom.cdf(wrong, np.arange(1, 1001), 0.05) <= 0.05).any())
    assert missed > 2 * unlikely(200)


def test_choosing_the_signal_on_the_tested_rows_would_be_seen():
    world, missed = World("worst", 0.1), 0
    for run in range(100):
        values, right = world.draw(300, np.random.default_rng(run))
        every = [strictest_to_laxest(values[s], 1 - right, target=0.1, level=LEVEL, seed=run) for s in SIGNALS]
        missed += max(t.kept for t in every) > 0
    assert missed > unlikely(100)


def test_a_share_of_open_requests_moves_the_bound_to_another_mixture():
    """A device that is right on every command and keeps 11.7 % of the open requests: where half of the requests are open, 10.5
    % of what it keeps is wrong, and a confidence that says nothing cannot tell. In the rows a fifth are open."""
    console, missed = terminal(stderr=True), {None: 0, 0.5: 0}
    for run in range(300):
        rng = np.random.default_rng(run)
        rows = [{"skill": "REMOTE" if rng.random() < 0.2 else "Sit"} for _ in range(1000)]
        for share in missed:
            left = rows if share is None else with_open_share(rows, share, "data", console)[0]
            wrong = np.array([row["skill"] == "REMOTE" for row in left])
            kept = ~wrong | (rng.random(len(left)) < 0.117)
            tested = strictest_to_laxest(rng.random(kept.sum()), wrong[kept].astype(float), target=0.1, level=LEVEL, seed=run)
            missed[share] += tested.kept > 0  # whatever is kept, 10.5 % of it would be wrong
    assert missed[None] > 290
    assert missed[0.5] <= unlikely(300)


def test_the_report_counts_the_rows_that_were_tested():
    drawn = Draw.of(World("informative", 0.1), 300, 0).samples()
    made = calibrate(drawn, target=0.1, level=LEVEL, seed=5)
    tested, aside = made.report["tested"], set(choosing_rows(300, "auto", 5))
    assert len(aside) == 60
    rows = [s for i, s in enumerate(drawn) if s.kept and i not in aside]
    kept = [s for s in rows if made.keeps(s.signals[made.signal])]
    assert tested == {"rows": len(rows), "kept": len(kept), "wrong": sum(not s.right for s in kept), "needed": 29}
    assert tested["kept"] > 0


def test_the_record_holds_its_promise():
    record = json.loads(RECORD.read_text())
    assert {(c["curve"], c["target"], c["rows"]) for c in record["cells"]} == {
        (c, t, n) for c in CURVES for t in TARGETS for n in ROWS
    }
    for made in record["cells"]:
        assert made["bound"]["runs"] >= 1000
        assert made["bound"]["missed"] <= unlikely(made["bound"]["runs"])
    assert max(c["plain"]["missed"] / c["plain"]["runs"] for c in record["cells"]) > 0.9


def test_the_sequence_by_hand(monkeypatch):
    """Distinct values: the last rank of an unbroken run of binomial tests, and a threshold between two answers."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        x = rng.permutation(400).astype(float)
        wrong = (rng.random(400) < 0.4 * (1 - x / 400) ** 2).astype(float)
        tested = strictest_to_laxest(x, wrong, target=0.1, level=0.9)
        order = np.argsort(-x)
        kept = 0
        for rank in np.linspace(120, 400, 20).round().astype(int):
            if binomtest(int(wrong[order][:rank].sum()), int(rank), 0.1, alternative="less").pvalue > 0.1 + 1e-12:
                break
            kept = int(rank)
        assert tested.kept == kept
        assert int((x >= tested.least).sum()) == kept
        assert tested.wrong == int(wrong[x >= tested.least].sum())


def test_equal_values_are_kept_together_or_not_at_all():
    x = np.repeat([3.0, 2.0, 1.0], [10, 90, 100])
    wrong = np.zeros(200)
    wrong[100:] = np.arange(100) % 2
    tested = strictest_to_laxest(x, wrong, target=0.1, level=0.95)
    assert (tested.kept, tested.wrong) == (100, 0)
    assert 1.0 < tested.least <= 2.0
    constant = strictest_to_laxest(np.ones(200), np.zeros(200), target=0.1, level=0.95)
    assert (constant.kept, constant.least) == (200, 1.0)
    shuffled = np.random.default_rng(0).permutation(200)
    assert strictest_to_laxest(x[shuffled], wrong[shuffled], target=0.1, level=0.95) == tested


def test_an_answer_that_is_less_sure_than_every_tested_one_is_handed_on():
    drawn = [Sample(True, i > 0, {"action": 0.5 + i / 400}) for i in range(160)]
    made = calibrate(drawn, target=0.1, signal="action")
    assert made.report["commands_kept"] == 1.0
    assert (made.keeps(0.5), made.keeps(0.499), made.keeps(0.0)) == (True, False, False)
    assert calibrate(drawn, target=1.0, signal="action").keeps(0.0)  # whoever asks for everything gets it


def test_the_fewest_rows_are_those_of_the_exact_tail():
    assert (fewest_kept(0.01, 0.95), fewest_kept(0.05, 0.95), fewest_kept(0.03, 0.95)) == (299, 59, 99)
    for target, level in ((0.01, 0.95), (0.2, 0.5), (0.033, 0.99), (0.5, 0.5)):
        for wrong in (0, 1, 2, 7):
            n = fewest_kept(target, level, wrong)
            assert binom.cdf(wrong, n, target) <= 1 - level + 1e-12
            assert n == 1 + wrong or binom.cdf(wrong, n - 1, target) > 1 - level


@pytest.mark.parametrize(("signal", "enough"), [("auto", 373), ("margin", 299)])
def test_rows_that_can_never_hold_the_target_are_refused_with_the_number_that_could(signal, enough):
    asked = {"target": 0.01, "level": 0.95, "signal": signal}
    with pytest.raises(DataError, match=rf"takes 299 kept answers .* give about {enough} commands"):
        require_rows([False] * (enough - 1), **asked)
    require_rows([False] * enough, **asked)
    with pytest.raises(DataError, match="but the data has 298 commands"):  # open requests are no answers to keep
        require_rows([False] * 298 + [True] * 500, **asked)
    right = [Sample(True, True, dict.fromkeys(SIGNALS, float(i))) for i in range(enough)]
    assert calibrate(right, target=0.01, signal=signal).report["answered_on_device"] > 0.95 * enough
    with pytest.raises(DataError, match="takes 299"):
        calibrate(right[1:], target=0.01, signal=signal)
    reach = 1 - 0.05 ** (1 / 50)
    with pytest.raises(DataError, match=f"a target from {math.ceil(1e4 * reach) / 1e4:g}"):
        require_rows([False] * 50, target=0.01, level=0.95, signal="margin")
    with pytest.raises(ConfigError, match="level is 0"):
        require_rows([False] * 50, target=0.01, level=0.0, signal="margin")


def test_too_few_known_actions_keep_nothing_and_say_how_many_it_takes():
    drawn = [Sample(i % 3 == 0, i % 3 == 0, dict.fromkeys(SIGNALS, float(i))) for i in range(150)]
    made = calibrate(drawn, target=0.05, signal="margin")
    assert made.threshold > 1
    assert made.least is None
    assert made.report["tested"] == {"rows": 50, "kept": 0, "wrong": 0, "needed": 59}


def test_what_is_served_is_what_was_tested(tmp_path):
    """The file keeps an answer if and only if its signal reaches the tested threshold, to the last bit."""
    world = World("informative", 0.1)
    made = calibrate(Draw.of(world, 1000, 0).samples(), target=0.1, signal="logprob")
    made.save(tmp_path / "routing.json")
    router = Router(lambda text: "Sit", Calibration.load(tmp_path / "routing.json"))
    assert router.calibration == made
    for value, kept in ((made.least, True), (np.nextafter(made.least, -np.inf), False), (made.least + 1, True)):
        decision = router.decide(["x"], Scores([float(value)], [0.0], [0.0]))
        assert (decision.where == "device") is kept
        assert decision.value == value
    assert router.decide(["x"], Scores([math.nan], [0.0], [0.0])).where == "cloud"


@pytest.mark.parametrize(
    ("least", "message"), [("a", "not a number"), (None, "not a number"), (math.inf, "not finite")]
)
def test_a_damaged_threshold_is_refused(tmp_path, least, message):
    file = tmp_path / "routing.json"
    Calibration("margin", (0.1, 0.2), (0.25, 0.75), 0.5, least=0.15).save(file)
    assert Calibration.load(file).least == 0.15
    file.write_text(json.dumps({**json.loads(file.read_text()), "least": least}))
    with pytest.raises(ConfigError, match=message):
        Calibration.load(file)


def test_a_file_from_before_decides_by_the_chance(tmp_path):
    file = tmp_path / "routing.json"
    old = {"format": 1, "signal": "margin", "values": [0.0, 1.0], "chances": [0.2, 1.0], "threshold": 0.6, "report": {}}
    file.write_text(json.dumps(old))
    made = Calibration.load(file)
    assert [made.keeps(value) for value in (0.49, 0.51, math.nan)] == [False, True, False]
    made.save(file)
    assert json.loads(file.read_text()) == old

"""Calibration against brute force, scipy and scikit-learn; and the command, with the tiny model."""

import json
import math
import random

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from chatbase import save_base
from commands import call
from serving import ADAPTERS
from shadowpeft.apps.calibrating import with_open_share
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.serve import calibration as fitting
from shadowpeft.serve.bound import require_rows
from shadowpeft.serve.calibrated import distance, sketch
from shadowpeft.serve.calibration import Sample, auroc, calibrate, choose_threshold, ece, upper_bound
from shadowpeft.serve.loading import load_edge
from shadowpeft.serve.router import SIGNALS, Calibration
from shadowpeft.terminal import terminal


def made_up(n, seed=0, cloud=False):
    """Answers whose margin tells the truth: an action with margin x is right with chance 1 / (1 + exp(-2x)); others lie."""
    rng = random.Random(seed)
    samples = []
    for i in range(n):
        x = rng.uniform(-2, 3)
        values = {name: rng.random() for name in SIGNALS}
        known = i % 5 > 0
        right = known and rng.random() < 1 / (1 + math.exp(-2 * x))
        cloud_right = rng.random() < 0.9 if cloud else None
        samples.append(Sample(known, right, {**values, "margin": x}, cloud_right, i % 7 == 0 and not right, not known))
    return samples


def test_the_signal_that_tells_the_truth_is_found_and_its_chances_are_right():
    made = calibrate(made_up(2000), target=0.05)
    assert made.signal == "margin"
    for x in (-1.0, 0.0, 1.0, 2.0):
        assert made.at(x) == pytest.approx(1 / (1 + math.exp(-2 * x)), abs=0.1)
    assert made.report["ece"] < 0.05
    assert made.report["auroc"] == pytest.approx(made.report["signals_auroc"]["margin"], abs=0.03)
    fresh = fitting.check(made, made_up(2000, seed=1))
    assert fresh["wrong_share"] < 0.05 + 3 * math.sqrt(0.05 * 0.95 / fresh["answered_on_device"])
    assert fresh["on_device"] > 0.25
    without = made.report["without_confidence"]
    assert without["wrong_share"] > 0.1  # so the threshold did something
    assert without["on_device"] == pytest.approx(0.8)


def test_the_pure_map_is_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    samples = [s for s in made_up(300) if s.kept]
    made = calibrate(samples, target=0.1, signal="margin")
    x, y = np.array([s.signals["margin"] for s in samples]), np.array([s.right for s in samples], dtype=float)
    theirs = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(x, y)
    grid = np.linspace(-4, 5, 401)
    assert [made.at(float(v)) for v in grid] == pytest.approx(theirs.predict(grid).tolist(), abs=1e-9)


@pytest.mark.parametrize("target", [0.0, 0.05, 0.2, 1.0])
def test_without_the_bound_the_threshold_is_the_best_of_all(target):
    rng = np.random.default_rng(3)
    for _ in range(20):
        chance = rng.choice([0.1, 0.4, 0.7, 0.9, 1.0], size=40)
        right = (rng.random(40) < chance).astype(float)
        best = -1
        for t in sorted({*chance.tolist(), 2.0}):
            kept = chance >= t
            wrong, n = int((1 - right)[kept].sum()), int(kept.sum())
            if n == 0 or wrong / n <= target:
                best = max(best, n)
        found = choose_threshold(chance, right, target)
        assert int((chance >= found).sum()) == best


def test_upper_bound_is_clopper_pearson():
    from scipy.stats import beta

    for wrong, n in ((0, 10), (0, 300), (3, 50), (49, 50), (20, 264)):
        assert upper_bound(wrong, n) == pytest.approx(beta.ppf(0.95, wrong + 1, n - wrong), abs=1e-6)
    assert upper_bound(5, 5) == upper_bound(0, 0) == 1.0


def test_auroc_and_ece_by_hand():
    right, score = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.9, 0.8, 0.8, 0.1])
    pairs = [1.0, 1.0, 0.5, 1.0]  # (0.9 > 0.8), (0.9 > 0.1), (0.8 = 0.8), (0.8 > 0.1)
    assert auroc(right, score) == pytest.approx(sum(pairs) / 4)
    assert auroc(np.ones(3), score[:3]) is None
    rng = np.random.default_rng(0)
    many, coarse = (rng.random(200) < 0.7).astype(float), rng.integers(0, 20, 200).astype(float)
    assert auroc(many, coarse) == pytest.approx(roc_auc_score(many, coarse), abs=1e-12)
    assert ece(right, score) == pytest.approx((abs(0.1) + abs(1 - 1.6) + abs(-0.1)) / 4)


def test_the_curve_ends_at_all_and_nothing():
    samples = made_up(200, cloud=True)
    made = calibrate(samples, target=0.05)
    points = fitting.curve(made, samples)
    assert points[0]["on_device"] == pytest.approx(0.8)
    assert points[-1]["on_device"] == 0.0
    assert points[-1]["accuracy_routed"] == points[-1]["accuracy_cloud"]
    shares = [p["on_device"] for p in points]
    assert shares == sorted(shares, reverse=True)
    hits = sum(s.right if s.kept else s.cloud_right for s in samples)
    assert points[0]["accuracy_routed"] == pytest.approx(hits / 200)


def test_an_impossible_target_keeps_nothing():
    samples = [Sample(True, i % 2 == 0, dict.fromkeys(SIGNALS, 1.0)) for i in range(60)]
    made = calibrate(samples, target=0.1)
    assert made.threshold > 1
    assert made.report["answered_on_device"] == 0
    assert made.report["wrong_share"] is None
    assert made.report["auroc"] == 0.5


def test_all_right_keeps_everything():
    samples = [Sample(True, True, dict.fromkeys(SIGNALS, float(i))) for i in range(60)]
    made = calibrate(samples, target=0.0, bound=False)
    assert made.report["on_device"] == 1.0
    assert made.report["auroc"] is None


def test_shares_stand_per_command_and_per_open_request():
    """Of six commands four are kept, one of them wrongly; of four open requests one is."""
    cases = [(True, True, False)] * 3 + [(True, False, False)] + [(False, False, False)] * 2
    cases += [(True, False, True)] + [(False, False, True)] * 3
    samples = [Sample(kept, right, {}, is_open=is_open) for kept, right, is_open in cases]
    made = fitting.summarise(samples, [s.kept for s in samples])
    assert (made["commands"], made["open_requests"]) == (6, 4)
    assert made["commands_kept"] == pytest.approx(4 / 6, abs=1e-4)
    assert made["commands_handed_on"] == pytest.approx(2 / 6, abs=1e-4)
    assert made["commands_right"] == 0.5
    assert made["open_handed_on"] == 0.75
    assert (made["on_device"], made["wrong_share"]) == (0.5, 0.4)
    assert fitting.summarise(samples[:6], [False] * 6)["open_handed_on"] is None


def test_the_whole_counts_the_cloud_s_answers_as_they_are_with_the_device_s_word():
    """Of four requests that are handed on the cloud has two right by itself, and three once it is told of the [REMOTE]."""
    cases = [(True, None), (False, True), (False, None), (True, True)]
    samples = [Sample(False, False, {}, right, True, True, handed_right=told) for right, told in cases]
    made = fitting.summarise([*samples, Sample(True, True, {}, False)], [False] * 4 + [True])
    assert (made["accuracy_cloud"], made["accuracy_routed"]) == (0.4, 0.8)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(DataError, match=r"16 of 20 .* needs 30; give about 38 rows like these"):
        calibrate(made_up(20), target=0.1, bound=False)
    with pytest.raises(ConfigError, match=r"target is 1\.5"):
        calibrate(made_up(100), target=1.5)
    with pytest.raises(ConfigError, match="signal is 'luck'"):
        calibrate(made_up(100), target=0.1, signal="luck")
    with pytest.raises(ConfigError, match=r"target is 0\.0, which no number of answers can hold"):
        calibrate(made_up(100), target=0.0)
    with pytest.raises(ConfigError, match=r"level is 1\.0"):
        calibrate(made_up(100), target=0.1, level=1.0)


# -------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A tiny adapter that says an action for every prompt: the shadow's head is made to."""
    import shadowpeft
    from chatbase import chat_tokenizer

    folder = tmp_path_factory.mktemp("route")
    base = save_base(folder / "base")
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from tiny import adapter_config, randomise

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config(**ADAPTERS["default"]))
    randomise(model)
    model.save_pretrained(folder / "adapter")
    chat_tokenizer().save_pretrained(folder / "adapter")
    shadowpeft.detach(model).save_pretrained(folder / "edge")
    chat_tokenizer().save_pretrained(folder / "edge")
    return folder


def said_by_script(monkeypatch):
    """The tiny model speaks no actions, so the answers' text is scripted; scores stay the model's own."""
    from shadowpeft.serve import scoring

    real = scoring.scored_answers

    def scripted(backend, name, prompts, **options):
        made = real(backend, name, prompts, **options)
        return [([f"[{('Sit', 'Bark')[i % 3 == 0]}()]", *pieces[1:]], s) for i, (pieces, s) in enumerate(made)]

    monkeypatch.setattr(scoring, "scored_answers", scripted)


@pytest.mark.parametrize("kind", ["adapter", "edge"])
def test_the_command_saves_beside_and_reports(adapter, monkeypatch, capsys, tmp_path, kind):
    said_by_script(monkeypatch)
    rows = [{"prompt": f"do {i}", "skill": "Bark" if i % 6 == 0 else "Sit"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = () if kind == "adapter" else ("--no-cloud",)
    fresh = tmp_path / "fresh.jsonl"
    fresh.write_text("".join(json.dumps({**r, "prompt": f"please {r['prompt']}"}) + "\n" for r in rows))
    options = ("--data", data, "--check", fresh, "--target", "0.3", "--max-new-tokens", "4", "--system", "be brief")
    code, out, err = call(monkeypatch, capsys, "route", "calibrate", adapter / kind, *options, "--json", *more)
    assert code == 0, err
    result = json.loads(out)
    saved = Calibration.load(adapter / kind / "routing.json")
    assert saved.threshold == result["threshold"]
    assert saved.report["system"] == "be brief"
    assert distance(saved.report["model"], sketch(load_edge(str(adapter / "edge"))[0])) == 0
    assert (adapter / kind / "routing.png").read_bytes().startswith(b"\x89PNG")
    # scripted: Sit for two of three, Bark for one; of those, rows 3, 9, ... are wrong
    assert result["without_confidence"]["wrong_on_device"] == sum(i % 3 == 0 and i % 6 != 0 for i in range(40))
    assert result["check"]["n"] == 40
    assert ("accuracy_cloud" in result) is (kind == "adapter")
    assert result["bound"] is True
    assert (result["commands"], result["open_requests"]) == (40, 0)
    code, out, err = call(monkeypatch, capsys, "route", "calibrate", adapter / kind, *options, *more)
    assert code == 0, err
    assert "kept on the device" in out
    assert "at level 0.95" in " ".join(out.split())
    code, out, err = call(monkeypatch, capsys, "route", "calibrate", adapter / kind, *options, *more, "--no-bound")
    assert code == 0, err
    assert "at level" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "2"), "target is 2.0"),
        (("--data", "none.jsonl"), "'none.jsonl' does not exist"),
        (("--signal", "luck"), "signal is 'luck'"),
        (("--open-share", "1"), "open-share is 1.0 but must be from 0 to below 1"),
        (("--open-share", "-0.1"), "open-share is -0.1"),
        (("--open-share", "nan"), "open-share is nan"),
        (("--target", "0.005"), "takes 598 kept answers without a wrong one, but the data has 510 commands"),
        (("--level", "95"), "level is 95.0"),
        (("--target", "0"), "target is 0.0, which no number of answers can hold"),
    ],
)
def test_wrong_use_ends_with_2(adapter, monkeypatch, capsys, arguments, message):
    code, _, err = call(
        monkeypatch, capsys, "route", "calibrate", adapter / "adapter", "--no-cloud", "--max-new-tokens", 2, *arguments
    )
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()[-1]) < 300


@pytest.mark.parametrize(
    ("commands", "arguments", "needed"),
    [(20, ("--no-bound",), 30), (20, ("--target", "0.2"), 30), (29, ("--target", "0.05"), 73), (20, ("--target", "1"), 30)],
)
def test_what_is_advised_is_enough_and_told_before_any_model_runs(
    adapter, monkeypatch, capsys, tmp_path, commands, arguments, needed
):
    from shadowpeft.apps import calibrating

    monkeypatch.setattr(calibrating, "backends", lambda *_: pytest.fail("a model was loaded"))
    rows = [{"prompt": f"do {i}", "skill": "Sit" if i < commands else "REMOTE"} for i in range(50)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, _, err = call(monkeypatch, capsys, "route", "calibrate", adapter / "adapter", "--data", data, *arguments)
    assert code == 2
    assert f"needs 30 answers with a known action but the data has {commands} commands in 50 rows" in err
    assert f"give at least {needed} commands" in err
    is_open = [False] * needed
    target = float(arguments[1]) if arguments[1:] else 1.0
    require_rows(is_open, target=target, level=0.95, signal="auto")


def calibrated(monkeypatch, capsys, folder, rows, check=None, **more):
    """Exit code, the saved report and what was told, of calibrating on ``rows``."""
    files = {"--data": rows, **({} if check is None else {"--check": check})}
    arguments = []
    for option, part in files.items():
        file = folder / f"{option[2:]}.jsonl"
        file.write_text("".join(json.dumps({"prompt": p, "skill": s}) + "\n" for p, s in part))
        arguments += [option, file]
    arguments += [x for pair in more.items() for x in pair]
    options = ("--target", "0.3", "--max-new-tokens", "4", "--no-cloud", "--signal", "logprob", "--out", folder / "out")
    code, _, err = call(monkeypatch, capsys, "route", "calibrate", folder.parent / "adapter", *options, *arguments)
    saved = folder / "out" / "routing.json"
    return code, json.loads(saved.read_text())["report"] if saved.is_file() else None, " ".join(err.split())


@pytest.fixture
def place(adapter, tmp_path):
    (tmp_path / "adapter").symlink_to(adapter / "adapter")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


ROWS = [(f"do {i}", "Bark" if i % 3 == 0 else "Sit") for i in range(40)]


def test_copies_of_a_row_are_no_evidence(place, monkeypatch, capsys):
    said_by_script(monkeypatch)
    code, _, err = calibrated(monkeypatch, capsys, place, [("do 1", "Sit")] * 100)
    assert code == 2
    assert "99 of 100 rows repeat a prompt; each prompt counts once" in err
    assert "but the data has 1 commands in 1 rows" in err
    code, once, _ = calibrated(monkeypatch, capsys, place, ROWS)
    assert code == 0
    copies = [*ROWS, (" do  7 ", "Sit"), *ROWS[:10] * 9]
    code, often, err = calibrated(monkeypatch, capsys, place, copies)
    assert code == 0
    assert "91 of 131 rows" in err
    assert (once["copies"], often["copies"]) == (0, 91)
    for key in ("n", "tested", "auroc", "commands"):
        assert often[key] == once[key]
    assert sum(once["traffic"]["reasons"].values()) == 40
    assert sum(often["traffic"]["reasons"].values()) == 131  # requests that come often come often later too


def test_rows_of_the_fit_are_left_out_of_the_check(place, monkeypatch, capsys):
    said_by_script(monkeypatch)
    code, _, err = calibrated(monkeypatch, capsys, place, ROWS, ROWS[5:])
    assert code == 2
    assert "every prompt of --check" in err
    assert "give rows that had no part in the fit" in err
    code, report, err = calibrated(monkeypatch, capsys, place, ROWS, [*ROWS[5:], ("lie", "Sit"), ("lie", "Sit"), ("up", "Sit")])
    assert code == 0
    assert "35 of 37 prompts are among those of --data and are left out of the check" in err
    assert (report["check"]["n"], report["check"]["seen_in_data"]) == (2, 35)


@pytest.mark.parametrize(
    ("commands", "open_requests", "share", "left"),
    [
        (40, 10, 0.5, (10, 10)),
        (40, 90, 0.2, (40, 10)),
        (30, 10, 0.25, (30, 10)),
        (30, 10, 0, (30, 0)),
        (200, 60, 0.001, (200, 1)),  # at least the share asked for, which is the safe side
        (100, 2, 0.6, (1, 2)),
        (100, 100, 1e-300, (100, 1)),
    ],
)
def test_rows_are_left_out_until_the_share_is_the_one_asked_for(commands, open_requests, share, left, capsys):
    kinds = [False] * commands + [True] * open_requests
    random.Random(0).shuffle(kinds)
    rows = [{"prompt": f"do {i}", "skill": "REMOTE" if kind else "Sit"} for i, kind in enumerate(kinds)]
    kept, gone = with_open_share(rows, share, "data", terminal(stderr=True))
    assert (sum(row["skill"] == "Sit" for row in kept), sum(row["skill"] == "REMOTE" for row in kept)) == left
    assert gone == len(rows) - sum(left)
    places = [[each["prompt"] for each in rows].index(row["prompt"]) for row in kept]
    assert places == sorted(places)  # in their order, so that one seed draws the same rows again
    assert kept == with_open_share(rows, share, "data", terminal(stderr=True))[0]
    said = f"{gone} of {len(rows)} rows are left out" in " ".join(capsys.readouterr().err.split())
    assert said == (gone > 0)


def test_what_is_left_for_a_share_is_a_fair_sample():
    """Each command is left in as often as any other, over many draws: no place in the file is preferred."""
    counts, rows = np.zeros(40), [{"prompt": i, "skill": "Sit"} for i in range(40)]
    for seed in range(400):
        kept, _ = with_open_share([*rows, *[{"prompt": 99, "skill": "REMOTE"}] * 10], 0.5, "data", terminal(stderr=True), seed)
        for row in kept[:10]:
            counts[row["prompt"]] += 1
    assert counts.sum() == 4000
    assert abs(counts - 100).max() < 5 * math.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("skills", "share", "message"),
    [
        ("Sit Sit", 0.5, "no requests with the skill REMOTE"),
        ("REMOTE", 0.5, "no commands"),
        ("Sit REMOTE", 0.9, "1 requests with the skill REMOTE, too few for a share of 0.9 with a command"),
    ],
)
def test_a_share_that_cannot_be_had_is_refused(skills, share, message):
    rows = [{"prompt": str(i), "skill": skill} for i, skill in enumerate(skills.split())]
    with pytest.raises(DataError, match=message):
        with_open_share(rows, share, "data", terminal(stderr=True))


def test_the_bound_is_about_the_share_asked_for(place, monkeypatch, capsys):
    said_by_script(monkeypatch)
    rows = [*ROWS, *((f"why {i}", "REMOTE") for i in range(10))]
    code, report, err = calibrated(monkeypatch, capsys, place, rows, **{"--open-share": "0"})
    assert code == 0
    assert "10 of 50 rows are left out, drawn at random, so that no action fits 0 % of the others" in err
    assert (report["n"], report["open_requests"], report["open_share"], report["left_out_for_the_share"]) == (40, 0, 0, 10)
    code, _, err = calibrated(monkeypatch, capsys, place, rows, **{"--open-share": "0.9"})
    assert code == 2
    assert "but the data has 1 commands" in err  # what is left, not what was given


def test_a_prompt_that_is_too_long_is_named_with_its_line(place, monkeypatch, capsys):
    rows = [*ROWS[:20], ("long " * 300, "Sit"), *ROWS[20:]]
    code, _, err = calibrated(monkeypatch, capsys, place, rows)
    assert code == 2
    assert "data.jsonl, line 21: the prompt has" in err
    assert "shorten it" in err


def test_rows_are_checked(tmp_path, monkeypatch, capsys, adapter):
    file = tmp_path / "rows.jsonl"
    for line, message in (
        ("{", "line 1 is not valid JSON"),
        ('{"prompt": "x"}', "must have"),
        ('{"prompt": "x", "skill": "Fly"}', "'Fly'"),
    ):
        file.write_text(line + "\n")
        code, _, err = call(monkeypatch, capsys, "route", "calibrate", adapter / "adapter", "--data", file)
        assert code == 2
        assert message in err

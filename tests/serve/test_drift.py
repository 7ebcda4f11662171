"""Live requests beside the calibration's: quiet while they are alike, loud when the mixture or the confidences have moved."""

import dataclasses
import json
import math
import re
from bisect import bisect_right
from collections import Counter

import httpx
import numpy as np
import pytest
from scipy.stats import ks_2samp
from scripts.calibration_bound import Draw, World
from test_edge_server import KEY, edge_app

from serving import CALIBRATION
from shadowpeft.errors import ConfigError
from shadowpeft.serve.calibration import calibrate
from shadowpeft.serve.drift import FEWEST, Drift
from shadowpeft.serve.router import CLOUD, DEVICE, KNOWN, TAGGED, UNKNOWN, UNSURE, Calibration, Decision
from webserver import Running, metric

AWAY = 0.35
"""Share of requests that the made-up device hands on by itself; two thirds of them by a tag."""
TAG, NOTHING = Decision(CLOUD, TAGGED, "REMOTE"), Decision(CLOUD, UNKNOWN)


def decisions(n, seed, away=AWAY, shift=0.0):
    """``n`` decisions of a device whose signal is normal, and unsure below 0."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        if rng.random() < away:
            made.append(TAG if rng.random() < 2 / 3 else NOTHING)
        else:
            value = rng.standard_normal() + shift
            made.append(Decision(DEVICE if value > 0 else CLOUD, KNOWN if value > 0 else UNSURE, "Sit", 0.5, value))
    return made


def traffic(of):
    values = [d.value for d in of if d.value is not None]
    edges = np.quantile(values, np.linspace(0.1, 0.9, 9)).tolist()
    tenths = Counter(bisect_right(edges, v) for v in values)
    return {"reasons": dict(Counter(d.reason for d in of)), "edges": edges, "known": [tenths[i] for i in range(10)]}


def after(drift, of):
    for decision in of:
        drift.add(decision)
    return drift


def ever_moved(drift, of):
    moved = False
    for i, decision in enumerate(of):
        drift.add(decision)
        moved = moved or (i % 20 == 19 and drift.moved)
    return moved


@pytest.mark.parametrize("rows", [150, 264, 1000])
def test_requests_like_the_calibrations_are_never_warned_of(rows):
    alarms = [ever_moved(Drift(traffic(decisions(rows, seed))), decisions(1500, seed + 1000)) for seed in range(20)]
    assert not any(alarms)


@pytest.mark.parametrize(
    "moved",
    [{"away": 0.65}, {"away": 0.05}, {"shift": -1.2}, {"shift": 1.2}],
    ids=["more is open", "nothing is open", "less sure", "surer"],
)
def test_a_mixture_or_confidences_that_have_moved_are_warned_of(moved):
    for seed in range(10):
        drift = Drift(traffic(decisions(264, seed)))
        assert not after(drift, decisions(500, seed + 1000)).moved
        assert after(drift, decisions(500, seed + 2000, **moved)).moved  # the window has forgotten the others
        assert "calibrate again" in drift.problem()
        assert not after(drift, decisions(500, seed + 3000)).moved


def test_the_gap_is_kolmogorovs_and_smirnovs():
    calibrated, live = decisions(264, 1), decisions(200, 2, shift=-0.5)
    made = traffic(calibrated)

    def places(of):
        return [{UNKNOWN: 0, TAGGED: 1}.get(d.reason, 2 + bisect_right(made["edges"], d.value or 0.0)) for d in of]

    assert after(Drift(made), live).gap == pytest.approx(ks_2samp(places(calibrated), places(live)).statistic)


def test_nothing_is_said_of_a_few_decisions():
    drift = after(Drift(traffic(decisions(264, 1))), [TAG] * (FEWEST - 1))
    assert math.isnan(drift.gap)
    assert drift.problem() is None
    drift.add(TAG)
    assert drift.moved
    share = 100 * sum(d.reason == TAGGED for d in decisions(264, 1)) / 264
    assert f"[REMOTE] 100 % (then {share:.0f} %)" in drift.problem()


def test_the_warning_names_what_has_moved_and_nothing_else():
    """All are unsure, then and now, by signals that are another fifth of the calibration's; or one reason alone has moved."""
    edges = [0.1, 0.2, 0.3, 0.4]
    unsure = {"reasons": {UNSURE: 100}, "edges": edges, "known": [20] * 5}
    drift = after(Drift(unsure), [Decision(CLOUD, UNSURE, "Sit", 0.5, 0.15)] * 300)
    moved = "known actions with a signal below 0.2, of all known 100 % (then 40 %)"
    assert drift.problem() == (
        f"the last 300 requests are not like the calibration's: {moved}; calibrate again on requests as they come now"
    )
    drift = after(Drift(unsure), [Decision(CLOUD, UNSURE, "Sit", 0.5, 0.9)] * 300)
    assert "known actions with a signal below 0.4, of all known 0 % (then 80 %)" in drift.problem()
    fifths = [Decision(CLOUD, UNSURE, "Sit", 0.5, value) for value in (0.05, 0.15, 0.25, 0.35, 0.45)]
    drift = after(Drift(unsure), [*[NOTHING] * 200, *fifths * 20])
    assert ": unknown answer 67 % (then 0 %)" not in drift.problem()
    assert ": low confidence 33 % (then 100 %), unknown answer 67 % (then 0 %);" in drift.problem()
    for seed in range(20):
        drift = after(Drift(traffic(decisions(264, seed))), decisions(500, seed + 2000, shift=-0.6 + 0.06 * seed))
        told = drift.problem()
        if told is not None:
            pairs = re.findall(r"(\d+) % \(then (\d+) %\)", told)
            assert pairs
            assert all(now != then for now, then in pairs)


def test_a_calibration_counts_its_requests_and_names_none(tmp_path):
    samples = Draw.of(World("informative", 0.1), 600, 0).samples()
    calibrate(samples, target=0.1).save(tmp_path / "routing.json")
    calibration = Calibration.load(tmp_path / "routing.json")
    counted = calibration.report["traffic"]
    assert sum(counted["reasons"].values()) == 600
    assert counted["reasons"][TAGGED] == sum(s.tagged for s in samples)
    assert counted["reasons"][KNOWN] == calibration.report["answered_on_device"]
    known = [s.signals[calibration.signal] for s in samples if s.kept]
    assert counted["known"] == pytest.approx([len(known) / 10] * 10, abs=1)
    drift = Drift.of(calibration)
    for sample in samples:
        value = sample.signals[calibration.signal] if sample.kept else None
        reason = TAGGED if value is None else KNOWN if calibration.keeps(value) else UNSURE
        drift.add(Decision(DEVICE, reason, value=value))
    assert drift.gap < 0.1


def test_files_from_before_are_not_compared_and_damaged_ones_refused():
    assert Drift.of(None) is None
    assert Drift.of(CALIBRATION) is None
    good = traffic(decisions(100, 1))
    damaged = [
        3,
        {},
        {**good, "more": 1},
        {**good, "known": good["known"][:-1]},
        {**good, "known": [-1, *good["known"][1:]]},
        {**good, "known": [True, *good["known"][1:]]},
        {**good, "edges": good["edges"][::-1]},
        {**good, "edges": ["a", *good["edges"][1:]]},
        {**good, "reasons": {**good["reasons"], "mood": 1}},
        {**good, "reasons": {TAGGED: 3}},
    ]
    for bad in damaged:
        with pytest.raises(ConfigError, match="'traffic' in its report that is damaged; calibrate again"):
            Drift.of(dataclasses.replace(CALIBRATION, report={"traffic": bad}))


def ask(http, word, **more):
    body = {"model": "edge", "messages": [{"role": "user", "content": word}], **more}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_the_edge_warns_in_its_metrics_and_where_its_page_looks():
    counted = {"reasons": {KNOWN: 80, TAGGED: 20}, "edges": [-1.0], "known": [0, 80]}
    calibration = dataclasses.replace(CALIBRATION, report={"traffic": json.loads(json.dumps(counted))})
    headers = {"authorization": f"Bearer {KEY}"}
    with Running(edge_app(None, calibration)) as edge, httpx.Client(base_url=edge.url, headers=headers) as http:
        for i in range(40):
            ask(http, "sit" if i % 5 else "remote")
        text = http.get("/metrics").text
        assert metric(text, "shadowpeft_calibration_moved") == 0
        assert metric(text, "shadowpeft_calibration_drift") == pytest.approx(0.0, abs=1e-9)
        assert "calibration_problem" not in http.get("/readyz").json()
        for _ in range(10):
            ask(http, "remote", route="device")  # what a client asks the device for is not the router's traffic
        assert metric(http.get("/metrics").text, "shadowpeft_calibration_drift") == pytest.approx(0.0, abs=1e-9)
        for _ in range(60):
            ask(http, "remote")
        text = http.get("/metrics").text
        assert metric(text, "shadowpeft_calibration_moved") == 1
        drift, limit = (metric(text, f"shadowpeft_calibration_{name}") for name in ("drift", "drift_limit"))
        assert drift == pytest.approx(68 / 100 - 0.2)
        assert limit < drift
        problem = http.get("/readyz").json()["calibration_problem"]
        assert "[REMOTE] 68 % (then 20 %)" in problem


def test_without_counts_there_is_no_such_metric():
    with Running(edge_app(None, CALIBRATION)) as edge, httpx.Client(base_url=edge.url) as http:
        text = http.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
    assert "shadowpeft_routed" in text
    assert "calibration" not in text

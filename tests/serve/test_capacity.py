"""The arithmetic of capacity against a simulation, and every table of docs/deployment.md against its record."""

import json
import math

import pytest
from scripts.capacity import MODELS, RECORD, memory

from pages import ROOT, marked, numbers, rows
from shadowpeft.errors import ConfigError
from shadowpeft.serve.capacity import Route, answers_per_second, cost_break_even, memory_bytes, replicas

PAGE = ROOT / "docs" / "deployment.md"
FIGURE = ROOT / "experiments" / "records" / "fig3b-latency-smollm2" / "mmlu-shadow-s0.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_answers_per_second_is_that_of_a_simulated_engine():
    rows, prefill, step, new = 5, 30.0, 12.0, 7
    clock, answers = 0.0, 0
    while answers < 1000:  # a cohort: every prompt is read, then every row makes a token a step
        clock += sum(prefill for _ in range(rows))
        for _ in range(new):
            clock += step
        answers += rows
    assert answers_per_second(rows, prefill, step, new) == pytest.approx(1000 * answers / clock)


@pytest.mark.parametrize(
    ("kept", "lost", "network", "cloud"), [(139, 139, 50, 101), (139, 20, 200, 1006), (80, 40, 60, 30)]
)
def test_break_even_is_where_both_latencies_are_equal(kept, lost, network, cloud):
    route = Route(kept, lost, network, cloud)
    share = route.break_even()
    assert 0 < share <= 1
    assert route.milliseconds(share) == pytest.approx(network + cloud)
    assert route.milliseconds(min(1.0, share + 0.01)) < network + cloud or share > 0.99
    assert route.milliseconds(share - 0.01) > network + cloud


def test_a_device_as_slow_as_the_cloud_never_pays_in_time():
    assert Route(150, 150, 50, 100).break_even() == 1.0
    assert Route(151, 151, 50, 100).break_even() == math.inf
    assert Route(500, 1, 50, 100).break_even() == math.inf


def test_cost_breaks_even_where_saved_replicas_pay_the_device():
    device, hour, per_replica = 1e-6, 2.0, 50.0
    share = cost_break_even(device, hour, per_replica)
    assert share * hour / (3600 * 0.7 * per_replica) == pytest.approx(device)
    assert cost_break_even(1.0, hour, per_replica) == math.inf


def test_replicas_are_enough_and_not_one_too_many():
    for rate, share, per_replica in ((10.0, 0.5, 3.0), (7.0, 0.0, 10.0), (1000.0, 0.8, 0.9)):
        n = replicas(rate, share, per_replica)
        assert n * per_replica * 0.7 >= rate * (1 - share) > (n - 1) * per_replica * 0.7
    with pytest.raises(ConfigError, match="per_replica is 0"):
        replicas(1.0, 0.5, 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_memory_in_the_record_is_counted_anew(name, record):
    assert memory(name) == record["memory"][name]


def test_the_formula_gives_what_the_engine_gave(record):
    for row in [*record["attached"], record["detached"]]:
        again = answers_per_second(row["rows"], row["prefill_ms"], row["step_ms"], record["new_tokens"] - 1)
        assert again == pytest.approx(row["formula_per_second"], rel=0.01)
        assert row["measured_per_second"] == pytest.approx(
            again, rel=0.15
        )  # a busy machine; 11 % at most in the record


def test_the_pages_tables_are_the_records(record):
    pace = [numbers(" ".join(row)) for row in rows(marked(PAGE, "pace"))[1:]]
    expected = [
        [
            row["rows"],
            round(row["prefill_ms"]),
            round(row["step_ms"]),
            round(row["formula_per_second"], 2),
            round(row["measured_per_second"], 2),
        ]
        for row in record["attached"]
    ]
    assert pace == expected
    sizes = {row[0]: numbers(" ".join(row[1:])) for row in rows(marked(PAGE, "memory"))[1:]}
    assert sizes.keys() == record["memory"].keys()
    for name, m in record["memory"].items():
        base, adapter = 2 * m["base_parameters"], 4 * m["adapter_parameters"]
        caches = 2 * (m["base_cache_per_token"] + m["shadow_cache_per_token"])
        one, hundred = (memory_bytes(base, n * adapter, caches, 16, 2560) for n in (1, 100))
        module_for_adapter = [m["adapter_parameters"], round(adapter / 1e6, 1), round(caches / 1e3, 1)]
        assert sizes[name] == [round(base / 1e9, 2), *module_for_adapter, round(one / 1e9, 1), round(hundred / 1e9, 1)]
    counts = {row[0]: numbers(" ".join(row[1:])) for row in rows(marked(PAGE, "replicas"))[1:]}
    measured = record["attached"][-1]["measured_per_second"]
    for devices in (10, 1000, 1_000_000):
        rate = devices * 6 / 3600
        needed = [replicas(rate, share, x) for x in (measured, 10, 100) for share in (0, 0.5, 0.8)]
        assert counts[f"{devices:,}"] == [round(rate, 2), *needed]
    assert len(counts) == 3


def test_the_table_of_pieces_is_the_records():
    text = marked(ROOT / "docs" / "serving.md", "pieces")
    pieces = json.loads((ROOT / "docs" / "records" / "prefill-pieces.json").read_text())["pieces"]
    shown = [numbers(" ".join(row)) for row in rows(text)[1:]]
    assert shown == [[p["piece"], round(p["prompt_ms"] / 1e3, 1), round(p["beside_ms"] / 1e3, 2)] for p in pieces]
    assert numbers(text)[-1] == round(pieces[0]["alone_ms"] / 1e3, 2)


def test_the_pages_break_even_shares_are_those_of_figure_3b():
    results = json.loads(FIGURE.read_text())["results"]
    device, cloud = (results[how]["milliseconds"] for how in ("detached", "attached"))
    text = marked(PAGE, "break-even")
    sentence, _, _ = text.partition("\n|")
    assert numbers(sentence) == [round(device), round(cloud), 10, 50]
    lines = {row[0]: row[1:] for row in rows(text)[1:]}
    for faster in (1, 10, 50):
        shares = [Route(device, device, network, cloud / faster).break_even() for network in (0, 50, 200, 1000)]
        shown = lines[f"{cloud / faster:.0f}"]
        assert ["never" if cell == "never" else numbers(cell) for cell in shown] == [
            "never" if share > 1 else [round(100 * share)] for share in shares
        ]
    assert len(lines) == 3


def test_the_pages_other_numbers_are_those_of_their_records(record):
    bench = json.loads((ROOT / "benchmarks" / "results.json").read_text())["decode"]
    ratios, token = bench["ratio_to_base"], bench["median_ms_per_token"]["shadow"]
    load = json.loads((ROOT / "docs" / "records" / "serve-load.json").read_text())
    one, *_, eight = (row["step_ms"] for row in record["attached"])
    assert numbers(marked(PAGE, "steps")) == [
        round(eight / one, 1),
        round(ratios["shadow"], 2),
        round(ratios["lora"], 2),
        round(token),
        load["requests"],
        int(load["seconds"]),
    ]

"""The committed pages on starts say what the committed records say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_starts_and_losses():
    made = benchmark("starts")
    page = made.page(json.loads(made.RECORD.read_text(encoding="utf-8")))
    assert (ROOT / "docs" / "starts.md").read_text(encoding="utf-8") == page
    assert page.count("| ce |") >= 4


def test_starts_of_the_robots_shadow():
    made = benchmark("starts_robot")
    page, record = made.PAGE.read_text(encoding="utf-8"), json.loads(made.RECORD.read_text(encoding="utf-8"))
    assert made.filled(page, record) == page
    assert {"random", "base_layers"} <= record["starts"].keys()
    assert "| random | 0.005 |" in page

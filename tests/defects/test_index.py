"""Every defect has a named test of ours and a measured row of the comparison; docs/defects.md lists exactly those."""

import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
NUMBERS = list(range(1, 27))


def listed():
    """The row of each defect in the page."""
    page = (DOCS / "defects.md").read_text(encoding="utf-8")
    return {int(number): row for number, row in re.findall(r"^\| (\d+) \|(.*)$", page, re.M)}


def test_every_defect_has_a_named_test_and_the_page_lists_them():
    tests = {}
    for file in HERE.glob("test_*.py"):
        for name, number in re.findall(r"^def (test_defect_(\d\d)_\w+)", file.read_text(encoding="utf-8"), re.M):
            tests.setdefault(int(number), set()).add(name)
    assert sorted(tests) == NUMBERS
    assert {number: set(re.findall(r"`(test_defect_\w+)`", row)) for number, row in listed().items()} == tests


def test_every_defect_is_measured_in_the_comparison_and_the_page_names_the_rows():
    pytest.importorskip("shadow_peft")
    from benchmarks.comparison.modes import MODES
    from benchmarks.comparison.page import RECORD, ROWS

    rows = {number: set() for number in NUMBERS}
    for key, row in {**ROWS, **MODES}.items():
        for number in row.defects:
            rows[number].add(key)
    assert all(rows.values())
    named = {number: set(re.findall(r"`(\w+)`", row.split("|")[-2])) for number, row in listed().items()}
    assert named == rows
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert {**ROWS}.keys() == record["facts"].keys()
    assert MODES.keys() == record["modes"].keys()
    for keys in rows.values():  # and ours has none of them
        for key in keys:
            ours = (record["facts"].get(key) or record["modes"][key])["ours"]
            assert ours["value"] not in (None, False), key

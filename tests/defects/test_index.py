"""Every defect has a named test of ours and a measured row of the comparison; docs/defects.md lists exactly those."""

import json
import re
from pathlib import Path

import pytest

from pages import facts, marked

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


@pytest.fixture(scope="module")
def comparison():
    """The rows of the comparison, and its record."""
    pytest.importorskip("shadow_peft")
    from benchmarks.comparison import modes, page

    return {**page.ROWS, **modes.MODES}, json.loads(page.RECORD.read_text(encoding="utf-8")), page


def test_every_defect_is_measured_in_the_comparison_and_the_page_names_the_rows(comparison):
    rows, record, _ = comparison
    outcomes = {**record["facts"], **record["modes"]}
    assert outcomes.keys() == rows.keys()
    measured = {number: {key for key, row in rows.items() if number in row.defects} for number in NUMBERS}
    assert all(measured.values())
    assert {number: set(re.findall(r"`(\w+)`", row.split("|")[-2])) for number, row in listed().items()} == measured
    for keys in measured.values():  # and ours has none of them
        assert all(outcomes[key]["ours"]["value"] not in (None, False) for key in keys)


def test_the_committed_comparison_holds_what_the_committed_record_says(comparison):
    _, record, page = comparison
    assert facts((DOCS / "comparison.md").read_text(encoding="utf-8")) == facts(page.page(record))
    block = page.short_table(record, page.IN_SHORT)
    assert facts(marked(page.COMPARED, "compare").split("\n\n")[1]) == facts("\n".join(block))

"""Every defect has a named test, and docs/defects.md lists exactly those."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "defects.md"


def test_every_defect_has_a_named_test_and_the_page_lists_them():
    tests = {}
    for file in HERE.glob("test_*.py"):
        for name, number in re.findall(r"^def (test_defect_(\d\d)_\w+)", file.read_text(encoding="utf-8"), re.M):
            tests.setdefault(int(number), set()).add(name)
    assert sorted(tests) == list(range(1, 27))
    listed = {
        int(number): set(re.findall(r"`(test_defect_\w+)`", row))
        for number, row in re.findall(r"^\| (\d+) \|(.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    }
    assert listed == tests

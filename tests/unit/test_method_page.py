"""docs/method.md quotes the method from tests/naive.py: all of it, in order, to the letter."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_pages_code_is_the_oracles():
    source = (ROOT / "tests" / "naive.py").read_text(encoding="utf-8")
    method = re.split(r"^# -{20,}.*$", source, flags=re.M)[1]
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    assert len(quoted) > 5
    assert "\n\n".join(quoted).strip() == method.strip()

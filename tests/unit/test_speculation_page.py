"""The table of docs/speculation.md and README's sentence on drafts hold the numbers of the committed record."""

import json

from pages import ROOT, facts, marked, script


def test_the_tables_numbers_are_those_of_the_record():
    bench = script("benchmarks/speculation.py")
    record = json.loads(bench.RECORD.read_text(encoding="utf-8"))
    block = marked(ROOT / "docs" / "speculation.md", "speculation")
    assert facts(block) == facts(bench.block(record)), "run `python benchmarks/speculation.py` and commit docs/speculation.md"
    commands = record["texts"]["commands"]["ways"]
    assert commands["gate"]["drafts"]["tokens"] == commands["fixed-3"]["drafts"]["tokens"], "every way makes the same tokens"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{commands['gate']['of_base']:.2f} of the bare base's" in readme

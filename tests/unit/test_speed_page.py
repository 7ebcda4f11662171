"""README's block on speed says what the committed record says."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_block_is_that_of_the_record():
    spec = importlib.util.spec_from_file_location("run", ROOT / "benchmarks" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    assert run.filled(page, record) == page, "run `python benchmarks/run.py --readme` and commit README.md"
    decode = record["decode"]["ratio_to_base"]
    assert f"| 1.00 | {decode['shadow']:.2f} |" in page
    assert {"dora", "dora_cached"} <= decode.keys()

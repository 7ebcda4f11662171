"""The block on speed of docs/compared.md holds the numbers of the committed record."""

import copy
import json

from pages import ROOT, facts, marked, numbers, rows, script

RECORD = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))


def test_the_blocks_numbers_are_those_of_the_record():
    page = script("benchmarks/speed_page.py")
    block = marked(ROOT / "docs" / "compared.md", "speed")
    assert facts(block) == facts(page.block(RECORD)), "run `python benchmarks/run.py --page` and commit docs/compared.md"
    names = list(page.NAMES)
    lines = [numbers(" ".join(row[1:])) for row in rows(block)[1:]]
    for part, line in zip(page.PARTS, lines, strict=False):
        ratios = RECORD[part].get("ratio_to_base") or RECORD[part]["ratio_to_lora"]
        assert line == [round(ratios[name], 2) for name in names if name in ratios], part
    memory = RECORD["train_memory_mib"]
    assert lines[5] == [memory[name]["above_model_mib"] for name in names if name in memory]
    assert {"dora", "dora_cached", "authors", "lora_merged"} <= RECORD["decode"]["ratio_to_base"].keys()
    drafts = json.loads((ROOT / "docs" / "records" / "speculation.json").read_text(encoding="utf-8"))["texts"]
    for text, found in drafts.items():
        assert f"{text} {found['ways']['gate']['of_base']:.2f} of the bare base's" in " ".join(block.split())


def test_a_ratio_that_grows_is_named():
    page = script("benchmarks/speed_page.py")
    assert page.slower(RECORD, RECORD) == []
    now = copy.deepcopy(RECORD)
    now["decode"]["ratio_to_base"]["shadow"] += 0.06
    now["train_step"]["ratio_to_lora"]["shadow"] += 0.04
    now["prefill_256"]["ratio_to_base"]["lora"] += 1.0
    (line,) = page.slower(RECORD, now)
    assert line.startswith("decode, time per token: ")

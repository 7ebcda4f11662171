"""The block on speed of docs/compared.md holds the numbers of the committed record."""

import json

from pages import ROOT, facts, marked, numbers, rows, script


def test_the_blocks_numbers_are_those_of_the_record():
    run = script("benchmarks/run.py")
    block = marked(ROOT / "docs" / "compared.md", "speed")
    record = json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    assert facts(block) == facts(run.block(record)), "run `python benchmarks/run.py --readme` and commit docs/compared.md"
    names = ("base", "shadow", "peft_shadow", "lora", "dora", "dora_cached")
    lines = [numbers(" ".join(row[1:])) for row in rows(block)[1:]]
    parts = ("decode", "prefill_256", "train_step", "train_step_prompt_masked")
    for part, line in zip(parts, lines[:4], strict=True):
        ratios = record[part].get("ratio_to_base") or record[part]["ratio_to_lora"]
        assert line == [round(ratios[name], 2) for name in names if name in ratios], part
    memory = record["train_memory_mib"]
    assert lines[4] == [memory[name]["above_model_mib"] for name in names if name in memory]
    assert {"dora", "dora_cached"} <= record["decode"]["ratio_to_base"].keys()

"""A training step of both paths where what all rows begin with runs once, beside one that runs whole rows.

``python benchmarks/beginning.py [--rounds 3]`` writes docs/records/beginning.json: SmolLM2-135M, the demo's adapter, batches of
16 rows of the robot set, one thread, processor time, the two ways in turns; two minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.measuring import alternate, processor, releases, stamp
from peft import get_peft_model
from transformers import TrainingArguments

from shadowpeft import ShadowPeftConfig, ShadowTrainer
from shadowpeft.core import count_targets
from shadowpeft.data import chat
from shadowpeft.data.robot import SYSTEM
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.forward import beginning
from shadowpeft.runtime import prepare_cpu
from shadowpeft.storage import write_json
from shadowpeft.tokenizer import load_tokenizer
from shadowpeft.train.rows import robot_rows

RECORD = Path(__file__).resolve().parents[1] / "docs" / "records" / "beginning.json"
PLACES = (0.15, 0.4, 0.65, 0.9)
"""Of the batches, in the rows by length."""


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    prepare_cpu(1)
    tokenizer: Any = load_tokenizer("smollm2-135m")
    encoded = chat.encode(robot_rows("train", actions=True), tokenizer, max_length=128, system=SYSTEM)
    sequences = sorted((s for s in encoded if s.base), key=lambda s: len(s.ids))
    config = ShadowPeftConfig.preset("device", task_type="CAUSAL_LM", refined_layers=[20, 29])
    model = get_peft_model(load_base("smollm2-135m"), config).train()
    rows, collate = chat.ChatDataset(sequences), chat.ChatCollator(tokenizer.pad_token_id)
    starts = [int(place * len(sequences)) for place in PLACES]
    batches = [collate([rows[n] for n in range(start, start + 16)]) for start in starts]
    usual = beginning.WORTH_SHARING
    with tempfile.TemporaryDirectory() as folder:
        trainer = ShadowTrainer(model=model, args=TrainingArguments(output_dir=folder, use_cpu=True, report_to=[]))

        def steps(worth: int) -> float:
            beginning.WORTH_SHARING = worth
            began = time.process_time()
            for batch in batches:
                trainer._shadow_num_items = count_targets(batch["shadow_labels"], shifted=True)
                inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels", "shadow_labels")}
                items = count_targets(batch["labels"], shifted=True)
                trainer.compute_loss(model, inputs, num_items_in_batch=items).backward()
                model.zero_grad()
            return (time.process_time() - began) / len(batches)

        times = alternate({"once": lambda: steps(usual), "whole": lambda: steps(1 << 30)}, rounds)
    found = {
        "processor_seconds_a_step": {name: round(statistics.median(own), 3) for name, own in times.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(times["once"], times["whole"], strict=True)), 3),
        "shapes": [list(batch["input_ids"].shape) for batch in batches],
        "rounds": rounds,
        "threads": 1,
        "processor": processor(),
        "releases": releases("torch", "transformers", "peft"),
        **stamp(),
    }
    write_json(RECORD, found)
    print(found)


if __name__ == "__main__":
    main()

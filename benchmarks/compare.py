"""What three public implementations of the method do, measured: this package, PEFT's ``Shadow``, the authors' ``shadow-peft``.

    python benchmarks/compare.py [--architectures 40|all] [--page]

Every row is a function that runs one implementation on a tiny random model in a forked process with a time limit; a row
says yes, no with the first line of the error, or a number. Nothing is asserted: a later release of a peer that is better shows
as better. Speed and memory are those of benchmarks/results.json (``make bench``). Writes docs/records/compare.json and
docs/comparison.md; with ``--page`` also the block of docs/compared.md between ``<!-- compare -->`` and ``<!-- /compare -->``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from experiments.measuring import releases, stamp
from transformers import logging

from benchmarks.comparison.forked import architectures, measure
from benchmarks.comparison.modes import MODES
from benchmarks.comparison.page import COMPARED, PAGE, RECORD, ROWS, compared, page, short_table
from shadowpeft.errors import ConfigError
from shadowpeft.storage import write_text


def whole(limit: str) -> dict[str, Any]:
    """A record of every row and of ``limit`` architectures."""
    began = time.perf_counter()
    record = {
        **stamp(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": releases("torch", "transformers", "peft", "shadow-peft", "trl"),
        "facts": measure(ROWS),
        "modes": measure(MODES),
    }
    if limit != "0":
        record["architectures"] = architectures(None if limit == "all" else int(limit))
    return {**record, "seconds": round(time.perf_counter() - began)}


def updated(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the rows that it lacks, which are named with their own date and commit under ``later``.

    Raises:
        ConfigError: if it was made with other versions, since its rows are shown side by side.
    """
    now = releases(*record["versions"])
    if now != record["versions"]:
        raise ConfigError(f"the record was made with {record['versions']}, now there is {now}; measure all rows anew")
    later = {**stamp(), "rows": []}
    for part, rows in (("facts", ROWS), ("modes", MODES)):
        lacking = {key: row for key, row in rows.items() if key not in record[part]}
        record[part].update(measure(lacking))
        later["rows"] += lacking
    return {**record, "later": [*record.get("later", []), later]}


def main() -> None:
    """Measure, record, render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="40", help="all, 0, or how many, evenly from the list")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--update", action="store_true", help="measure only the rows that the record lacks")
    parser.add_argument("--render", action="store_true", help="only render what is recorded")
    arguments = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if arguments.render or arguments.update else {}
    if not arguments.render:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        record = updated(record) if arguments.update else whole(arguments.architectures)
        write_text(RECORD, json.dumps(record, indent=1) + "\n")
    write_text(PAGE, page(record))
    if arguments.page:
        write_text(COMPARED, compared(record, COMPARED.read_text(encoding="utf-8")))
    print("\n".join(short_table(record)))


if __name__ == "__main__":
    main()

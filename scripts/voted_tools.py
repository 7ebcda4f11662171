"""What the vote of its own shadow changes in a cloud's calls: a record and a table from what ``shadowpeft eval`` has said.

    shadowpeft eval ADAPTER --data robot_tools --skills robot_tools --mode attached --vote --json > test-voted.json
    python -m scripts.voted_tools --out record.json validation:validation-voted.json test:test-voted.json ...

Each file is of one split, with the mode ``detached``, or ``attached`` with or without ``--vote``. Answers are held to valid
calls.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from experiments.markdown import percent, table
from experiments.measuring import processor

from shadowpeft.data import robot_tools
from shadowpeft.evaluate import wilson
from shadowpeft.storage import write_json

TITLES = {"detached": "shadow alone", "attached": "cloud", "voted": "cloud with its shadow's vote"}
PARTS = ("calls", "no_call")
RUN = "shadowpeft train examples/robot-tools.yaml training.shadow_epochs=4"
"""What trained the adapter."""


def read(split: str, file: str) -> tuple[str, dict[str, Any]]:
    """The name of a way to answer, and its shares with their 95 % intervals."""
    said = json.loads(Path(file).read_text(encoding="utf-8"))
    ((mode, record),) = said["modes"].items()
    voted = record["settings"].get("vote", False)
    scores = record["scores"] if voted else record["constrained"]["scores"]
    called = sum(bool(row["calls"]) for row in robot_tools.load(split))
    found: dict[str, Any] = {"commit": record["commit"], "invalid": scores["invalid"], "names": scores["names"]}
    for part, n in (("calls", called), ("no_call", said["rows"] - called)):
        low, high = wilson(round(scores[part] * n), n)
        found[part] = {"score": scores[part], "interval": [round(low, 4), round(high, 4)], "n": n}
    return "voted" if voted else mode, found


def shown(record: dict[str, Any]) -> str:
    """Markdown: a row for each way to answer and split."""
    splits: dict[str, dict[str, Any]] = record["splits"]
    rows = []
    for split, ways in splits.items():
        sizes = " and ".join(str(next(iter(ways.values()))[part]["n"]) for part in PARTS)
        for name, title in TITLES.items():
            rows.append([title, f"{split}, {sizes}", *(percent(ways[name][part], interval=True) for part in PARTS)])
    header = ["%, [95 % interval]", "rows", "requests that call: exactly right", "others: no call made"]
    return "\n".join(table(header, rows))


def main() -> None:
    """Read, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m scripts.voted_tools", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="SPLIT:FILE")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    splits: dict[str, dict[str, Any]] = {}
    for each in given.files:
        split, _, file = each.partition(":")
        name, found = read(split, file)
        splits.setdefault(split, {})[name] = found
    about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "processor": processor()}
    write_json(given.out, {"set": "robot_tools", "run": RUN, "splits": splits, **about})


if __name__ == "__main__":
    main()

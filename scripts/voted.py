"""What the vote of its own shadow changes in a cloud's answers, on rows of the robot set; writes a record.

    python -m scripts.voted demo-output/run/adapter --out record.json [--test]

Without --test validation and calibration rows are read, which may choose; with it the test rows, which may not.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from experiments.measuring import processor

import shadowpeft
from shadowpeft.apps.common import load_tokenizer_of, quiet_libraries
from shadowpeft.data import robot
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE
from shadowpeft.evaluate.record import commit
from shadowpeft.evaluate.scores import accuracy
from shadowpeft.generate import answer
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import write_json
from shadowpeft.vote import votes

HELD_OUT = ("validation_normal", "calibration_normal", "validation_remote", "calibration_remote")
TEST = ("test_normal", "test_remote_large")


def asked(rows: list[dict[str, str]], model: Any, tokenizer: Any, trie: ActionTrie) -> dict[str, list[str | None]]:
    """The action of each row: of the shadow by itself, of the cloud by itself, of the cloud with its shadow's vote."""
    prompts = [row["prompt"] for row in rows]
    options: dict[str, Any] = {"system": robot.SYSTEM, "max_new_tokens": trie.longest + 1, "batch_size": 32}
    told = votes(model, tokenizer, prompts, trie, system=robot.SYSTEM)
    found: dict[str, list[str | None]] = {"shadow": [max(vote.chances, key=vote.chances.__getitem__) for vote in told]}
    for name, actions in (("cloud", None), ("voted", told)):
        found[name] = [robot.parse_action(a.text) for a in answer(model, tokenizer, prompts, actions=actions, **options)]
    return found


def main() -> None:
    """Ask about every row."""
    parser = argparse.ArgumentParser(prog="python -m scripts.voted", description=__doc__.splitlines()[0])
    parser.add_argument("adapter")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--test", action="store_true")
    given = parser.parse_args()
    quiet_libraries()
    prepare_cpu(1)
    tokenizer = load_tokenizer_of(given.adapter, None)
    model = shadowpeft.load(given.adapter).eval()
    trie = ActionTrie.of(tokenizer, robot.SKILLS)
    splits = TEST if given.test else HELD_OUT
    rows = [row for split in splits for row in robot.load(split)]
    found = asked(rows, model, tokenizer, trie)
    shares = {}
    for name, actions in found.items():
        pairs = list(zip(rows, actions, strict=True))
        shares[name] = {
            "commands_right": accuracy([action == row["skill"] for row, action in pairs if row["skill"] != REMOTE]),
            "open_without_action": accuracy([a in (None, REMOTE) for row, a in pairs if row["skill"] == REMOTE]),
        }
    about = {"processor": processor(), "machine": environment(), "commit": commit()}
    write_json(given.out, {"splits": splits, **shares, "date": time.strftime("%Y-%m-%d", time.gmtime()), **about})


if __name__ == "__main__":
    main()

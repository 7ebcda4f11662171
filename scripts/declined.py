"""What a device's ``[REMOTE]`` changes in the cloud's answers, on held-out rows of the robot set; writes a record.

    python -m scripts.declined demo-output/run/adapter demo-output/edge --out record.json

No test row is read. The device is asked alone and with the second opinion of its calibration; the cloud's first token says
whether it acts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from experiments.measuring import processor
from transformers import AutoModelForCausalLM

import shadowpeft
from shadowpeft.apps.common import load_tokenizer_of, quiet_libraries
from shadowpeft.constrained import choose
from shadowpeft.data import robot
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.chat import prompt_ids, with_system
from shadowpeft.data.declined import Beginnings
from shadowpeft.evaluate.record import commit
from shadowpeft.generate import messages_of
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.serve.loading import opinion_of
from shadowpeft.serve.router import FILE, Calibration
from shadowpeft.storage import write_json

SPLITS = ("validation_normal", "validation_remote", "calibration_normal", "calibration_remote")


@torch.inference_mode()
def first_logits(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """Logits ``(V,)`` of the first token of the cloud's answer."""
    ids = prompt_ids(tokenizer, with_system(messages_of(prompt), robot.SYSTEM))
    return model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].double()  # type: ignore[no-any-return]


def counted(rows: list[dict[str, str]], model: Any, edge: Any, tokenizer: Any, trie: ActionTrie) -> dict[str, int]:
    """How many of the rows the device declines, and on how many of those the cloud acts, by itself and with its word."""
    begin = Beginnings.of(tokenizer, model.config.vocab_size)
    chosen = choose(edge, tokenizer, [row["prompt"] for row in rows], trie, exact=False, system=robot.SYSTEM)
    found = {"rows": len(rows), "declined": 0, "acts": 0, "acts_with_the_device_s_word": 0}
    for row, device in zip(rows, chosen, strict=True):
        declined = device.action == REMOTE
        found["declined"] += declined
        if not declined and row["skill"] != REMOTE:
            continue  # a command that the device does not decline: nothing changes
        logits = first_logits(model, tokenizer, row["prompt"])
        told = logits + begin.leaning(device.probability) if declined else logits
        found["acts"] += int(logits.argmax()) in begin.tokens
        found["acts_with_the_device_s_word"] += int(told.argmax()) in begin.tokens
    return found


def main() -> None:
    """Ask about every held-out row that chooses or calibrates."""
    parser = argparse.ArgumentParser(prog="python -m scripts.declined", description=__doc__.splitlines()[0])
    parser.add_argument("adapter")
    parser.add_argument("edge", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    quiet_libraries()
    prepare_cpu(1)
    tokenizer = load_tokenizer_of(given.adapter, None)
    model = shadowpeft.load(given.adapter).eval()
    edge = AutoModelForCausalLM.from_pretrained(given.edge).eval()
    calibration = Calibration.load(given.edge / FILE)
    opinion = opinion_of(calibration, given.edge / FILE)
    tries = {"device": ActionTrie.of(tokenizer, robot.SKILLS)}
    if opinion is not None:
        tries["second"] = ActionTrie.of(tokenizer, robot.SKILLS, opinion)
    found = {
        split: {name: counted(robot.load(split), model, edge, tokenizer, trie) for name, trie in tries.items()}
        for split in SPLITS
    }
    about = {"processor": processor(), "machine": environment(), "commit": commit()}
    write_json(given.out, {"splits": found, **about})


if __name__ == "__main__":
    main()

"""Whether two machines give the same answers with the same files, such as x86-64 and arm64.

    python -m scripts.same_answers ask EDGE ADAPTER here.json           on each machine
    python -m scripts.same_answers compare here.json there.json         writes docs/records/arm64.json

A device chooses for some validation requests, and the attached model gives the logits of three and the texts of two.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shadowpeft
from shadowpeft.constrained import choose
from shadowpeft.data import robot
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.chat import prompt_ids, with_system
from shadowpeft.generate import answer, messages_of

RECORD = Path(__file__).resolve().parents[1] / "docs" / "records" / "arm64.json"


@torch.inference_mode()
def ask(edge: str, adapter: str) -> dict[str, Any]:
    """What both halves say here, on one thread."""
    torch.set_num_threads(1)
    tokenizer, device = AutoTokenizer.from_pretrained(edge), AutoModelForCausalLM.from_pretrained(edge).eval()
    rows = robot.load("validation_normal")[:10] + robot.load("validation_remote")[:4]
    prompts = [row["prompt"] for row in rows]
    chosen = choose(device, tokenizer, prompts, ActionTrie.of(tokenizer, robot.SKILLS), system=robot.SYSTEM)
    model = shadowpeft.load(adapter).eval()
    ids = [prompt_ids(tokenizer, with_system(messages_of(prompt), robot.SYSTEM)) for prompt in prompts[:3]]
    return {
        "machine": platform.machine(),
        "torch": torch.__version__,
        "chosen": [[each.action, each.probabilities] for each in chosen],
        "attached": [model(input_ids=torch.tensor([row]), logits_to_keep=1).logits[0, -1].tolist() for row in ids],
        "texts": [a.text for a in answer(model, tokenizer, prompts[:2], system=robot.SYSTEM, max_new_tokens=10)],
    }


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far apart the answers are."""
    chosen = list(zip(one["chosen"], other["chosen"], strict=True))
    logits = [[torch.tensor(row) for row in each["attached"]] for each in (one, other)]
    return {
        "machines": [{key: each[key] for key in ("machine", "torch")} for each in (one, other)],
        "requests": len(chosen),
        "same_action": sum(a[0] == b[0] for a, b in chosen),
        "largest_difference_of_a_probability": max(abs(a[1][name] - b[1][name]) for a, b in chosen for name in a[1]),
        "largest_relative_difference_of_logits": max(
            float((a - b).abs().max() / a.abs().max()) for a, b in zip(*logits, strict=True)
        ),
        "same_texts": one["texts"] == other["texts"],
    }


def main() -> None:
    """Ask, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["ask", "compare"])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    if given.what == "ask":
        edge, adapter, out = given.paths
        Path(out).write_text(json.dumps(ask(edge, adapter)), encoding="utf-8")
        return
    found = compare(*(json.loads(Path(file).read_text(encoding="utf-8")) for file in given.paths))
    RECORD.write_text(json.dumps({**found, "note": given.note}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

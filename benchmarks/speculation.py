"""Free drafts beside ordinary decoding: tokens per second of the bare base, the attached model, and the same drafting.

    python benchmarks/speculation.py ADAPTER [--run run.yaml] [--rows 16] [--rounds 3] [--threads 1]

ADAPTER: a shadow trained on the robot set whose shadow path learns whole answers (``data.shadow_answers: whole``); RUN: the run
file that made it, kept in the record. Greedy, one prompt at a time: commands and open-domain requests of the validation set.
Every way makes the same number of tokens for a prompt; the ways take turns, and each ratio is of the times of one turn, summed
over prompts: once of whole answers, and once of what comes after the first token, which reading the prompt brings. Writes
docs/records/speculation.json, and from it the table of docs/speculation.md and a figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
import torch
import yaml
from experiments.markdown import table
from experiments.measuring import alternate, processor, releases, seconds, short, stamp
from transformers import DynamicCache

import shadowpeft
from shadowpeft.data import robot
from shadowpeft.data.chat import stop_tokens, with_system
from shadowpeft.generate import encode_prompts, messages_of
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.forward.drafting import DraftHead
from shadowpeft.hf.forward.speculation import Speculation, draft_cost
from shadowpeft.ops.thin import thin_products
from shadowpeft.runtime import prepare_cpu
from shadowpeft.storage import between, write_json, write_text
from shadowpeft.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECORD, FIGURE = ROOT / "docs" / "records" / "speculation.json", ROOT / "docs" / "speculation.png"
PAGE, MARKS = ROOT / "docs" / "speculation.md", ("<!-- speculation -->", "<!-- /speculation -->")
TEXTS = {"commands": "validation_normal", "open requests": "validation_remote"}
WAYS = {
    "base": "bare base",
    "attached": "attached",
    "gate": "attached, drafting while it pays",
    "fixed-3": "three drafts in every round",
    "fixed-7": "seven",
    "gate-all": "while it pays, from the whole vocabulary",
}
LONGEST = 40


def settings_of(way: str) -> Speculation | None:
    """How a way drafts."""
    if way.startswith("fixed-"):
        return Speculation(max_draft=int(way[6:]), adaptive=False)
    return {"gate": Speculation(), "gate-all": Speculation(tokens="all")}.get(way)


class Bench:
    """The models, and the prompts of one text with the number of tokens that each answer has."""

    def __init__(self, adapter: str, split: str, rows: int) -> None:
        self.bare, self.model = load_base("smollm2-135m").eval(), shadowpeft.load(adapter).eval()
        self.tokenizer: Any = load_tokenizer("smollm2-135m")
        self.ends = stop_tokens(self.model, self.tokenizer)
        drawn = robot.load(split)
        prompts = [row["prompt"] for row in drawn[:: max(len(drawn) // rows, 1)]][:rows]
        chats = [with_system(messages_of(prompt), robot.SYSTEM) for prompt in prompts]
        self.inputs = [encode_prompts(self.tokenizer, [chat], "cpu") for chat in chats]
        self.answers = [self.generate(self.model, inputs, LONGEST, eos_token_id=self.ends) for inputs in self.inputs]

    def generate(self, model: Any, inputs: dict[str, Any], tokens: int, **options: Any) -> torch.Tensor:
        """New tokens of one prompt."""
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            **{"eos_token_id": None, **options},
        )
        return out[0, inputs["input_ids"].shape[1] :]

    def turn(self, way: str) -> tuple[float, float, Speculation | None]:
        """Seconds for all answers, for their first tokens alone, and what was drafted; the tokens must be the model's."""
        settings, spent, first = settings_of(way), 0.0, 0.0
        for inputs, answer in zip(self.inputs, self.answers, strict=True):
            options = {} if settings is None else {"speculative": settings}
            found: list[torch.Tensor] = []
            model = self.bare if way == "base" else self.model
            spent += seconds(lambda: found.append(self.generate(model, inputs, len(answer), **options)))  # noqa: B023
            first += seconds(lambda: self.generate(model, inputs, 1))  # noqa: B023
            if way != "base" and not torch.equal(found[0], answer):
                raise AssertionError(
                    f"'{way}' says {found[0].tolist()} where the attached model says {answer.tolist()}"
                )
        return spent, first, settings


@torch.inference_mode()
def passes(model: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of an attached pass over 1 to 8 tokens after 120, torch's products and thin ones taking turns; medians."""
    ids = torch.randint(0, 1000, (1, 120), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run(count: int, *, thin: bool) -> float:
        with thin_products(model) if thin else nullcontext():
            spent = seconds(
                lambda: model(input_ids=ids[:, :count], past_key_values=cache, use_cache=True, logits_to_keep=count)
            )
        cache.crop(-count)
        return spent

    runs = {
        (kind, count): partial(run, count, thin=kind == "thin") for count in range(1, 9) for kind in ("torch", "thin")
    }
    times = alternate(runs, 5 * rounds)  # type: ignore[arg-type]
    return {
        kind: {str(count): round(1000 * statistics.median(times[kind, count]), 1) for count in range(1, 9)}  # type: ignore[index]
        for kind in ("torch", "thin")
    }


@torch.inference_mode()
def measure(adapter: str, run: str | None, rows: int, rounds: int, threads: int) -> dict[str, Any]:
    """Medians over rounds of each way's tokens per second, divided by the bare base's of the same round."""
    prepare_cpu(threads)
    texts = {}
    for name, split in TEXTS.items():
        bench = Bench(adapter, split, rows)
        tokens = sum(map(len, bench.answers))
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        later: dict[str, list[float]] = {way: [] for way in WAYS}
        drafted: dict[str, Any] = {}
        for number in range(rounds + 1):
            for way in WAYS:
                own, first, settings = bench.turn(way)
                if number:  # the first round warms up
                    spent[way].append(own)
                    later[way].append(own - first)
                    drafted[way] = None if settings is None else settings.counts.summary()
            print(f"{name}: round {number} of {rounds}", file=sys.stderr, flush=True)
        ratios, ratios_later = (
            {way: [base / own for base, own in zip(times["base"], times[way], strict=True)] for way in WAYS}
            for times in (spent, later)
        )
        texts[name] = {
            "prompts": len(bench.answers),
            "tokens": tokens,
            "ways": {
                way: {
                    "tokens_per_second": round(tokens / statistics.median(spent[way]), 2),
                    "of_base": round(statistics.median(ratios[way]), 3),
                    "range": [round(min(ratios[way]), 3), round(max(ratios[way]), 3)],
                    "of_base_after_the_first": round(statistics.median(ratios_later[way]), 3),
                    "range_after_the_first": [round(min(ratios_later[way]), 3), round(max(ratios_later[way]), 3)],
                    "drafts": drafted[way],
                }
                for way in WAYS
            },
        }
    model = bench.model.get_base_model()
    return {
        "texts": texts,
        "draft_cost": {"recorded tokens": round(draft_cost(model, DraftHead()), 4)}
        | {"whole vocabulary": round(draft_cost(model, DraftHead("all")), 4)},
        "pass_ms": passes(model, rounds),
        "draft_tokens": len(bench.model.peft_config["default"].draft_tokens or ()),
        "shadow_layers": bench.model.peft_config["default"].shadow_num_hidden_layers,
        "run": None if run is None else yaml.safe_load(Path(run).read_text(encoding="utf-8")),
        "rounds": rounds,
        "threads": threads,
        "processor": processor(),
        "releases": releases("torch", "transformers", "peft"),
        **stamp(),
    }


def block(record: dict[str, Any]) -> str:
    """The table of the page."""
    rows = []
    for way, label in WAYS.items():
        row = [label]
        for text in record["texts"].values():
            own = text["ways"][way]
            drafts = own["drafts"]
            gained = "" if drafts is None else f"{drafts['tokens_per_pass']:.2f} ({drafts['acceptance']:.0%})"
            row += [f"{own['tokens_per_second']:.1f}", f"{own['of_base']:.2f}", f"{own['of_base_after_the_first']:.2f}", gained]
        rows.append(row)
    columns = ("tokens/s", "of the base", "of the base, after the first token", "tokens a pass (stayed)")
    heads = [f"{name}, {what}" for name in record["texts"] for what in columns]
    counts = list(record["pass_ms"]["torch"])
    lines = {"torch": "torch's products", "thin": "thin products up to four rows"}
    costs = table(
        ["an attached pass over so many tokens, ms", *counts],
        [[label, *(f"{record['pass_ms'][kind][n]:.0f}" for n in counts)] for kind, label in lines.items()],
    )
    counted = ", ".join(f"{t['prompts']} {name} ({t['tokens']} tokens)" for name, t in record["texts"].items())
    return (
        "\n".join(table(["", *heads], rows))
        + f"\n\n{counted}; medians of {record['rounds']} rounds, {record['threads']} thread, {record['processor']}, "
        f"{record['date']}, commit {short(record['commit'])}, record [speculation.json](records/speculation.json).\n\n"
        + "\n".join(costs)
    )


def draw(record: dict[str, Any], file: Path) -> None:
    """Tokens per second by way, beside the bare base's."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ways = [way for way in WAYS if way != "base"]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    height = 0.8 / len(record["texts"])
    for number, (name, text) in enumerate(record["texts"].items()):
        values = [text["ways"][way]["of_base"] for way in ways]
        places = [place + number * height for place in range(len(ways))]
        axis.barh(places, values, height=height * 0.92, label=name)
        for place, value in zip(places, values, strict=True):
            axis.text(value + 0.02, place, f"{value:.2f}", va="center", fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks([place + 0.2 for place in range(len(ways))], [WAYS[way] for way in ways])
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second, bare base = 1")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", nargs="?", help="without it the page is written from the record")
    parser.add_argument("--run")
    for name, default in (("rows", 16), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if asked.adapter:
        record = measure(asked.adapter, asked.run, asked.rows, asked.rounds, asked.threads)
        write_json(RECORD, record)
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    draw(record, FIGURE)
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "\n".join(MARKS)
    write_text(PAGE, between(text, MARKS, block(record)) or "")
    print(block(record))


if __name__ == "__main__":
    main()

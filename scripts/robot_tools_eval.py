"""Calls of a trained adapter on the packaged robot-tools set, beside a classifier with patterns; writes a record.

    python -m scripts.robot_tools_eval runs/robot-tools/adapter --split validation --modes detached --out record.json

``detached`` is held to the tools and may hand on, as the edge does. ``attached`` may answer in words, and is held from where it
begins a call, as the cloud does with ``tool_choice: auto``; so is ``lora``, an adapter of ``scripts.robot_tools_lora``, merged.
The rival learns the rows that ``--rows`` names.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from experiments.markdown import percent, table

from shadowpeft.apps.common import load_tokenizer_of, quiet_libraries
from shadowpeft.data import robot_tools
from shadowpeft.data.call_guide import Engine
from shadowpeft.data.calls import CallParser
from shadowpeft.evaluate.calls import Patterns, judge, summary

LONGEST = 96
"""Tokens of an answer."""


def ask(backend: Any, name: str, rows: list[dict[str, Any]], actions: Any) -> tuple[list[str], float]:
    """The answers' texts, and the seconds that they took."""
    from shadowpeft.serve.scoring import scored_answers

    parser = CallParser(robot_tools.tools())
    began = time.process_time()
    answers = scored_answers(
        backend,
        name,
        [row["prompt"] for row in rows],
        system=robot_tools.SYSTEM,
        max_tokens=LONGEST,
        until=lambda pieces, _: parser("".join(pieces)) is not None,
        actions=actions,
    )
    return ["".join(pieces) for pieces, _ in answers], time.process_time() - began


def merged(adapter: str) -> Any:
    """The base with a LoRA adapter merged into it."""
    from peft import PeftConfig, PeftModel

    from shadowpeft.hf.base.load import load_base

    base = load_base(PeftConfig.from_pretrained(adapter).base_model_name_or_path)
    model: Any = PeftModel.from_pretrained(base, adapter)
    return model.merge_and_unload()


ROWS = {
    "calls": "exactly right, of {n} requests that call",
    "one": "one call",
    "two": "two calls",
    "en": "English",
    "zh": "Chinese",
    "names": "all names right",
    "arguments": "arguments right",
    "calls_handed_on": "requests that call, handed on",
    "cloud_handed_on": "{n} requests for the cloud, handed on",
}
TITLES = {"rival": "classifier and patterns", "detached": "device", "attached": "attached", "lora": "LoRA"}


def shown(record: dict[str, Any]) -> str:
    """Markdown: a row for each share, a column for each method."""
    methods = {name: record["methods"][name] for name in TITLES if name in record["methods"]}
    lines = []
    for key, title in ROWS.items():
        found = [method[key] for method in methods.values()]
        lines.append([title.format(n=found[0]["n"]), *(percent(each, interval=True) for each in found)])
    whole = record["methods"]["rival"]["calls"]["n"] + record["methods"]["rival"]["cloud_handed_on"]["n"]
    lines.append([f"invalid calls, of {whole} answers", *(str(method["invalid"]) for method in methods.values())])
    header = [f"%, [95 % interval], {record['split']} rows", *(TITLES[name] for name in methods)]
    return "\n".join(table(header, lines))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("adapter")
    arguments.add_argument("--split", default="validation")
    arguments.add_argument("--modes", nargs="+", default=["rival", "detached"])
    arguments.add_argument("--rows", nargs="+", default=["train", "train_more"], choices=["train", "train_more"])
    arguments.add_argument("--out", required=True)
    given = arguments.parse_args()
    quiet_libraries()
    import torch

    import shadowpeft
    from shadowpeft.serve.backend import Attached, Detached

    torch.set_num_threads(1)
    rows = robot_tools.load(given.split)
    right = [robot_tools.calls_of_row(row) for row in rows]
    parser = CallParser(robot_tools.tools())
    file = Path(given.out)
    record: dict[str, Any] = (
        json.loads(file.read_text()) if file.is_file() else {"set": "robot_tools", "split": given.split}
    )
    methods = record.setdefault("methods", {})
    if "rival" in given.modes:
        learnt = [row for part in given.rows for row in robot_tools.load(part)]
        found = Patterns(learnt).answers([row["prompt"] for row in rows])
        judged = [judge(calls, own) for calls, own in zip(found, right, strict=True)]
        methods["rival"] = {**summary(rows, judged), "invalid": sum(calls is None for calls in found)}
    asked = [mode for mode in given.modes if mode != "rival"]
    if asked:
        tokenizer = load_tokenizer_of(given.adapter, None)
        model: Any = None if asked == ["lora"] else shadowpeft.load(given.adapter, None)
        for mode in asked:
            alone = mode == "detached"
            backend: Any
            if mode == "lora":
                backend = Detached(merged(given.adapter), tokenizer, "lora")
            elif alone:
                backend = Detached(shadowpeft.detach(model), tokenizer, "edge")
            else:
                backend = Attached(model, tokenizer, {"default": given.adapter}, "base")
            engine = Engine(tokenizer, backend.model.config.vocab_size)
            actions = engine.calls(robot_tools.tools(), hand_on=alone, optional=not alone)
            texts, seconds = ask(backend, backend.names[0], rows, actions)
            read = [parser.found(text) for text in texts]
            # free words are no call: they answer the request themselves, as the cloud does
            invalid = sum(
                one is None and (alone or text.lstrip().startswith("["))
                for one, text in zip(read, texts, strict=True)
            )
            calls = [
                None if one is None and text.lstrip().startswith("[") else () if one is None else one.calls
                for one, text in zip(read, texts, strict=True)
            ]
            judged = [judge(own, gold) for own, gold in zip(calls, right, strict=True)]
            wrong = [
                {"prompt": row["prompt"], "said": text[:120], "calls": row["calls"]}
                for row, text, one in zip(rows, texts, judged, strict=True)
                if not one.exact
            ]
            methods[mode] = {
                **summary(rows, judged),
                "invalid": invalid,
                "processor_seconds": round(seconds, 1),
                "wrong": wrong,
            }
    for mode in given.modes:
        print(mode, json.dumps({k: v for k, v in methods[mode].items() if k != "wrong"}))
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

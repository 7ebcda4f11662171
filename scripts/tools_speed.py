"""What holding an answer to the grammar of 20 tools costs on a device, one thread: ``python -m scripts.tools_speed ADAPTER``.

Processor time, which other work on the machine stretches least. A token's time is that of one pass of the detached model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shadowpeft.apps.common import load_tokenizer_of, quiet_libraries
from shadowpeft.apps.export import Vocabulary
from shadowpeft.data import robot_tools
from shadowpeft.data.call_guide import Engine
from shadowpeft.data.calls import CallParser
from shadowpeft.data.chat import prompt_ids, with_system
from shadowpeft.evaluate.calls import judge

RECORD = Path(__file__).parents[1] / "docs" / "records" / "robot-tools-speed.json"


def main() -> None:
    """Detach, export, measure, record."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("adapter")
    arguments.add_argument("--rows", type=int, default=40)
    arguments.add_argument("--note", default="")
    given = arguments.parse_args()
    quiet_libraries()
    import torch

    import shadowpeft
    from shadowpeft import export
    from shadowpeft.runtime import environment, prepare_cpu
    from shadowpeft.serve.loading import load_edge

    prepare_cpu()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer_of(given.adapter, None)
    model = shadowpeft.detach(shadowpeft.load(given.adapter, None)).eval()
    with tempfile.TemporaryDirectory() as folder:
        small, words, _ = Vocabulary("robot_tools_large").trim(model, tokenizer)
        export.write("hf", small, words, Path(folder) / "small", "f32")
        exported = load_edge(str(Path(folder) / "small"))
    models = {"as detached": (model, tokenizer), "exported, with fewer tokens": exported}
    record = {
        "rows": given.rows,
        "layers": model.config.num_hidden_layers,
        "models": {name: measure(*each, given.rows) for name, each in models.items()},
        "note": given.note,
        "environment": environment(),
    }
    print(json.dumps(record, indent=1))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure(model: Any, tokenizer: Any, wanted: int) -> dict[str, Any]:
    """What answers to ``wanted`` validation rows cost, in processor time."""
    import torch
    from transformers import DynamicCache

    began = time.process_time()
    engine = Engine(tokenizer, model.config.vocab_size)
    made = time.process_time()
    grammar = engine.calls(robot_tools.tools(), hand_on=True)
    compiled = time.process_time()
    guiding: list[float] = []
    passes: list[float] = []
    prompts: list[float] = []
    whole: list[float] = []
    tokens: list[int] = []
    right = 0

    def timed(into: list[float], work: Any) -> Any:
        start = time.process_time()
        result = work()
        into.append(time.process_time() - start)
        return result

    rows = robot_tools.load("validation")[: wanted + 2]
    parser = CallParser(robot_tools.tools())
    for number, row in enumerate(rows):
        if number == 2:  # the first two warm up
            right = 0
            for times in (guiding, passes, prompts, whole, tokens):
                times.clear()  # type: ignore[attr-defined]
        start = time.process_time()
        chat = with_system([{"role": "user", "content": row["prompt"]}], robot_tools.SYSTEM)
        unread = prompt_ids(tokenizer, chat)
        guide, path, cache = grammar.start(), list[int](), DynamicCache(config=model.config)
        with torch.inference_mode():
            while len(path) < 96:
                forced, allowed = timed(guiding, lambda g=guide, p=path: _next(g, p))
                path += forced
                unread += forced
                if not len(allowed):
                    break
                ids = torch.tensor([unread])
                into = passes if len(path) > len(forced) else prompts
                logits = timed(into, lambda i=ids, c=cache: model(i, past_key_values=c, logits_to_keep=1).logits[0, -1])
                index = torch.as_tensor(allowed)
                unread = [timed(guiding, lambda i=index, x=logits: int(i[x[i].argmax()]))]
                path += unread
        whole.append(time.process_time() - start)
        tokens.append(len(path))
        found = parser.found(tokenizer.decode(path))
        right += judge(found and found.calls, robot_tools.calls_of_row(row)).exact
    return {
        "parameters": model.num_parameters(),
        "right": right,
        "tokens_of_an_answer": round(statistics.mean(tokens), 2),
        "engine_seconds": round(made - began, 3),
        "grammar_seconds": round(compiled - made, 3),
        "milliseconds": {
            "guiding_a_pass": round(1000 * 2 * statistics.mean(guiding), 3),
            "a_pass": round(1000 * statistics.mean(passes), 2),
            "the_prompt": round(1000 * statistics.mean(prompts), 2),
            "a_decision_p50": round(1000 * statistics.median(whole), 1),
            "a_decision_p95": round(1000 * sorted(whole)[int(0.95 * len(whole))], 1),
        },
        "guiding_share_of_a_pass": round(2 * statistics.mean(guiding) / statistics.mean(passes), 4),
        "guiding_share_of_a_decision": round(sum(guiding) / sum(whole), 4),
    }


def _next(guide: Any, path: list[int]) -> tuple[list[int], Any]:
    """What must follow, and what may follow after that."""
    forced = guide.forced(path)
    return forced, guide.allowed([*path, *forced])


if __name__ == "__main__":
    main()

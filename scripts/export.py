"""Every export format of one edge model: bytes, greedy tokens, a task's score; writes docs/records/export.json.

``python scripts/export.py demo-output/edge`` after ``make demo``; with llama-cpp-python installed the GGUF files run there too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from experiments.measuring import releases, stamp
from rich.console import Console
from rich.progress import track

from shadowpeft import export
from shadowpeft.apps.common import quiet_libraries, system_message
from shadowpeft.apps.export import Vocabulary, load_source, run
from shadowpeft.data.tasks import get_task
from shadowpeft.evaluate import evaluate_task
from shadowpeft.export import verify
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import write_text

RECORD = Path(__file__).parent.parent / "docs" / "records" / "export.json"
CASES = [
    (to, dtype, vocabulary)
    for vocabulary in ("robot", None)
    for to, dtype in (
        ("hf", "f32"),
        ("gguf", "f16"),
        ("gguf", "q8_0"),
        ("gguf", "q4_0"),
        ("onnx", "f32"),
        ("int8", "int8"),
        ("int4", "int4"),
    )
]


class LlamaCpp:
    """llama.cpp, called like a transformers model with one row."""

    def __init__(self, file: Path) -> None:
        from llama_cpp import Llama

        self.llama: Any = Llama(str(file), n_ctx=512, n_threads=1, logits_all=True, verbose=False)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.llama.reset()
        self.llama.eval(input_ids[0].tolist())
        logits = np.array(self.llama.scores[: input_ids.shape[1]])
        return SimpleNamespace(logits=torch.from_numpy(logits)[None])


def main() -> None:
    """Export, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="adapter, or folder of an edge model")
    parser.add_argument("--limit", type=int, default=60, help="rows of the robot test set; 0: no scores")
    parser.add_argument("--vocab", choices=["robot", "whole", "both"], default="both", help="which vocabularies")
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    quiet_libraries()
    prepare_cpu()
    model, tokenizer = load_source(options.source)
    system = system_message(options.source, None)
    task, quiet = get_task("robot"), Console(quiet=True)

    def score(subject: Any, words: Any) -> dict[str, Any]:
        result = evaluate_task(subject, words, task, mode="base", limit=options.limit, progress=lambda done: None)
        return {key: result[key] for key in ("score", "interval", "n")}

    record: dict[str, Any] = {
        **stamp(),
        "machine": environment(),
        "versions": releases("torch", "transformers", "torchao", "gguf", "onnx", "onnxruntime", "onnxscript"),
        "model": {
            "class": type(model).__name__,
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
        },
        "system_message": system,
        "source": score(model, tokenizer) if options.limit else None,
        "cases": [],
    }
    cases = [case for case in CASES if options.vocab in ("both", case[2] or "whole")]
    llama = importlib.util.find_spec("llama_cpp") is not None
    if llama:
        import llama_cpp

        record["versions"]["llama-cpp-python"] = llama_cpp.__version__
    small = Vocabulary("robot", system=system).trim(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for i, (to, dtype, vocabulary) in enumerate(track(cases, console=Console(stderr=True))):
            path = Path(folder) / f"{i}{export.FORMATS[to].suffix}"
            needs = vocabulary and Vocabulary(vocabulary, system=system)
            case = run(model, tokenizer, path, to, dtype, needs, True, None, None, quiet, system=system)
            words, kept = (tokenizer, None) if vocabulary is None else small[1:]
            if options.limit and export.FORMATS[to].generates:
                case["robot"] = score(export.read(to, path), words)
            if llama and to == "gguf":
                case["llama.cpp"] = verify.compare(model, LlamaCpp(path), words, kept, system=system)
            del case["path"]
            record["cases"].append({"vocab_from": vocabulary, **case})
            write_text(options.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

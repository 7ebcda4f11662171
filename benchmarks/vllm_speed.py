"""Tokens per second and per CPU-second of vLLM's base, vLLM with a shadow, our engine and transformers, on one CPU thread.

``python benchmarks/vllm_speed.py --out vllm-speed.json`` makes an adapter on SmolLM2-135M (one layer, r 16, random
values: speed does not depend on them) and starts each engine as a process of its own, in turns. ``SHADOWPEFT_VLLM_PYTHON``
names the Python that has vLLM (make vllm). Every request has 64 prompt tokens and 32 new ones, greedy, in float32. What is
timed is all requests together, from the first token read to the last written, after a warm-up.

On a GPU: ``--engines vllm vllm+shadow --dtype bfloat16 --compile``; the goal there is at most 1.05 of the base's seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PROMPT, NEW = 64, 32
ROWS = {1: 3, 8: 3, 32: 1}
"""Requests at once -> how often they are measured."""
ENGINES = ("vllm", "vllm+shadow", "shadowpeft", "transformers")
Answer = Callable[[list[list[int]]], list[list[int]]]


def prompts(rows: int, turn: int) -> list[list[int]]:
    """Token ids that no earlier turn had, so that no prefix is cached."""
    return [
        [1000 + (turn * 7919 + row * 104729 + place * 31) % 40000 for place in range(PROMPT)] for row in range(rows)
    ]


def vllm_engine(base: str, adapter: str | None, how: argparse.Namespace) -> Answer:
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {}
    if adapter is not None:
        import shadowpeft_vllm

        extra["hf_overrides"] = shadowpeft_vllm.overrides(adapter, "llama")
    llm = LLM(
        model=base,
        dtype=how.dtype,
        enforce_eager=not how.compile,
        max_model_len=256,
        max_num_seqs=32,
        block_size=32,
        **extra,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def answer(rows: list[list[int]]) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answer


def our_engine(adapter: str, base: str) -> Answer:
    """The engine of ``shadowpeft serve``, without HTTP."""
    import threading

    import shadowpeft
    from shadowpeft.serve.backend import Attached
    from shadowpeft.serve.engine import Engine, EngineLimits
    from shadowpeft.serve.requests import Failed, Finish, SamplingParams, Token
    from shadowpeft.tokenizer import load_tokenizer

    model: Any = shadowpeft.load(adapter, base, adapter_name="robot")
    backend = Attached(model, load_tokenizer(base), {"robot": adapter}, "base")
    backend.stop_token_ids = frozenset()
    engine = Engine(backend, EngineLimits(max_num_seqs=32, queue=64, answer_seconds=3600.0))
    engine.start()

    def answer(rows: list[list[int]]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in rows]
        failed, left = [], threading.Semaphore(0)

        def emit(place: int, event: Any) -> None:
            if isinstance(event, Token):
                answers[place].append(event.id)
            elif isinstance(event, (Finish, Failed)):
                failed.extend([event.error] if isinstance(event, Failed) else [])
                left.release()

        for place, row in enumerate(rows):
            engine.submit(row, "robot", SamplingParams(max_tokens=NEW), partial(emit, place))
        for _ in rows:
            left.acquire()
        if failed:
            raise failed[0]
        return answers

    return answer


def transformers_engine(adapter: str, base: str) -> Answer:
    """``model.generate`` of the attached model, all rows in one batch of equal lengths."""
    import torch

    import shadowpeft

    model: Any = shadowpeft.load(adapter, base).eval()
    model.generation_config.eos_token_id = None

    def answer(rows: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(rows)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
            )
        return out[:, PROMPT:].tolist()  # type: ignore[no-any-return]

    return answer


def measure(engine: str, base: str, adapter: str, how: argparse.Namespace) -> dict[str, Any]:
    """Medians over the turns, by number of requests; and a sum of the tokens, by which engines are compared."""
    if engine.startswith("vllm"):
        answer = vllm_engine(base, adapter if engine == "vllm+shadow" else None, how)
    else:
        answer = (our_engine if engine == "shadowpeft" else transformers_engine)(adapter, base)
    found: dict[str, Any] = {}
    for rows in how.rows:
        answer(prompts(min(rows, 2), 100 + rows))
        walls, processors, tokens = [], [], []
        for turn in range(ROWS.get(rows, 1)):
            asked = prompts(rows, 1000 * rows + turn)
            wall, processor = time.perf_counter(), time.process_time()
            answers = answer(asked)
            walls.append(time.perf_counter() - wall)
            processors.append(time.process_time() - processor)
            assert all(len(row) == NEW for row in answers), "an answer has another length than was asked for"
            tokens.append(answers)
        made = rows * NEW
        found[str(rows)] = {
            "seconds": round(statistics.median(walls), 3),
            "cpu_seconds": round(statistics.median(processors), 3),
            "tokens_per_second": round(made / statistics.median(walls), 1),
            "tokens_per_cpu_second": round(made / statistics.median(processors), 1),
            "tokens": tokens,
        }
    return found


def child(engine: str, base: str, adapter: str, how: argparse.Namespace) -> None:
    """Measure in this process, on one thread."""
    import torch

    if not engine.startswith("vllm"):
        torch.set_num_threads(1)
    how.out.write_text(json.dumps(measure(engine, base, adapter, how)))
    os._exit(0)  # our engine's thread and vLLM's children need not be waited for


def start(engine: str, base: str, adapter: str, how: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The same in a process of the engine's own Python."""
    python, environment = sys.executable, {**os.environ, "OMP_NUM_THREADS": "1"}
    if engine.startswith("vllm"):
        python = os.environ["SHADOWPEFT_VLLM_PYTHON"]
        environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"} | {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        library = Path(python).parents[1] / "lib" / "libiomp5.so"
        if library.exists():  # of vllm-cpu
            environment["LD_PRELOAD"] = str(library)
    command = [python, __file__, "--engine", engine, "--base", base, "--adapter", adapter, "--out", str(out)]
    command += ["--rows", *map(str, how.rows), "--dtype", how.dtype, *(["--compile"] if how.compile else [])]
    subprocess.run(command, env=environment, check=True)
    return dict(json.loads(out.read_text()))


def make_adapter(base: str, layers: int, folder: Path) -> str:
    """An adapter with random values, small enough that answers stay text-like."""
    if folder.exists():
        return str(folder)
    import torch
    from peft import get_peft_model

    import shadowpeft
    from shadowpeft.hf.base.load import load_base
    from shadowpeft.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=16, shadow_num_hidden_layers=layers)
    model: Any = get_peft_model(load_base(base), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "w_up" in name:
                value.normal_(std=0.02)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=ENGINES, help="measure this one here, and nothing else")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--layers", type=int, default=1, help="layers of the shadow")
    parser.add_argument(
        "--parts", type=Path, help="folder that keeps the adapter and what was measured, to go on from there"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="requests at once")
    parser.add_argument("--turns", type=int, default=1, help="starts of each engine, in turns")
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model, and capture graphs on a GPU"
    )
    parser.add_argument("--dtype", default="float32", help="of vLLM's engines")
    given = parser.parse_args()
    if given.engine is not None:
        child(given.engine, given.base, given.adapter, given)
    from shadowpeft.hf.base.aliases import source_of

    base = source_of(given.base)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.parts or Path(temporary)
        adapter = given.adapter or make_adapter(base, given.layers, folder / "adapter")
        runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in given.engines}
        for turn in range(given.turns):
            for engine in given.engines:
                part = folder / f"{engine}-{turn}.json"
                runs[engine].append(
                    json.loads(part.read_text()) if part.exists() else start(engine, base, adapter, given, part)
                )
    made = record(runs, given)
    given.out.write_text(json.dumps(made, indent=1) + "\n")
    if "vllm" in made["engines"]:
        print(table(made))


def record(runs: dict[str, list[dict[str, Any]]], given: argparse.Namespace) -> dict[str, Any]:
    """Of each engine the best start by processor time, and whether the attached engines agree on the tokens."""
    best = {
        engine: {
            rows: max((run[rows] for run in found), key=lambda cell: cell["tokens_per_cpu_second"])
            for rows in map(str, given.rows)
        }
        for engine, found in runs.items()
    }
    attached = [engine for engine in ("vllm+shadow", "shadowpeft", "transformers") if engine in best]
    equal = {}
    for rows in map(str, given.rows):
        answers = [[row for turn in best[engine][rows]["tokens"] for row in turn] for engine in attached]
        same = sum(all(answer == of[0] for answer in of) for of in zip(*answers, strict=True))
        equal[rows] = f"{same} of {len(answers[0])}"
    for engine in best.values():
        for cell in engine.values():
            del cell["tokens"]
    return {
        "model": given.base,
        "shadow": {"layers": given.layers, "r": 16, "values": "random"},
        "requests": {"prompt": PROMPT, "new": NEW, "dtype": given.dtype, "greedy": True},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": 1,
            "python": platform.python_version(),
        },
        "vllm": "compiled" if given.compile else "eager",
        "starts": given.turns,
        "load average": [round(value, 1) for value in os.getloadavg()],
        "answers equal in all attached engines": equal,
        "engines": best,
    }


def table(made: dict[str, Any]) -> str:
    """A record as a table: tokens per processor-second, and each engine's time beside vLLM's base."""
    counts = list(made["engines"]["vllm"])
    lines = [
        f"| tokens per CPU-second, by requests at once | {' | '.join(counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    base = made["engines"]["vllm"]
    for engine, cells in made["engines"].items():
        ratios = [base[n]["tokens_per_cpu_second"] / cells[n]["tokens_per_cpu_second"] for n in counts]
        shown = [
            f"{cells[n]['tokens_per_cpu_second']:.1f} ({ratio:.2f})" for n, ratio in zip(counts, ratios, strict=True)
        ]
        lines.append(f"| {engine} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

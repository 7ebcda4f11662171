"""Measure which architectures a shadow works on and write docs/architectures.md and docs/records/architectures.json.

A tiny random instance of every decoder in transformers' causal-LM mapping is built and goes through the steps of
tests/architectures/checks.py, each in a process of its own with a limit of 60 s of processor time. Ten minutes on an idle core:
make architectures
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in (".", "src", "tests/architectures")]

import checks  # noqa: E402
import matrix  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import zoo  # noqa: E402
from experiments.markdown import table  # noqa: E402
from experiments.measuring import releases, stamp  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from shadowpeft.storage import write_text  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
RECORD = ROOT / "docs" / "records" / "architectures.json"


def measure() -> dict[str, dict[str, object]]:
    """What became of each architecture: the bare model, then the steps with a shadow."""
    results = {}
    names = [*zoo.decoders(), *zoo.encoder_families()]
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            alone = matrix.isolated(matrix.bare, name)
            results[name] = alone if "error" in alone else {**alone, **matrix.isolated(matrix.shadowed, name)}
            results[name]["published"] = matrix.isolated(matrix.published, name)
            progress.advance(task)
    return results


def split(results: dict[str, dict[str, object]]) -> tuple[list[str], list[str], list[str]]:
    """Decoders that were measured, encoder families that were measured, and what does not run by itself."""
    runs = [name for name, result in results.items() if "parameters" in result]
    families = set(zoo.encoder_families())
    return (
        [name for name in runs if name not in families],
        [name for name in runs if name in families],
        [name for name in results if name not in runs],
    )


def outcomes(names: list[str], results: dict[str, dict[str, object]]) -> list[str]:
    """A table: what works, as what it is detached, and why what does not work does not."""
    rows = []
    for name in sorted(names, key=lambda n: (bool(results[n].get("passed")), n)):
        result = results[name]
        why = ""
        if not result.get("passed"):
            outcome = "refused" if result.get("refused") else "failed"
            reason = str(result.get("reason", result.get("error", "")))[:260]
            why = f"{outcome} at {result.get('failed', '-')}: {reason}"
        rows.append(
            [f"`{name}`", "yes" if result.get("passed") else "no", str(result.get("shadow", "")), why.replace("|", "/")]
        )
    return table(["architecture", "works", "detached as", "first step that fails, and why"], rows)


def page(record: dict[str, object]) -> str:
    results: dict[str, dict[str, Any]] = record["architectures"]  # type: ignore[assignment]
    decoders, families, silent = split(results)
    passed = sum(bool(results[n].get("passed")) for n in decoders)
    also = sum(bool(results[n].get("passed")) for n in families)
    refused = sum(bool(results[n].get("refused")) for n in [*decoders, *families])
    published = {n: results[n]["published"] for n in decoders if "published" in results[n]}
    runs = [n for n, result in published.items() if "parameters" in result]
    differ = [f"`{n}`" for n in runs if results[n].get("passed") and not published[n].get("passed")]
    as_published = [
        f"The same with the token ids and layer types of the classes' defaults, or of published configurations, in place of "
        f"set ones: {sum(bool(published[n].get('passed')) for n in runs)} of {len(runs)} that run by themselves work"
        + (f"; not {', '.join(differ)}." if differ else "."),
        "",
    ]
    lines = [
        "# Architectures",
        "",
        "<!-- written by scripts/architectures.py (make architectures); do not edit -->",
        "",
        f"**{passed} of {len(decoders)} decoder architectures** that transformers {record['transformers']} can build from a "
        f"configuration work with a shadow, with no special case for any of them. Of {len(families)} classes of encoder "
        f"families that can be built as a decoder {also} work. {refused} are refused at attaching, with the reason; none "
        "is wrong without a word.",
        "",
        f"Measured {record['date']} on {record['machine']}, Python {record['python']}, torch {record['torch']}, PEFT "
        f"{record['peft']}; record: [records/architectures.json](records/architectures.json).",
        "",
        "A tiny random instance of each goes through these steps in a process of its own with a limit of "
        f"{matrix.LIMIT} s; all must hold:",
        "",
        "| step | what must hold |",
        "|---|---|",
        "| attach | `get_peft_model` with an implicit shadow of one layer |",
        "| identity | logits bit-identical to the base's before training |",
        "| gradients | in four optimiser steps every trainable tensor gets a gradient, and not always zero; no base tensor "
        "gets one |",
        "| effect | logits are finite and have changed |",
        "| cache | greedy tokens with cache equal those without; logits of a prompt in parts equal those of the whole |",
        "| detach | the detached model's logits are the shadow's; its cached greedy tokens equal its uncached ones |",
        "| reload | saved and loaded by `AutoModelForCausalLM`, it gives bit-identical logits |",
        "| disable | logits bit-identical to the base's |",
        "| unload | keys, weights and logits are the base's, bit for bit |",
        "",
        *(as_published if published else []),
        "How differences between architectures are met without naming any:",
        "",
        "- The call that carries the shadow's state travels through keyword arguments, and through a context variable where an "
        "architecture does not hand those down (Bloom, Falcon, GPT-J, Mamba and others). Under `torch.compile` these break the "
        "graph once per layer.",
        "- A decoder with parallel residual streams (hyper-connections, AltUp) is read as the mean over its streams and "
        "corrected in all of them.",
        "- The shadow takes its type from the base's first full-attention layer; if its class refuses that alone, or cannot "
        "be run or cached alone, from the next type, and at last one layer of each.",
        "- A shadow whose layers read the tokens (per-layer embeddings, hash routing) is run from tokens instead of "
        "embeddings.",
        "- Tensors that no gradient can reach (an indexer's choice, attention to an absent encoder) are found at attaching "
        "and not trained (`shadow_frozen` in the adapter's configuration).",
        "- What stands between backbone and logits, and which target the base's loss uses, is tried out with random states; a "
        "head that is more than a matrix is run as it is.",
        "- An architecture's own cache class gets the shadow's layers beside it; one that is no cache of transformers' kind "
        "(xLSTM, Reformer) is refused.",
        "",
        "## Decoders",
        "",
        *outcomes(decoders, results),
        "",
        "## Encoder families built as decoders",
        "",
        *outcomes(families, results),
        "",
        "## Not measured",
        "",
        "Their tiny instance does not run by itself here, so nothing can be said of a shadow on it.",
        "",
        *table(
            ["architecture", "what the bare model does"],
            ([f"`{n}`", " ".join(str(results[n]["error"]).split())[:200].replace("|", "/")] for n in silent),
        ),
        "",
        "Classes that need pictures or sound, or only join other models, are left out: "
        + ", ".join(f"`{n}`" for n in zoo.MULTIMODAL)
        + ". Their language models are in the table under their own names where transformers has one.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    record: dict[str, object] = {
        **stamp(),
        "machine": f"{os.cpu_count()} CPU cores, one thread",
        "python": sys.version.split()[0],
        **releases("torch", "transformers", "peft"),
        "steps": list(checks.STEPS),
        "architectures": measure(),
    }
    write_text(RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    write_text(PAGE, page(json.loads(RECORD.read_text(encoding="utf-8"))))  # in the order that the file has
    print(PAGE.read_text().split("\n\n")[2])


if __name__ == "__main__":
    main()

"""What docs/compared.md says of speed, from the records of both speed benchmarks; and whether it got worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from experiments.markdown import table
from experiments.measuring import short

from shadowpeft.storage import between

ROOT = Path(__file__).resolve().parents[1]
COMPARED, MARKS = ROOT / "docs" / "compared.md", ("<!-- speed -->", "<!-- /speed -->")
SPECULATION, FIGURE = ROOT / "docs" / "records" / "speculation.json", ROOT / "docs" / "speed.png"
DORA_TOKENS, DORA_ROUNDS = 8, 5
ALLOWED = 0.05
NAMES = {
    "base": "base",
    "shadow": "shadowpeft",
    "peft_shadow": "PEFT's shadow",
    "authors": "authors' code",
    "lora": "LoRA",
    "lora_merged": "LoRA, merged",
    "dora": "DoRA",
    "dora_cached": "DoRA, norms cached",
}
PARTS = {
    "decode": "decode, time per token",
    "decode_8": "decode, eight rows, time per step",
    "prefill_256": "prefill, 256 tokens",
    "train_step": "training step, 4 x 128 tokens, every token a target",
    "train_step_prompt_masked": "training step, last quarter of a row are targets",
}


def ratios_of(record: dict[str, Any], part: str) -> dict[str, float]:
    """The ratios of a part, to the base or, in training, to LoRA."""
    found = record.get(part, {})
    return dict(found.get("ratio_to_base") or found.get("ratio_to_lora") or {})


def slower(record: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each ratio of the shadow that is more than :data:`ALLOWED` above the record's."""
    worse = []
    for part, title in PARTS.items():
        before, after = ratios_of(record, part).get("shadow"), ratios_of(now, part).get("shadow")
        if before is not None and after is not None and after > before + ALLOWED:
            worse.append(f"{title}: {after:.2f}, the record has {before:.2f}")
    return worse


def training_rounds(rounds: int) -> int:
    """Rounds of training steps, which take longest."""
    return max(3, rounds // 2)


def filled(page: str, record: dict[str, Any]) -> str:
    """docs/compared.md with the block on speed of this record.

    Raises:
        RuntimeError: if the page has no marks.
    """
    text = between(page, MARKS, block(record))
    if text is None:
        raise RuntimeError(
            f"{COMPARED.name} has no lines {MARKS[0]} and {MARKS[1]}; write them where the block is to stand"
        )
    return text


def block(record: dict[str, Any]) -> str:
    """How the record was measured, its table, and what drafts give."""
    matched = record["matched"]
    memory = {n: m["above_model_mib"] for n, m in record["train_memory_mib"].items()}

    def row(title: str, values: dict[str, Any], form: str = "{:.2f}") -> list[str]:
        return [title, *(form.format(values[n]) if n in values else "" for n in NAMES)]

    rows = [row(title, ratios_of(record, part)) for part, title in PARTS.items()]
    rows.append(row("memory of a training step above the model's", memory, "{:,} MiB"))
    growth = ", ".join(
        f"{found['median_ms_per_token']['shadow']} ms in answers of {int(length):,} tokens "
        f"({found['ratio_to_base']:.2f} of the base's)"
        for length, found in record["by_length"].items()
    )
    return "\n".join(
        [
            f"`make bench`, {record['date']}, commit {short(record['commit'])}, record "
            "[benchmarks/results.json](../benchmarks/results.json): SmolLM2-135M, float32, one CPU thread, one process,",
            f"alternating, medians of paired ratios over {record['rounds']} rounds "
            f"(eight rows {record['rounds'] // 2}, training {training_rounds(record['rounds'])},",
            f"DoRA {DORA_ROUNDS} of {DORA_TOKENS} tokens where the others have {record['new_tokens']}). One-layer shadow with",
            "r = m = 16; LoRA and DoRA r = 16 on all linear layers; for training LoRA "
            f"r = {matched['lora_rank']}, which matches the number of trainable",
            f"parameters ({matched['shadow_parameters']:,} and {matched['lora_parameters']:,}).",
            "",
            *table(["", *NAMES.values()], rows),
            "",
            f"A token of the shadow takes {growth}.",
            "",
            drafts(json.loads(SPECULATION.read_text(encoding="utf-8"))),
            "",
            "![Time beside the base](speed.png)",
        ]
    )


def drafts(record: dict[str, Any]) -> str:
    """Tokens per second with and without drafts, from the record of ``make bench-speculation``."""
    parts = []
    for text, found in record["texts"].items():
        ways = found["ways"]
        gate, without = ways["gate"], ways["attached"]
        parts.append(
            f"{text} {gate['of_base']:.2f} of the bare base's tokens per second with drafts "
            f"({gate['of_base_after_the_first']:.2f} after the first token, which reading the prompt brings), "
            f"{without['of_base']:.2f} without"
        )
    return (
        f"With free drafts (`make bench-speculation`, {record['date']}, record [speculation.json](records/speculation.json), "
        f"another adapter: two layers, trained on the robot set): {'; '.join(parts)}. More in [speculation.md](speculation.md)."
    )


def picture(record: dict[str, Any]) -> None:
    """One group of bars for each part; DoRA without its cache is off the scale and left to the table."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = [name for name in NAMES if name not in ("base", "dora")]
    axes = plt.figure(figsize=(9, 3.6), layout="constrained").subplots()
    for place, name in enumerate(shown):
        found = [(at, ratios_of(record, part)[name]) for at, part in enumerate(PARTS) if name in ratios_of(record, part)]
        bars = axes.bar([at + 0.13 * (place - 2.5) for at, _ in found], [v for _, v in found], 0.12, label=NAMES[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylim=(0.8, None), ylabel="time / base's, or LoRA's in training")
    titles = [title.replace(", ", ",\n", 1).replace(", every", ",\nevery") for title in PARTS.values()]
    axes.set_xticks(range(len(PARTS)), titles, fontsize=7)
    axes.legend(fontsize=7, ncols=3)
    axes.figure.savefig(FIGURE, dpi=130)  # type: ignore[union-attr]
    plt.close()

"""The head of docs/results.md: what a reader decides by, each question with a table and a figure, from records alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.markdown import percent, table
from experiments.records import read_file, read_folder
from experiments.report import converged
from experiments.report.records import Page

Share = tuple[float, float, float]
"""A share of rows and the ends of its 95 % interval."""
FIGURES = ("question-lora.png", "question-device.png", "question-cost.png")
RIVALS = {"robot": "robot-svc-open", "robot_large": "robot-svc-large"}
"""Packaged set -> the record of the classifier that has learnt all of it."""


def _share(found: Mapping[str, Any]) -> Share:
    return (found["score"], *found["interval"])


def joint_cells(page: Page) -> list[dict[str, Any]]:
    """LoRA and the attached shadow on the robot set, trained for a pass or more."""
    return [record for record in read_folder(page.records / "device" / "joint") if record["settings"]["steps"] >= 250]


def lora(page: Page) -> list[str]:
    """The attached model beside LoRA: the longest cells, on development rows and, where a cell was chosen, on test rows."""
    lines = []
    for record in joint_cells(page):
        is_lora = record["settings"].get("method", "shadow") == "lora"
        development, test = record["development"]["attached"], (record.get("test") or {}).get("attached", {})
        first = record["start_processor_seconds"]
        minutes = f"{record['processor_seconds'] / 60:.0f}" + ("" if is_lora or not first else f" + {first / 60:.0f}")
        lines.append(
            [
                page.link(f"device/joint/{record['name']}", record["name"]),
                "LoRA" if is_lora else "shadow, attached",
                str(record["settings"]["steps"]),
                percent(development["commands"], interval=True),
                percent(development["open_handed_on"], interval=True),
                percent(test.get("commands"), interval=True),
                percent(test.get("open_handed_on"), interval=True),
                minutes,
            ]
        )
    if not lines:
        return []
    header = ["cell", "what", "steps", "commands, development", "open requests: no action", "commands, test", "open, test"]
    return [
        "Robot commands, one pass over the same rows, one seed; LoRA's rate was not tuned, and neither has converged. "
        "The shadow was trained alone before, which the second number of the minutes counts. More in [scaled.md](scaled.md).\n",
        *table([*header, "processor minutes"], lines),
        f"\n![Attached shadow and LoRA on robot commands](figures/{FIGURES[0]})\n",
        "At smaller budgets, on more tasks and three seeds, the two are compared row by row in the tables further down.\n",
    ]


def tested(page: Page) -> list[tuple[dict[str, Any], str, str]]:
    """The chosen cell of each problem, and the names of its shares: what is right, and what is handed on or out of scope."""
    found = []
    for record in read_folder(page.records / "device"):
        if record.get("test") is not None:
            clinc = "in_scope" in record["test"]["constrained"]
            found.append((record, *(("in_scope", "oos_recall") if clinc else ("commands", "open_handed_on"))))
    return found


def device(page: Page) -> list[str]:
    """What the device half reaches beside the linear classifier."""
    lines = []
    for record, right, other in tested(page):
        of = "CLINC150" if right == "in_scope" else f"robot commands, `{_rows(record)}`"
        title = f"{of}: {record['settings']['layers']} shadow layers"
        shares = [percent(record["test"]["constrained"][name], interval=True) for name in (right, other)]
        lines.append([title, page.link(record["id"], record["name"]), *shares])
    if not lines:
        return []
    robot = ("robot-svc-test_large", "skill", "remote")
    for name, of, scores in (
        *((name, f"robot commands, `{rows}`", robot) for rows, name in RIVALS.items()),
        ("clinc150-svc", "CLINC150", ("clinc150-svc", "in_scope", "oos_recall")),
    ):
        rival = read_file(f"rivals/{name}", page.records)
        if rival is not None:
            values = rival["results"][scores[0]]["scores"]
            shares = [f"{100 * values[key]:.1f}" for key in scores[1:]]
            lines.append([f"{of}: TF-IDF and LinearSVC", page.link(f"rivals/{name}", name), *shares])
    return [
        "### What does the device half reach?\n",
        "Test rows, which no search looked at; each chosen cell read them once. The last column is the share of open requests "
        "that get no action, or of rows out of scope that are known as such.\n",
        *table(["what", "record", "right, %", "open or out of scope, %"], sorted(lines)),
        f"\n![Depth of the shadow against right commands](figures/{FIGURES[1]})\n",
        "The search behind it is in [device-search.md](device-search.md).\n",
    ]


def cost_rows(page: Page) -> list[tuple[str, float, float]]:
    """Ratios of the shadow and of LoRA; decoding and prefill to the base, training to LoRA."""
    bench = read_file("results", page.docs.parent / "benchmarks")
    if bench is None:
        return []
    rows = []
    for part, title in (
        ("decode", "a decoded token, of the base's time"),
        ("decode_8", "a step of eight rows, of the base's time"),
        ("prefill_256", "a prompt of 256 tokens, of the base's time"),
        ("train_step", "a training step, every token a target, of LoRA's time"),
        ("train_step_prompt_masked", "a training step, a quarter are targets, of LoRA's time"),
    ):
        ratios = bench.get(part, {}).get("ratio_to_base") or bench.get(part, {}).get("ratio_to_lora")
        if ratios:
            rows.append((title, ratios["shadow"], ratios["lora"]))
    memory = {name: found["above_model_mib"] for name, found in bench["train_memory_mib"].items()}
    rows.append(("memory of a training step, of LoRA's", round(memory["shadow"] / memory["lora"], 3), 1.0))
    return rows


def cost(page: Page) -> list[str]:
    """What the shadow costs beside LoRA."""
    rows = cost_rows(page)
    if not rows:
        return []
    return [
        "### What does it cost?\n",
        "SmolLM2-135M, one CPU thread, a one-layer shadow; [compared.md](compared.md) says how it was measured.\n",
        *table(["", "shadow", "LoRA"], [[title, f"{ours:.2f}", f"{theirs:.2f}"] for title, ours, theirs in rows]),
        f"\n![Time and memory beside LoRA](figures/{FIGURES[2]})\n",
        "Correcting the last layers only trains for less: [last-layers.md](last-layers.md). A deeper shadow costs more: "
        "[device.md](device.md#how-the-recipe-was-found).\n",
    ]


def text(page: Page) -> str:
    """The three questions, as far as records answer them."""
    beside = [*converged.section(page), *lora(page)]
    if beside:
        beside = ["### Is the attached model as good as LoRA?\n", *beside]
    parts = [part for part in (beside, device(page), cost(page)) if part]
    if not parts:
        return ""
    return "\n".join(["## Three questions\n", *(line for part in parts for line in part), "# The records\n"])


def figures(page: Page, folder: Path) -> list[Path]:
    """Write the figures of the questions that records answer."""
    from experiments.report.figures import bars_with_intervals, depth_against_score, ratio_bars

    written = converged.figure(page, folder)
    cells = joint_cells(page)
    if cells:
        shown = [(r["name"], _share(r["development"]["attached"]["commands"])) for r in cells]
        bars_with_intervals(folder / FIGURES[0], shown)
        written.append(folder / FIGURES[0])
    if tested(page):
        depth_against_score(folder / FIGURES[1], _by_depth(page), _rivals(page))
        written.append(folder / FIGURES[1])
    if cost_rows(page):
        ratio_bars(folder / FIGURES[2], cost_rows(page))
        written.append(folder / FIGURES[2])
    return written


def _rows(record: dict[str, Any]) -> str:
    """The packaged set that a cell of the robot's has learnt."""
    return "robot_large" if record["settings"].get("more_rows") else "robot"


def _by_depth(page: Page) -> dict[str, list[tuple[int, Share]]]:
    """The best development score of each depth on the robot's rows, by the set that was learnt."""
    best: dict[str, dict[int, Share]] = {}
    for record in read_folder(page.records / "device"):
        found = record["curve"][-1]["constrained"]
        if "commands" in found:
            layers, share = record["settings"]["layers"], _share(found["commands"])
            own = best.setdefault(_rows(record), {})
            own[layers] = max(own.get(layers, share), share)
    return {rows: sorted(own.items()) for rows, own in sorted(best.items())}


def _rivals(page: Page) -> dict[str, float]:
    """The classifier's share of right commands on the same development rows, by the set that it was fitted on."""
    records = {rows: read_file(f"rivals/{name}", page.records) for rows, name in RIVALS.items()}
    scores = {rows: r["rate"]["development"]["commands"]["score"] for rows, r in records.items() if r is not None}
    return {rows: float(score) for rows, score in scores.items()}

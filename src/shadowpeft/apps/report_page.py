"""The page of ``shadowpeft report``: text and drawings in one file, without a script and without anything from elsewhere."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from shadowpeft.apps.common import flat
from shadowpeft.errors import ConfigError
from shadowpeft.messages import quote
from shadowpeft.serve.router import FILE as ROUTING
from shadowpeft.serve.router import Calibration
from shadowpeft.train.folder import stored_record
from shadowpeft.train.progress import STYLES, draw_losses, is_number, read_metrics


@dataclass
class RunFolder:
    """What a run has left so far."""

    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict[str, float]]
    summary: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None


def read_run_folder(folder: Path) -> RunFolder:
    """Read the records of a run.

    Raises:
        ConfigError: if the folder holds no run of ``shadowpeft train``, or a record is damaged.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "data.json").is_file():
        raise ConfigError(
            f"'{folder}' holds no run of shadowpeft train (no config.yaml and data.json); give its 'output' folder"
        )
    run = _record(folder / "config.yaml")
    if "backbone" in run:
        raise ConfigError(
            f"'{folder}' is a run of shadowpeft pretrain, but report reads runs of shadowpeft train; its losses are in "
            "loss.png and metrics.jsonl, its perplexities in result.json"
        )
    summary, versions = (
        _record(folder / name) if (folder / name).is_file() else {} for name in ("summary.json", "versions.json")
    )
    _check_kinds(folder / "summary.json", summary, _SUMMARY)
    _check_kinds(folder / "summary.json", shares := summary.get("accuracy", {}), dict.fromkeys(shares, float))
    data = _record(folder / "data.json")
    _check_kinds(folder / "data.json", data, {"train": dict, "validation": dict})
    metrics = read_metrics(folder)
    for record in metrics:
        _check_kinds(folder / "metrics.jsonl", record, dict.fromkeys(("learning_rate", *(key for key, *_ in STYLES)), float))
    routing = folder / "adapter" / ROUTING
    return RunFolder(
        folder.resolve().name,
        run,
        data,
        versions,
        metrics,
        summary,
        Calibration.load(routing) if routing.is_file() else None,
    )


_SUMMARY: dict[str, type] = {
    **dict.fromkeys(("steps", "planned_steps", "seconds", "trainable_parameters", "best_step"), float),
    **dict.fromkeys(("eval_task_loss", "eval_shadow_loss"), float),
    "accuracy": dict,
}
"""What the page shows of ``summary.json``; float: a number."""


def _record(file: Path) -> dict[str, Any]:
    return stored_record(file, "this run", "restore it")


def _check_kinds(file: Path, record: dict[str, Any], kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if key in record and not (is_number(record[key]) if kind is float else isinstance(record[key], kind)):
            what = "a number" if kind is float else "an object"
            raise ConfigError(f"'{file}' has {quote(record[key])} for '{key}' but it must be {what}; restore it")


def is_page(file: Path) -> bool:
    """Whether a file is a report, so that a newer one may take its place."""
    if not file.is_file():
        return False
    with file.open("rb") as handle:
        begins = handle.read(1000)
    return begins.startswith(b"<!DOCTYPE html>") and b"<title>Training run: " in begins


def page(run: RunFolder, examples: list[dict[str, Any]], note: str) -> str:
    """The whole page; ``note`` says of which rows the examples are, or why there are none."""
    parts = [
        _part("Result", _facts(run)),
        _part("Losses of both paths", _losses(run)),
        _part("Evaluations", _evaluations(run.metrics)),
        _part("Learning rate", _rate(run.metrics)),
        _part("Examples, before and after", _examples(examples, note)),
        _part("Calibration", _calibration(run.calibration)),
        _part("Settings", _settings(run)),
    ]
    title = f"Training run: {escape(run.name)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{"".join(parts)}
</body>
</html>
"""


def _part(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _said(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _table(head: list[str], rows: list[list[Any]], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(each)}</th>" for each in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table class='{kind}'><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def _facts(run: RunFolder) -> str:
    s, train = run.summary, run.data.get("train", {})
    rows = train.get("rows")
    facts = {
        "Base": run.config.get("base"),
        "Training data": f"{train.get('source')}" + (f", {rows:,} rows" if is_number(rows) else ", streamed"),
        "State": _state(s),
    }
    if "steps" in s:
        planned = f" of {s['planned_steps']:,}" if "planned_steps" in s else ""
        facts["Steps"] = f"{s['steps']:,}{planned}"
    if "seconds" in s:
        facts["Time"] = f"{s['seconds'] / 60:.1f} minutes"
    if "trainable_parameters" in s:
        facts["Trainable parameters"] = f"{s['trainable_parameters']:,}"
    names = {"eval_task_loss": "Validation loss, attached", "eval_shadow_loss": "Validation loss, detached"}
    facts |= {label: f"{s[key]:.4f}" for key, label in names.items() if key in s}
    facts |= {f"Right on validation, {path}": f"{share:.1%}" for path, share in s.get("accuracy", {}).items()}
    if "best_step" in s:
        facts["Kept"] = f"the adapter of step {s['best_step']}, the best evaluation"
    return _table(["", ""], [[key, value] for key, value in facts.items()], "facts")


def _state(summary: dict[str, Any]) -> str:
    if not summary:
        return "not ended: it runs, or was stopped without a summary"
    if summary.get("interrupted"):
        return "interrupted; shadowpeft train --resume goes on"
    return "ended early, since the evaluations did not improve" if summary.get("stopped_early") else "ended"


def _drawn(draw: Any, height: float = 3.6) -> str:
    """A drawing as SVG; its text stays text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}):
        figure, axes = plt.subplots(figsize=(8.4, height), layout="constrained")
        draw(axes)
        axes.grid(alpha=0.3, which="both")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        plt.close(figure)
    text = buffer.getvalue()
    return f"<figure>{text[text.index('<svg') :]}</figure>"


def _losses(run: RunFolder) -> str:
    if not any("task_loss" in r or "shadow_loss" in r or "eval_task_loss" in r for r in run.metrics):
        return _said("Nothing has been logged yet.")
    unit = "row" if run.config.get("task_type") == "SEQ_CLS" else "answer token"
    return _drawn(lambda axes: draw_losses(axes, run.metrics, unit=f"cross-entropy per {unit}"))


def _rate(metrics: list[dict[str, float]]) -> str:
    points = [(r["step"], r["learning_rate"]) for r in metrics if "learning_rate" in r]
    if not points:
        return _said("Nothing has been logged yet.")

    def draw(axes: Any) -> None:
        axes.plot(*zip(*points, strict=True), color="#3a8a4d", marker="o" if len(points) == 1 else None)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("learning rate")
        axes.set_ylim(bottom=0)

    return _drawn(draw, 2.4)


def _evaluations(metrics: list[dict[str, float]]) -> str:
    keys = ("step", "eval_task_loss", "eval_shadow_loss")
    found = [r for r in metrics if "eval_task_loss" in r or "eval_shadow_loss" in r]
    last = found[-1:] if len(found) > 1 and all(found[-1].get(key) == found[-2].get(key) for key in keys) else []
    found = found[: len(found) - len(last)]  # the evaluation at the end, where it says the same once more
    if not found:
        return _said("The run was not evaluated while it trained; set data.validation and training.eval_every.")
    rows = [[f"{r['step']:g}", *(_number(r.get(key)) for key in ("eval_task_loss", "eval_shadow_loss"))] for r in found]
    return _table(["step", "loss, attached", "loss, detached"], rows, "numbers")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


_COLUMNS = {
    "request": "request",
    "wanted": "expected",
    "base": "before: the base",
    "attached": "after: attached",
    "detached": "after: detached",
}


def _examples(examples: list[dict[str, Any]], note: str) -> str:
    if not examples:
        return _said(note)
    keys = [key for key in _COLUMNS if key in examples[0]]
    return _said(note) + _table([_COLUMNS[key] for key in keys], [[e[key] for key in keys] for e in examples], "texts")


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return _said("There is none; shadowpeft route calibrate makes one, for an edge model that chooses among actions.")

    def draw(axes: Any) -> None:
        style = {"color": "#c2571a", "marker": "o", "markersize": 3, "label": "chance of a right action"}
        axes.plot(calibration.values, calibration.chances, **style)
        if calibration.least is not None:
            axes.axvline(calibration.least, color="#1f5fa8", linestyle="--", label="kept from here on")
        elif calibration.threshold <= 1:
            axes.axhline(calibration.threshold, color="#1f5fa8", linestyle="--", label="kept above this")
        axes.set_xlabel(f"signal: {calibration.signal}")
        axes.set_ylabel("chance")
        axes.set_ylim(0, 1.03)
        axes.legend(frameon=False)

    plain = {key: value for key, value in calibration.report.items() if key != "curve" and not isinstance(value, list)}
    about = [[key.replace("_", " "), value] for key, value in flat(plain).items()]
    kept = _said("Nothing is kept: everything goes to the cloud.") if calibration.threshold > 1 else ""
    numbers = f"<details><summary>All its numbers</summary>{_table(['', ''], about, 'facts')}</details>"
    return kept + _drawn(draw) + numbers


def _settings(run: RunFolder) -> str:
    import yaml

    texts = {"Run file": run.config, "Data": run.data, "Versions": run.versions}
    shown = (
        f"<details><summary>{escape(title)}</summary><pre>"
        f"{escape(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))}</pre></details>"
        for title, content in texts.items()
    )
    return "".join(shown)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #e6e6e6; }
td { overflow-wrap: anywhere; }
th { font-weight: 600; color: #555; }
.facts thead { display: none; }
.facts td:first-child { width: 16rem; color: #555; }
.numbers { width: auto; }
.numbers td, .numbers th { text-align: right; font-variant-numeric: tabular-nums; }
.texts { table-layout: fixed; font-size: .9rem; }
.texts td { white-space: pre-wrap; }
.wide { overflow-x: auto; }
.note { color: #555; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; padding: .3rem 0; }
"""

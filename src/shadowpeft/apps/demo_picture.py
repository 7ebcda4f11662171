"""The demo's result as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shadowpeft.evaluate.rival import TITLE
from shadowpeft.storage import whole

NAMES = {
    "rival": TITLE,
    "device": "device alone",
    "second": "device with a second opinion",
    "cloud": "cloud alone",
    "routed": "device, then cloud",
}
COLOURS = {"rival": "#9a9a9a", "device": "#e09a6a", "second": "#c2571a", "cloud": "#1f5fa8", "routed": "#3a8a4d"}
_SHORT = {"rival": "SVC", "device": "device", "second": "device,\nsecond\nopinion", "cloud": "cloud"}


KEPT = {
    "commands_kept": "commands kept on the device",
    "open_kept": "open requests kept on the device",
    "wrong_of_kept": "wrong, of all that is kept",
    "wrong_of_kept_commands": "wrong, of the commands that are kept",
}
"""What is told of a calibrated device."""


def percent(share: dict[str, Any], *, interval: bool = True) -> str:
    """A share in percent with its 95 % interval."""
    if not share["n"]:
        return "-"
    low, high = share["interval"]
    return f"{share['accuracy']:.1%}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if interval else "")


def show_tables(result: dict[str, Any], console: Console) -> None:
    """Print what :func:`shadowpeft.apps.demo_result.measure` found."""
    methods, ms = result["methods"], result["milliseconds"]
    commands, open_ = methods["device"]["commands"]["n"], methods["device"]["open_handed_on"]["n"]
    table = Table(
        "",
        f"{commands} commands, right [95 %]",
        "en / zh",
        f"{open_} open requests, no action",
        "commands handed on",
        "ms a decision",
        title="unseen requests",
    )
    for name, title in NAMES.items():
        found = methods[name]
        languages = f"{100 * found['en']['accuracy']:.0f} / {100 * found['zh']['accuracy']:.0f}"
        handed = [percent(found["open_handed_on"]), "-" if name == "routed" else percent(found["commands_handed_on"])]
        time = f"{ms[name]:.1f}" if name in ms else ""
        table.add_row(title, percent(found["commands"]), languages, *handed, time)
    console.print(table)
    for kept in (result["calibrated"], result["strict"]):
        bound = f"at most {kept['target']:.0%} wrong with {kept['level']:.0%} confidence"
        table = Table("", "with a second opinion", "alone", title=f"the device keeps what it is sure of: {bound}")
        for key, label in KEPT.items():
            table.add_row(label, percent(kept[key]), percent(kept["alone"][key]))
        console.print(table)
    size = result["size"]
    table = Table("", "parameters", "on disk", title="size")
    table.add_row("base", f"{size['base_parameters']:,}", "")
    table.add_row("adapter", f"{size['adapter_parameters']:,}", f"{size['adapter_bytes'] / 1e6:.1f} MB")
    table.add_row("edge model", f"{size['edge_parameters']:,}", f"{size['edge_bytes'] / 1e6:.1f} MB")
    table.add_row(TITLE, f"{size['rival_parameters']:,}", "")
    table.add_row("second opinion", f"{size['opinion_parameters']:,}", "")
    console.print(table)
    table = Table("request", "where", "why", "answer", "ms", title="the paper's procedure: device first")
    for row in result["requests"]:
        reason, text = (escape(row[key]) for key in ("reason", "answer"))
        table.add_row(row["request"], row["where"], reason, text, str(row["milliseconds"]))
    console.print(table)


def draw(result: dict[str, Any], path: Path) -> None:
    """Right commands and handed-on open requests of each method, who answers, and how long a decision takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained", width_ratios=(5, 4, 3))
    _bars(left, result["methods"])
    _who(middle, result)
    _times(right, result["milliseconds"])
    for axes in (left, middle, right):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    size = result["size"]
    figure.suptitle(
        f"One training run, two models: SmolLM2-135M with a shadow (+{size['adapter_parameters'] / 1e6:.0f}M parameters) for "
        f"the cloud, the shadow alone ({size['edge_parameters'] / 1e6:.0f}M) for the device"
    )
    with whole(path) as beside:
        figure.savefig(beside, dpi=130)
    plt.close(figure)


def _bars(axes: Any, methods: dict[str, Any]) -> None:
    groups = {"commands": "commands:\nright action", "open_handed_on": "open requests:\nno action"}
    width = 0.17
    for g, key in enumerate(groups):
        for i, (name, title) in enumerate(NAMES.items()):
            share = methods[name][key]
            value, (low, high) = 100 * share["accuracy"], share["interval"]
            error = [[max(value - 100 * low, 0)], [max(100 * high - value, 0)]]
            place = g + (i - 2) * width
            label = title if g == 0 else None
            axes.bar(
                place, value, width * 0.92, color=COLOURS[name], yerr=error, capsize=3, ecolor="#333333", label=label
            )
            axes.text(place, min(value + error[1][0], 100) + 1.5, f"{value:.0f}", ha="center", fontsize=9)
    axes.set_xticks(range(len(groups)), groups.values())
    axes.set_ylim(0, 135)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("% of unseen requests, 95 % interval")
    axes.set_title(f"{methods['device']['commands']['n']} commands, {methods['device']['open_handed_on']['n']} open requests")
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper center")


def _who(axes: Any, result: dict[str, Any]) -> None:
    kept = result["calibrated"]
    rows = (("commands", kept["commands_kept"]), ("open requests", kept["open_kept"]))
    for i, (_, share) in enumerate(rows):
        device = 100 * share["accuracy"]
        axes.barh(i, device, color=COLOURS["second"], label="device" if i == 0 else None)
        axes.barh(i, 100 - device, left=device, color=COLOURS["cloud"], label="cloud" if i == 0 else None)
        side = "left" if device < 50 else "right"
        axes.text(device + (2 if side == "left" else -2), i, f"{device:.0f} % on the device", va="center", ha=side, color="w")
    axes.set_yticks(range(2), [name for name, _ in rows])
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of requests")
    wrong = percent(kept["wrong_of_kept"], interval=False)
    axes.set_title(
        f"who answers: at most {kept['target']:.0%} wrong on the device\nasked for, {wrong} found", fontsize=11
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def _times(axes: Any, ms: dict[str, float]) -> None:
    names = [name for name in NAMES if name in ms]
    for i, name in enumerate(names):
        axes.bar(i, ms[name], color=COLOURS[name])
        axes.text(i, ms[name], f"{ms[name]:.0f} ms" if ms[name] >= 10 else f"{ms[name]:.1f} ms", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), [_SHORT[name] for name in names])
    axes.set_yscale("log")
    axes.set_ylabel("ms, one thread, no network")
    axes.margins(y=0.15)
    axes.set_title("median time of a decision")

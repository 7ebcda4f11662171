"""Tables of docs/device.md, docs/scaled.md and README from the records of the demo and of the device search."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.device_page import FOLDER, ROOT
from experiments.markdown import EMPTY, percent, table
from experiments.records import read_folder
from shadowpeft.apps.demo_picture import KEPT, NAMES
from shadowpeft.errors import ConfigError
from shadowpeft.storage import between, write_text

RECORDS = {
    "demo": ROOT / "docs" / "records" / "demo.json",
    "full": ROOT / "docs" / "records" / "demo-full.json",
    "oos": ROOT / "docs" / "records" / "demo-oos.json",
}
SECOND = {name: ROOT / "docs" / "records" / f"second-opinion-{name}.json" for name in ("robot", "oos")}
DECLINED = {name: ROOT / "docs" / "records" / f"declined-{name}.json" for name in ("demo", "full")}
VOTED = {
    (name, part): ROOT / "docs" / "records" / f"voted-{name}{part}.json" for name in ("demo", "full") for part in ("", "-test")
}
FRONTIER = ROOT / "docs" / "records" / "device-frontier.json"
PAGES = {
    ROOT / "README.md": ("demo",),
    ROOT / "docs" / "device.md": ("demo", "calibrated", "full", "oos", "frontier"),
    ROOT / "docs" / "scaled.md": ("joint",),
    ROOT / "docs" / "routing.md": ("second", "declined", "voted"),
}


def share(found: Mapping[str, Any]) -> str:
    """A share in percent with its 95 % interval."""
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def methods(result: Mapping[str, Any]) -> list[str]:
    """The methods of a demo side by side on the test rows."""
    first = result["methods"]["device"]
    head = [
        "%, [95 % interval]",
        f"{first['commands']['n']} commands: right action",
        "English / Chinese",
        f"{first['open_handed_on']['n']} open requests: no action",
        *([f"{first['oos_handed_on']['n']} out of scope: no action"] if "oos_handed_on" in first else []),
        "commands handed on",
        "a decision, one thread",
        "parameters",
    ]
    size, ms = result["size"], result["milliseconds"]
    sizes = {
        "rival": f"{size['rival_parameters'] / 1e6:.1f}M",
        "device": f"{size['edge_parameters'] / 1e6:.0f}M",
        "cloud": f"{(size['base_parameters'] + size['adapter_parameters']) / 1e6:.0f}M",
    }
    if "opinion_parameters" in size:
        sizes["second"] = f"{(size['edge_parameters'] + size['opinion_parameters']) / 1e6:.0f}M"
    lines = []
    for name, title in NAMES.items():
        if name not in result["methods"]:  # a record from before there were second opinions
            continue
        found = result["methods"][name]
        asked = [key for key in ("open_handed_on", "oos_handed_on", "commands_handed_on") if key in found]
        # both together hand on nothing: a request either gets an action or it gets none
        handed = [EMPTY if (name, key) == ("routed", "commands_handed_on") else share(found[key]) for key in asked]
        lines.append(
            [
                title,
                share(found["commands"]),
                f"{100 * found['en']['accuracy']:.1f} / {100 * found['zh']['accuracy']:.1f}",
                *handed,
                f"{ms[name]:.1f} ms" if name in ms else EMPTY,
                sizes.get(name, EMPTY),
            ]
        )
    return table(head, lines)


def calibrated(result: Mapping[str, Any]) -> list[str]:
    """What the calibrated device keeps of the test rows."""
    ways, asked = {}, []
    for kept in (result[key] for key in ("calibrated", "strict") if key in result):
        target = f"{100 * kept['target']:g} %"
        asked.append(target)
        ways[f"{target}: device alone"] = kept.get("alone", kept)
        ways |= {f"{target}: with a second opinion": kept} if "alone" in kept else {}
    lines = [[label, *(share(way[key]) for way in ways.values())] for key, label in KEPT.items()]
    one = 1 if "alone" in result["calibrated"] else 0  # the column that decides where a request goes
    for label, name in (("right, device and cloud together", "routed"), ("right, always cloud", "cloud")):
        row = [EMPTY] * len(ways)
        row[one] = share(result["methods"][name]["commands"])
        lines.append([label, *row])
    about = f"at most {' or '.join(asked)} wrong, level {100 * kept['level']:g} %, {kept['rows']:,} rows"
    return table([f"{about}: % [95 % interval]", *ways], lines)


def frontier(cells: Sequence[Mapping[str, Any]], costs: Mapping[str, Any]) -> list[str]:
    """Layers of the shadow against what the detached model is worth on development rows (the best cell of each depth), and
    what they cost (``costs`` by number of layers)."""
    best: dict[int, Mapping[str, Any]] = {}
    for record in cells:
        layers, found = record["settings"]["layers"], record["curve"][-1]["constrained"]
        if layers not in best or found["commands"]["score"] > best[layers]["curve"][-1]["constrained"]["commands"]["score"]:
            best[layers] = record
    lines = []
    for layers, record in sorted(best.items()):
        last = record["curve"][-1]
        lines.append(
            [
                str(layers),
                f"[{record['name']}](../experiments/records/{record['id']}.json)",
                f"{record['data']['train']['rows']:,}",
                str(last["pass"]),
                percent(last["constrained"]["commands"], interval=True),
                percent(last["constrained"]["open_handed_on"]),
                f"{record['parameters'] / 1e6:.0f}M",
                f"{last['processor_seconds'] / 60:.1f}",
                *(_cost(costs[str(layers)]) if str(layers) in costs else [EMPTY, EMPTY]),
            ]
        )
    lines += [
        [k, "not trained", EMPTY, EMPTY, EMPTY, EMPTY, f"{cost['parameters'] / 1e6:.0f}M", EMPTY, *_cost(cost)]
        for k, cost in costs.items()
        if int(k) not in best
    ]
    lines.sort(key=lambda line: int(line[0]))
    head = [
        "layers", "cell", "rows", "passes", "commands, % [95 %]", "open handed on", "parameters", "processor minutes",
        "a decision, one thread", "attached, of the base's time",
    ]  # fmt: skip
    return table(head, lines)


def _cost(cost: Mapping[str, Any]) -> list[str]:
    return [f"{cost['decision_ms']:.0f} ms", f"{cost['attached_to_base']:.2f}"]


def joint(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Both paths from the same trained shadow, by the mathematics of the correction, on development rows."""
    lines = []
    for record in sorted(records, key=lambda r: r["development"]["attached"]["commands"]["score"]):
        own, found = record["settings"], record["development"]
        is_lora = own.get("method") == "lora"
        lines.append(
            [
                f"[{record['name']}](../experiments/records/device/joint/{record['name']}.json)",
                "LoRA" if is_lora else own.get("variant", "paper"),  # older records have no other
                f"{own['rate']:g}",
                EMPTY if is_lora else "yes" if own["use_update"] else "no",
                str(own["steps"]),
                percent(found["attached"]["commands"], interval=True),
                percent(found["attached"]["open_handed_on"]),
                percent(found["detached"]["commands"]) if "detached" in found else EMPTY,
                f"{record['processor_seconds'] / 60:.1f}",
            ]
        )
    head = [
        "cell", "variant", "rate", "updates", "steps", "attached: commands, % [95 %]", "attached: open requests, no action",
        "detached: commands", "processor minutes",
    ]  # fmt: skip
    return table(head, lines)


WAYS = {
    "device": "device",
    "classifier": "classifier",
    "product, agreement": "both, signal `agreement`",
    "product at every branch": "both, signal `action`",
}
"""Rows of the table about second opinions."""


def second(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a second opinion is worth on validation rows: without requests out of scope, and with a device that learnt them."""
    head = [
        "validation rows, %", "commands right", "open requests, no action", "out of scope, no action", "AUROC",
        "commands kept at 3 %", "at 5 %",
    ]  # fmt: skip
    lines = []
    for name, key in (("robot", "robot"), ("oos", "robot_oos")):
        part = records[name]["validation"][key]
        for way, title in WAYS.items():
            found = part["ways"][way]
            shares = [found.get(f"{what}_handed_on") for what in ("remote", "oos")]
            lines.append(
                [
                    f"{part['n']} of `{key}`: {title}",
                    f"{100 * found['commands_right']:.1f}",
                    *(EMPTY if share is None else f"{100 * share:.1f}" for share in shares),
                    f"{found['auroc']:.3f}",
                    *(f"{100 * found[f'at_{target:g}']['commands_kept']:.1f}" for target in (0.03, 0.05)),
                ]
            )
    return table(head, lines)


def declined(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a device's word changes in the cloud: of open requests and of commands, all splits together."""
    head = ["device", "open requests", "declined by it, %", "the cloud acts by itself, %", "the cloud acts when told, %"]
    head += ["commands", "declined by it", "on these the cloud acts when told"]
    lines = []
    for trained, record in results.items():
        for name, title in (("device", NAMES["device"]), ("second", NAMES["second"])):
            open_, commands = (summed(record, name, kind) for kind in ("remote", "normal"))
            n = open_["rows"]
            shares = [f"{100 * open_[key] / n:.1f}" for key in ("declined", "acts", "acts_with_the_device_s_word")]
            rest = (commands["rows"], commands["declined"], commands["acts_with_the_device_s_word"])
            lines.append([f"`{trained}`: {title}", str(n), *shares, *map(str, rest)])
    return table(head, lines)


def voted(results: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """What the vote of its own shadow changes in the cloud."""
    keys = ("commands_right", "open_without_action")
    lines = []
    for (trained, part), record in results.items():
        for name, title in (("shadow", "shadow alone"), ("cloud", "cloud"), ("voted", "cloud with its shadow's vote")):
            found = record[name]
            rows = f"{'test' if part else 'held-out'}, {found['commands_right']['n']} and {found['open_without_action']['n']}"
            lines.append([f"`{trained}`: {title}", rows, *(share(found[key]) for key in keys)])
    return table(["%, [95 % interval]", "rows", "commands: right action", "open requests: no action"], lines)


def summed(record: Mapping[str, Any], name: str, kind: str) -> dict[str, int]:
    """The counts of a device over the splits of one kind."""
    parts = [found[name] for split, found in record["splits"].items() if split.endswith(kind)]
    return {key: sum(part[key] for part in parts) for key in parts[0]}


def tables() -> dict[str, list[str]]:
    """Every table whose records are there."""
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in RECORDS.items() if file.is_file()}
    cells = [r for r in read_folder(FOLDER) if r["curve"] and r["settings"]["problem"] == "robot"]
    costs = json.loads(FRONTIER.read_text(encoding="utf-8"))["layers"] if FRONTIER.is_file() else {}
    made = {"frontier": frontier(cells, costs), "joint": joint(read_folder(FOLDER / "joint"))}
    if "demo" in results:
        made |= {"demo": methods(results["demo"]), "calibrated": calibrated(results["demo"])}
    if "oos" in results:
        made["oos"] = methods(results["oos"])
    if "full" in results:
        made["full"] = [*methods(results["full"]), "", *calibrated(results["full"])]
    if all(file.is_file() for file in SECOND.values()):
        made["second"] = second({name: json.loads(file.read_text(encoding="utf-8")) for name, file in SECOND.items()})
    if all(file.is_file() for file in DECLINED.values()):
        made["declined"] = declined({name: json.loads(file.read_text(encoding="utf-8")) for name, file in DECLINED.items()})
    if all(file.is_file() for file in VOTED.values()):
        made["voted"] = voted({key: json.loads(file.read_text(encoding="utf-8")) for key, file in VOTED.items()})
    return made


def text(content: str, names: Sequence[str], page: Path) -> str:
    """``content`` with its tables made anew.

    Raises:
        ConfigError: if one of the marks is missing.
    """
    made = tables()
    for name in names:
        marks = (f"<!-- {name} -->", f"<!-- /{name} -->")
        changed = between(content, marks, "\n".join(made.get(name, ["Not run yet."])))
        if changed is None:
            raise ConfigError(f"'{page.name}' lacks the marks {' and '.join(marks)}; put them back")
        content = changed
    return content


def main() -> int:
    """Write the tables."""
    for page, names in PAGES.items():
        write_text(page, text(page.read_text(encoding="utf-8"), names, page))
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

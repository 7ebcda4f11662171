"""``python -m scripts.system_test``."""

from __future__ import annotations

import json
import signal
import sys

from experiments.measuring import stamp
from rich.console import Console
from scripts.system_test import adapters
from scripts.system_test.options import parse, run
from scripts.system_test.servers import measure

from experiments import system
from shadowpeft.apps.common import quiet_libraries
from shadowpeft.apps.demo import REQUESTS
from shadowpeft.runtime import environment, prepare_cpu
from shadowpeft.storage import write_json


def main() -> None:
    """Adapters, servers, requests, results."""
    options = parse()
    quiet_libraries()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended then, too
    prepare_cpu(options.threads)
    console = Console(stderr=True)
    options.out.mkdir(parents=True, exist_ok=True)
    three = adapters.prepare(options, console)
    shadow = three["shadow"]["folder"]
    calibration = adapters.routing(shadow, options)
    edge = adapters.detach(shadow, options.base, options.out / "edge")
    folders = {name: part["folder"] for name, part in three.items()}
    if options.merged:
        folders |= {name: adapters.merge(name, folders[name], options) for name in ("lora", "dora")}
    measured = measure(folders, calibration, options, console)
    ten = measured["requests"].pop("replies")
    write_json(options.out / "replies.json", {"prompts": measured.pop("prompts"), "delays": measured.pop("replies")})
    result = {
        "adapters": three,
        "edge": edge,
        "routing": None if calibration is None else json.loads(calibration.read_text(encoding="utf-8")),
        "merged": options.merged,
        "split": options.split,
        "max_tokens": options.max_tokens,
        "warmup": options.warmup,
        **measured,
        "machine": environment(),
        **stamp(),
    }
    result["requests"]["replies"] = system.record(ten)
    write_json(options.out / "result.json", result)
    table = system.by_delay(result)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    (options.out / "requests.md").write_text(system.side_by_side(REQUESTS, ten), encoding="utf-8")
    system.draw(result, options.out / "system.png")
    print(table, end="")
    console.print(f"saved in {options.out}: result.json, replies.json, table.md, requests.md, system.png")


if __name__ == "__main__":
    run(main)

"""Requests with tools through both servers: ``python -m scripts.system_test.tools ADAPTER --out FILE``.

The cloud serves the attached model, the edge the detached one, with the calibration beside the adapter. Each request brings
the packaged 20 tools (:mod:`shadowpeft.data.robot_tools`) and goes, one at a time and in turns, to the edge, to the cloud
alone, and to the device alone; the classifier with patterns answers beside them without a server. ``--split test`` looks at
test rows, so it is for an adapter whose settings are settled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from experiments.markdown import percent, table
from experiments.measuring import stamp
from rich.console import Console
from scripts.system_test import adapters
from scripts.system_test.options import run
from scripts.system_test.servers import Server

from experiments import system
from shadowpeft.apps.common import bar, quiet_libraries
from shadowpeft.data import robot_tools
from shadowpeft.data.calls import Call, calls_of
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.calls import Judged, Patterns, judge, summary
from shadowpeft.runtime import environment
from shadowpeft.serve.client import CloudClient
from shadowpeft.storage import write_json

SYSTEMS = {name: system.SYSTEMS[name] for name in ("routed", "attached", "device")}
RIVAL = "patterns"
TITLES = {
    "routed": "device, then cloud",
    "attached": "attached, always cloud",
    "device": "always device",
    RIVAL: "classifier and patterns",
}


async def ask(client: CloudClient, one: system.System, prompt: str) -> dict[str, Any]:
    """The calls of one answer (None: they are no valid calls), its milliseconds, and who gave it."""
    body: dict[str, Any] = {
        "model": one.model,
        "messages": [{"role": "system", "content": robot_tools.SYSTEM}, {"role": "user", "content": prompt}],
        "tools": robot_tools.tools().definitions(),
        "max_tokens": 96,
        "temperature": 0,
    }
    if one.route is not None:
        body["route"] = one.route
    began = time.perf_counter()
    answer = await client.ask("/v1/chat/completions", body)
    milliseconds = 1000 * (time.perf_counter() - began)
    message = answer["choices"][0]["message"]
    return {
        "calls": read(message),
        "milliseconds": round(milliseconds, 1),
        "where": answer["shadowpeft"]["where"],
        "reason": answer["shadowpeft"]["reason"],
    }


def read(message: dict[str, Any]) -> tuple[Call, ...] | None:
    """The calls of a message; none for words, None for what looks like calls and is none."""
    if message.get("tool_calls"):
        return calls_of(message["tool_calls"], robot_tools.tools())
    words = (message.get("content") or "").lstrip()
    return None if words.startswith("[") and not words.startswith("[REMOTE]") else ()


def summarised(rows: Sequence[dict[str, Any]], replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How right the calls are, how long they took, and who made them."""
    judged: list[Judged] = [
        judge(reply["calls"], robot_tools.calls_of_row(row)) for row, reply in zip(rows, replies, strict=True)
    ]
    times = [reply["milliseconds"] for reply in replies]
    kept = [(row, one) for row, one, reply in zip(rows, judged, replies, strict=True) if reply["where"] == "device"]
    called = [one for row, one in kept if row["calls"]]
    return {
        **summary(rows, judged),
        "invalid": sum(reply["calls"] is None for reply in replies),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p95_ms": round(float(np.percentile(times, 95)), 1),
        "on_device": len(kept),
        "calls_on_device": len(called),
        "wrong_on_device": sum(not one.exact for _, one in kept),
    }


def measured(options: argparse.Namespace, rows: Sequence[dict[str, Any]], console: Console) -> list[dict[str, Any]]:
    """Summaries of all systems for each delay, from two servers that are ended at the end."""
    key = secrets.token_hex(16)
    environ = {"SHADOWPEFT_API_KEYS": key, "SHADOWPEFT_CLOUD_KEY": key, "OMP_NUM_THREADS": str(options.threads)}
    edge_folder, logs = options.out.with_suffix(".edge"), options.out.with_suffix(".logs")
    shutil.rmtree(edge_folder, ignore_errors=True)
    adapters.detach(options.adapter, None, edge_folder)
    logs.mkdir(exist_ok=True)
    patterns = Patterns(robot_tools.load_set("robot_tools_large", "train"))
    rival = []
    for row in rows:
        began = time.perf_counter()
        (calls,) = patterns.answers([row["prompt"]])
        spent = round(1000 * (time.perf_counter() - began), 1)
        rival.append({"calls": calls, "milliseconds": spent, "where": "device" if calls != () else "cloud", "reason": ""})

    async def all_of(urls: dict[str, str], delay: float) -> dict[str, list[dict[str, Any]]]:
        late = {"edge": 0.0, "cloud": delay / 1000}
        usual = {"timeout": 120.0, "hands_on": False}
        clients = {name: CloudClient(url, key, delay=late[name], **usual) for name, url in urls.items()}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
        try:
            with bar(console, f"requests, network delay {delay:g} ms", len(rows)) as progress:
                for i, row in enumerate(rows):
                    for name in system.turn(list(SYSTEMS), i):
                        one = SYSTEMS[name]
                        found[name].append(await ask(clients[one.server], one, row["prompt"]))
                    progress(i + 1)
        finally:
            for client in clients.values():
                await client.close()
        return found

    delays = []
    with ExitStack() as both:
        known = ["--skills", "robot_tools"]
        arguments = [f"robot={options.adapter}", *known]
        cloud = both.enter_context(Server("cloud", arguments, logs / "cloud.log", environ))
        cloud.wait()
        for delay in options.delays:
            to_cloud = ["--cloud-url", cloud.url, "--cloud-model", "robot", "--cloud-delay-ms", str(delay)]
            arguments = [f"robot={edge_folder}", *to_cloud, "--routing", str(options.routing)]
            arguments += ["--system", robot_tools.SYSTEM]  # of the calibration
            with Server("edge", arguments, logs / f"edge-{delay:g}.log", environ) as edge:
                edge.wait()
                replies = asyncio.run(all_of({"edge": edge.url, "cloud": cloud.url}, delay))
            replies[RIVAL] = rival
            systems = {name: summarised(rows, own) for name, own in replies.items()}
            delays.append({"milliseconds": delay, "systems": systems})
    return delays


def shown(delays: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each delay and system."""
    header = ["network delay, ms", "system", "exactly right", "no call where none is right", "invalid", "p50, ms", "p95, ms"]
    lines = [
        [
            f"{delay['milliseconds']:g}",
            TITLES[name],
            percent(row["calls"], interval=True),
            percent(row["cloud_handed_on"], interval=True),
            str(row["invalid"]),
            f"{row['p50_ms']:.0f}",
            f"{row['p95_ms']:.0f}",
            f"{row['calls_on_device']} of {row['calls']['n']}",
        ]
        for delay in delays
        for name, row in delay["systems"].items()
    ]
    return "\n".join(table([*header, "calls made on the device"], lines)) + "\n"


def main() -> None:
    """Servers, requests, a record and a table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.system_test.tools", description=__doc__.splitlines()[0])
    parser.add_argument("adapter")
    parser.add_argument("--routing", type=Path, help="the calibration (default: routing.json in the adapter's folder)")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--requests", type=int, help="how many, drawn by seed 0 (default: all)")
    parser.add_argument("--delays", type=float, nargs="+", default=[50.0], metavar="MS")
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=Path("tools-system.json"))
    options = parser.parse_args()
    options.routing = options.routing or Path(options.adapter) / "routing.json"
    if not options.routing.is_file():
        raise ConfigError(
            f"there is no calibration '{options.routing}'; make one with: shadowpeft route calibrate {options.adapter} "
            "--skills robot_tools --data robot_tools --target 0.05 --no-cloud"
        )
    quiet_libraries()
    rows = robot_tools.load(options.split)
    if options.requests is not None:
        rows = random.Random(0).sample(rows, min(options.requests, len(rows)))
    delays = measured(options, rows, Console(stderr=True))
    record = {
        "set": "robot_tools",
        "split": options.split,
        "n": len(rows),
        "delays": delays,
        "routing": json.loads(options.routing.read_text(encoding="utf-8")),
        "threads": options.threads,
        "cores": os.cpu_count(),
        "machine": environment(),
        **stamp(),
    }
    write_json(options.out, record)
    print(shown(delays), end="")


if __name__ == "__main__":
    run(main)

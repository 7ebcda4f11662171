"""The two servers as processes, and the requests through them."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from rich.console import Console

from experiments import system
from shadowpeft.apps.common import bar
from shadowpeft.apps.demo import REQUESTS
from shadowpeft.data.tasks import get_task
from shadowpeft.errors import ConfigError, ShadowPeftError

READY_SECONDS = 600
STOP_SECONDS = 30


class Server:
    """``shadowpeft serve`` as a process of its own on an ephemeral port; ends with the ``with`` block, however that ends."""

    def __init__(self, role: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self.role, self.log = role, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "shadowpeft.cli", "serve", *arguments, "--role", role, "--port", str(port)]
        with log.open("ab") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)

    def wait(self) -> None:
        """Return once it takes requests.

        Raises:
            ShadowPeftError: if it ended or took too long; with the end of its log.
        """
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/readyz", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:  # not listening yet
                pass
            time.sleep(0.2)
        why = "is not ready" if self.process.poll() is None else f"ended with status {self.process.returncode}"
        last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ShadowPeftError(f"the {self.role} server {why}; its log {self.log} ends: {' | '.join(last)}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def measure(
    folders: dict[str, str], calibration: Path | None, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Start the servers, send the requests; a summary for each delay, the ten requests and all single replies."""
    task = get_task("robot")
    examples = task.load(options.split, limit=options.requests, seed=options.seed)
    prompts = [e.prompt for e in examples]
    systems = {name: system.SYSTEMS[name] for name in options.systems}
    key = secrets.token_hex(16)
    environment = {"SHADOWPEFT_API_KEYS": key, "SHADOWPEFT_CLOUD_KEY": key}
    if options.threads is not None:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    base = [] if options.base is None else ["--base", options.base]
    known = [] if calibration is None else ["--routing", str(calibration)]
    logs = options.out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    delays, singles, ten = [], {}, {}
    shown = options.delays[len(options.delays) // 2]
    rival = system.ask_rival(prompts)

    async def ask(urls: dict[str, str], delay: float) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        client = system.Client(urls, key, system_message=task.system, max_tokens=options.max_tokens, delay=delay / 1000)
        total = (options.warmup + len(prompts)) * len(systems)
        try:
            with bar(console, f"requests, network delay {delay:g} ms", total) as progress:
                replies = await system.measure(client.ask, systems, prompts, warmup=options.warmup, progress=progress)
            side = {}
            if delay == shown:
                with bar(console, "the ten requests", len(REQUESTS) * len(systems)) as progress:
                    side = await system.measure(client.ask, systems, REQUESTS, warmup=0, progress=progress)
        finally:
            await client.close()
        return replies, side

    with ExitStack() as both:
        console.print("starting the cloud: shadow, LoRA and DoRA")
        cloud_models = [f"robot={folders['shadow']}", f"lora={folders['lora']}", f"dora={folders['dora']}"]
        cloud = both.enter_context(Server("cloud", [*cloud_models, *base], logs / "cloud.log", environment))
        cloud.wait()
        for delay in options.delays:
            console.print(f"starting the edge, {delay:g} ms from the cloud")
            to_cloud = ["--cloud-url", cloud.url, "--cloud-model", "robot", "--cloud-delay-ms", str(delay)]
            arguments = [f"robot={options.out / 'edge'}", *to_cloud, *known, "--system", task.system]
            with Server("edge", arguments, logs / f"edge-{delay:g}.log", environment) as edge:
                edge.wait()
                replies, side = asyncio.run(ask({"edge": edge.url, "cloud": cloud.url}, delay))
                if options.page and side:
                    photograph(edge.url, key, [r for r in REQUESTS if r.isascii()], options.out / "page.png")
            replies[system.RIVAL] = rival  # no server, no network: the same at every delay
            rows = {name: system.summarise(own, examples, task) for name, own in replies.items()}
            delays.append({"milliseconds": delay, "systems": rows})
            singles[f"{delay:g}"] = system.record(replies)
            ten = side or ten
    return {
        "n": len(examples),
        "delays": delays,
        "requests": {"milliseconds": shown, "asked": list(REQUESTS), "replies": ten},
        "prompts": [{"id": e.id, "prompt": e.prompt, "gold": e.gold} for e in examples],
        "replies": singles,
    }


def photograph(url: str, key: str, requests: Sequence[str], file: Path) -> None:
    """The edge's page in a headless Chromium after a few requests.

    Raises:
        ConfigError: if there is no Chromium, or playwright is not installed.
    """
    browser_file = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_file is None or importlib.util.find_spec("playwright") is None:
        raise ConfigError("--page needs a Chromium and playwright; install them, or leave it out")
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        known = {"username": "system-test", "password": key}
        page = browser.new_context(http_credentials=known, viewport={"width": 760, "height": 640}).new_page()
        page.goto(url + "/")
        expect(page.locator("#state")).to_contain_text("cloud: reachable", timeout=60_000)
        for number, request in enumerate(requests, 1):
            page.fill("#text", request)
            page.click("button")
            expect(page.locator("#dialogue li[data-done=true]")).to_have_count(number, timeout=120_000)
        page.screenshot(path=str(file))
        browser.close()

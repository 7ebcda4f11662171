"""The system test: an edge and a cloud server as two processes, and robot requests through shadow, LoRA and DoRA.

    python -m scripts.system_test                                    # trains all three, then measures
    python -m scripts.system_test --shadow A --lora B --dora C       # measures adapters that there are

Adapters that are not given are trained for ``--train-steps`` steps on the robot set: LoRA and DoRA at the shadow's number of
trainable parameters, all on the same rows in the same order. One cloud process serves all three by name, one edge process the
detached shadow. Requests go one by one, the systems taking turns. The folder ``--out`` gets ``result.json``, ``table.md``,
``requests.md`` (the ten requests side by side), ``system.png``, ``replies.json`` and the servers' logs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import secrets
import shutil
import signal
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
from shadowpeft.apps.common import bar, load_tokenizer_of, quiet_libraries
from shadowpeft.apps.demo import REQUESTS, SETTINGS
from shadowpeft.errors import ConfigError, ShadowPeftError
from shadowpeft.storage import write_json

METHODS = ("shadow", "lora", "dora")
SHADOW_ROW_REPEATS = 10
"""As in the experiments: the 47 ``[REMOTE]`` rows are shown ten times an epoch, in every method's order."""
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
        told = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ShadowPeftError(f"the {self.role} server {why}; its log {self.log} ends: {' | '.join(told)}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# --------------------------------------------------------------------------------------------------------------- adapters


def adapters(options: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    """For each method its ``folder`` and, if it was trained here, the summary of its training."""
    given = {name: getattr(options, name) for name in METHODS}
    made: dict[str, dict[str, Any]] = {}
    for name, folder in given.items():
        if folder is not None:
            if not (Path(folder) / "adapter_config.json").is_file():
                raise ConfigError(
                    f"--{name} is '{folder}', which holds no adapter_config.json; give an adapter's folder"
                )
            made[name] = {"folder": folder}
    for name in METHODS:
        if name not in made:
            budget = None if name == "shadow" else parameters(made["shadow"], options.base)
            base = options.base or (base_of(given["shadow"]) if given["shadow"] else SETTINGS["base"])
            made[name] = train(name, base, budget, options, console)
    return {name: made[name] for name in METHODS}


def base_of(shadow: str) -> str:
    """The base that a shadow's adapter names."""
    from shadowpeft.hf.load import read_config

    config = read_config(shadow)
    named = config.base_alias or config.base_model_name_or_path
    if not named:
        raise ConfigError(f"the adapter in '{shadow}' does not name its base; pass --base")
    return str(named)


def parameters(shadow: dict[str, Any], base: str | None) -> int:
    """Trainable parameters of the shadow, which LoRA and DoRA are matched to."""
    import shadowpeft
    from shadowpeft.train.baselines import count_trainable

    if "training" in shadow:
        return int(shadow["training"]["trainable_parameters"])
    return count_trainable(shadowpeft.load(shadow["folder"], base, is_trainable=True))


def train(
    method: str, base_name: str, budget: int | None, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Train an adapter; continue, or take, what an earlier run with the same settings left.

    Raises:
        ConfigError: if the earlier run had others. ShadowPeftError: if training was stopped, or its loss is not finite.
    """
    from shadowpeft.data.tasks import get_task
    from shadowpeft.train import baselines
    from shadowpeft.train.config import TrainingSection
    from shadowpeft.train.run import load_tokenizer

    section = {
        **{k: v for k, v in SETTINGS["training"].items() if k in ("warmup", "scheduler", "log_every")},
        "backbone_lr_ratio": SETTINGS["training"]["backbone_lr_ratio"],
        "learning_rate": getattr(options, f"{method}_rate"),
        "batch_size": options.batch_size,
        "max_steps": options.train_steps,
        "save_every": max(1, options.train_steps // 4),
        "seed": options.seed,
    }
    settings = {
        "base": base_name,
        "budget": budget,
        "shadow": SETTINGS["shadow"] if method == "shadow" else None,
        "shadow_row_repeats": SHADOW_ROW_REPEATS,
        "max_length": options.max_length,
        "training": section,
    }
    folder = options.out / "train" / method
    summary, before = folder / "summary.json", folder / "settings.json"
    if before.is_file() and json.loads(before.read_text(encoding="utf-8")) != settings:
        raise ConfigError(f"'{folder}' was trained with other settings; remove it or choose another --out")
    if summary.is_file():
        return json.loads(summary.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(before, settings)
    task, tokenizer = get_task("robot"), load_tokenizer(base_name)
    examples = [
        e for e in task.load("train") for _ in range(SHADOW_ROW_REPEATS if e.meta.get("path") == "shadow" else 1)
    ]
    data = baselines.encode_examples(task, examples, tokenizer, max_length=options.max_length)
    base = baselines.load_task_base(base_name, task, tokenizer, seed=options.seed)
    fields = SETTINGS["shadow"] if method == "shadow" else {}
    model = baselines.attach(base, method, fields, budget=budget, seed=options.seed)
    console.print(f"{method}: {baselines.count_trainable(model):,} parameters, {options.train_steps} steps")
    done = baselines.train_task(
        model, tokenizer, data, TrainingSection.model_validate(section), folder, console=console, quiet=False
    )
    if not done["finished"]:
        raise ShadowPeftError(f"training of {method} was stopped after {done['steps']} steps; start again")
    if not math.isfinite(done["train_loss"]):
        raise ShadowPeftError(f"the training loss of {method} is {done['train_loss']}; lower --{method}-rate")
    model.save_pretrained(str(folder / "adapter"))
    tokenizer.save_pretrained(str(folder / "adapter"))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    made = {"folder": str(folder / "adapter"), "settings": settings, "training": done}
    write_json(summary, made)
    return made


def merge(name: str, folder: str, options: argparse.Namespace) -> str:
    """A LoRA or DoRA folded into its base, as a folder that the cloud serves under the same name."""
    from peft import PeftConfig, PeftModel

    from shadowpeft.apps.detach import save_edge
    from shadowpeft.hf.base.load import load_base
    from shadowpeft.train.run import load_tokenizer

    base = options.base or PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ConfigError(f"the adapter in '{folder}' does not name its base; pass --base")
    out = options.out / "merged" / name
    save_edge(PeftModel.from_pretrained(load_base(base), folder).merge_and_unload(), load_tokenizer(base), out)
    return str(out)


def detach(shadow: str, options: argparse.Namespace) -> dict[str, Any]:
    """The edge model, in ``edge/`` of the output folder."""
    import shadowpeft
    from shadowpeft.apps.detach import save_edge

    tokenizer = load_tokenizer_of(shadow, options.base)
    return save_edge(shadowpeft.detach(shadowpeft.load(shadow, options.base)), tokenizer, options.out / "edge")


def routing(shadow: str, options: argparse.Namespace) -> Path | None:
    """The calibration: given, made here, found beside the adapter, or none (every known action is kept)."""
    from shadowpeft.serve.router import FILE

    if options.routing is not None:
        return Path(options.routing)
    if options.calibrate is None:
        beside = Path(shadow) / FILE
        return beside if beside.is_file() else None
    from shadowpeft.apps import route

    folder = options.out / "routing"
    route.calibrate(
        shadow,
        data="robot",
        check=None,
        base=options.base,
        target=options.calibrate,
        signal="auto",
        bound=False,
        cloud=False,
        system=None,
        max_new_tokens=16,
        limit=options.calibration_rows,
        out=str(folder),
        device="auto",
        as_json=False,
    )
    return folder / FILE


# ---------------------------------------------------------------------------------------------------------------- measure


def measure(
    folders: dict[str, str], calibration: Path | None, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Start the servers, send the requests; a summary for each delay, the ten requests and all single replies."""
    from shadowpeft.data.tasks import get_task

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

    async def ask(urls: dict[str, str], delay: float) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        client = system.Client(urls, key, system_message=task.system, max_tokens=options.max_tokens, delay=delay / 1000)
        total = (options.warmup + len(prompts)) * len(systems)
        try:
            with bar(console, f"requests, network delay {delay:g} ms", total) as progress:
                found = await system.measure(client.ask, systems, prompts, warmup=options.warmup, progress=progress)
            side = {}
            if delay == shown:
                with bar(console, "the ten requests", len(REQUESTS) * len(systems)) as progress:
                    side = await system.measure(client.ask, systems, REQUESTS, warmup=0, progress=progress)
        finally:
            await client.close()
        return found, side

    with ExitStack() as both:
        console.print("starting the cloud: shadow, LoRA and DoRA")
        cloud_models = [f"robot={folders['shadow']}", f"lora={folders['lora']}", f"dora={folders['dora']}"]
        cloud = both.enter_context(Server("cloud", [*cloud_models, *base], logs / "cloud.log", environment))
        cloud.wait()
        for delay in options.delays:
            console.print(f"starting the edge, {delay:g} ms from the cloud")
            to_cloud = ["--cloud-url", cloud.url, "--cloud-model", "robot", "--cloud-delay-ms", str(delay)]
            arguments = [f"robot={options.out / 'edge'}", *to_cloud, *known]
            with Server("edge", arguments, logs / f"edge-{delay:g}.log", environment) as edge:
                edge.wait()
                found, side = asyncio.run(ask({"edge": edge.url, "cloud": cloud.url}, delay))
                if options.page and side:
                    photograph(edge.url, key, [r for r in REQUESTS if r.isascii()], options.out / "page.png")
            rows = {name: system.summarise(replies, examples, task) for name, replies in found.items()}
            delays.append({"milliseconds": delay, "systems": rows})
            singles[f"{delay:g}"] = system.record(found)
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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options.

    Raises:
        ConfigError: for delays that are negative or twice, or a calibration both given and to be made.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("system-output"))
    parser.add_argument("--base", help="alias, folder or Hub id; default: the adapters' own, to train on smollm2-135m")
    for name in METHODS:
        parser.add_argument(f"--{name}", help="folder of an adapter; default: train one")
        parser.add_argument(f"--{name}-rate", type=float, default=3e-3, help="learning rate (default: 3e-3)")
    parser.add_argument("--train-steps", type=int, default=350, help="of each adapter that is trained (default: 350)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256, help="of a training row, in tokens (default: 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--routing", help="a calibration; default: routing.json beside the shadow's adapter, if it is there"
    )
    parser.add_argument(
        "--calibrate", type=float, metavar="TARGET", help="make one: share of wrong answers on the device"
    )
    parser.add_argument("--calibration-rows", type=int, help="validation requests to calibrate on (default: all)")
    parser.add_argument("--requests", type=int, help="test requests (default: all 324)")
    parser.add_argument("--split", choices=("test", "test_large", "validation"), default="test")
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0, 50, 200], metavar="MS", help="(default: 0 50 200)"
    )
    parser.add_argument("--systems", nargs="+", choices=list(system.SYSTEMS), default=list(system.COMPARED))
    parser.add_argument("--merged", action="store_true", help="fold LoRA and DoRA into their bases before serving them")
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument("--page", action="store_true", help="a picture of the edge's page, page.png; needs a Chromium")
    parser.add_argument("--threads", type=int, help="of each server (default: all cores)")
    options = parser.parse_args(arguments)
    if min(options.delays) < 0 or len(set(options.delays)) < len(options.delays):
        raise ConfigError(f"--delays is {options.delays} but must be different numbers from 0 up, in milliseconds")
    if options.routing is not None and options.calibrate is not None:
        raise ConfigError("--routing and --calibrate are both set; give a calibration or have one made")
    return options


def main() -> None:
    """Adapters, servers, requests, results."""
    options = parse()
    quiet_libraries()
    from shadowpeft.evaluate.record import commit
    from shadowpeft.train.run import prepare_cpu, versions

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended then, too
    prepare_cpu(options.threads)
    console = Console(stderr=True)
    options.out.mkdir(parents=True, exist_ok=True)
    made = adapters(options, console)
    shadow = made["shadow"]["folder"]
    calibration = routing(shadow, options)
    edge = detach(shadow, options)
    folders = {name: part["folder"] for name, part in made.items()}
    if options.merged:
        folders |= {name: merge(name, folders[name], options) for name in ("lora", "dora")}
    found = measure(folders, calibration, options, console)
    ten = found["requests"].pop("replies")
    write_json(options.out / "replies.json", {"prompts": found.pop("prompts"), "delays": found.pop("replies")})
    result = {
        "adapters": made,
        "edge": edge,
        "routing": None if calibration is None else json.loads(calibration.read_text(encoding="utf-8")),
        "merged": options.merged,
        "split": options.split,
        "max_tokens": options.max_tokens,
        "warmup": options.warmup,
        **found,
        "machine": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    result["requests"]["replies"] = system.record(ten)
    write_json(options.out / "result.json", result)
    table = system.table(result)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    (options.out / "requests.md").write_text(system.side_by_side(REQUESTS, ten), encoding="utf-8")
    system.draw(result, options.out / "system.png")
    print(table, end="")
    console.print(f"saved in {options.out}: result.json, replies.json, table.md, requests.md, system.png")


if __name__ == "__main__":
    try:
        main()
    except ShadowPeftError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2 if isinstance(failure, ConfigError) else 1)

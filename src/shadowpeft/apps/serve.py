"""``shadowpeft serve``: the cloud's or the edge's server."""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shadowpeft.apps.common import load_tokenizer_of, pick_device, placed, quiet_libraries
from shadowpeft.errors import ConfigError

KEYS, ADMIN_KEYS, CLOUD_KEY = "SHADOWPEFT_API_KEYS", "SHADOWPEFT_ADMIN_KEYS", "SHADOWPEFT_CLOUD_KEY"
_SHORTEST_KEY = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Options:
    """The command's options, as given; defaults as there."""

    adapters: list[str]
    role: str
    base: str | None = None
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    auth: bool = True
    cloud_url: str | None = None
    cloud_model: str = "default"
    cloud_timeout: float = 30.0
    cloud_delay_ms: float = 0.0
    when_cloud_down: str = "local"
    routing: str | None = None
    skills: str | None = None
    versions: str | None = None
    system: str | None = None
    rows: int = 16
    batches: int = 4
    queue: int = 64
    prompt_tokens: int = 2048
    new_tokens: int = 512
    default_tokens: int = 64
    answer_seconds: float = 120.0
    drain_seconds: float = 30.0


def main(options: Options) -> None:
    """Load, then serve until a signal."""
    app = application(options, read_keys(options))
    from shadowpeft.serve.server import serve

    names = app.state.server.role.engine.backend.names
    Console(stderr=True).print(
        f"{options.role}: {', '.join(names)} on http://{options.host}:{options.port}", highlight=False
    )
    serve(app, options.host, options.port, options.drain_seconds)


def application(options: Options, keys: Any, **more: Any) -> Any:
    """The FastAPI application of these options, its models loaded; it starts and stops its engine by itself.

    Args:
        keys: :class:`~shadowpeft.serve.guard.Keys`. more: further fields of :class:`~shadowpeft.serve.server.Settings`.

    Raises:
        ConfigError: for options that contradict each other, or a package that is not there.
    """
    named = parse_adapters(options.adapters)
    _check(options, named)
    for package in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"serve needs {package}, which is not installed; run: pip install 'shadowpeft[serve]'")
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("shadowpeft.serve").setLevel(logging.INFO)
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.serve.engine import Engine, Limits
    from shadowpeft.serve.server import Settings, build

    prepare_cpu()
    limits = Limits(
        rows=options.rows,
        batches=options.batches,
        queue=options.queue,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        answer_seconds=options.answer_seconds,
    )
    router = _router(options, named) if options.role == "edge" else None
    make = _cloud_backend if options.role == "cloud" else _edge_backend
    backend = make(named, options.base, pick_device(options.device))
    role = _role(options, router, Engine(backend, limits))
    settings = Settings(
        keys=keys,
        versions=Path(options.versions) if options.versions else None,
        requests=options.rows + options.queue,
        drain_seconds=options.drain_seconds,
        **more,
    )
    return build(role, settings)


def parse_adapters(given: list[str]) -> dict[str, str]:
    """``NAME=FOLDER`` or ``FOLDER`` (called ``default``) to name -> folder.

    Raises:
        ConfigError: for a name that is no name, or stands twice.
    """
    named: dict[str, str] = {}
    for item in given:
        name, equals, folder = item.partition("=")
        name, folder = (name, folder) if equals and _NAME.fullmatch(name) else ("default", item)
        if name in named:
            raise ConfigError(f"two adapters are called '{name}'; write NAME=FOLDER for each")
        named[name] = folder
    return named


def read_keys(options: Options) -> Any:
    """The keys in the environment.

    Raises:
        ConfigError: if there are none and the server was not told to go without, or it can be reached from elsewhere.
    """
    from shadowpeft.serve.guard import Keys

    found = {}
    for variable in (KEYS, ADMIN_KEYS):
        found[variable] = tuple(k.strip() for k in os.environ.get(variable, "").split(",") if k.strip())
        if any(len(k) < _SHORTEST_KEY for k in found[variable]):
            raise ConfigError(f"a key in {variable} is shorter than {_SHORTEST_KEY} characters; choose a longer one")
    if not options.auth:
        if not _is_loopback(options.host):
            raise ConfigError(f"--no-auth needs a loopback host but --host is '{options.host}'; set {KEYS} instead")
        return Keys(None, found[ADMIN_KEYS])
    if not found[KEYS]:
        raise ConfigError(
            f"{KEYS} is not set; put keys there, separated by commas, or pass --no-auth on a loopback host"
        )
    return Keys(found[KEYS], found[ADMIN_KEYS])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(options: Options, named: dict[str, str]) -> None:
    if options.role not in ("cloud", "edge"):
        raise ConfigError(f"role is '{options.role}' but must be cloud or edge")
    if options.role == "cloud" and (options.cloud_url or options.routing or options.skills is not None):
        raise ConfigError("--cloud-url, --routing and --skills belong to the edge; leave them out or set --role edge")
    if options.cloud_url and not re.fullmatch(r"https?://[^/\s]+(/.*)?", options.cloud_url):
        raise ConfigError(f"--cloud-url is '{options.cloud_url}' but must be like http://host:8000")
    if options.role == "edge" and len(named) > 1:
        raise ConfigError(f"{len(named)} adapters were given but an edge server has one; start one for each")
    if options.when_cloud_down not in ("local", "error"):
        raise ConfigError(f"when-cloud-down is '{options.when_cloud_down}' but must be local or error")
    if options.versions and not Path(options.versions).is_dir():
        raise ConfigError(f"the --versions folder '{options.versions}' does not exist")
    if options.default_tokens > options.new_tokens:
        raise ConfigError(
            f"--default-tokens is {options.default_tokens} but --new-tokens allows {options.new_tokens}; lower one or raise "
            "the other"
        )


def _cloud_backend(named: dict[str, str], base: str | None, where: Any) -> Any:
    from shadowpeft.serve.backend import Attached, Several
    from shadowpeft.serve.loading import is_edge_folder, is_lora, load_adapters

    plain = {name: folder for name, folder in named.items() if is_edge_folder(folder) or is_lora(folder)}
    shadows = {name: folder for name, folder in named.items() if name not in plain}
    members: list[Any] = []
    if shadows:
        tokenizer = load_tokenizer_of(next(iter(shadows.values())), base)
        members.append(Attached(placed(load_adapters(shadows, base), where), tokenizer, shadows, "base"))
    members += [_plain(name, folder, base, where) for name, folder in plain.items()]
    return members[0] if len(members) == 1 else Several(members)


def _plain(name: str, folder: str, base: str | None, where: Any) -> Any:
    from shadowpeft.serve.backend import Detached
    from shadowpeft.serve.loading import is_lora, load_edge, load_lora

    lora = is_lora(folder)
    model, tokenizer = load_lora(folder, base) if lora else load_edge(folder)
    return Detached(placed(model, where), tokenizer, name, None if lora else folder)


def _edge_backend(named: dict[str, str], base: str | None, where: Any) -> Any:
    import shadowpeft
    from shadowpeft.serve.backend import Detached
    from shadowpeft.serve.loading import is_edge_folder, load_edge

    name, folder = next(iter(named.items()))
    if is_edge_folder(folder):
        model, tokenizer = load_edge(folder)
        return Detached(placed(model, where), tokenizer, name, folder)
    tokenizer = load_tokenizer_of(folder, base)
    return Detached(placed(shadowpeft.detach(shadowpeft.load(folder, base)), where), tokenizer, name)


def _router(options: Options, named: dict[str, str]) -> Any:
    """The edge's router: its calibration, and the skills that this was made for; without one, ``--skills`` or the packaged."""
    from shadowpeft.data.actions import parser, read_skills
    from shadowpeft.data.robot import SKILLS
    from shadowpeft.serve.router import FILE, Calibration, Router

    skills = None if options.skills is None else read_skills(options.skills)
    beside = Path(next(iter(named.values()))) / FILE
    file = Path(options.routing) if options.routing else beside if beside.is_file() else None
    calibration = Calibration.load(file) if file else None
    if calibration is not None:
        fitted = calibration.skills or SKILLS
        differing = sorted(set(skills or fitted) ^ set(fitted))
        if differing:
            whose = "its own" if calibration.skills else "the packaged"
            raise ConfigError(
                f"--skills '{options.skills}' contradicts the calibration '{file}', which has {whose} {len(fitted)} skills "
                f"({differing[0]} is in one of them only); leave --skills out, or calibrate again with it"
            )
        skills = fitted
    told = {"calibration": str(file) if file else None, "skills": len(skills or SKILLS), "cloud": options.cloud_url}
    logging.getLogger("shadowpeft.serve").info("edge %s", json.dumps(told))
    return Router(parser(skills or SKILLS), calibration)


def _role(options: Options, router: Any, engine: Any) -> Any:
    from shadowpeft.serve.client import Cloud
    from shadowpeft.serve.roles import CloudRole, EdgeRole

    shared: dict[str, Any] = {"system": options.system, "default_tokens": options.default_tokens}
    if options.role == "cloud":
        return CloudRole(engine, **shared)
    cloud = None
    if options.cloud_url:
        cloud = Cloud(
            options.cloud_url,
            os.environ.get(CLOUD_KEY),
            timeout=options.cloud_timeout,
            delay=options.cloud_delay_ms / 1000,
            answer_seconds=options.answer_seconds,
        )
    return EdgeRole(
        engine,
        router,
        cloud,
        options.cloud_model,
        when_down=options.when_cloud_down,
        **shared,
    )

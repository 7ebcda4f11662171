"""``shadowpeft serve``: the cloud's or the edge's server."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from shadowpeft.apps.common import config_of, load_tokenizer_of, pick_device, placed, quiet_libraries, system_message
from shadowpeft.errors import ConfigError
from shadowpeft.messages import did_you_mean
from shadowpeft.serve.listener import Listener
from shadowpeft.serve.options import Options, without_password
from shadowpeft.terminal import terminal

KEYS, ADMIN_KEYS, CLOUD_KEY = "SHADOWPEFT_API_KEYS", "SHADOWPEFT_ADMIN_KEYS", "SHADOWPEFT_CLOUD_KEY"
_SHORTEST_KEY = 16


def main(options: Options) -> None:
    """Load, then serve until a signal."""
    with closing(Listener(options.host, options.port)) as listener:
        app = application(options, read_keys(options), before_loading=listener.bind)
        from shadowpeft.serve.connections import serve

        names = app.state.server.role.engine.backend.names
        listener.listen()
        terminal(stderr=True).print(f"{options.role}: {', '.join(names)} on {listener.url}", highlight=False)
        serve(app, listener, options.drain_seconds)


def application(options: Options, keys: Any, before_loading: Callable[[], object] = lambda: None, **more: Any) -> Any:
    """The FastAPI application of these options, its models loaded; it starts and stops its engine by itself.

    Args:
        keys: :class:`~shadowpeft.serve.guard.Keys`. before_loading: called once the options are found to be good, before any
            model is loaded, which takes its time. more: further fields of :class:`~shadowpeft.serve.server.Settings`.

    Raises:
        ConfigError: for options that contradict each other, or a package that is not there.
    """
    options.check()
    for package in ("fastapi", "uvicorn", "httpx", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"serve needs {package}, which is not installed; run: pip install 'shadowpeft[serve]'")
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("shadowpeft.serve").setLevel(logging.INFO)
    from shadowpeft.data.action_trie import ActionTrie
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.serve.engine import Engine, EngineLimits
    from shadowpeft.serve.loading import check_calls
    from shadowpeft.serve.server import Settings, build

    prepare_cpu()
    limits = EngineLimits(
        max_num_seqs=options.rows,
        batches=options.batches,
        queue=options.queue,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        answer_seconds=options.answer_seconds,
        speculative=options.speculative,
    )
    edge = options.role == "edge"
    given = _tools(options)
    router, skills, tools, opinion = _router(options, given) if edge else (None, None, given, None)
    load_backend = _cloud_backend if options.role == "cloud" else _edge_backend

    def suits(folder: str) -> None:
        if tools is not None:
            check_calls(folder)
        _check_learnt(folder, given, packaged=router is not None and router.calibration is None)

    for folder in options.named.values():
        suits(folder)
    # links are followed once, so that configuration and weights are of one version whatever happens to the link
    named = {n: str(Path(f).resolve()) if Path(f).is_dir() else f for n, f in options.named.items()}
    device = pick_device(options.device)
    before_loading()
    backend = load_backend(named, options.base, device)
    backend.suits = suits  # of what comes later, too
    actions = None if skills is None else ActionTrie.of(backend.tokenizer, skills, opinion)
    if options.vote:
        if all(backend.shadow(name) is None for name in backend.names):
            raise ConfigError("--vote was given but no adapter here has a shadow beside its base; leave it out")
        actions = ActionTrie.of(backend.tokenizer, tools.names)
    role = _role(options, router, Engine(backend, limits), actions, tools)
    settings = Settings(
        keys=keys,
        versions=Path(options.versions) if options.versions else None,
        requests=options.rows
        + options.queue
        + len(backend.names),  # beyond the queue each name may have one that waits
        drain_seconds=options.drain_seconds,
        origins=tuple(options.allow_origin or ()),
        **more,
    )
    return build(role, settings)


def read_keys(options: Options) -> Any:
    """The keys in the environment.

    Raises:
        ConfigError: if there are none and the server was not told to go without, or it can be reached from elsewhere.
    """
    from shadowpeft.serve.guard import Keys

    keys = {}
    for variable in (KEYS, ADMIN_KEYS):
        keys[variable] = tuple(k.strip() for k in os.environ.get(variable, "").split(",") if k.strip())
        if any(len(k) < _SHORTEST_KEY for k in keys[variable]):
            raise ConfigError(f"a key in {variable} is shorter than {_SHORTEST_KEY} characters; choose a longer one")
    if not options.auth:
        if not options.on_loopback:
            raise ConfigError(f"--no-auth needs a loopback host but --host is '{options.host}'; set {KEYS} instead")
        return Keys(None, keys[ADMIN_KEYS])
    if not keys[KEYS]:
        raise ConfigError(
            f"{KEYS} is not set; put keys there, separated by commas, or pass --no-auth on a loopback host"
        )
    return Keys(keys[KEYS], keys[ADMIN_KEYS])


def _cloud_backend(named: dict[str, str], base: str | None, where: Any) -> Any:
    from shadowpeft.serve.backend import Attached, Detached
    from shadowpeft.serve.loading import is_edge_folder, is_lora, load_adapters, load_edge, load_lora
    from shadowpeft.serve.router import DETACHED, LORA
    from shadowpeft.serve.several_backends import MultiBackend
    from shadowpeft.serve.versions import own_memory

    plain = {name: folder for name, folder in named.items() if is_edge_folder(folder) or is_lora(folder)}
    shadows = {name: folder for name, folder in named.items() if name not in plain}
    members: list[Any] = []
    if shadows:
        tokenizer = load_tokenizer_of(next(iter(shadows.values())), base)
        members.append(Attached(placed(own_memory(load_adapters(shadows, base)), where), tokenizer, shadows, "base"))
    for name, folder in plain.items():
        lora = is_lora(folder)
        model, tokenizer = load_lora(folder, base) if lora else load_edge(folder)
        kind = LORA if lora else DETACHED
        members.append(Detached(placed(own_memory(model), where), tokenizer, name, None if lora else folder, kind=kind))
    return members[0] if len(members) == 1 else MultiBackend(members)


def _edge_backend(named: dict[str, str], base: str | None, where: Any) -> Any:
    import shadowpeft
    from shadowpeft.serve.backend import Detached
    from shadowpeft.serve.loading import check_answers, is_edge_folder, load_edge
    from shadowpeft.serve.versions import own_memory

    name, folder = next(iter(named.items()))
    if is_edge_folder(folder):
        model, tokenizer = load_edge(folder)
        return Detached(placed(own_memory(model), where), tokenizer, name, folder)
    check_answers(folder)
    tokenizer = load_tokenizer_of(folder, base)
    model = own_memory(shadowpeft.detach(shadowpeft.load(folder, base)))
    return Detached(placed(model, where), tokenizer, name)


def _router(options: Options, given: Any) -> tuple[Any, tuple[str, ...] | None, Any, Any]:
    """The edge's router; the skills among which the device chooses; the tools that it was trained to call; the second
    opinion of its calibration. All but the first may be None.

    The calibration names the actions; without one ``--skills`` does, or they are the packaged. The device chooses where the
    calibration says so (its signal is ``action``), and without one where ``--skills`` names them: otherwise the model may be
    one that was made for no skills at all. Actions with arguments are always chosen. ``given``: those of ``--skills``, or None.
    """
    from shadowpeft.data.actions import parser
    from shadowpeft.data.calls import CallParser
    from shadowpeft.data.robot import SKILLS
    from shadowpeft.data.tools import named, tools_of
    from shadowpeft.serve.loading import opinion_of
    from shadowpeft.serve.router import CHOSEN, FILE, Calibration, Router

    chooses = given is not None
    beside = Path(next(iter(options.named.values()))) / FILE
    file = Path(options.routing) if options.routing else beside if beside.is_file() else None
    calibration = Calibration.load(file) if file else None
    opinion = opinion_of(calibration, file)
    known = given or named(SKILLS)
    if calibration is not None:
        _check_system(options.system, system_message(next(iter(options.named.values())), options.system), calibration, file)
        fitted = named(calibration.skills or SKILLS)
        if calibration.tools is not None:
            fitted = tools_of(list(calibration.tools), f"'{file}'")
        names = sorted(set(fitted.names if given is None else given.names) ^ set(fitted.names))
        differing = names[0] if names else None if given is None else given.lack(fitted)
        if differing is not None:
            whose = "its own" if calibration.skills or calibration.tools else "the packaged"
            raise ConfigError(
                f"--skills '{options.skills}' contradicts the calibration '{file}', which has {whose} {len(fitted)} skills "
                f"({differing} is in one of them only); leave --skills out, or calibrate again with it"
            )
        known, chooses = fitted, calibration.signal in CHOSEN
        if chooses and options.free_actions:
            raise ConfigError(
                f"--free-actions contradicts the calibration '{file}', which is for chosen actions (its signal is "
                f"'{calibration.signal}'); leave it out, or calibrate with --signal logprob"
            )
    if options.free_actions and not known.plain:
        raise ConfigError(
            "--free-actions was given but the actions have arguments, which are always chosen; leave it out"
        )
    chooses = chooses and not options.free_actions
    cloud = without_password(options.cloud_url) if options.cloud_url else None
    facts: dict[str, Any] = {"calibration": str(file) if file else None, "second_opinion": opinion is not None}
    facts |= {"skills": len(known), "chooses": chooses, "cloud": cloud}
    log = logging.getLogger("shadowpeft.serve")
    log.info("edge %s", json.dumps(facts))
    if calibration is None and cloud is not None:
        log.warning(
            "the edge has no calibration, so it keeps every known action, however unsure; make one with shadowpeft route "
            "calibrate, or pass --routing FILE"
        )
    if calibration is not None and calibration.threshold > 1:
        log.warning(
            "the calibration '%s' keeps nothing on the device, so %s; calibrate again with more rows, a larger --target or a "
            "shadow that trained longer",
            file,
            "every answer is marked degraded: there is no cloud" if cloud is None else "every request goes to the cloud",
        )
    if not known.plain:
        return Router(CallParser(known), calibration), None, known, None
    return Router(parser(known.names), calibration), known.names if chooses else None, known if chooses else None, opinion


def _check_system(given: str | None, system: str | None, calibration: Any, file: Any) -> None:
    """Requests may bring a system message of their own; this is about those that bring none.

    Args:
        given: ``--system``. system: what they get.

    Raises:
        ConfigError: if the calibration was made with another one. Older calibrations do not say.
    """
    made = calibration.report.get("system", system)
    if made != system:
        here = f"--system is {given!r}" if given is not None else "--system is not given"
        here += f" and the model was trained under {system!r}" if given is None and system is not None else ""
        remedy = f"pass --system {made or ''!r}"
        raise ConfigError(
            f"the calibration '{file}' was made with {'no system message' if made is None else f'the system message {made!r}'} "
            f"but {here}; {remedy}, or calibrate again with the other"
        )


def _check_learnt(folder: str, given: Any, *, packaged: bool) -> None:
    """The actions of a server are such as its model has learnt, where the model records them.

    Args:
        given: those of ``--skills``, or None. packaged: whether the packaged ones count where none are given.

    Raises:
        ConfigError: if one is not.
    """
    from shadowpeft.data.robot import SKILLS

    learnt = config_of(folder).get("actions")
    if not isinstance(learnt, list) or (given is None and not packaged):
        return
    others = [name for name in (SKILLS if given is None else given.names) if name not in learnt]
    if others and given is None:
        raise ConfigError(
            f"'{folder}' has learnt {len(learnt)} actions of its own ({', '.join(learnt[:3])}, ...) but the packaged ones "
            "would count; name its own with --skills FILE, or pass a calibration (--routing), which knows them"
        )
    if others:
        raise ConfigError(
            f"--skills has the action {others[0]}, which '{folder}' has not learnt{did_you_mean(others[0], learnt)}; it has "
            f"learnt {', '.join(learnt[:20])}{', ...' if len(learnt) > 20 else ''}: leave the others out, or train with them"
        )


def _tools(options: Options) -> Any:
    """The actions that ``--skills`` names, with or without arguments; None without it."""
    from shadowpeft.data.robot_tools import tools_named

    return None if options.skills is None else tools_named(options.skills)


def _role(options: Options, router: Any, engine: Any, actions: Any, tools: Any) -> Any:
    from shadowpeft.serve.client import CloudClient
    from shadowpeft.serve.cloud_role import CloudRole
    from shadowpeft.serve.edge_role import EdgeRole

    shared: dict[str, Any] = {"system": options.system, "default_tokens": options.default_tokens, "tools": tools}
    if options.role == "cloud":
        return CloudRole(engine, vote=actions, **shared)
    cloud = None
    if options.cloud_url:
        cloud = CloudClient(
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
        actions=actions,
        hint=options.hint,
        **shared,
    )

"""``shadowpeft route calibrate``: fit the confidence of a device's answers and choose what it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shadowpeft.apps.common import bar, load_tokenizer_of, pick_device, placed, quiet_libraries, system_message
from shadowpeft.apps.options import Base, Device, Json, System
from shadowpeft.data.actions import REMOTE, parser
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.storage import require_writable
from shadowpeft.terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console

_FREELY, _CHOOSING, _ALONE, _CLOUD = "device", "device, choosing", "device alone", "cloud"
"""Who is asked: the device answers freely, or chooses among the known actions, with a second opinion or without it."""
LONGEST_CALLS = 96
"""Tokens of an answer that calls tools; what is longer counts as no call."""


def calibrate(
    source: Annotated[str, typer.Argument(help="Folder of an adapter, or of an edge model.")],
    target: Annotated[float, typer.Option(help="Largest share of wrong answers among those on the device.")] = 0.05,
    data: Annotated[
        str,
        typer.Option(
            help="JSONL file with prompt and skill, or chat rows with calls (docs/tools.md); robot or robot_oos: the packaged "
            "calibration rows; robot_tools: its validation rows."
        ),
    ] = "robot",
    check: Annotated[
        Optional[str],
        typer.Option(help="Further rows to measure the choice on: a JSONL file; robot, robot_oos, robot_tools: the test set."),
    ] = None,
    base: Base = None,
    signal: Annotated[
        str, typer.Option(help="auto, action, agreement, logprob, mean_logprob, min_logprob, margin or entropy.")
    ] = "auto",
    bound: Annotated[
        bool,
        typer.Option(help="Hold the target for requests to come, at --level; or its plain share on the data only."),
    ] = True,
    level: Annotated[float, typer.Option(help="Probability that the bound holds.")] = 0.95,
    cloud: Annotated[bool, typer.Option(help="Ask the attached model too, for the accuracy of the whole.")] = True,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use this many rows, drawn with a fixed seed.")] = None,
    out: Annotated[Optional[str], typer.Option(help="Folder for the result. Default: beside the adapter.")] = None,
    device: Device = "auto",
    skills: Annotated[
        Optional[str],
        typer.Option(
            help="File of the known actions: names, one a line or a JSON list, or tools with arguments; robot (default): the "
            "packaged 34; robot_tools: the packaged 20 with arguments."
        ),
    ] = None,
    second_opinion: Annotated[
        Optional[str],
        typer.Option(
            help="Rows that the device was trained on: a JSONL file, robot or robot_oos. A linear classifier learns them; its "
            "chances weigh the device's (docs/routing.md)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit a confidence on held-out requests and choose which answers stay on the device."""
    quiet_libraries()
    from shadowpeft.apps import second_opinion as second
    from shadowpeft.apps.intents import read_intents
    from shadowpeft.data.robot_tools import tools_named
    from shadowpeft.serve.bound import choosing_rows, require_rows
    from shadowpeft.serve.loading import check_calls
    from shadowpeft.serve.router import ACTION, AGREEMENT, ALL, CHOSEN, FILE, SIGNALS
    from shadowpeft.versions import require_sklearn

    if not 0 <= target <= 1:
        raise ConfigError(f"target is {target} but must be a share from 0 to 1, such as 0.05")
    if signal not in ("auto", *ALL):
        raise ConfigError(f"signal is '{signal}' but must be auto or one of {', '.join(ALL)}")
    known = None if skills in (None, "robot") else tools_named(str(skills))
    tools = None if known is None or known.plain else known
    own = None if known is None or tools is not None else known.names
    if second_opinion is not None:
        if tools is not None:
            raise ConfigError("--second-opinion knows nothing of arguments but the actions of --skills have some; leave it out")
        if signal not in ("auto", *CHOSEN):
            raise ConfigError(f"--second-opinion weighs chosen actions but --signal is {signal}; leave one of them out")
        signal = AGREEMENT if signal == "auto" else signal
    elif signal == AGREEMENT:
        raise ConfigError(f"signal is '{signal}' but there is no second opinion; pass --second-opinion ROWS, or another signal")
    if tools is not None and signal not in ("auto", ACTION):
        raise ConfigError(
            f"signal is '{signal}' but actions with arguments are always chosen; leave it out, or set it to {ACTION}"
        )
    signal = ACTION if tools is not None else signal
    if known is not None:
        check_calls(source)
    require_sklearn("route calibrate")
    folder = Path(out or source)
    if out is None and not folder.is_dir():
        raise ConfigError(f"'{folder}' is not a folder, so the calibration cannot be saved there; pass --out")
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    console = terminal(stderr=True)
    rows = {"fit": read_intents(data, "fit", limit, own, tools)}
    rows["fit"], copies = _each_once(rows["fit"], data, console)
    learnt = [] if second_opinion is None else second.learning_rows(second_opinion, own)
    rows["fit"], left_out = second.not_learnt(rows["fit"], learnt, data, console)
    about_data: dict[str, Any] = {"data": Path(data).name, "copies": copies}
    about_data |= {} if second_opinion is None else {"learnt_already": left_out}
    if bound:
        require_rows([row["skill"] == REMOTE for row in rows["fit"]], target=target, level=level, signal=signal)
    if check is not None:
        rows["check"], _ = _each_once(read_intents(check, "check", limit, own, tools), check, console)
        rows["check"], seen = _unseen(rows["check"], rows["fit"], check, console)
        rows["check"], left_out = second.not_learnt(rows["check"], learnt, check, console)
        about_check: dict[str, Any] = {"data": Path(check).name, "seen_in_data": seen}
        about_check |= {} if second_opinion is None else {"learnt_already": left_out}
    from shadowpeft.data.action_trie import ActionTrie
    from shadowpeft.data.call_guide import Engine
    from shadowpeft.data.calls import CallParser
    from shadowpeft.data.robot import SKILLS
    from shadowpeft.data.second_opinion import discard_others
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.serve import calibration as fitting
    from shadowpeft.serve.calibrated import sketch
    from shadowpeft.train.rows import system_of

    prepare_cpu()
    where = pick_device(device)
    system = system_message(source, system_of(data, system))
    edge, in_cloud = _backends(source, base, cloud, where)
    parse: Any = parser(own or SKILLS) if tools is None else CallParser(tools)
    trie: Any = None
    if tools is not None:
        trie = Engine(edge.tokenizer, edge.model.config.get_text_config().vocab_size).calls(tools, hand_on=True)
    elif signal not in SIGNALS:
        trie = ActionTrie.of(edge.tokenizer, own or SKILLS)
    asked: dict[str, tuple[Any, Any]] = {} if signal in CHOSEN else {_FREELY: (edge, None)}
    asked |= {} if trie is None else {_CHOOSING: (edge, trie)}
    opinion = None if second_opinion is None else second.fitted(learnt, second_opinion, console)
    if opinion is not None:
        asked |= {_CHOOSING: (edge, ActionTrie.of(edge.tokenizer, own or SKILLS, opinion)), _ALONE: (edge, trie)}
    by_way: dict[str, dict[str, list[Any]]] = {way: {} for way in asked}
    asked |= {} if in_cloud is None else {_CLOUD: (in_cloud, None)}
    for name, part in rows.items():
        texts: dict[str, list[Any]] = {}
        for side, (backend, actions) in asked.items():
            if side == _ALONE and name != "fit":  # it is told of the fit alone
                continue
            tokens = _tokens(max_new_tokens, actions, tools, side)
            label = f"{name}, {side}"
            texts[side] = _answers(backend, part, parse, system, tokens, label, console, as_json, actions)
        for way, parts in by_way.items():
            if way not in texts:
                continue
            in_the_cloud = texts.get(_CLOUD, [None] * len(part))
            triples = zip(part, texts[way], in_the_cloud, strict=True)
            weighed = opinion is not None and way == _CHOOSING
            parts[name] = [_sample(row, answer, other, way, parse, weighed=weighed) for row, answer, other in triples]
    alone = by_way.pop(_ALONE, None)
    # rows that choose between the two ways are not tested
    compared = choosing_rows(len(rows["fit"]), signal, 0) if bound else range(len(rows["fit"]))
    best = fitting.best_signal(_areas(by_way, compared)) if signal == "auto" else signal
    samples = by_way[_CHOOSING if best in CHOSEN else _FREELY]
    fitted = fitting.calibrate(samples["fit"], target=target, signal=signal, bound=bound, level=level)
    calibration = replace(fitted, skills=own, tools=None if tools is None else tuple(tools.definitions()))
    if opinion is not None and alone is not None:
        about = {"rows": len(learnt), "parameters": opinion.parameters}
        calibration.report["second_opinion"] = {**about, "without": second.without(alone["fit"], target, bound, level)}
    calibration.report.update(
        about_data,
        signals_auroc=_areas(by_way, range(len(rows["fit"]))),
        source=Path(source).name,
        max_new_tokens=max_new_tokens,
        system=system,
        model=sketch(edge.model),
    )
    shown = "fit"
    if check is not None:
        calibration.report["check"] = {**about_check, **fitting.check(calibration, samples["check"])}
        shown = "check"
    calibration.report["curve"] = fitting.curve(calibration, samples[shown])
    if opinion is not None:
        calibration = replace(calibration, opinion=opinion.save(folder))
    calibration.save(folder / FILE)
    discard_others(folder, calibration.opinion)
    card = Path(source) / "README.md"
    if out is None and card.is_file():  # of an adapter
        from shadowpeft.storage import write_text
        from shadowpeft.train.card import with_calibration

        write_text(card, with_calibration(card.read_text(encoding="utf-8"), calibration.report))
    picture = (folder / FILE).with_suffix(".png")
    fitting.plot(calibration, samples[shown], picture, f"cost and quality ({shown} data, n = {len(samples[shown])})")
    result = {
        "signal": calibration.signal,
        "threshold": calibration.threshold,
        **{key: value for key, value in calibration.report.items() if key != "model"},
        "saved": str(folder / FILE),
    }
    if known is not None:
        result["skills"] = list(known.names)
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    _print(calibration, terminal())
    console.print(f"saved: {folder / FILE}, {picture}")


def _each_once(rows: list[dict[str, Any]], source: str, console: Console) -> tuple[list[dict[str, Any]], int]:
    """Rows with each prompt once, and how many copies were left out: copies are no evidence of other requests."""
    from shadowpeft.apps.intents import distinct

    kept = distinct(rows)
    copies = len(rows) - len(kept)
    if copies:
        console.print(f"'{source}': {copies} of {len(rows)} rows repeat a prompt; each prompt counts once")
    return kept, copies


def _unseen(
    rows: list[dict[str, Any]], fitted: list[dict[str, Any]], source: str, console: Console
) -> tuple[list[dict[str, Any]], int]:
    """Rows to measure on without those whose prompt the threshold is fitted on, and how many these were.

    Raises:
        DataError: if there are no others.
    """
    from shadowpeft.apps.intents import distinct

    kept = distinct(rows, without=fitted)
    seen = len(rows) - len(kept)
    if not kept:
        raise DataError(
            f"every prompt of --check '{source}' is one of --data too, so it measures nothing new; give rows that had no part "
            "in the fit, or leave --check out"
        )
    if seen:
        console.print(f"'{source}': {seen} of {len(rows)} prompts are among those of --data and are left out of the check")
    return kept, seen


def _tokens(asked: int, actions: Any, tools: Any, side: str) -> int:
    """How long an answer may be: long enough for its action."""
    if tools is not None:
        return max(asked, LONGEST_CALLS)
    return asked if actions is None else max(asked, actions.longest)


def _backends(source: str, base: str | None, cloud: bool, where: Any) -> tuple[Any, Any]:
    import shadowpeft
    from shadowpeft.serve.backend import Attached, Detached
    from shadowpeft.serve.loading import check_answers, is_edge_folder, load_edge

    if is_edge_folder(source):
        if cloud:
            raise ConfigError(
                f"'{source}' is an edge model and has no attached path; pass --no-cloud, or the adapter's folder"
            )
        model, tokenizer = load_edge(source)
        return Detached(placed(model, where), tokenizer, "edge"), None
    check_answers(source)
    tokenizer = load_tokenizer_of(source, base)
    model = placed(shadowpeft.load(source, base), where)
    edge = Detached(shadowpeft.detach(model), tokenizer, "edge")
    return edge, Attached(model, tokenizer, {"default": source}, "base") if cloud else None


def _answers(
    backend: Any,
    rows: list[dict[str, Any]],
    parse: Callable[[str], str | None],
    system: str | None,
    tokens: int,
    label: str,
    console: Console,
    quiet: bool,
    actions: Any,
) -> list[Any]:
    from shadowpeft.serve.router import settled
    from shadowpeft.serve.scoring import scored_answers

    with bar(console, label, len(rows), quiet=quiet) as progress:
        return scored_answers(
            backend,
            backend.names[0],
            [row["prompt"] for row in rows],
            places=[row["where"] for row in rows],
            system=system,
            max_tokens=tokens,
            until=lambda pieces, _: settled(pieces, parse),  # what follows the action does not count
            actions=actions,
            progress=progress,
        )


def _areas(by_way: dict[str, dict[str, list[Any]]], places: Iterable[int]) -> dict[str, float | None]:
    """AUROC of the signals of every way, on these rows."""
    from shadowpeft.serve.calibration import signal_areas

    chosen = list(places)
    areas = {k: v for parts in by_way.values() for k, v in signal_areas([parts["fit"][i] for i in chosen]).items()}
    return {name: None if area is None else round(area, 4) for name, area in areas.items()}


def _sample(row: dict[str, Any], answer: Any, cloud: Any, way: str, parse: Any, *, weighed: bool) -> Any:
    """What the device's answer to a row is worth, and whether the cloud's (None: it was not asked) is right."""
    from shadowpeft.serve.calibration import Sample
    from shadowpeft.serve.router import ACTION, AGREEMENT, action_probability, agreement, decisive, signals

    pieces, scores = answer
    n, action = decisive(pieces, parse)
    kept = action not in (None, REMOTE)
    own = scores.first(n)
    values = signals(own) if way == _FREELY else {ACTION: action_probability(own)}
    values |= {AGREEMENT: agreement(own)} if weighed else {}
    cloud_right = None
    if cloud is not None:
        cloud_action = decisive(cloud[0], parse)[1]
        cloud_right = cloud_action == row["skill"] or (row["skill"] == REMOTE and cloud_action is None)
    is_open, tagged = row["skill"] == REMOTE, action == REMOTE
    return Sample(kept, kept and action == row["skill"], values, cloud_right, is_open, tagged, row["times"])


def _print(calibration: Any, console: Console) -> None:
    from rich.table import Table

    report = calibration.report
    check = report.get("check", {})
    table = Table("", "fit", "check" if check else "", title=_kept_from(calibration))
    rows = [
        ("requests", "n"),
        ("with a known action", "known_actions"),
        ("AUROC", "auroc"),
        ("ECE", "ece"),
        ("commands", "commands"),
        ("... kept on the device", "commands_kept"),
        ("... handed on", "commands_handed_on"),
        ("open requests", "open_requests"),
        ("... handed on", "open_handed_on"),
        ("kept on the device, of all", "on_device"),
        ("wrong, of what is kept", "wrong_share"),
        ("... 95 % upper bound", "wrong_share_upper_95"),
        ("accuracy, routed", "accuracy_routed"),
        ("accuracy, always cloud", "accuracy_cloud"),
    ]
    for label, key in rows:
        cells = [part.get(key) for part in (report, check)]
        if any(cell is not None for cell in cells):
            table.add_row(label, *("" if c is None else str(c) if isinstance(c, int) else f"{c:.4f}" for c in cells))
    console.print(table)
    if report["bound"]:
        console.print(_tested(report))
    kept = report.get("second_opinion", {}).get("without", {}).get("commands_kept")
    if kept is not None:
        console.print(f"Without the second opinion the device would keep {100 * kept:.1f} % of the commands.")


def _kept_from(calibration: Any) -> str:
    if calibration.threshold > 1:
        return f"signal {calibration.signal}, nothing is kept"
    if calibration.least is not None:
        return (
            f"signal {calibration.signal}, kept from {calibration.least:.4g} (a chance of {calibration.threshold:.4f})"
        )
    return f"signal {calibration.signal}, kept from a chance of {calibration.threshold:.4f}"


def _tested(report: dict[str, Any]) -> str:
    tested, target, level = report["tested"], report["target"], report["level"]
    if tested["kept"]:
        return (
            f"At most {target:g} of what is kept is wrong, at level {level:g}: of {tested['rows']} tested answers "
            f"{tested['kept']} are kept and {tested['wrong']} of these are wrong."
        )
    return (
        f"No threshold holds {target:g} at level {level:g}, so nothing is kept: it takes {tested['needed']} kept answers with "
        f"none wrong, or more with a few, and {tested['rows']} answers with a known action were tested."
    )

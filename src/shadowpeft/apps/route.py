"""``shadowpeft route calibrate``: fit the confidence of a device's answers and choose what it keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shadowpeft.apps.common import pick_device, quiet_libraries, system_message
from shadowpeft.apps.options import Base, Device, Json, System
from shadowpeft.data.actions import REMOTE
from shadowpeft.errors import ConfigError
from shadowpeft.storage import require_writable
from shadowpeft.terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console


def calibrate(
    source: Annotated[str, typer.Argument(help="Folder of an adapter, or of an edge model.")],
    target: Annotated[float, typer.Option(help="Largest share of wrong answers among those on the device.")] = 0.05,
    data: Annotated[
        str,
        typer.Option(
            help="File with prompt and skill (JSONL, CSV, parquet), or chat rows with calls (docs/tools.md), or, as in a run "
            "file, '{path: F, split: S, columns: {...}}'; robot or robot_oos: the packaged calibration rows; robot_tools: its "
            "validation rows."
        ),
    ] = "robot",
    check: Annotated[
        Optional[str],
        typer.Option(help="Further rows to measure the choice on: a file; robot, robot_oos, robot_tools: the test set."),
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
            help="Rows that the device was trained on: a file, robot, robot_large or robot_oos. A linear classifier learns "
            "them; its chances weigh the device's (docs/routing.md)."
        ),
    ] = None,
    open_share: Annotated[
        Optional[float],
        typer.Option(
            help="Share of requests to come that no action fits, such as 0.5. Rows are left out at random until --data has it: "
            "the bound holds for one mixture."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit a confidence on held-out requests and choose which answers stay on the device."""
    quiet_libraries()
    from shadowpeft.apps import second_opinion as second
    from shadowpeft.apps.calibrating import (
        ALONE,
        CHOOSING,
        FREELY,
        Actions,
        Asking,
        Rows,
        areas,
        backends,
        check_share,
        signal_for,
    )
    from shadowpeft.serve.bound import choosing_rows, require_known, require_rows
    from shadowpeft.serve.loading import check_answers, check_calls
    from shadowpeft.serve.router import CHOSEN, FILE, SIGNALS
    from shadowpeft.versions import require_sklearn

    if not 0 <= target <= 1:
        raise ConfigError(f"target is {target} but must be a share from 0 to 1, such as 0.05")
    check_share(open_share)
    actions = Actions.of(skills)
    signal = signal_for(signal, actions, second_opinion)
    if actions.names is not None:
        check_calls(source)
    require_sklearn("route calibrate")
    folder = Path(out or source)
    if out is None and not folder.is_dir():
        raise ConfigError(f"'{folder}' is not a folder, so the calibration cannot be saved there; pass --out")
    require_writable(folder)
    check_answers(source)
    console = terminal(stderr=True)
    rows = Rows.read(data, limit, actions, second_opinion, open_share, console)
    is_open = [row["skill"] == REMOTE for row in rows.fit]
    if bound:
        require_rows(is_open, target=target, level=level, signal=signal)
    else:
        require_known(is_open)
    if check is not None:
        rows.read_check(check, limit, actions, console)
    from shadowpeft.data.second_opinion import discard_others
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.serve import calibration as fitting
    from shadowpeft.serve.calibrated import sketch
    from shadowpeft.train.rows import system_of

    prepare_cpu()
    system = system_message(source, system_of(data, system))
    edge, in_cloud = backends(source, base, cloud, pick_device(device))
    plain = None if signal in SIGNALS else actions.choice(edge)  # refuses what cannot be told apart before anything is fitted
    opinion = None if second_opinion is None else second.fitted(rows.learnt, second_opinion, console)
    asking = Asking(edge, in_cloud, actions, signal, plain, opinion, system, max_new_tokens, console, quiet=as_json)
    by_way = asking.samples(rows)
    alone = by_way.pop(ALONE, None)
    # rows that choose between the two ways are not tested
    compared = choosing_rows(len(rows.fit), signal, 0) if bound else range(len(rows.fit))
    best = fitting.best_signal(areas(by_way, compared)) if signal == "auto" else signal
    samples = by_way[CHOOSING if best in CHOSEN else FREELY]
    fitted = fitting.calibrate(samples["fit"], target=target, signal=signal, bound=bound, level=level)
    definitions = None if actions.tools is None else tuple(actions.tools.definitions())
    calibration = replace(fitted, skills=actions.own, tools=definitions)
    if opinion is not None and alone is not None:
        about = {"rows": len(rows.learnt), "parameters": opinion.parameters}
        calibration.report["second_opinion"] = {**about, "without": second.without(alone["fit"], target, bound, level)}
    calibration.report.update(
        rows.about,
        signals_auroc=areas(by_way, range(len(rows.fit))),
        source=Path(source).name,
        max_new_tokens=max_new_tokens,
        system=system,
        model=sketch(edge.model),
    )
    shown = "fit" if check is None else "check"
    if check is not None:
        calibration.report["check"] = {**rows.about_check, **fitting.check(calibration, samples["check"])}
    calibration.report["curve"] = fitting.curve(calibration, samples[shown])
    folder.mkdir(parents=True, exist_ok=True)
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
    if as_json:
        result = {
            "signal": calibration.signal,
            "threshold": calibration.threshold,
            **{key: value for key, value in calibration.report.items() if key != "model"},
            "saved": str(folder / FILE),
            **({} if actions.names is None else {"skills": list(actions.names)}),
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    _print(calibration, terminal())
    console.print(f"saved: {folder / FILE}, {picture}")


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
        ("... right by the device", "commands_right"),
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
        share = 100 * report["open_requests"] / report["n"]
        return (
            f"At most {target:g} of what is kept is wrong, at level {level:g}, where {share:.0f} % of the requests are open as "
            f"here: of {tested['rows']} tested answers "
            f"{tested['kept']} are kept and {tested['wrong']} of these are wrong."
        )
    return (
        f"No threshold holds {target:g} at level {level:g}, so nothing is kept: it takes {tested['needed']} kept answers with "
        f"none wrong, or more with a few, and {tested['rows']} answers with a known action were tested."
    )

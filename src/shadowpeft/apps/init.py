"""``shadowpeft init``: four questions, and a commented run file that ``shadowpeft train`` takes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar

import typer

from shadowpeft.errors import ConfigError
from shadowpeft.storage import require_writable, written_whole

Answer = TypeVar("Answer")

ROADS = {
    "adapter": "an adapter of the base alone",
    "device": "an adapter, and an edge model that chooses among commands such as [LampOn()]",
    "edge": "an adapter, and an edge model or draft model that answers in words",
    "classes": "a classifier of texts with a label",
}
"""What a run may be for."""
_ROWS = (".jsonl", ".json", ".csv", ".parquet")
_PRESETS = {"adapter": "paper", "device": "device", "edge": "tuned", "classes": "tuned"}


def main(
    out: Annotated[str, typer.Argument(metavar="FILE", help="Where the run file goes.")] = "run.yaml",
    road: Annotated[Optional[str], typer.Option("--for", help=f"{', '.join(ROADS)}; asked if not given.")] = None,
    base: Annotated[Optional[str], typer.Option(help="Alias, folder or Hub id; asked if not given.")] = None,
    data: Annotated[Optional[str], typer.Option(help="Training rows: a file, robot, robot_tools; asked if not given.")] = None,
    minutes: Annotated[Optional[float], typer.Option(help="How long to train; asked if not given, 0: one pass.")] = None,
    validation: Annotated[Optional[str], typer.Option(help="Rows to watch both paths on; not asked.")] = None,
) -> None:
    """Write a commented run file: asks what it is for, which base, which rows, how long; options answer beforehand."""
    file = Path(out)
    if file.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"'{file}' does not end in .yaml, by which commands tell a run file from rows; name it '{file}.yaml'")
    if file.exists():
        raise ConfigError(f"'{file}' exists; choose another name, or edit it")
    require_writable(file.parent)
    if road is None:
        for name, what in ROADS.items():
            print(f"  {name}: {what}")
        road = _asked("What is the run for?", "edge", _road)
    road = _road(road)
    base = base or _asked("Which base: an alias, a folder or a Hub id?", "smollm2-135m", str)
    data = data or _asked("Which training rows: a .jsonl, .json, .csv or .parquet file?", "train.jsonl", str)
    if minutes is None:
        minutes = _asked("How many minutes may training take (0: one pass over the rows)?", "0", _minutes)
    content = run_file(road, base, data, _minutes(minutes), validation or None, str(file.with_suffix("").name))
    _check(content, out)
    with written_whole(file, "the run file", "free some space or choose another place", folder=False) as beside:
        beside.write_text(content, encoding="utf-8")
    for rows in (data, validation):
        if rows and Path(rows).suffix in _ROWS and not Path(rows).exists():
            print(f"{rows} is not there yet; put your rows into it")
    print(f"wrote {file}; look at it, then run:")
    named = shlex.quote(str(file))
    print(f"  shadowpeft data check {named}\n  shadowpeft plan {named}\n  shadowpeft train {named}")


def _asked(question: str, default: str, understood: Callable[[str], Answer]) -> Answer:
    """What is ``understood`` of the answer to a question, which is asked again after a ``ConfigError``.

    Raises:
        ConfigError: if nobody can answer.
    """
    while True:
        try:
            return understood(str(typer.prompt(question, default=default)))
        except typer.Abort:
            raise ConfigError("init asks for what it is not told; give --for, --base, --data and --minutes") from None
        except ConfigError as error:
            print(f"  {error}")


def _road(answer: str) -> str:
    road = answer.strip().lower()
    if road not in ROADS:
        raise ConfigError(f"--for is '{answer}' but must be one of {', '.join(ROADS)}")
    return road


def _minutes(answer: str | float) -> float:
    try:
        minutes = float(answer)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < math.inf:
        raise ConfigError(f"'{answer}' is no number of minutes; give one from 0 up, such as 10 (--minutes)")
    return minutes


def _check(content: str, where: str) -> None:
    import yaml

    from shadowpeft.train.config import RunLoader, parse_run

    parse_run(yaml.load(content, Loader=RunLoader), where)  # a SafeLoader


def run_file(road: str, base: str, data: str, minutes: float, validation: str | None, name: str) -> str:
    """The text of a run file."""
    from shadowpeft.train.sections import PACKAGED

    classes, packaged, device = road == "classes", data in PACKAGED, road == "device"
    columns = "{text: text, label: label}" if classes else "{prompt: question, response: answer}"
    evaluated = "" if validation is not None or packaged else "# "
    lines = [
        f"# A run for {ROADS[road]}.",
        "# docs/settings.md has every key. Unknown keys are refused.",
        f"base: {_quoted(base)}",
        *([_line("task_type: SEQ_CLS", "rows have a text and a label", 0)] if classes else []),
        "",
        "data:",
        f"  train: {_quoted(data)}",
        f"  # train: {{hub: owner/name, split: train, columns: {columns}}}   # or from the Hub",
    ]
    if validation is not None:
        lines.append(f"  validation: {_quoted(validation)}")
    elif not packaged:
        lines.append(_line("# validation: rows.jsonl", "rows of the same form: both paths are evaluated on them"))
    lines.append(_line("max_length: 512", "tokens"))
    if classes:
        lines.append(_line("too_long: cut", "read the beginning of longer texts; or skip, error"))
    else:
        lines.append(_line("too_long: skip", "longer rows are left out; or error"))
    if device and not packaged:
        lines.append(_line("shadow_answers: action", "the edge model learns the action alone, [REMOTE] where there is none"))
    if not classes:
        lines.append(_line('# system: "You are ..."', "for rows without a system message; give serve the same one"))
    if not classes and not device:
        lines.append(_line("# assistant_only_loss: true", "learn every answer of a conversation, not the last one alone"))
    if not classes:
        lines.append(_line("# packing: true", "several short rows in one; recurrent bases are refused"))
    lines += [
        "",
        "shadow:",
        _line(f"preset: {_PRESETS[road]}", "tuned, paper or device"),
        _line("r: 16", "rank of the correction"),
        "",
        "training:",
        _line(f"target_minutes: {minutes:g}", "steps are chosen from the measured speed")
        if minutes
        else _line("epochs: 1", "passes over the rows"),
        _line("batch_size: 16", "rows at a time"),
        *([] if device else [_line("learning_rate: 1.0e-3", "the first thing to vary")]),  # the preset "device" has its own
        _line("save_every: 100", "steps; shadowpeft train --resume continues from there"),
        _line(f"{evaluated}eval_every: 100", "steps; both paths, on data.validation"),
        _line("# load_best: true", "keep the adapter of the best evaluation (leave save_every out)"),
        _line("# patience: 3", "stop after so many evaluations without improvement"),
        "",
        f"output: {_quoted(f'runs/{name}')}",
    ]
    return "\n".join(lines) + "\n"


def _line(setting: str, comment: str, indent: int = 2) -> str:
    return " " * indent + f"{setting:<{32 - indent}}# {comment}"


def _quoted(text: str) -> Any:
    """A text as YAML reads it back: bare where it can be, else in quotes, with what cannot be printed as its number."""
    plain = text and all(c.isalnum() or c in "/._-" for c in text) and text[0].isalpha()
    if plain and text.lower() not in ("null", "true", "false", "yes", "no", "on", "off"):
        return text
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))

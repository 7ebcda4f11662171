"""``shadowpeft data check FILE``: what training would read, learn and leave out, before anything is trained."""

from __future__ import annotations

import json
import statistics
from typing import Annotated, Any, Optional

import typer
from rich.table import Table
from rich.text import Text

from shadowpeft.apps.common import quiet_libraries
from shadowpeft.apps.options import Json, System
from shadowpeft.errors import DataError
from shadowpeft.terminal import terminal

_SHOWN = 20
"""Problems that are listed at most."""


class WrongRowsError(DataError):
    """Some rows of a file cannot be trained on."""


def check(
    file: Annotated[str, typer.Argument(help="JSON lines, .json, .csv or .parquet; robot or robot_tools.")],
    base: Annotated[
        str, typer.Option(help="Whose tokenizer and chat template: alias, folder or Hub id.")
    ] = "smollm2-135m",
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a row at most, as data.max_length.")] = 512,
    show: Annotated[int, typer.Option(min=0, help="So many rows in full: what is learnt in green, the rest dim.")] = 3,
    system: System = None,
    tools: Annotated[Optional[str], typer.Option(help="File of the tools that rows call, as data.tools.")] = None,
    as_json: Json = False,
) -> None:
    """Rows, their form and length, what is learnt of them, and every row that would be refused or left out."""
    quiet_libraries()
    from shadowpeft.data import chat
    from shadowpeft.data.forms import forms_of, rows_in
    from shadowpeft.data.robot import SYSTEM
    from shadowpeft.data.tool_rows import with_tools, writes_calls
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train.rows import packaged, read_rows, tools_of_run

    tokenizer = load_tokenizer(base)
    known = tools_of_run(file, tools)
    compact = known is not None and not writes_calls(tokenizer)
    good: list[dict[str, Any]] = []
    problems: list[str] = []
    system = SYSTEM if packaged(file) and system is None else system
    given = [(f"row {n}", row) for n, row in enumerate(read_rows(file, "train"), 1)] if packaged(file) else rows_in(file)
    for where, row in given:
        try:
            checked = row if packaged(file) else chat.check_row(row, where)
            checked = checked if known is None else with_tools(checked, known, compact=compact)
            encoded = chat.encode([checked], tokenizer, max_length=1 << 30, system=system)
        except DataError as problem:
            problems.append(str(problem))
            continue
        good.append({"where": where, "row": checked, "sequences": list(encoded)})
    sequences = [s for each in good for s in each["sequences"]]
    long = [each["where"] for each in good if max(len(s.ids) for s in each["sequences"]) > max_length]
    result = {
        "file": file,
        "rows": len(good) + len(problems),
        "forms": forms_of(each["row"] for each in good),
        "paths": {path: sum(each["row"]["path"] == path for each in good) for path in chat.PATHS},
        "tokens": _spread([len(s.ids) for s in sequences]),
        "learnt_tokens": _spread([len(s.ids) - s.start for s in sequences]),
        "longer_than_max_length": {"max_length": max_length, "rows": len(long), "first": long[0] if long else None},
        "refused": {"rows": len(problems), "why": problems[:_SHOWN]},
    }
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _print(result, [s for each in good[:show] for s in each["sequences"]], tokenizer)
    if problems:
        raise WrongRowsError(
            f"{len(problems)} of {result['rows']} rows are refused; correct them, they are named above"
        )


def _spread(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {
        "sum": sum(lengths),
        "mean": round(statistics.mean(lengths), 1),
        "median": statistics.median(lengths),
        "95 %": ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)],
        "longest": ordered[-1],
    }


def _print(result: dict[str, Any], sequences: list[Any], tokenizer: Any) -> None:
    from shadowpeft.decode import decode

    console = terminal()
    for sequence in sequences:
        before, learnt = sequence.ids[: sequence.start], sequence.ids[sequence.start :]
        text = Text(decode(tokenizer, before, skip_special_tokens=False), style="dim")
        text.append(decode(tokenizer, learnt, skip_special_tokens=False), style="green")
        paths = [name for name, learns in (("base", sequence.base), ("shadow", sequence.shadow)) if learns]
        console.print(text)
        console.print(
            Text(
                f"learnt by {' and '.join(paths)}: the part in green, {len(sequence.ids)} tokens in all\n", style="dim"
            )
        )
    table = Table("", *(result["tokens"] or ["tokens"]), title=f"{result['file']}: {result['rows']} rows")
    for label, key in (("tokens of a row", "tokens"), ("of them learnt", "learnt_tokens")):
        table.add_row(label, *(f"{value:,g}" for value in result[key].values()))
    console.print(table)
    console.print("form: " + (", ".join(f"{name} ({count})" for name, count in result["forms"].items()) or "none"))
    console.print("paths: " + ", ".join(f"{name} {count}" for name, count in result["paths"].items() if count))
    long = result["longer_than_max_length"]
    if long["rows"]:
        console.print(f"{long['rows']} rows have more than {long['max_length']} tokens; the first is {long['first']}")
    for problem in result["refused"]["why"]:
        console.print(Text(problem, style="red"))

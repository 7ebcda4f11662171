"""``shadowpeft data check``: what training would read, learn and leave out, before anything is trained."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shadowpeft.apps.common import quiet_libraries
from shadowpeft.apps.options import Json, Overrides
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.terminal import terminal

if TYPE_CHECKING:
    from rich.text import Text

    from shadowpeft.data.review import Review
    from shadowpeft.data.sources import Source
    from shadowpeft.train.config import RunConfig

_SHOWN = 20
"""Problems that are listed at most."""
_FIRST = 4
"""Places that are named where several rows are refused for one reason."""
_COLOURS = {(True, True): "green", (True, False): "blue", (False, True): "yellow", (False, False): "dim"}
"""Of a token, by whether the base and the shadow learn it."""
_NAMES = {"green": "both paths", "blue": "the base alone", "yellow": "the shadow alone", "dim": "nobody"}

_ODD = {
    "contradicting": "rows with another answer than an earlier row of the same prompt: {}; keep one, unless both are meant",
    "repeated": "rows that repeat an earlier one: {}; leave them out, unless they are to count more",
    "misspelt_actions": "actions that may be misspelt: {}; each spelling is learnt as an action of its own",
    "unchecked_calls": "rows that call with arguments, which nothing checks: {}; name the tools (--tools FILE, or data.tools)",
}
"""What is said of rows that can be learnt and may not be meant."""


class WrongRowsError(DataError):
    """Some rows of a file cannot be trained on."""


@dataclass(frozen=True)
class Rules:
    """How a run would read rows."""

    tokenizer: Any
    max_length: int
    system: str | None = None
    every_turn: bool = False
    actions: bool = False
    classes: bool = False
    too_long: str | None = None
    """What the run does with longer rows; None: not known."""
    tools: Any = None
    """What rows call; None: nothing that is known."""
    compact: bool = True
    """How calls of ``tools`` are written (``data.call_form``)."""

    def sequences(self, row: Any, where: str) -> tuple[Any, list[Any]]:
        """The checked row and what would be trained on.

        Raises:
            DataError: saying what is wrong.
        """
        from shadowpeft.data import chat, class_rows
        from shadowpeft.train.rows import told

        if self.classes:
            checked = class_rows.check_row(row, where)
            return checked, class_rows.encode([checked], self.tokenizer, [checked["label"]], max_length=1 << 30)
        checked = row if isinstance(row, chat.ChatRow) else chat.check_row(row, where, every_turn=self.every_turn)
        checked = told(checked, actions=self.actions, tools=self.tools, compact=self.compact)
        options: dict[str, Any] = {"max_length": 1 << 30, "system": self.system, "every_turn": self.every_turn}
        return checked, chat.encode([checked], self.tokenizer, **options)


def check(
    file: Annotated[
        str, typer.Argument(help="JSON lines, .json, .csv, .parquet, a folder, a run file (.yaml), a mapping as in one; robot.")
    ],
    settings: Overrides = None,
    base: Annotated[
        Optional[str],
        typer.Option(help="Whose tokenizer and chat template: alias, folder or Hub id. Default: the run's, or smollm2-135m."),
    ] = None,
    max_length: Annotated[
        Optional[int], typer.Option(min=1, help="Tokens of a row at most. Default: the run's data.max_length, or 512.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="So many rows in full, with what is learnt in colour.")] = 3,
    system: Annotated[Optional[str], typer.Option(help="System message of rows that bring none.")] = None,
    assistant_only_loss: Annotated[
        bool, typer.Option("--assistant-only-loss", help="Learn every answer of a conversation, as the run file's key.")
    ] = False,
    tools: Annotated[Optional[str], typer.Option(help="File of the tools that rows call, as data.tools.")] = None,
    task_type: Annotated[str, typer.Option(help="CAUSAL_LM, or SEQ_CLS for texts with a label.")] = "CAUSAL_LM",
    as_json: Json = False,
) -> None:
    """Rows, their form and length, what is learnt of them, and every row that would be refused or left out."""
    if task_type not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ConfigError(f"--task-type is '{task_type}' but must be CAUSAL_LM or SEQ_CLS")
    quiet_libraries()
    is_run = file.endswith((".yaml", ".yml"))
    if settings and not is_run:
        raise ConfigError(
            f"'{settings[0]}' was given beside '{file}', but a run file (.yaml) alone takes settings; leave it out, or use an "
            "option such as --max-length"
        )
    run, parts, rules = _of_run(file, settings or (), base, max_length) if is_run else (None, None, None)
    if parts is None or rules is None:
        from shadowpeft.data.tool_rows import writes_calls
        from shadowpeft.tokenizer import load_tokenizer
        from shadowpeft.train.rows import system_of, tools_of_run

        system = system_of(file, system)
        tokenizer = load_tokenizer(base or "smollm2-135m")
        classes, known = task_type == "SEQ_CLS", tools_of_run(file, tools)
        compact = known is None or not writes_calls(tokenizer)
        rules = Rules(
            tokenizer, max_length or 512, system, assistant_only_loss, classes=classes, tools=known, compact=compact
        )
        parts = {"": file}
    elif system is not None or assistant_only_loss or task_type != "CAUSAL_LM" or tools is not None:
        raise ConfigError(
            "a run file says how its rows are read; leave --system, --assistant-only-loss, --tools and --task-type out"
        )
    from shadowpeft.data.review import Review

    results, review = {}, Review(rules.tools)
    for part, given in parts.items():
        name = f"data.{part}: {given}" if part else file
        results[part], shown = _examined(name, _rows(given, part, rules), rules, show, review)
        if not as_json:
            _print(results[part], shown, rules.tokenizer)
    if as_json:
        print(json.dumps(results.get("", results), indent=2, ensure_ascii=False))
    refused = sum(result["refused"]["rows"] for result in results.values())
    if refused:
        rows = sum(result["rows"] for result in results.values())
        raise WrongRowsError(f"{refused} of {rows} rows are refused; correct them, they are named above")
    if run is not None:
        from shadowpeft.train.paths import check_paths
        from shadowpeft.train.rows import load_run_data

        # what is wrong with the rows as a whole is found by what training itself asks; what it would say stands above
        check_paths(run, load_run_data(run, rules.tokenizer, lambda told: None), base)
    else:
        _check_whole(file, results[""])


def _check_whole(file: str, result: dict[str, Any]) -> None:
    """Whether all rows together can be trained on, each of which can.

    Raises:
        DataError: if there is none, or of texts with labels there is one label alone.
    """
    if not result["rows"]:
        raise DataError(f"data '{file}' holds no rows; give a file with one row at least")
    if "labels" in result:
        from shadowpeft.data.class_rows import labels_of

        labels_of({"label": label} for label in result["labels"])


def _of_run(
    file: str, settings: Sequence[str], base: str | None, max_length: int | None
) -> tuple[RunConfig, dict[str, Any], Rules]:
    """The run of a file with some settings laid over it, its sources by part, and its rules."""
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train.config import read_run
    from shadowpeft.train.rows import compact_calls, packaged, parts_of, system_of, tools_of_run
    from shadowpeft.train.sections import source_of

    run = read_run(file, settings)
    if max_length is not None:
        run.data.max_length = max_length
    data = run.data
    tokenizer = load_tokenizer(base or run.words, data.chat_template)
    tools = tools_of_run(data.train, data.tools)
    rules = Rules(
        tokenizer,
        data.max_length,
        system_of(data.train, data.system),
        data.assistant_only_loss,
        data.learns_actions,
        run.task_type == "SEQ_CLS",
        data.too_long,
        tools,
        compact_calls(data, tools, tokenizer),
    )
    return run, {part: each if packaged(each) else source_of(each) for part, each in parts_of(data).items()}, rules


def _rows(given: str | Source, part: str, rules: Rules) -> Iterable[tuple[str, Any]]:
    """Every row and where it stands."""
    from shadowpeft.apps.source import source_named
    from shadowpeft.data.sources import rows_of
    from shadowpeft.train.rows import packaged, packaged_rows

    if isinstance(given, str) and packaged(given):
        return ((f"row {n}", row) for n, row in enumerate(packaged_rows(given, part or "train", actions=rules.actions), 1))
    return rows_of(source_named(given) if isinstance(given, str) else given, keep_damaged=True)


def _examined(
    name: str, rows: Iterable[tuple[str, Any]], rules: Rules, show: int, review: Review
) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """What there is to say of all rows, and the first ``show`` of them with a sequence each."""
    from shadowpeft.data import chat

    if not rules.classes and rules.tokenizer.chat_template is None:
        chat.render_prompt(rules.tokenizer, [])  # says once what every row would say
    forms: Counter[str] = Counter()
    paths: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    shown: list[tuple[Any, Any]] = []
    lengths, learnt, problems, long, count = [], [], [], [], 0
    alike: dict[str, tuple[str, list[str]]] = {}  # by what is said behind the place: the first of them, and all places
    review.start_part()
    for where, row in rows:
        count += 1
        try:
            if isinstance(row, DataError):
                raise row
            checked, sequences = rules.sequences(row, where)
        except DataError as problem:
            problems.append(str(problem))
            alike.setdefault(str(problem).removeprefix(where), (str(problem), []))[1].append(where)
            continue
        review.add(checked, getattr(checked, "where", "") or where)
        forms[getattr(checked, "form", "") or "prompt, response"] += 1
        paths[checked["path"]] += 1
        if rules.classes:
            labels[checked["label"]] += 1
        lengths += [len(s.ids) for s in sequences]
        learnt += [1 if rules.classes else len(s.learnt) for s in sequences]
        longest = max(len(s.ids) for s in sequences)
        if longest > rules.max_length:
            long.append(f"{where} has {longest} tokens, more than max_length = {rules.max_length}: {_fate(rules)}")
        if count <= show:
            shown += [(checked, s) for s in sequences]
    result = {
        "file": name,
        "rows": count,
        "forms": dict(forms),
        "paths": {path: paths[path] for path in chat.PATHS},
        **({"labels": dict(sorted(labels.items()))} if rules.classes else {}),
        "tokens": _spread(lengths),
        "learnt_tokens": _spread(learnt),
        "longer_than_max_length": {
            "max_length": rules.max_length,
            "rows": len(long),
            "first": long[0].partition(" has ")[0] if long else None,
            "which": long[:_SHOWN],
        },
        "actions": dict(review.actions.most_common()),
        **{
            name: {"rows": len(found), "which": found[:_SHOWN]}
            for name, found in (
                ("repeated", review.repeated),
                ("contradicting", review.contradicting),
                ("misspelt_actions", review.misspelt()),
                ("unchecked_calls", review.unchecked()),
            )
        },
        "refused": {
            "rows": len(problems),
            "why": problems[:_SHOWN],
            "reasons": [
                {"why": why, "rows": len(places), "also": places[1:_FIRST]} for why, places in [*alike.values()][:_SHOWN]
            ],
        },
    }
    return result, shown


def _fate(rules: Rules) -> str:
    known = {"error": "the run stops", "skip": "left out", "cut": "its end is cut off"}
    return known.get(rules.too_long or "", "the run stops, or leaves it out with data.too_long: skip")


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


def coloured(sequence: Any, tokenizer: Any) -> Text:
    """A sequence as text, each token in the colour of who learns it; a character of several tokens in that of the last."""
    from itertools import groupby

    from rich.text import Text

    from shadowpeft.core.losses import IGNORE
    from shadowpeft.decode import Decoder

    made = sequence.features()
    targets = zip(made["labels"], made["shadow_labels"], strict=True)
    colours = [_COLOURS[base != IGNORE, shadow != IGNORE] for base, shadow in targets]
    # a shadow that learns less than the whole answer has the end of its turn where the answer goes on
    text, decoder = Text(), Decoder(tokenizer, skip_special_tokens=False)
    pieces = [(decoder.push(token), colour) for token, colour in zip(sequence.ids, colours, strict=True)]
    for colour, run in groupby((pair for pair in pieces if pair[0]), key=lambda pair: pair[1]):
        text.append("".join(piece for piece, _ in run), style=colour)
    return text.append(decoder.finish())


def _print(result: dict[str, Any], shown: list[tuple[Any, Any]], tokenizer: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    console = terminal()
    for row, sequence in shown:
        if "label" in row:
            console.print(Text(row["text"], style="dim").append(f"  {row['label']}", style="green"))
            continue
        text = coloured(sequence, tokenizer)
        console.print(text)
        used = dict.fromkeys(str(span.style) for span in text.spans if span.style != "dim")
        words = " and ".join(f"{colour} by {_NAMES[colour]}" for colour in used)
        paths = [name for name, learns in (("base", sequence.base), ("shadow", sequence.shadow)) if learns]
        about = f"learnt by {' and '.join(paths)} ({words}), {len(sequence.ids)} tokens in all"
        if sequence.shadow_answer is not None:
            about += "; the shadow ends its turn after its part"
        console.print(Text(about + "\n", style="dim"))
    table = Table("", *(result["tokens"] or ["tokens"]), title=f"{result['file']}: {result['rows']} rows")
    for label, key in (("tokens of a row", "tokens"), ("of them learnt", "learnt_tokens")):
        if "labels" not in result or key == "tokens":
            table.add_row(label, *(f"{value:,g}" for value in result[key].values()))
    console.print(table)
    console.print("form: " + (", ".join(f"{name} ({count})" for name, count in result["forms"].items()) or "none"))
    console.print("paths: " + ", ".join(f"{name} {count}" for name, count in result["paths"].items() if count))
    if "labels" in result:
        console.print("labels: " + ", ".join(f"{name} ({count})" for name, count in result["labels"].items()))
    if result["actions"]:
        actions = Table("action", "rows")
        for name, count in result["actions"].items():
            actions.add_row(Text(name), f"{count:,}")
        console.print(actions)
    for key, says in _ODD.items():
        if result[key]["rows"]:
            console.print("warning: " + says.format(result[key]["rows"]))
            for line in result[key]["which"]:
                console.print(Text(line, style="yellow"))
            _rest(console, result[key]["rows"])
    long = result["longer_than_max_length"]
    if long["rows"]:
        console.print(f"{long['rows']} rows have more than {long['max_length']} tokens:")
        for line in long["which"]:
            console.print(Text(line, style="yellow"))
        _rest(console, long["rows"])
    told = 0
    for reason in result["refused"]["reasons"]:
        told += reason["rows"]
        console.print(Text(reason["why"], style="red"))
        if reason["also"]:
            others = ", ".join(reason["also"]) + ", ..." * (reason["rows"] > _FIRST)
            console.print(Text(f"... as {reason['rows'] - 1} more rows: {others}", style="red"))
    if told < result["refused"]["rows"]:
        console.print(f"... and {result['refused']['rows'] - told} more")


def _rest(console: Any, count: int) -> None:
    if count > _SHOWN:
        console.print(f"... and {count - _SHOWN} more")

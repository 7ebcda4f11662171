"""``shadowpeft eval ADAPTER``: an adapter in each of its modes on a task, on the robot set, or on the rows of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from shadowpeft.apps.common import (
    check_drafts,
    config_of,
    load_tokenizer_of,
    mode_of,
    pick_device,
    placed,
    quiet_libraries,
)
from shadowpeft.apps.options import AdapterOrEdge, Base, Device, Json, Speculative, Vote
from shadowpeft.apps.source import is_mapping
from shadowpeft.errors import ConfigError
from shadowpeft.storage import require_writable
from shadowpeft.terminal import terminal


def main(
    adapter: AdapterOrEdge,
    data: Annotated[
        Optional[str],
        typer.Option(
            help="File of rows or, as in a run file, '{path: F, split: S, columns: {...}}'; or 'robot' for the commands of the "
            "packaged test set (--task robot has its open requests too). Default: robot."
        ),
    ] = None,
    name: Annotated[
        Optional[str],
        typer.Option(
            "--task",
            help="Instead of --data: mmlu, gsm8k, squad_v2, squad_v2_devsplit, amazon_reviews, newsgroups, clinc150 or robot.",
        ),
    ] = None,
    skills: Annotated[
        Optional[str],
        typer.Option(
            help="With --data: judge the action, or the calls, of each answer. File of names or tools; robot and robot_tools "
            "are the packaged ones."
        ),
    ] = None,
    modes: Annotated[
        Optional[list[str]],
        typer.Option("--mode", help="attached, detached, base, lora or dora; repeatable. Default: all that fit."),
    ] = None,
    base: Base = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Evaluate this many rows, drawn with --seed.")] = None,
    max_new_tokens: Annotated[
        Optional[int],
        typer.Option(min=1, help="Longest answer in tokens, with --data. Default: 64, for actions 16, for calls 96."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    split: Annotated[
        Optional[str], typer.Option(help="With --task: train, validation or test. Default: test.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="With --task: worked examples before each question.")] = 0,
    method: Annotated[
        Optional[str], typer.Option(help="generate, likelihood or classify. Default: the task's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Which rows --limit and --shots draw.")] = 0,
    out: Annotated[
        Optional[str], typer.Option(help="Folder for predictions and records; continued if it is there.")
    ] = None,
    device: Device = "auto",
    speculative: Speculative = False,
    vote: Vote = False,
    as_json: Json = False,
) -> None:
    """Evaluate attached, detached and bare base, each on the rows that its path learns."""
    if name is not None and (data is not None or max_new_tokens is not None):
        given = "--data" if data is not None else "--max-new-tokens"
        raise typer.BadParameter(f"a task brings its own; leave {given} or --task out", param_hint=given)
    if data not in (None, "robot") and not is_mapping(str(data)) and Path(str(data)).is_dir():
        said = f"'{data}' is a folder; give one file of it, or a split of it as '{{path: {data}, split: test}}'"
        raise typer.BadParameter(said, param_hint="--data")
    if name is None and split is not None:
        said = "a file has no splits, and robot is its test set; leave it out, or ask for --data '{path: FOLDER, split: S}'"
        raise typer.BadParameter(said, param_hint="--split")
    if skills is not None and data in (None, "robot"):
        raise typer.BadParameter("a task and robot have their own; give --data FILE, or leave it out", param_hint="--skills")
    if skills is not None and method not in (None, "generate") and not vote:
        said = f"--skills judges what is generated but --method is {method}; leave one of them out"
        raise typer.BadParameter(said, param_hint="--method")
    data = (data or "robot") if name is None else None
    quiet_libraries()
    from shadowpeft.apps.second_opinion import beside
    from shadowpeft.evaluate import MODES, evaluate_task
    from shadowpeft.evaluate.held import may_vote
    from shadowpeft.hf import formats
    from shadowpeft.hf.files.locate import CONFIG, find_file
    from shadowpeft.hf.forward.speculation import Speculation
    from shadowpeft.runtime import prepare_cpu
    from shadowpeft.serve.loading import classifies, is_edge_folder

    for mode in modes or ():
        if mode not in MODES:
            raise ConfigError(f"mode '{mode}' is unknown; choose from {', '.join(MODES)}")
    if out is not None:
        require_writable(Path(out))
    if speculative and modes:
        check_drafts(modes)
    if vote and (speculative or method not in (None, "generate")):
        other = "--speculative" if speculative else f"--method {method}"
        raise ConfigError(
            f"--vote was given with {other}, but the shadow weighs answers that are generated without drafts; leave one out"
        )
    if vote and modes and "attached" not in modes:
        raise ConfigError("--vote was given but no --mode is attached, whose answers the shadow weighs; leave it out")
    prepare_cpu()
    where = pick_device(device)
    for mode in modes or ():
        mode_of(adapter, mode)
    if is_edge_folder(adapter) and classifies(adapter):
        raise ConfigError(f"'{adapter}' is an edge model that classifies; give the adapter it was made from")
    if Path(adapter).is_dir() and not is_edge_folder(adapter) and formats.detect(adapter) != formats.AUTHORS:
        find_file(adapter, CONFIG)  # rows are read by what the adapter says, so its place is looked at first
    if skills is None:
        task, split = _task(data, name, split or "test", max_new_tokens, adapter)
    else:
        task, split = _acting(str(data), skills, max_new_tokens, adapter, base), "test"
    if vote and not may_vote(task):
        raise ConfigError("--vote was given but there is nothing that the shadow could weigh; pass --skills, or leave it out")
    by_text = data is not None and skills is None and task.kind != "classify"
    examples = task.load(split, shots=shots, limit=limit, seed=seed)
    for mode in modes or ():
        task.for_path(examples, "shadow" if mode == "detached" else "base")
    opinion = beside(adapter, task.actions) if task.actions and "detached" in (modes or ("detached",)) else None
    model, tokenizer, fitting = _load(adapter, base, task)
    model = placed(model, where)
    if modes is None:  # the bare base of a classifier has a random head, so only generating tasks ask it
        option = "--speculative" if speculative else "--vote"
        if (speculative or vote) and "attached" not in fitting:
            kind = "an edge model" if fitting == ["detached"] else f"a {fitting[0]} adapter"
            raise ConfigError(f"{option} was given but '{adapter}' has no shadow beside a base, it is {kind}; leave it out")
        modes = fitting if task.kind == "classify" or fitting == ["detached"] else ["base", *fitting]
    records: dict[str, dict[str, Any]] = {}
    for mode in modes:
        records[mode] = evaluate_task(
            model,
            tokenizer,
            task,
            mode=mode,
            split=split,
            shots=shots,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            method=method,
            folder=Path(out) / mode if out else None,
            extra={"adapter": adapter},
            loss=by_text,
            speculative=Speculation() if speculative and mode == "attached" else None,
            opinion=opinion if mode == "detached" else None,
            vote=vote and mode == "attached",
            progress=(lambda done: None) if as_json else None,
        )
    if by_text:
        records = {mode: _with_loss(record) for mode, record in records.items()}
    if as_json:
        about = {
            "adapter": adapter,
            **({} if data is None else {"data": data}),
            "task": task.name,
            "rows": len(examples),
        }
        print(json.dumps({**about, "modes": records}, indent=2, ensure_ascii=False))
    else:
        _print(records, "robot, commands" if data == "robot" else data or f"{task.name}, {split}")


def _task(data: str | None, name: str | None, split: str, max_new_tokens: int | None, adapter: str) -> tuple[Any, str]:
    """The task, and the split to ask; of a classifier, the rows of a file have its labels."""
    from shadowpeft.apps.source import source_named
    from shadowpeft.data.class_rows import ClassRows
    from shadowpeft.data.tasks import get_task
    from shadowpeft.data.tasks.rows import Rows
    from shadowpeft.hf.detach import ANSWERS
    from shadowpeft.train.rows import class_rows_of, with_action

    if data is None:
        return get_task(str(name)), split
    config = config_of(adapter) if data != "robot" else {}
    if config.get("task_type") == "SEQ_CLS":
        source = source_named(data, needs_split=True)
        return ClassRows(str(source), config.get("labels"), class_rows_of(source)), _split_of(source)
    if data != "robot":
        actions = "action" in (config.get("shadow_answers"), config.get(ANSWERS))
        learnt = with_action if actions else None
        source = source_named(data, needs_split=True)
        rows = Rows(source, max_new_tokens or 64, system=config.get("system_message"), learnt=learnt)
        return rows, _split_of(source)
    task: Any = get_task("robot")
    task.max_new_tokens = max_new_tokens or task.max_new_tokens
    return task, "test_normal" if split == "test" else split


def _split_of(source: Any) -> str:
    """The split that a record names; a file has none, and is called the test set."""
    return "test" if source.is_file else str(source.split)


def _acting(file: str, skills: str, max_new_tokens: int | None, adapter: str, base: str | None) -> Any:
    """Requests of a file and their right actions or calls, told to the model as in its training."""
    from shadowpeft.apps.intents import read_intents
    from shadowpeft.apps.source import source_named
    from shadowpeft.data import robot_tools
    from shadowpeft.data.call_form import COMPACT, template_form
    from shadowpeft.data.tasks.calling import Calling
    from shadowpeft.data.tasks.intents import Intents
    from shadowpeft.tokenizer import load_tokenizer
    from shadowpeft.train.rows import packaged_rows

    tools, config = robot_tools.tools_named(skills), config_of(adapter)
    system = config.get("system_message")
    if tools.plain:
        rows = read_intents(file, "fit", None, tools.names, whole_chats=True)
        longest = 2 * max(map(len, tools.names)) + 4  # tokens of a name have half a letter at least
        return Intents(file, rows, tools.names, system, max_new_tokens or max(16, longest))
    form, named = None, base or config.get("base_model_name_or_path")
    if config.get("call_form") == "template":
        form = template_form(load_tokenizer_of(adapter, base))
    elif config.get("peft_type") == "LORA" and named:  # its file does not say how it learnt to call
        form = template_form(load_tokenizer(named))
    if form is None and config.get("call_form") == "template":
        raise ConfigError(
            f"'{adapter}' learnt calls in the form of its base's chat template, which cannot be read; train with "
            "data.call_form: compact to have them judged"
        )
    packaged = packaged_rows(file, "test") if file == "robot_tools" else None
    source = file if packaged is not None else source_named(file, needs_split=True)
    return Calling(source, tools, system, max_new_tokens or 96, form or COMPACT, packaged)


def _with_loss(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the names that ``eval --data`` has always used; ``interval`` and ``tokens`` mean other things in it."""
    return {
        **record,
        "accuracy": record["score"],
        "interval": [round(end, 4) for end in record.get("wilson_interval", record["interval"])],
        "tokens": record["answer_tokens"],
        "tokens_are": "of the answers whose loss is given",
    }


def _print(records: dict[str, dict[str, Any]], title: str) -> None:
    from rich.table import Table

    from shadowpeft.hf.forward.speculation import DraftCounts

    with_loss = any("loss" in record for record in records.values())
    chosen = [key for key in ("constrained", "second_opinion") if any(key in record for record in records.values())]
    more = [*(["loss"] if with_loss else []), *(key.replace("_", " ") for key in chosen)]
    table = Table(title=title)
    for column in ("mode", "score", "95 % interval", "n", "tok/s", *more):  # titles may be broken, numbers not
        least = {"95 % interval": 11, "loss": 5}.get(column, 7 if column in more else None)
        table.add_column(column, overflow="fold", min_width=least)
    for mode, r in records.items():
        low, high = r.get("wilson_interval", r["interval"])  # a share's; the bootstrap's has no width where all are right
        shown = [f"{r['score']:.2%}", f"{100 * low:.1f}-{100 * high:.1f}%", str(r["n"]), f"{r['tokens_per_second']:.0f}"]
        shown += [f"{r['loss']:.3f}"] if with_loss else []
        shown += [f"{r[key]['score']:.2%}" if key in r else "" for key in chosen]
        table.add_row(mode, *shown)
    terminal().print(table)
    if any("invalid" in r["scores"] for r in records.values()):
        terminal().print(_of_calls(records))
    terminal().print("records: " + ", ".join(f"{mode} {r['id']}" for mode, r in records.items()))
    counts = {mode: r["n"] for mode, r in records.items()}
    if len(set(counts.values())) > 1:
        asked = ", ".join(f"{mode} {n}" for mode, n in counts.items())
        terminal().print(f"some rows are for one path alone, so the modes are asked different rows: {asked}")
    for record in records.values():
        if "speculation" in record:
            terminal().print(str(DraftCounts.read(record["speculation"])))
    origin = next(iter(records.values()))["data"]
    files = ", ".join(origin.get("name") or origin.get("path") or [])
    lacks = f" (partial: {origin['lacks']})" if origin["partial"] else ""
    terminal().print(f"data from the {origin['from']}: {files}{lacks}")


_PARTS = {
    "calls": "requests that call, right",
    "names": "all names right",
    "arguments": "arguments right",
    "calls_handed_on": "of these without a call",
    "no_call": "others without a call",
    "invalid": "invalid calls",
}
"""Parts of the score of calls, and what they are shares of."""


def _of_calls(records: dict[str, dict[str, Any]]) -> Any:
    """The parts of the score, of free answers and of those that are held to valid calls."""
    from rich.table import Table

    asked = {mode: record["scores"] for mode, record in records.items()}
    asked |= {f"{mode}, constrained": r["constrained"]["scores"] for mode, r in records.items() if "constrained" in r}
    table = Table()
    table.add_column("of calls", min_width=max(map(len, _PARTS.values())))
    for column in sorted(asked):
        table.add_column(column, overflow="fold", min_width=7)
    for key, title in _PARTS.items():
        if any(key in scores for scores in asked.values()):
            shown = [f"{asked[name][key]:.2%}" if key in asked[name] else "" for name in sorted(asked)]
            table.add_row(title, *shown)
    return table


def _load(adapter: str, base: str | None, task: Any) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer, and the modes that fit the adapter's method."""
    from peft import PeftConfig, PeftModel

    import shadowpeft
    from shadowpeft.hf import formats
    from shadowpeft.serve.loading import is_edge_folder, load_edge

    if is_edge_folder(adapter):
        if task.kind == "classify" or base is not None:
            what = "--base was given" if base is not None else f"task '{task.name}' needs a classifier's adapter"
            raise ConfigError(f"{what} but '{adapter}' is an edge model; give the adapter it was made from")
        return *load_edge(adapter), ["detached"]
    from shadowpeft.hf.base.load import load_base, of_labels, pad_with
    from shadowpeft.hf.files.locate import find_file
    from shadowpeft.hf.files.reading import read_json
    from shadowpeft.tokenizer import load_tokenizer

    foreign = formats.detect(adapter) == formats.AUTHORS
    config = {} if foreign else read_json(find_file(adapter, "adapter_config.json"))
    wanted, task_type = "SEQ_CLS" if task.kind == "classify" else "CAUSAL_LM", config.get("task_type", "CAUSAL_LM")
    if task_type != wanted:
        raise ConfigError(
            f"task '{task.name}' needs a {wanted} adapter but '{adapter}' is a {task_type} one; choose another task"
        )
    lora = config.get("peft_type") == "LORA"
    named = base or config.get("base_alias") or config.get("base_model_name_or_path")
    if lora and not named:
        raise ConfigError("the adapter does not name its base; pass --base")
    tokenizer = load_tokenizer(str(named)) if lora else load_tokenizer_of(adapter, base)
    model: Any = base
    if named and (lora or task.labels):
        model = load_base(named, wanted, **of_labels(task.labels or None))
        pad_with(model, tokenizer, classifies=wanted == "SEQ_CLS")
    if not lora:
        return shadowpeft.load(adapter, model), tokenizer, ["attached", "detached"]
    method = "dora" if PeftConfig.from_pretrained(adapter).use_dora else "lora"  # type: ignore[attr-defined]
    return PeftModel.from_pretrained(model, adapter), tokenizer, [method]

"""The command line: a table of commands. Each declares its options in its module of :mod:`shadowpeft.apps`.

A command imports torch and the like when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated, Optional

import typer

from shadowpeft import __version__
from shadowpeft.apps import convert, demo, detach, doctor, export, generate, info, plan, pretrain, train
from shadowpeft.apps.options import Adapter, Base, Device, Json, System
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.messages import shorten
from shadowpeft.serve.options import Options, command_of
from shadowpeft.terminal import check_arguments, one_line

app = typer.Typer(
    name="shadowpeft",
    help="Adapt a frozen language model with a shadow network; use it attached, detached, or both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        print(f"shadowpeft {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """``main`` reads ``--debug`` itself."""


app.command("train")(train.main)
app.command("pretrain")(pretrain.main)


@app.command("eval")
def evaluate(
    adapter: Adapter,
    data: Annotated[
        Optional[str], typer.Option(help="JSONL file, or 'robot' for the packaged test set. Default: robot.")
    ] = None,
    task: Annotated[
        Optional[str],
        typer.Option(
            help="Instead of --data: mmlu, gsm8k, squad_v2, squad_v2_devsplit, amazon_reviews, newsgroups, clinc150 or robot."
        ),
    ] = None,
    mode: Annotated[
        Optional[list[str]],
        typer.Option(help="attached, detached, base, lora or dora; repeatable. Default: all that fit."),
    ] = None,
    base: Base = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="Evaluate this many rows, drawn with --seed.")
    ] = None,
    max_new_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Longest answer in tokens, with --data. Default: 64, for robot 16.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    split: Annotated[str, typer.Option(help="With --task: train, validation or test.")] = "test",
    shots: Annotated[int, typer.Option(min=0, help="With --task: worked examples before each question.")] = 0,
    method: Annotated[
        Optional[str], typer.Option(help="generate, likelihood or classify. Default: the task's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which rows --limit and --shots draw.")] = 0,
    out: Annotated[
        Optional[str], typer.Option(help="Folder for predictions and records; continued if it is there.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Evaluate attached, detached and bare base on the same rows."""
    from shadowpeft.apps import evaluate as command

    if task is not None and (data is not None or max_new_tokens is not None):
        given = "--data" if data is not None else "--max-new-tokens"
        raise typer.BadParameter(f"a task brings its own; leave {given} or --task out", param_hint=given)
    command.main(
        adapter,
        (data or "robot") if task is None else None,
        task,
        mode,
        base,
        split=split,
        shots=shots,
        limit=limit,
        seed=seed,
        method=method,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        out=out,
        device=device,
        as_json=json,
    )


app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("detach")(detach.main)
app.command("export")(export.main)
app.command("convert")(convert.main)
app.command("plan")(plan.main)
app.command("info")(info.main)
app.command("doctor")(doctor.main)

route = typer.Typer(name="route", help="Routing between device and cloud.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(route)


@route.command()
def calibrate(
    source: Annotated[str, typer.Argument(help="Folder of an adapter, or of an edge model.")],
    target: Annotated[float, typer.Option(help="Largest share of wrong answers among those on the device.")] = 0.01,
    data: Annotated[
        str, typer.Option(help="JSONL file with prompt and skill, or 'robot' for the packaged validation set.")
    ] = "robot",
    check: Annotated[
        Optional[str], typer.Option(help="Further rows to measure the choice on: a JSONL file, or 'robot' (test set).")
    ] = None,
    base: Base = None,
    signal: Annotated[str, typer.Option(help="auto, logprob, mean_logprob, min_logprob, margin or entropy.")] = "auto",
    bound: Annotated[
        bool, typer.Option("--bound", help="Hold the share's 95 % upper bound under the target, not the share.")
    ] = False,
    cloud: Annotated[bool, typer.Option(help="Ask the attached model too, for the accuracy of the whole.")] = True,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Use this many rows, drawn with a fixed seed.")] = None,
    out: Annotated[Optional[str], typer.Option(help="Folder for the result. Default: beside the adapter.")] = None,
    device: Device = "auto",
    skills: Annotated[
        Optional[str],
        typer.Option(help="File of the known actions, one name a line or a JSON list. Default: the packaged 34."),
    ] = None,
    json: Json = False,
) -> None:
    """Fit a confidence on held-out requests and choose which answers stay on the device."""
    from shadowpeft.apps import route as command

    command.calibrate(
        source,
        data,
        check,
        base,
        target,
        signal,
        bound,
        cloud,
        system,
        max_new_tokens,
        limit,
        out,
        device,
        json,
        skills,
    )


@app.command()
@command_of(Options)
def serve(options: Options) -> None:
    """Serve the OpenAI API, as cloud or as edge."""
    from shadowpeft.apps import serve as command

    command.main(options)


app.command("demo")(demo.main)


def main() -> None:
    """Entry point: exit 0 done, 1 failed, 2 wrong usage or configuration; one sentence unless ``--debug``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows escapes
    try:
        check_arguments(sys.argv[1:])
        app()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        text = str(error)
        if not isinstance(error, ShadowPeftError):
            text = f"{type(error).__name__}: {shorten(error)} (run again with: shadowpeft --debug ...)"
        print(f"error: {one_line(text)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | DataError) else 1)


if __name__ == "__main__":
    main()

"""The command line: a table of commands. Each declares its options in its module of :mod:`shadowpeft.apps`.

A command imports torch and the like when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from shadowpeft import __version__
from shadowpeft.apps import (
    answer_rows,
    convert,
    data,
    demo,
    detach,
    doctor,
    evaluate,
    export,
    generate,
    info,
    init,
    plan,
    pretrain,
    report,
    route,
    train,
)
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.messages import shorten
from shadowpeft.serve.options import Options, command_of
from shadowpeft.terminal import check_arguments, one_line

STOPPED = 130
"""Exit status after Ctrl-C, as shells have it."""
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


app.command("init")(init.main)
app.command("train")(train.main)
app.command("pretrain")(pretrain.main)
app.command("eval")(evaluate.main)
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("detach")(detach.main)
app.command("export")(export.main)
app.command("convert")(convert.main)
app.command("plan")(plan.main)
app.command("report")(report.main)
app.command("info")(info.main)
app.command("doctor")(doctor.main)

routing = typer.Typer(
    name="route", help="Routing between device and cloud.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(routing)
routing.command("calibrate")(route.calibrate)
rows = typer.Typer(name="data", help="The rows of a file.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rows)


@rows.callback()
def _rows() -> None:
    """The rows of a file."""


rows.command("check")(data.check)
rows.command("answer")(answer_rows.main)


@app.command()
@command_of(Options)
def serve(options: Options) -> None:
    """Serve the OpenAI API, as cloud or as edge."""
    from shadowpeft.apps import serve as command

    command.main(options)


app.command("demo")(demo.main)


def main() -> None:
    """Entry point: exit 0 done, 1 failed, 2 wrong usage or configuration, 130 stopped by Ctrl-C; one sentence unless
    ``--debug``."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows escapes
    try:
        check_arguments(sys.argv[1:])
        app()
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != STOPPED:
            raise
        print("stopped", file=sys.stderr)
        sys.exit(STOPPED)
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

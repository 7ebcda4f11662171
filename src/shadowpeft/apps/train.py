"""``shadowpeft train RUN.yaml``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from shadowpeft.apps.common import quiet_libraries, show
from shadowpeft.apps.options import Json, Overrides, RunFile
from shadowpeft.errors import ShadowPeftError


def main(
    run_file: RunFile,
    settings: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune: one run, its folder, its adapter."""
    from shadowpeft.train.config import read_run

    run = read_run(run_file, settings or ())
    quiet_libraries()
    from shadowpeft.train.run import train

    summary = train(run, resume=resume, quiet=as_json)
    show(summary, "run", as_json)
    if summary["interrupted"]:
        again = shlex.join([run_file, *(settings or ())])
        raise InterruptedRunError(
            f"stopped after step {summary['steps']} of {summary['planned_steps']}; continue with: shadowpeft train {again} "
            "--resume"
        )


class InterruptedRunError(ShadowPeftError):
    """Ctrl-C ended the run early; its checkpoint and adapter are saved."""

"""``shadowpeft pretrain RUN.yaml``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from shadowpeft.apps.common import quiet_libraries, show
from shadowpeft.apps.options import Json, Overrides, RunFile
from shadowpeft.apps.train import InterruptedRunError


def main(
    run_file: RunFile,
    settings: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in its folder at the exact sample; start it if there is none."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Pretrain a shadow under the base's frozen head."""
    from shadowpeft.train.pretrain_config import read_pretraining

    run = read_pretraining(run_file, settings or ())
    quiet_libraries()
    from accelerate import PartialState

    from shadowpeft.train.pretrain import pretrain

    result = pretrain(run, resume=resume, quiet=as_json)
    if PartialState().is_main_process:
        show(result if as_json else _flat(result), "pretraining", as_json)
    if result["interrupted"]:
        again = shlex.join([run_file, *(settings or ())])
        raise InterruptedRunError(
            f"stopped after step {result['steps']} of {result['planned_steps']}; continue with: shadowpeft pretrain "
            f"{again} --resume"
        )


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that fits into a table."""
    plain = {k: v for k, v in result.items() if v is not None and not isinstance(v, (dict, list))}
    lists = {k: len(result[k]) for k in ("skipped",) if result[k]}
    return {**plain, **lists, **{f"perplexity of {k}": v for k, v in result["perplexity_by_corpus"].items()}}

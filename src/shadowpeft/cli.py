"""The command line: a table of commands. Each declares its options in its module of :mod:`shadowpeft.apps`.

A command imports torch and the like when it runs, so that ``--help`` is instant.
"""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from shadowpeft import __version__
from shadowpeft.apps import convert, demo, detach, doctor, export, generate, info, plan, pretrain, train
from shadowpeft.apps.options import Adapter, Base, Device, Json, System
from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.messages import shorten

app = typer.Typer(
    name="shadowpeft",
    help="Adapt a frozen language model with a shadow network; use it attached, detached, or both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_state = {"debug": False}


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
    _state["debug"] = debug


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
        typer.Option(help="attached, detached, base (with --task also lora, dora); repeatable. Default: all that fit."),
    ] = None,
    base: Base = None,
    limit: Annotated[
        Optional[int], typer.Option(min=1, help="Evaluate this many rows, drawn with a fixed seed.")
    ] = None,
    max_new_tokens: Annotated[
        Optional[int], typer.Option(min=1, help="Longest answer in tokens, with --data. Default: 64.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    split: Annotated[str, typer.Option(help="With --task: train, validation or test.")] = "test",
    shots: Annotated[int, typer.Option(min=0, help="With --task: worked examples before each question.")] = 0,
    method: Annotated[
        Optional[str], typer.Option(help="With --task: generate, likelihood or classify. Default: the task's.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --task: which rows --limit and --shots draw.")] = 0,
    out: Annotated[
        Optional[str], typer.Option(help="With --task: folder for predictions and records; continued if it is there.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Evaluate attached, detached and bare base on the same rows."""
    from shadowpeft.apps import evaluate as command

    if task is None:
        modes = mode or ["base", "attached", "detached"]
        command.main(adapter, data or "robot", modes, base, limit, max_new_tokens or 64, batch_size, device, json)
        return
    if data is not None or max_new_tokens is not None:
        given = "--data" if data is not None else "--max-new-tokens"
        raise typer.BadParameter(f"a task brings its own; leave {given} or --task out", param_hint=given)
    command.run_task(
        adapter,
        task,
        mode,
        base,
        split=split,
        shots=shots,
        limit=limit,
        seed=seed,
        method=method,
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
def serve(
    adapters: Annotated[
        list[str], typer.Argument(help="FOLDER or NAME=FOLDER: adapters (cloud: several), or an edge model.")
    ],
    role: Annotated[str, typer.Option(help="cloud (attached) or edge (detached; the router hands on to the cloud).")],
    base: Base = None,
    device: Device = "auto",
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    auth: Annotated[
        bool, typer.Option(help="Take keys from SHADOWPEFT_API_KEYS; --no-auth works on a loopback host only.")
    ] = True,
    cloud_url: Annotated[Optional[str], typer.Option(help="Edge: the cloud server.")] = None,
    cloud_model: Annotated[str, typer.Option(help="Edge: the model's name there.")] = "default",
    cloud_timeout: Annotated[float, typer.Option(min=0.1, help="Edge: seconds until the cloud counts as away.")] = 30.0,
    cloud_delay_ms: Annotated[float, typer.Option(min=0, help="Edge: wait before each request, as a network.")] = 0.0,
    when_cloud_down: Annotated[str, typer.Option(help="Edge: local (say so) or error.")] = "local",
    routing: Annotated[
        Optional[str], typer.Option(help="Edge: the calibration. Default: routing.json beside the model, if there.")
    ] = None,
    skills: Annotated[
        Optional[str],
        typer.Option(help="Edge: file of the known actions. Default: the calibration's, or the packaged 34."),
    ] = None,
    versions: Annotated[Optional[str], typer.Option(help="Folder whose sub-folders may be swapped in.")] = None,
    system: System = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that run at the same time.")] = 16,
    batches: Annotated[
        int, typer.Option(min=1, help="Batches that run at the same time: requests that start together are one.")
    ] = 4,
    queue: Annotated[int, typer.Option(min=1, help="Requests that wait; more are refused with 429.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    default_tokens: Annotated[int, typer.Option(min=1, help="Answer's length where a request names none.")] = 64,
    answer_seconds: Annotated[
        float, typer.Option(min=0.1, help="Time from a request to the end of its answer; then it is cut, and says so.")
    ] = 120.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time to finish what runs at shutdown.")] = 30.0,
) -> None:
    """Serve the OpenAI API, as cloud or as edge."""
    from shadowpeft.apps import serve as command

    command.main(
        command.Options(
            adapters=adapters,
            role=role,
            base=base,
            device=device,
            host=host,
            port=port,
            auth=auth,
            cloud_url=cloud_url,
            cloud_model=cloud_model,
            cloud_timeout=cloud_timeout,
            cloud_delay_ms=cloud_delay_ms,
            when_cloud_down=when_cloud_down,
            routing=routing,
            skills=skills,
            versions=versions,
            system=system,
            rows=rows,
            batches=batches,
            queue=queue,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            default_tokens=default_tokens,
            answer_seconds=answer_seconds,
            drain_seconds=drain_seconds,
        )
    )


app.command("demo")(demo.main)


def main() -> None:
    """Entry point: exit 0 done, 1 failed, 2 wrong usage or configuration; one sentence unless ``--debug``."""
    try:
        app()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if _state["debug"]:
            raise
        if isinstance(error, ShadowPeftError):
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"error: {type(error).__name__}: {shorten(error)} (run again with: shadowpeft --debug ...)", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | DataError) else 1)


if __name__ == "__main__":
    main()

"""The command line: a table of commands, each imported when it is called. No torch is imported for ``--help``."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from shadowpeft.serve.options import Options, command_of

app = typer.Typer(
    name="shadowpeft",
    help="Adapt a frozen language model with a shadow network; use it attached, detached, or both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[Optional[str], typer.Option(help="Base model: alias, folder or Hub id. Default: the adapter's own.")]
Adapter = Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.")]
Mode = Annotated[str, typer.Option(help="attached, detached or base.")]
System = Annotated[Optional[str], typer.Option(help="System message.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(help="0: greedy.")]
Device = Annotated[str, typer.Option(help="Where models run: cpu, cuda, cuda:1, mps; auto: cuda if there is one.")]
Seed = Annotated[int, typer.Option(help="Seed for sampling.")]
_state = {"debug": False}


def _version(value: bool) -> None:
    if value:
        from shadowpeft import __version__

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


@app.command()
def train(
    run: Annotated[str, typer.Argument(help="YAML file that describes the run.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune: one run, its folder, its adapter."""
    from shadowpeft.apps import train as command

    command.main(run, resume, json)


@app.command()
def pretrain(
    run: Annotated[str, typer.Argument(help="YAML file that describes the run.")],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in its folder at the exact sample; start it if there is none."),
    ] = False,
    json: Json = False,
) -> None:
    """Pretrain a shadow under the base's frozen head."""
    from shadowpeft.apps import pretrain as command

    command.main(run, resume, json)


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


@app.command()
def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    mode: Mode = "attached",
    base: Base = None,
    system: System = None,
    max_new_tokens: NewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Answer one prompt."""
    from shadowpeft.apps import generate as command

    command.generate(adapter, prompt, mode, base, system, max_new_tokens, temperature, seed, device, json)


@app.command()
def chat(
    adapter: Adapter,
    mode: Mode = "attached",
    base: Base = None,
    system: System = None,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Talk to the model in the terminal."""
    from shadowpeft.apps import generate as command

    command.chat(adapter, mode, base, system, max_new_tokens, temperature, seed, device)


@app.command()
def detach(
    adapter: Adapter,
    out: Annotated[str, typer.Argument(help="New folder for the edge model.")],
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    json: Json = False,
) -> None:
    """Write the shadow as a stand-alone stock model."""
    from shadowpeft.apps import detach as command

    command.main(adapter, out, base, dtype, json)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Adapter (folder or Hub id), or the folder of an edge model.")],
    out: Annotated[str, typer.Argument(help="New folder; for gguf a new file that ends in .gguf.")],
    to: Annotated[str, typer.Option(help="hf, gguf, onnx, int8 or int4.")],
    dtype: Annotated[
        Optional[str], typer.Option(help="hf: f32, f16, bf16; gguf: f16, q8_0, q4_0, f32. Default: the first.")
    ] = None,
    base: Base = None,
    vocab_from: Annotated[
        Optional[str],
        typer.Option(
            help="JSONL file, or 'robot': keep only the tokens that its rows need, and those of single bytes."
        ),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Read the file back and compare greedy tokens with the source.")] = True,
    evaluate: Annotated[
        Optional[str], typer.Option(help="Score this task before and after, as eval --task does.")
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="With --evaluate: this many rows.")] = None,
    json: Json = False,
) -> None:
    """Write the edge model for another runtime, with a smaller vocabulary if wanted, and compare it with its source."""
    from shadowpeft.apps import export as command

    command.main(source, out, to, dtype, base, vocab_from, verify, evaluate, limit, json)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id: an adapter of any format, or a projected checkpoint.")
    ],
    out: Annotated[str, typer.Argument(help="New folder.")],
    base: Base = None,
    to: Annotated[
        Optional[str],
        typer.Option(
            help="shadowpeft, authors, peft or projected; stock for a projected checkpoint. Default: shadowpeft or stock."
        ),
    ] = None,
    shadow_model: Annotated[
        Optional[str], typer.Option(help="The model an explicit shadow started from, where the files do not say.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the folder.")] = False,
    json: Json = False,
) -> None:
    """Translate an adapter between this package's format, the authors' and PEFT's SHADOW."""
    from shadowpeft.apps import convert as command

    command.main(source, out, base, to, shadow_model, force, json)


@app.command()
def plan(
    run: Annotated[str, typer.Argument(help="YAML file that describes the run.")],
    json: Json = False,
) -> None:
    """Parameters, memory and time of a run, before it is trained."""
    from shadowpeft.apps import plan as command

    command.main(run, json)


@app.command()
def info(adapter: Adapter, json: Json = False) -> None:
    """What an adapter is."""
    from shadowpeft.apps import info as command

    command.main(adapter, json)


@app.command()
def doctor(
    adapter: Annotated[
        Optional[str],
        typer.Argument(help="Folder or Hub id of an adapter of any format. Default: the environment alone."),
    ] = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Check versions, device, adapter, base and tokenizer, and test the model on itself."""
    from shadowpeft.apps import doctor as command

    command.main(adapter, base, json)


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


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the results.")] = "demo-output",
    full: Annotated[bool, typer.Option("--full", help="2,800 steps and the whole test sets: hours on a CPU.")] = False,
    json: Json = False,
) -> None:
    """Train the packaged model on the robot set, evaluate it attached, detached and routed, show the result."""
    from shadowpeft.apps import demo as command

    command.main(out, full, json)


def main() -> None:
    """Entry point: exit 0 done, 1 failed, 2 wrong usage or configuration; one sentence unless ``--debug``."""
    try:
        app()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        from shadowpeft.errors import ConfigError, DataError, ShadowPeftError

        if _state["debug"]:
            raise
        if isinstance(error, ShadowPeftError):
            print(f"error: {error}", file=sys.stderr)
        else:
            first = str(error).strip().splitlines()[0] if str(error).strip() else "no further description"
            print(f"error: {type(error).__name__}: {first} (run again with: shadowpeft --debug ...)", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError | DataError) else 1)


if __name__ == "__main__":
    main()

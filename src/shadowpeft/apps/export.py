"""``shadowpeft export SOURCE OUT --to FORMAT``: the edge model as a file of another runtime, compared with its source."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from shadowpeft import export
from shadowpeft.apps.common import left_behind, load_tokenizer_of, quiet_libraries, show, system_message
from shadowpeft.apps.options import Base, Json
from shadowpeft.errors import ConfigError, ShadowPeftError, UnsupportedModelError
from shadowpeft.storage import written_whole
from shadowpeft.terminal import terminal

if TYPE_CHECKING:
    from rich.console import Console


def main(
    source: Annotated[str, typer.Argument(help="Adapter (folder or Hub id), or the folder of an edge model.")],
    out: Annotated[str, typer.Argument(help="New folder; for gguf a new file that ends in .gguf.")],
    to: Annotated[
        str, typer.Option(help="hf, vllm (attached, with its draft), gguf, onnx (scoring only), onnx-genai, int8, int4.")
    ],
    dtype: Annotated[
        Optional[str], typer.Option(help="hf, vllm: f32, f16, bf16; gguf: f16, q8_0, q4_0, f32. Default: the first.")
    ] = None,
    base: Base = None,
    vocab_from: Annotated[
        Optional[str],
        typer.Option(
            help="File of rows, or a packaged set such as robot: keep only the tokens that the rows need, and those of single "
            "bytes."
        ),
    ] = None,
    skills: Annotated[
        Optional[str],
        typer.Option(help="With --vocab-from: file of the tools that its rows call."),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Read the file back and compare greedy tokens with the source.")] = True,
    evaluate: Annotated[
        Optional[str], typer.Option(help="Score this task before and after, as eval --task does.")
    ] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="With --evaluate: this many rows.")] = None,
    as_json: Json = False,
) -> None:
    """Write the edge model for another runtime, with a smaller vocabulary if wanted, and compare it with its source."""
    to = to.lower() if to.lower() in export.FORMATS else to  # GGUF and ONNX are names that people write large
    target, dtype = export.find(to, dtype)
    path = Path(out)
    if path.exists():
        raise ConfigError(f"'{path}' exists; choose another name")
    if target.suffix and path.suffix != target.suffix:
        raise ConfigError(
            f"'{path}' does not end in {target.suffix}, but the format '{to}' is one such file; rename it"
        )
    if limit is not None and evaluate is None:
        raise ConfigError("--limit says how many rows --evaluate scores, which was not given; give both or neither")
    if evaluate is not None and not target.generates:
        raise ConfigError(f"--evaluate needs a format that transformers loads, which '{to}' is not; leave it out")
    if base is not None and not is_adapter(source):
        raise ConfigError(f"--base is the base of an adapter, but '{source}' is a model that needs none; leave it out")
    if skills is not None and vocab_from is None:
        raise ConfigError(
            "--skills names the tools that the rows of --vocab-from call, which was not given; give both or neither"
        )
    attached = None
    if to == "vllm":
        if vocab_from is not None:
            raise ConfigError("--vocab-from changes the edge model's tokens, but a draft model has the base's; leave it out")
        if not is_adapter(source):
            raise ConfigError(f"'{source}' is an edge model but vllm serves the attached one; give the adapter")
        attached = (source, base)
    quiet_libraries()
    from shadowpeft.runtime import prepare_cpu

    prepare_cpu()
    console = terminal(stderr=True, quiet=as_json)
    with console.status("loading the source"):
        model, tokenizer = load_source(source, base)
    system = system_message(source, None)
    needs = None if vocab_from is None else Vocabulary(vocab_from, skills, system)
    result = run(model, tokenizer, path, to, dtype, needs, verify, evaluate, limit, console, attached, system)
    result["export"] |= left_behind(source, "docs/export.md")
    show(result, f"{source} as {to}", as_json)


def is_adapter(source: str) -> bool:
    """Whether ``source`` is an adapter (folder or Hub id), not the folder of an edge model."""
    folder = Path(source)
    return not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def load_source(source: str, base: str | None = None) -> tuple[Any, Any]:
    """The edge model, float32, and its tokenizer: of a folder that ``detach`` or ``export`` wrote, or of an adapter.

    Raises:
        ConfigError: if the weights are quantised, damaged or incomplete, or there is no tokenizer.
        UnsupportedModelError: if it is a classifier.
    """
    import shadowpeft

    folder = Path(source)
    if not is_adapter(source):
        from shadowpeft.tokenizer import load_tokenizer

        return _stock(folder), load_tokenizer(source)
    tokenizer = load_tokenizer_of(source, base)
    model: Any = shadowpeft.detach(shadowpeft.load(source, base)).cpu()
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"'{source}' is a classifier ({type(model).__name__}) but export writes causal language models; use shadowpeft "
            "detach"
        )
    return model, tokenizer


def _stock(folder: Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from shadowpeft.hf.base.load import load_whole
    from shadowpeft.hf.files.projected import is_projected, read_projected, to_stock

    if is_projected(folder):
        return to_stock(read_projected(folder))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    classes = config.architectures or []
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"the weights in '{folder}' are quantised; export the edge model that they were made from")
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise UnsupportedModelError(
            f"'{folder}' holds {', '.join(classes) or 'a model of no named class'} but export writes causal language models; "
            "give the folder of one"
        )
    what = f"the edge model in '{folder}'"
    return load_whole(AutoModelForCausalLM, folder, what, config=config, dtype=torch.float32).eval()


def run(
    model: Any,
    tokenizer: Any,
    path: Path,
    to: str,
    dtype: str,
    needs: Vocabulary | None,
    verify: bool,
    evaluate: str | None,
    limit: int | None,
    console: Console,
    attached: tuple[str, str | None] | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Trim, write beside, read back, compare, rename; returns the report.

    Args:
        needs: the rows whose tokens are kept; None: all tokens are.
        attached: adapter and base, where the format holds the attached model too.
        system: the message that the model was trained with, for the Modelfile and for the prompts of the comparison.

    Raises:
        ShadowPeftError: if the file disagrees with its source (nothing is left behind), or cannot be written.
        ConfigError: if another file stands where a Modelfile would go.
    """
    from shadowpeft.ends import end_tokens

    report: dict[str, Any] = {"format": to, "dtype": dtype, "class": type(model).__name__}
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    report["source"] = {"parameters": model.num_parameters(), "vocabulary": model.config.vocab_size, "bytes": before}
    small, words, kept = model, tokenizer, None
    if needs is not None:
        with console.status("trimming the vocabulary"):
            small, words, kept = needs.trim(model, tokenizer)
    ends = words.convert_ids_to_tokens(end_tokens(small, words))
    report["export"] = {"parameters": small.num_parameters(), "vocabulary": small.config.vocab_size, "ends": ends}
    if to == "gguf":
        refuse_another_modelfile(path, words, ends, system)
    is_folder, remedy = not export.FORMATS[to].suffix, "free some space or choose another folder"
    with written_whole(path, "the export", remedy, folder=is_folder, replace=False) as beside:
        with console.status(f"writing {to} {dtype}"):
            placed = {}
            if attached is not None:
                from shadowpeft.export.vllm import attach

                placed = attach(*attached, beside)
            notes = export.write(to, small, words, beside, dtype)
        report["export"] |= {**sizes(beside), **placed, **notes}
        if verify or evaluate is not None:
            with console.status("reading it back"):
                again = export.read(to, beside)
        if verify:
            with console.status("comparing greedy tokens"):
                report["verify"] = check_against_source(
                    model, small, again, words, kept, to, dtype, path, system
                )
        if evaluate is not None:
            report["evaluate"] = scores(model, tokenizer, again, words, evaluate, limit, console)
    if to == "gguf":
        report["export"]["modelfile"] = write_modelfile(path, words, ends, system)
    return {**report, "path": str(path)}


def refuse_another_modelfile(path: Path, tokenizer: Any, ends: list[str], system: str | None) -> None:
    """Raise if :func:`write_modelfile` would find another file in the Modelfile's place.

    Raises:
        ConfigError: naming it.
    """
    from shadowpeft.export import modelfile

    with suppress(UnsupportedModelError):  # there will be none, and the report says why
        modelfile.place(path, tokenizer, ends, system)


def write_modelfile(path: Path, tokenizer: Any, ends: list[str], system: str | None) -> str:
    """Write Ollama's Modelfile beside a GGUF file: its name, or why there is none."""
    from shadowpeft.export import modelfile

    try:
        return modelfile.write(path, tokenizer, ends, system).name
    except UnsupportedModelError as error:
        return f"none: {error}"


def _calls(row: dict[str, Any]) -> bool:
    """Whether a row still has calls as an object, in its answer or before."""
    return "tool_calls" in row.get("answer", {}) or any("tool_calls" in message for message in row["messages"])


@dataclass(frozen=True)
class Vocabulary:
    """The rows whose tokens a smaller vocabulary keeps."""

    rows: str
    """A file, or the name of a packaged set."""
    skills: str | None = None
    """The file of the tools that they call; a packaged set has its own."""
    system: str | None = None
    """The message of rows that bring none."""

    def trim(self, model: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
        """Model, tokenizer and kept ids over these tokens.

        Raises:
            ConfigError: if rows call tools and none are named.
        """
        from shadowpeft.data.actions import REMOTE, written
        from shadowpeft.data.robot_tools import tools_named
        from shadowpeft.data.tool_rows import writes_calls
        from shadowpeft.export import vocab
        from shadowpeft.train.rows import packaged, read_rows, system_of, tools_of_run

        tools = tools_of_run(self.rows, None) if self.skills is None else tools_named(self.skills)
        parts = ("train", "validation") if packaged(self.rows) else ("train",)
        own = writes_calls(tokenizer)  # then the model may have learnt either form
        forms = [True, False] if own and tools is not None else [True]
        rows = [row for part in parts for compact in forms for row in read_rows(self.rows, part, tools=tools, compact=compact)]
        calling = next((row for row in rows if _calls(row)), None)
        if calling is not None and tools is None and not own:
            raise ConfigError(
                f"{getattr(calling, 'where', '') or self.rows} calls tools, which the device writes in a form of its own; name "
                "them with --skills actions.json"
            )
        needed = vocab.needed_tokens(tokenizer, rows, system_of(self.rows, self.system))
        needed |= {*tokenizer(written(REMOTE), add_special_tokens=False).input_ids}  # rows with words may stand for it
        small = vocab.trim(model, tokenizer, needed)
        return small.model, small.tokenizer, small.kept


def check_against_source(
    source: Any,
    small: Any,
    target: Any,
    tokenizer: Any,
    kept: Any,
    to: str,
    dtype: str,
    path: Path,
    system: str | None,
) -> dict[str, Any]:
    """Greedy tokens against the ``source`` and weights against the ``small`` copy, held against the limits of the format.

    Raises:
        ShadowPeftError: if they are exceeded.
    """
    from shadowpeft.export.verify import compare, weight_error

    limits = export.FORMATS[to].limits[dtype]
    measured = compare(source, target, tokenizer, kept, system=system)
    if export.FORMATS[to].generates:
        measured["weight_error"] = weight_error(small, target)
    failed = []
    if measured["tokens_equal"] < limits.agreement * measured["tokens"]:
        itself = compare(source, small, tokenizer, kept, system=system)  # a copy, read without a cache
        if itself["tokens_equal"] < limits.agreement * itself["tokens"]:
            raise ShadowPeftError(
                f"a {type(source).__name__} chooses other tokens with its cache than without ({itself['tokens_equal']} of "
                f"{itself['tokens']} are equal), so no export of it can be compared; '{path}' was not written (use --no-verify "
                "to write it anyway)"
            )
        failed.append(
            f"agrees with its source on {measured['tokens_equal']} of {measured['tokens']} greedy tokens but {to} {dtype} must "
            f"reach {limits.agreement:.0%}"
        )
    if measured.get("weight_error", 0.0) > limits.error:
        failed.append(
            f"has a matrix that is {measured['weight_error']:.2g} off (relative) but rounding explains {limits.error:.2g}"
        )
    if failed:
        raise ShadowPeftError(
            f"the exported model {' and '.join(failed)}; '{path}' was not written (use --no-verify to write it anyway)"
        )
    return {**measured, "tokens_required": limits.agreement, "weight_error_allowed": limits.error}


def scores(
    source: Any, tokenizer: Any, target: Any, words: Any, name: str, limit: int | None, console: Console
) -> dict[str, Any]:
    """Score and interval of a task, of the source and of the export."""
    from shadowpeft.apps.common import bar
    from shadowpeft.data.tasks import get_task
    from shadowpeft.evaluate import evaluate_task

    task, result = get_task(name), {}
    for when, model, their in (("before", source, tokenizer), ("after", target, words)):
        total = len(task.load("test", limit=limit))
        with bar(console, f"{name}, {when}", total, quiet=console.quiet) as progress:
            record = evaluate_task(model, their, task, mode="base", limit=limit, progress=progress)
        result[when] = {key: record[key] for key in ("score", "interval", "n", "tokens_per_second")}
    return {"task": name, **result}


def sizes(path: Path) -> dict[str, Any]:
    """Bytes of the weights (the largest files' kind) and of everything."""
    files = {f: f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file()}
    weights = [size for f, size in files.items() if f.suffix in (".safetensors", ".gguf", ".onnx", ".data")]
    return {"bytes": sum(weights), "bytes_with_tokenizer": sum(files.values())}

"""``shadowpeft export SOURCE OUT --to FORMAT``: the edge model as a file of another runtime, compared with its source."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from shadowpeft import export
from shadowpeft.apps.common import load_tokenizer_of, quiet_libraries, show
from shadowpeft.errors import ConfigError, ShadowPeftError, UnsupportedModelError


def main(
    source: str,
    out: str,
    to: str,
    dtype: str | None,
    base: str | None,
    vocab_from: str | None,
    verify: bool,
    evaluate: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Export and report: sizes before and after, agreement with the source, and a task's score before and after."""
    target, dtype = export.find(to, dtype)
    path = Path(out)
    if path.exists():
        raise ConfigError(f"'{path}' exists; choose another name")
    if target.suffix and path.suffix != target.suffix:
        raise ConfigError(
            f"'{path}' does not end in {target.suffix}, as the one file of the format '{to}' must; rename it"
        )
    if evaluate is not None and not target.generates:
        raise ConfigError(f"--evaluate needs a format that transformers loads, which '{to}' is not; leave it out")
    quiet_libraries()
    from shadowpeft.train.run import prepare_cpu

    prepare_cpu()
    console = Console(stderr=True, quiet=as_json)
    with console.status("loading the source"):
        model, tokenizer = load_edge(source, base)
    result = run(model, tokenizer, path, to, dtype, vocab_from, verify, evaluate, limit, console)
    show(Console(), result if as_json else flat(result), f"{source} as {to}", as_json)


def load_edge(source: str, base: str | None = None) -> tuple[Any, Any]:
    """The edge model, float32, and its tokenizer: of a folder that ``detach`` or ``export`` wrote, or of an adapter.

    Raises:
        UnsupportedModelError: if it is a classifier.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    import shadowpeft

    folder = Path(source)
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        from shadowpeft.hf.projected import is_projected, read_projected, to_stock

        stock: PreTrainedModel
        if is_projected(folder):
            stock = to_stock(read_projected(folder))
        else:
            stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return stock.eval(), AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer_of(source, base)
    model: Any = shadowpeft.detach(shadowpeft.load(source, base)).cpu()
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"'{source}' is a classifier ({type(model).__name__}) and export writes causal ones; use shadowpeft detach"
        )
    return model, tokenizer


def run(
    model: Any,
    tokenizer: Any,
    path: Path,
    to: str,
    dtype: str,
    vocab_from: str | None,
    verify: bool,
    evaluate: str | None,
    limit: int | None,
    console: Console,
) -> dict[str, Any]:
    """Trim, write beside, read back, compare, rename; returns the report.

    Raises:
        ShadowPeftError: if the file disagrees with its source (nothing is left behind), or cannot be written.
    """
    from shadowpeft.train.trainer import WRITE_ERRORS, reason

    report: dict[str, Any] = {"format": to, "dtype": dtype, "class": type(model).__name__}
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    report["source"] = {"parameters": model.num_parameters(), "vocabulary": model.config.vocab_size, "bytes": before}
    small, words, kept = model, tokenizer, None
    if vocab_from is not None:
        with console.status("trimming the vocabulary"):
            small, words, kept = trim(model, tokenizer, vocab_from)
    beside = path.with_name(f".{path.stem}.partial{path.suffix}")
    _remove(beside)
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with console.status(f"writing {to} {dtype}"):
            notes = export.write(to, small, words, beside, dtype)
        report["export"] = {
            "parameters": small.num_parameters(),
            "vocabulary": small.config.vocab_size,
            **sizes(beside),
            **notes,
        }
        if verify or evaluate is not None:
            with console.status("reading it back"):
                again = export.read(to, beside)
        if verify:
            with console.status("comparing greedy tokens"):
                report["verify"] = check(model, again, words, kept, to, dtype, path)
        if evaluate is not None:
            report["evaluate"] = scores(model, tokenizer, again, words, evaluate, limit, console)
        beside.rename(path)
    except WRITE_ERRORS as error:
        if isinstance(error, RuntimeError) and not isinstance(error, OSError):
            raise
        raise ShadowPeftError(
            f"'{path}' could not be written ({reason(error)}); free some space or choose another folder"
        ) from error
    finally:
        _remove(beside)
    return {**report, "path": str(path)}


def trim(model: Any, tokenizer: Any, vocab_from: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and kept ids over the tokens that the rows of ``vocab_from`` need; ``robot``: the packaged set."""
    from shadowpeft.data import chat
    from shadowpeft.export import vocab
    from shadowpeft.train.run import ROBOT_SYSTEM, robot_rows

    if vocab_from == "robot":
        rows, system = [*robot_rows("train"), *robot_rows("validation")], ROBOT_SYSTEM
    else:
        rows, system = chat.read_jsonl(vocab_from), None
    found = vocab.trim(model, tokenizer, vocab.needed_tokens(tokenizer, rows, system))
    return found.model, found.tokenizer, found.kept


def check(source: Any, target: Any, tokenizer: Any, kept: Any, to: str, dtype: str, path: Path) -> dict[str, Any]:
    """:func:`shadowpeft.export.verify.compare`, held against the share that the format must reach.

    Raises:
        ShadowPeftError: if it does not.
    """
    from shadowpeft.export.verify import compare

    found = compare(source, target, tokenizer, kept)
    least = export.FORMATS[to].agreement[dtype]
    if found["tokens_equal"] < least * found["tokens"]:
        raise ShadowPeftError(
            f"the exported model agrees with its source on {found['tokens_equal']} of {found['tokens']} greedy tokens, where "
            f"{to} {dtype} must reach {least:.0%}; '{path}' was not written (--no-verify writes it all the same)"
        )
    return {**found, "required": least}


def scores(
    source: Any, tokenizer: Any, target: Any, words: Any, name: str, limit: int | None, console: Console
) -> dict[str, Any]:
    """Score and interval of a task, of the source and of the export."""
    from shadowpeft.apps.common import bar
    from shadowpeft.data.tasks import get_task
    from shadowpeft.evaluate import evaluate_task

    task, found = get_task(name), {}
    for when, model, their in (("before", source, tokenizer), ("after", target, words)):
        total = len(task.load("test", limit=limit))
        with bar(console, f"{name}, {when}", total, quiet=console.quiet) as progress:
            record = evaluate_task(model, their, task, mode="base", limit=limit, progress=progress)
        found[when] = {key: record[key] for key in ("score", "interval", "n", "tokens_per_second")}
    return {"task": name, **found}


def sizes(path: Path) -> dict[str, Any]:
    """Bytes of the weights (the largest files' kind) and of everything."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    weights = [f for f in files if f.suffix in (".safetensors", ".gguf", ".onnx", ".data")]
    return {
        "bytes": sum(f.stat().st_size for f in weights),
        "bytes_with_tokenizer": sum(f.stat().st_size for f in files),
    }


def flat(report: dict[str, Any]) -> dict[str, Any]:
    """One level, for a table."""
    found: dict[str, Any] = {}
    for key, value in report.items():
        if isinstance(value, dict):
            found.update({f"{key}: {k}": v for k, v in flat(value).items()})
        else:
            found[key] = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
    return found


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

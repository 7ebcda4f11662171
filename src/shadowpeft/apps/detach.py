"""``shadowpeft detach ADAPTER OUT``: the edge model as a stock transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shadowpeft.apps.common import left_behind, load_tokenizer_of, quiet_libraries, show
from shadowpeft.apps.options import Adapter, Base, Json
from shadowpeft.errors import ConfigError


def main(
    adapter: Adapter,
    out: Annotated[str, typer.Argument(help="New folder for the edge model.")],
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; f32, bf16, f16 mean the same.")] = "float32",
    as_json: Json = False,
) -> None:
    """Write the shadow as a stand-alone stock model."""
    folder = Path(out)
    if folder.exists():
        raise ConfigError(f"'{folder}' exists; choose another folder")
    quiet_libraries()
    import shadowpeft
    from shadowpeft.runtime import DTYPES

    dtype = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(dtype, dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}' but must be one of {', '.join(DTYPES)}")
    tokenizer = load_tokenizer_of(adapter, base)
    edge: Any = shadowpeft.detach(shadowpeft.load(adapter, base), tokenizer=tokenizer)
    result = {**save_edge(edge.to(DTYPES[dtype]), tokenizer, folder), "dtype": dtype}
    result |= left_behind(adapter, "docs/routing.md")
    show(result, "edge model", as_json)


def save_edge(edge: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Save a detached or merged model, made to stop where answers ended in training.

    Returns:
        its class, parameters, ends, bytes and folder.
    """
    from shadowpeft.ends import end_tokens, generation_config
    from shadowpeft.hf.files.digests import write_sums
    from shadowpeft.storage import written_whole

    ends: list[int] = []
    if edge.can_generate():
        ends = end_tokens(edge, tokenizer)
        edge.generation_config = generation_config(edge, tokenizer)
    with written_whole(folder, "the edge model", "free some space or choose another folder", replace=False) as beside:
        edge.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        write_sums(beside)
    return {
        "class": type(edge).__name__,
        "parameters": sum(p.numel() for p in edge.parameters()),
        "ends": tokenizer.convert_ids_to_tokens(ends),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "folder": str(folder),
    }

"""``shadowpeft detach ADAPTER OUT``: the edge model as a stock transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shadowpeft.apps.common import load_tokenizer_of, quiet_libraries, show
from shadowpeft.apps.options import Adapter, Base, Json
from shadowpeft.errors import ConfigError


def main(
    adapter: Adapter,
    out: Annotated[str, typer.Argument(help="New folder for the edge model.")],
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
) -> None:
    """Write the shadow as a stand-alone stock model."""
    folder = Path(out)
    if folder.exists():
        raise ConfigError(f"'{folder}' exists; choose another folder")
    quiet_libraries()
    import shadowpeft
    from shadowpeft.runtime import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"dtype is '{dtype}' but must be one of {', '.join(DTYPES)}")
    tokenizer = load_tokenizer_of(adapter, base)
    edge = shadowpeft.detach(shadowpeft.load(adapter, base)).to(DTYPES[dtype])
    result = {**save_edge(edge, tokenizer, folder), "dtype": dtype}
    show(Console(), result, "edge model", as_json)


def save_edge(edge: object, tokenizer: object, folder: Path) -> dict[str, object]:
    """Save a detached model; returns class, parameters, bytes and folder."""
    from shadowpeft.storage import written_whole

    with written_whole(folder, "the edge model", "free some space or choose another folder", replace=False) as beside:
        edge.save_pretrained(beside)  # type: ignore[attr-defined]
        tokenizer.save_pretrained(beside)  # type: ignore[attr-defined]
    return {
        "class": type(edge).__name__,
        "parameters": sum(p.numel() for p in edge.parameters()),  # type: ignore[attr-defined]
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "folder": str(folder),
    }

"""``shadowpeft convert SRC DST``: an adapter of one shadow package as one of another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from shadowpeft.apps.common import has_tokenizer, quiet_libraries, show
from shadowpeft.apps.options import Base, Json
from shadowpeft.errors import ConfigError

TARGETS = ("shadowpeft", "authors", "peft", "projected", "stock")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "*chat_template*",
)
"""Files of a tokenizer, which go along as they are."""


def main(
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
    as_json: Json = False,
) -> None:
    """Translate an adapter between this package's format, the authors' and PEFT's SHADOW."""
    folder, here = Path(out).resolve(), Path.cwd().resolve()
    if to is not None and to not in TARGETS:
        raise ConfigError(f"--to is '{to}' but must be one of {', '.join(TARGETS)}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file; choose another folder")
    if folder in (here, *here.parents):
        raise ConfigError(
            f"'{folder}' is or holds the working directory, and the conversion replaces a whole folder; name a new one"
        )
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ConfigError(f"'{folder}' is not empty; choose another folder, or replace it with --force")
    if Path(source).is_dir() and folder in (Path(source).resolve(), *Path(source).resolve().parents):
        raise ConfigError(f"'{folder}' holds the source '{source}'; choose another folder")
    quiet_libraries()
    result = convert(source, folder, base=base, to=to, shadow_model=shadow_model)
    show(result, "converted", as_json)


def convert(
    source: str, folder: Path, *, base: str | None = None, to: str | None = None, shadow_model: str | None = None
) -> dict[str, Any]:
    """Convert ``source`` into ``folder``, written beside and renamed; returns the report.

    Raises:
        ConfigError: if the target cannot express the adapter, naming what.
        AdapterFileError: if the source is damaged.
        ShadowPeftError: if it cannot be written; what was in ``folder`` before is still there.
    """
    from shadowpeft.hf import formats
    from shadowpeft.hf.load import load
    from shadowpeft.storage import written_whole

    kind = formats.detect(source)
    to = to or ("stock" if kind == formats.PROJECTED else formats.OURS)
    if (kind == formats.PROJECTED) != (to == "stock"):
        raise ConfigError(
            f"'{source}' is in the format '{kind}' and cannot become '{to}'; a projected checkpoint becomes 'stock' and an "
            "adapter becomes one of the others (use shadowpeft detach for a stock edge model)"
        )
    dropped: list[str] = []
    notes: list[str] = []
    model: Any
    if kind == formats.PROJECTED:
        from shadowpeft.ends import generation_config
        from shadowpeft.hf.files.projected import read_projected, to_stock
        from shadowpeft.tokenizer import load_tokenizer

        model = to_stock(read_projected(source))
        if has_tokenizer(source):
            model.generation_config = generation_config(model, load_tokenizer(source))
        notes.append("the projection is folded into the head, which rounds its product")
    elif kind == formats.OURS:
        model = load(source, base, shadow_model=shadow_model)
    else:
        model, translation = formats.load(source, kind, base, shadow_model=shadow_model)
        dropped, notes = translation.dropped, translation.notes
    with written_whole(folder, "the conversion", "free some space or choose another folder") as beside:
        notes = notes + _write(model, beside, to)
        if Path(source).is_dir():
            for path in (path for pattern in _TOKENIZER for path in Path(source).glob(pattern)):
                (shutil.copytree if path.is_dir() else shutil.copy2)(path, beside / path.name)
    return {
        "source": source,
        "from": kind,
        "to": to,
        "folder": str(folder),
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
        "dropped": dropped,
        "notes": notes,
    }


def _write(model: Any, folder: Path, to: str) -> list[str]:
    from shadowpeft.hf import formats
    from shadowpeft.hf.formats.projected_writer import save_projected

    if to in (formats.AUTHORS, formats.PEFT):
        return formats.write(model, folder, to)
    if to == formats.PROJECTED:
        save_projected(model, folder)
        return ["the refinement of the base is left behind; this is the shadow alone, with its projection"]
    model.save_pretrained(folder)
    return []

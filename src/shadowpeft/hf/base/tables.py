"""Token tables in adapter files: PEFT writes the base's embedding and head along once the vocabulary has grown.

A table in a file never replaces the base's own: rows that both have must be equal. Only rows at the end, which new tokens
brought and each ``resize_token_embeddings`` draws anew, are taken from the file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from shadowpeft.errors import AdapterFileError, BaseMismatchError, ConfigError
from shadowpeft.hf.base.fingerprint import SAME

_WRAPPER = re.compile(r"\.(original_module|modules_to_save\.[^.]+)(?=\.(weight|bias)$)")
"""What PEFT's wrapper around a trained module puts into names; the adapter's own name stays in them."""


def tables_among(model: Any, names: Iterable[str], prefix: str = "") -> dict[str, nn.Module]:
    """Those of ``names`` that are a token table or LM head of ``model`` by PEFT's names, each with the base's own module.

    Args:
        prefix: what names in a file have before the model's own.
    """
    own: dict[str, nn.Module] = {}
    tables = [getattr(t, "original_module", t) for t in (model.get_input_embeddings(), model.get_output_embeddings())]
    for name, module in model.named_modules():
        table = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        if any(table is each for each in tables if each is not None) and not name.endswith(".original_module"):
            own.update({f"{prefix}{name}.{key}": table for key in ("weight", "bias")})
    plain = {name: _WRAPPER.sub("", name) for name in names}
    return {name: own[key] for name, key in plain.items() if key in own}


def new_rows(
    tables: Mapping[str, nn.Module], stored: Mapping[str, Tensor], *, others: Iterable[str] = ()
) -> list[tuple[Any, int, Tensor]]:
    """For each of the base's tables that a file differs from at its end: the base's tensor, the first such row, the file's.

    Args:
        tables: the base's modules by name. stored: the file's tensors by the same names, each ``(V, ...)``.
        others: names of further adapters on the base, whose tokens new rows would change.

    Raises:
        BaseMismatchError: if a table has another number of rows.
        AdapterFileError: if rows of the first half differ: it is another base's table.
        ConfigError: if new rows are needed but other adapters share the table.
    """
    new = []
    for name, module in tables.items():
        if ".modules_to_save." in name:  # PEFT writes a trained table under its own name too, and that one is read
            continue
        own: Any = getattr(module, name.rpartition(".")[2])
        value = stored[name]
        if own is None or own.shape != value.shape:
            raise BaseMismatchError(
                f"'{name}' has {len(value)} rows in the adapter's file and {0 if own is None else len(own)} in this base; add "
                f"the adapter's new tokens with resize_token_embeddings({len(value)}) first"
            )
        if own.is_meta or not own.is_floating_point() or type(own.data) is not Tensor:
            warnings.warn(
                f"'{name}' of this base is quantised or offloaded, so the rows in the adapter's file are neither compared nor "
                "taken; load the base unquantised on one device if the adapter brought new tokens",
                stacklevel=2,
            )
            continue
        mine, theirs = (rows.detach().float().reshape(len(rows), -1) for rows in (own, value.to(own.device)))
        differing = ~((mine - theirs).norm(dim=1) <= SAME * theirs.norm(dim=1))
        first = min(_first(differing, len(value)), _first_of_the_end(own, value))
        if first == len(value):
            continue
        if first < len(value) / 2:
            raise AdapterFileError(
                f"row {first} of '{name}' in the adapter's file is not that of this base; load the base it was trained on"
            )
        if list(others):
            raise ConfigError(
                f"the adapter brings rows {first} to {len(value) - 1} of '{name}', which other adapters of this base share "
                f"({', '.join(others)}); load it on a base of its own"
            )
        new.append((own, first, value))
    return new


def _first(rows: Tensor, count: int) -> int:
    """The first place where ``rows`` holds, else ``count``."""
    return int(rows.nonzero()[0]) if bool(rows.any()) else count


def _first_of_the_end(own: Tensor, value: Tensor) -> int:
    """Where the rows begin that are not bit for bit the base's, up to the last one; transformers draws new rows close to one
    another, so a tolerance takes two drawings for one. The number of rows where the whole table has been rounded otherwise.
    """
    mine, theirs = own.detach(), value.to(own.device)  # either may have been rounded to the other's type
    exact = ((theirs.to(mine.dtype) == mine) | (mine.to(theirs.dtype) == theirs)).reshape(len(value), -1).all(1)
    start = len(value) - _first(exact.flip(0), len(value))
    return start if start >= len(value) / 2 else len(value)


@torch.no_grad()
def take(rows: Iterable[tuple[Any, int, Tensor]]) -> None:
    """Write what :func:`new_rows` found into the base; equal tables stay as they are."""
    for own, first, value in rows:
        own[first:] = value[first:].to(own)

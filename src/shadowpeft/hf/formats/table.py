"""A format as a table: one row per tensor of another package's adapter, with its place in this package's files.

Reading, writing, the expected shapes and the report of what nothing reads all follow from the table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.hf.base.structure import DecoderParts

Shape = tuple[int, ...]
_ROOT = "base_model.model."


@dataclass(frozen=True)
class Piece:
    """A tensor, or a part of one, in both formats.

    A name that several rows share is one tensor: their concatenation along the first axis, in the order of the table.
    """

    theirs: str
    shape: Shape
    """Of the part in their tensor."""
    ours: str = ""
    """Name in this package's files; empty if nothing here reads it."""
    ours_shape: Shape | None = None
    """Of the part in our tensor; None: ``shape``."""
    transposed: bool = False
    """Whether the last two axes are swapped."""
    unread: str = ""
    """For a row without ``ours``: what this is, and why nothing reads it."""


def expected_shapes(table: Iterable[Piece]) -> dict[str, Shape]:
    """Shapes of the tensors in their file."""
    shapes: dict[str, Shape] = {}
    for row in table:
        above = shapes[row.theirs][0] if row.theirs in shapes else 0
        shapes[row.theirs] = (above + row.shape[0], *row.shape[1:]) if above else row.shape
    return shapes


def to_ours(table: Iterable[Piece], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under this package's names. The map is linear, so it takes gradients to gradients."""
    return _move(tensors, ((r.theirs, r.shape, r.ours, r.ours_shape or r.shape, r.transposed) for r in table))


def from_ours(table: Iterable[Piece], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`to_ours`; what nothing reads is zeros."""
    return _move(state, ((r.ours, r.ours_shape or r.shape, r.theirs, r.shape, r.transposed) for r in table))


def _move(tensors: Mapping[str, Tensor], moves: Iterable[tuple[str, Shape, str, Shape, bool]]) -> dict[str, Tensor]:
    """Take tensors apart and join the parts under other names.

    Args:
        moves: name and shape of a part before, name and shape after, and whether it is transposed. A part without a name
            before is zeros; one without a name after is left out.
    """
    used: defaultdict[str, int] = defaultdict(int)
    joined: defaultdict[str, list[Tensor]] = defaultdict(list)
    for source, shape, target, target_shape, transposed in moves:
        part = tensors[source] if source else torch.zeros(shape)
        if tuple(part.shape) != shape:
            start = used[source]
            used[source] = start + shape[0]
            part = part[start : used[source]]
        if target:
            joined[target].append((part.mT if transposed else part).reshape(target_shape))
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()}


def unread(table: Iterable[Piece]) -> list[str]:
    """What the file holds and nothing reads."""
    return list(dict.fromkeys(row.unread for row in table if not row.ours))


def hub_name(parts: DecoderParts, what: str) -> str:
    """Name of a tensor of the hub in an adapter file, such as ``norm.weight``."""
    return f"{_ROOT}{parts.backbone_name}.shadow_hub.shadowpeft_{what}"


def link_name(parts: DecoderParts, layer: int, what: str) -> str:
    """Name of a tensor of the link before base layer ``layer``, such as ``injection.w_down``."""
    return f"{_ROOT}{parts.layers_name}.{layer}.shadow_link.shadowpeft_{what}"


def base_name(module: str) -> str:
    """Name of a tensor of a saved base module (``modules_to_save``), such as ``score.weight``."""
    return _ROOT + module


def is_base_name(name: str) -> bool:
    """Whether a tensor of this package's files is one of a saved base module."""
    return "shadow_hub." not in name and "shadow_link." not in name


def update_rows(
    transform: tuple[str, str], gate: tuple[str, str], link: str, d: int, m: int, *, biases: bool, unread: str
) -> list[Piece]:
    """Two nets of two layers each as ``w_in`` ``(2m, d)``, ``w_out`` ``(2, d, m)`` and, with biases, ``b_in``, ``b_out``.

    Args:
        transform: their names of the candidate's layers, ``W_1`` and ``W_2`` (Eq. 13). gate: of ``W_3`` and ``W_4`` (Eq. 14).
        link: prefix of our names; empty if nothing reads the update. unread: what to report then.
    """
    rows = []
    for first, second in (transform, gate):
        layers: list[tuple[str, Shape, str, Shape]] = [
            (f"{first}.weight", (m, d), "w_in", (m, d)),
            (f"{second}.weight", (d, m), "w_out", (1, d, m)),
        ]
        if biases:
            layers += [(f"{first}.bias", (m,), "b_in", (m,)), (f"{second}.bias", (d,), "b_out", (1, d))]
        for theirs, shape, ours, ours_shape in layers:
            rows.append(Piece(theirs, shape, link and link + ours, ours_shape, unread=unread))
    return rows

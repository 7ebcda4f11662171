"""Whether rows that are packed into one stay apart in a model: tried, not read off its name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shadowpeft.errors import UnsupportedModelError
from shadowpeft.hf.base.signature import trial_mode
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.layer import adapted_base

LENGTHS = (5, 7)
"""Tokens of the two rows of the trial; more than a convolution reads."""
SEEN = 1e-3
"""Greatest relative change of a row when the row before it changes: rounding, where tokens are sorted by expert. A model that
carries a state over changes by about 1."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Greatest relative difference between a packed row and the row alone; in 16 bits, where shapes round otherwise, 0.1."""


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Run two short rows packed and alone, through base and shadow.

    Args:
        model: with its adapter.

    Raises:
        UnsupportedModelError: naming the class, if a row sees the one before it (a recurrent state, a convolution, or attention
            that takes no notice of positions), or is otherwise than alone.
    """
    base = adapted_base(model)
    name = type(base).__name__
    device = base.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(find_decoder(base).config.vocab_size)
    first, second, other = (
        torch.randint(min(8, vocabulary - 2), vocabulary, (1, n), generator=generator) for n in (*LENGTHS, LENGTHS[0])
    )

    def run(*rows: Tensor) -> list[Tensor]:
        """Logits of both paths at the last row, ``(B, T, V)`` each."""
        ids = torch.cat(rows, dim=1).repeat(2, 1).to(device)
        positions = torch.cat([torch.arange(row.shape[1]) for row in rows]).repeat(2, 1).to(device)
        try:
            out = model(input_ids=ids, position_ids=positions, use_cache=False, return_shadow=True)
        except TypeError as error:
            raise UnsupportedModelError(
                f"data.packing is set but {name} takes no position_ids, which keep packed rows apart; set it to false"
            ) from error
        return [out.logits[:, -LENGTHS[1] :].float(), out.shadow_logits[:, -LENGTHS[1] :].float()]

    with trial_mode(model):
        packed, behind_another, alone = run(first, second), run(other, second), run(second)
    rounding = TOLERANCE.get(next(base.parameters()).dtype, 0.1)
    paths = ("base", "shadow")
    seen = [path for path, a, b in zip(paths, packed, behind_another, strict=True) if _distance(a, b) > SEEN]
    if seen:
        who = f"the {seen[0]} carries" if len(seen) == 1 else "the base and the shadow carry"
        raise UnsupportedModelError(
            f"data.packing is set but in {name} {who} something from a packed row into the next one, as recurrent layers and "
            "convolutions do; set it to false"
        )
    for path, here, own in zip(paths, packed, alone, strict=True):
        if _distance(here, own) > rounding:
            raise UnsupportedModelError(
                f"data.packing is set but in {name} the {path} computes a packed row otherwise than the row alone; set it to "
                "false"
            )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))

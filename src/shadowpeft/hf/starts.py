"""Where a projection may start from: Eq. 12 between the heads of two models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from shadowpeft.core import ProjectionSolution, solve_projection
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.vocabulary import common_rows
from shadowpeft.hf.base.weights import real_weight


def projection_start(
    base: nn.Module,
    small: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ProjectionSolution:
    """``W_p*`` of Eq. 12 from the LM heads of two models, which may have other numbers of padding rows.

    With equal numbers of rows all of them count, as in Eq. 12; otherwise those of the tokenizer's tokens.

    Args:
        dtype: of the solution; None: that of the small model's head. progress: see
            :func:`shadowpeft.core.solve_projection`.

    Raises:
        ConfigError: if a model has no head or one that is not finite, or the two have other tokens.
    """
    large_head, small_head = (model.get_output_embeddings() for model in (base, small))  # type: ignore[operator]
    if large_head is None or small_head is None:
        raise ConfigError("projection_init='pseudo_inverse' needs the LM heads of shadow and base; one has none")
    with real_weight(large_head) as wide, real_weight(small_head) as narrow:
        rows = common_rows(base, small, (len(wide), len(narrow)))
        return solve_projection(wide, narrow, rows=rows, dtype=dtype, progress=progress)

"""Where a small model may start from: some of the base's own layers, or Eq. 12 between two heads.

Fine-tuning reaches the same through ``shadow_init`` and ``projection_init``; these functions are for shadow pretraining.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.core import ProjectionSolution, solve_projection
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.backbone import anatomy, copied_layers, mirror_config
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.pieces import described, stored_name
from shadowpeft.hf.vocabulary import common_rows
from shadowpeft.hf.weights import real_weight


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


def layers_start(
    base: PreTrainedModel | str | Path, depth: int, *, spread: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A stock causal language model of ``depth`` of the base's own attention layers, hidden widths kept.

    Embedding, final norm and head are copies, too. ``spread``: layers from the first to the last at equal distances
    (``shadow_init="base_layers_spread"``), else the first ones ("base_layers"); see
    :func:`shadowpeft.hf.backbone.copied_layers`.

    Args:
        base: a model in memory; or an alias, folder or Hub id, of which only the tensors that are wanted are read.

    Raises:
        ConfigError: if the base has too few attention layers, or a tensor is quantised, offloaded or of another shape.
        AdapterFileError: if a file lacks a tensor or is damaged.
        UnsupportedModelError: if the base is no plain text model.
    """
    init = "base_layers_spread" if spread else "base_layers"
    wanted = ShadowPeftConfig(task_type="CAUSAL_LM", shadow_init=init, shadow_num_hidden_layers=depth)
    model, checkpoint = (base, None) if isinstance(base, PreTrainedModel) else described(str(base))
    parts = anatomy(model)
    kind: Any = type(model)
    if parts.config is not model.config:
        raise UnsupportedModelError(f"{kind.__name__} is more than a text model; pass its language model")
    chosen = copied_layers(parts.config, depth, init)
    small: PreTrainedModel = kind._from_config(copy.deepcopy(mirror_config(parts.config, wanted)), dtype=dtype)
    sources = {key: stored_name(key, parts.layers_name, chosen) for key in small.state_dict()}
    tied = set(getattr(small, "all_tied_weights_keys", None) or ()) if small.config.tie_word_embeddings else set()
    if checkpoint is None:
        values = model.state_dict()
    else:  # a tied head need not be stored
        stored = [name for key, name in sources.items() if key not in tied or checkpoint.find(name) is not None]
        values = checkpoint.read(dict.fromkeys(stored))
    with torch.no_grad():
        for key, target in small.state_dict().items():
            value = values.get(sources[key])
            if value is None and key in tied:
                continue
            _fill(target, value, sources[key])
    small.tie_weights()
    return small.eval()


def _fill(target: Tensor, value: Tensor | None, name: str) -> None:
    fits = value is not None and value.shape == target.shape and type(value) in (Tensor, nn.Parameter)
    if value is None or not fits or value.is_meta or value.is_floating_point() != target.is_floating_point():
        found = "nothing" if value is None else f"{tuple(value.shape)}, {value.dtype}"
        raise ConfigError(
            f"a start from the base's layers needs '{name}' of shape {tuple(target.shape)} but found {found}; load the base "
            "unquantised with from_pretrained and pass the model"
        )
    target.copy_(value)

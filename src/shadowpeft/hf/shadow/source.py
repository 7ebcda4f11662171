"""Where an explicit shadow comes from: a model, a projected checkpoint, and the start of its projection (Eq. 12)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.hf.files.projected import Projected, is_projected, read_projected


def as_projected(module: nn.Module) -> Projected | None:
    """The parts of a projected model that is already in memory, recognised by its parts; None for any other module."""
    projection, backbone = getattr(module, "shadow_hidden_projection", None), getattr(module, "shadow_model", None)
    head = getattr(module, "lm_head", None)
    if (
        not isinstance(projection, nn.Linear)
        or not isinstance(backbone, PreTrainedModel)
        or not isinstance(head, nn.Linear)
    ):
        return None
    return Projected(backbone, projection.weight.detach().float(), head.weight.detach().float())


def given_projected(shadow_model: Any) -> Projected | None:
    """``shadow_model`` of a configuration as a projected checkpoint, or None if it is something else."""
    if isinstance(shadow_model, nn.Module):
        return as_projected(shadow_model)
    return read_projected(shadow_model) if is_projected(shadow_model) else None


def start_projection(projected: Projected, model: nn.Module, d: int) -> Tensor | None:
    """The trained ``W_p`` as the start of a shadow's projection onto a base of width ``d``; None for the identity.

    Raises:
        ConfigError: if it was trained for another width, or is not the identity where none is needed.
    """
    width, d_s = projected.projection.shape
    if width != d:
        raise ConfigError(
            f"the projected checkpoint was made for a base of width {width} but this base has width {d}; use the base it "
            "was pretrained for"
        )
    head = getattr(model.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    if isinstance(head, Tensor) and head.is_floating_point() and head.device.type != "meta":
        distance = 2.0
        if head.shape == projected.head.shape:
            theirs = projected.head.to(head.device)
            distance = float((head.detach().float() - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if distance > 0.02:  # bfloat16 rounding is at most 0.004
            warnings.warn(
                f"the projected checkpoint was trained for an LM head that differs from this base's by {distance:.2g} "
                "(relative); its projection is only a rough start here",
                stacklevel=2,
            )
    if d_s == d:
        if not torch.equal(projected.projection, torch.eye(d)):
            raise ConfigError(
                f"the projected checkpoint has a projection between equal widths ({d}), and a shadow of the base's width has "
                "none; use a plain checkpoint of the backbone"
            )
        return None
    return projected.projection

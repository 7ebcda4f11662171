"""A shadow that is pretrained alone: backbone, projection, and the base's frozen head (the paper, Appendix B).

``L = CE(W_lm W_p F_shadow(x), y)`` (Eqs. 10-11); backbone and ``W_p`` train, the head never does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoModelForCausalLM, PreTrainedModel

from shadowpeft.core import head_loss, solve_projection
from shadowpeft.core.losses import IGNORE, HeadLoss, topk_kl
from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.signature import trial_mode
from shadowpeft.hf.base.vocabulary import align_embedding, common_rows
from shadowpeft.hf.files.projected import Projected, is_projected, read_projected, to_stock, write_projected
from shadowpeft.hf.pretraining.base_ends import BaseEnds, pruned_backbone
from shadowpeft.hf.shadow.mirror import copied_layers
from shadowpeft.hf.shadow.source import load_source

CHUNK = 512
"""Rows of logits that exist at a time."""
SEPARATE = 1e-3
"""How far, relative to the largest state, a document in a pack may be from the same document alone (float32)."""


class ProjectedShadow(nn.Module):
    """``W_lm W_p F_shadow(x)`` with the parts named as in a projected checkpoint.

    Args:
        backbone: with its token embedding. projection: ``W_p`` ``(d, d_s)``, or None for the identity (``d_s = d``).
        head: ``W_lm`` ``(V, d)``, frozen, in the dtype to compute in.
        train_embeddings: whether the backbone's token embedding trains.

    Raises:
        ConfigError: if the shapes do not fit together.
    """

    def __init__(
        self, backbone: PreTrainedModel, projection: Tensor | None, head: Tensor, *, train_embeddings: bool = False
    ) -> None:
        super().__init__()
        table: Any = backbone.get_input_embeddings()
        width = int(backbone.config.hidden_size)
        rows, d = head.shape
        shape = (d, width) if projection is None else tuple(projection.shape)
        if shape != (d, width) or (projection is None and width != d):
            raise ConfigError(
                f"head {tuple(head.shape)}, projection {None if projection is None else shape} and backbone width {width} do "
                f"not fit together; the head is (V, d), so the projection must be ({d}, {width})"
            )
        if table.weight.shape[0] != rows:
            raise ConfigError(
                f"the backbone's token table has {table.weight.shape[0]} rows and the base's head {rows}; use a backbone with "
                "the base's tokenizer and vocabulary size"
            )
        self.shadow_model = backbone
        self.shadow_hidden_projection = None if projection is None else _linear(projection.float())
        self.lm_head = _linear(head)
        self.requires_grad_(True)
        self.lm_head.requires_grad_(False)
        table.requires_grad_(train_embeddings)

    def state(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """``F_shadow(x)``: the backbone's last hidden state ``(B, T, d_s)`` of packed rows.

        Without mask and cache, attention is kept inside each document by the positions, which begin at 0 with each; flash
        kernels read them from one long row only.
        """
        rows, length = input_ids.shape
        if "flash" in str(self.shadow_model.config._attn_implementation):
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        out = self.shadow_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        state: Tensor = out.last_hidden_state
        return state.reshape(rows, length, -1)

    def row_loss(self, rows: Tensor, targets: Tensor) -> Tensor:
        """``sum CE(W_lm s, y)``: states ``(n, d)`` and targets ``(n,)`` to a 0-d float32 sum."""
        return F.cross_entropy(self.logits(rows).float(), targets, reduction="sum")

    def logits(self, rows: Tensor) -> Tensor:
        """``W_lm s``: ``(n, d)`` to ``(n, V)``."""
        head: Tensor = self.lm_head.weight
        return F.linear(rows.to(head.dtype), head)

    def taught_loss(
        self, rows: Tensor, targets: Tensor, ids: Tensor, log_probs: Tensor, weights: tuple[float, float]
    ) -> Tensor:
        """``sum a CE(W_lm s, y) + b KL(p, softmax(W_lm s))`` from one product with the head.

        Args:
            rows: states ``(n, d)``. targets: ``(n,)``. ids, log_probs: ``p`` as :func:`shadowpeft.core.losses.topk_kl` takes
                it, ``(n, k)``. weights: ``a`` and ``b``.

        Returns:
            0-d float32.
        """
        logits = self.logits(rows).float()
        total = weights[1] * topk_kl(logits, ids, log_probs).sum()
        return total + weights[0] * F.cross_entropy(logits, targets, reduction="sum") if weights[0] else total

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss: HeadLoss | None = None,
        *,
        teacher_ids: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
        weights: tuple[float, float] = (0.0, 1.0),
    ) -> tuple[Tensor, Tensor]:
        """Sum of the loss over the targets, and their number.

        Args:
            input_ids, position_ids, labels: ``(B, T)``; -100 is no target. The state at ``t`` predicts ``labels[t + 1]``.
            loss: another loss of states and targets than the cross-entropy; or
            teacher_ids, teacher_log_probs: ``(B, T, k)``, what the base says at ``t`` about the token after; the loss is then
                :meth:`taught_loss` with ``weights`` at the same positions.

        Returns:
            0-d float32 and 0-d int64. No more than ``CHUNK`` rows of logits exist at a time.
        """
        targets = labels[:, 1:]
        chosen = targets != IGNORE
        rows, goals = self.state(input_ids, position_ids)[:, :-1][chosen], targets[chosen]
        if self.shadow_hidden_projection is not None:
            rows = self.shadow_hidden_projection(rows)
        loss = loss or self.row_loss
        if teacher_ids is not None and teacher_log_probs is not None:
            labelled, ids, log_probs = goals, teacher_ids[:, :-1][chosen], teacher_log_probs[:, :-1][chosen]

            def loss(part: Tensor, index: Tensor) -> Tensor:
                return self.taught_loss(part, labelled[index], ids[index], log_probs[index], weights)

            goals = torch.arange(len(rows), device=rows.device)
        if torch.is_grad_enabled() and rows.requires_grad:
            return head_loss(rows, goals, loss, frozen=True, chunk=CHUNK), chosen.sum()
        total = torch.zeros((), device=rows.device)
        for start in range(0, len(rows), CHUNK):
            total = total + loss(rows[start : start + CHUNK], goals[start : start + CHUNK]).float()
        return total, chosen.sum()

    def trainable_state(self) -> dict[str, Tensor]:
        """The tensors that train, by name: all that a checkpoint needs."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


@torch.no_grad()
def check_separation(model: ProjectedShadow, tolerance: float = SEPARATE) -> None:
    """Two documents in a pack have the states that each has alone.

    Raises:
        UnsupportedModelError: if not: the architecture (or its attention kernel) carries something across the boundary.
    """
    backbone = model.shadow_model
    _check_separation(model, backbone, model.state, model.lm_head.weight, tolerance, "backbone or training.attention")


@torch.no_grad()
def check_teacher_separation(base: PreTrainedModel, tolerance: float = SEPARATE) -> None:
    """The same of the logits of a base that is to teach on packed sequences.

    Raises:
        UnsupportedModelError: if it mixes documents.
    """

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = base(input_ids=ids, position_ids=positions, use_cache=False).logits
        return out

    table: Any = base.get_input_embeddings()
    _check_separation(base, base, logits, table.weight, tolerance, "base or loss: ce")


def _check_separation(
    model: nn.Module,
    named: PreTrainedModel,
    state: Callable[[Tensor, Tensor], Tensor],
    table: Tensor,
    tolerance: float,
    instead: str,
) -> None:
    device, rows = table.device, len(table)
    ids = torch.arange(1, 10, device=device)[None] * 7 % rows
    parts = (ids[:, :5], ids[:, 5:])
    positions = [torch.arange(part.shape[1], device=device)[None] for part in parts]
    with trial_mode(model):
        packed = state(ids, torch.cat(positions, 1))
        alone = torch.cat([state(part, place) for part, place in zip(parts, positions, strict=True)], 1)
    distance = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-12))
    if not distance <= tolerance:
        attention = named.config._attn_implementation
        raise UnsupportedModelError(
            f"in a packed sequence {type(named).__name__} with attention '{attention}' mixes documents (states differ by "
            f"{distance:.2g}); use another {instead}"
        )


def build_projected_shadow(
    base: BaseEnds,
    *,
    layers: str | None = None,
    count: int = 1,
    model: str | None = None,
    start: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    train_embeddings: bool = False,
) -> tuple[ProjectedShadow, dict[str, Any]]:
    """The shadow to pretrain, and a record of how it starts.

    Args:
        layers, count: the base's own layers, ``first`` or ``spread``; or
        model: a small model, or a projected checkpoint to go on from, by alias, folder or Hub id.
        start: ``base_layers``, ``base_layers_spread`` (copied), ``pseudo_inverse`` (Eq. 12), ``random``; None: copied layers,
            Eq. 12, or what the projected checkpoint holds. dtype: of the frozen head.

    Raises:
        ConfigError: if backbone, projection and head do not meet.
        AdapterFileError: if a file is damaged.
    """
    projection: Tensor | None = None
    record: dict[str, Any] = {}
    backbone: Any
    head = base.read_head()
    d = base.hidden_size
    if layers is not None:
        kind = "base_layers" if layers == "first" else "base_layers_spread"
        indices = copied_layers(base.config, count, kind)
        backbone = pruned_backbone(base, indices, copy=start != "random")
        record = {"layers": indices, "start": start or kind}
    elif model is not None and is_projected(model):
        if start is not None:
            raise ConfigError(f"start is '{start}' but '{model}' brings its own projection; remove start")
        given = read_projected(model)
        backbone, projection = given.backbone, given.projection
        if tuple(projection.shape) == (d, d) and torch.equal(projection, torch.eye(d)):
            projection = None
        record = {"model": model, "start": "projected"}
    elif model is not None:
        small = load_source(AutoModelForCausalLM, model)
        backbone = small.base_model
        rows = (len(head), len(small.get_input_embeddings().weight))
        tokens = common_rows(base, small, rows)
        if rows[0] != rows[1]:
            align_embedding(backbone, rows[0])
        record = {"model": model, "start": start or "pseudo_inverse"}
        if int(backbone.config.hidden_size) == d:
            if start is not None:
                raise ConfigError(
                    f"start is '{start}' but '{model}' has the base's width {d}, where the projection is the identity; remove "
                    "start"
                )
            record["start"] = "identity"
        elif start == "random":
            projection = nn.Linear(int(backbone.config.hidden_size), d, bias=False).weight.detach().clone()
        else:
            theirs = small.get_output_embeddings().weight.detach()
            projection = solve_projection(head, theirs, rows=tokens).weight.clone()
    else:
        raise ConfigError("the backbone is not given; give layers or model")
    if MODEL_MAPPING.get(type(backbone.config), None) is not type(backbone):
        raise UnsupportedModelError(
            f"a {type(backbone).__name__} cannot be written as a projected checkpoint, since transformers builds another class "
            "from its configuration; use another backbone"
        )
    backbone.to(torch.float32)
    if attention is not None:
        backbone.set_attn_implementation(attention)
    record["projection"] = "identity" if projection is None else list(projection.shape)
    return ProjectedShadow(backbone, projection, head.to(dtype), train_embeddings=train_embeddings), record


def save_shadow(model: ProjectedShadow, base: BaseEnds, folder: str | Path) -> None:
    """Write a projected checkpoint; its head is the base's as the base's files hold it, whatever the training's precision."""
    shadow = projected_parts(model, base)
    table: Any = shadow.backbone.get_input_embeddings()
    write_projected(folder, shadow.backbone, table.weight, shadow.projection, shadow.head, ids=base.config)


def save_stock(model: ProjectedShadow, base: BaseEnds, folder: str | Path) -> None:
    """Write an ordinary causal language model with the projection folded into its head (Eq. 11)."""
    to_stock(projected_parts(model, base)).save_pretrained(str(folder))


def projected_parts(model: ProjectedShadow, base: BaseEnds) -> Projected:
    """The model's parts on the CPU in float32, the identity written out."""
    head = base.read_head().float()
    own = model.shadow_hidden_projection
    projection = torch.eye(head.shape[1]) if own is None else own.weight.detach().float().cpu()
    backbone = model.shadow_model
    if next(backbone.parameters()).device.type != "cpu":
        backbone = copy.deepcopy(backbone).cpu()
    return Projected(backbone, projection, head)

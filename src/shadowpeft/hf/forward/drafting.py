"""Free drafts: the shadow reads tokens that the base has not read, and the base reads them later with the states it made.

An attached pass computes ``s^(0)`` of every token anyway. So a shadow that drafts spends, beyond what the verifying pass needs,
only the head on each drafted token. The shadow's layers of the cache run ahead of the base's; a verifying pass over those
tokens is given their states (``shadow_state=``) and brings the base to the same length; :func:`take_back` then removes from
both what was not accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.head import lm_logits, rows_of_head
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.weights import module_for_adapter
from shadowpeft.hf.forward import hooks, joining
from shadowpeft.hf.forward.cache import shadow_views
from shadowpeft.hf.forward.call import AdapterWeights, ShadowCall
from shadowpeft.hf.forward.losses import lm_head
from shadowpeft.hf.forward.rows import as_only_adapter
from shadowpeft.hf.layer import ShadowHub


class DraftHead:
    """The LM head that drafts are chosen with: every token, or only some.

    A small model's head is a large part of its weights, and most of its tokens never occur in the texts of a task. Drafts may
    miss tokens without any harm to the answer: what the draft cannot say, the verifying pass says.

    Args:
        tokens: ids that may be drafted; None: all.
    """

    def __init__(self, tokens: Sequence[int] | None = None) -> None:
        self.tokens = None if tokens is None else torch.tensor(sorted(set(tokens)), dtype=torch.long)
        self._parts: dict[str, tuple[AdapterWeights, Any]] = {}

    def logits(self, model: Any, hub: ShadowHub, weights: AdapterWeights, state: Tensor) -> Tensor:
        """``(N, d)`` to ``(N, V)``, or to ``(N, len(tokens))``; float32."""
        head = module_for_adapter(lm_head(model, weights), weights.adapter)
        if self.tokens is None:
            return lm_logits(model, hub, head, state).float()
        known = self._parts.get(weights.adapter)
        if known is None or known[0] is not weights:
            known = self._parts[weights.adapter] = (weights, rows_of_head(model, hub, head, self.tokens))
        logits: Tensor = known[1](state)
        return logits.float()


class Ahead:
    """Tokens that the shadows of a batch have read and the base has not."""

    def __init__(self, model: nn.Module, head: DraftHead) -> None:
        parts = find_decoder(model)
        self.model, self.head, self._backbone, self._layers = model, head, parts.backbone, parts.num_layers
        self._width = parts.hidden_size
        self._call: ShadowCall | None = None
        self._states: list[Tensor] = []

    def read(
        self, input_ids: Tensor, cache: Cache, *, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> None:
        """Let the shadows read one more piece ``(B, T)``.

        Args:
            cache: one that attached passes have filled. attention_mask: ``(B, L)`` up to these tokens, or None.
            position_ids: ``(B, T)``, for shadows that take them.

        Raises:
            ConfigError: if no adapter is enabled. CacheMismatchError: if the cache was filled with other adapters.
        """
        backbone: Any = self._backbone
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        call = hooks.start(backbone.shadow_hub, self.model, dict(inputs))
        if call is None:
            raise ConfigError("no adapter is enabled, so there is no shadow that could draft; enable or set one")
        views = shadow_views(cache, self._layers, backbone.config, call, ahead=None)
        for part, view in zip(call.parts, views, strict=True):
            hooks.run_shadow(part, view, call, backbone, inputs)
        self._call = call
        self._states.append(self._in_rows([part.s0 for part in call.parts], len(input_ids)))

    @property
    def length(self) -> int:
        """Tokens read."""
        return sum(piece.shape[1] for piece in self._states)

    @property
    def states(self) -> Tensor:
        """``s^(0)`` of all tokens read, ``(B, T, d)``; zeros in rows without a shadow."""
        return torch.cat(self._states, dim=1)

    def logits(self) -> Tensor:
        """What the shadows say after their last token (Eq. 11), ``(B, V)`` float32; zeros in rows without a shadow."""
        assert self._call is not None
        hub: Any = self._backbone.shadow_hub  # type: ignore[union-attr]
        pieces = []
        for part in self._call.parts:
            with as_only_adapter(part):
                pieces.append(self.head.logits(self.model, hub, part.weights, part.s0[:, -1]))
        return self._in_rows(pieces, len(self._states[-1]))

    def _in_rows(self, pieces: list[Tensor], rows: int) -> Tensor:
        assert self._call is not None
        parts = self._call.parts
        if len(parts) == 1 and parts[0].rows is None:
            return pieces[0]
        if not parts:
            return torch.zeros(rows, 1, self._width, device=next(self._backbone.parameters()).device)
        whole = pieces[0].new_zeros((rows, *pieces[0].shape[1:]))
        for part, piece in zip(parts, pieces, strict=True):
            whole = whole.index_copy(0, part.index(whole.device), piece.to(whole))
        return whole


def take_back(cache: Cache, columns: list[int]) -> None:
    """Remove the last ``columns[i]`` tokens of row ``i`` from base and shadow.

    A row that loses fewer than another is moved to the right, so that all end together and the padding stays on the left;
    :func:`realigned` does the same to a mask.

    Args:
        cache: one that records its past and, for several rows, that :func:`joining.check_movable` lets pass.
    """
    fewest = min(columns)
    if len(columns) > 1 and max(columns) > fewest:
        joining.move_right(cache, [n - fewest for n in columns])
    cache.crop(-fewest)


def realigned(mask: Tensor, columns: list[int]) -> Tensor:
    """A mask ``(B, L)`` after :func:`take_back`, ``(B, L - min(columns))``."""
    fewest = min(columns)
    moved = joining.moved_right(mask, [n - fewest for n in columns], axis=1)
    return moved[:, : mask.shape[1] - fewest]

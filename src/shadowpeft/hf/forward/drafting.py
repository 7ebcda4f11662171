"""Free drafts: the shadow reads tokens that the base has not read, and the base reads them later with the states it made.

An attached pass computes ``s^(0)`` of every token anyway. So a shadow that drafts spends, beyond what the verifying pass needs,
only the head on each drafted token. The shadow's layers of the cache run ahead of the base's; a verifying pass over those
tokens is given their states (``shadow_state=``) and brings the base to the same length; :func:`take_back` then removes from
both what was not accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.head import lm_logits, rows_of_head
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.weights import module_for_adapter
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.forward import hooks, joining
from shadowpeft.hf.forward.cache import shadow_views
from shadowpeft.hf.forward.call import AdapterWeights, ShadowCall
from shadowpeft.hf.forward.losses import lm_head
from shadowpeft.hf.forward.rows import as_only_adapter
from shadowpeft.hf.layer import ShadowHub


@dataclass(frozen=True)
class Draft:
    """What a shadow says about one row's next token."""

    logits: Tensor
    """``(V',)`` float32."""
    tokens: Tensor | None
    """``(V',)`` whose logits they are; None: every token's."""


class DraftHead:
    """The LM head that drafts are chosen with: of some tokens only, where it is known which are frequent.

    A small model's head is a large part of its weights, and most of its tokens never occur in the texts of a task. Drafts may
    miss tokens without any harm to the answer: what the draft cannot say, the verifying pass says.

    Args:
        tokens: ids that may be drafted; None: those that each adapter records (``draft_tokens``); "all".
    """

    def __init__(self, tokens: Sequence[int] | Literal["all"] | None = None) -> None:
        self._given = tokens
        self._known: dict[str, tuple[AdapterWeights, Tensor | None, Any]] = {}

    def tokens(self, config: ShadowPeftConfig) -> Sequence[int] | None:
        """Ids that an adapter drafts; None: all."""
        if self._given == "all":
            return None
        return config.draft_tokens if self._given is None else self._given  # type: ignore[return-value]

    def forget(self, adapter: str) -> None:
        """Keep nothing of an adapter that is gone."""
        self._known.pop(adapter, None)

    def drafts(self, model: Any, hub: ShadowHub, weights: AdapterWeights, state: Tensor) -> list[Draft]:
        """One for each row of ``state`` ``(N, d)``."""
        known = self._known.get(weights.adapter)
        if known is None or known[0] is not weights:
            known = self._known[weights.adapter] = (weights, *self._read(model, hub, weights))
        logits: Tensor = known[2](state).float()
        return [Draft(row, known[1]) for row in logits]

    def _read(self, model: Any, hub: ShadowHub, weights: AdapterWeights) -> tuple[Tensor | None, Any]:
        head = module_for_adapter(lm_head(model, weights), weights.adapter)
        named = self.tokens(weights.config)
        if named is None or (self._given is None and not hub.facts.is_linear):
            return None, partial(lm_logits, model, hub, head)
        tokens = torch.tensor(sorted(set(named)), dtype=torch.long)
        return tokens, rows_of_head(model, hub, head, tokens)


class Ahead:
    """Tokens that the shadows of a batch have read and the base has not."""

    def __init__(self, model: nn.Module, head: DraftHead) -> None:
        parts = find_decoder(model)
        self.model, self.head, self._backbone, self._layers = model, head, parts.backbone, parts.num_layers
        self._width = parts.hidden_size
        self._call: ShadowCall | None = None
        self._states: list[Tensor] = []

    def read(
        self,
        input_ids: Tensor,
        cache: Cache,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Let the shadows read one more piece ``(B, T)``.

        Args:
            cache: one that attached passes have filled. attention_mask: ``(B, L)`` up to these tokens, or None.
            position_ids: ``(B, T)``, for shadows that take them. names: the adapter of each row; None: as the running
                generation has them.

        Raises:
            ConfigError: if no adapter is enabled. CacheMismatchError: if the cache was filled with other adapters.
        """
        backbone: Any = self._backbone
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        named = {} if names is None else {"adapter_names": list(names)}
        call = hooks.start(backbone.shadow_hub, self.model, {**inputs, **named})
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

    def drafts(self) -> list[Draft | None]:
        """What each row's shadow says after its last token (Eq. 11); None for rows without a shadow."""
        assert self._call is not None
        hub: Any = self._backbone.shadow_hub  # type: ignore[union-attr]
        found: list[Draft | None] = [None] * len(self._states[-1])
        for part in self._call.parts:
            with as_only_adapter(part):
                drafts = self.head.drafts(self.model, hub, part.weights, part.s0[:, -1])
            for row, draft in zip(range(len(found)) if part.rows is None else part.rows, drafts, strict=True):
                found[row] = draft
        return found

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

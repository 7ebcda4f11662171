"""The shadow path of an adapted model by itself: what the detached model says, without a copy of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from shadowpeft.errors import ConfigError
from shadowpeft.hf.forward.call import AdapterWeights, Scope, within
from shadowpeft.hf.forward.drafting import Ahead, DraftHead
from shadowpeft.hf.layer import adapted_base, find_hub


class ShadowAlone(nn.Module):
    """Reads tokens with the shadow of one adapter, and no layer of the base. It keeps the weights of its first pass.

    Args:
        model: a ``PeftModel`` with a shadow adapter, or a transformers model that carries one; a causal language model.
        adapter_name: which adapter; None: the active one.

    Raises:
        ConfigError: if there is no such adapter, or it is a classifier.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        super().__init__()
        hub = find_hub(model)
        self.base: Any = adapted_base(model)
        self.adapter: str | None = adapter_name or hub.active_name()
        if self.adapter not in hub.configs:
            raise ConfigError(f"there is no adapter '{self.adapter}'; the model has {sorted(hub.configs)}")
        if hub.is_classifier(self.adapter):
            raise ConfigError(f"adapter '{self.adapter}' is a classifier, which says nothing in words; take a causal one")
        self.config, self.training = self.base.config, self.base.training
        self._held: dict[str, AdapterWeights] = {}
        self._head = DraftHead("all")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Cache, **_: Any
    ) -> SimpleNamespace:
        """``logits`` ``(B, 1, V)`` of the token after the last (Eq. 11).

        Args:
            input_ids: new tokens ``(B, T_new)``. attention_mask: of old and new ones ``(B, T)``.
            past_key_values: a cache for the base's configuration that no other pass has filled.
        """
        ahead = Ahead(self.base, self._head)
        with within(Scope(self.base, (self.adapter,) * len(input_ids), held=self._held)):
            ahead.read(
                input_ids,
                past_key_values,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :],
            )
            drafts = [draft.logits for draft in ahead.drafts() if draft is not None]
        return SimpleNamespace(logits=torch.stack(drafts)[:, None])

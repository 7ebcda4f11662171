"""The base's complete head on a shadow state: bias, logit scale and soft-cap included; and the pooling of classifiers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from shadowpeft.errors import ConfigError
from shadowpeft.hf.weights import plain


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor that the architecture puts on its logits (1.0 for most)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
    return 1.0


def soft_cap(config: PreTrainedConfig) -> float | None:
    """``c`` of ``c * tanh(logits / c)``, or None."""
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    return None


def lm_logits(head: Any, config: PreTrainedConfig, state: Tensor) -> Tensor:
    """``W_lm s`` (Eqs. 8 and 11) as the base computes it: ``(..., d)`` to ``(..., V)``."""
    weight = head.weight
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else state.dtype
    device = state.device if weight.device.type == "meta" else weight.device  # an offloaded head moves its input itself
    state = state.to(device=device, dtype=dtype)
    if isinstance(head, FSDPModule):
        # FSDP counts the calls of a head that it shards together with the last norm; a second one would put it out of step
        bias = getattr(head, "bias", None)
        logits = F.linear(state, plain(weight), None if bias is None else plain(bias))
    else:
        logits = head(state)
    scale, cap = logit_scale(config), soft_cap(config)
    if scale != 1.0:
        logits = logits * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def pool_last(
    state: Tensor, config: PreTrainedConfig, input_ids: Tensor | None, attention_mask: Any | None
) -> Tensor:
    """The state that stock classifiers read: of the last token that is not padding. ``(B, T, d)`` to ``(B, d)``.

    Raises:
        ConfigError: if the attention mask ends elsewhere than the rule says, so that one of the two is wrong.
    """
    pad = config.pad_token_id
    if pad is None or input_ids is None:
        return state[:, -1]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (positions * (input_ids != pad)).argmax(-1)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and not torch.compiler.is_compiling():
        attended = (positions * attention_mask[:, -input_ids.shape[1] :].to(positions.device).bool()).argmax(-1)
        if not torch.equal(attended, last):
            row = int((attended != last).nonzero()[0])
            raise ConfigError(
                f"row {row} ends at token {int(last[row])} by pad_token_id={pad} but at {int(attended[row])} by its "
                "attention_mask; pad with the model's own pad token"
            )
    return state[torch.arange(state.shape[0], device=state.device), last.to(state.device)]

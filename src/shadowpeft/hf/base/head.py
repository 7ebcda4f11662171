"""The base's complete head on a shadow state: bias, logit scale and soft-cap included; and the pooling of classifiers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig

from shadowpeft.errors import ConfigError, UnsupportedModelError
from shadowpeft.hf.base.signature import Signature
from shadowpeft.hf.base.weights import dense_weight, device_of, gather


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor that the architecture puts on its logits (1.0 for most)."""
    scale = _number(config, "logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None:
        divisor = _number(config, "logits_scaling")
        if divisor is None:
            return 1.0
        scale = divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return scale


def soft_cap(config: PreTrainedConfig) -> float | None:
    """``c`` of ``c * tanh(logits / c)``, or None."""
    return _number(config, "final_logit_softcapping", "logits_soft_cap")


def scales_or_caps(config: PreTrainedConfig) -> bool:
    """Whether the architecture scales or soft-caps its logits."""
    return logit_scale(config) != 1.0 or soft_cap(config) is not None


def _number(config: PreTrainedConfig, *names: str) -> float | None:
    values = (getattr(config, name, None) for name in names)
    return next((float(value) for value in values if value is not None), None)


def lm_logits(model: Any, hub: Any, head: Any, state: Tensor) -> Tensor:
    """``W_lm s`` (Eqs. 8 and 11) as the base computes it, bias, scale, soft-cap and all: ``(N, d)`` to ``(N, V)``.

    Args:
        model: the whole base. hub: its :class:`~shadowpeft.hf.layer.ShadowHub`. head: the LM head, the base's or the
            shadow's own.
    """
    weight = head.weight
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else state.dtype
    device = state.device if weight.device.type == "meta" else weight.device  # an offloaded head moves its input itself
    state = state.to(device=device, dtype=dtype)
    if not hub.facts.is_linear:
        return stock_logits(model, hub.backbone_name, state)
    return _table_logits(head, model.config.get_text_config(decoder=True), state)


@torch.no_grad()
def rows_of_head(model: Any, hub: Any, head: Any, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """:func:`lm_logits` of some tokens alone: a function of states ``(N, d)`` that gives ``(N, len(tokens))``.

    Args:
        tokens: their ids, ``(V',)`` int64; their rows of the head are copied.

    Raises:
        UnsupportedModelError: if the head is more than a matrix. ConfigError: for an id that has no row.
    """
    if not hub.facts.is_linear:
        raise UnsupportedModelError(
            f"only some tokens are to be drafted, but the head of {type(model).__name__} is more than a matrix; draft all"
        )
    with dense_weight(head) as weight:
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= len(weight):
            raise ConfigError(
                f"tokens to draft must be ids from 0 to {len(weight) - 1}, at least one; got {tokens.tolist()[:5]}"
            )
        places = tokens.to(weight.device)
        small = nn.Linear(weight.shape[1], len(tokens), bias=getattr(head, "bias", None) is not None, device="meta")
        small = small.to_empty(device=weight.device).to(weight.dtype)
        small.weight.copy_(weight[places])
        if small.bias is not None:
            small.bias.copy_(gather(head.bias)[places])
    config = model.config.get_text_config(decoder=True)
    return lambda state: _table_logits(small, config, state.to(small.weight))


def _table_logits(head: nn.Module, config: PreTrainedConfig, state: Tensor) -> Tensor:
    if isinstance(head, FSDPModule):
        # FSDP counts the calls of a head that it shards together with the last norm; a second one would put it out of step
        bias = getattr(head, "bias", None)
        logits = F.linear(state, gather(head.weight), None if bias is None else gather(bias))  # type: ignore[arg-type]
    else:
        logits = head(state)
    scale, cap = logit_scale(config), soft_cap(config)
    if scale != 1.0:
        logits = logits * scale
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class _Output:
    """What a backbone returns, with one entry: ``last_hidden_state``."""

    def __init__(self, state: Tensor) -> None:
        self.last_hidden_state = state

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Given(nn.Module):
    """Stands in for a backbone for one call and returns what it was made with."""

    def __init__(self, state: Tensor, backbone: nn.Module) -> None:
        super().__init__()
        self.state = state
        self._stands_for = (backbone,)  # in a tuple, so that it does not become a child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.state)


def _forward_from(model: Any, backbone: str, state: Tensor, **kwargs: Any) -> Any:
    """Run the base's own forward with its backbone's output replaced by ``state`` ``(B, T, d)``; ``model`` stays untouched."""
    whole = parent = copy.copy(model)
    *path, last = backbone.split(".")
    for name in path:
        parent._modules = {**parent._modules, name: copy.copy(parent._modules[name])}
        parent = parent._modules[name]
    parent._modules = {**parent._modules, last: _Given(state, parent._modules[last])}
    ids = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
    if "output_router_logits" in Signature(model).names:  # the router's loss is no part of the head's, and has no states here
        kwargs["output_router_logits"] = False
    return type(model).forward(whole, input_ids=ids, return_dict=True, **kwargs)


def stock_logits(model: Any, backbone: str, state: Tensor) -> Tensor:
    """The base's own logits for the states ``(N, d)`` in place of its backbone's output, ``(N, V)``."""
    logits: Tensor = _forward_from(model, backbone, state[None]).logits[0]
    return logits


@dataclass(frozen=True)
class HeadFacts:
    """What was found out about everything behind a base's backbone."""

    is_linear: bool = True
    """Whether a matrix with bias, scale and soft-cap is all there is between backbone and logits."""
    label_shift: int = 1
    """How far ahead the loss looks: 1 if the state at ``t`` is to predict ``labels[t + 1]``; 0 for ``labels[t]``, as in the
    decoders of encoder-decoder families, whose labels are shifted already."""
    uses_num_items: bool = True
    """Whether the loss is normalised by ``num_items_in_batch`` where that is given."""


@torch.no_grad()
def examine_head(model: Any, backbone: str, config: PreTrainedConfig) -> HeadFacts:
    """Try the base's own forward on three random states in place of its backbone's output.

    Raises:
        UnsupportedModelError: if more than the last hidden state goes into logits or loss, or the loss is no cross-entropy.
    """
    head = model.get_output_embeddings()
    device = device_of(head)
    if device.type == "meta":
        return HeadFacts()
    dtype = head.weight.dtype if head.weight.is_floating_point() else torch.float32
    state = torch.randn(3, int(config.hidden_size), generator=torch.Generator().manual_seed(0))
    state = state.to(device=device, dtype=dtype)
    labels = torch.tensor([1, 0, 1], device=device)
    try:
        stock = stock_logits(model, backbone, state)
        loss = _forward_from(model, backbone, state[None], labels=labels[None]).loss.float()
        given = {"labels": labels[None], "num_items_in_batch": torch.tensor(16, device=device)}
        counted = (
            _forward_from(model, backbone, state[None], **given).loss.float() if Signature(model).passes_on else loss
        )
    except (AttributeError, IndexError, TypeError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the head of {type(model).__name__} needs more than the last hidden state ({error}), and a shadow "
            "has nothing else to give"
        ) from error
    mine = _table_logits(head, config, state)
    simple = mine.shape == stock.shape and bool(torch.allclose(mine.float(), stock.float(), rtol=1e-3, atol=1e-3))
    logits = stock.float()
    for shift in (1, 0):
        total = F.cross_entropy(logits[: 3 - shift], labels[shift:], reduction="sum")
        if torch.allclose(loss, total / (3 - shift), rtol=1e-2, atol=1e-3):
            return HeadFacts(simple, shift, bool(torch.allclose(counted, total / 16, rtol=1e-2, atol=1e-3)))
    raise UnsupportedModelError(
        f"the loss of {type(model).__name__} is not the cross-entropy over its tokens, so the shadow cannot have the same "
        "loss; this architecture is not supported"
    )


def pool_last(state: Tensor, config: PreTrainedConfig, input_ids: Tensor | None, attention_mask: Any | None) -> Tensor:
    """The state that stock classifiers read: of the last token that is not padding. ``(B, T, d)`` to ``(B, d)``.

    Raises:
        ConfigError: if the attention mask ends elsewhere than the rule says, so that one of the two is wrong.
    """
    pad = getattr(config, "pad_token_id", None)
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
                "attention_mask; pad with the model's own pad token, and let no text end in it: where texts end in an "
                "eos_token that pads too (TRL's RewardTrainer writes one), set tokenizer.pad_token to another token and "
                "model.config.pad_token_id to its id"
            )
    return state[torch.arange(state.shape[0], device=state.device), last.to(state.device)]

"""One forward pass as an object: which adapters take part, with which weights, on which rows, and their shadow states.

A :class:`ShadowCall` travels through keyword arguments or a context variable and is never stored on a module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shadowpeft.core import Trajectory
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.signature import Signature
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.layer import ShadowHub, Step

CALL = "shadow_call"


@dataclass
class AdapterWeights:
    """Everything of one adapter that takes part in a forward pass."""

    adapter: str
    config: ShadowPeftConfig
    version: int
    """Differs between weights of one name that a swap or a deletion separates; 0: not known (compiled code)."""
    backbone: Any
    embedding: nn.Module | None
    """The shadow's own token embedding, or None if it shares the base's."""
    projection: nn.Module | None
    norm: nn.LayerNorm | None
    head: nn.Module | None
    """The shadow's own head, or None if it reads the base's."""
    signature: Signature
    """What the shadow backbone's forward accepts."""
    steps: dict[int, Step] = field(default_factory=dict)
    """By base layer; empty unless ``collected``."""
    saved: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """For each of PEFT's wrappers around a module of the base the one that this adapter uses; empty unless ``collected``."""
    collected: bool = False
    """Whether ``steps`` and ``saved`` were collected; otherwise the links look their own up."""

    @property
    def is_classifier(self) -> bool:
        """Whether the adapter is one of a sequence classifier."""
        return bool(self.config.task_type == "SEQ_CLS")


class Part:
    """One adapter in one forward pass: its weights, the rows of the batch that are its own, its shadow states."""

    def __init__(self, weights: AdapterWeights, rows: list[int] | None = None) -> None:
        self.weights = weights
        self.trajectory: Trajectory | None = None
        self.rows = rows
        """Indices in the batch; None: all of it."""
        self._indices: dict[torch.device, Tensor] = {}

    @property
    def adapter(self) -> str:
        return self.weights.adapter

    @property
    def s0(self) -> Tensor:
        """``s^(0)`` of the part's rows, ``(B_part, T, d)``."""
        assert self.trajectory is not None
        return self.trajectory.s0

    def index(self, device: torch.device) -> Tensor:
        """The rows as an int64 tensor ``(B_part,)`` on ``device``."""
        assert self.rows is not None
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.rows, device=device)
        return self._indices[device]

    def pick(self, x: Tensor, axis: int = 0) -> Tensor:
        """The part's rows of ``x``, whose axis ``axis`` counts the rows of the batch."""
        return x if self.rows is None else x.index_select(axis, self.index(x.device))


class ShadowCall:
    """One forward pass: its parts, what was asked for, and the shadow states."""

    def __init__(self, parts: list[Part], names: tuple[str, ...] | None = None) -> None:
        self.parts = parts
        self.names = names
        """The adapter of each row of a mixed batch; None if one adapter has all rows."""
        self.labels: Tensor | None = None
        self.shift_labels: Tensor | None = None
        self.shadow_labels: Tensor | None = None
        self.num_items: Any = None
        self.shadow_num_items: Any = None
        self.return_shadow = False
        self.fused = False
        self.logits_to_keep: Any = 0
        self.input_ids: Tensor | None = None
        self.attention_mask: Any = None
        self.loss_alone = False
        """Whether nobody wants the logits."""
        self.last_state: Tensor | None = None
        """With ``loss_alone``: what the base's head reads, ``(B, T, d)``."""
        self.headless = False
        """Whether the backbone was called by itself, so that no head follows."""
        self.streams_first = False
        self.base_state: Tensor | None = None
        """The input of the first refined layer, ``(B, T, d)``, if the layers below are not to run."""
        self.shadow_state: Tensor | None = None
        """``s^(0)``, if the shadow is not to run."""
        self.skipped: list[tuple[nn.Module, Any]] = []
        """Layers that do not run in this pass, each with a forward that was set on it (None: its class's)."""
        self.embedded_in: nn.Module | None = None
        """The backbone, if this pass trains and embeds the tokens itself."""
        self.tokens: list[Token[ShadowCall | None]] = []

    @property
    def is_classifier(self) -> bool:
        """Whether the adapters are those of a sequence classifier."""
        return any(part.weights.is_classifier for part in self.parts)

    @property
    def first(self) -> int:
        """The first refined layer; with several adapters the lowest."""
        return min((part.weights.config.mathematics.first_refined_layer for part in self.parts), default=0)

    @property
    def started(self) -> bool:
        """Whether the shadow backbones have run."""
        return all(part.trajectory is not None for part in self.parts)


@dataclass
class Scope:
    """What one call of a ``PeftModel``'s forward or generate fixed for every forward pass of ``model`` inside it."""

    model: nn.Module
    names: Any = None
    """``adapter_names``."""
    repeats: bool = False
    """Whether each prompt may stand in the batch several times (beams, several sequences of one prompt)."""
    held: dict[str, AdapterWeights] = field(default_factory=dict)
    """The weights that each adapter had when it was first used: a generation ends with those it began with."""


_current: ContextVar[ShadowCall | None] = ContextVar("shadowpeft_call", default=None)
scope: ContextVar[Scope | None] = ContextVar("shadowpeft_scope", default=None)


_lock = threading.Lock()
_named = 0
any_named = False
"""Whether a call with names runs in any thread: compiled code cannot read a context variable, but this it can."""


@contextmanager
def within(entered: Scope) -> Iterator[None]:
    """Let the forward passes inside find ``entered``."""
    global _named, any_named
    token, named = scope.set(entered), entered.names is not None
    with _lock:
        _named += named
        any_named = _named > 0
    try:
        yield
    finally:
        scope.reset(token)
        with _lock:
            _named -= named
            any_named = _named > 0


def current() -> ShadowCall | None:
    """The innermost forward pass that is running here."""
    return _current.get()


def enter(call: ShadowCall) -> None:
    """Let modules that get no keyword arguments find ``call`` until :func:`leave`."""
    call.tokens.append(_current.set(call))


def leave() -> None:
    """Undo the last :func:`enter`."""
    call = _current.get()
    if call is not None and call.tokens:
        _current.reset(call.tokens.pop())


def initial_state(
    weights: AdapterWeights, input_ids: Tensor | None, inputs_embeds: Tensor | None, base: Any, **kwargs: Any
) -> Tensor:
    """``s^(0) = P(F_shadow(x))`` (Eqs. 1 and 10), ``(B, T, d)``.

    Args:
        input_ids: ``(B, T)``, or None to run from embeddings. inputs_embeds: the base's, ``(B, T, d)``, or None.
        base: the model or backbone whose token embedding a shadow without one reads.
        kwargs: mask, positions and cache view for the shadow backbone.

    Raises:
        ConfigError: if the shadow needs ``input_ids`` and there are none, or its own table lacks one of them.
    """
    backbone, borrowed = weights.backbone, weights.config.shadow_reads_tokens
    own: Any = weights.embedding
    if input_ids is None and (own is not None or borrowed):
        raise ConfigError(
            "inputs_embeds were passed but the shadow "
            + ("reads the tokens in its layers" if borrowed else "has an embedding table of its own")
            + " and needs input_ids; "
            + ("pass those" if borrowed else "use share_embeddings=True to run from embeddings")
        )
    if borrowed:
        return _project(weights, backbone(input_ids=input_ids, return_dict=True, **kwargs))
    if inputs_embeds is None or own is not None:
        table = base.get_input_embeddings()
        rows, known = (getattr(each, "num_embeddings", 0) for each in (table, own))
        if rows > known > 0:
            _require_known(input_ids, known, rows)
        inputs_embeds = (table if own is None else own)(input_ids)
    inputs_embeds = inputs_embeds.to(next(backbone.parameters()).dtype)
    if backbone.training and torch.is_grad_enabled() and not inputs_embeds.requires_grad and checkpoints(backbone):
        # a reentrant checkpoint gives its weights a gradient only if its input wants one, and embeddings are frozen
        inputs_embeds = inputs_embeds.detach().requires_grad_(True)
    return _project(weights, backbone(inputs_embeds=inputs_embeds, return_dict=True, **kwargs))


def _require_known(ids: Any, own: int, rows: int) -> None:
    """Refuse tokens that the base has got since a shadow with its own table was attached; rows that none uses do no harm."""
    if not torch.compiler.is_compiling() and ids.numel() and int(ids.max()) >= own:
        raise ConfigError(
            f"the input has token {int(ids.max())} but the shadow's own embedding table has {own} rows, since the base's was "
            f"resized to {rows} after attaching; resize it before attaching, or use share_embeddings=True"
        )


def _project(weights: AdapterWeights, output: Any) -> Tensor:
    state: Tensor = output.last_hidden_state
    return state if weights.projection is None else weights.projection(state)


def checkpoints(backbone: nn.Module) -> bool:
    """Whether its layers run again in the backward pass."""
    return any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())


def read_weights(hub: ShadowHub, adapter: str) -> AdapterWeights:
    """What the hub holds of ``adapter``."""

    def get(container: Any) -> Any:  # a ModuleDict has no get()
        return container[adapter] if adapter in container else None  # noqa: SIM401

    return AdapterWeights(
        adapter,
        hub.configs[adapter],
        0 if torch.compiler.is_compiling() else hub.versions[adapter],  # a swap needs no new graph
        hub.shadowpeft_backbone[adapter],
        hub.embedding(adapter),
        get(hub.shadowpeft_projection),
        get(hub.shadowpeft_norm),
        get(hub.shadowpeft_head),
        hub.signatures[adapter],
    )

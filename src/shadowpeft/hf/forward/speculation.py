"""How a shadow drafts: its settings, what drafting did, and what drafts and verifying passes cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from transformers import StoppingCriteriaList, StopStringCriteria

from shadowpeft.core.speculation import Gate
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.forward.drafting import DraftHead

_CPU_PASSES = (1.0, 1.4, 1.45, 1.45, 1.85)
"""A pass over 1 to 5 rows, in units of one over a row: SmolLM2-135M in float32, one thread of an AVX2 machine."""


@dataclass
class DraftCounts:
    """What drafting did to some answers."""

    tokens: int = 0
    """New tokens, however they were made."""
    passes: int = 0
    """Attached passes that made them; without drafts there would have been one for each token."""
    drafted: int = 0
    accepted: int = 0
    pauses: int = 0
    """How often drafting was switched off for a while because it did not pay."""

    @property
    def tokens_per_pass(self) -> float:
        """1.0 where nothing was gained."""
        return self.tokens / self.passes if self.passes else 1.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stayed."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def summary(self) -> dict[str, float]:
        """For records."""
        shares = {"tokens_per_pass": round(self.tokens_per_pass, 3), "acceptance": round(self.acceptance, 4)}
        return {**asdict(self), **shares}

    @classmethod
    def read(cls, summary: dict[str, Any]) -> DraftCounts:
        """The counts of a :meth:`summary`."""
        return cls(**{f.name: summary[f.name] for f in fields(cls)})

    def __str__(self) -> str:
        if not self.drafted:
            return "drafting did not pay here: no token was drafted"
        return f"{self.tokens_per_pass:.1f} tokens a pass; {self.accepted} of {self.drafted} drafted tokens stayed" + (
            f"; switched off {self.pauses} times, because it did not pay" if self.pauses else ""
        )


@dataclass
class Speculation:
    """How the shadow drafts; ``speculative=True`` is ``speculative=Speculation()``.

    Attributes:
        max_draft: tokens drafted in a round at most.
        tokens: ids that may be drafted; None: those that the adapter records from its training (all, if it records none);
            "all". A head over the most frequent tokens is faster (:func:`shadowpeft.data.frequent.frequent_tokens`).
        adaptive: whether a gate decides how much to draft, and switches drafting off where it does not pay; False drafts
            ``max_draft`` tokens in every round.
        counts: filled by every ``generate`` that is given this object.
    """

    max_draft: int = 8
    tokens: Sequence[int] | Literal["all"] | None = None
    adaptive: bool = True
    counts: DraftCounts = field(default_factory=DraftCounts)

    def __post_init__(self) -> None:
        if self.max_draft < 1:
            raise ConfigError(f"max_draft is {self.max_draft} but at least one token must be drafted")

    def head(self) -> DraftHead:
        """The head to draft with."""
        return DraftHead(self.tokens)

    def gates(
        self, model: Any, rows: int, adapter: str | None = None, *, sampled: bool = False
    ) -> list[Gate] | list[None]:
        """What decides for each of ``rows`` answers that ``model`` makes together; None: a round drafts ``max_draft`` tokens.

        Args:
            adapter: whose prices count; None: the active one's. sampled: whether tokens are drawn.
        """
        if not self.adaptive:
            return [None] * rows
        one = pass_cost(model, rows)
        costs = [pass_cost(model, rows * (drafts + 1)) / one for drafts in range(self.max_draft + 1)]
        price = draft_cost(model, self.head(), adapter)
        return [Gate(price, costs, sampled=sampled) for _ in range(rows)]

    def gate(self, model: Any, adapter: str | None = None, *, sampled: bool = False) -> Gate | None:
        """What decides for one answer alone."""
        return self.gates(model, 1, adapter, sampled=sampled)[0]


def pass_cost(model: Any, rows: int) -> float:
    """What a pass over so many rows costs, tokens times answers, in units of one over a row.

    On a CPU the products of two to four rows cost little more than those of one (:mod:`shadowpeft.ops.thin`), and those of more
    twice as much. On other devices a pass reads the weights once, however few rows there are; 2 % a row is a guess, since no
    GPU was measured.
    """
    if model.device.type != "cpu":
        return 1.0 + 0.02 * (rows - 1)
    if rows <= len(_CPU_PASSES):
        return _CPU_PASSES[rows - 1]
    return _CPU_PASSES[-1] + 0.02 * (rows - len(_CPU_PASSES))


def draft_cost(model: Any, head: DraftHead, adapter: str | None = None) -> float:
    """What a drafted token costs, in units of an attached pass over one: by the weights that it has to read.

    The draft reads the shadow and its head, the pass both and the base. An accepted draft is read by the shadow once, as it
    would be without drafting, but which are accepted is not known when they are read.
    """
    parts = find_decoder(model)
    hub: Any = parts.backbone.shadow_hub
    adapter = adapter or hub.active_name() or next(iter(hub.configs))
    width, rows = parts.hidden_size, int(parts.config.vocab_size)
    named = head.tokens(hub.configs[adapter])
    base = sum(p.numel() for layer in parts.layers for n, p in layer.named_parameters() if "shadow_link" not in n)
    backbone = hub.shadowpeft_backbone[adapter]
    tables = {
        id(p) for m in (hub.embedding(adapter), model.get_input_embeddings()) if m is not None for p in m.parameters()
    }
    shadow = sum(p.numel() for p in backbone.parameters() if id(p) not in tables)
    return (shadow + (rows if named is None else len(named)) * width) / (base + shadow + rows * width)


def stopped_by_texts(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` with the criterion of ``stop_strings`` made: it loses the tokenizer of a decoding loop of one's
    own (transformers 5.23).

    Raises:
        ConfigError: if the model itself brings such texts, which would come back.
    """
    tokenizer, config = given.get("tokenizer"), given.get("generation_config")
    texts = given.get("stop_strings") or getattr(config, "stop_strings", None)
    if model.generation_config.stop_strings:
        raise ConfigError(
            "the model's generation_config has stop_strings, which drafts cannot take from there; set them to None there, and "
            "pass stop_strings and tokenizer"
        )
    if tokenizer is None or not texts:
        return given
    rest = {name: value for name, value in given.items() if name not in ("tokenizer", "stop_strings")}
    if config is not None:
        rest["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    criteria = [*(given.get("stopping_criteria") or []), StopStringCriteria(tokenizer, texts)]
    return {**rest, "stopping_criteria": StoppingCriteriaList(criteria)}

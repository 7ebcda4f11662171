"""Processors and stopping criteria of ``generate`` for one row of a batch: rows that draft have texts of different length, so
each is processed alone.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from shadowpeft.errors import ConfigError

_OF_EACH_ROW = ("prompt_ignore_length", "encoder_input_ids", "generated_ngrams")
"""What processors of transformers hold of a batch, row by row."""


def _is_stock(each: Any) -> bool:
    """Whether a processor or criterion is one of transformers', which look at each row of a batch by itself."""
    return type(each).__module__.startswith("transformers.")


def as_one_of(each: Any, place: int, rows: int) -> Any:
    """A processor or criterion of the caller's, which may know rows by their place, asked about one row of a batch: it is
    shown as many rows as there are, all of them alike, and what it says of the one at ``place`` counts.
    """
    if rows == 1 or _is_stock(each):
        return each

    def asked(ids: Tensor, scores: Any) -> Any:
        if isinstance(scores, Tensor):
            scores = scores.repeat(rows, 1)
        elif scores is not None:
            scores = tuple(one.expand(rows, -1) for one in scores)
        said = each(ids.expand(rows, -1), scores)
        return said[place : place + 1] if isinstance(said, Tensor) and said.dim() and len(said) == rows else said

    return asked


def for_row(processor: Any, place: int, rows: int) -> Any:
    """A processor for one row of a batch: rows have texts of different length, so each is processed alone.

    Raises:
        ConfigError: if it cannot be divided.
    """
    if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
        raise ConfigError(
            "speculative=True was passed with guidance_scale, which runs the model on its own; leave one out"
        )
    if isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
        raise ConfigError(
            "speculative=True was passed with a SynthID watermark, which would count drafts among the tokens; leave one out"
        )
    if rows == 1:
        return processor
    if not _is_stock(processor):
        return processor.of_row(place, rows) if hasattr(processor, "of_row") else as_one_of(processor, place, rows)
    held = {name: getattr(processor, name, None) for name in _OF_EACH_ROW}
    own = {name: each for name, each in held.items() if isinstance(each, (Tensor, list)) and len(each) == rows}
    if own:
        processor = copy.copy(processor)
        vars(processor).update({name: each[place : place + 1] for name, each in own.items()})
    if isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        processor.batch_size = 1
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(place, ids), 1)
    return processor

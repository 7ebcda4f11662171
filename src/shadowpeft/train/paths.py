"""Whether each path of a run has what it is to learn from and to be compared by, and rows that the base can read; asked before
training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig

from shadowpeft.errors import ConfigError, DataError
from shadowpeft.hf.base.aliases import looked_up, source_of
from shadowpeft.tokenizer import Readable
from shadowpeft.train.config import RunConfig
from shadowpeft.train.rows import RunData

PATHS = {"attached": ("base", "shadow"), "detached": ("shadow", "base")}
"""Of each path: what a sequence says if the path learns it, and the ``path`` of rows that it does not learn."""


def learns(sequences: Iterable[Any], path: str) -> bool:
    """Whether any of the sequences has a target for ``path``, "attached" or "detached"."""
    return any(getattr(sequence, PATHS[path][0]) for sequence in sequences)


def check_paths(run: RunConfig, data: RunData, base: str | None = None) -> None:
    """Refuse a run that would train nothing, that compares evaluations of a path without targets, or whose rows are too long.

    Of rows that are streamed not all are known, so what they lack is not told.

    Args:
        base: in the place of the run's.

    Raises:
        ConfigError, DataError: naming the setting and the rows that contradict it.
    """
    t, known = run.training, data.stream is None
    _check_lengths(base or run.base, data)
    if known and run.shadow.auxiliary_loss_weight == 0 and not learns(data.training, "attached"):
        raise ConfigError(
            "shadow.auxiliary_loss_weight is 0 but every row of data.train is for the shadow alone, so nothing would train; "
            "set the weight above 0, or give rows that the base path learns"
        )
    if known and t.freeze_shadow and not learns(data.training, "attached"):
        raise DataError("training.freeze_shadow is set but every row of data.train is for the shadow alone; unset it")
    if not (t.load_best or t.patience) or data.validation is None:
        return
    key = "load_best" if t.load_best else "patience"
    other = {"attached": "detached", "detached": "attached"}[t.best_by]
    only = PATHS[t.best_by][1]
    for part, sequences in (("validation", data.validation), *([("train", data.training)] if known else [])):
        if not learns(sequences, t.best_by):
            raise ConfigError(
                f"training.{key} compares the {t.best_by} path (training.best_by) but every row of data.{part} has path: "
                f"{only}, so its loss says nothing; set best_by: {other}, or add rows for both paths"
            )


def _check_lengths(base: str, data: RunData) -> None:
    with Readable(f"the configuration of '{base}'", advice=looked_up(base)):
        config = AutoConfig.from_pretrained(source_of(base), trust_remote_code=False)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    lengths = [len(sequence.ids) for sequence in data.training + (data.validation or [])]
    long = [length for length in lengths if limit is not None and length > limit]
    if long:
        raise DataError(
            f"{len(long)} of {len(lengths)} rows have more tokens than the base reads, which is {limit} (the longest has "
            f"{max(long)}); lower data.max_length to {limit}"
        )

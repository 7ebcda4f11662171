"""A pretraining run as one YAML file, checked before anything loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from shadowpeft.settings import Count
from shadowpeft.train.config import StrictSection, overridden, parse, read_yaml
from shadowpeft.train.sections import OptimisationSection


class Backbone(StrictSection):
    """What the shadow's backbone is: some of the base's layers, or a small model."""

    layers: Literal["first", "spread"] | None = None
    """The base's first layers, or layers from its first to its last at equal distances."""
    count: Count | None = None
    """How many of them."""
    model: str | None = None
    """Instead: a small model with the base's tokenizer, or a projected checkpoint to go on from (alias, folder, Hub id)."""

    @model_validator(mode="after")
    def _one(self) -> Backbone:
        if (self.layers is None) == (self.model is None):
            raise ValueError("backbone needs exactly one of layers and model")
        if (self.layers is None) != (self.count is None):
            raise ValueError("backbone.count says how many layers backbone.layers takes; set both or neither")
        return self


class Corpus(StrictSection):
    """One source of text."""

    path: str | None = None
    """A file, a folder (every known format below it) or a pattern."""
    hub: str | None = None
    """A data set on the Hub, streamed."""
    builtin: Literal["en_corpus", "zh_corpus"] | None = None
    """A corpus of the data folder (``SHADOWPEFT_DATA``)."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the tokens, relative to the other corpora's."""
    split: str = "train"
    """Of a Hub data set or a built-in corpus."""
    config: str | None = None
    """Of a Hub data set."""
    field: str = "text"
    """Key or column that holds the text."""
    format: Literal["jsonl", "text", "parquet"] | None = None
    """Of the files of ``path``; None: by their endings."""

    @property
    def name(self) -> str:
        """How messages and records call it."""
        return str(self.path or self.hub or f"{self.builtin}/{self.split}")

    @model_validator(mode="after")
    def _one(self) -> Corpus:
        given = [name for name in ("path", "hub", "builtin") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a corpus needs exactly one of path, hub and builtin but has {given or 'none'}")
        if self.config is not None and self.hub is None:
            raise ValueError("a corpus's config belongs to a Hub data set; remove it or set hub")
        if self.format is not None and self.path is None:
            raise ValueError("a corpus's format belongs to files; remove it or set path")
        return self


class TextSection(StrictSection):
    """Which text to train and to evaluate on, and how it becomes sequences."""

    corpora: list[Corpus] = Field(min_length=1)
    validation: list[Corpus] = Field(default_factory=list)
    """Held-out text; each corpus gets its own perplexity. Empty: none is measured."""
    validation_sequences: Count = 64
    """At most so many sequences of each."""
    sequence_length: int = Field(default=1024, ge=8)
    """``T``: every sequence is full."""
    shuffle_buffer: int = Field(default=1000, ge=0)
    """Documents to draw the next one from; 0: in order."""
    end_of_document: str | None = None
    """Token after each document; None: the tokenizer's eos token."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """``skip``: name a shard that cannot be read, and go on with the next."""
    on_end: Literal["repeat", "stop"] = "repeat"
    """When a corpus ends: read it again, or end the training there."""


class PretrainingSection(OptimisationSection):
    """Optimisation, evaluation and saving of a pretraining run."""

    tokens: Count | None = None
    """How much to train on, rounded up to whole steps; or ``max_steps``."""
    batch_size: Count = 8
    """Sequences at a time in each process."""
    eval_batch_size: Count = 8
    schedule: Literal["cosine", "wsd"] = "cosine"
    """``wsd``: warm up, stay, decay over the last ``decay`` of the steps."""
    decay: float | None = Field(default=None, gt=0, le=1)
    """Of ``wsd``: share of the steps; None: 0.2."""
    final_rate: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of ``learning_rate``."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast, with the frozen head in bfloat16; what trains is float32 always."""
    attention: Literal["eager", "sdpa", "flex_attention", "flash_attention_2"] | None = None
    """Attention kernel of the backbone; None: transformers' choice."""
    train_embeddings: bool = False
    """Whether the backbone's token table trains."""

    @model_validator(mode="after")
    def _possible(self) -> PretrainingSection:
        if (self.tokens is None) == (self.max_steps is None):
            raise ValueError("exactly one of training.tokens and training.max_steps must be set")
        if self.schedule == "wsd" and self.decay is None:
            self.decay = 0.2
        if self.schedule != "wsd" and self.decay is not None:
            raise ValueError("training.decay belongs to the schedule wsd; remove it or set schedule: wsd")
        if self.decay is not None and self.warmup < 1 and self.warmup + self.decay > 1:
            raise ValueError(
                f"training.warmup {self.warmup} and training.decay {self.decay} are more than the whole; lower one of them"
            )
        return self


class Teacher(StrictSection):
    """The base's own distributions, computed once before training: its ``k`` most likely tokens at every position."""

    k: Count = 32
    """A token of the text takes ``6 k + 4`` bytes on disk."""
    weight: float = Field(default=1.0, gt=0)
    """Of the divergence beside the cross-entropy (``loss: both``)."""
    batch_size: Count = 4
    """Sequences at a time through the base."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the base while it runs; None: ``training.precision``."""
    folder: str | None = None
    """Where the cache is or will be; None: ``teacher`` in the run's folder."""


class PretrainConfig(StrictSection):
    """One pretraining run."""

    base: str
    """Alias (``smollm2-135m``), folder or Hub id; only its embedding and head are read, and the layers a backbone copies;
    all of it, if it teaches."""
    backbone: Backbone
    start: Literal["base_layers", "base_layers_spread", "pseudo_inverse", "random"] | None = None
    """Copied layers, Eq. 12, or random; None: copied layers for ``layers``, Eq. 12 for a narrower ``model``."""
    text: TextSection
    training: PretrainingSection
    loss: Literal["ce", "kl", "both"] = "ce"
    """Per target: ``-log q(y)``, ``KL(p, q)`` with the base's ``p``, or their sum."""
    teacher: Teacher | None = None
    """Of ``kl`` and ``both``."""
    output: str = "runs/pretrain"
    """Folder of the run."""

    @model_validator(mode="after")
    def _possible(self) -> PretrainConfig:
        fitting = {
            "first": ("base_layers", "random"),
            "spread": ("base_layers_spread", "random"),
            None: ("pseudo_inverse", "random"),
        }[self.backbone.layers]
        if self.start is not None and self.start not in fitting:
            kind = "model" if self.backbone.layers is None else f"layers: {self.backbone.layers}"
            raise ValueError(
                f"start is {self.start!r} but backbone has {kind}; use {' or '.join(fitting)}, or remove it"
            )
        if self.loss == "ce" and self.teacher is not None:
            raise ValueError(
                "teacher is set but loss is 'ce', which needs none; set loss: kl or both, or remove teacher"
            )
        if self.loss != "ce" and self.teacher is None:
            self.teacher = Teacher()
        if self.loss == "kl" and self.teacher is not None and self.teacher.weight != 1:
            raise ValueError(
                f"teacher.weight is {self.teacher.weight} but loss is 'kl', where it only scales the loss; set loss: both or "
                "remove it"
            )
        if self.training.eval_every is not None and not self.text.validation:
            raise ValueError("training.eval_every is set but text.validation is empty; set both or neither")
        names = [corpus.name for corpus in self.text.validation]
        if len(set(names)) < len(names):
            raise ValueError("text.validation names a corpus twice; each may come once")
        return self


_SECTIONS: dict[str, type[BaseModel]] = {
    "backbone": Backbone,
    "text": TextSection,
    "corpora": Corpus,
    "validation": Corpus,
    "training": PretrainingSection,
    "teacher": Teacher,
}


def parse_pretraining(content: Any, where: str) -> PretrainConfig:
    """Check the content of a run file.

    Raises:
        ConfigError: naming the key, what it was, what it must be, and the nearest known key.
    """
    return parse(content, where, PretrainConfig, _SECTIONS, "'base' and 'backbone'")


def read_pretraining(path: str | Path, settings: Sequence[str] = ()) -> PretrainConfig:
    """Read and check a run file, with some settings laid over it (:func:`~shadowpeft.train.config.overridden`).

    Raises:
        ConfigError: if it is missing, not YAML, or describes no possible run.
    """
    return parse_pretraining(overridden(read_yaml(path), settings), " ".join([str(path), *settings]))

"""The text of a pretraining run: its stream of sequences, and what is held out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

from shadowpeft.data.corpora import FileSource, HubSource, TextSource, find_shards
from shadowpeft.data.packing import Encode, Mixture, Packed, PackedStream
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.train.pretrain_config import Corpus, PretrainConfig


def make_source(
    corpus: Corpus, run: PretrainConfig, *, shuffle: bool, warn: Callable[[str], None] | None = None
) -> TextSource:
    """The source that a corpus of the configuration describes.

    Raises:
        DataError: if there is no such corpus. ConfigError: if a file's format is unknown.
    """
    if corpus.hub is not None:
        return HubSource(corpus.name, corpus.hub, config=corpus.config, split=corpus.split, field=corpus.field)
    return FileSource(
        corpus.name,
        find_shards(corpus.path, corpus.builtin, corpus.split),
        format=corpus.format,
        field=corpus.field,
        on_bad_shard=run.text.on_bad_shard,
        shuffle=shuffle,
        seed=run.training.seed,
        warn=warn,
    )


def make_stream(
    run: PretrainConfig, encode: Encode, end: int, warn: Callable[[str], None] | None = None
) -> PackedStream:
    """The training sequences of a run, from their beginning."""
    text, seed = run.text, run.training.seed
    sources = [make_source(corpus, run, shuffle=True, warn=warn) for corpus in text.corpora]
    mixture = Mixture(sources, [c.weight for c in text.corpora], encode, end, repeat=text.on_end == "repeat")
    return PackedStream(mixture, text.sequence_length, buffer=text.shuffle_buffer, seed=seed)


def check_held_out(run: PretrainConfig) -> None:
    """Whether the validation corpora are text that is not trained on, by their files or the name of a Hub data set.

    Raises:
        ConfigError: naming what is in both. DataError: if a corpus has no files.
    """
    trained = {part: corpus.name for corpus in run.text.corpora for part in _parts(corpus)}
    for corpus in run.text.validation:
        for part in _parts(corpus):
            if part in trained:
                what = f"'{part[0]}'" + (f" (in the corpus '{trained[part]}')" if part[0] != trained[part] else "")
                raise ConfigError(
                    f"text.validation names '{corpus.name}', but {what} is trained on, so its perplexity would not be that of "
                    "held-out text; give other text, or take it out of text.corpora"
                )


def _parts(corpus: Corpus) -> list[tuple[str, ...]]:
    """What a corpus reads: of every file, or of the data set, what tells it from others."""
    if corpus.hub is not None:
        return [(corpus.hub, corpus.config or "", corpus.split, corpus.field)]
    return [(str(file.resolve()), corpus.field) for file in find_shards(corpus.path, corpus.builtin, corpus.split)]


def check_enough(run: PretrainConfig, stream: PackedStream, sequences: int) -> None:
    """Read one step ahead on a stream of its own, so that text that cannot be read is refused before a folder is made.

    Raises:
        DataError: if a corpus is empty or damaged, or the text ends before the first step.
    """
    if len(list(islice(stream, sequences))) < sequences:
        raise DataError(
            f"the corpora end before the first step of {sequences * run.text.sequence_length:,} tokens; give more text, lower "
            "training.batch_size or set text.on_end: repeat"
        )


def end_token(run: PretrainConfig, tokenizer: Any) -> int:
    """Id of the token that ends a document.

    Raises:
        ConfigError: if the tokenizer has no such token.
    """
    token = run.text.end_of_document or tokenizer.eos_token
    number = None if token is None else tokenizer.get_vocab().get(token)
    if number is None:
        raise ConfigError(
            f"the tokenizer of '{run.base}' has no token {token!r} to end a document with; set text.end_of_document to one "
            "of its special tokens"
        )
    return int(number)


def hold_out(run: PretrainConfig, encode: Encode, end: int) -> dict[str, list[Packed]]:
    """The first sequences of each validation corpus, in order, from one pass.

    Raises:
        DataError: if a corpus does not fill one sequence.
    """
    held_out = {}
    for corpus in run.text.validation:
        mixture = Mixture([make_source(corpus, run, shuffle=False)], [1.0], encode, end, repeat=False)
        stream = PackedStream(mixture, run.text.sequence_length)
        held_out[corpus.name] = list(islice(stream, run.text.validation_sequences))
        if not held_out[corpus.name]:
            raise DataError(
                f"validation corpus '{corpus.name}' has {mixture.tokens[0]} tokens, which is no whole sequence of "
                f"{run.text.sequence_length}; give more text or lower text.sequence_length"
            )
    return held_out

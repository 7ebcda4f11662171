"""Rows as a command is told of them: a file, or what a run file would have as ``data.train``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import yaml
from pydantic import ValidationError

from shadowpeft.data.sources import COLUMNS, Source
from shadowpeft.errors import ConfigError
from shadowpeft.train.config import RunLoader, problems_in
from shadowpeft.train.sections import SourceSection


class _Intents(SourceSection):
    columns_of_ours: ClassVar[tuple[str, ...]] = (*COLUMNS, "skill")


def is_mapping(text: str) -> bool:
    """Whether rows are named in the form of a run file, ``{path: rows.csv, columns: {prompt: question, response: answer}}``."""
    return text.lstrip().startswith("{")


def shown(text: str) -> str:
    """A short name of rows, for a record."""
    return str(source_named(text, intents=True)) if is_mapping(text) else Path(text).name


def source_named(text: str, *, intents: bool = False, needs_split: bool = False) -> Source:
    """What ``text`` names: a file, or a mapping with ``path`` or ``hub``, ``split``, ``columns`` (docs/data.md).

    Args:
        intents: whether a row may have a ``skill``. needs_split: whether a folder or a data set must say which of its splits.

    Raises:
        ConfigError: if it is a mapping that describes no source, or not the split that it must.
    """
    if not is_mapping(text):
        return Source(path=text)
    try:
        content = yaml.load(text, Loader=RunLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(
            f"'{text}' begins like a mapping but is not valid YAML ({getattr(error, 'problem', error)}); write for example "
            "'{path: rows.csv, columns: {prompt: question, response: answer}}'"
        ) from error
    try:
        section = (_Intents if intents else SourceSection).model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"'{text}': {problems_in(error, SourceSection, {})}") from error
    if needs_split and not section.source.is_file and "split" not in section.model_fields_set:
        raise ConfigError(f"'{text}' names no split, which would be train; add split: test, or another one")
    return section.source

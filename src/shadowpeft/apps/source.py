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


def source_named(text: str, *, intents: bool = False) -> Source:
    """What ``text`` names: a file, or a mapping with ``path`` or ``hub``, ``split``, ``columns`` (docs/data.md).

    Args:
        intents: whether a row may have a ``skill``.

    Raises:
        ConfigError: if it is a mapping that describes no source.
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
        return (_Intents if intents else SourceSection).model_validate(content).source
    except ValidationError as error:
        raise ConfigError(f"'{text}': {problems_in(error, SourceSection, {})}") from error

"""Printing of what others named: folders, adapters and texts may hold brackets, colons, line breaks and broken UTF-8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shadowpeft.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def terminal(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints text as it is: ``[red]`` is no colour, ``:dog:`` no picture, and no line is broken at a width, so
    that a path in it can be copied and searched for. Tables have the width that there is."""
    from rich.console import Console  # a command's --help does not need it
    from rich.text import Text

    class Lines(Console):
        def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
            if soft_wrap is None:
                soft_wrap = all(isinstance(each, Text) or not hasattr(each, "__rich_console__") for each in objects)
            super().print(*objects, soft_wrap=soft_wrap, **options)

    return Lines(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


def one_line(text: str) -> str:
    """``text`` with its line breaks, control characters and halves of surrogates written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_arguments(arguments: list[str]) -> None:
    """Refuse names that are not UTF-8 before a command meets one: tokenizers and the Hub's client cannot open them.

    Raises:
        ConfigError: naming the first.
    """
    for argument in arguments:
        if any("\ud800" <= c <= "\udfff" for c in argument):
            raise ConfigError(f"the argument {argument!a} is not UTF-8; rename the file or folder that it names")

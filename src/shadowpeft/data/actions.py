"""The action at the start of an answer: ``[Skill()]``, or ``[REMOTE]`` for what the device hands on (the paper, Appendix F)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from shadowpeft.errors import ConfigError
from shadowpeft.json_text import parse_json

REMOTE = "REMOTE"
LONGEST_TAG = 40
"""Characters after which an answer that began with ``[`` has no action any more."""
_LONGEST_NAME = LONGEST_TAG - len("[()]")
_NAME = re.compile(r"[^\W\d][\w-]*")
_TAG = re.compile(r"\s*\[(?:(REMOTE)|(?!REMOTE\()([^\s\[\]()]+)\(\))\]")
_ALMOST = re.compile(
    r"\s*(\[[^\W\d](?:[\w-]*|[^\[\]\n]{0,60}\([^\[\]\n]*\))\])(?!\()"  # at the start, but for a link
    r"|.*?(\[(?:REMOTE|[^\W\d][\w-]*\([^\[\]\n]*\))\])",  # behind words
    re.DOTALL,
)


def parser(skills: Iterable[str]) -> Callable[[str], str | None]:
    """A function from a text to the action it starts with: one of ``skills``, ``"REMOTE"``, or None if there is no known one.

    It does not change its mind when text is added.

    Raises:
        ConfigError: see :func:`checked`.
    """
    known = frozenset(checked(skills, "skills"))

    def parse(text: str) -> str | None:
        match = _TAG.match(text)
        if match is None:
            return None
        return match[1] or (match[2] if match[2] in known else None)

    return parse


def only_action(text: str) -> str:
    """The action at the start of ``text``, known or not, as it is written: ``[Sit()]``; ``[REMOTE]`` if there is none."""
    match = _TAG.match(text)
    return written(REMOTE) if match is None else match[0].strip()


def almost_action(text: str) -> str | None:
    """What looks like an action in ``text`` and is none, since it is written otherwise or stands behind words; or None."""
    match = None if _TAG.match(text) else _ALMOST.match(text)
    return None if match is None else match[1] or match[2]


def written(name: str) -> str:
    """An action as an answer starts with it."""
    return f"[{REMOTE}]" if name == REMOTE else f"[{name}()]"


def is_right(said: str | None, wanted: str) -> bool:
    """Whether an answer that begins with the action ``said``, None for words, is right: no action is, where none is wanted."""
    return said == wanted or (wanted == REMOTE and said is None)


def checked(names: Iterable[object], where: str) -> tuple[str, ...]:
    """``names``, if they can be skills.

    Args:
        where: what holds them, for the message.

    Raises:
        ConfigError: if they are one text, there are none, or one is no identifier, too long, reserved or there twice.
    """
    if isinstance(names, str):
        raise ConfigError(f"{where} is the text {_short(names)}; give a list of names")
    good: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ConfigError(f"{where} has {_short(name)}, which is no identifier; write a name such as LampOn")
        if len(name) > _LONGEST_NAME:
            raise ConfigError(
                f"{where} has {_short(name)}, a name of {len(name)} characters, but {_LONGEST_NAME} are allowed; shorten it"
            )
        if name == REMOTE:
            raise ConfigError(f"{where} has {REMOTE}, which always means handing on and is no skill; leave it out")
        if name in good:
            raise ConfigError(f"{where} has {name!r} twice; name each skill once")
        good[name] = None
    if not good:
        raise ConfigError(f"{where} has no skill; write at least one name, such as LampOn")
    return tuple(good)


def read_skills(file: str | Path) -> tuple[str, ...]:
    """The skills of a UTF-8 file: one name a line (blank lines do not count), or a JSON list of names.

    Raises:
        ConfigError: if it cannot be read or is neither, and see :func:`checked`.
    """
    try:
        text = Path(file).read_bytes().decode("utf-8-sig").strip()
    except OSError as error:
        raise ConfigError(f"the actions file '{file}' cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the actions file '{file}' is not UTF-8; save it as UTF-8 text") from error
    names: list[object] = [line.strip() for line in text.splitlines() if line.strip()]
    if re.search(r"^\s*(?:[\[{]|/[/*])", text, re.MULTILINE):  # no name begins so
        try:
            found = parse_json(text)
        except ValueError as error:
            raise ConfigError(
                f"the actions file '{file}' {error}; correct it, or write names such as LampOn, one a line"
            ) from error
        if not isinstance(found, list):
            raise ConfigError(f"the actions file '{file}' is a JSON {type(found).__name__} but must be a list; put it in [ ]")
        names = found
    return checked(names, f"the actions file '{file}'")


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 2 * LONGEST_TAG else text[: 2 * LONGEST_TAG] + "..."

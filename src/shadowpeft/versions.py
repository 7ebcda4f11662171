"""Which releases of torch, transformers, PEFT and TRL this package works with, checked without importing any of them.

The limits come from running tests on other releases (``make versions``, docs/versions.md). pyproject.toml has the same lower
bounds; a test compares them.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import dataclass

from shadowpeft.errors import ConfigError, VersionError


@dataclass(frozen=True)
class SupportedRange:
    """``oldest``: first release that works. ``newest``: newest that the tests were run on."""

    oldest: str
    newest: str
    required: bool = True


TESTED = {
    "torch": SupportedRange("2.6", "2.13"),
    "transformers": SupportedRange("5.20", "5.23"),
    "peft": SupportedRange("0.21", "0.21"),
    "trl": SupportedRange("1.16", "1.16", required=False),
}
"""Limits by package, as far as a release is a number of two parts (patch releases count with theirs)."""

OK, OLD, NEW, MISSING = "ok", "too old", "untested", "not installed"
_warned: set[str] = set()


def release(version: str) -> tuple[int, ...]:
    """``"5.23.0.dev1"`` to ``(5, 23)``: the first two numbers."""
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:2])


def installed(package: str) -> str | None:
    """The installed version, or None."""
    from importlib import metadata  # reads mail headers, which takes a tenth of --help's time

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def state(package: str) -> tuple[str, str | None]:
    """``ok``, ``too old``, ``untested`` or ``not installed``, and the installed version."""
    version = installed(package)
    if version is None:
        return MISSING, None
    if release(version) < release(TESTED[package].oldest):
        return OLD, version
    return (NEW if release(version) > release(TESTED[package].newest) else OK), version


def check(*packages: str) -> None:
    """Refuse releases that are too old; warn once about each that is newer than what was tested.

    Args:
        packages: names of ``TESTED``; none: all that are required.

    Raises:
        VersionError: if an installed release is older than the oldest that works.
    """
    for package in packages or [name for name, limits in TESTED.items() if limits.required]:
        kind, version = state(package)
        limits = TESTED[package]
        if kind == OLD:
            raise VersionError(
                f"{package} {version} is installed but shadowpeft needs {limits.oldest} or newer; run: pip install "
                f"'{package}>={limits.oldest}'"
            )
        if kind == NEW and package not in _warned:
            _warned.add(package)
            warnings.warn(
                f"{package} {version} is newer than {limits.newest}, the newest that shadowpeft was tested with; run "
                "'shadowpeft doctor ADAPTER' to see whether it works here",
                stacklevel=3,
            )


def require_sklearn(who: str) -> None:
    """Raises:
    ConfigError: if scikit-learn, which ``who`` needs, is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError(f"{who} needs scikit-learn, which is not installed; run: pip install 'shadowpeft[route]'")


def require_jsonschema() -> None:
    """Raises:
    ConfigError: if jsonschema-rs, which judges the arguments of tools, is not installed.
    """
    if importlib.util.find_spec("jsonschema_rs") is None:
        raise ConfigError("tools need jsonschema-rs, which is not installed; run: pip install 'shadowpeft[tools]'")


def require_llguidance() -> None:
    """Raises:
    ConfigError: if llguidance, which holds answers to a grammar, is not installed.
    """
    if importlib.util.find_spec("llguidance") is None:
        raise ConfigError(
            "calls with arguments need llguidance, which is not installed; run: pip install 'shadowpeft[tools]'"
        )

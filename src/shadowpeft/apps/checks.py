"""One line of ``shadowpeft doctor`` and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "failed"


@dataclass(frozen=True)
class Check:
    """What was looked at, what came out, and what to do about it (None: nothing)."""

    name: str
    state: str
    text: str
    fix: str | None = None


class Report:
    """Checks in the order they were made; each is handed on as soon as it is known."""

    def __init__(self, listener: Callable[[Check], None] | None = None) -> None:
        self.checks: list[Check] = []
        self._listener = listener

    @property
    def failed(self) -> bool:
        """Whether one failed."""
        return any(check.state == FAILED for check in self.checks)

    def add(self, check: Check) -> None:
        """Take a check and hand it on."""
        self.checks.append(check)
        if self._listener is not None:
            self._listener(check)

    def ok(self, name: str, text: str) -> None:
        self.add(Check(name, OK, text))

    def warn(self, name: str, text: str, fix: str) -> None:
        self.add(Check(name, WARNING, text, fix))

    def fail(self, name: str, text: str, fix: str) -> None:
        self.add(Check(name, FAILED, text, fix))

    def require(self, good: bool, name: str, text: str, fix: str, *, otherwise: str = FAILED) -> None:
        """``ok`` if ``good``, else ``otherwise`` with the remedy."""
        self.add(Check(name, OK, text) if good else Check(name, otherwise, text, fix))

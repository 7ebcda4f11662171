"""What a watcher sees of something long: a bar with ETA on a terminal, elsewhere a plain line a minute."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EVERY = 60.0
"""Seconds between two lines, where there is no terminal."""


class Watched:
    """Something that has ``total`` parts, some of them ``done``; close it in the end, or use it in a ``with``."""

    def __init__(self, console: Console, label: str, total: int, *, done: int = 0, quiet: bool = False) -> None:
        self.console, self.label, self.total, self.quiet = console, label, total, quiet
        self._bar: Progress | None = None
        self._first, self._began = done, time.monotonic()
        self._printed = self._began
        if not quiet and (console.is_terminal or console.is_jupyter):
            from rich import progress as rich

            text, elapsed, left = rich.TextColumn, rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
            done_so_far = (text(label, markup=False), rich.BarColumn(), rich.MofNCompleteColumn(), elapsed)
            to_come = (text("eta"), left, text("{task.fields[note]}", markup=False))
            self._bar = rich.Progress(*done_so_far, *to_come, console=console, refresh_per_second=2)
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        """So many parts are done; ``note`` stands at the end of the line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if self.quiet or now - self._printed < EVERY:
            return
        self._printed = now
        speed = (done - self._first) / (now - self._began)
        left = f", {(self.total - done) / speed / 60:.0f} min left" if speed else ""
        self.console.print(
            f"{self.label}: {done:,} of {self.total:,}{left}{f', {note}' if note else ''}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def close(self) -> None:
        """Take the bar away; nothing is shown afterwards."""
        self.quiet = True
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

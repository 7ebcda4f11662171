"""Adapters that come, go and change while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from shadowpeft.errors import ShadowPeftError
from shadowpeft.serve.engine import Engine
from shadowpeft.serve.failures import described
from shadowpeft.serve.metrics import Metrics
from shadowpeft.serve.protocol import AdapterName, SwapRequest

_log = logging.getLogger("shadowpeft.serve")


class Administration:
    """The adapters of an engine.

    Args:
        versions: folder whose sub-folders may be loaded; None: none may.
        managed: who changes adapters instead of the routes, as a sentence for those who try; None: the routes do.
    """

    def __init__(self, engine: Engine, versions: Path | None, managed: str | None, metrics: Metrics) -> None:
        self.engine, self.versions, self.managed, self.metrics = engine, versions, managed, metrics
        self._thread = ThreadPoolExecutor(1, "shadowpeft-administration")
        self.changed: Callable[[], None] = lambda: None
        """Called after each change."""

    def add_routes(self, app: FastAPI) -> None:
        changed = described(400, 401, 404, 408, 409, 413, 415)

        @app.get("/admin/adapters", responses=described(401))
        async def versions() -> dict[str, list[str]]:
            """The versions that each adapter had, the present one last."""
            return {n: [version.name for version in had] for n, had in self.engine.backend.versions.items()}

        @app.post("/admin/adapters/{name}", responses=changed)
        async def add(name: AdapterName, wanted: SwapRequest) -> dict[str, str]:
            """Load one more adapter, beside the answers that are made."""
            return await self._change(name, self.engine.add, self._folder(wanted.version), new=True)

        @app.delete("/admin/adapters/{name}", responses=changed)
        async def remove(name: str) -> dict[str, str]:
            """Take an adapter out, once the requests that are here for it have their answers."""
            return await self._change(name, self.engine.remove)

        @app.post("/admin/adapters/{name}/swap", responses=changed)
        async def swap(name: str, wanted: SwapRequest) -> dict[str, str]:
            """Replace an adapter's weights; running answers end with the old ones."""
            return await self._change(name, self.engine.backend.swap, self._folder(wanted.version))

        @app.post("/admin/adapters/{name}/rollback", responses=changed)
        async def rollback(name: str) -> dict[str, str]:
            """Go back to the version before the last swap."""
            return await self._change(name, self.engine.backend.rollback)

    def close(self) -> None:
        """Begin no further change."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _folder(self, version: str) -> str:
        if self.versions is None or not (self.versions / version).is_dir():
            raise HTTPException(404, f"there is no version '{version}'; see the server's --versions folder")
        return str(self.versions / version)

    async def _change(
        self, name: str, action: Callable[..., Any], *arguments: str, new: bool = False
    ) -> dict[str, str]:
        loaded = self.engine.backend.versions
        if self.managed is not None:
            raise HTTPException(409, self.managed)
        if name not in loaded and not new:
            raise HTTPException(404, f"'{name}' is not loaded or cannot be swapped; there are {sorted(loaded)}")
        try:
            return {"name": name, "version": await self.change(action, name, *arguments)}
        except ShadowPeftError as failure:
            raise HTTPException(409, str(failure)) from failure

    async def change(self, action: Callable[..., Any], name: str, *arguments: str) -> str:
        """Do ``action`` of engine or backend to an adapter, count and log it; the version that is there now.

        One at a time, in a thread of their own: tokenising must not wait for weights that are read, nor a swap for answers
        that have to end before an adapter can go.

        Raises:
            ShadowPeftError: if it was refused.
        """
        try:
            if action == self.engine.remove:
                await asyncio.shield(asyncio.wrap_future(self.engine.remove(name)))
            else:
                await asyncio.get_running_loop().run_in_executor(self._thread, action, name, *arguments)
        except ShadowPeftError:
            self.metrics.swaps.labels("refused").inc()
            raise
        self.metrics.swaps.labels(action.__name__).inc()
        had = self.engine.backend.versions.get(name)
        version = had[-1].name if had else "none"
        _log.info("%s of %s: now %s", action.__name__, name, version)
        self.changed()
        return version

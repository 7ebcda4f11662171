"""The HTTP server of either role: routes, error answers, disconnects, shutdown."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.serve.answers import Answer
from shadowpeft.serve.client import CloudError, CloudRefusedError
from shadowpeft.serve.engine import OverdueError, QueueFullError, StoppedError
from shadowpeft.serve.guard import Guard, Keys
from shadowpeft.serve.metrics import CONTENT_TYPE, Metrics
from shadowpeft.serve.protocol import AdapterName, ChatRequest, CompletionRequest, ErrorAnswer, SwapRequest, error
from shadowpeft.serve.roles import CloudRole, EdgeRole, Role

PAGE = Path(__file__).with_name("page.html")
_RETRY_SECONDS = 1
_STALLED_SECONDS = 60.0
_STATUS = {
    400: "malformed, or not possible",
    401: "no valid key",
    404: "no such model, adapter or path",
    409: "the new weights do not fit, or there is nothing to go back to",
    413: "the body is too large",
    429: "too many requests; see Retry-After",
    503: "not ready, shutting down, waited too long for a turn, or the cloud is needed but unreachable",
}
_log = logging.getLogger("shadowpeft.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        versions: folder whose sub-folders may be swapped in; None: no swaps.
        requests: answers that may be on their way at the same time, on the device and in the cloud.
        drain_seconds: how long running requests may take after a shutdown was asked for.
        managed: who changes adapters instead of the ``/admin`` routes, as a sentence for those who try; None: the routes do.
        replica: this server's name among several behind one address, for a header and a label; None: it is alone.
    """

    keys: Keys
    versions: Path | None = None
    max_body: int = 1 << 20
    requests: int = 128
    drain_seconds: float = 30.0
    managed: str | None = None
    replica: str | None = None


class GoneError(ShadowPeftError):
    """The client left."""


def build(role: Role, settings: Settings) -> FastAPI:
    """The application of ``role``; it starts the engine and stops it."""
    metrics = Metrics({} if settings.replica is None else {"replica": settings.replica})
    engine = role.engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, settings.drain_seconds)
        if isinstance(role, EdgeRole) and role.cloud is not None:
            await role.cloud.close()

    app = FastAPI(title=f"shadowpeft {role.name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics.gauge("queue", "Requests that wait.", lambda: engine.waiting)
    metrics.gauge("running", "Requests that run.", lambda: engine.running)
    metrics.gauge("in_flight", "Answers on their way.", lambda: server.in_flight)
    server = _Server(role, settings, metrics)
    _add_errors(app)
    server.add_routes(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}  # type: ignore[attr-defined]
    app.add_middleware(
        Guard,
        keys=settings.keys,
        max_body=settings.max_body,
        metrics=metrics,
        known=lambda path: _label(path, paths),
    )
    app.state.server = server
    _describe_errors(app)
    return app


def _label(path: str, paths: set[str]) -> str:
    if path.startswith("/admin/adapters/"):
        return "/admin/adapters/*"
    return path if path in paths else "other"


class _Server:
    def __init__(self, role: Role, settings: Settings, metrics: Metrics) -> None:
        self.role, self.settings, self.metrics = role, settings, metrics
        self.in_flight = 0
        self.started = int(time.time())

    def add_routes(self, app: FastAPI) -> None:
        bad = {
            status: {"model": ErrorAnswer, "description": _STATUS[status]} for status in (400, 401, 404, 413, 429, 503)
        }
        changed = {s: {"model": ErrorAnswer, "description": _STATUS[s]} for s in (400, 401, 404, 409, 413)}
        closed = {401: {"model": ErrorAnswer, "description": _STATUS[401]}}
        unready = {503: {"model": ErrorAnswer, "description": _STATUS[503]}}

        @app.get("/healthz")
        async def healthz() -> dict[str, str]:
            """The process answers."""
            return {"status": "ok"}

        @app.get("/readyz", responses=unready)  # type: ignore[arg-type]
        async def readyz() -> Response:
            """Requests are taken."""
            reason = self.unready()
            if reason is not None:
                return JSONResponse(error(reason, "not_ready"), 503)
            told: dict[str, Any] = {"status": "ready", "role": self.role.name}
            if isinstance(self.role, EdgeRole):
                told["cloud"] = "none" if self.role.cloud is None else self.role.cloud.breaker.state
            return JSONResponse(told)

        @app.get("/metrics", responses=closed)  # type: ignore[arg-type]
        async def prometheus() -> Response:
            """For Prometheus."""
            return Response(self.metrics.text(), media_type=CONTENT_TYPE)

        @app.get("/v1/models", responses=closed)  # type: ignore[arg-type]
        async def models() -> dict[str, Any]:
            """Every name a request may ask for."""
            names = self.role.engine.backend.names
            data = [{"id": n, "object": "model", "created": self.started, "owned_by": "shadowpeft"} for n in names]
            return {"object": "list", "data": data}

        @app.post("/v1/chat/completions", responses=bad)  # type: ignore[arg-type]
        async def chat(asked: ChatRequest, request: Request) -> Response:
            """Answer a chat."""
            return await self.complete(asked, request)

        @app.post("/v1/completions", responses=bad)  # type: ignore[arg-type]
        async def completions(asked: CompletionRequest, request: Request) -> Response:
            """Continue a text."""
            return await self.complete(asked, request)

        @app.get("/admin/adapters", responses=closed)  # type: ignore[arg-type]
        async def versions() -> dict[str, list[str]]:
            """The versions that each adapter had, the present one last."""
            return {n: [Path(f).name for f in had] for n, had in self.role.engine.backend.versions.items()}

        @app.post("/admin/adapters/{name}", responses=changed)  # type: ignore[arg-type]
        async def add(name: AdapterName, wanted: SwapRequest) -> dict[str, str]:
            """Load one more adapter; running answers wait for it."""
            return await self._change(name, self.role.engine.add, self._folder(wanted.version), new=True)

        @app.delete("/admin/adapters/{name}", responses=changed)  # type: ignore[arg-type]
        async def remove(name: str) -> dict[str, str]:
            """Take an adapter out, once the requests that are here for it have their answers."""
            return await self._change(name, self.role.engine.remove)

        @app.post("/admin/adapters/{name}/swap", responses=changed)  # type: ignore[arg-type]
        async def swap(name: str, wanted: SwapRequest) -> dict[str, str]:
            """Replace an adapter's weights; running answers end with the old ones."""
            return await self._change(name, self.role.engine.backend.swap, self._folder(wanted.version))

        @app.post("/admin/adapters/{name}/rollback", responses=changed)  # type: ignore[arg-type]
        async def rollback(name: str) -> dict[str, str]:
            """Go back to the weights before the last swap."""
            return await self._change(name, self.role.engine.backend.rollback)

        if isinstance(self.role, EdgeRole):

            @app.get("/", response_class=HTMLResponse, responses=closed)  # type: ignore[arg-type]
            async def page() -> HTMLResponse:
                """A page to talk to the device."""
                policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
                return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": policy})

    def unready(self) -> str | None:
        """Why no request is taken; None: they are."""
        engine = self.role.engine
        if time.monotonic() - engine.beat > _STALLED_SECONDS:
            return "the engine is stalled"
        return None if engine.ready() else "not ready"

    def _folder(self, version: str) -> str:
        if self.settings.versions is None or not (self.settings.versions / version).is_dir():
            raise HTTPException(404, f"there is no version '{version}'; see the server's --versions folder")
        return str(self.settings.versions / version)

    async def _change(
        self, name: str, action: Callable[..., Any], *arguments: str, new: bool = False
    ) -> dict[str, str]:
        backend = self.role.engine.backend
        if self.settings.managed is not None:
            raise HTTPException(409, self.settings.managed)
        if name not in backend.versions and not new:
            raise HTTPException(
                404, f"'{name}' is not loaded or cannot be swapped; there are {sorted(backend.versions)}"
            )
        try:
            return {"name": name, "version": await asyncio.to_thread(self.change, action, name, *arguments)}
        except ShadowPeftError as failure:
            raise HTTPException(409, str(failure)) from failure

    def change(self, action: Callable[..., Any], name: str, *arguments: str) -> str:
        """Do ``action`` of the backend to an adapter, count and log it; the version that is there now.

        Raises:
            ShadowPeftError: if it was refused.
        """
        try:
            action(name, *arguments)
        except ShadowPeftError:
            self.metrics.swaps.labels("refused").inc()
            raise
        self.metrics.swaps.labels(action.__name__).inc()
        had = self.role.engine.backend.versions.get(name)
        version = Path(had[-1]).name if had else "none"
        _log.info("%s of %s: now %s", action.__name__, name, version)
        return version

    async def complete(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        if asked.model not in self.role.engine.backend.names:
            raise HTTPException(404, f"model '{asked.model}' is not loaded; see /v1/models")
        if asked.stream_options is not None and not asked.stream:
            raise DataError("stream_options is given without stream; leave one out or set both")
        if self.in_flight >= self.settings.requests:
            raise QueueFullError(f"{self.in_flight} requests are on their way already; try again later")
        began = time.monotonic()
        self.in_flight += 1
        made: Answer | None = None
        handed_on = False
        try:
            made = await until_gone(request.receive, self.role.answer(asked))
            headers = {"x-shadow-where": made.note["where"], "x-shadow-reason": made.note["reason"]}
            if self.settings.replica is not None:
                headers["x-shadow-replica"] = self.settings.replica
            if asked.stream:
                handed_on = True
                return _EventStream(
                    self, made, bool(asked.stream_options and asked.stream_options.include_usage), headers, began
                )
            content = await until_gone(request.receive, made.whole())
            self.count(made, began, content["usage"])
            return JSONResponse(content, headers=headers)
        except GoneError:
            self.metrics.disconnected.inc()
            return Response(status_code=499)  # nobody reads it
        finally:
            if not handed_on:
                self.in_flight -= 1
                if made is not None:
                    made.close()

    def count(self, made: Answer, began: float, counts: dict[str, int] | None = None) -> None:
        where = made.note["where"]
        self.metrics.answered(where, made.note["reason"], time.monotonic() - began)
        if made.first is not None:
            self.metrics.first.labels(where).observe(made.first)
        if counts is not None:
            self.metrics.tokens.labels("prompt").inc(counts["prompt_tokens"])
            self.metrics.tokens.labels("new").inc(counts["completion_tokens"])


class _EventStream(Response):
    """Server-sent events; the work ends when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, server: _Server, made: Answer, usage: bool, headers: dict[str, str], began: float) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store"})
        del self.headers["content-length"]
        self.server, self.made, self.usage, self.began = server, made, usage, began

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except GoneError:
            self.server.metrics.disconnected.inc()
        finally:
            self.server.in_flight -= 1
            self.made.close()

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self.made.chunks(self.usage):
                await _event(send, json.dumps(chunk, ensure_ascii=False))
            self.server.count(self.made, self.began)
            await _event(send, "[DONE]")
        except ShadowPeftError as failure:
            _report(failure)
            await _event(send, json.dumps(error("the answer could not be finished", "server_error", "incomplete")))
        await send({"type": "http.response.body", "body": b""})


async def _event(send: Any, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def until_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled if the client disconnects before.

    Raises:
        GoneError: if it does.
    """

    async def listen() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task: asyncio.Future[T] = asyncio.ensure_future(work)
    listener: asyncio.Future[Any] = asyncio.ensure_future(listen())
    both: set[asyncio.Future[Any]] = {task, listener}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError("the client left")
    finally:
        for each in both:
            each.cancel()
        await asyncio.gather(*both, return_exceptions=True)


def _report(failure: BaseException) -> None:
    """Log a failure without its text, which may hold what a user wrote."""
    cause = failure.__cause__ or failure
    where = "".join(traceback.format_tb(cause.__traceback__))
    _log.error("%s: %s in\n%s", type(failure).__name__, type(cause).__name__, where)


def without_text(record: logging.LogRecord) -> bool:
    """uvicorn logs what the application raised, text included; here it is logged without."""
    failure = record.exc_info[1] if record.exc_info else None
    if failure is None:
        return True
    _report(failure)
    return False


def _add_errors(app: FastAPI) -> None:
    def answer(status: int, message: str, **more: Any) -> JSONResponse:
        headers = {"retry-after": str(_RETRY_SECONDS)} if status in (429, 503) else None
        return JSONResponse(error(message, **more), status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, failure: RequestValidationError) -> Response:
        first = failure.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        said = str(first["msg"]).removeprefix("Value error, ")
        message = f"{where}: {said}" if where else said
        return answer(400, message, param=where or None)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, failure: HTTPException) -> Response:
        made = answer(failure.status_code, str(failure.detail))
        made.headers.update(failure.headers or {})
        return made

    @app.exception_handler(ShadowPeftError)
    async def impossible(_: Request, failure: ShadowPeftError) -> Response:
        if isinstance(failure, QueueFullError):
            return answer(429, str(failure), kind="rate_limit_error", code="queue_full")
        if isinstance(failure, StoppedError):
            return answer(503, str(failure), kind="not_ready")
        if isinstance(failure, OverdueError):
            return answer(503, str(failure), kind="timeout", code="timed_out")
        if isinstance(failure, CloudError):
            return answer(503, str(failure), kind="cloud_unavailable", code=failure.reason.replace(" ", "_"))
        if isinstance(failure, CloudRefusedError):
            told = failure.content if isinstance(failure.content, dict) and "error" in failure.content else None
            return JSONResponse(told or error(str(failure)), failure.status)
        if isinstance(failure, (DataError, ConfigError)):
            return answer(400, str(failure))
        _report(failure)
        return answer(500, "the answer could not be made", kind="server_error")

    @app.exception_handler(Exception)
    async def unexpected(_: Request, failure: Exception) -> Response:
        return answer(500, "the answer could not be made", kind="server_error")


def _describe_errors(app: FastAPI) -> None:
    """FastAPI describes a 422 that is never sent here."""
    described = app.openapi()
    for operations in described["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)


def serve(app: FastAPI, host: str, port: int, drain_seconds: float) -> None:
    """Run until a signal; running requests are finished within ``drain_seconds``."""
    import signal

    import uvicorn

    # uvicorn ends gracefully on SIGTERM and then raises the signal again; a server that was asked to end has not failed
    signal.signal(signal.SIGTERM, lambda *_: None)
    logging.getLogger("uvicorn.error").addFilter(without_text)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        h11_max_incomplete_event_size=1 << 16,
    )
    uvicorn.Server(settings).run()


__all__ = ["CloudRole", "EdgeRole", "Settings", "build", "serve"]

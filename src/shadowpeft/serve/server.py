"""The application of either role: its routes, its start and its end."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse

from shadowpeft.serve.administration import Administration
from shadowpeft.serve.calibrated import Calibrated
from shadowpeft.serve.client import HOP, LoopError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.drift import Drift
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.failures import AsciiResponse, add_handlers, described
from shadowpeft.serve.guard import Guard, Keys
from shadowpeft.serve.metrics import CONTENT_TYPE, Metrics
from shadowpeft.serve.options import Options
from shadowpeft.serve.protocol import DECLINED, ChatRequest, CompletionRequest, error
from shadowpeft.serve.replies import Reply
from shadowpeft.serve.requests import QueueFullError, UnknownModelError
from shadowpeft.serve.response_reply import ResponsesReply
from shadowpeft.serve.responses import PATH as RESPONSES
from shadowpeft.serve.responses import ResponsesRequest
from shadowpeft.serve.role import Role
from shadowpeft.serve.several import SeveralReplies, answer_all, single
from shadowpeft.serve.streams import UNREAD, EventStream, GoneError, once, until_gone

PAGE = Path(__file__).with_name("page.html")
_STALLED_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Attributes:
        versions: folder whose sub-folders may be swapped in; None: no swaps.
        max_body, body_seconds: bytes of a request's body, and when all of it must have arrived.
        requests: answers that this server may be making at the same time; those that wait for the cloud are counted apart.
        drain_seconds: how long running requests may take after a shutdown was asked for.
        managed: who changes adapters instead of the ``/admin`` routes, as a sentence for those who try; None: the routes do.
        replica: this server's name among several behind one address, for a header and a label; None: it is alone.
        origins: web pages of others that may ask, as browsers name them.
    """

    keys: Keys
    versions: Path | None = None
    max_body: int = 1 << 20
    body_seconds: float = 30.0
    requests: int = 128
    drain_seconds: float = Options.drain_seconds
    managed: str | None = None
    replica: str | None = None
    origins: tuple[str, ...] = ()


_PRIVATE: dict[str, Any] = (
    {"allow_private_network": True} if "allow_private_network" in inspect.signature(CORSMiddleware).parameters else {}
)
"""A page that the operator names may ask a device at a private address; older releases of starlette cannot say so."""


def build(role: Role, settings: Settings) -> FastAPI:
    """The application of ``role``; it starts the engine and stops it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        role.engine.start()
        yield
        server.administration.close()
        await server.drain()
        role.close()
        if isinstance(role, EdgeRole) and role.cloud is not None:
            await role.cloud.close()

    app = FastAPI(title=f"shadowpeft {role.name}", lifespan=lifespan, docs_url=None, redoc_url=None)
    metrics = Metrics({} if settings.replica is None else {"replica": settings.replica})
    app.state.server = server = Server(role, settings, metrics)
    add_handlers(app)
    server.add_routes(app)
    server.administration.add_routes(app)
    paths = {route.path for route in app.routes if hasattr(route, "path")}  # type: ignore[attr-defined]

    def label(path: str) -> str:
        """What a path is called in metrics and log."""
        if path.startswith("/admin/adapters/"):
            return "/admin/adapters/*"
        if path.startswith("/v1/models/"):
            return "/v1/models/*"
        return path if path in paths else "other"

    app.add_middleware(
        Guard,
        keys=settings.keys,
        max_body=settings.max_body,
        body_seconds=settings.body_seconds,
        metrics=metrics,
        known=label,
        origins=settings.origins,
    )
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            **_PRIVATE,
            expose_headers=("retry-after", "x-request-id", "x-shadow-where", "x-shadow-reason"),
        )
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, made when it is first asked for."""
    new = app.openapi_schema is None
    made: dict[str, Any] = FastAPI.openapi(app)
    if new:
        for operations in made["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI describes it, but it is never sent here
    return made


class Server:
    """What the routes of one application share.

    Attributes:
        in_flight: answers on their way.
    """

    def __init__(self, role: Role, settings: Settings, metrics: Metrics) -> None:
        self.role, self.settings, self.metrics = role, settings, metrics
        self.administration = Administration(role.engine, settings.versions, settings.managed, metrics)
        self.in_flight = 0
        self.overdue = asyncio.Event()
        """Set when the time to finish answers at shutdown is over."""
        self.started = int(time.time())
        metrics.gauge("queue", "Requests that wait.", lambda: role.engine.waiting)
        metrics.gauge("running", "Requests that run.", lambda: role.engine.running)
        metrics.gauge("in_flight", "Answers on their way.", lambda: self.in_flight)
        if isinstance(role, CloudRole):
            drafts = role.engine.backend.drafts
            metrics.total("drafted_tokens", "Tokens that shadows drafted.", lambda: drafts.drafted)
            metrics.total("accepted_tokens", "Drafted tokens that stayed.", lambda: drafts.accepted)
            metrics.gauge("tokens_per_pass", "Tokens a pass of the answers that draft.", lambda: drafts.tokens_per_pass)
        if isinstance(role, EdgeRole) and role.cloud is not None:
            metrics.gauge("cloud_exchanges", "Answers that wait for the cloud or read from it.", lambda: role.elsewhere)
            role.cloud.on_failure = lambda kind: metrics.cloud_failures.labels(kind).inc()
        if isinstance(role, EdgeRole) and role.drift is not None:
            self._watch(role.drift)
        if isinstance(role, EdgeRole) and role.calibrated is not None:
            self._watch_model(role.calibrated)

    def add_routes(self, app: FastAPI) -> None:
        """All but those of the administration."""
        handing_on = isinstance(self.role, EdgeRole) and self.role.cloud is not None
        generation = described(400, 401, 404, 408, 413, 415, 429, 503, *([508] if handing_on else []))

        @app.get("/health", include_in_schema=False)  # where other servers have it
        @app.get("/healthz")
        async def healthz() -> dict[str, str]:
            """The process answers."""
            return {"status": "ok"}

        @app.get("/readyz", responses=described(503))
        async def readyz() -> Response:
            """Requests are taken."""
            reason = self.unready()
            if reason is not None:
                return AsciiResponse(error(reason, "not_ready"), 503)
            content: dict[str, Any] = {"status": "ready", "role": self.role.name}
            if isinstance(self.role, EdgeRole):
                cloud = self.role.cloud
                content["cloud"] = "none" if cloud is None else cloud.breaker.state
                if cloud is not None and cloud.problem is not None:
                    content["cloud_problem"] = cloud.problem
                if self.role.drift is not None and (problem := self.role.drift.problem()) is not None:
                    content["calibration_problem"] = problem
                if self.role.calibrated is not None and self.role.calibrated.problem is not None:
                    content["model_problem"] = self.role.calibrated.problem
            return AsciiResponse(content)

        @app.get("/metrics", responses=described(401))
        async def prometheus() -> Response:
            """For Prometheus."""
            return Response(self.metrics.text(), media_type=CONTENT_TYPE)

        @app.get("/v1/models/", include_in_schema=False)  # a redirect costs some clients their key
        @app.get("/v1/models", responses=described(401))
        async def models() -> dict[str, Any]:
            """Every name a request may ask for."""
            return {"object": "list", "data": [self._model(name) for name in self.role.engine.backend.names]}

        @app.get("/v1/models/{name}", responses=described(401, 404))
        async def model(name: str) -> dict[str, Any]:
            """One of them."""
            return self._model(self._known(name))

        @app.post("/v1/chat/completions", responses=generation)
        async def chat(asked: ChatRequest, request: Request) -> Response:
            """Answer a chat."""
            return await self.complete(asked, request)

        @app.post("/v1/completions", responses=generation)
        async def completions(asked: CompletionRequest, request: Request) -> Response:
            """Continue a text."""
            return await self.complete(asked, request)

        @app.post(RESPONSES, responses=generation)
        async def responses(asked: ResponsesRequest, request: Request) -> Response:
            """Answer a chat in OpenAI's newer form; nothing is kept."""
            return await self.complete(asked.chat, request, asked)

        if isinstance(self.role, EdgeRole):

            @app.get("/", response_class=HTMLResponse, responses=described(401))
            async def page() -> HTMLResponse:
                """A page to talk to the device."""
                policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
                policy += "; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
                return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": policy})

    def _watch(self, drift: Drift) -> None:
        gauge = self.metrics.gauge
        gauge("calibration_drift", "Gap between the last decisions and the calibration's, 0 to 1.", lambda: drift.gap)
        gauge("calibration_drift_limit", "Gap from which on the decisions have moved.", lambda: drift.limit)
        gauge("calibration_moved", "1: the decisions have moved, so calibrate again.", lambda: drift.moved)

    def _watch_model(self, calibrated: Calibrated) -> None:
        self.administration.changed = calibrated.look
        self.metrics.gauge(
            "calibration_of_another_model",
            "1: the calibration was made for another edge model, so calibrate again.",
            lambda: calibrated.problem is not None,
        )

    def unready(self) -> str | None:
        """Why no request is taken; None: they are."""
        engine = self.role.engine
        if time.monotonic() - engine.beat > _STALLED_SECONDS:
            return "the engine is stalled"
        return None if engine.ready() else "not ready"

    def _known(self, name: str) -> str:
        if name not in self.role.engine.backend.names:
            raise UnknownModelError(f"model '{name}' is not loaded; see /v1/models")
        return name

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.started, "owned_by": "shadowpeft"}

    async def drain(self) -> None:
        """Take no more requests, let those that are here finish in time, and tell the others."""
        end = time.monotonic() + self.settings.drain_seconds
        await asyncio.to_thread(self.role.engine.stop, self.settings.drain_seconds)
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.overdue.set()

    async def complete(
        self, asked: ChatRequest | CompletionRequest, request: Request, form: ResponsesRequest | None = None
    ) -> Response:
        """The answer to a chat or a text.

        Args:
            form: the request that the chat was sent as, and in whose form it is answered; None: in a chat's.
        """
        if HOP in request.headers and isinstance(self.role, EdgeRole) and self.role.cloud is not None:
            raise LoopError(
                "this is an edge server and the request comes from an edge server, so it would be handed on without end; point "
                "that server's --cloud-url to one with --role cloud"
            )
        self._known(asked.model)
        if DECLINED in request.headers:
            asked.decline(request.headers[DECLINED])
        here = self.in_flight - self.role.elsewhere  # a slow cloud must not fill this server
        if here >= self.settings.requests:
            raise QueueFullError(f"{here} requests are on their way already; try again later")
        began = time.monotonic()
        gone = request.scope[UNREAD] = once(self.metrics.disconnected.inc)
        self.in_flight += 1
        reply: Reply | None = None
        handed_on = False

        def close() -> None:
            self.in_flight -= 1
            if reply is not None:
                reply.close()

        try:
            reply = await until_gone(request.receive, self._reply(asked, began), self.overdue)
            if form is not None:
                reply = ResponsesReply(form, reply)
            headers = {"x-shadow-where": reply.note["where"], "x-shadow-reason": reply.note["reason"]}
            if self.settings.replica is not None:
                headers["x-shadow-replica"] = self.settings.replica
            if asked.stream:
                handed_on = True
                return EventStream(
                    reply,
                    bool(asked.stream_options and asked.stream_options.include_usage),
                    headers,
                    self.overdue,
                    sent=lambda: self._count(reply, began),
                    gone=gone,
                    closed=close,
                )
            content = await until_gone(request.receive, reply.whole(), self.overdue)
            self._count(reply, began)
            return AsciiResponse(content, headers=headers)
        except GoneError:
            gone()
            return Response(status_code=499)  # nobody reads it
        finally:
            if not handed_on:
                close()

    async def _reply(self, asked: ChatRequest | CompletionRequest, began: float) -> Reply:
        """What was asked for: one answer, or several."""
        wanted = single(asked)
        if len(wanted) == 1:
            return await self.role.answer(wanted[0])
        replies = await answer_all(self.role.answer, wanted, max(1, self.role.engine.limits.queue))
        return SeveralReplies(replies, asked.n or 1, began)

    def _count(self, reply: Reply, began: float) -> None:
        for part in reply.parts:
            self._count_one(part, began)

    def _count_one(self, reply: Reply, began: float) -> None:
        where = reply.note["where"]
        self.metrics.answered(where, reply.note["reason"], time.monotonic() - began)
        if reply.first is not None:
            self.metrics.first.labels(where).observe(reply.first)
        if reply.counts is not None:
            self.metrics.tokens.labels("prompt").inc(reply.counts["prompt_tokens"])
            self.metrics.tokens.labels("new").inc(reply.counts["completion_tokens"])

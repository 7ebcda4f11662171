"""How failures reach clients and the log: a status, one sentence, and never what a user wrote."""

from __future__ import annotations

import json
import logging
import re
import traceback
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.serve.client import CloudError, CloudRefusedError, LoopError
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest, ErrorAnswer, error
from shadowpeft.serve.requests import OverdueError, QueueFullError, StoppedError, TooLongError, UnknownModelError
from shadowpeft.serve.responses import NAMES, ResponsesRequest
from shadowpeft.serve.responses import PATH as RESPONSES
from shadowpeft.serve.strict import remedy

_RETRY_SECONDS = 1
_STATUS = {
    400: "malformed, or not possible",
    401: "no valid key",
    404: "no such model, adapter or path",
    408: "the body did not arrive in time",
    409: "the new weights do not fit, or there is nothing to go back to",
    413: "the body is too large",
    415: "the body is compressed",
    429: "too many requests; see Retry-After",
    503: "not ready, shutting down, no turn in time, or the cloud is needed but unavailable",
    508: "an edge server was asked as the cloud of another one, or of itself",
}
_PROMPTS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", RESPONSES: "input"}
"""Where a request to a path has its prompt."""
_CHAT_FIELDS = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
_PASSED_ON = {"kind": "type", "param": "param", "code": "code"}
"""What of a cloud's refusal is told beside its message."""
TOO_LONG = "context_length_exceeded"
"""The code of a prompt that does not fit."""
_TOO_LONG = re.compile(r"maximum context length|exceed\w*[ _](the )?(available )?context", re.IGNORECASE)
"""How other servers say it."""
_log = logging.getLogger("shadowpeft.serve")


class AsciiResponse(JSONResponse):
    """JSON that no reader of lines can cut in two."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for the OpenAPI description."""
    return {status: {"model": ErrorAnswer, "description": _STATUS[status]} for status in statuses}


def report(failure: BaseException) -> None:
    """Log a failure without its text, which may hold what a user wrote."""
    cause = failure.__cause__ or failure
    where = "".join(traceback.format_tb(cause.__traceback__))
    _log.error("%s: %s in\n%s", type(failure).__name__, type(cause).__name__, where)


def without_text(record: logging.LogRecord) -> bool:
    """uvicorn logs what the application raised, text included; here it is logged without."""
    failure = record.exc_info[1] if record.exc_info else None
    if failure is None:
        return True
    report(failure)
    return False


def _answer(status: int, message: str, **more: Any) -> JSONResponse:
    headers = {"retry-after": str(_RETRY_SECONDS)} if status in (429, 503) else None
    return AsciiResponse(error(message, **more), status, headers)


def _field(message: str, path: str) -> str | None:
    """The field that a sentence of this package is about: it begins with its name."""
    word = message.partition(" ")[0]
    known = ResponsesRequest.model_fields if path == RESPONSES else _CHAT_FIELDS
    return word if word.partition(".")[0] in known else None


def _of_the_package(failure: ShadowPeftError, path: str) -> Response:
    if isinstance(failure, QueueFullError):
        return _answer(429, str(failure), kind="rate_limit_error", code="queue_full")
    if isinstance(failure, StoppedError):
        return _answer(503, str(failure), kind="not_ready")
    if isinstance(failure, OverdueError):
        return _answer(503, str(failure), kind="timeout", code="timed_out")
    if isinstance(failure, LoopError):
        return _answer(508, str(failure), kind="loop", code="loop")
    if isinstance(failure, CloudError):
        return _answer(503, str(failure), kind="cloud_unavailable", code=failure.reason.replace(" ", "_"))
    if isinstance(failure, CloudRefusedError):
        given, said = failure.details, failure.reason or str(failure)
        more = {name: given[key] for name, key in _PASSED_ON.items() if isinstance(given.get(key), str)}
        if path == RESPONSES and "param" in more:
            more["param"] = NAMES.get(more["param"], more["param"])
        if "code" not in more and _TOO_LONG.search(f"{given.get('type')} {said}"):
            more["code"] = TOO_LONG
        return AsciiResponse(error(said, **more), failure.status)
    said = str(failure)
    if path == RESPONSES:
        said = re.sub(r"\bmax_tokens\b|^messages\b|\bresponse_format\b", lambda match: NAMES[match[0]], said)
    field = _field(said, path)
    if isinstance(failure, UnknownModelError):
        return _answer(404, said, param=field, code="model_not_found")
    if isinstance(failure, TooLongError):
        return _answer(400, said, param=field or _PROMPTS.get(path), code=TOO_LONG)
    if isinstance(failure, (DataError, ConfigError)):
        return _answer(400, said, param=field)
    report(failure)
    return _answer(500, "the answer could not be made", kind="server_error")


def _sentence(kind: str, where: str, problem: str) -> str:
    """What pydantic found, in our words: the field, what is wrong, and what to do."""
    if kind == "json_invalid":
        return "the body is not JSON; send one JSON object"
    if not where or (kind == "missing" and where == "body"):
        return "the body is not a JSON object; send one, with content-type: application/json"
    if kind == "refused":
        return f"{where} {problem}"
    if kind == "missing":
        return f"{where} is missing; send it"
    if kind == "extra_forbidden":
        return f"{where} is no field of this request; leave it out"
    return f"{where} {remedy(problem)}"


def _refused(request: Request, failure: HTTPException) -> Response:
    """What FastAPI refuses by itself has only the name of its status; what this package refuses has a sentence."""
    path, status = request.url.path, failure.status_code
    if status == 404 and failure.detail == HTTPStatus.NOT_FOUND.phrase:
        routes = (route.path for route in request.app.routes if getattr(route, "include_in_schema", False))
        there = ", ".join(dict.fromkeys(routes))  # a path once, whatever methods it has
        return _answer(404, f"there is no {path[:200]} on this server; there are {there}", code="unknown_url")
    if status == 405 and failure.detail == HTTPStatus.METHOD_NOT_ALLOWED.phrase:
        allowed = (failure.headers or {}).get("Allow", "another method")
        return _answer(405, f"{request.method} is not possible at {path[:200]}; send {allowed}")
    if status == 400 and isinstance(failure.__cause__, UnicodeDecodeError):
        return _answer(400, "the body is not in UTF-8; send JSON in UTF-8")
    if status == 400 and isinstance(failure.__cause__, RecursionError):
        return _answer(400, "the body is nested too deeply; send JSON with fewer levels")
    return _answer(status, str(failure.detail))


def add_handlers(app: FastAPI) -> None:
    """Give every failure its answer."""

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, failure: RequestValidationError) -> Response:
        first = failure.errors()[0]
        context = first.get("ctx", {})
        place = () if first["type"] == "json_invalid" else first["loc"][1:]  # of bad JSON it is a byte, no field
        where = ".".join(str(part) for part in (*place, *context.get("where", ())))
        return _answer(400, _sentence(first["type"], where, str(first["msg"])), param=where or None)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, failure: HTTPException) -> Response:
        response = _refused(request, failure)
        response.headers.update(failure.headers or {})
        return response

    @app.exception_handler(ShadowPeftError)
    async def of_the_package(request: Request, failure: ShadowPeftError) -> Response:
        return _of_the_package(failure, request.url.path)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, failure: Exception) -> Response:
        return _answer(500, "the answer could not be made", kind="server_error")

"""What stands before every route: keys, the size of bodies, counting. Plain ASGI, so that streams pass through untouched."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from shadowpeft.serve.metrics import Metrics
from shadowpeft.serve.protocol import error

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/readyz")
"""What needs no key."""
_FORM = b"application/x-www-form-urlencoded"
"""What ``curl -d`` says of a body that is JSON; so is one without a header, since nothing else is read here."""
_log = logging.getLogger("shadowpeft.serve")


class Keys:
    """API keys; ``None`` where no key is needed."""

    def __init__(self, keys: tuple[str, ...] | None, admin: tuple[str, ...] | None) -> None:
        self._keys = None if keys is None else [k.encode() for k in keys]
        self._admin = None if admin is None else [k.encode() for k in admin]

    def allows(self, path: str, header: bytes | None) -> bool:
        """Whether a request for ``path`` with this ``Authorization`` header may pass; every key is compared, in full."""
        if path in OPEN_PATHS:
            return True
        wanted = self._admin if path.startswith("/admin") else self._keys
        if wanted is None:
            return True
        given = _key(header)
        if path.startswith("/admin") and (header or b"")[:6].lower() == b"basic ":
            return False  # a browser sends what it remembers with other sites' requests too
        matches = [hmac.compare_digest(given, key) for key in wanted]  # all of them, so that the time tells nothing
        return any(matches)


def _key(header: bytes | None) -> bytes:
    """The key of ``Bearer KEY``, or the password of HTTP Basic, which browsers ask for; empty if there is none."""
    kind, _, rest = (header or b"").partition(b" ")
    if kind.lower() == b"bearer":
        return rest.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


class Guard:
    """ASGI middleware.

    Args:
        keys: who may pass. max_body: bytes. known: path -> the label it has in metrics and log.

    The log has method, label, status and time of a request, and nothing of its content.
    """

    def __init__(self, app: Any, *, keys: Keys, max_body: int, metrics: Metrics, known: Callable[[str], str]) -> None:
        self.app, self.keys, self.max_body, self.metrics, self.known = app, keys, max_body, metrics, known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        label = self.known(scope["path"])

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.requests.labels(label, str(status)).inc()
            await send(message)

        headers = dict(scope["headers"])
        try:
            if not self.keys.allows(scope["path"], headers.get(b"authorization")):
                await _refuse(
                    counted, 401, "a valid API key is needed; send it as 'Authorization: Bearer KEY'", "invalid_api_key"
                )
                return
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.max_body:
                await _refuse(
                    counted, 413, f"the body has {int(length)} bytes but may have {self.max_body}", "body_too_large"
                )
                return
            body = await self._read(receive) if b"transfer-encoding" in headers else None
            if body is not None and len(body) > self.max_body:
                await _refuse(counted, 413, f"the body has more than {self.max_body} bytes", "body_too_large")
                return
            if headers.get(b"content-type", _FORM).partition(b";")[0].strip().lower() == _FORM:
                others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
            await self.app(scope, receive if body is None else _replay(body, receive), counted)
        finally:
            _log.info("%s %s %d %.3fs", scope["method"], label, status, time.monotonic() - began)

    async def _read(self, receive: Receive) -> bytes:
        """A body of unknown length, up to one byte more than allowed."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")[: self.max_body + 1 - len(body)]
            if message["type"] != "http.request" or not message.get("more_body") or len(body) > self.max_body:
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps(error(message, kind, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="shadowpeft", charset="UTF-8"'))
    if status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

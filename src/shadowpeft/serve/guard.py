"""What stands before every route: keys, pages of others, the size of bodies. Plain ASGI, so streams pass through untouched."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from shadowpeft.serve.metrics import Metrics
from shadowpeft.serve.options import is_loopback
from shadowpeft.serve.protocol import error

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

OPEN_PATHS = ("/health", "/healthz", "/readyz")
"""What needs no key."""
_FORM = b"application/x-www-form-urlencoded"
"""What ``curl -d`` says of a body that is JSON; so is one without a header, since nothing else is read here."""
_log = logging.getLogger("shadowpeft.serve")


class Keys:
    """API keys; ``None`` where no key is needed."""

    def __init__(self, keys: tuple[str, ...] | None, admin: tuple[str, ...] | None) -> None:
        self._keys = None if keys is None else [k.encode() for k in keys]
        self._admin = None if admin is None else [k.encode() for k in admin]

    @property
    def open(self) -> bool:
        """Whether whoever reaches the server may ask it."""
        return self._keys is None

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


def _foreign(headers: dict[bytes, bytes], without_key: bool, origins: tuple[str, ...]) -> str | None:
    """Why a request may come from a web page of somebody else, as a sentence; None if it does not.

    Without keys any page could ask whose name was bound to this machine; with HTTP Basic a browser sends what it remembers.
    """
    host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
    if without_key and not is_loopback(_hostname(host)):
        return "the Host header names another machine; ask for localhost or 127.0.0.1, or start the server with keys"
    remembered = not headers.get(b"authorization", b"").lower().startswith(b"bearer ")
    if origin and remembered and origin.partition("://")[2] != host and origin not in origins:
        return (
            "the Origin header names another page; open this server's own page, send the key as a Bearer token, or start the "
            "server with --allow-origin"
        )
    return None


def _hostname(host: str) -> str:
    """A Host header without the port; empty if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware.

    Args:
        keys: who may pass. max_body: bytes. known: path -> the label it has in metrics and log.
        body_seconds: until a body must have arrived. The application gets a whole body, or none.
        origins: pages of others that may ask.

    The log has number (the answer's ``x-request-id``), method, label, status and time of a request, and nothing of its content.
    """

    def __init__(
        self,
        app: Any,
        *,
        keys: Keys,
        max_body: int,
        metrics: Metrics,
        known: Callable[[str], str],
        body_seconds: float,
        origins: tuple[str, ...] = (),
    ) -> None:
        self.app, self.keys, self.max_body, self.metrics, self.known = app, keys, max_body, metrics, known
        self.body_seconds, self.origins = body_seconds, tuple(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        label, method, number = self.known(scope["path"]), scope["method"], f"req_{uuid.uuid4().hex}"

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.metrics.requests.labels(label, str(status)).inc()
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode())]}
            await send(message)

        headers = dict(scope["headers"])
        try:
            foreign = _foreign(headers, self.keys.open, self.origins)
            if foreign is not None:
                await _refuse(counted, 403, foreign, "foreign_page")
                return
            if not self.keys.allows(scope["path"], headers.get(b"authorization")):
                await _refuse(
                    counted, 401, "a valid API key is needed; send it as 'Authorization: Bearer KEY'", "invalid_api_key"
                )
                return
            packed = headers.get(b"content-encoding", b"identity").decode("latin-1")
            if packed.lower() != "identity":
                await _refuse(counted, 415, f"the body is compressed ({packed[:50]}); send it as it is", "compressed_body")
                return
            if method == "HEAD":  # its answer is that of GET, without the body, which the server leaves out
                scope = {**scope, "method": "GET"}
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.max_body:
                await _refuse(
                    counted, 413, f"the body has {int(length)} bytes but may have {self.max_body}", "body_too_large"
                )
                return
            try:
                body = await asyncio.wait_for(self._read(receive), self.body_seconds)
            except asyncio.TimeoutError:
                late = f"the body did not arrive within {self.body_seconds:g} seconds; send it faster"
                await _refuse(counted, 408, late, "body_too_slow")
                return
            if len(body) > self.max_body:
                await _refuse(counted, 413, f"the body has more than {self.max_body} bytes", "body_too_large")
                return
            if headers.get(b"content-type", _FORM).partition(b";")[0].strip().lower() == _FORM:
                others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
            await self.app(scope, _replay(body, receive), counted)
        finally:
            _log.info("%s %s %s %d %.3fs", number, method, label, status, time.monotonic() - began)

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
    if status in (408, 413, 415):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""Web pages of others that reach a server on this machine: by a name bound anew, by what a browser remembers, or in a frame."""

import asyncio
import base64
import inspect
import json

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from serving import attached
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Guard, Keys
from shadowpeft.serve.metrics import Metrics
from shadowpeft.serve.server import Settings, build
from webserver import Running

KEY = "user-key-0123456789"


def status(keys, method="POST", path="/v1/chat/completions", origins=(), **headers):
    """What the guard answers, 200 if it lets the request through."""
    sent = []

    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    guard = Guard(behind, keys=keys, max_body=1000, body_seconds=5.0, metrics=Metrics(), known=str, origins=origins)
    asyncio.run(guard(scope, receive, send))
    if sent[0]["status"] != 200:
        assert json.loads(sent[1]["body"])["error"]["message"]
    return sent[0]["status"]


LOOPBACK = [
    "localhost",
    "localhost:8000",
    "LOCALHOST:1",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.9.9.9:1",
    "[::1]",
    "[::1]:8000",
]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "10.0.0.1:8000",
    "127.0.0.1.evil.example",
    "[::2]",
    "[",
    "",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_without_keys_this_machine_is_asked_by_its_names(host):
    assert status(Keys(None, ()), host=host) == 200
    assert status(Keys(None, ()), host=host, origin=f"http://{host}") == 200
    assert status(Keys(None, ()), host=host, origin="http://evil.example") == 403
    assert status(Keys(None, ()), host=host, origin="null") == 403
    assert status(Keys(None, ()), host=host, origin="http://127.0.0.1:9999") == 403


@pytest.mark.parametrize("host", OTHERS)
def test_without_keys_no_other_name_is_answered(host):
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/"), ("GET", "/readyz"), ("GET", "/metrics")):
        assert status(Keys(None, ()), method, path, host=host) == 403
    assert status(Keys(None, ()), host=host, origin=f"http://{host}") == 403
    assert status(Keys((KEY,), ()), host=host, authorization=f"Bearer {KEY}") == 200  # the key is enough


def test_what_a_browser_remembers_is_taken_from_this_servers_page_only():
    basic = "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
    keys = Keys((KEY,), ())
    assert status(keys, host="edge.example", authorization=basic) == 200
    assert status(keys, host="edge.example", authorization=basic, origin="https://edge.example") == 200
    assert status(keys, host="edge.example", authorization=basic, origin="https://evil.example") == 403
    assert status(keys, host="edge.example", authorization=f"Bearer {KEY}", origin="https://app.example") == 200


def test_pages_that_the_operator_names_may_ask():
    host, page = "localhost:8000", "https://app.example"
    for keys in (Keys(None, ()), Keys((KEY,), ())):
        wrong = 200 if keys.open else 401  # a page that is let in needs a key all the same
        assert status(keys, host=host, origin=page) == 403
        assert status(keys, host=host, origin=page, origins=(page,)) == wrong
        assert status(keys, host=host, origin="https://app.example.evil", origins=(page,)) == 403
    assert status(Keys(None, ()), host="evil.example", origin=page, origins=(page,)) == 403


def test_a_browser_learns_which_pages_may_ask():
    page = "https://app.example"
    role = CloudRole(Engine(attached(), EngineLimits()), system=None, default_tokens=4)
    with (
        Running(build(role, Settings(Keys((KEY,), ()), origins=(page,)))) as running,
        httpx.Client(base_url=running.url, trust_env=False) as http,
    ):
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
        for origin, let in ((page, True), ("https://evil.example", False)):
            before = http.options("/v1/chat/completions", headers={"origin": origin, **asks})
            assert before.is_success == let
            assert (before.headers.get("access-control-allow-origin") == origin) == let
            private = {"access-control-request-private-network": "true"}  # a device at a private address
            near = http.options("/v1/chat/completions", headers={"origin": origin, **asks, **private})
            assert near.is_success == let
            known = "allow_private_network" in inspect.signature(CORSMiddleware).parameters  # of starlette 1.0 and later
            assert not (let and known) or near.headers["access-control-allow-private-network"] == "true"
            got = http.get("/v1/models", headers={"origin": origin, "authorization": f"Bearer {KEY}"})
            assert (got.headers.get("access-control-allow-origin") == origin) == let
        refused = http.get("/v1/models", headers={"origin": page})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page)

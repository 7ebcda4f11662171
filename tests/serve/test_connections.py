"""Clients that never finish, by raw sockets: half requests, slow bodies, readers that do not read; and the end of a server."""

import asyncio
import json
import logging
import select
import socket
import struct
import threading
import time
from functools import partial

import pytest
import uvicorn

from products import covering
from serving import attached
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.connections import ConnectionLimits, DrainingServer, TimelyProtocol, quiet
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.streams import UNREAD, once
from webserver import Running, metric, wait_for

KEY = "user-key-0123456789"
HALF = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-half: "


class Timely(Running):
    """A server as ``shadowpeft serve`` runs it, with short limits."""

    def __init__(self, app, drain=None, **limits):
        super().__init__(app)
        protocol = partial(TimelyProtocol, ConnectionLimits(**limits))
        config = uvicorn.Config(app, http=protocol, access_log=False, log_level="error", timeout_graceful_shutdown=10)

        async def nothing():
            pass

        self.server = DrainingServer(config, drain or nothing)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def connect(self, data=b"", buffer=None):
        raw = socket.socket()
        if buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        raw.connect(self.socket.getsockname())
        raw.sendall(data)
        return raw

    @property
    def open(self):
        return len(self.server.server_state.connections)


def application(**settings):
    engine = Engine(attached(max_position_embeddings=512), EngineLimits(gather_seconds=0.0))
    role = CloudRole(engine, system=None, default_tokens=8)
    return build(role, Settings(Keys((KEY,), ()), **settings))


def closed(raw, seconds=20):
    """Whether the other side closes within that time; what it says before is read."""
    raw.settimeout(seconds)
    try:
        while raw.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.fixture(scope="module")
def app():
    return application()


@pytest.mark.parametrize("data", [b"", b"G", HALF, HALF + b"x" * 1000])
def test_half_a_request_is_closed(app, data):
    with Timely(application(), header_seconds=0.3) as server:
        raws = [server.connect(data) for _ in range(20)]
        with server.http(KEY) as http:
            assert http.get("/v1/models").status_code == 200
        assert all(closed(raw) for raw in raws)
        wait_for(lambda: server.open <= 1)


def test_a_header_that_trickles_is_closed_at_the_same_time(app):
    with Timely(application(), header_seconds=0.5) as server:
        raw = server.connect(HALF)
        began = time.monotonic()
        with pytest.raises(ConnectionError):  # noqa: PT012
            while time.monotonic() - began < 20:
                raw.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - began < 15


def test_beyond_the_limit_the_oldest_half_request_goes_and_whole_ones_are_served():
    with Timely(application(), header_seconds=60, connections=10) as server:
        raws = [server.connect(HALF) for _ in range(40)]
        with server.http(KEY) as http:
            for _ in range(3):
                assert http.get("/v1/models").status_code == 200
                raws += [server.connect(HALF) for _ in range(5)]
        wait_for(lambda: server.open <= 10)
        assert closed(raws[0])
        assert not select.select([raws[-1]], [], [], 0.2)[0]  # the youngest is still there


def test_a_request_takes_its_time_limit_anew_on_a_connection_that_is_kept():
    with Timely(application(), header_seconds=1.0) as server, server.http(KEY) as http:
        for _ in range(3):
            assert http.get("/v1/models").status_code == 200
            time.sleep(0.5)
        assert server.open == 1


@pytest.mark.parametrize("length", [True, False])
def test_a_slow_body_gets_408_and_no_engine(length):
    app = application(body_seconds=0.4)
    with Timely(app) as server:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        head += "content-length: 1000\r\n\r\n{" if length else "transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"
        raw = server.connect(head.encode())
        raw.settimeout(20)
        said = b""
        while b"}}" not in said:
            said += raw.recv(65536)
        assert said.startswith(b"HTTP/1.1 408")
        body = json.loads(said.partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "body_too_slow"
        assert closed(raw)
        assert app.state.server.in_flight == 0


def test_a_body_that_is_never_read_because_it_was_refused_does_not_hold_the_connection():
    with Timely(application(), request_seconds=0.5) as server:
        raw = server.connect(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{")
        assert closed(raw)


def test_a_reader_that_does_not_read_is_left():
    ended = threading.Event()

    async def endless(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def listen():
            while (await receive())["type"] != "http.disconnect":
                pass

        async def talk():
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)  # send returns at once when the client is gone

        tasks = [asyncio.ensure_future(listen()), asyncio.ensure_future(talk())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        tasks[1].cancel()
        ended.set()

    with Timely(endless, write_seconds=0.4) as server:
        raw = server.connect(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", buffer=4096)
        assert ended.wait(20)
        wait_for(lambda: server.open == 0)
        raw.close()


def ask_raw(server, stream):
    """A long answer with the numbers of every token, on a connection that buffers little; the socket."""
    body = {"model": "late", "prompt": "sit", "max_tokens": 120, "stream": stream, "logprobs": 5}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return server.connect(head.encode() + content, buffer=2048)


def talkative():
    app = application()
    app.state.server.role.engine.backend.stop_token_ids = frozenset()
    return app


@pytest.mark.parametrize(("stream", "leaves"), covering([False, True], [False, True]))
def test_a_client_that_stops_reading_is_counted_once(stream, leaves):
    """Whether it stays and reads nothing, or closes with most of the answer unread."""
    app = talkative()
    server = Timely(app, write_seconds=20 if leaves else 0.4)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    with server:
        raw = ask_raw(server, stream)
        assert b"200 OK" in raw.recv(100)
        if leaves:
            wait_for(lambda: app.state.server.role.engine.running == 0)
            raw.close()
        wait_for(lambda: server.open == 0)
        wait_for(lambda: app.state.server.in_flight == 0)
        with server.http(KEY) as http:
            assert metric(http.get("/metrics").text, "shadowpeft_disconnected_total") == 1
        raw.close()


@pytest.mark.parametrize(("part", "seen"), covering(["head", "body", "end"], ["by reading", "by writing"]))
def test_a_client_that_leaves_before_a_part_of_the_answer_is_counted_once(part, seen):
    """Whatever the server does when the connection ends: it waits and reads that it was reset, or it writes and fails."""
    connected, left, done = threading.Event(), threading.Event(), threading.Event()
    counted = []

    async def slow(scope, receive, send):
        scope[UNREAD] = once(lambda: counted.append(scope["path"]))

        async def leave(now):
            if now != part or scope["path"] != "/leaves":
                return
            assert connected.wait(20)
            said = b"" if part == "head" else raw.recv(1)  # something of it stays unread
            assert said == (b"" if part == "head" else b"H")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
            raw.close()
            left.set()
            if seen == "by reading":
                await asyncio.sleep(0.2)

        await leave("head")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2000000")]})
        await leave("body")
        await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
        await leave("end")
        await send({"type": "http.response.body", "body": b"x" * 1_000_000})
        done.set()

    with Timely(slow, write_seconds=20) as server:
        raw = server.connect(b"GET /leaves HTTP/1.1\r\nhost: x\r\n\r\n")
        connected.set()
        assert left.wait(20)
        assert done.wait(20)
        wait_for(lambda: server.open == 0)
        assert counted == ["/leaves"]
        done.clear()
        assert closed(server.connect(b"GET /stays HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"))
        assert done.wait(20)
        wait_for(lambda: server.open == 0)
        assert counted == ["/leaves"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_everything_slowly_is_not_counted(stream):
    app = talkative()
    server = Timely(app, write_seconds=20)
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    with server:
        raw = ask_raw(server, stream)
        wait_for(lambda: app.state.server.role.engine.running == 0 and app.state.server.role.engine.steps > 100)
        said = b""
        while part := raw.recv(65536):
            said += part
        assert len(said) > 20_000
        raw.close()
        wait_for(lambda: server.open == 0)
        with server.http(KEY) as http:
            assert metric(http.get("/metrics").text, "shadowpeft_disconnected_total") == 0


def test_a_flood_of_malformed_requests_writes_no_log():
    def record(text):
        return logging.LogRecord("uvicorn.error", logging.WARNING, "f", 1, text, (), None)

    assert not quiet(record("Invalid HTTP request received."))
    assert quiet(record("Started server process"))


# ------------------------------------------------------------------------------------------------------------ the end


def test_what_is_not_finished_in_time_is_told_so():
    app = application(drain_seconds=0.5)
    engine = app.state.server.role.engine
    engine.backend.stop_token_ids = frozenset()
    opened, gate = engine.backend.open, threading.Event()

    def slow(names):
        session = opened(names)
        forward = session.forward
        session.forward = lambda *inputs: (
            time.sleep(0.05),
            gate.wait(30) if engine.steps > 6 else 0,
            forward(*inputs),
        )[2]
        return session

    engine.backend.open = slow
    answers = {}

    def ask(http, stream):
        body = {"model": "late", "prompt": "sit", "max_tokens": 400, "stream": stream}
        answers[stream] = http.post("/v1/completions", json=body)

    with Timely(app, app.state.server.drain) as server, server.http(KEY) as http:
        threads = [threading.Thread(target=ask, args=(http, stream)) for stream in (False, True)]
        [t.start() for t in threads]
        wait_for(lambda: engine.steps > 6)
        server.server.should_exit = True
        [t.join(30) for t in threads]
        gate.set()
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["type"] == "not_ready"
    assert answers[False].headers["retry-after"]
    *_, last = [line for line in answers[True].text.split("\n\n") if line]
    assert answers[True].status_code == 200
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "incomplete"

"""Innocent requests beside everything that goes wrong at once: none is lost, and each answer is whole and right.

A slow cloud, slow readers and readers that stop, a storm of administration, long answers, and a link that flips while it is
read. Run with: pytest -m server tests/serve/test_load_adversities.py.
"""

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_processes import ADMIN, KEY, PROMPTS, Process, save_versions
from webserver import free_port, metric, wait_for

pytestmark = pytest.mark.server

PATH = "/v1/completions"
REQUESTS = 360
CLIENTS = 10
LONG = [("deep", "go"), ("late", "e"), ("default", "tell"), ("base", "tell")]
"""Some of the few prompts that the tiny models answer with hundreds of tokens."""
LONG_TOKENS = 400
SLOW_READS = [("deep", "oh"), ("default", "a"), ("base", "13")]
STOPPED_READS = 6
HELD_SAMPLES = 10
CHAT = "/v1/chat/completions"
NEVER_READ = {
    "model": "deep",
    "messages": [{"role": "user", "content": "13"}],
    "max_tokens": LONG_TOKENS,
    "stream": True,
    "logprobs": True,
    "top_logprobs": 20,
}
"""A stream of 660 kB, more than the buffers on its way hold (``serve_tiny.py`` keeps them small)."""
CLOUD_SECONDS = 2.0
"""The edge's patience; three times as long, and one second, for the whole of a stream."""
ORDINARY = {"edge", "edge to cloud", "cloud", "late", "extra"}
OF_CHANGES = {"200", "404", "409"}
"""What a change may be answered with; 409: it is there already, or there is nothing to go back to."""
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n"
FIRST = b'data: {"choices": [{"index": 0, "text": "half", "finish_reason": null}]}\n\n'
TRICKLES = {
    "headers": (b"HTTP/1.1 200 OK\r\nx: ", b"y", False),
    "body": (OK, b" ", False),
    "error body": (OK.replace(b"200 OK", b"400 No"), b" ", False),
    "line": (OK + b"data: ", b" ", True),
    "begun": (OK + FIRST, b": more\n\n", True),
}
"""What a slow cloud sends at once, what it goes on with, and whether it was asked for a stream."""


class Between(ThreadingHTTPServer):
    """The way from the edge to the cloud: requests whose prompt begins with ``slow`` get a trickle, the others go through."""

    daemon_threads = True

    def __init__(self, cloud):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cloud = httpx.Client(base_url=cloud, timeout=60, trust_env=False)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.trickled, self.passed, self.lock = Counter(), 0, threading.Lock()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def stop(self):
        self.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()
        self.cloud.close()

    def handle_error(self, request, client_address):
        pass  # the edge left: that is what it is here for


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.close_connection = True
        content = self.rfile.read(int(self.headers["content-length"]))
        prompt = json.loads(content)["prompt"]
        if prompt.startswith("slow "):
            head, filler, _ = TRICKLES[prompt.removeprefix("slow ")]
            with self.server.lock:
                self.server.trickled[prompt] += 1
            self.wfile.write(head)
            while not self.server.over.wait(0.05):
                self.wfile.write(filler)
            return
        with self.server.lock:
            self.server.passed += 1
        headers = {"authorization": self.headers["authorization"], "content-type": "application/json"}
        with self.server.cloud.stream("POST", self.path, content=content, headers=headers) as answer:
            self.send_response(answer.status_code)
            self.send_header("content-type", answer.headers["content-type"])
            self.send_header("connection", "close")
            self.end_headers()
            for piece in answer.iter_raw():
                self.wfile.write(piece)


class History:
    """The versions that an adapter had, and when each may have been there."""

    def __init__(self, version):
        self.entries = [(-1.0, -1.0, version)]
        """When the change to it began, and when it was done."""

    def between(self, began, ended):
        """Every version that may have been there at some time between the two."""
        gone = [done for _, done, _ in self.entries[1:]] + [float("inf")]
        return {v for (start, _, v), end in zip(self.entries, gone, strict=True) if start <= ended and end >= began}


class Answer:
    """What came to a request: its status, text, and what the server says about it; ``broken``: its stream ended in an error."""

    def __init__(self, status, text="", note=None, broken=False):
        self.status, self.text, self.note, self.broken = status, text, note or {}, broken


def read_stream(status, lines):
    """The answer that the lines of a stream are.

    Raises:
        AssertionError: if it just stops.
    """
    text, note, reason, last = "", {}, None, None
    for line in lines:
        if not line.startswith("data: "):
            continue
        last = line.removeprefix("data: ")
        if last == "[DONE]":
            break
        chunk = json.loads(last)
        if "error" in chunk:
            return Answer(status, text, note, broken=True)
        for choice in chunk["choices"]:
            text += choice["text"]
            reason = choice["finish_reason"] or reason
        note = chunk.get("shadowpeft", note)
    assert last == "[DONE]", f"the stream stops after {text!r}"
    assert reason in ("stop", "length"), f"the stream ends without a reason after {text!r}"
    return Answer(status, text, note)


def send(http, body):
    if body.get("stream"):
        with http.stream("POST", PATH, json=body) as response:
            if response.status_code != 200:
                return Answer(response.status_code)
            return read_stream(200, response.iter_lines())
    response = http.post(PATH, json=body)
    if response.status_code != 200:
        return Answer(response.status_code)
    content = response.json()
    (choice,) = content["choices"]
    assert choice["finish_reason"] in ("stop", "length")
    return Answer(200, choice["text"], content["shadowpeft"])


def raw_request(url, body, path=PATH):
    """A connection with a small buffer that has sent a request and read nothing."""
    content = json.dumps(body).encode()
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(60)
    host, port = url.removeprefix("http://").split(":")
    raw.connect((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: {KEY['authorization']}\r\nconnection: close\r\n"
    raw.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content)
    return raw


def client_of(server):
    return httpx.Client(base_url=server.url, headers=KEY, timeout=90, trust_env=False)


def body_of(i, model, **more):
    return {"model": model, "prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 6 + i % 3 * 5, **more}


def long_body(model, prompt, **more):
    return {"model": model, "prompt": prompt, "max_tokens": LONG_TOKENS, **more}


def key_of(body, version=None):
    return version, body["model"], body["prompt"], body["max_tokens"]


def counted(server):
    """Completions that a server counted, whatever their status."""
    families = text_string_to_metric_families(server.metrics())
    samples = [s for family in families for s in family.samples if s.name == "shadowpeft_requests_total"]
    return int(sum(s.value for s in samples if s.labels["path"] == PATH))


class Storm:
    """Everything at once; what each request came to."""

    def __init__(self, edge, cloud, between, versions):
        self.edge, self.cloud, self.between, self.versions = edge, cloud, between, versions
        self.known = {}
        """The text of each answer when it is alone, by version (None where there is one only), model, prompt and length."""
        self.history = History("v1")
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.sent, self.came, self.wrong, self.administered = Counter(), Counter(), [], Counter()
        self.to_check = []
        self.held = []
        """Answers of the cloud that are on their way though no row runs or waits for them: nobody reads them."""

    # ------------------------------------------------------------------------------------------------------- alone

    def learn(self):
        """What everybody gets when nobody else is there."""
        with client_of(self.edge) as edge, client_of(self.cloud) as cloud:
            for version in ("v1", "v2"):
                self.administer("post", "late/swap", version=version)
                for body in [body_of(i, "late") for i in range(24)] + [long_body(*LONG[1])]:
                    self.known[key_of(body, version)] = send(cloud, body).text
            self.administer("post", "late/swap", version="v1")
            for body in [body_of(i, m) for i in range(24) for m in ("default", "deep", "base")]:
                self.known[key_of(body)] = send(cloud, body).text
            for name, prompt in LONG + SLOW_READS:
                answer = cloud.post(PATH, json=long_body(name, prompt)).json()
                assert answer["usage"]["completion_tokens"] > 250
                if name != "late":
                    self.known[key_of(long_body(name, prompt))] = answer["choices"][0]["text"]
            for body in [body_of(i, "edge") for i in range(24)] + [self.slow_body(i) for i in range(5)]:
                self.known[key_of(body)] = send(edge, {**body, "route": "device", "stream": False}).text
        different = [self.known[key_of(b, "v1")] != self.known[key_of(b, "v2")] for b in map(late_body, range(24))]
        assert sum(different) > 18

    # --------------------------------------------------------------------------------------------------- at once

    def one(self, kind, http, body):
        """Send a request until it is not told to come again; note what came."""
        where = "edge" if http.base_url.port == int(self.edge.arguments[1]) else "cloud"
        while True:
            with self.lock:
                self.sent[where] += 1
            began = time.monotonic()
            try:
                answer = send(http, body)
            except (httpx.HTTPError, AssertionError, ValueError) as error:
                answer = Answer(repr(error))
            with self.lock:
                self.came[where] += isinstance(answer.status, int)
            if answer.status != 429:
                break
            time.sleep(0.1)
        self.note(kind, body, answer, began)

    def note(self, kind, body, answer, began):
        with self.lock:
            self.to_check.append((kind, body, answer, began, time.monotonic()))

    def ordinary(self, todo):
        with client_of(self.edge) as edge, client_of(self.cloud) as cloud:
            while True:
                with self.lock:
                    i = next(todo, None)
                if i is None:
                    return
                chance = random.Random(i)
                stream = {"stream": chance.random() < 0.5}
                kind = chance.random()
                if kind < 0.4:
                    self.one("edge", edge, body_of(i, "edge", **stream))
                elif kind < 0.5:
                    self.one("edge to cloud", edge, body_of(i, "edge", route="cloud", **stream))
                elif kind < 0.75:
                    self.one("cloud", cloud, body_of(i, ("default", "deep", "base")[i % 3], **stream))
                elif kind < 0.9:
                    self.one("late", cloud, body_of(i, "late", **stream))
                else:
                    self.one("extra", cloud, body_of(i, "extra", **stream))

    @staticmethod
    def slow_body(i):
        kind = list(TRICKLES)[i % len(TRICKLES)]
        return {
            "model": "edge",
            "prompt": f"slow {kind}",
            "max_tokens": 8,
            "route": "cloud",
            "stream": TRICKLES[kind][2],
        }

    def slow_cloud(self, first):
        with client_of(self.edge) as edge:
            for i in range(first, first + 15, 3):
                body = self.slow_body(i)
                self.one("slow cloud", edge, body)
                while not self.between.trickled[body["prompt"]]:  # the circuit was open: nobody has asked the cloud
                    time.sleep(0.5)
                    self.one("slow cloud", edge, body)

    def long(self, name, prompt):
        with client_of(self.cloud) as cloud:
            while not self.over.is_set():
                self.one("long", cloud, long_body(name, prompt, stream=name in ("deep", "late")))

    def slow_read(self, name, prompt):
        """A few kilobytes at a time, with pauses."""
        body, began = long_body(name, prompt, stream=True), time.monotonic()
        with self.lock:
            self.sent["cloud"] += 1
        said = b""
        with raw_request(self.cloud.url, body) as raw:
            while piece := raw.recv(2048):
                said += piece
                time.sleep(0.05)
        head, _, rest = said.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        with self.lock:
            self.came["cloud"] += 1
        self.note("slow reader", body, read_stream(status, rest.decode().splitlines()), began)

    def stop_reading(self):
        """Read the first bytes of a stream and then nothing, until all is over."""
        with raw_request(self.cloud.url, NEVER_READ, CHAT) as raw:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
            self.over.wait(240)

    def administer(self, method, path, **content):
        with httpx.Client(base_url=self.cloud.url, headers=ADMIN, timeout=90, trust_env=False) as http:
            response = http.request(method.upper(), f"/admin/adapters/{path}", json=content or None)
        with self.lock:
            self.administered[f"{method} {path.partition('/')[2] or path} {response.status_code}"] += 1
        return response

    def change_late(self):
        """Swaps and rollbacks in bursts, so that there are times at which one version only is right."""
        turn = 0
        while not self.over.is_set():
            for version in ("v2", "current", "v1", "current", "", ""):
                turn += 1
                began = time.monotonic()
                if version:
                    response = self.administer("post", "late/swap", version=version)
                else:
                    response = self.administer("post", "late/rollback")
                if response.status_code == 200:
                    self.history.entries.append((began, time.monotonic(), response.json()["version"]))
            self.over.wait(0.1 + 0.4 * (turn % 4))

    def change_extra(self):
        """Add, swap, roll back, and delete twice at once."""
        turn = 0
        with ThreadPoolExecutor(2) as pool:
            while not self.over.is_set():
                turn += 1
                self.administer("post", "extra", version=("v1", "current", "v2")[turn % 3])
                self.over.wait(0.2)
                self.administer("post", "extra/swap", version=("current", "v2", "v1")[turn % 3])
                self.administer("post", "extra/rollback")
                self.administer("post", "extra", version="v1")  # it is there already
                self.over.wait(0.2)
                list(pool.map(lambda _: self.administer("delete", "extra"), range(2)))

    def flip(self):
        link, following, turn = self.versions / "current", self.versions / "next", 0
        while not self.over.wait(0.003):
            turn += 1
            following.symlink_to(self.versions / ("v1", "v2")[turn % 2])
            os.replace(following, link)
        self.flips = turn

    def watch(self):
        while not self.over.wait(0.5):
            text = self.cloud.metrics()
            in_flight, running, waiting = (metric(text, f"shadowpeft_{n}") for n in ("in_flight", "running", "queue"))
            self.held.append(in_flight - running - waiting)

    def samples_held(self):
        """How often all of the streams that nobody reads were seen to be held back."""
        return sum(held >= STOPPED_READS for held in self.held)

    def run(self):
        todo = iter(range(REQUESTS))
        (self.versions / "current").symlink_to(self.versions / "v1")
        with ThreadPoolExecutor(64) as pool:
            background = [pool.submit(f) for f in (self.flip, self.watch, self.change_late, self.change_extra)]
            background += [pool.submit(self.long, *which) for which in LONG]
            background += [pool.submit(self.stop_reading) for _ in range(STOPPED_READS)]
            bounded = [pool.submit(self.slow_cloud, i) for i in range(3)]
            bounded += [pool.submit(self.slow_read, *which) for which in SLOW_READS]
            bounded += [pool.submit(self.ordinary, todo) for _ in range(CLIENTS)]
            try:
                for future in bounded:
                    future.result()
                # on a busy machine the streams that nobody reads are still being made when all others have their answers
                until = time.monotonic() + 60
                while self.samples_held() < HELD_SAMPLES and time.monotonic() < until:
                    time.sleep(0.5)
            finally:
                self.over.set()
            for future in background:
                future.result()

    # --------------------------------------------------------------------------------------------------- afterwards

    def judge(self):
        """What came to how many requests; those to which anything wrong came are kept."""
        counts = Counter()
        for kind, body, answer, began, ended in self.to_check:
            result, allowed = kind, {self.known.get(key_of(body))}
            degraded = answer.note.get("degraded", False)
            if kind == "extra" and answer.status == 404:
                counts["extra, not there"] += 1
                continue
            if kind == "slow cloud" and body["prompt"] == "slow begun" and answer.broken:
                counts["slow cloud, broken off"] += 1
                continue
            if kind in ("edge", "edge to cloud") and answer.note.get("where") == "cloud":
                allowed = self.of_late({**body, "model": "late"}, self.history.between(began, ended))
                result = f"{kind}, by the cloud"
            elif kind == "late" or (kind == "long" and body["model"] == "late"):
                allowed = self.of_late(body, self.history.between(began, ended))
            elif kind == "extra":
                allowed = self.of_late({**body, "model": "late"}, {"v1", "v2"})
            right = answer.status == 200 and answer.text in allowed and not answer.broken
            if not right or (kind == "slow cloud" and not degraded):
                self.wrong.append([kind, body, answer.status, answer.text, answer.note, sorted(map(str, allowed))])
            counts[result + (", degraded" if degraded else "")] += 1
        return counts

    def of_late(self, body, versions):
        return {self.known[key_of(body, version)] for version in versions}


def late_body(i):
    return body_of(i, "late")


@pytest.mark.timeout(600)
def test_innocent_requests_beside_everything_at_once(tmp_path):
    versions = save_versions(tmp_path)
    cloud = Process("cloud", free_port(), versions)
    between = edge = None
    try:
        between = Between(cloud.url)
        edge = Process("edge", free_port(), versions, between.url, CLOUD_SECONDS)
        storm = Storm(edge, cloud, between, versions)
        storm.learn()
        before = {"edge": counted(edge), "cloud": counted(cloud) - between.passed}
        memory = {"edge": edge.memory(), "cloud": cloud.memory()}
        began = time.monotonic()
        storm.run()
        seconds = time.monotonic() - began
        for server in (edge, cloud):
            wait_for(lambda server=server: metric(server.metrics(), "shadowpeft_in_flight") == 0)
            wait_for(lambda server=server: metric(server.metrics(), "shadowpeft_running") == 0)
        counts = storm.judge()
        handled = {"edge": counted(edge) - before["edge"], "cloud": counted(cloud) - between.passed - before["cloud"]}
        growth = {"edge": edge.memory() / memory["edge"] - 1, "cloud": cloud.memory() / memory["cloud"] - 1}
        windows = [len(storm.history.between(b, e)) for kind, *_, b, e in storm.to_check if kind == "late"]
        report = {
            "seconds": round(seconds, 1),
            "counts": counts,
            "sent": storm.sent,
            "handled": handled,
            "trickled": between.trickled,
            "administered": storm.administered,
            "samples with held streams": storm.samples_held(),
            "samples": len(storm.held),
            "flips": storm.flips,
            "one version only was right": windows.count(1),
            "memory growth": {name: round(share, 3) for name, share in growth.items()},
            "wrong": storm.wrong[:10],
        }
        print(json.dumps(report, indent=1, ensure_ascii=False))
        assert storm.wrong == []
        assert sum(1 for kind, *_ in storm.to_check if kind in ORDINARY) == REQUESTS
        assert storm.came == storm.sent == handled
        assert len(between.trickled) == len(TRICKLES)
        assert report["samples with held streams"] >= HELD_SAMPLES  # not buffered whole and forgotten
        assert counts["long"] >= len(LONG)
        statuses = Counter({what: n for what, n in storm.administered.items() if what.split()[-1] not in OF_CHANGES})
        assert not statuses
        for what in ("post swap", "post rollback", "post extra", "delete extra"):
            assert storm.administered[f"{what} 200"] > 5
        assert growth["edge"] < 0.1  # measured: 0.005, and 0.016 to 0.036 for the cloud
        assert growth["cloud"] < 0.1
        with client_of(cloud) as http:  # what is left is the version that the last change said
            answer = send(http, late_body(1))
            assert answer.text == storm.known[key_of(late_body(1), storm.history.entries[-1][2])]
        assert edge.ready()
        assert cloud.ready()
        wait_for(lambda: httpx.get(edge.url + "/readyz", trust_env=False).json()["cloud"] != "open")
    finally:
        for server in (edge, between, cloud):
            if server is not None:
                server.stop()

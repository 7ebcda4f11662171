"""2,000 requests of 32 clients against two processes, with malformed ones, clients that leave, a swap and an outage.

Run with: pytest -m server tests/serve. ``SHADOWPEFT_LOAD`` is the number of requests.
"""

import json
import os
import random
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from server_processes import ADMIN, KEY, PROMPTS, Process, save_versions
from shadowpeft.runtime import environment as versions_of
from webserver import free_port, metric, wait_for

pytestmark = pytest.mark.server

REQUESTS = int(os.environ.get("SHADOWPEFT_LOAD", "2000"))
CLIENTS = 32
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b'{"model": "late"}',
    b'{"model": "late", "prompt": 3}',
    b'{"model": "late", "prompt": "x", "n": 9}',
]


@pytest.fixture
def versions(tmp_path):
    return save_versions(tmp_path)


def body(i, model):
    return {"model": model, "prompt": PROMPTS[i % len(PROMPTS)], "max_tokens": 4 + i % 5}


def answers(url, model):
    """What each request gets when it is alone."""
    found = {}
    with httpx.Client(base_url=url, headers=KEY, timeout=60, trust_env=False) as http:
        for i in range(len(PROMPTS) * 5):
            made = http.post("/v1/completions", json=body(i, model)).json()
            found[i] = (made["choices"][0]["text"], made["shadowpeft"]["where"])
    return found


def local_answers(url):
    found = {}
    with httpx.Client(base_url=url, headers=KEY, timeout=60, trust_env=False) as http:
        for i in range(len(PROMPTS) * 5):
            found[i] = http.post("/v1/completions", json={**body(i, "edge"), "route": "device"}).json()["choices"][0][
                "text"
            ]
    return found


@pytest.mark.timeout(1500)
def test_two_thousand_requests(versions):
    cloud = Process("cloud", free_port(), versions)
    edge = Process("edge", free_port(), versions, cloud.url)
    try:
        old = answers(edge.url, "edge")
        assert {where for _, where in old.values()} == {"device", "cloud"}
        local = local_answers(edge.url)
        swap = httpx.post(
            cloud.url + "/admin/adapters/late/swap", headers=ADMIN, json={"version": "v2"}, trust_env=False
        )
        assert swap.json() == {"name": "late", "version": "v2"}
        new = answers(edge.url, "edge")
        assert new != old
        httpx.post(cloud.url + "/admin/adapters/late/rollback", headers=ADMIN, trust_env=False).raise_for_status()
        run(
            edge, cloud, min(REQUESTS, 400), old, new, local, disturb=False
        )  # warm: allocators and pools have their size
        before = edge.memory()
        report = run(edge, cloud, REQUESTS, old, new, local, disturb=True)
        wait_for(lambda: metric(edge.metrics(), "shadowpeft_in_flight") == 0)
        wait_for(lambda: metric(edge.metrics(), "shadowpeft_running") == 0)
        report["edge_memory_growth"] = round(edge.memory() / before - 1, 4)
        print(json.dumps(report))
        if os.environ.get("SHADOWPEFT_LOAD_RECORD"):
            Path(os.environ["SHADOWPEFT_LOAD_RECORD"]).write_text(
                json.dumps({**report, "machine": versions_of()}, indent=2) + "\n"
            )
        assert report["wrong"] == [] and report["lost"] == []  # noqa: PT018
        assert report["edge_memory_growth"] < 0.05
    finally:
        edge.stop()
        cloud.stop()


def run(edge, cloud, n, old, new, local, disturb):
    """``n`` requests; what they came to."""
    counts, wrong, lost, seconds, lock = {}, [], [], [], threading.Lock()
    todo = iter(range(n))

    def note(kind, i=None, what=None):
        with lock:
            counts[kind] = counts.get(kind, 0) + 1
            if what is not None:
                (wrong if kind == "wrong" else lost).append([i, what])

    def client():
        with httpx.Client(base_url=edge.url, headers=KEY, timeout=120, trust_env=False) as http:
            while True:
                with lock:
                    i = next(todo, None)
                if i is None:
                    return
                one(http, i)

    def one(http, i):
        kind = random.Random(i).random()
        if kind < 0.1:
            content = MALFORMED[i % len(MALFORMED)]
            status = http.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            ).status_code
            note("malformed" if 400 <= status < 500 else "lost", i, None if 400 <= status < 500 else status)
            return
        if kind < 0.2:
            host, port = edge.url.removeprefix("http://").split(":")
            content = json.dumps({**body(i, "edge"), "stream": i % 2 == 0}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: {KEY['authorization']}\r\n"
            with socket.create_connection((host, int(port))) as raw:
                raw.sendall(
                    f"{head}content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode() + content
                )
                time.sleep(random.Random(i).random() * 0.05)
            note("left")
            return
        began = time.monotonic()
        while True:
            response = http.post("/v1/completions", json=body(i, "edge"))
            if response.status_code != 429:
                break
            note("429")
            time.sleep(0.05 * float(response.headers["retry-after"]))
        if response.status_code != 200:
            note("lost", i, response.status_code)
            return
        made = response.json()
        text, where, j = made["choices"][0]["text"], made["shadowpeft"], i % (len(PROMPTS) * 5)
        allowed = {local[j]} if where.get("degraded") or where["where"] == "device" else {old[j][0], new[j][0]}
        expected_where = "device" if where.get("degraded") else old[j][1]
        if text not in allowed or where["where"] != expected_where:
            note("wrong", i, [text, where])
            return
        note("degraded" if where.get("degraded") else where["where"])
        with lock:
            seconds.append(time.monotonic() - began)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    began = time.monotonic()
    [t.start() for t in threads]
    if disturb:
        wait_for(lambda: sum(counts.values()) > n // 4, 900)
        changed = httpx.post(
            cloud.url + "/admin/adapters/late/swap", headers=ADMIN, json={"version": "v2"}, trust_env=False, timeout=60
        )
        assert changed.status_code == 200
        wait_for(lambda: sum(counts.values()) > n // 2, 900)
        cloud.child.kill()
        cloud.child.wait()
        wait_for(lambda: counts.get("degraded", 0) > n // 50, 900)
        cloud.start()
    [t.join() for t in threads]
    seconds.sort()
    return {
        "requests": n,
        "clients": CLIENTS,
        "seconds": round(time.monotonic() - began, 1),
        "p50_ms": round(1000 * seconds[len(seconds) // 2], 1),
        "p95_ms": round(1000 * seconds[int(len(seconds) * 0.95)], 1),
        "counts": counts,
        "wrong": wrong,
        "lost": lost,
    }

"""The cloud's server through the official client and raw HTTP: answers, streams, errors, keys, limits, swaps, shutdown."""

import gzip
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from chatbase import chat_tokenizer
from products import covering
from serving import ask, attached, detached, engine_of
from shadowpeft.data.chat import render_prompt
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.failures import without_text
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.versions import Version
from webserver import Running, metric, wait_for

KEY, ADMIN = "user-key-0123456789", "admin-key-0123456789"
PROMPTS = ["sit", "a much longer request, please", "x", "站起来", "another one of middle length"]


def cloud(backend=None, keys=None, versions=None, requests=128, max_body=1 << 20, **limits):
    engine = Engine(backend or attached(max_position_embeddings=512), EngineLimits(**limits))
    role = CloudRole(engine, system=None, default_tokens=8)
    settings = Settings(keys or Keys((KEY,), (ADMIN,)), versions, requests=requests, max_body=max_body)
    return build(role, settings)


@pytest.fixture(scope="module")
def backend():
    return attached(max_position_embeddings=512)


@pytest.fixture(scope="module")
def server(backend):
    with Running(cloud(backend)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def reference(backend):
    """Greedy text straight from an engine of its own, one request at a time."""
    engine = engine_of(attached(max_position_embeddings=512))
    rendered = lambda text: render_prompt(chat_tokenizer(), [{"role": "user", "content": text}])  # noqa: E731
    yield lambda text, name, n: ask(engine, rendered(text), name, max_tokens=n).text
    engine.stop()


def chat(client, text, model="default", **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_models_are_the_base_and_every_adapter(client):
    assert [m.id for m in client.models.list()] == ["default", "late", "deep", "base"]


def test_concurrent_clients_get_the_answers_they_would_get_alone(client, reference):
    jobs = [
        (p, m, 3 + (i + 2 * j) % 7)
        for i, p in enumerate(PROMPTS)
        for j, m in enumerate(("default", "late", "deep", "base"))
    ]
    expected = [reference(*job) for job in jobs]
    found = [""] * len(jobs)

    def send(i):
        text, model, n = jobs[i]
        if i % 2:
            found[i] = chat(client, text, model, max_tokens=n).choices[0].message.content
        else:
            parts = chat(client, text, model, max_tokens=n, stream=True)
            found[i] = "".join(part.choices[0].delta.content or "" for part in parts)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(jobs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == expected
    assert len(set(found)) > len(jobs) // 2


def test_where_and_why_are_in_header_and_field(client):
    raw = client.chat.completions.with_raw_response.create(model="late", messages=[{"role": "user", "content": "sit"}])
    assert raw.headers["x-shadow-where"] == "cloud"
    assert raw.headers["x-shadow-reason"] == "attached"
    note = raw.parse().model_extra["shadowpeft"]
    assert note["where"] == "cloud"
    assert note["milliseconds"] > 0
    bare = client.chat.completions.with_raw_response.create(model="base", messages=[{"role": "user", "content": "sit"}])
    assert bare.headers["x-shadow-reason"] == bare.parse().model_extra["shadowpeft"]["reason"] == "base"


def test_usage_finish_and_length(client):
    made = chat(client, "sit", max_completion_tokens=5, max_tokens=7)
    prompt = len(chat_tokenizer()(render_prompt(chat_tokenizer(), [{"role": "user", "content": "sit"}])).input_ids)
    assert made.usage.prompt_tokens == prompt
    assert made.usage.completion_tokens <= 5
    assert made.usage.total_tokens == prompt + made.usage.completion_tokens
    assert made.choices[0].finish_reason == ("length" if made.usage.completion_tokens == 5 else "stop")
    *parts, last = chat(client, "sit", max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert last.usage == made.usage
    assert not last.choices
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[0].choices[0].delta.content is not None
    assert all(part.usage is None and "usage" in part.model_fields_set for part in parts)
    assert parts[-1].choices[0].finish_reason == made.choices[0].finish_reason


def test_a_default_length_is_cut_to_the_room_and_what_is_asked_for_is_refused(backend):
    """Each character is a token; the default is 8."""
    window = backend.max_model_len
    with Running(cloud(backend)) as server, server.http(KEY) as http:

        def answered(room, **more):
            body = {"model": "base", "prompt": "x" * (window - room), **more}
            return http.post("/v1/completions", json=body)

        for room in (8, 7, 1):
            answer = answered(room)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] == window - room
            assert answer.json()["usage"]["completion_tokens"] <= room
        for refused, more in ((answered(0), 1), (answered(7, max_tokens=8), 8)):
            assert refused.status_code == 400
            told = refused.json()["error"]
            assert f"{more} more are asked for" in told["message"]
            assert (told["code"], told["param"]) == ("context_length_exceeded", "prompt")


def test_logprobs_of_chats_and_completions(client, backend):
    made = chat(client, "sit", "deep", max_tokens=3, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    backend.model.set_adapter("deep")
    ids = chat_tokenizer()(render_prompt(chat_tokenizer(), [{"role": "user", "content": "sit"}])).input_ids
    with torch.no_grad():
        log_p = backend.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    assert made[0].logprob == pytest.approx(float(log_p.max()), abs=1e-4)
    assert [t.logprob for t in made[0].top_logprobs] == pytest.approx(log_p.topk(2).values.tolist(), abs=1e-4)
    assert bytes(made[0].bytes).decode() == made[0].token
    plain = client.completions.create(model="deep", prompt="sit", max_tokens=3, logprobs=2).choices[0]
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs) == len(plain.logprobs.text_offset)
    assert plain.logprobs.text_offset[0] == 0
    assert len(plain.logprobs.top_logprobs[0]) <= 2
    assert chat(client, "sit", max_tokens=2).choices[0].logprobs is None


def test_several_answers_are_those_of_requests_of_their_own(client):
    tokens = [chat_tokenizer()(text).input_ids for text in PROMPTS[:2]]
    ask = {"model": "late", "max_tokens": 6, "logprobs": 1}
    alone = [client.completions.create(prompt=text, **ask) for text in PROMPTS[:2]]
    for prompts in (PROMPTS[:2], tokens):
        made = client.completions.create(prompt=prompts, **ask)
        assert [c.text for c in made.choices] == [one.choices[0].text for one in alone]
        assert [c.logprobs.text_offset for c in made.choices] == [one.choices[0].logprobs.text_offset for one in alone]
        assert [c.index for c in made.choices] == [0, 1]
        assert made.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone)
        assert made.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
        assert made.shadowpeft["where"] == "cloud"
    assert client.completions.create(prompt=tokens[0], **ask).choices[0].text == alone[0].choices[0].text
    parts = list(client.completions.create(prompt=PROMPTS[:2], stream=True, stream_options={"include_usage": True}, **ask))
    assert parts[-1].usage == made.usage
    assert len({part.id for part in parts}) == 1
    for n, one in enumerate(alone):
        own = [c for part in parts for c in part.choices if c.index == n]
        assert "".join(c.text for c in own) == one.choices[0].text
        assert own[-1].finish_reason == one.choices[0].finish_reason


def test_n_answers_are_drawn_with_seeds_of_their_own(client):
    options = {"max_tokens": 8, "temperature": 1.5}
    made = chat(client, "sit", n=3, seed=5, **options)
    alone = [chat(client, "sit", seed=seed, **options) for seed in (5, 6, 7)]
    assert [c.message.content for c in made.choices] == [one.choices[0].message.content for one in alone]
    assert made.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert made.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
    assert len({c.message.content for c in chat(client, "sit", n=4, **options).choices}) > 1
    texts = dict.fromkeys(range(3), "")
    for part in chat(client, "sit", n=3, seed=5, stream=True, **options):
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [c.message.content for c in made.choices]


NOT_PROMPTS = {
    "no text": (7, "is no text, no list of tokens"),
    "empty": ("", "nothing empty"),
    "none": ([], "nothing empty"),
    "one empty": (["a", ""], "nothing empty"),
    "mixed": ([1, "a"], "is no text, no list of tokens"),
    "truth": ([True], "is no text, no list of tokens"),
    "token": ([1, 99999], "prompt has the token 99999 but the model has those from 0 to"),
    "many": (["a"] * 65, "asks for 65 answers but one request may have 64"),
}


@pytest.mark.parametrize("kind", NOT_PROMPTS)
def test_what_is_no_prompt_is_refused(client, kind):
    prompt, message = NOT_PROMPTS[kind]
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.completions.create(model="late", prompt=prompt)
    assert caught.value.param == "prompt"


def test_when_one_of_several_fails_the_others_are_given_up(server, client):
    with pytest.raises(openai.BadRequestError, match="prompt has the token 99999"):
        client.completions.create(model="late", prompt=[[5, 6], [99999]], max_tokens=400)
    wait_for(lambda: server.app.state.server.role.engine.running == 0)


def test_completions_stream_and_stop(client):
    whole = client.completions.create(model="late", prompt=PROMPTS[1], max_tokens=12).choices[0].text
    parts = client.completions.create(model="late", prompt=PROMPTS[1], max_tokens=12, stream=True)
    assert "".join(p.choices[0].text for p in parts) == whole
    stop = whole[4:6]
    cut = client.completions.create(model="late", prompt=PROMPTS[1], max_tokens=12, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(("place", "stream"), covering(range(5), [False, True]))
def test_log_probabilities_are_those_of_the_text_without_its_stop(client, stream, place):
    ask = {"model": "late", "prompt": PROMPTS[1], "max_tokens": 12, "logprobs": 1}
    free = client.completions.create(**ask).choices[0]
    stop = free.text[place : place + 2]
    at = free.text.index(stop)
    made = client.completions.create(**ask, stop=stop, stream=stream)
    parts = [part.choices[0] for part in made] if stream else [made.choices[0]]
    assert "".join(part.text for part in parts) == free.text[:at]
    found = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
    offsets = [offset for part in parts if part.logprobs for offset in part.logprobs.text_offset]
    count = sum(offset < at for offset in free.logprobs.text_offset)
    assert found == free.logprobs.tokens[:count]
    assert offsets == free.logprobs.text_offset[:count]


def test_temperature_and_seed(client):
    def drawn(seed):
        return chat(client, "sit", max_tokens=8, temperature=1.5, seed=seed).choices[0].message.content

    assert drawn(3) == drawn(3)
    assert len({drawn(s) for s in range(4)}) > 1


BAD = {
    "no body": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "not UTF-8": b"\xff\xfe{}",
    "no messages": {"model": "default"},
    "empty messages": {"model": "default", "messages": []},
    "a role": {"model": "default", "messages": [{"role": "robot", "content": "x"}]},
    "content": {"model": "default", "messages": [{"role": "user", "content": 3}]},
    "half a pair": b'{"model": "default", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half a pair as key": b'{"model": "default", "messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
    "unknown key": {"model": "default", "messages": [{"role": "user", "content": "x"}], "tool": 1},
    "max_tokens 0": {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
    "max_tokens true": {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": True},
    "max_tokens many": {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 513},
    "temperature": {"model": "default", "messages": [{"role": "user", "content": "x"}], "temperature": 3},
    "temperature NaN": b'{"model": "default", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "top_p": {"model": "default", "messages": [{"role": "user", "content": "x"}], "top_p": 0},
    "seed": {"model": "default", "messages": [{"role": "user", "content": "x"}], "seed": 2**64},
    "n": {"model": "default", "messages": [{"role": "user", "content": "x"}], "n": 2},
    "stops": {"model": "default", "messages": [{"role": "user", "content": "x"}], "stop": ["a"] * 5},
    "empty stop": {"model": "default", "messages": [{"role": "user", "content": "x"}], "stop": ""},
    "usage without stream": {
        "model": "default",
        "messages": [{"role": "user", "content": "x"}],
        "stream_options": {"include_usage": True},
    },
    "route": {"model": "default", "messages": [{"role": "user", "content": "x"}], "route": "device"},
    "too long": {"model": "default", "messages": [{"role": "user", "content": "x" * 600}]},
    "deep": b'{"model": ' + b"[" * 100_000,
    "a huge number": b'{"model": "default", "messages": [], "seed": ' + b"9" * 5000 + b"}",
}


UNREADABLE = {
    "gzip": (415, {"content-encoding": "gzip"}, gzip.compress(b"{}"), "the body is compressed (gzip); send it as it is"),
    "latin": (400, {}, '{"model": "é"}'.encode("latin-1"), "the body is not in UTF-8; send JSON in UTF-8"),
    "deep": (400, {}, b'{"a": ' + b"[" * 200_000, "the body is nested too deeply"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_bodies_that_cannot_be_read_are_named(server, kind):
    status, headers, body, message = UNREADABLE[kind]
    with server.http(KEY) as http:
        response = http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", BAD)
def test_malformed_requests_get_400_and_a_sentence(server, kind):
    body = BAD[kind] if isinstance(BAD[kind], bytes) else json.dumps(BAD[kind]).encode()
    with server.http(KEY) as http:
        response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    told = response.json()["error"]
    assert told["message"]
    assert told["type"] == "invalid_request_error"


def test_other_refusals(server, client):
    for send in (lambda: chat(client, "sit", "none"), lambda: client.models.retrieve("none")):
        with pytest.raises(openai.NotFoundError, match="model 'none' is not loaded") as caught:
            send()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="longer than the model's context length") as caught:
        chat(client, "sit", max_tokens=600)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError, match="may be 4096; lower it") as caught:
        chat(client, "sit", max_tokens=5000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "sit", extra_body={"route": "device"})
    assert caught.value.param == "route"
    with server.http(KEY) as http:
        nothing = http.post("/v1/threads", json={})
        assert (nothing.status_code, nothing.json()["error"]["code"]) == (404, "unknown_url")
        assert "there is no /v1/threads on this server; there are /healthz, " in nothing.json()["error"]["message"]
        assert "/v1/chat/completions" in nothing.json()["error"]["message"]
        got = http.get("/v1/chat/completions")
        assert (got.status_code, got.headers["allow"]) == (405, "POST")
        assert got.json()["error"]["message"] == "GET is not possible at /v1/chat/completions; send POST"
        plain = http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 400
        cut = http.post("/v1/chat/completions", content=b'{"model":', headers={"content-type": "application/json"})
        assert (cut.status_code, cut.json()["error"]["param"]) == (400, None)


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-key-0123456789", "Bearer", f"Bearer {KEY}x", "Basic !", "Digest x"]
)
def test_every_route_but_health_needs_a_key(server, header):
    headers = {} if header is None else {"authorization": header}
    with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as http:
        paths = [(m, r.path) for r in server.app.routes for m in getattr(r, "methods", ()) if m in ("GET", "POST")]
        assert len(paths) >= 10
        for method, path in paths:
            status = http.request(method, path.replace("{name}", "late")).status_code
            assert status == (200 if path in ("/health", "/healthz", "/readyz") else 401), path
        assert http.get("/no/such/path").status_code == 401


def test_a_user_key_does_not_open_the_admin_routes_and_basic_works(server):
    with server.http(KEY) as http:
        assert http.get("/admin/adapters").status_code == 401
    with httpx.Client(base_url=server.url, auth=("anyone", KEY), trust_env=False) as http:
        assert http.get("/v1/models").status_code == 200
    with httpx.Client(base_url=server.url, auth=("anyone", ADMIN), trust_env=False) as http:
        assert http.get("/admin/adapters").status_code == 401  # a browser would send it along for other sites
    with server.http(ADMIN) as http:
        assert http.get("/admin/adapters").json() == {n: [f"{n}-folder"] for n in ("default", "late", "deep")}
        assert http.get("/v1/models").status_code == 401
    assert not Keys((), ()).allows("/v1/models", b"Bearer ")  # no key at all is not an empty key


def test_bodies_have_a_limit_whether_announced_or_not(backend):
    with Running(cloud(attached(max_position_embeddings=512), max_body=2000)) as server, server.http(KEY) as http:
        big = json.dumps({"model": "default", "messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        headers = {"content-type": "application/json"}
        assert http.post("/v1/chat/completions", content=big, headers=headers).status_code == 413

        def pieces():
            for i in range(0, len(big), 500):
                yield big[i : i + 500]

        assert http.post("/v1/chat/completions", content=pieces(), headers=headers).status_code == 413
        good = json.dumps({"model": "default", "messages": [{"role": "user", "content": "x"}]}).encode()
        assert http.post("/v1/chat/completions", content=iter([good[:9], good[9:]]), headers=headers).status_code == 200


class Slow:
    """A backend whose passes wait for a gate."""

    def __init__(self, inner):
        self.inner, self.gate = inner, threading.Event()

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def open(self, names):
        session = self.inner.open(names)
        real = session.forward

        def forward(*arguments):
            self.gate.wait(20)
            return real(*arguments)

        session.forward = forward
        return session


def test_answers_to_one_request_do_not_fill_the_queue_against_each_other(backend):
    with Running(cloud(backend, queue=2, max_num_seqs=2)) as server, server.http(KEY) as http:
        body = {"model": "default", "prompt": [str(n) for n in range(9)], "max_tokens": 2}
        got = http.post("/v1/completions", json=body)
        assert got.status_code == 200
        assert [choice["index"] for choice in got.json()["choices"]] == list(range(9))


def test_a_full_server_says_429_and_when_to_come_back():
    slow = Slow(attached())
    with Running(cloud(slow, queue=2, max_num_seqs=1, gather_seconds=0)) as server, server.http(KEY) as http:
        body = {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(http.post("/v1/chat/completions", json=body).status_code))
            for _ in range(3)
        ]
        for i, thread in enumerate(threads):
            thread.start()
            engine = server.app.state.server.role.engine
            wait_for(lambda i=i, engine=engine: engine.waiting + engine.running == i + 1)
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        slow.gate.set()
        [t.join() for t in threads]
        assert found == [200, 200, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_work(stream):
    slow = Slow(attached())
    with Running(cloud(slow, gather_seconds=0)) as server:
        engine = server.app.state.server.role.engine
        if stream:
            slow.gate.set()
        body = {"model": "default", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "stream": stream}
        content = json.dumps({**body, "logprobs": True, "temperature": 2.0}).encode()
        host, port = server.socket.getsockname()
        raw = socket.create_connection((host, port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        head += "content-type: application/json\r\n"
        raw.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        if stream:
            assert b"200 OK" in raw.recv(100)
            slow.gate.clear()
        wait_for(lambda: engine.running == 1)
        raw.close()
        wait_for(lambda: server.app.state.server.in_flight == 0)
        before = engine.tokens
        slow.gate.set()
        wait_for(lambda: engine.running == 0)
        assert engine.tokens - before <= 2
        with server.http(KEY) as http:
            assert metric(http.get("/metrics").text, "shadowpeft_disconnected_total") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_metrics_count_what_happened(server, client, stream):
    with server.http(KEY) as http:
        before = http.get("/metrics").text
        if stream:
            messages = [{"role": "user", "content": "sit"}]
            chunks = list(client.chat.completions.create(model="late", messages=messages, max_tokens=2, stream=True))
            assert all(chunk.usage is None for chunk in chunks)
        else:
            chat(client, "sit", max_tokens=2)
        after = http.get("/metrics").text

    def grown(name, **labels):
        return metric(after, name, **labels) - metric(before, name, **labels)

    assert grown("shadowpeft_routed_total", where="cloud", reason="attached") == 1
    assert grown("shadowpeft_answer_seconds_count", where="cloud") == 1
    assert grown("shadowpeft_first_token_seconds_count", where="cloud") == 1
    assert grown("shadowpeft_requests_total", path="/v1/chat/completions", status="200") == 1
    assert grown("shadowpeft_tokens_total", kind="new") == 2
    assert grown("shadowpeft_tokens_total", kind="prompt") > 5
    assert metric(after, "shadowpeft_queue") == 0


def test_a_slash_behind_the_models_is_no_redirect(server):
    """Which would lead from https to http behind a proxy, and costs some clients their key."""
    with server.http(KEY) as http:
        listed = http.get("/v1/models/", follow_redirects=False)
        assert (listed.status_code, listed.json()) == (200, http.get("/v1/models").json())
    assert httpx.get(server.url + "/v1/models/", trust_env=False).status_code == 401


def test_a_head_is_a_get_without_a_body(server):
    with server.http(KEY) as http:
        for path in ("/health", "/healthz", "/readyz", "/v1/models", "/v1/models/late"):
            head, got = http.head(path), http.get(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-length"] == str(len(got.content)), path
        assert http.head("/v1/chat/completions").status_code == 405


def test_every_answer_has_a_number_that_the_log_has_too(server, client, caplog):
    with caplog.at_level("INFO", "shadowpeft.serve"):
        answer = chat(client, "sit", max_tokens=2)
        with pytest.raises(openai.NotFoundError) as caught:
            chat(client, "sit", "none")
    assert answer._request_id.startswith("req_")
    assert answer._request_id != caught.value.request_id
    assert answer._request_id in caplog.text
    assert caught.value.request_id in caplog.text


def test_health_and_readiness(backend):
    app = cloud(attached())
    with Running(app) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").json() == {"status": "ready", "role": "cloud"}
        engine = app.state.server.role.engine
        engine.stop()
        assert http.get("/readyz").status_code == 503
        assert http.get("/healthz").status_code == 200
        body = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
        refused = http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {KEY}"})
        assert refused.status_code == 503


def test_shutdown_finishes_what_runs():
    slow = Slow(attached())
    server = Running(cloud(slow, gather_seconds=0))
    with server:
        found = []

        def send():
            with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client:
                parts = chat(client, "sit", max_tokens=6, stream=True)
                found.append([p.choices[0].finish_reason for p in parts][-1])

        thread = threading.Thread(target=send)
        thread.start()
        engine = server.app.state.server.role.engine
        wait_for(lambda: engine.running == 1)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        time.sleep(0.3)
        slow.gate.set()
        thread.join(20)
        stopper.join(30)
        assert found[0] in ("length", "stop")


def test_a_failing_model_is_500_and_nothing_of_it_is_told(backend, caplog):
    class Broken:
        def __getattr__(self, name):
            return getattr(backend, name)

        def open(self, names):
            raise RuntimeError(said)

    said = "the sec" + "ret prompt"
    with caplog.at_level(logging.INFO), Running(cloud(Broken())) as server, server.http(KEY) as http:
        response = http.post("/v1/completions", json={"model": "default", "prompt": said})
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "secret" not in caplog.text
        assert "RuntimeError" in caplog.text
        assert http.get("/readyz").status_code == 200


def test_no_prompt_text_in_logs(server, client, caplog):
    with caplog.at_level(logging.DEBUG, logger="shadowpeft"):
        chat(client, "my private words", max_tokens=2)
        with pytest.raises(openai.BadRequestError):
            chat(client, "my private words", max_tokens=10_000)
    assert "private" not in caplog.text
    assert "/v1/chat/completions" in caplog.text


def test_swap_and_roll_back_over_http_while_clients_ask(tmp_path):
    backend = attached()
    backend.model.save_pretrained(tmp_path / "v1")
    with torch.no_grad():
        for name, parameter in backend.model.named_parameters():
            if "shadowpeft_injection.late" in name:
                parameter.mul_(-3)
    backend.model.save_pretrained(tmp_path / "v2")
    versions = tmp_path / "versions"
    versions.mkdir()
    for v in ("v1", "v2"):
        (tmp_path / v / "late").rename(versions / v)
    (versions / "bad").mkdir()
    backend = attached()
    backend.versions["late"] = [Version.of(str(versions / "v1"))]
    with Running(cloud(backend, versions=versions)) as server, server.http(ADMIN) as admin, server.http(KEY) as http:
        body = {"model": "late", "prompt": PROMPTS[1], "max_tokens": 14}

        def say():
            response = http.post("/v1/completions", json=body)
            assert response.status_code == 200
            return response.json()["choices"][0]["text"]

        old = say()
        found, done = [], threading.Event()

        def keep_asking():
            while not done.is_set():
                found.append(say())

        thread = threading.Thread(target=keep_asking)
        thread.start()
        assert admin.post("/admin/adapters/late/swap", json={"version": "v2"}).json() == {
            "name": "late",
            "version": "v2",
        }
        new = say()
        assert new != old
        assert admin.post("/admin/adapters/late/rollback").json() == {"name": "late", "version": "v1"}
        assert say() == old
        done.set()
        thread.join()
        assert set(found) <= {old, new}
        assert admin.post("/admin/adapters/late/rollback").status_code == 409
        assert admin.post("/admin/adapters/late/swap", json={"version": "bad"}).status_code == 409
        assert admin.post("/admin/adapters/late/swap", json={"version": "none"}).status_code == 404
        assert admin.post("/admin/adapters/none/swap", json={"version": "v2"}).status_code == 404
        for path in ("../v1", "/etc", "", "a/b", ".."):
            assert admin.post("/admin/adapters/late/swap", json={"version": path}).status_code == 400
        assert http.post("/admin/adapters/late/swap", json={"version": "v2"}).status_code == 401
        assert say() == old


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_by_time_says_so(stream):
    class Slow:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def open(self, names):
            session = self.inner.open(names)
            forward = session.forward
            session.forward = lambda *inputs: (time.sleep(0.05), forward(*inputs))[1]
            return session

    backend = Slow(attached(max_position_embeddings=512))
    backend.inner.stop_token_ids = frozenset()
    with (
        Running(cloud(backend, answer_seconds=0.3)) as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0) as client,
    ):
        made = chat(client, PROMPTS[1], "late", max_tokens=200, stream=stream)
        if stream:
            made = list(made)[-1]
        assert made.choices[0].finish_reason == "length"
        assert made.model_extra["shadowpeft"]["cut"] == "answer_seconds"


def test_a_request_without_a_turn_in_time_is_503():
    release = threading.Event()
    backend = attached(max_position_embeddings=512)
    inner = backend.open

    def stuck(names):
        session = inner(names)
        forward = session.forward
        session.forward = lambda *inputs: (release.wait(20), forward(*inputs))[1]
        return session

    backend.open = stuck
    with Running(cloud(backend, max_num_seqs=1, answer_seconds=0.3)) as server, server.http(KEY) as http:
        body = {"model": "late", "prompt": "x", "max_tokens": 2}
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(2)]
            wait_for(lambda: server.app.state.server.in_flight == 2)
            time.sleep(0.4)
            release.set()
            found = sorted((a.result() for a in answers), key=lambda r: r.status_code)
        assert [r.status_code for r in found] == [200, 503]
        assert found[0].json()["shadowpeft"]["cut"] == "answer_seconds"
        assert found[1].json()["error"]["code"] == "timed_out"
        assert found[1].headers["retry-after"] == "1"


def test_adapters_come_and_go_while_clients_ask(tmp_path):
    full = attached(max_position_embeddings=512)
    full.model.save_pretrained(tmp_path)  # default, late, deep
    (tmp_path / "bad").mkdir()
    engine = engine_of(full)
    expected = {n: ask(engine, PROMPTS[1], n, max_tokens=14).text for n in ("default", "late", "deep")}
    engine.stop()
    backend = attached(max_position_embeddings=512)
    for name in backend.versions:
        backend.versions[name] = [Version.of(str(tmp_path / name))]
    backend.remove("late")
    size = sum(p.numel() for p in backend.model.parameters())
    assert "late" not in backend.names

    with (
        Running(cloud(backend, versions=tmp_path)) as server,
        server.http(ADMIN) as admin,
        server.http(KEY) as http,
        ThreadPoolExecutor(1) as pool,
    ):

        def say(name, tokens=14):
            return http.post("/v1/completions", json={"model": name, "prompt": PROMPTS[1], "max_tokens": tokens})

        found, over = [], threading.Event()

        def keep_asking():
            while not over.is_set():
                for name in ("deep", "default"):
                    made = say(name)
                    found.append((name, made.json()["choices"][0]["text"] if made.status_code == 200 else made.text))

        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        [t.start() for t in threads]
        try:
            for _ in range(2):
                assert say("late").status_code == 404
                added = admin.post("/admin/adapters/late", json={"version": "late"})
                assert added.json() == {"name": "late", "version": "late"}
                assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["default", "deep", "late", "base"]
                assert say("late").json()["choices"][0]["text"] == expected["late"]
                wait_for(lambda: "late" not in names_at_work(server))  # an answer leaves the engine after it was sent
                last = pool.submit(say, "late")
                wait_for(lambda: "late" in names_at_work(server) or last.done())  # noqa: B023
                assert admin.delete("/admin/adapters/late").json() == {"name": "late", "version": "none"}
                found.append(("late", last.result().json()["choices"][0]["text"]))
        finally:
            over.set()
            [t.join() for t in threads]
        assert set(found) == set(expected.items())
        assert sum(p.numel() for p in backend.model.parameters()) == size

        assert admin.post("/admin/adapters/deep", json={"version": "deep"}).status_code == 409  # it is there already
        assert admin.post("/admin/adapters/new", json={"version": "bad"}).status_code == 409
        assert admin.post("/admin/adapters/new", json={"version": "none"}).status_code == 404
        assert admin.post("/admin/adapters/-x", json={"version": "late"}).status_code == 400
        assert http.post("/admin/adapters/new", json={"version": "late"}).status_code == 401
        assert admin.delete("/admin/adapters/new").status_code == 404
        assert admin.delete("/admin/adapters/base").status_code == 404
        assert admin.delete("/admin/adapters/deep").status_code == 200
        assert admin.delete("/admin/adapters/default").status_code == 409  # the last one
        assert say("default").json()["choices"][0]["text"] == expected["default"]


def names_at_work(server):
    engine = server.app.state.server.role.engine
    return {w.name for batch in list(engine._batches) for w in batch.requests}


def test_a_detached_server_takes_no_adapters(tmp_path):
    backend = detached("edge", max_position_embeddings=512)
    backend.versions["edge"] = [Version("start")]
    (tmp_path / "v").mkdir()
    with Running(cloud(backend, versions=tmp_path)) as server, server.http(ADMIN) as admin:
        assert "start it with" in admin.post("/admin/adapters/x", json={"version": "v"}).json()["error"]["message"]
        assert admin.delete("/admin/adapters/edge").status_code == 409
        assert admin.get("/admin/adapters").json() == {"edge": ["start"]}
        assert server.app.state.server.role.engine.backend.names == ("edge",)


# ----------------------------------------------------------------------------------------------------------------- details


def test_a_plain_prompt_gets_the_token_that_texts_begin_with_and_a_chat_its_templates_own(backend):
    role = CloudRole(Engine(backend, EngineLimits()), system=None, default_tokens=8)
    seen = []

    class Recorder:
        chat_template = chat_tokenizer().chat_template

        def __call__(self, text, add_special_tokens):
            seen.append(add_special_tokens)
            return chat_tokenizer()(text)

        def apply_chat_template(self, *args, **kwargs):
            return chat_tokenizer().apply_chat_template(*args, **kwargs)

    role._tokenizer = Recorder()
    role._encode(CompletionRequest(model="base", prompt="once"))
    role._encode(ChatRequest(model="base", messages=[{"role": "user", "content": "once"}]))
    assert seen == [True, False]


def test_what_uvicorn_would_log_of_a_failure_is_logged_without_its_text(caplog):
    said = "".join(["a user's ", "sec", "ret"])  # not in the source line, which a traceback shows
    try:
        raise ValueError(said)
    except ValueError as error:
        record = logging.LogRecord("uvicorn.error", logging.ERROR, "f", 1, "Exception", (), (type(error), error, None))
    assert not without_text(record)
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert without_text(logging.LogRecord("uvicorn.error", logging.INFO, "f", 1, "Started", (), None))

"""The edge's server before a real cloud server: the route, its reason, what happens when the cloud fails, and the page."""

import asyncio
import json
import threading
import time

import httpx
import openai
import pytest

from products import covering
from serving import CALIBRATION, Scripted, attached, detached
from shadowpeft.data.robot import parse_action
from shadowpeft.serve import edge_role
from shadowpeft.serve.client import Breaker, CloudClient, CloudError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.options import without_password
from shadowpeft.serve.router import Router
from shadowpeft.serve.server import Settings, build
from webserver import Running, metric, wait_for

KEY = "user-key-0123456789"
ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "late",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Rome"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def edge_app(
    cloud_url, calibration=None, transport=None, keys=None, when_down="local", pause=60.0, requests=128, **cloud_options
):
    link = None
    if cloud_url is not None:
        breaker = Breaker(failures=2, pause=pause)
        link = CloudClient(cloud_url, KEY, breaker=breaker, transport=transport, **{"timeout": 5.0, **cloud_options})
    engine = Engine(Scripted(detached()), EngineLimits())
    router = Router(parse_action, calibration)
    role = EdgeRole(engine, router, link, "late", system=None, default_tokens=64, when_down=when_down)
    return build(role, Settings(keys or Keys((KEY,), ()), requests=requests))


@pytest.fixture(scope="module")
def cloud():
    role = CloudRole(Engine(attached(max_position_embeddings=512), EngineLimits()), system=None, default_tokens=8)
    with Running(build(role, Settings(Keys((KEY,), ())))) as running:
        yield running


@pytest.fixture(scope="module")
def edge(cloud):
    with Running(edge_app(cloud.url, CALIBRATION)) as running:
        yield running


def client_of(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60)


def say(server, text, stream=False, **options):
    """Text, note and headers of one answer."""
    with client_of(server) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="edge", messages=[{"role": "user", "content": text}], stream=stream, **options
        )
        if not stream:
            made = raw.parse()
            assert made.model == "edge"
            return made.choices[0].message.content, made.model_extra["shadowpeft"], raw.headers
        parts = list(raw.parse())
        assert {p.model for p in parts} == {"edge"}
        assert parts[-1].choices[0].finish_reason in ("stop", "length")
        told = [p.model_extra["shadowpeft"] for p in parts if "shadowpeft" in (p.model_extra or {})]
        assert told[0]["where"] == told[-1]["where"] == raw.headers["x-shadow-where"]
        return "".join(p.choices[0].delta.content or "" for p in parts), told[-1], raw.headers


def cloud_says(cloud, text, n=64):
    with client_of(cloud) as client:
        made = client.chat.completions.create(model="late", messages=[{"role": "user", "content": text}], max_tokens=n)
        return made.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("sit", "device", "known skill"),
        ("remote", "cloud", "[REMOTE]"),
        ("words", "cloud", "unknown answer"),
        ("unsure", "cloud", "low confidence"),
    ],
)
def test_who_answers_and_why(cloud, edge, text, where, reason, stream):
    passes = edge.app.state.server.role.engine.backend.passes
    content, note, headers = say(edge, text, stream)
    assert (note["where"], note["reason"]) == (where, reason)
    assert (headers["x-shadow-where"], headers["x-shadow-reason"]) == (where, reason)
    assert note["device_milliseconds"] > 0
    assert note["milliseconds"] >= note["device_milliseconds"]
    passes = edge.app.state.server.role.engine.backend.passes - passes
    if where == "device":
        assert content == Scripted.LINES[text]
        assert note["confidence"] == 1.0
        assert "degraded" not in note
    else:
        assert content == cloud_says(cloud, text)
        assert note["cloud_milliseconds"] > 0
        assert passes < len(Scripted.LINES[text])  # the device stopped when it was lost


@pytest.mark.parametrize("stop", ["(", "]", "it()"])
def test_an_action_that_a_stop_text_cuts_is_unknown(cloud, edge, stop):
    for stream in (False, True):
        content, note, _ = say(edge, "sit", stream, stop=stop)
        assert (note["where"], note["reason"]) == ("cloud", "unknown answer")
        assert stop not in content
    content, note, _ = say(edge, "sit", stop=" sit")
    assert (content, note["where"]) == ("[Sit()] Here I", "device")


def test_without_calibration_the_unsure_action_is_kept(cloud):
    with Running(edge_app(cloud.url)) as server:
        content, note, _ = say(server, "unsure")
    assert (content, note["reason"]) == (Scripted.LINES["unsure"], "known skill")
    assert "confidence" not in note


def test_a_device_that_does_not_end_hands_on_where_no_length_is_asked_for(cloud, monkeypatch):
    monkeypatch.setattr(edge_role, "DEVICE_TOKENS", 10)
    for link, n in ((CloudClient(cloud.url, KEY), 8), (None, 10)):
        engine = Engine(Scripted(detached()), EngineLimits())
        role = EdgeRole(engine, Router(parse_action, None), link, "late", system=None)
        with Running(build(role, Settings(Keys((KEY,), ())))) as server:
            for stream in (False, True):
                content, note, _ = say(server, "sit", stream)
                if link is None:
                    assert (content, note["where"]) == (Scripted.LINES["sit"][:n], "device")
                else:
                    assert (note["where"], note["reason"]) == ("cloud", "too long for the device")
                    assert content == cloud_says(cloud, "sit", n)
            assert say(server, "sit", max_tokens=60)[0] == Scripted.LINES["sit"]


def test_several_answers_come_from_where_each_one_would(cloud, edge):
    options = {"n": 2, "temperature": 1.5, "seed": 3, "max_tokens": 20}
    with client_of(edge) as client:
        for text, where in (("sit", "device"), ("remote", "cloud")):
            ask = {"model": "edge", "messages": [{"role": "user", "content": text}]}
            alone = [client.chat.completions.create(**{**ask, **options, "n": 1, "seed": seed}) for seed in (3, 4)]
            made = client.chat.completions.with_raw_response.create(**ask, **options)
            assert made.headers["x-shadow-where"] == where
            made = made.parse()
            assert [c.message.content for c in made.choices] == [one.choices[0].message.content for one in alone]
            assert [c.shadowpeft["where"] for c in made.choices] == [where, where]
            assert made.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)
            texts = ["", ""]
            for part in client.chat.completions.create(**ask, **options, stream=True, stream_options={"include_usage": True}):
                for choice in part.choices:
                    texts[choice.index] += choice.delta.content or ""
            assert texts == [c.message.content for c in made.choices]
            assert part.usage.completion_tokens == made.usage.completion_tokens


def test_the_client_may_choose(cloud, edge):
    content, note, _ = say(edge, "words", extra_body={"route": "device"})
    assert (content, note["where"], note["reason"]) == (Scripted.LINES["words"], "device", "asked for")
    content, note, _ = say(edge, "sit", extra_body={"route": "cloud"})
    assert (content, note["where"], note["reason"]) == (cloud_says(cloud, "sit"), "cloud", "asked for")


def test_many_clients_at_once_get_their_own_answers(cloud, edge):
    texts = [w for w in ("sit", "remote", "words", "unsure") for _ in range(4)]
    expected = {w: Scripted.LINES[w] if w == "sit" else cloud_says(cloud, w) for w in set(texts)}
    found = [""] * len(texts)

    def send(i):
        found[i] = say(edge, texts[i], stream=i % 2 == 0)[0]

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(texts))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert found == [expected[w] for w in texts]


def test_metrics_tell_the_share_on_the_device(cloud):
    with Running(edge_app(cloud.url, CALIBRATION)) as server:
        for text in ("sit", "sit", "sit", "remote"):
            say(server, text)
        with server.http(KEY) as http:
            text = http.get("/metrics").text
    assert metric(text, "shadowpeft_on_device_share") == 0.75
    assert metric(text, "shadowpeft_routed_total", where="device", reason="known skill") == 3
    assert metric(text, "shadowpeft_routed_total", where="cloud", reason="[REMOTE]") == 1


@pytest.mark.parametrize(("word", "asked"), covering(["sit", "remote"], [False, True]))
def test_the_tokens_of_a_stream_count_as_of_a_whole_answer(cloud, word, asked):
    """Also where the client does not ask for them, which then does not see them."""
    with Running(edge_app(cloud.url, CALIBRATION)) as server, client_of(server) as client, server.http(KEY) as http:

        def counted():
            text = http.get("/metrics").text
            return [metric(text, "shadowpeft_tokens_total", kind=kind) for kind in ("prompt", "new")]

        asking = {"model": "edge", "messages": [{"role": "user", "content": word}]}
        usage = client.chat.completions.create(**asking).usage
        whole = [usage.prompt_tokens, usage.completion_tokens]
        assert counted() == whole
        more = {"stream_options": {"include_usage": True}} if asked else {}
        chunks = list(client.chat.completions.create(**asking, stream=True, **more))
        assert counted() == [2 * n for n in whole]
        assert [c.usage.completion_tokens for c in chunks if c.usage is not None] == ([whole[1]] if asked else [])
        assert [len(c.choices) for c in chunks[-1:]] == [0 if asked else 1]


def test_without_a_cloud_the_device_says_what_it_can_and_that_it_is_not_enough():
    with Running(edge_app(None)) as server:
        content, note, headers = say(server, "remote")
        assert content == Scripted.LINES["remote"]  # all of it, not what was said when it was given up
        assert note["degraded"] is True
        assert (note["where"], note["reason"], note["wanted"]) == ("device", "cloud unavailable", "[REMOTE]")
        assert headers["x-shadow-reason"] == "cloud unavailable"
        assert "degraded" not in say(server, "sit")[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tag_alone_is_no_answer_for_a_cloud_that_is_away(monkeypatch, stream):
    """A device that chooses among its actions says no more than that; clients showed it as the answer."""
    monkeypatch.setattr(Scripted, "LINES", {**Scripted.LINES, "remote": "[REMOTE]"})
    away = httpx.MockTransport(lambda _: httpx.Response(502))
    with Running(edge_app("http://cloud", transport=away)) as server:
        for more in ({}, {"extra_body": {"route": "cloud"}}):
            with pytest.raises(openai.InternalServerError) as refused:
                say(server, "remote", stream=stream, **more)
            assert (refused.value.status_code, refused.value.code) == (503, "cloud_unavailable")
            said = "the device hands this request on and has no answer of its own, and the cloud answered with status 502"
            assert said in str(refused.value)
            assert refused.value.response.headers["retry-after"]
        wait_for(lambda: server.app.state.server.role.engine.running == 0)
        assert say(server, "words", stream=stream)[1]["degraded"] is True
        assert say(server, "remote", stream=stream, extra_body={"route": "device"})[0] == "[REMOTE]"  # as it was asked for
    with Running(edge_app(None)) as server:  # nobody else could answer
        assert say(server, "remote", stream=stream)[:1] == ("[REMOTE]",)


def test_a_cloud_that_is_away_opens_the_circuit_and_answers_stay_honest():
    calls = []

    def away(request):
        calls.append(request)
        raise httpx.ConnectError("refused")

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(away))) as server:
        notes = [say(server, "remote")[1] for _ in range(4)]
        assert [n["reason"] for n in notes] == ["cloud unavailable"] * 2 + ["circuit open"] * 2
        assert all(n["degraded"] and n["wanted"] == "[REMOTE]" for n in notes)
        assert len(calls) == 2  # the open circuit spares the rest
        assert say(server, "sit")[1]["reason"] == "known skill"
        assert httpx.get(server.url + "/readyz", trust_env=False).json()["cloud"] == "open"


def test_or_it_is_an_error_if_so_chosen():
    transport = httpx.MockTransport(lambda request: httpx.Response(500))
    with Running(edge_app("http://cloud", transport=transport, when_down="error")) as server, server.http(KEY) as http:
        body = {"model": "edge", "messages": [{"role": "user", "content": "remote"}]}
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "cloud_unavailable"
        body["messages"][0]["content"] = "sit"
        assert http.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (httpx.Response(429), "cloud busy"),
        (httpx.Response(401), "cloud unavailable"),
        (httpx.Response(503), "cloud unavailable"),
        (httpx.Response(200, text="<html>"), "cloud unavailable"),
        (httpx.Response(200, json=[1]), "cloud unavailable"),
        (httpx.Response(200, json={"choices": [{}]}), "cloud unavailable"),
        (httpx.Response(200, json={"choices": [], "usage": {}}), "cloud unavailable"),
        (httpx.Response(200, text="data: [DONE]\n\n"), "cloud unavailable"),
        (httpx.Response(200, text="data: 5\n\n"), "cloud unavailable"),
        (httpx.Response(302, headers={"location": "http://elsewhere"}), "cloud unavailable"),
    ],
)
def test_odd_clouds(reply, reason, stream):
    transport = httpx.MockTransport(lambda request: reply)
    with Running(edge_app("http://cloud", transport=transport)) as server:
        content, note, _ = say(server, "remote", stream=stream)
    assert (content, note["reason"], note["degraded"]) == (Scripted.LINES["remote"], reason, True)


def test_a_stream_may_leave_out_the_space_after_data():
    chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}
    text = f"data:{json.dumps(chunk)}\n\ndata:[DONE]\n\n"
    with Running(
        edge_app("http://cloud", transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)))
    ) as server:
        content, note, _ = say(server, "remote", stream=True)
    assert (content, note["where"]) == ("hi", "cloud")


def test_a_wrong_key_for_the_cloud_is_told_to_who_runs_the_edge(caplog):
    caplog.set_level("WARNING", "shadowpeft.serve")
    with Running(edge_app("http://cloud", transport=httpx.MockTransport(lambda _: httpx.Response(401)))) as server:
        say(server, "remote, a secret")
    told = [r.getMessage() for r in caplog.records if r.name == "shadowpeft.serve"]
    assert "cloud unavailable: the cloud answered with status 401; check the key for it" in told
    assert not any("secret" in each for each in told)


def test_a_slow_cloud_is_given_up(cloud):
    async def slow(request):
        import asyncio

        await asyncio.sleep(30)

    class Waiting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request):
            timeout = request.extensions["timeout"]["read"]
            import asyncio

            try:
                return await asyncio.wait_for(slow(request), timeout)
            except asyncio.TimeoutError as error:
                raise httpx.ReadTimeout("slow") from error

    with Running(edge_app("http://cloud", transport=Waiting(), timeout=0.2)) as server:
        content, note, _ = say(server, "remote", stream=True)
    assert (content, note["reason"]) == (Scripted.LINES["remote"], "cloud unavailable")


@pytest.mark.parametrize("stream", [False, True])
def test_the_device_answers_for_a_cloud_that_takes_longer_than_it_may(stream):
    async def slow(request):
        await asyncio.sleep(30)

    app = edge_app("http://cloud", transport=httpx.MockTransport(slow), timeout=0.2)
    with Running(app) as server:
        began = time.monotonic()
        content, note, _ = say(server, "words", stream=stream)
        assert time.monotonic() - began < 10
    assert (content, note["reason"], note["degraded"]) == (Scripted.LINES["words"], "cloud unavailable", True)


@pytest.mark.parametrize("end", ["", "data: [DONE]\n\n"])
def test_a_stream_that_breaks_in_the_middle_says_so(end):
    first = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "late"}
    chunk = {**first, "choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    broken = f"data: {json.dumps(chunk)}\n\n{end}"
    transport = httpx.MockTransport(lambda request: httpx.Response(200, text=broken))
    with Running(edge_app("http://cloud", transport=transport)) as server:
        with pytest.raises(openai.APIError, match="could not be finished"):
            say(server, "remote", stream=True)
        wait_for(lambda: server.app.state.server.in_flight == 0)  # the server closes after the client has read
        assert server.app.state.server.role.cloud.breaker.failed == 1


def test_a_cloud_that_never_ends_its_stream_is_left():
    chunk = {"id": "x", "choices": [{"index": 0, "delta": {"content": "more"}, "finish_reason": None}]}

    async def endless():
        while True:
            yield f"data: {json.dumps(chunk)}\n\n".encode()
            await asyncio.sleep(0.02)

    async def read():
        transport = httpx.MockTransport(lambda request: httpx.Response(200, content=endless()))
        cloud = CloudClient("http://cloud", transport=transport, answer_seconds=0.3)
        read = []
        with pytest.raises(CloudError, match="ReadTimeout"):  # noqa: PT012
            async for made in cloud.stream("/v1/chat/completions", {}):
                read.append(made)
        await cloud.close()
        return read

    assert len(asyncio.run(read())) > 2


def test_the_clouds_refusal_of_the_request_reaches_the_client():
    told = {
        "error": {"message": "too long for the cloud", "type": "invalid_request_error", "param": None, "code": None}
    }
    transport = httpx.MockTransport(lambda request: httpx.Response(400, json=told))
    with Running(edge_app("http://cloud", transport=transport)) as server:
        with pytest.raises(openai.BadRequestError, match="too long for the cloud"):
            say(server, "remote")
        assert server.app.state.server.role.cloud.breaker.state == "closed"


def test_the_breaker_by_its_clock():
    now = 0.0
    breaker = Breaker(failures=2, pause=5.0, clock=lambda: now)
    assert breaker.enter() and breaker.state == "closed"  # noqa: PT018
    breaker.fail()
    breaker.succeed()
    breaker.fail()
    assert breaker.state == "closed"  # failures in a row
    breaker.fail()
    assert breaker.state == "open"
    assert not breaker.enter()
    now = 4.9
    assert not breaker.enter()
    now = 5.0
    assert breaker.state == "half-open"
    assert breaker.enter()
    assert not breaker.enter()  # one trial at a time
    breaker.fail()
    assert breaker.state == "open"
    now = 10.0
    assert breaker.enter()
    breaker.forget()  # its client left
    assert breaker.enter()
    breaker.succeed()
    assert breaker.state == "closed"


def test_the_circuit_closes_when_the_cloud_is_back():
    up = threading.Event()

    def reply(request):
        return httpx.Response(200, json=ANSWER) if up.is_set() else httpx.Response(503)

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(reply), pause=0.05)) as server:
        assert [say(server, "remote")[1]["where"] for _ in range(2)] == ["device", "device"]
        up.set()
        breaker = server.app.state.server.role.cloud.breaker
        wait_for(lambda: breaker.state != "open")
        assert say(server, "remote")[0] == "Rome"
        assert breaker.state == "closed"


def test_what_is_sent_to_the_cloud():
    seen = []

    def keep(request):
        seen.append((request, json.loads(request.content)))
        return httpx.Response(503)

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(keep))) as server:
        say(server, "remote", max_tokens=64, temperature=0.0, stop=["~"], seed=4)
        say(server, "remote")
    request, body = seen[0]
    assert seen[1][1]["temperature"] == 0.0  # greedy, as here; another server's default may be to draw
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert body["model"] == "late"
    assert "route" not in body
    assert (body["max_tokens"], body["temperature"], body["stop"], body["seed"]) == (64, 0.0, ["~"], 4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_the_edge_adds_is_no_reason_to_refuse(stream, caplog):
    seen = []

    def picky(request):
        body = json.loads(request.content)
        seen.append("temperature" in body)
        if seen[-1]:
            said = {"message": "Unsupported value: 'temperature'", "param": "temperature", "code": "unsupported_value"}
            return httpx.Response(400, json={"error": said})
        if not body.get("stream"):
            return httpx.Response(200, json=ANSWER)
        chunk = {**ANSWER, "choices": [{"index": 0, "delta": {"content": "Rome"}, "finish_reason": "stop"}]}
        return httpx.Response(200, content=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(picky))) as server:
        assert [say(server, "remote", stream)[0] for _ in range(2)] == ["Rome", "Rome"]
        assert seen == [True, False, False]
        with pytest.raises(openai.BadRequestError, match="Unsupported value"):  # of the client it is the client's
            say(server, "remote", stream, temperature=0.5)
    assert "the cloud takes no temperature, which this edge added by itself" in caplog.text


@pytest.mark.parametrize("refusal", [{"param": ["temperature"]}, {"param": "temperature", "code": "invalid_value"}])
def test_a_refusal_of_one_request_changes_no_other(refusal):
    seen = []

    def picky(request):
        seen.append("temperature" in json.loads(request.content))
        return httpx.Response(400, json={"error": {"message": "no", **refusal}})

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(picky))) as server:
        for _ in range(2):
            with pytest.raises(openai.BadRequestError, match="no"):
                say(server, "remote")
    assert seen == ([True, True] if isinstance(refusal["param"], list) else [True, False, True, False])


def test_the_reason_of_a_foreign_refusal_is_told():
    said = {"object": "error", "message": "This model's maximum context length is 2048 tokens", "code": 400}
    transport = httpx.MockTransport(lambda _: httpx.Response(400, json=said))
    with (
        Running(edge_app("http://cloud", transport=transport)) as server,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        say(server, "remote")
    assert (caught.value.code, caught.value.body["message"]) == ("context_length_exceeded", said["message"])


def test_a_network_delay_is_added(cloud):
    with Running(edge_app(cloud.url, delay=0.3)) as server:
        assert say(server, "remote")[1]["cloud_milliseconds"] >= 300
        assert "cloud_milliseconds" not in say(server, "sit")[1]


def test_the_page_is_served_behind_the_key_and_loads_nothing_from_elsewhere(edge):
    with httpx.Client(base_url=edge.url, trust_env=False) as http:
        refused = http.get("/")
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Basic")
        page = http.get("/", auth=("me", KEY))
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "src=" not in page.text


def test_a_prompt_too_long_for_the_device_goes_to_the_cloud():
    asked = []

    def reply(request):
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=ANSWER)

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(reply))) as server:
        for words in (600, 300_000 // 2):  # too many tokens, and too many characters to count tokens at all
            content, note, _ = say(server, "sit " + "x" * words)
            assert (content, note["where"], note["reason"]) == ("Rome", "cloud", "too long for the device")
            assert "degraded" not in note
        content, note, _ = say(server, "sit", max_tokens=5000)  # it does not need as many as it may have
        assert (content, note["where"]) == (Scripted.LINES["sit"], "device")
        assert say(server, "remote", max_tokens=5000)[1]["where"] == "cloud"
        with pytest.raises(openai.BadRequestError, match="tokens"):
            say(server, "sit " + "x" * 600, extra_body={"route": "device"})
        with pytest.raises(openai.BadRequestError, match="max_tokens is 5000"):
            say(server, "sit", max_tokens=5000, extra_body={"route": "device"})
    assert [body["max_tokens"] for body in asked] == [64, 64, 5000]
    with Running(edge_app("http://cloud", transport=httpx.MockTransport(lambda _: httpx.Response(404)))) as server:
        with pytest.raises(openai.APIStatusError) as caught:
            say(server, "sit " + "x" * 600)
        assert caught.value.status_code == 503  # nobody could answer, and it is not the client's fault
    with Running(edge_app(None)) as server, pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        say(server, "sit " + "x" * 600)


def test_readiness_log_and_metrics_tell_what_is_wrong_with_the_cloud(caplog):
    caplog.set_level("WARNING", "shadowpeft.serve")
    answers = [httpx.Response(404), httpx.Response(200, json=ANSWER)]
    app = edge_app("http://cloud", transport=httpx.MockTransport(lambda _: answers.pop(0)))
    with Running(app) as server, server.http(KEY) as http:
        assert "cloud_problem" not in http.get("/readyz").json()
        content, note, _ = say(server, "remote")
        assert (content, note["degraded"]) == (Scripted.LINES["remote"], True)
        problem = http.get("/readyz").json()["cloud_problem"]
        assert problem == "the cloud answered with status 404; check --cloud-url and --cloud-model"
        assert any(problem in record.getMessage() for record in caplog.records)
        assert metric(http.get("/metrics").text, "shadowpeft_cloud_failures_total", kind="status") == 1
        assert say(server, "remote")[0] == "Rome"
        assert "cloud_problem" not in http.get("/readyz").json()


def test_a_slow_cloud_does_not_fill_the_edge():
    asked = []

    async def slow(request):
        asked.append(request)
        while len(asked) < 100:
            await asyncio.sleep(0.01)
        return httpx.Response(200, json=ANSWER)

    app = edge_app("http://cloud", transport=httpx.MockTransport(slow), requests=3)
    with Running(app) as server, server.http(KEY) as http:
        texts = []
        threads = [threading.Thread(target=lambda: texts.append(say(server, "remote")[0])) for _ in range(8)]
        for n, thread in enumerate(threads, 1):
            thread.start()
            wait_for(lambda n=n: len(asked) == n)
        assert metric(http.get("/metrics").text, "shadowpeft_cloud_exchanges") == 8
        for _ in range(3):
            assert say(server, "sit")[1]["where"] == "device"
        asked += [None] * 100
        [thread.join(20) for thread in threads]
        assert texts == ["Rome"] * 8
        wait_for(lambda: app.state.server.in_flight == 0)
        assert app.state.server.role.elsewhere == 0


@pytest.mark.parametrize(("text", "stream"), covering(["\u2028\u2029\u0085", "\U0001f600 站"], [False, True]))
def test_separators_in_a_clouds_answer_are_text(cloud, text, stream):
    whole = json.loads(json.dumps(ANSWER).replace("Rome", "X"))
    whole["choices"][0]["message"]["content"] = text
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}

    def reply(request):
        lines = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\ndata: [DONE]\n\n"
        return httpx.Response(200, content=lines) if stream else httpx.Response(200, json=whole)

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(reply))) as server, server.http(KEY) as http:
        assert say(server, "remote", stream=stream)[0] == text
        body = {"model": "edge", "messages": [{"role": "user", "content": "remote"}], "stream": stream}
        assert http.post("/v1/chat/completions", json=body).content.isascii()


def test_a_password_in_the_clouds_url_is_sent_and_never_logged(caplog):
    seen = []

    def reply(request):
        seen.append(request)
        raise httpx.ConnectError(f"no way to {request.url}")

    caplog.set_level("DEBUG")
    with Running(edge_app("http://me:s3cret@cloud/v1", transport=httpx.MockTransport(reply))) as server:
        say(server, "remote")
        with server.http() as http:
            assert "s3cret" not in http.get("/readyz").text
    assert seen[0].headers["authorization"].startswith("Basic ")
    assert str(seen[0].url) == "http://cloud/v1/chat/completions"
    assert "s3cret" not in caplog.text
    for url in ("http://me:s3cret@cloud:8000/x", "me:s3cret@cloud", "http://me:s3@s3cret@cloud"):
        shown = without_password(url)
        assert "s3" not in shown
        assert "***@cloud" in shown
    assert without_password("http://cloud:8000") == "http://cloud:8000"


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_ends_after_one_hop(caplog, stream):
    """An edge before itself, as through a name: what it hands on comes back once, and the device answers."""
    with Running(edge_app("http://127.0.0.1:1", CALIBRATION)) as edge:
        edge.app.state.server.role.cloud._http.base_url = edge.url
        content, note, _ = say(edge, "remote", stream=stream)
        assert content == Scripted.LINES["remote"]
        assert (note["where"], note["reason"], note["degraded"]) == ("device", "cloud unavailable", True)
        with edge.http(KEY) as http:
            found = metric(http.get("/metrics").text, "shadowpeft_requests_total", path="/v1/chat/completions", status="508")
            assert found == 1
            body = {"model": "edge", "messages": [{"role": "user", "content": "sit"}]}
            refused = http.post("/v1/chat/completions", json=body, headers={"x-shadow-hop": "1"})
        assert refused.status_code == 508
        assert "point that server's --cloud-url to one with --role cloud" in refused.json()["error"]["message"]
    assert "the cloud answered with status 508; check --cloud-url, which leads to an edge server" in caplog.text


@pytest.mark.parametrize("where", ["device", "cloud"])
def test_a_default_length_that_does_not_fit_is_no_reason_to_refuse(where):
    """The window has 256 tokens and the default is 64: the device answers as far as it can, and the cloud as far as it can."""
    asked = []

    def reply(request):
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=ANSWER)

    with Running(edge_app("http://cloud", transport=httpx.MockTransport(reply))) as server:
        room = server.app.state.server.role.engine.backend.max_model_len - 30
        text = f"{'sit' if where == 'device' else 'remote'} "
        with client_of(server) as client:
            messages = [{"role": "user", "content": text}]
            usage = client.chat.completions.create(
                model="edge", messages=messages, max_tokens=1, extra_body={"route": "device"}
            ).usage
        long = text + "x" * (room - usage.prompt_tokens)
        if where == "device":
            assert say(server, long, extra_body={"route": "device"})[0] == Scripted.LINES["sit"]
            assert not asked
        else:
            assert say(server, long)[:1] == ("Rome",)
            assert "max_tokens" not in asked[0]  # the cloud's own default fits there
            with pytest.raises(openai.BadRequestError, match="64 more are asked for"):
                say(server, long, max_tokens=64, extra_body={"route": "device"})

"""The edge's client before clouds of every kind: whose fault a failure is, how long it takes, what counts against the cloud."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from products import covering
from shadowpeft.serve import client as module
from shadowpeft.serve import exchange
from shadowpeft.serve.client import Breaker, CloudClient, CloudError, CloudRefusedError

CHAT = "/v1/chat/completions"
COUNTS = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
MESSAGE = {"message": {"role": "assistant", "content": "Rome"}, "index": 0, "finish_reason": "stop"}
WHOLE = {"id": "x", "choices": [MESSAGE], "usage": COUNTS}


def piece(text="", reason=None, **more):
    return {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}


def event(content):
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


GOOD = [piece("Rome"), piece("!", "stop")]
STREAM = b"".join(map(event, GOOD)) + b"data: [DONE]\n\n"


def answering(content, status=200, **options):
    """A client whose cloud answers with these bytes, or an iterator of them."""
    return CloudClient(
        "http://cloud", transport=httpx.MockTransport(lambda _: httpx.Response(status, content=content)), **options
    )


async def run(cloud, stream, body=None):
    """The text of an answer, or what was raised."""
    try:
        if not stream:
            return (await cloud.ask(CHAT, body or {}))["choices"][0]["message"]["content"]
        return "".join(
            [c["delta"]["content"] async for chunk in cloud.stream(CHAT, body or {}) for c in chunk["choices"]]
        )
    except (CloudError, CloudRefusedError) as error:
        return error
    finally:
        await cloud.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [204, 302, *range(400, 432), 451, 500, 502, 503, 529])
def test_only_three_statuses_are_the_clients_fault(status, stream):
    cloud = answering(b'{"error": {"message": "no"}}', status)
    kinds = []
    cloud.on_failure = kinds.append
    error = asyncio.run(run(cloud, stream))
    if status in (400, 413, 422):
        assert isinstance(error, CloudRefusedError)
        assert (cloud.breaker.failed, cloud.problem, kinds) == (0, None, [])
    else:
        assert isinstance(error, CloudError)
        assert cloud.breaker.failed == (status != 429)
        assert kinds == ["status"]
        assert cloud.problem == str(error)
        if status < 500 and status != 429:
            assert "check" in cloud.problem


def changed(**fields):
    return json.dumps({**WHOLE, **fields}).encode()


NONSENSE = {
    "nothing": b"",
    "HTML": b"<html>",
    "a list": b"[]",
    "an error": b'{"error": {"message": "x"}}',
    "NaN": changed(system_fingerprint=float("nan")),
    "too large a number": changed().replace(b'"x"', b"1e999"),
    "many digits": changed().replace(b'"x"', b"9" * 5000),
    "deep": b'{"choices": ' + b"[" * 100_000,
    "no UTF-8": b"\xff" + changed(),
    "choices: null": changed(choices=None),
    "no choices": changed(choices=[]),
    "odd choices": changed(choices=[3]),
    "no message": changed(choices=[{}]),
    "odd message": changed(choices=[{"message": "Rome"}]),
    "odd content": changed(choices=[{"message": {"content": 3}}]),
    "odd reason": changed(choices=[{**MESSAGE, "finish_reason": 3}]),
}


OF_WHOLE_ANSWERS = [kind for kind in NONSENSE if kind.endswith(("message", "content"))]


@pytest.mark.parametrize("kind", NONSENSE)
def test_an_answer_that_is_none_is_the_clouds_fault(kind):
    cloud = answering(NONSENSE[kind])
    assert isinstance(asyncio.run(run(cloud, False)), CloudError)
    assert cloud.breaker.failed == 1
    assert cloud.problem
    if kind in OF_WHOLE_ANSWERS:
        return
    first = answering(b"data: " + NONSENSE[kind] + b"\n\n")
    assert isinstance(asyncio.run(run(first, True)), CloudError)
    assert first.breaker.failed == 1


@pytest.mark.parametrize("usage", [None, {}, 3, *({**COUNTS, "completion_tokens": n} for n in (-1, 1 << 60, True))])
def test_an_answer_without_token_counts_is_an_answer(usage):
    cloud, kinds = answering(changed(usage=usage)), []
    cloud.on_failure = kinds.append

    async def asked():
        try:
            return await cloud.ask(CHAT, {})
        finally:
            await cloud.close()

    content = asyncio.run(asked())
    assert content["choices"][0]["message"]["content"] == "Rome"
    assert content.get("usage") is None
    assert (cloud.breaker.failed, kinds) == (0, [] if usage is None else ["usage"])
    assert (cloud.problem is None) == (usage is None)


def test_what_the_cloud_says_of_its_error_is_told():
    cloud = answering(b'{"error": {"message": "the GPU is gone"}}')
    error = asyncio.run(run(cloud, False))
    assert "is the error 'the GPU is gone'" in str(error) == cloud.problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"error": {"message": "a", "param": "b"}}, "a"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"error": "Input validation error", "error_type": "validation"}, "Input validation error"),
        ({"detail": [{"loc": ["body", "n"], "msg": "must be 1"}, 3]}, "['body', 'n']: must be 1"),
        ({"detail": "no"}, "no"),
        ({"error": None, "detail": []}, None),
        ([], None),
    ],
)
def test_refusals_in_the_forms_of_other_servers(content, said):
    refusal = asyncio.run(run(answering(json.dumps(content).encode(), 400), False))
    assert isinstance(refusal, CloudRefusedError)
    assert refusal.reason == said
    assert refusal.details.get("param") == ("b" if said == "a" else None)


async def served(handle, used):
    """A client asked twice of a server on the loopback interface, whose connections ``handle`` answers in turn."""
    connections = 0

    async def connected(reader, writer):
        nonlocal connections
        connections += 1
        try:
            await handle(connections, reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    cloud = CloudClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        return await used(cloud), cloud, connections
    finally:
        await cloud.close()
        server.close()


async def answered(reader, writer):
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")).split(b":")[1])
    await reader.readexactly(length)
    body = json.dumps(WHOLE).encode()
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()


def test_a_connection_that_was_closed_while_it_was_idle_says_nothing_of_the_cloud():
    async def handle(number, reader, writer):
        await answered(reader, writer)
        if number == 1:  # closed as the next request arrives
            await reader.readuntil(b"\r\n\r\n")
            return
        await reader.read()

    async def used(cloud):
        return [(await cloud.ask(CHAT, {}))["choices"][0]["message"]["content"] for _ in range(2)]

    said, cloud, connections = asyncio.run(served(handle, used))
    assert (said, connections) == (["Rome", "Rome"], 2)
    assert (cloud.breaker.failed, cloud.problem) == (0, None)


def test_a_new_connection_that_breaks_is_not_tried_again():
    async def handle(number, reader, writer):
        await reader.readuntil(b"\r\n\r\n")

    async def used(cloud):
        try:
            await cloud.ask(CHAT, {})
        except CloudError as error:
            return error
        return None

    error, cloud, connections = asyncio.run(served(handle, used))
    assert "RemoteProtocolError" in str(error)
    assert (connections, cloud.breaker.failed) == (1, 1)


def test_a_stream_that_has_ended_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "_LAST", 0.05)

    async def held_open():
        yield STREAM.replace(b"data: [DONE]\n\n", b"")
        await asyncio.sleep(30)

    began = time.monotonic()
    cloud = answering(held_open())
    assert asyncio.run(run(cloud, True)) == "Rome!"
    assert time.monotonic() - began < 10
    assert (cloud.breaker.failed, cloud.problem) == (0, None)


def test_a_stream_without_the_reason_of_its_end_was_cut():
    cut = STREAM.replace(b'"finish_reason": "stop"', b'"finish_reason": null')
    for end in (cut, cut.replace(b"data: [DONE]\n\n", b"")):
        cloud = answering(end)
        assert isinstance(asyncio.run(run(cloud, True)), CloudError)
        assert cloud.breaker.failed == 1


FINE = {
    "as it should be": STREAM,
    "choices: null at the end": STREAM.replace(b"data: [", event({"choices": None, "usage": COUNTS}) + b"data: ["),
    "choices: null at the start": event({"choices": None}) + STREAM,
    "empty data line": b"data:\n\n" + STREAM,
    "comments": b": working\n\n" + STREAM,
    "other fields": b"event: message\nid: 1\nretry: 5\n" + STREAM,
    "pings": b'event: ping\ndata: {"type": "ping"}\n\n' + STREAM.replace(b"\n\n", b"\n\nevent: ping\ndata: {}\n\n", 1),
    "an event in several lines": STREAM.replace(b', "choices"', b',\ndata: "choices"'),
    "no empty lines": STREAM.replace(b"\n\n", b"\n"),
    "a byte-order mark": b"\xef\xbb\xbf" + STREAM,
    "CR": STREAM.replace(b"\n", b"\r"),
    "CR LF": STREAM.replace(b"\n", b"\r\n"),
    "no [DONE]": STREAM.replace(b"data: [DONE]\n\n", b""),
    "no last newline": STREAM.rstrip(b"\n"),
    "negative usage": STREAM.replace(
        b"data: [", event({"choices": [], "usage": {**COUNTS, "prompt_tokens": -1}}) + b"data: ["
    ),
    "delta: null": event(
        {
            "choices": [
                {"delta": {"content": ""}},
            ]
        }
    )
    + STREAM,
}


@pytest.mark.parametrize("kind", FINE)
def test_a_stream_that_says_the_same_in_another_way_is_read(kind):
    cloud = answering(FINE[kind])
    assert asyncio.run(run(cloud, True)) == "Rome!"
    assert cloud.breaker.failed == 0
    assert (cloud.problem is not None) == (kind == "negative usage")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("kind", ["pings", "an event in several lines"])
def test_events_are_the_same_wherever_a_stream_is_cut(kind, end):
    whole = FINE[kind].replace(b"\n", end)
    for at in range(len(whole)):

        async def given_out(at=at):
            yield whole[:at]
            yield whole[at:]

        assert asyncio.run(run(answering(given_out()), True)) == "Rome!", (kind, at)


TEXT = st.text(alphabet=st.sampled_from("ab \u2028\u2029\u0085\x0b\x0c\x1c\u00e9\u7ad9\U0001f600"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), data=st.data(), end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_a_stream_is_the_same_however_it_is_cut(texts, data, end):
    lines = b"".join(event(piece(text)) for text in texts) + event(piece(reason="stop")) + b"data: [DONE]\n\n"
    lines = lines.replace(b"\n", end)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lines)), max_size=6)))
    parts = [lines[a:b] for a, b in zip([0, *cuts], [*cuts, len(lines)], strict=True)]

    async def given_out():
        for part in parts:
            yield part

    assert asyncio.run(run(answering(given_out()), True)) == "".join(texts)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(), max_size=6))
def test_nothing_that_a_client_sends_counts_against_the_cloud(text):
    seen = []

    def reply(request):
        seen.append(json.loads(request.content))
        assert request.content.isascii()
        return httpx.Response(200, json=WHOLE)

    cloud = CloudClient("http://cloud", transport=httpx.MockTransport(reply))
    body = {"stop": [text], "messages": [{"role": "user", "content": text}]}
    assert asyncio.run(run(cloud, False, body)) == "Rome"
    assert seen == [body]
    assert cloud.breaker.failed == 0


@asynccontextmanager
async def trickling(head, filler, seconds=0.02):
    """A cloud on the loopback interface that sends ``head`` and then ``filler`` in trickles until it is left."""
    left = asyncio.Event()

    async def answer(reader, writer):
        try:
            await reader.readuntil(b"}")
            writer.write(head)
            while not reader.at_eof():
                writer.write(filler)
                await writer.drain()
                await asyncio.sleep(seconds)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            left.set()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", left


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n"
SLOW = {
    "headers": (b"HTTP/1.1 200 OK\r\nx: ", b"y"),
    "nothing": (b"", b""),
    "body": (OK, b" "),
    "error body": (OK.replace(b"200 OK", b"400 No"), b" "),
    "a line without end": (OK + b"data: ", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a chunk's extension": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;x=", b"y"),
}


@pytest.mark.parametrize(("kind", "stream"), covering(SLOW, [False, True]))
def test_a_cloud_that_trickles_is_given_up(kind, stream, monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 0.0)

    async def tried():
        async with trickling(*SLOW[kind]) as (url, left):
            cloud = CloudClient(url, timeout=0.3, answer_seconds=0.3)
            began = time.monotonic()
            error = await run(cloud, stream)
            took = time.monotonic() - began
            await asyncio.wait_for(left.wait(), 5)  # it is not read any further
            return error, took, cloud

    error, took, cloud = asyncio.run(tried())
    assert isinstance(error, CloudError)
    assert 0.25 < took < 3
    assert cloud.breaker.failed == 1
    assert cloud.exchanges == 0


def test_lines_that_come_in_time_are_no_answer_when_the_whole_takes_too_long(monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 0.0)

    async def tried():
        async with trickling(OK + event(piece("a")), b": more\n\n") as (url, _):
            cloud = CloudClient(url, timeout=5, answer_seconds=0.4)
            return await run(cloud, True), cloud

    error, cloud = asyncio.run(tried())
    assert isinstance(error, CloudError)
    assert cloud.breaker.failed == 0  # it had begun to answer: that its client reads slowly looks the same


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 400, 503])
def test_a_cloud_that_never_stops_is_left(stream, status, monkeypatch):
    for each in (module, exchange):
        monkeypatch.setattr(each, "MAX_BYTES", 100_000)
        monkeypatch.setattr(each, "MAX_LINE", 10_000)
    given_out = 0

    async def endless():
        nonlocal given_out
        while True:
            given_out += 1000
            yield b"x" * 1000

    assert isinstance(asyncio.run(run(answering(endless(), status), stream)), CloudError)
    assert given_out <= 101_000


def test_the_time_that_is_given_holds_for_whole_answers_and_streams_and_without_one_a_stream_begins_sooner(monkeypatch):
    async def late(request):
        await asyncio.sleep(0.3)
        return httpx.Response(200, content=STREAM if json.loads(request.content).get("stream") else json.dumps(WHOLE))

    def asked(stream, **times):
        cloud = CloudClient("http://cloud", transport=httpx.MockTransport(late), answer_seconds=20, **times)
        return asyncio.run(run(cloud, stream))

    monkeypatch.setattr(module, "STREAM_SECONDS", 0.1)
    assert [asked(stream, timeout=5) for stream in (False, True)] == ["Rome", "Rome!"]
    for stream in (False, True):
        assert "gave no answer (ReadTimeout)" in str(asked(stream, timeout=0.1))
    assert asked(False) == "Rome"
    assert isinstance(asked(True), CloudError)


def test_the_trial_succeeds_with_the_first_chunk():
    async def tried():
        going_on = asyncio.Event()

        async def slowly():
            yield event(piece("a"))
            await going_on.wait()
            yield event(piece("b", "stop"))

        cloud = answering(slowly(), breaker=Breaker(failures=1, pause=0.0))
        cloud.breaker.fail()
        assert cloud.breaker.state == "half-open"
        chunks = cloud.stream(CHAT, {})
        await anext(chunks)
        state = cloud.breaker.state
        going_on.set()
        assert [c async for c in chunks]
        await cloud.close()
        return state

    assert asyncio.run(tried()) == "closed"


@pytest.mark.parametrize("leaves", [False, True])
def test_an_older_stream_does_not_end_anothers_trial(leaves):
    async def tried():
        breaker = Breaker(failures=1, pause=0.0)
        never = asyncio.Event()

        async def reply(request):
            if json.loads(request.content)["user"] == "trial":
                await never.wait()

            async def broken():
                if leaves:
                    await never.wait()
                yield event(piece("a")) if leaves else b"nonsense"

            return httpx.Response(200, content=broken())

        cloud = CloudClient("http://cloud", transport=httpx.MockTransport(reply), breaker=breaker)
        older = asyncio.ensure_future(run_open(cloud, "older"))
        await asyncio.sleep(0.01)
        breaker.fail()
        trial = asyncio.ensure_future(run_open(cloud, "trial"))
        await asyncio.sleep(0.01)
        assert breaker.trying
        older.cancel()
        await asyncio.gather(older, return_exceptions=True)
        trying = breaker.trying
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        assert not breaker.trying
        await cloud.close()
        return trying

    async def run_open(cloud, user):
        async for _ in cloud.stream(CHAT, {"user": user}):
            pass

    assert asyncio.run(tried()) or not leaves


def test_more_than_may_wait_for_the_cloud_are_told_at_once(monkeypatch):
    monkeypatch.setattr(module, "MAX_EXCHANGES", 2)

    async def tried():
        going_on = asyncio.Event()

        async def waits(request):
            await going_on.wait()
            return httpx.Response(200, json=WHOLE)

        cloud = CloudClient("http://cloud", transport=httpx.MockTransport(waits))
        waiting = [asyncio.ensure_future(cloud.ask(CHAT, {})) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(CloudError) as caught:
            await cloud.ask(CHAT, {})
        going_on.set()
        assert len(await asyncio.gather(*waiting)) == 2
        await cloud.close()
        return caught.value.reason, cloud

    reason, cloud = asyncio.run(tried())
    assert reason == "cloud busy"
    assert (cloud.exchanges, cloud.breaker.failed) == (0, 0)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("prefix", ["", "/proxy"])
def test_the_version_may_be_in_the_url(prefix, suffix):
    paths = []

    def reply(request):
        paths.append(request.url.path)
        return httpx.Response(200, json=WHOLE)

    cloud = CloudClient(f"http://cloud{prefix}{suffix}", transport=httpx.MockTransport(reply))
    assert asyncio.run(run(cloud, False)) == "Rome"
    assert paths == [prefix + CHAT]

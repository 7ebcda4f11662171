"""What a device's [REMOTE] does to the cloud's answer: the odds of an action, the header, and who is told."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from chatbase import chat_model, chat_tokenizer
from serving import Scripted, attached, detached, saying
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import written
from shadowpeft.data.chat import answer_ids
from shadowpeft.data.declined import Beginnings, Declined, DeclinedRequests
from shadowpeft.data.robot import parse_action
from shadowpeft.generate import answer
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.client import CloudClient
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.protocol import DECLINED
from shadowpeft.serve.router import ACTION, LORA, Calibration, Router
from shadowpeft.serve.server import Settings, build
from webserver import Running

KEY = "user-key-0123456789"
TURN = [{"role": "user", "content": "a"}]


def byte_pairs():
    """A tokenizer that writes brackets together with what follows them."""
    made = chat_tokenizer()
    made.add_tokens(["[Sit", "[]", "['", "[1", "[{", "[!["])
    return made


def beginnings():
    return Beginnings.of(chat_tokenizer(), chat_model().config.vocab_size)


def test_the_odds_of_an_action_are_the_product_of_the_model_s_and_the_device_s():
    begin = beginnings()
    logits = torch.randn(chat_model().config.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = logits.softmax(-1)[begin.tokens].sum().item()
    for chance in (0.001, 0.3, 0.5, 0.97, 1 - 1e-5):
        both = (logits + Declined(begin, chance).leaning([])).softmax(-1)
        expected = own * (1 - chance) / (own * (1 - chance) + (1 - own) * chance)
        assert both[begin.tokens].sum().item() == pytest.approx(expected, rel=1e-12)
        others = torch.ones_like(both).index_fill(0, torch.tensor(begin.tokens), 0).bool()
        left = logits[others].softmax(-1)  # among what is no action nothing changes
        torch.testing.assert_close(both[others] / both[others].sum(), left, rtol=1e-12, atol=0)


def test_no_chance_makes_an_action_impossible_or_sure():
    for chance, odds in ((1.0, 1e-6), (0.0, 1e6)):
        leaning = Declined(beginnings(), chance).leaning([])
        assert leaning[beginnings().tokens[0]].item() == pytest.approx(math.log(odds), rel=1e-4)


def test_actions_begin_with_one_of_the_tokens_and_words_do_not():
    tokenizer, begin = chat_tokenizer(), beginnings()
    for name in ("Sit", "Move_Forward", "REMOTE"):
        assert answer_ids(tokenizer, TURN, written(name), closed=False)[0] in begin.tokens
    for text in ("Rome.", "(a)", "]"):
        assert answer_ids(tokenizer, TURN, text, closed=False)[0] not in begin.tokens
    assert all(tokenizer.decode([token]).lstrip().startswith("[") for token in begin.tokens)


def test_lists_links_and_footnotes_are_no_actions():
    tokenizer = byte_pairs()
    begin = Beginnings.of(tokenizer, len(tokenizer))
    assert {tokenizer.decode([token]).strip() for token in begin.tokens} == {"[", "[Sit"}


def test_only_the_first_token_leans():
    held = Declined(beginnings(), 0.9)
    assert len(held.allowed([])) == chat_model().config.vocab_size
    assert (len(held.allowed([5])), held.leaning([5]), held.forced([]), held.forced([5])) == (0, None, [], [])


def test_answers_lean_as_the_device_said_of_each_request():
    backend = saying("[Sit()] ok")
    requests = {"sit": 0.2, "who?": 0.999999}
    said = answer(
        backend.model,
        backend.tokenizer,
        list(requests),
        max_new_tokens=12,
        actions=DeclinedRequests(beginnings(), requests),
    )
    assert said[0].text.startswith("[Sit()]")
    assert not said[1].text.startswith("[")


def served(backend):
    role = CloudRole(Engine(backend, EngineLimits()), system=None, default_tokens=8)
    return Running(build(role, Settings(Keys((KEY,), ()))))


def ask(server, model, headers=None, path="chat/completions", **more):
    body = {"model": model, "max_tokens": 8, **more}
    body |= {"prompt": "who?"} if path == "completions" else {"messages": [{"role": "user", "content": "who?"}]}
    own = {"authorization": f"Bearer {KEY}", **(headers or {})}
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=own, timeout=60)


def text_of(response):
    (choice,) = response.json()["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.fixture(scope="module")
def acting():
    """A cloud whose model begins every answer with an action."""
    plain = saying("[Sit()] ok")
    with served(Detached(plain.model, plain.tokenizer, "cloud", kind=LORA)) as running:
        yield running


def test_a_cloud_that_is_told_of_no_action_answers_in_words(acting):
    assert text_of(ask(acting, "cloud")).startswith("[Sit()]")
    assert text_of(ask(acting, "cloud", {DECLINED: "0.3"})).startswith("[Sit()]")
    assert not text_of(ask(acting, "cloud", {DECLINED: "0.999999"})).startswith("[")
    drawn = ask(acting, "cloud", {DECLINED: "1"}, temperature=0.7, seed=3)
    assert not text_of(drawn).startswith("[")


@pytest.mark.parametrize("value", ["", "sure", "-0.1", "1.01", "nan", "inf", "0_1", "1e-3"])
def test_what_is_no_probability_is_refused(acting, value):
    refused = ask(acting, "cloud", {DECLINED: value})
    assert refused.status_code == 400
    assert DECLINED in refused.json()["error"]["message"]


def test_models_that_have_learnt_no_actions_do_not_lean(monkeypatch):
    with served(saying("[1] is a footnote")) as server:  # a detached shadow of its own
        assert text_of(ask(server, "edge", {DECLINED: "1"})).startswith("[1]")
    with served(attached(max_position_embeddings=512)) as server:
        for model, leans in (("base", False), ("deep", True)):
            plain, told = ask(server, model), ask(server, model, {DECLINED: "1"})
            assert plain.status_code == told.status_code == 200
            first = chat_tokenizer()(text_of(plain), add_special_tokens=False).input_ids[0]
            # as if the answer of this random model were an action
            begin = Beginnings([first], chat_model().config.vocab_size)
            monkeypatch.setattr(Beginnings, "of", lambda *_, begin=begin: begin)
            server.app.state.server.role._begin = None
            told = ask(server, model, {DECLINED: "1"})
            assert (text_of(told)[:1] != text_of(plain)[:1]) == leans


class Deciding:
    """A second opinion that decides: ``[REMOTE]`` where the request says so, else an action."""

    actions = ("Sit", "REMOTE")

    def chances(self, prompt):
        remote = 0.999999 if "remote" in prompt else 1e-12
        return {"REMOTE": remote, "Sit": 1 - remote}


def edge_of(link, model="late", chooses=True):
    """An edge that hands on all: it keeps no action, and says ``[REMOTE]`` where it is asked for it."""
    if chooses:
        tokenizer = chat_tokenizer()
        turn = [{"role": "user", "content": "a"}]
        tokens = {name: answer_ids(tokenizer, turn, written(name), closed=False) for name in Deciding.actions}
        backend, actions = detached(max_position_embeddings=512), ActionTrie(tokens, Deciding())
    else:
        backend, actions = Scripted(detached()), None
    router = Router(parse_action, Calibration(ACTION, (0.0, 1.0), (0.0, 1.0), 2.0) if chooses else None)
    role = EdgeRole(Engine(backend, EngineLimits()), router, link, model, system=None, default_tokens=64, actions=actions)
    return Running(build(role, Settings(Keys((KEY,), ()))))


def recording(told):
    """A cloud of its own that says Rome, also as a stream, and keeps the header of each request."""

    def cloud(request):
        told.append(request.headers.get(DECLINED))
        body = json.loads(request.content)
        assert not [key for key in body if "declined" in key]
        words = "message" if not body.get("stream") else "delta"
        key = {words: {"role": "assistant", "content": "Rome"}} if "chat" in request.url.path else {"text": "Rome"}
        choice = {"index": 0, "finish_reason": "stop", **key}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        whole = {"id": "x", "object": "x", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        if body.get("stream"):
            return httpx.Response(200, text=f"data: {json.dumps(whole)}\n\ndata: [DONE]\n\n")
        return httpx.Response(200, json=whole)

    return CloudClient("http://cloud", KEY, transport=httpx.MockTransport(cloud))


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_edge_tells_the_cloud_of_a_remote_and_of_nothing_else(path, stream):
    told = []
    with edge_of(recording(told)) as server:
        for text, more in (("remote", {}), ("go", {}), ("remote", {"route": "cloud"})):
            forms = {"completions": {"prompt": text}, "responses": {"input": text}}
            content = forms.get(path, {"messages": [{"role": "user", "content": text}]})
            body = {"model": "edge", "stream": stream, **content, **more}
            own = {"authorization": f"Bearer {KEY}"}
            answered = httpx.post(f"{server.url}/v1/{path}", json=body, headers=own, timeout=60)
            assert answered.headers["x-shadow-where"] == "cloud"
            assert "Rome" in answered.text
    assert told[1:] == [None, None]
    assert 0.99 < float(told[0]) <= 1


def test_several_answers_are_each_told():
    told = []
    with edge_of(recording(told)) as server:
        body = {"model": "edge", "messages": [{"role": "user", "content": "remote"}], "n": 3, "temperature": 1.0, "seed": 1}
        own = {"authorization": f"Bearer {KEY}"}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=own, timeout=60).status_code == 200
    assert len(told) == 3
    assert all(float(each) > 0.99 for each in told)


def test_a_remote_that_was_written_freely_has_no_probability_of_an_action():
    told = []
    with edge_of(recording(told), chooses=False) as server:
        body = {"model": "edge", "messages": [{"role": "user", "content": "remote"}]}
        own = {"authorization": f"Bearer {KEY}"}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=own, timeout=60)
    assert told == [None]


def test_device_and_cloud_over_the_wire(acting):
    with edge_of(CloudClient(acting.url, KEY), "cloud") as server:
        for text, acts in (("remote", False), ("go", True)):
            body = {"model": "edge", "messages": [{"role": "user", "content": text}]}
            own = {"authorization": f"Bearer {KEY}"}
            said = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=own, timeout=60)
            assert said.json()["shadowpeft"]["where"] == "cloud"
            assert text_of(said).startswith("[Sit()]") == acts


def test_what_an_action_begins_with_is_made_once_for_many_requests(acting, monkeypatch):
    made = []
    of = Beginnings.of
    monkeypatch.setattr(acting.app.state.server.role, "_begin", None)
    monkeypatch.setattr(Beginnings, "of", lambda *given: made.append(1) or of(*given))
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda _: text_of(ask(acting, "cloud", {DECLINED: "1"})), range(6)))
    assert len(made) == 1
    assert not any(text.startswith("[") for text in texts)


def test_the_shadow_drafts_behind_the_first_token_as_without_the_header():
    with served(attached(max_position_embeddings=512)) as server:
        plain = text_of(ask(server, "default", {DECLINED: "0.9"}, speculative=False))
        assert text_of(ask(server, "default", {DECLINED: "0.9"}, speculative=True)) == plain

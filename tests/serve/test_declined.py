"""What a device's [REMOTE] does to the cloud's answer: the odds of an action, the header, and who is told."""

import math

import httpx
import pytest
import torch

from chatbase import chat_model, chat_tokenizer
from serving import Scripted, attached, detached, saying
from shadowpeft.data.actions import written
from shadowpeft.data.chat import answer_ids
from shadowpeft.data.declined import Beginnings, Declined, DeclinedRequests
from shadowpeft.data.robot import parse_action
from shadowpeft.generate import answer
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.client import CloudClient
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.protocol import DECLINED
from shadowpeft.serve.roles import CloudRole, EdgeRole
from shadowpeft.serve.router import LORA, Router
from shadowpeft.serve.server import Settings, build
from webserver import Running

KEY = "user-key-0123456789"
TURN = [{"role": "user", "content": "a"}]


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
    texts = {token: tokenizer.decode([token]).lstrip() for token in begin.tokens}
    assert all(text.startswith("[") for text in texts.values())


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


@pytest.mark.parametrize("value", ["", "sure", "-0.1", "1.01", "nan", "inf"])
def test_what_is_no_probability_is_refused(acting, value):
    refused = ask(acting, "cloud", {DECLINED: value})
    assert refused.status_code == 400
    assert DECLINED in refused.json()["error"]["message"]


def test_models_that_have_learnt_no_actions_do_not_lean():
    with served(saying("[1] is a footnote")) as server:  # a detached shadow of its own
        assert text_of(ask(server, "edge", {DECLINED: "1"})).startswith("[1]")
    with served(attached(max_position_embeddings=512)) as server:
        for model, leans in (("base", False), ("deep", True)):
            plain, told = ask(server, model), ask(server, model, {DECLINED: "1"})
            assert plain.status_code == told.status_code == 200
            first = chat_tokenizer()(text_of(plain), add_special_tokens=False).input_ids[0]
            # as if the answer of this random model were an action
            server.app.state.server.role._begin = Beginnings([first], chat_model().config.vocab_size)
            told = ask(server, model, {DECLINED: "1"})
            assert (text_of(told)[:1] != text_of(plain)[:1]) == leans


def edge_of(link):
    engine = Engine(Scripted(detached()), EngineLimits())
    role = EdgeRole(engine, Router(parse_action, None), link, "late", system=None, default_tokens=64)
    return Running(build(role, Settings(Keys((KEY,), ()))))


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_the_edge_tells_the_cloud_of_a_remote_and_of_nothing_else(path):
    told = []

    def cloud(request):
        told.append(request.headers.get(DECLINED))
        assert "declined" not in request.content.decode()
        key = {"message": {"role": "assistant", "content": "Rome"}} if "chat" in request.url.path else {"text": "Rome"}
        choice = {"index": 0, "finish_reason": "stop", **key}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        whole = {"id": "x", "object": "x", "created": 1, "model": "m", "choices": [choice], "usage": usage}
        return httpx.Response(200, json=whole)

    with edge_of(CloudClient("http://cloud", KEY, transport=httpx.MockTransport(cloud))) as server:
        for text, more in (("remote", {}), ("words", {}), ("remote", {"route": "cloud"})):
            content = {"prompt": text} if path == "completions" else {"messages": [{"role": "user", "content": text}]}
            body = {"model": "edge", **content, **more}
            answered = httpx.post(
                f"{server.url}/v1/{path}", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60
            )
            assert answered.json()["shadowpeft"]["where"] == "cloud"
    assert told[1:] == [None, None]
    assert 0.5 < float(told[0]) <= 1


def test_device_and_cloud_over_the_wire(acting):
    link = CloudClient(acting.url, KEY)
    engine = Engine(Scripted(detached()), EngineLimits())
    role = EdgeRole(engine, Router(parse_action, None), link, "cloud", system=None, default_tokens=64)
    with Running(build(role, Settings(Keys((KEY,), ())))) as server:
        for text, acts in (("remote", False), ("words", True)):
            body = {"model": "edge", "messages": [{"role": "user", "content": text}]}
            own = {"authorization": f"Bearer {KEY}"}
            said = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=own, timeout=60)
            assert said.json()["shadowpeft"]["where"] == "cloud"
            assert text_of(said).startswith("[Sit()]") == acts



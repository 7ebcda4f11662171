"""A cloud whose adapters' own shadows vote: what it says, which requests it is about, and which options it takes."""

import json

import httpx
import pytest
import torch
from typer.testing import CliRunner

from chatbase import chat_tokenizer
from serving import attached, saying
from shadowpeft.cli import app
from shadowpeft.constrained import Chosen
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.tools import tools_of
from shadowpeft.serve import cloud_role
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.protocol import DECLINED
from shadowpeft.serve.router import BARE, LORA
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.several_backends import MultiBackend
from webserver import Running

KEY = "user-key-0123456789"
SIT = {"type": "function", "function": {"name": "Sit", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def backend():
    made = attached(max_position_embeddings=512)
    with torch.no_grad():  # unsure of everything, so that the vote decides
        made.model.get_base_model().lm_head.weight.mul_(0.01)
    return made


@pytest.fixture
def asked(monkeypatch):
    """What the shadows were asked, whose answer is scripted."""
    seen, chances = [], {"Sit": 1e-9, "Stand": 1.0, REMOTE: 1e-9}

    def choose(model, rows, actions, held):
        seen.append((model.adapter, rows))
        return [Chosen("Stand", 1.0, dict(chances))]

    monkeypatch.setattr(cloud_role, "choose_after", choose)
    return seen, chances


def served(backend):
    vote = ActionTrie.of(chat_tokenizer(), ["Sit", "Stand"])
    role = CloudRole(Engine(backend, EngineLimits()), system=None, default_tokens=12, vote=vote)
    return Running(build(role, Settings(Keys((KEY,), ()))))


def ask(server, model="default", path="chat/completions", headers=None, **more):
    turns = [{"role": "user", "content": "who?"}]
    body = {"model": model, **({"prompt": "who?"} if path == "completions" else {"messages": turns}), **more}
    own = {"authorization": f"Bearer {KEY}", **(headers or {})}
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=own, timeout=60)


def text_of(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def test_the_shadow_s_chances_weigh_the_answer(backend, asked):
    seen, chances = asked
    with served(backend) as server:
        assert text_of(ask(server)).startswith("[Stand()]")
        assert text_of(ask(server, temperature=0.7, seed=1)).startswith("[Stand()]")
        assert {name for name, _ in seen} == {"default"}
        chances.update(Sit=1.0, Stand=1e-9)
        streamed = ask(server, model="late", stream=True).text.split("\n\n")
        chunks = [json.loads(event[6:]) for event in streamed if event.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).startswith("[Sit()]")
        assert text_of(ask(server, model="late")).startswith("[Sit()]")
        assert seen[-1][0] == "late"
        chances.update(Sit=1e-9, **{REMOTE: 1.0})
        assert not text_of(ask(server)).startswith("[")


def test_a_device_s_word_counts_instead(backend, asked):
    with served(backend) as server:
        assert not text_of(ask(server, headers={DECLINED: "0.999999"})).startswith("[")


def test_nothing_votes_on_formats_completions_results_or_the_base(backend, asked):
    seen, _ = asked
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with served(MultiBackend([backend, saying("[1] is a footnote")])) as server:
        for more in (
            {"response_format": {"type": "json_object"}},
            {"path": "completions"},
            {"model": "base"},
            {"messages": turns},
            {"messages": [*turns, {"role": "tool", "tool_call_id": "c", "content": "done"}]},
        ):
            text_of(ask(server, **more))
        assert text_of(ask(server, model="edge")).startswith("[1]")  # no shadow beside a base
    assert not seen


WALK = {
    "type": "function",
    "function": {
        "name": "Walk",
        "parameters": {"type": "object", "properties": {"left": {"type": "boolean"}}, "required": ["left"]},
    },
}


def calls_of(response):
    """Names of the calls of an answer; its text if it has none."""
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    return [call["function"]["name"] for call in message.get("tool_calls", [])] or message["content"]


def test_the_shadow_weighs_whether_tools_with_arguments_are_called(backend, asked):
    pytest.importorskip("llguidance")
    seen, chances = asked
    tools = tools_of([SIT, WALK])
    vote = ActionTrie.of(chat_tokenizer(), tools.names)
    role = CloudRole(Engine(backend, EngineLimits()), system=None, default_tokens=60, tools=tools, vote=vote)
    with Running(build(role, Settings(Keys((KEY,), ())))) as server:
        for offered, walk, called in (
            ([SIT, WALK], 1.0, True),
            ([SIT], 1.0, False),  # the call that the shadow would make is not offered
            ([SIT, WALK], 0.0, False),
        ):
            chances.clear()
            chances.update(Sit=0.0, Walk=walk, REMOTE=1.0 - walk)
            before = len(seen)
            assert isinstance(calls_of(ask(server, tools=offered)), list) == called
            assert len(seen) == before + 1
        chances.update(Walk=1.0, REMOTE=0.0)
        assert text_of(ask(server)).startswith("[")  # without tools in the request the call is text
        assert not text_of(ask(server, headers={DECLINED: "0.999999"})).startswith("[")
        before = len(seen)
        assert isinstance(calls_of(ask(server, tools=[SIT], tool_choice="required")), list)
        text_of(ask(server, tools=[SIT], tool_choice="none"))
        assert len(seen) == before + 1  # a call that must be made is not voted on; words without tools are, as ever


def test_unknown_names_and_prompts_that_are_too_long_are_refused_as_ever(backend, asked):
    seen, _ = asked
    with served(backend) as server:
        assert ask(server, model="nobody").status_code == 404
        assert ask(server, messages=[{"role": "user", "content": "a" * 600}]).status_code == 400
        shortest = ask(server, messages=[{"role": "user", "content": ""}]).json()["usage"]["prompt_tokens"]
        seen.clear()
        room = ask(server, max_tokens=1, messages=[{"role": "user", "content": "a" * (510 - shortest)}])
        assert room.status_code == 200  # it fits, but no action behind it does
    assert not seen


def test_the_vote_is_that_of_the_adapter_s_shadow(backend):
    """With the real shadow: the answer is the one that the shadow's own chances give."""
    from shadowpeft.generate import answer
    from shadowpeft.vote import votes

    backend.model.set_adapter("deep")
    trie = ActionTrie.of(chat_tokenizer(), ["Sit", "Stand"])
    told = votes(backend.model, chat_tokenizer(), ["who?"], trie)
    expected = answer(backend.model, chat_tokenizer(), ["who?"], max_new_tokens=12, actions=told)[0].text
    with served(backend) as server:
        assert text_of(ask(server, model="deep")).strip() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--role", "edge", "--vote", "--skills", "robot"], "--vote belongs to the cloud"),
        (["--role", "cloud", "--vote"], "--vote weighs the actions of --skills, which was not given"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tmp_path, monkeypatch):
    from shadowpeft.apps import serve

    monkeypatch.setattr(serve, "_cloud_backend", lambda *_: saying("x"))
    monkeypatch.setattr("shadowpeft.serve.loading.check_calls", lambda _: None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--no-auth", *options])
    assert result.exit_code != 0
    assert message in str(result.exception or result.output)


def test_a_cloud_without_a_shadow_cannot_vote(tmp_path, monkeypatch):
    from shadowpeft.apps import serve

    monkeypatch.setattr(serve, "_cloud_backend", lambda *_: saying("x"))
    monkeypatch.setattr("shadowpeft.serve.loading.check_calls", lambda _: None)
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--no-auth", "--role", "cloud", "--vote", "--skills", "robot"])
    assert "no adapter here has a shadow" in str(result.exception or result.output)


def test_after_a_result_a_model_of_the_compact_form_says_words(backend):
    """It learnt a call for each request, and would make the same one again and again."""
    tools = tools_of([SIT, {**SIT, "function": {**SIT["function"], "name": "Stand"}}])
    calling = saying("[Sit()] ok", "lora")
    members = MultiBackend([backend, Detached(calling.model, calling.tokenizer, "lora", kind=LORA)])
    role = CloudRole(Engine(members, EngineLimits()), system=None, default_tokens=12, tools=tools)
    call = {"id": "c1", "type": "function", "function": {"name": "Sit", "arguments": "{}"}}
    turns = [{"role": "user", "content": "sit"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "c1", "content": "done"})
    with Running(build(role, Settings(Keys((KEY,), ())))) as server:

        def said(model, **more):
            reply = ask(server, model, messages=turns, **more).json()
            return reply["choices"][0]["message"], reply["shadowpeft"]["reason"]

        for more in ({"tools": [SIT]}, {}):
            message, reason = said("lora", **more)
            assert ("tool_calls" in message, message["content"].startswith("["), reason) == (False, False, LORA)
            message, reason = said("default", **more)
            assert ("tool_calls" in message, reason) == (False, BARE)
        message, _ = said("lora", tools=[SIT], tool_choice="required")
        assert message["tool_calls"][0]["function"]["name"] == "Sit"
        assert ask(server, "nobody", messages=turns).status_code == 404
        first = {**turns[0]}
        assert ask(server, "lora", messages=[first], tools=[SIT]).json()["choices"][0]["message"]["tool_calls"]

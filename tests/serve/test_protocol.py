"""What ordinary clients send is accepted, or refused in one sentence with the field and the remedy."""

import json
from typing import get_type_hints

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage, ChatCompletionStreamOptionsParam
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from pydantic import ValidationError

from chatbase import chat_tokenizer
from serving import attached
from shadowpeft.errors import DataError
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest
from shadowpeft.serve.server import Settings, build
from webserver import Running

KEY = "user-key-0123456789"
ASK = {"model": "default", "messages": [{"role": "user", "content": "hello"}]}
TEXT = {"model": "default", "prompt": "hello"}
WAYS = [(ChatRequest, ChatParams, ASK), (CompletionRequest, TextParams, TEXT)]
DEFAULTS = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "logit_bias": {},
    "logprobs": False,
    "max_tokens": 16,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0.0,
    "reasoning_effort": "medium",
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "stream": False,
    "temperature": 1,
    "tool_choice": "none",
    "tools": [],
    "top_p": 1,
    "verbosity": "medium",
}
"""As the API's reference documents them."""


@pytest.fixture(scope="module")
def server():
    role = CloudRole(Engine(attached(max_position_embeddings=512), EngineLimits()), system=None, default_tokens=4)
    with Running(build(role, Settings(Keys((KEY,), ())))) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.mark.parametrize(("kind", "params", "ask"), WAYS)
def test_every_field_of_the_official_client_is_accepted_at_null_and_at_its_default(kind, params, ask):
    fields = get_type_hints(params).keys() - ask.keys()
    assert len(fields) > 10
    plain = kind(**ask).model_dump()
    for name in fields:
        assert kind(**ask, **{name: None}).model_dump() == plain, name
        default = None if (kind, name) == (CompletionRequest, "logprobs") else DEFAULTS.get(name)
        kind(**ask, **{name: default})
    assert kind(**ask, **dict.fromkeys(fields)).model_dump() == plain


def test_every_option_of_a_stream_is_accepted():
    for name in get_type_hints(ChatCompletionStreamOptionsParam):
        for value in (None, False, True):
            assert ChatRequest(**ASK, stream=True, stream_options={name: value}).stream


def refused(kind, content):
    with pytest.raises(ValidationError) as caught:
        kind(**content)
    return caught.value.errors()[0]


@pytest.mark.parametrize(("kind", "params", "ask"), WAYS)
@given(value=st.sampled_from(["x", 7, True, ["x"], {"x": 1}]))
def test_what_is_not_supported_is_refused_by_name(kind, params, ask, value):
    for name, accepted in kind.neutral.items():
        if not any(value == each and type(value) is type(each) for each in accepted):
            told = refused(kind, {**ask, name: value})
            assert told["ctx"]["where"] == (name,)
            assert "leave it out" in told["msg"]
            if accepted:
                assert json.dumps(accepted[0]) in told["msg"]


def test_the_message_of_every_answer_may_come_back():
    own = {"role": "assistant", "content": "ok"}
    fields = ChatCompletionMessage.model_fields.keys() - own.keys()
    assert fields >= {"refusal", "annotations", "audio", "function_call", "tool_calls"}
    plain = ChatRequest(**{**ASK, "messages": [own]}).messages
    for back in ({**own, **dict.fromkeys(fields)}, {**own, "annotations": [], "tool_calls": []}):
        assert ChatRequest(**{**ASK, "messages": [back]}).messages == plain
    added = {"provider_specific_fields": {"refusal": None}, "reasoning_content": "so", "id": "m1"}  # LiteLLM and others
    assert ChatRequest(**{**ASK, "messages": [{**own, **added}]}).messages == plain
    told = refused(ChatRequest, {**ASK, "messages": [{**own, "refusal": "no"}]})
    assert told["ctx"]["where"] == ("refusal",)


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_parts_of_text_are_text(texts):
    parts = [{"type": "text", "text": text} for text in texts]
    message = ChatRequest(**{**ASK, "messages": [{"role": "developer", "content": parts}]}).messages[0]
    assert (message.role, message.content) == ("system", "\n".join(texts))


@given(st.text(alphabet="ab\ud800\udfff\u2028", max_size=5))
def test_half_characters_are_refused_wherever_they_are(text):
    whole = not any(0xD800 <= ord(character) <= 0xDFFF for character in text)
    for place in ({"stop": ["x" + text]}, {"messages": [{"role": "user", "content": text}]}, {"user": text}):
        if whole:
            ChatRequest(**{**ASK, **place})
        else:
            assert "half a surrogate pair" in refused(ChatRequest, {**ASK, **place})["msg"]
    call = {"id": "1", "function": {"name": "f", "arguments": text}}
    calls = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    if not whole:
        assert "half a surrogate pair" in refused(ChatRequest, {**ASK, "messages": calls})["msg"]


def test_what_says_more_about_a_request_is_accepted(client):
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    answer = client.chat.completions.create(
        model="default",
        messages=[*ASK["messages"], refusal, *ASK["messages"]],
        metadata={"app": "x"},
        max_tokens=2,
    )
    assert answer.choices
    assert ChatRequest(**{**ASK, "messages": [refusal]}).messages[0].content == "no"


SAID = {
    "stream_options": {"stream_options": {"include_usage": True}},
    "tools": {"tools": [{"type": "function"}]},
    "n": {"n": 2},
    "response_format": {"response_format": {"type": "grammar"}},
    "messages.0.content.1": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]
    },
    "messages.0.content": {"messages": [{"role": "user", "content": None}]},
    "messages.0.role": {"messages": [{"role": "robot", "content": "a"}]},
    "temperature": {"temperature": "warm"},
    "stop.0": {"stop": [""]},
    "top_logprobs": {"top_logprobs": 2},
    "tool": {"tool": 1},
}


@pytest.mark.parametrize("field", SAID)
def test_a_refusal_names_field_and_remedy_in_the_clients_form(client, field):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={**ASK, **SAID[field]}, cast_to=object)
    told = caught.value.body
    assert told["param"] == field
    assert told["type"] == "invalid_request_error"
    assert told["message"].startswith(field + " ")
    assert any(remedy in told["message"] for remedy in ("leave it out", "send"))
    assert "nput should" not in told["message"]


def test_a_conversation_goes_on_with_the_answers_own_message(client):
    messages = list(ASK["messages"])
    for _ in range(3):
        message = client.chat.completions.create(model="default", messages=messages, max_tokens=4).choices[0].message
        assert message.role == "assistant"
        assert isinstance(message.content, str)
        messages += [message, {"role": "user", "content": [{"type": "text", "text": "and now?"}]}]


def test_calls_of_earlier_turns_are_written_by_the_template_or_refused(server, client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ]
    with pytest.raises(openai.BadRequestError, match=r"messages have tool calls that .* does not write") as caught:
        client.chat.completions.create(model="default", messages=messages)
    assert caught.value.param == "messages"
    role = server.app.state.server.role
    asked = ChatRequest(**{**ASK, "messages": messages})
    before = role._tokenizer.chat_template
    line = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"
    role._tokenizer.chat_template = line
    try:
        assert "arguments" in chat_tokenizer().decode(role._encode(asked))
        of_objects = line.replace("m.tool_calls or ''", "m.tool_calls[0].function.arguments | items | list if m.tool_calls")
        role._tokenizer.chat_template = of_objects
        assert "[]" in chat_tokenizer().decode(role._encode(asked))  # of a call without arguments
        role._tokenizer.chat_template = line.replace("m.tool_calls or ''", "1 + m.content if m.tool_calls")
        with pytest.raises(DataError, match="template cannot write"):
            role._encode(asked)
    finally:
        role._tokenizer.chat_template = before
    with pytest.raises(DataError):
        role._encode(asked)


def test_models_are_found_by_name(client):
    assert client.models.retrieve("late").id == "late"
    with pytest.raises(openai.NotFoundError, match="model 'none' is not loaded"):
        client.models.retrieve("none")


@pytest.mark.parametrize("kind", [None, "application/x-www-form-urlencoded", "application/json; charset=utf-8"])
def test_json_needs_no_header(server, kind):
    with server.http(KEY) as http:
        headers = {} if kind is None else {"content-type": kind}
        assert http.post("/v1/completions", content=json.dumps(TEXT), headers=headers).status_code == 200
        other = http.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": "text/plain"})
    assert other.status_code == 400
    assert "send one, with content-type: application/json" in other.json()["error"]["message"]

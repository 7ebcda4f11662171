"""``/v1/responses``, OpenAI's newer form of a chat: the same answers, read by the official client and by an agent framework."""

import asyncio
import json
from typing import Annotated, Literal, get_type_hints

import httpx
import openai
import pytest
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from serving import attached, saying
from shadowpeft.data.calls import CallParser
from shadowpeft.data.tools import tools_of
from shadowpeft.serve.client import CloudClient
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.replies import LocalReply
from shadowpeft.serve.requests import QueueFullError
from shadowpeft.serve.responses import ResponsesRequest
from shadowpeft.serve.router import Router
from shadowpeft.serve.server import Settings, build
from webserver import Running, metric

ASK = {"model": "default", "input": "hello"}
DIRECTION = {"type": "string", "enum": ["left", "right"]}
METRES = {"type": "number", "minimum": 0.1, "maximum": 9, "default": None}
PLACE = {"type": "object", "properties": {"direction": DIRECTION, "metres": METRES}}
WALK = {"type": "function", "name": "Walk", "description": "Go.", "parameters": {**PLACE, "required": ["direction"]}}
SIT = {"type": "function", "name": "Sit", "parameters": {"type": "object", "properties": {}}, "strict": True}
TOOLS = tools_of([{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in (WALK, SIT)])
LIMITS = EngineLimits(gather_seconds=0)


def cloud_role(backend):
    return CloudRole(Engine(backend, LIMITS), system=None, default_tokens=120, tools=TOOLS)


@pytest.fixture(scope="module")
def server():
    with Running(build(cloud_role(attached(max_position_embeddings=512)), Settings(Keys(None, ())))) as running:
        yield running


@pytest.fixture(scope="module")
def calling():
    """A server whose model begins with a call."""
    with Running(build(cloud_role(saying("[Sit()]", "default")), Settings(Keys(None, ())))) as running:
        yield running


def client_of(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def ask(server, **more):
    with client_of(server) as client:
        answer = client.responses.create(**{**ASK, **more})
        return list(answer) if more.get("stream") else answer


def chat(server, **more):
    with client_of(server) as client:
        given = {"model": "default", "messages": [{"role": "user", "content": "hello"}], **more}
        return client.chat.completions.create(**given)


def raw(server, body):
    content = json.dumps({**ASK, **body}).encode()  # half characters too
    with server.http() as http:
        return http.post("/v1/responses", content=content, headers={"content-type": "application/json"})


TURNS = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "y"},
    {"type": "function_call", "call_id": "1", "name": "Sit", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "1", "output": "z"},
]


def test_an_answer_is_the_chats_in_another_form(server):
    answer, other = ask(server), chat(server)
    assert answer.output_text == other.choices[0].message.content
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        other.usage.prompt_tokens,
        other.usage.completion_tokens,
    )
    assert answer.usage.total_tokens == other.usage.total_tokens
    assert answer.status == {"stop": "completed", "length": "incomplete"}[other.choices[0].finish_reason]
    assert answer.model_extra["shadowpeft"]["where"] == "cloud"
    TypeAdapter(Response).validate_python(raw(server, {}).json())  # the client itself builds whatever comes


def test_instructions_parts_and_earlier_turns_are_the_chats(server):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    parts = [{"type": "input_text", "text": "three"}]
    answer = ask(server, instructions="Be brief.", input=[*turns, {"role": "user", "content": parts}], max_output_tokens=9)
    told = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "three"}]
    other = chat(server, messages=told, max_tokens=9)
    assert (answer.output_text, answer.usage.input_tokens) == (
        other.choices[0].message.content,
        other.usage.prompt_tokens,
    )
    assert answer.instructions == "Be brief."


def test_an_answer_that_is_cut_says_so(server):
    answer = ask(server, max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    last = ask(server, max_output_tokens=2, stream=True)[-1]
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0, "top_p": 0.9}, {"max_output_tokens": 3}])
def test_the_events_of_a_stream_make_the_whole_answer(server, more):
    events = ask(server, stream=True, **more)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert set(kinds[4:-4]) <= {"output_text.delta"}
    last = events[-1].response
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == last.output_text == events[-4].text
    assert last.usage.output_tokens > 0
    if "temperature" not in more:
        whole = ask(server, **more)
        assert (whole.output_text, whole.status, whole.usage) == (last.output_text, last.status, last.usage)
    with client_of(server) as client, client.responses.stream(**ASK, **more) as stream:  # which checks their order
        told = list(stream)
    gathered = "".join(event.delta for event in told if event.type == "response.output_text.delta")
    assert gathered == told[-1].response.output_text  # a drawn answer may be empty
    assert gathered == text or "temperature" in more


def test_a_stream_has_named_events_and_no_other_end(server):
    lines = raw(server, {"stream": True}).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert names == [each["type"] for each in data]
    assert names[-1] in ("response.completed", "response.incomplete")


def test_log_probabilities_are_the_chats(server):
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 5}
    answer, other = raw(server, more).json(), chat(server, logprobs=True, top_logprobs=2, max_tokens=5)
    told = answer["output"][0]["content"][0]["logprobs"]
    assert told == [entry.model_dump() for entry in other.choices[0].logprobs.content]
    events = [json.loads(line[6:]) for line in raw(server, {**more, "stream": True}).text.splitlines() if line[:6] == "data: "]
    assert [each for event in events if event["type"].endswith("text.delta") for each in event["logprobs"]] == told


def allowed(*tools, mode="required"):
    return {"type": "allowed_tools", "mode": mode, "tools": [*tools]}


@pytest.mark.parametrize("mode", ["required", "auto"])
def test_only_the_allowed_tools_are_called(calling, mode):
    choice = allowed({"type": "function", "name": "Walk"}, mode=mode)
    answer = ask(calling, tools=[WALK, SIT], tool_choice=choice)
    assert {call.name for call in calls_of(answer)} <= {"Walk"}
    assert calls_of(answer) or mode == "auto"
    assert answer.tool_choice.model_dump() == choice
    assert [tool.name for tool in answer.tools] == ["Walk", "Sit"]


def calls_of(answer):
    return [item for item in answer.output if item.type == "function_call"]


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "name": "Sit"}])
def test_calls_are_items_and_their_results_go_back(calling, choice):
    answer = ask(calling, tools=[WALK, SIT], tool_choice=choice)
    calls = calls_of(answer)
    assert [(call.name, call.arguments) for call in calls][:1] == [("Sit", "{}")]
    assert all(call.status == "completed" and call.call_id.startswith("call_") for call in calls)
    assert (answer.tools[1].name, answer.tools[1].strict) == ("Sit", True)
    events = ask(calling, tools=[WALK, SIT], tool_choice=choice, stream=True)
    assert [(c.name, c.arguments) for c in calls_of(events[-1].response)] == [(c.name, c.arguments) for c in calls]
    pieces = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
    assert list(pieces.values()) == [call.arguments for call in calls]
    back = [item.model_dump() for item in answer.output]  # as the client's own examples send it
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "done"} for call in calls]
    history = [{"role": "user", "content": "hello"}, *back, *results]
    told = ask(calling, input=history, tools=[WALK, SIT], tool_choice="none")
    assert not calls_of(told)
    message = {
        "role": "assistant",
        "content": answer.output_text,
        "tool_calls": [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
        ],
    }
    as_chat = [
        {"role": "user", "content": "hello"},
        message,
        *({"role": "tool", "tool_call_id": call.call_id, "content": "done"} for call in calls),
    ]
    nested = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in (WALK, SIT)]
    other = chat(calling, messages=as_chat, tools=nested, tool_choice="none")
    assert told.usage.input_tokens == other.usage.prompt_tokens
    assert told.output_text == other.choices[0].message.content


class Answer(BaseModel):
    number: Literal[1, 2]


def test_a_form_holds_the_answer(server):
    with client_of(server) as client:
        parsed = client.responses.parse(**ASK, text_format=Answer)
    assert parsed.output_parsed.number in (1, 2)
    assert parsed.text.format.name == "Answer"
    assert json.loads(ask(server, text={"format": {"type": "json_object"}}, max_output_tokens=200).output_text) is not None
    assert ask(server, text={"format": {"type": "text"}, "verbosity": "medium"}).output_text == ask(server).output_text


@pytest.mark.parametrize(
    ("body", "field", "problem"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is kept here; send the whole conversation"),
        ({"store": True}, "store", "leave it out"),
        ({"background": True}, "background", "leave it out"),
        ({"truncation": "auto"}, "truncation", "leave it out"),
        ({"input": []}, "input", "is no text and no list of items"),
        ({"input": 7}, "input", "is no text and no list of items"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role", "is 'robot' but there are user, assistant"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "is no text"),
        ({"input": [{"role": "user", "content": [{"type": ["text"]}]}]}, "input.0.content.0", "is no text"),
        ({"input": [{"role": "user"}]}, "input.0.content", "is no text and no list of texts"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "has no item that is read"),
        ({"input": [{"type": "web_search_call"}]}, "input.0", "has the type 'web_search_call' but there are message"),
        ({"input": ["hello"]}, "input.0", "is 'hello' but must be an item"),
        ({"input": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "input.0.tool_calls", "as an item of the type"),
        ({"input": [{"role": "user", "content": "x", "images": ["y"]}]}, "input.0.images", "is no field of this item"),
        ({"input": [*TURNS, {"role": "user", "content": "x" * 200_001}]}, "input.4.content", "at most 200000 characters"),
        ({"input": [*TURNS[:3], {**TURNS[3], "output": "x" * 200_001}]}, "input.3.output", "at most 200000 characters"),
        ({"input": [{**TURNS[2], "arguments": "{no"}]}, "input.0.arguments", "is no JSON object"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "nothing is kept here"),
        ({"input": [{"type": ["x"]}]}, "input.0", "has the type"),
        ({"input": [{"type": "function_call", "name": "Sit", "call_id": "1"}]}, "input.0.arguments", "is None but must be"),
        ({"input": [{"type": "function_call_output", "call_id": "1"}]}, "input.0.output", "is no text"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id", "must be text"),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "has the type 'web_search' but only functions are called here"),
        ({"tools": [5]}, "tools.0", "but only functions are called here"),
        ({"tools": [{"type": "function", "parameters": {}}]}, "tools", "holds no list of tools"),
        ({"tools": [{**SIT, "defer_loading": True}]}, "tools.0.defer_loading", "is true but all tools are read at once"),
        ({"tools": [SIT], "tool_choice": {"type": "function"}}, "tool_choice", '{"type": "function", "name": "..."}'),
        ({"tools": [SIT], "tool_choice": {"type": "function", "name": 5}}, "tool_choice", "must be none, auto, required, or"),
        ({"tools": [SIT], "tool_choice": {"type": "file_search"}}, "tool_choice", "must be none, auto, required, or"),
        ({"tools": [SIT], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode", "must be auto or required"),
        ({"tools": [SIT], "tool_choice": allowed()}, "tool_choice.tools", "is no list of 1 to 128 tools"),
        ({"tools": [SIT], "tool_choice": allowed(5)}, "tool_choice.tools.0", "is 5 but must be"),
        ({"tools": [SIT], "tool_choice": allowed(SIT) | {"odd": 1}}, "tool_choice.odd", "is no field of this choice"),
        ({"tools": [SIT], "tool_choice": allowed(SIT, WALK)}, "tool_choice.allowed_tools.tools.1", "names 'Walk'"),
        ({"tool_choice": allowed(SIT)}, "tool_choice", "asks for a call but there are no tools"),
        ({"tool_choice": "required"}, "tool_choice", "asks for a call but there are no tools"),
        ({"tools": [SIT], "tool_choice": {"type": "function", "name": "Fly"}}, "tool_choice.function.name", "names 'Fly'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing; send the schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "has the type 'xml'"),
        ({"text": {"format": {"type": "json_schema", "schema": {}, "strict": 1}}}, "text.format.strict", "is 1 but must"),
        ({"text": {"verbosity": "high"}}, "text.verbosity", "leave it out"),
        ({"include": ["file_search_call.results"]}, "include", "asks for 'file_search_call.results'"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "leave it out"),
        ({"max_output_tokens": 100_000}, "max_output_tokens", "max_output_tokens is 100000 but may be"),
        ({"input": "a " * 5000}, "input", "tokens"),
        ({"model": "nobody"}, "model", "is not loaded"),
        ({"n": 2}, "n", "is no field of this request"),
        ({"input": [{"role": "user", "content": "x"}] * 5000}, "input", "at most 1023"),
        ({"input": "\ud800x"}, "input", "half a surrogate pair"),
    ],
)
def test_what_cannot_be_done_is_refused_by_the_names_of_this_endpoint(server, body, field, problem):
    answer = raw(server, body)
    assert answer.status_code == (404 if "model" in body else 400), answer.text
    said = answer.json()["error"]
    assert problem in said["message"]
    assert said["param"] == field


VALUES = {
    "background": False,
    "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    "max_tool_calls": 3,
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "service_tier": "auto",
    "store": False,
    "stream": False,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "truncation": "disabled",
}
"""As clients send them who want nothing special."""
UNKNOWN = {"access_programs", "background_options", "image"}
"""Of the official client's fields, those about accounts, background work and pictures."""


def test_every_field_of_the_official_client_is_accepted_at_null_and_as_clients_send_it():
    fields = get_type_hints(ResponseCreateParamsNonStreaming).keys() - ASK.keys() - UNKNOWN
    plain = ResponsesRequest(**ASK).chat.model_dump()
    for name in fields:
        assert ResponsesRequest(**ASK, **{name: None}).chat.model_dump() == plain, name
        ResponsesRequest(**ASK, **{name: VALUES.get(name)}).chat  # noqa: B018
    assert ResponsesRequest(**ASK, **dict.fromkeys(fields)).chat.model_dump() == plain
    for name in UNKNOWN:
        with pytest.raises(ValidationError):
            ResponsesRequest(**ASK, **{name: {"x": 1}})


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium"])
def test_little_reasoning_is_what_there_is(effort):
    plain = ResponsesRequest(**ASK).chat.model_dump()
    assert ResponsesRequest(**ASK, reasoning={"effort": effort}).chat.model_dump() == plain


def test_answers_are_counted_and_metadata_comes_back(server):
    def read():
        with server.http() as http:
            text = http.get("/metrics").text
        return metric(text, "shadowpeft_routed_total", where="cloud")

    before = read()
    assert ask(server, metadata={"k": "v"}, user="me").metadata == {"k": "v"}
    ask(server, stream=True)
    assert read() == before + 2


def test_a_stream_that_breaks_says_that_it_failed(server, monkeypatch):
    chunks = LocalReply.chunks

    async def breaking(self, with_usage):
        async for chunk in chunks(self, with_usage):
            yield chunk
            raise QueueFullError("text of a user")

    monkeypatch.setattr(LocalReply, "chunks", breaking)
    lines = raw(server, {"stream": True}).text.splitlines()
    last = json.loads(lines[-2].removeprefix("data: "))
    assert lines[-3] == "event: response.failed"
    assert (last["response"]["status"], last["response"]["error"]["message"]) == ("failed", "the answer could not be finished")
    assert last["sequence_number"] == sum(line.startswith("data: ") for line in lines) - 1


@pytest.fixture(scope="module")
def edge(calling):
    """An edge whose device begins with words, so that it hands on."""
    engine, router = Engine(saying("Who "), LIMITS), Router(CallParser(TOOLS))
    role = EdgeRole(engine, router, CloudClient(calling.url), "default", system=None)
    with Running(build(role, Settings(Keys(None, ())))) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_the_edge_hands_on_and_answers_in_this_form(edge, calling, stream):
    got = ask(edge, model="edge", tools=[WALK, SIT], tool_choice="none", stream=stream)
    answer = got[-1].response if stream else got
    assert answer.model_extra["shadowpeft"]["where"] == "cloud"
    assert answer.model == "edge"
    assert answer.output_text == ask(calling, tools=[WALK, SIT], tool_choice="none").output_text
    assert answer.usage.input_tokens > 0


def test_what_clients_send_back_beside_an_items_text_is_not_read(server):
    plain = ask(server, input=TURNS).usage.input_tokens
    beside = {"id": "x", "status": "completed", "phase": "final_answer", "provider_data": {"a": 1}, "name": None}
    reasoning = {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"}
    items = [{**beside, **turn} for turn in TURNS]
    assert ask(server, input=[reasoning, {**items[0], "type": None}, *items[1:]]).usage.input_tokens == plain
    odd = {**SIT, "defer_loading": False, "allowed_callers": ["direct"], "output_schema": None}
    assert ask(server, tools=[odd], tool_choice="none", extra_body={"client_metadata": {"a": "b"}}).usage


def test_text_after_a_call_is_the_same_whole_and_streamed():
    said = saying("[Sit()] ok", "default")
    with Running(build(cloud_role(said), Settings(Keys(None, ())))) as server:
        more = {"tools": [SIT], "include": ["message.output_text.logprobs"]}
        whole, last = ask(server, **more), ask(server, stream=True, **more)[-1].response
    for answer in (whole, last):
        assert [item.type for item in answer.output] == ["function_call", "message"]
        assert answer.output_text == "ok"
        assert "".join(entry.token for entry in answer.output[1].content[0].logprobs).strip() == "ok"


def cloud_of(whole, chunks):
    """An edge whose cloud says this."""

    def reply(request):
        if json.loads(request.content).get("stream"):
            body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
            return httpx.Response(200, text=body)
        return httpx.Response(200, json=whole)

    client = CloudClient("http://cloud", transport=httpx.MockTransport(reply))
    engine, router = Engine(saying("Who "), LIMITS), Router(CallParser(TOOLS))
    return Running(build(EdgeRole(engine, router, client, "m", system=None), Settings(Keys(None, ()))))


def streamed(*deltas, reason="tool_calls"):
    ends = [None] * (len(deltas) - 1) + [reason]
    return [{"choices": [{"index": 0, "delta": d, "finish_reason": r}]} for d, r in zip(deltas, ends, strict=True)]


def piece(index=None, ident=None, name=None, arguments=None):
    told = {"index": index, "id": ident, "function": {"name": name, "arguments": arguments}}
    return {"tool_calls": [{key: value for key, value in told.items() if value is not None}]}


USED = {"prompt_tokens": 1, "completion_tokens": 2, "completion_tokens_details": "odd"}
TWO = [("A", '{"a":1}'), ("B", '{"b":2}')]


@pytest.mark.parametrize(
    "deltas",
    [
        [piece(0, "1", "A", ""), piece(0, None, None, '{"a"'), piece(0, None, None, ":1}"), piece(1, "2", "B", '{"b":2}')],
        [piece(0, "1", "A", '{"a"'), piece(0, "1", "A", ":1}"), piece(1, "2", "B", '{"b":2}')],
        [piece(0, "1", "A"), piece(1, "2", "B"), piece(0, None, None, '{"a":1}'), piece(1, None, None, '{"b":2}')],
        [piece(0, None, "A", '{"a":1}'), piece(1, "", "B", '{"b":2}')],
        [piece(None, "1", "A", '{"a"'), piece(None, "1", None, ":1}"), piece(None, "2", "B", '{"b":2}')],
    ],
)
def test_calls_of_other_clouds_are_put_together_by_their_places(deltas):
    calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in TWO]  # and no id
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": "odd"}], "usage": USED}
    with cloud_of(whole, streamed(*deltas)) as edge:
        for answer in (ask(edge, model="edge"), ask(edge, model="edge", stream=True)[-1].response):
            assert [(call.name, call.arguments) for call in calls_of(answer)] == TWO
            assert len({call.call_id for call in calls_of(answer)} - {""}) == 2


def test_refusals_and_filtered_answers_of_a_cloud_say_so():
    message = {"role": "assistant", "content": None, "refusal": "No."}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "content_filter"}], "usage": USED}
    with cloud_of(whole, streamed({"refusal": "N"}, {"refusal": "o."}, None, reason="content_filter")) as edge:
        events = ask(edge, model="edge", stream=True)
        for answer in (ask(edge, model="edge"), events[-1].response):
            assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "content_filter")
            assert [(part.type, part.refusal) for item in answer.output for part in item.content] == [("refusal", "No.")]
    assert [event.delta for event in events if event.type == "response.refusal.delta"] == ["N", "o."]


def test_calls_that_are_none_are_the_clouds_fault():
    message = {"role": "assistant", "content": None, "tool_calls": [5]}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USED}
    with cloud_of(whole, streamed({"tool_calls": "x"})) as edge:
        with pytest.raises(openai.InternalServerError, match="tool calls that are none") as caught:
            ask(edge, model="edge")
        assert caught.value.status_code == 503
        assert ask(edge, model="edge", stream=True)[-1].type == "response.failed"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_framework_runs_a_call(calling, streamed):
    pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed; it needs Python 3.11")
    from pydantic_ai import Agent
    from pydantic_ai.exceptions import UsageLimitExceeded
    from pydantic_ai.models.openai import OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider
    from pydantic_ai.usage import UsageLimits

    sat = []

    def walk(direction: Literal["left", "right"], metres: Annotated[float, Field(ge=0.1, le=9)] = 1.0) -> str:
        return "walked"

    def sit() -> str:
        sat.append(True)
        return "sat"

    walk.__name__, sit.__name__ = "Walk", "Sit"

    async def run():
        provider = OpenAIProvider(base_url=calling.url + "/v1", api_key="none")
        agent = Agent(OpenAIResponsesModel("default", provider=provider), tools=[sit, walk], system_prompt="You are a dog.")
        more = {"model_settings": {"temperature": 0.0}, "usage_limits": UsageLimits(request_limit=2)}
        if not streamed:
            return await agent.run("sit", **more)
        async with agent.run_stream("sit", **more) as result:
            async for _ in result.stream_text():
                pass
            return result

    with pytest.raises(UsageLimitExceeded):  # this model calls in every turn; the second had the call and its result
        asyncio.run(run())
    assert sat

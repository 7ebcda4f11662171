"""Tools through both servers: held, decided, streamed, handed on, with the official client."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Annotated, Literal

import openai
import pytest
from pydantic import Field

from chatbase import chat_tokenizer
from products import covering
from serving import detached, saying
from shadowpeft.data.actions import parser as parser_of
from shadowpeft.data.calls import CallParser, answered
from shadowpeft.data.tools import tools_of
from shadowpeft.serve.client import CloudClient
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.router import ACTION, Calibration, Router, Scores
from shadowpeft.serve.server import Settings, build
from shadowpeft.serve.toolbox import call_probabilities
from webserver import Running

WALK = {
    "type": "function",
    "function": {
        "name": "Walk",
        "description": "Walk somewhere.",
        "parameters": {
            "type": "object",
            "properties": {
                "direction": {"type": "string", "enum": ["left", "right"]},
                "metres": {"type": "number", "minimum": 0.1, "maximum": 9, "default": None},
            },
            "required": ["direction"],
        },
    },
}
SIT = {"type": "function", "function": {"name": "Sit", "parameters": {"type": "object", "properties": {}}}}
FLY = {"type": "function", "function": {"name": "Fly", "parameters": {"type": "object", "properties": {}}}}
TOOLS = tools_of([WALK, SIT])
LONG = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 9000}}, "required": ["text"]}
ASK = [{"role": "user", "content": "walk"}]
NOBODY = Keys(None, ())
LIMITS = EngineLimits(gather_seconds=0)


def cloud_role(**options):
    return CloudRole(
        Engine(detached(max_position_embeddings=512), LIMITS), system=None, default_tokens=200, tools=TOOLS, **options
    )


@pytest.fixture(scope="module")
def cloud():
    with Running(build(cloud_role(), Settings(NOBODY))) as running:
        yield running


def edge_role(cloud=None, calibration=None, **options):
    client = None if cloud is None else CloudClient(cloud.url)
    engine = Engine(detached(max_position_embeddings=512), LIMITS)
    router = Router(CallParser(TOOLS), calibration)
    return EdgeRole(engine, router, client, "edge", system=None, default_tokens=200, tools=TOOLS, **options)


@pytest.fixture(scope="module")
def edge(cloud):
    with Running(build(edge_role(cloud), Settings(NOBODY))) as running:
        yield running


def ask(server, **more):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        given = {"model": "edge", "messages": ASK, "tools": [WALK, SIT], "seed": 1, "temperature": 1, **more}
        answer = client.chat.completions.create(**given)
        return list(answer) if more.get("stream") else answer


def arguments(call):
    return json.loads(call.function.arguments)


@pytest.mark.parametrize("seed", range(5))
def test_a_required_call_is_valid_whatever_the_model_knows(cloud, seed):
    choice = ask(cloud, tool_choice="required", seed=seed).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert 1 <= len(choice.message.tool_calls) <= 4
    for call in choice.message.tool_calls:
        assert TOOLS.by_name[call.function.name].problem(arguments(call)) is None
    assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)


def test_one_call_by_name_and_no_second(cloud):
    named = {"type": "function", "function": {"name": "Sit"}}
    choice = ask(cloud, tool_choice=named).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments, call.type) == ("Sit", "{}", "function")


def allowed(*names, mode="required"):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_the_allowed_tools_are_called_and_one_is_where_it_has_to_be(cloud):
    called = set()
    for seed, name in enumerate(["Sit", "Walk", "Sit", "Walk"]):
        calls = ask(cloud, tool_choice=allowed(name), seed=seed).choices[0].message.tool_calls
        assert {call.function.name for call in calls} == {name}
        both = ask(cloud, tool_choice=allowed("Sit", "Walk"), seed=seed).choices[0].message.tool_calls
        called |= {call.function.name for call in both}
        free = ask(cloud, tool_choice=allowed(name, mode="auto"), seed=seed, max_tokens=8).choices[0]
        assert free.message.content == ask(cloud, seed=seed, max_tokens=8).choices[0].message.content  # the model may talk
    assert called == {"Sit", "Walk"}


def test_a_device_calls_the_allowed_tools_and_the_cloud_gets_the_choice_as_it_came(cloud):
    with Running(build(edge_role(), Settings(NOBODY))) as alone:
        for name in ("Sit", "Walk"):
            got = [ask(alone, tool_choice=allowed(name, mode="auto"), seed=seed) for seed in range(6)]
            calls = [call for answer in got for call in answer.choices[0].message.tool_calls or []]
            assert {call.function.name for call in calls} == {name}
    role, bodies = edge_role(cloud), []
    send = role.cloud.ask

    async def record(path, body, headers=None):
        bodies.append(body)
        return await send(path, body)

    role.cloud.ask = record
    with Running(build(role, Settings(NOBODY))) as running:
        got = ask(running, tool_choice=allowed("Walk"), extra_body={"route": "cloud"})
    assert {call.function.name for call in got.choices[0].message.tool_calls} == {"Walk"}
    assert bodies[0]["tool_choice"] == allowed("Walk")
    assert bodies[0]["tools"] == [WALK, SIT]


def test_none_is_text_and_auto_may_be(cloud):
    for choice in ("none", "auto"):
        got = ask(cloud, tool_choice=choice, max_tokens=8).choices[0]
        assert got.finish_reason in ("stop", "length")
        assert got.message.tool_calls is None
        assert isinstance(got.message.content, str)


def test_streamed_deltas_are_the_whole_answer(cloud):
    options = {"tool_choice": "required", "seed": 3, "max_tokens": 120}
    whole = ask(cloud, **options).choices[0]
    calls, content, reasons = {}, "", []
    for chunk in ask(cloud, stream=True, **options):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        reasons += [choice.finish_reason] if choice.finish_reason else []
        for delta in choice.delta.tool_calls or []:
            own = calls.setdefault(delta.index, {"name": "", "arguments": "", "id": ""})
            own["id"] += delta.id or ""
            own["name"] += delta.function.name or ""
            own["arguments"] += delta.function.arguments or ""
    assert reasons == ["tool_calls"] == [whole.finish_reason]
    assert [(c["name"], c["arguments"]) for c in calls.values()] == [
        (c.function.name, c.function.arguments) for c in whole.message.tool_calls
    ]
    assert all(c["id"].startswith("call_") for c in calls.values())
    assert content == (whole.message.content or "")


def test_text_that_calls_nothing_is_streamed_as_it_comes(cloud):
    pieces = [c.choices[0].delta.content or "" for c in ask(cloud, stream=True, tool_choice="auto", max_tokens=8)]
    assert "".join(pieces) == ask(cloud, tool_choice="auto", max_tokens=8).choices[0].message.content


def test_results_of_tools_are_later_messages(cloud):
    first = (
        ask(cloud, tool_choice={"type": "function", "function": {"name": "Sit"}}, parallel_tool_calls=False)
        .choices[0]
        .message
    )
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "done"}
    role = cloud.app.state.server.role
    seen = []
    encode = role._encode
    role._encode = lambda asked: seen.append(encode(asked)) or seen[-1]
    try:
        ask(cloud, messages=[*ASK, first, result], max_tokens=4)
    finally:
        role._encode = encode
    text = chat_tokenizer().decode(seen[0])
    assert "<|im_start|>assistant\n[Sit()]" in text
    assert "<|im_start|>tool\ndone<|im_end|>" in text


def schema_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


def test_a_json_schema_holds_the_whole_answer(cloud):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    choice = ask(cloud, tools=openai.NOT_GIVEN, response_format=form).choices[0]
    assert choice.finish_reason == "stop"
    assert 1 <= json.loads(choice.message.content)["n"] <= 9


REFUSED = [
    ({"tools": [FLY]}, "tools has 'Fly', which this server's model was not trained to call"),
    ({"tools": []}, None),
    ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, "tool_choice asks for a call but there are no tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "Fly"}}}, "names 'Fly', which is none of the tools"),
    ({"tool_choice": allowed("Sit", "Fly")}, "allowed_tools.tools.1 names 'Fly', which is none of the tools"),
    ({"tool_choice": allowed()}, "allowed_tools.tools is no list of 1 to 128 tools"),
    ({"tool_choice": allowed("Sit", mode="none")}, "allowed_tools.mode is 'none' but must be auto or required"),
    ({"tool_choice": {"type": "allowed_tools"}}, "allowed_tools.mode is None but must be auto or required"),
    (
        {"tools": [{**SIT, "function": {**SIT["function"], "parameters": LONG}}]},
        "'Sit' with other arguments than this server's model was trained for",
    ),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}}, "belongs to the type"),
    ({"response_format": {"type": "json_schema"}}, "is missing; send the schema"),
    ({"response_format": {"type": "grammar"}}, "has the type 'grammar' but there are text, json_schema, json_object"),
    (
        {
            "tools": openai.NOT_GIVEN,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"uniqueItems": True}}},
        },
        r"response_format has a schema that the engine refuses \(failed to compile JSON schema: Unimplemented keys: \["
        r"\"uniqueItems\"\]\); simplify it",
    ),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "holds no list of tools"),
]


@pytest.mark.parametrize(("more", "problem"), REFUSED)
def test_what_cannot_be_held_is_refused_by_name(cloud, more, problem):
    if problem is None:
        assert ask(cloud, max_tokens=4, **more).choices[0].message.tool_calls is None
        return
    with pytest.raises(openai.BadRequestError, match=problem):
        ask(cloud, **more)


@pytest.mark.parametrize(
    ("form", "begins", "choice"),
    covering(
        [{"type": "json_object"}, schema_of({"type": "object"})],
        ["{}", "[Sit()]"],
        [None, "auto", "none", "required"],
        strength=1,
    ),
)
def test_tools_and_a_form_hold_the_answer_together(choice, begins, form):
    role = CloudRole(Engine(saying(begins), LIMITS), system=None, default_tokens=300, tools=TOOLS)
    with Running(build(role, Settings(NOBODY))) as server:
        most = 300 if choice == "required" else 40
        said = ask(server, response_format=form, tool_choice=choice, temperature=0, max_tokens=most).choices[0]
        bare = ask(server, tools=openai.NOT_GIVEN, response_format=form, temperature=0, max_tokens=8).choices[0]
    calls = choice == "required" or (choice in (None, "auto") and begins == "[Sit()]")
    assert (said.finish_reason == "tool_calls") == calls
    if calls:
        assert said.message.tool_calls[0].function.name in ("Sit", "Walk")
        assert said.message.content is None or begins == "{}"  # a call that has to be made may be followed by text
    elif begins == "{}":
        assert (said.message.content, said.finish_reason) == ("{}", "stop")
    else:
        assert said.message.content.startswith("{")
    assert bare.message.content.startswith("{")


def walking(cloud):
    """An edge whose device walks."""
    engine, router = Engine(saying("[Walk(direct"), LIMITS), Router(CallParser(TOOLS))
    client = CloudClient(cloud.url)
    return build(
        EdgeRole(engine, router, client, "edge", system=None, default_tokens=100, tools=TOOLS), Settings(NOBODY)
    )


def test_the_device_keeps_its_own_call_and_says_how_sure_it_is_of_each_part(cloud):
    with Running(walking(cloud)) as running:
        got = ask(running, temperature=0, seed=None)
        choice, note = got.choices[0], got.model_extra["shadowpeft"]
        assert choice.finish_reason == "tool_calls"
        assert note["where"] == "device"
        product = 1.0
        for told, call in zip(note["calls"], choice.message.tool_calls, strict=True):
            assert told["name"] == call.function.name
            assert told["arguments"].keys() == arguments(call).keys()
            product *= told["probability"]
            for chance in told["arguments"].values():
                product *= chance
        assert product == pytest.approx(note["probability"], abs=2e-3)  # four digits of each


def test_the_edge_hands_on_what_the_device_was_not_trained_for(edge, cloud):
    bodies = []
    role = edge.app.state.server.role
    send = role.cloud.ask

    async def record(path, body, headers=None):
        bodies.append(body)
        return await send(path, {**body, "tools": [WALK, SIT]})

    role.cloud.ask = record
    try:
        got = ask(edge, tools=[WALK, FLY], tool_choice="required", parallel_tool_calls=False)
        assert got.model_extra["shadowpeft"]["reason"] == "other tools"
        assert bodies[0]["tools"] == [WALK, FLY]  # unchanged, a null in a schema too
        assert bodies[0]["tool_choice"] == "required"
        assert bodies[0]["parallel_tool_calls"] is False
        assert got.choices[0].finish_reason == "tool_calls"
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
        form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
        role.cloud.ask = send
        got = ask(edge, tools=openai.NOT_GIVEN, response_format=form)
        assert got.model_extra["shadowpeft"]["reason"] == "response format"
        json.loads(got.choices[0].message.content)
    finally:
        role.cloud.ask = send
    with pytest.raises(openai.BadRequestError, match="'Fly', which this server's model was not trained to call"):
        ask(edge, tools=[FLY], extra_body={"route": "device"})


def test_an_unsure_call_is_handed_on_with_the_name_as_a_hint(cloud):
    calibration = Calibration(ACTION, (0.0, 1.0), (0.0, 1.0), 2.0, tools=tuple(TOOLS.definitions()))
    role = edge_role(cloud, calibration, hint=True)
    bodies = []
    send = role.cloud.ask

    async def record(path, body, headers=None):
        bodies.append(body)
        return await send(path, body)

    role.cloud.ask = record
    walk_alone = [WALK]
    with Running(build(role, Settings(NOBODY))) as running:
        got = ask(running, tools=walk_alone, parallel_tool_calls=False, temperature=0)
    note = got.model_extra["shadowpeft"]
    if note["reason"] == "low confidence" and note["calls"][0]["probability"] >= 0.9:
        assert note["hint"] == "Walk"
        assert bodies[0]["tool_choice"]["function"]["name"] == "Walk"
    else:
        assert "hint" not in note
    assert note["where"] == "cloud"


def test_a_hint_is_the_name_of_a_call_whose_arguments_are_in_doubt():
    def found(*tokens):
        pieces, chances = zip(*tokens, strict=True)
        logs = [math.log(chance) for chance in chances]
        return call_probabilities(pieces, Scores(logs, logs, logs), CallParser(TOOLS))

    told, hint = found(("[Walk(", 0.95), ('direction="left"', 0.5), (")]", 1.0))
    assert (told[0]["probability"], told[0]["arguments"], hint) == (0.95, {"direction": 0.5}, "Walk")
    assert found(("[Walk(", 0.85), ('direction="left"', 0.5), (")]", 1.0))[1] is None
    told, hint = found(("[Sit(", 0.95), (")]", 1.0))
    assert (told[0]["probability"], hint) == (0.95, None)  # the device is as unsure of the name as of the whole


def test_a_calibration_keeps_its_tools(tmp_path):
    calibration = Calibration(ACTION, (0.0, 1.0), (0.0, 1.0), 0.5, tools=tuple(TOOLS.definitions()))
    calibration.save(tmp_path / "routing.json")
    again = Calibration.load(tmp_path / "routing.json")
    assert again == calibration
    assert tools_of(list(again.tools)) == TOOLS


def test_a_device_alone_is_not_held_to_calls_that_the_client_does_not_want(monkeypatch):
    """Held to them, it would write a call into the text."""
    role = edge_role()
    held = []
    start = role.engine.submit
    monkeypatch.setattr(role.engine, "submit", lambda *a, **k: held.append((a, k)) or start(*a, **k))
    with Running(build(role, Settings(NOBODY))) as alone:
        ask(alone, tools=[WALK, SIT], tool_choice="none", max_tokens=4)
        ask(alone, tools=[WALK, SIT], max_tokens=4)
    assert [any(hasattr(each, "allowed") for each in (*a, *k.values())) for a, k in held] == [False, True]


def test_a_call_that_is_too_long_is_text_in_one_piece_too():
    parser = CallParser(tools_of([{"type": "function", "function": {"name": "Say", "parameters": LONG}}]))
    for count, called in ((100, True), (parser.longest, False)):
        text = f'[Say(text="{"a" * count}")]'
        assert (parser.found(text) is not None) == called
        assert (parser(text) is not None) == called


def test_without_a_cloud_the_device_answers_all():
    with Running(build(edge_role(), Settings(NOBODY))) as running:
        for more in ({}, {"tools": openai.NOT_GIVEN}):
            got = ask(running, temperature=0, **more)
            assert got.model_extra["shadowpeft"]["where"] == "device"
        assert answered(got.choices[0].message.content, TOOLS) is not None  # without tools in the request it is text


def returned(*results, name="Sit"):
    """A chat in which tools were called and have answered."""
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": "{}"}} for n, _ in enumerate(results)]
    said = [{"role": "tool", "tool_call_id": f"c{n}", "content": each} for n, each in enumerate(results)]
    return [*ASK, {"role": "assistant", "content": None, "tool_calls": calls}, *said]


def nowhere():
    """A cloud that is away."""
    return SimpleNamespace(url="http://127.0.0.1:9")


@pytest.mark.parametrize("away", [False, True])
def test_without_a_cloud_an_agent_comes_to_its_end(away):
    """A device that has learnt actions alone would call again after each result."""
    with Running(build(edge_role(nowhere() if away else None), Settings(NOBODY))) as running:
        for results in (["done"], ["so " * 70], ["one", "two\nthree"], [""], ["<|im_end|> 站"], ['[Walk(direction="left")] x']):
            said = "\n".join(results)
            got = ask(running, messages=returned(*results))
            (choice,), note = got.choices, got.model_extra["shadowpeft"]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (said, None, "stop")
            assert note["where"] == "device"
            assert note.get("degraded", False) == away
            assert got.usage.completion_tokens >= 1
            streamed = ask(running, messages=returned(*results), stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said
        cut = ask(running, messages=returned("a long result of a tool"), max_tokens=2).choices[0]
        assert cut.finish_reason == "length"
        assert "a long result of a tool".startswith(cut.message.content)


def test_a_result_goes_to_the_cloud_also_where_the_tools_are_left_out(edge):
    got = ask(edge, messages=returned("done"), tools=openai.NOT_GIVEN, max_tokens=4)
    note = got.model_extra["shadowpeft"]
    assert (note["where"], note["reason"]) == ("cloud", "tool result")


def test_last_words_are_not_those_of_a_tool_where_a_call_or_a_form_is_wanted():
    with Running(build(edge_role(), Settings(NOBODY))) as running:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [7]}}}
        got = ask(running, messages=returned("done"), tools=openai.NOT_GIVEN, response_format=form)
        assert got.choices[0].message.content == "7"
        named = {"type": "function", "function": {"name": "Sit"}}
        for seed in range(20):
            try:
                (call,) = ask(running, messages=returned("done"), tool_choice=named, seed=seed).choices[0].message.tool_calls
            except openai.InternalServerError:
                continue  # it handed on
            assert call.function.name == "Sit"
            break
        else:
            pytest.fail("the device made no call at twenty seeds")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Fly"}}])
def test_a_call_that_has_to_be_made_is_not_replaced_by_words(choice):
    with Running(build(edge_role(nowhere()), Settings(NOBODY))) as running:
        with pytest.raises(openai.InternalServerError, match="tool_choice asks for a call, for which") as got:
            ask(running, tools=[FLY], tool_choice=choice)
        assert got.value.status_code == 503


def test_handing_on_is_no_call():
    for client in (None, CloudClient("http://127.0.0.1:9")):
        engine, router = Engine(saying("[REMOTE]"), LIMITS), Router(CallParser(TOOLS))
        role = EdgeRole(engine, router, client, "edge", system=None, default_tokens=100, tools=TOOLS)
        with Running(build(role, Settings(NOBODY))) as running:
            if client is None:
                assert ask(running).choices[0].message.content == "[REMOTE]"
            else:
                with pytest.raises(openai.InternalServerError, match="the device hands this request on and has no answer"):
                    ask(running)
            assert ask(running, extra_body={"route": "device"}).choices[0].message.content == "[REMOTE]"
            with pytest.raises(openai.InternalServerError, match="tool_choice asks for a call"):
                ask(running, tool_choice="required")


def test_tools_that_may_not_be_called_are_no_reason_to_refuse(cloud):
    assert ask(cloud, tools=[FLY], tool_choice="none", max_tokens=4).choices[0].message.tool_calls is None


def test_a_server_that_knows_no_tools_says_how_to_name_them():
    role = EdgeRole(Engine(detached(), LIMITS), Router(parser_of(["Sit"])), None, "edge", system=None, default_tokens=4)
    told = r"tools has 'Walk', but this server was told of no tools .* \(serve --skills\)"
    with Running(build(role, Settings(NOBODY))) as running, pytest.raises(openai.BadRequestError, match=told):
        ask(running)


def test_arguments_stand_in_the_order_that_the_model_was_trained_for(cloud):
    function = WALK["function"]
    properties = {
        "metres": {"anyOf": [{"type": "number", "minimum": 0.1, "maximum": 9}, {"type": "null"}], "default": None},
        "direction": {"type": "string", "enum": ["right", "left"], "title": "Direction"},
    }
    other = {**function, "parameters": {**function["parameters"], "properties": properties}}
    with Running(walking(cloud)) as running:
        own, same = (
            ask(running, temperature=0, seed=None, tools=[{"type": "function", "function": each}])
            for each in (function, other)
        )
    assert own.model_extra["shadowpeft"]["where"] == same.model_extra["shadowpeft"]["where"] == "device"
    calls = [[each.function for each in got.choices[0].message.tool_calls] for got in (own, same)]
    assert calls[0] == calls[1]


def test_the_clients_strict_form_gets_null_for_what_the_device_leaves_out(cloud):
    parameters = WALK["function"]["parameters"]
    metres = {"anyOf": [{"type": "number", "minimum": 0.1, "maximum": 9}, {"type": "null"}]}
    strict = {
        **parameters,
        "properties": {**parameters["properties"], "metres": metres},
        "required": ["direction", "metres"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "Walk", "strict": True, "parameters": strict}}
    for stream in (False, True):
        with Running(walking(cloud)) as running:
            got = ask(running, temperature=0, seed=None, tools=[tool], stream=stream)
        if stream:
            texts = [c.choices[0].delta.tool_calls[0].function.arguments for c in got if c.choices[0].delta.tool_calls]
            given = json.loads("".join(texts).partition("}")[0] + "}")
        else:
            given = arguments(got.choices[0].message.tool_calls[0])
        assert given.keys() == {"direction", "metres"}


def test_earlier_calls_are_written_whatever_they_called(edge, cloud):
    """Of a tool that this request leaves out, of one that nobody knows, with arguments that no schema takes, with an index."""
    for name, said in (("Sit", "{}"), ("Fly", '{"to": "moon"}'), ("Walk", '{"metres": -5}')):
        call = {"id": "call_1", "index": 0, "type": "function", "function": {"name": name, "arguments": said}}
        messages = [
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        ]
        for server in (edge, cloud):
            for tools in ([WALK], openai.NOT_GIVEN):
                assert ask(server, messages=messages, tools=tools, max_tokens=4).choices[0].finish_reason


@pytest.mark.parametrize(
    "choice", ["any", {"type": "function", "name": "Sit"}, {"type": "custom", "custom": {"name": "Sit"}}, 5]
)
def test_another_form_of_tool_choice_is_refused_with_those_that_there_are(cloud, choice):
    with pytest.raises(openai.BadRequestError, match="must be none, auto, required, or") as caught:
        ask(cloud, extra_body={"tool_choice": choice})
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_framework_runs_the_devices_call_and_gets_words_from_the_cloud(cloud, streamed):
    pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed; it needs Python 3.11")
    from pydantic_ai import Agent
    from pydantic_ai.messages import RetryPromptPart, ToolCallPart, ToolReturnPart
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    walked = []

    def walk(direction: Literal["left", "right"], metres: Annotated[float, Field(ge=0.1, le=9)] = 1.0) -> str:
        """Walk somewhere, as its framework writes the tool from a function: titles, another description, another default."""
        walked.append((direction, metres))
        return "walked"

    def sit() -> str:
        return "sat"

    walk.__name__, sit.__name__ = "Walk", "Sit"

    async def run(url):
        provider = OpenAIProvider(base_url=url + "/v1", api_key="none")
        agent = Agent(OpenAIChatModel("edge", provider=provider), tools=[walk, sit], system_prompt="You are a dog.")
        settings = {"temperature": 0.0}
        if not streamed:
            return (await agent.run("walk", model_settings=settings)).all_messages()
        async with agent.run_stream("walk", model_settings=settings) as result:
            async for _ in result.stream_text():
                pass
            return result.all_messages()

    with Running(walking(cloud)) as running:
        asked, called, returned, told = asyncio.run(run(running.url))
    calls = [part for part in called.parts if isinstance(part, ToolCallPart)]
    assert calls
    assert walked == [(call.args_as_dict()["direction"], call.args_as_dict().get("metres", 1.0)) for call in calls]
    assert not any(isinstance(part, RetryPromptPart) for part in returned.parts)  # arguments that the schema refuses
    assert [part.content for part in returned.parts if isinstance(part, ToolReturnPart)] == ["walked"] * len(calls)
    assert len(asked.parts) == 2
    assert told.finish_reason in ("stop", "length")

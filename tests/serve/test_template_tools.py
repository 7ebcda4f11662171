"""Tools of a request that stand in the prompt: a cloud whose chat template writes tools and calls answers in that form."""

import asyncio
import json

import openai
import pytest

from chatbase import calling_tokenizer, run_file, save_base, write_rows
from serving import ending_model
from shadowpeft.apps import serve as command
from shadowpeft.apps.detach import main as detach_command
from shadowpeft.data.call_form import template_form
from shadowpeft.data.template_calls import TemplateCalls
from shadowpeft.data.tools import tools_of
from shadowpeft.errors import ConfigError
from shadowpeft.serve.answers import ResponseBuilder, usage
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.options import Options
from shadowpeft.serve.requests import Token
from shadowpeft.serve.response_reply import ResponsesReply
from shadowpeft.serve.responses import ResponsesRequest
from shadowpeft.serve.server import Settings, build
from shadowpeft.train.config import parse_run
from shadowpeft.train.run import train
from webserver import Running

STRING, WHOLE = {"type": "string", "maxLength": 8}, {"type": "integer", "minimum": 0, "maximum": 100}
PLACES = {"type": "array", "maxItems": 2, "items": {"type": "string", "enum": ["light", "cover"]}}
WHERE = {"name": STRING, "area": STRING, "domain": PLACES}


def tool(called, required=(), **properties):
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": called, "description": f"{called} does it.", "parameters": schema}}


HOME = [
    tool("HassTurnOn", **WHERE),
    tool("HassLightSet", brightness=WHOLE, color=STRING, **WHERE),
    tool("HassClimateSetTemperature", ["temperature"], temperature={"type": "number", "minimum": 5, "maximum": 30}),
    tool("GetLiveContext"),
]
SIT = tool("Sit", seconds=WHOLE)
ASK = [{"role": "user", "content": "dim the hall"}]


def cloud_role(tokenizer, tools=None):
    model = ending_model(vocab_size=261, max_position_embeddings=4096)
    return CloudRole(
        Engine(Detached(model, tokenizer, "edge"), EngineLimits(gather_seconds=0)),
        system=None,
        default_tokens=400,
        tools=tools,
    )


@pytest.fixture(scope="module")
def cloud():
    with Running(build(cloud_role(calling_tokenizer()), Settings(Keys(None, ())))) as running:
        yield running


def client_of(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def ask(server, **more):
    with client_of(server) as client:
        given = {"model": "edge", "messages": ASK, "tools": HOME, "seed": 1, "temperature": 1, **more}
        answer = client.chat.completions.create(**given)
        return list(answer) if more.get("stream") else answer


@pytest.mark.parametrize("name", [None, *(each["function"]["name"] for each in HOME)])
def test_tools_that_nobody_was_trained_for_are_called_by_their_schemas(cloud, name):
    choice = "required" if name is None else {"type": "function", "function": {"name": name}}
    known = tools_of(HOME)
    for seed in range(4):
        answer = ask(cloud, tool_choice=choice, seed=seed).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
        assert 1 <= len(answer.message.tool_calls) <= (4 if name is None else 1)
        for call in answer.message.tool_calls:
            assert name in (None, call.function.name)
            assert known.by_name[call.function.name].problem(json.loads(call.function.arguments)) is None


def test_one_call_where_the_client_wants_no_more(cloud):
    def calls(seed, **more):
        given = {"tools": HOME[3:], "tool_choice": "required", "temperature": 2, "seed": seed}
        return ask(cloud, **given, **more).choices[0].message.tool_calls

    several = [seed for seed in range(12) if len(calls(seed)) > 1]
    assert several
    assert all(len(calls(seed, parallel_tool_calls=False)) == 1 for seed in several)


def test_a_stream_is_the_whole_answer(cloud):
    whole = ask(cloud, tool_choice="required").choices[0]
    chunks = ask(cloud, tool_choice="required", stream=True)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    names = [call.function.name for call in deltas if call.id]
    arguments = ["".join(c.function.arguments or "" for c in deltas if c.index == n) for n in range(len(names))]
    calls = whole.message.tool_calls
    assert (names, arguments) == ([c.function.name for c in calls], [c.function.arguments for c in calls])


def test_tools_and_their_results_stand_in_the_prompt(cloud):
    bare = ask(cloud, tools=openai.NOT_GIVEN, max_tokens=1).usage.prompt_tokens
    told = ask(cloud, max_tokens=1).usage.prompt_tokens
    template = calling_tokenizer().apply_chat_template
    assert told - bare == len(template(ASK, tools=HOME)["input_ids"]) - len(template(ASK)["input_ids"])
    call = {"id": "1", "type": "function", "function": {"name": "GetLiveContext", "arguments": "{}"}}
    turns = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "hall: 20 %"},
    ]
    after = ask(cloud, messages=turns, max_tokens=3)
    written = [*ASK, {**turns[1], "tool_calls": [{**call, "function": {**call["function"], "arguments": {}}}]}, turns[2]]
    prompt = template(written, tools=HOME, add_generation_prompt=True)["input_ids"]
    assert after.usage.prompt_tokens == len(prompt)


def test_none_calls_nothing(cloud):
    answer = ask(cloud, tool_choice="none", max_tokens=20)
    plain = ask(cloud, tools=openai.NOT_GIVEN, max_tokens=20)
    assert answer.choices[0].message.tool_calls is None
    assert (answer.choices[0].message.content, answer.usage) == (plain.choices[0].message.content, plain.usage)


def test_an_answer_may_be_words_or_what_a_schema_wants(cloud):
    answer = ask(cloud, max_tokens=30).choices[0]
    assert answer.message.content
    assert answer.message.tool_calls is None
    empty = {"type": "object", "properties": {}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": empty}}
    kinds = set()
    for seed in range(12):
        answer = ask(cloud, response_format=form, seed=seed).choices[0]
        kinds.add(answer.finish_reason)
        assert answer.message.content == ("{}" if answer.finish_reason == "stop" else None)
    assert kinds == {"stop", "tool_calls"}


def test_home_assistants_way_of_asking(cloud):
    tools = [{"type": "function", **each["function"], "strict": False} for each in HOME]
    turns = [
        {"type": "message", "role": "developer", "content": "You are a voice assistant."},
        {"type": "message", "role": "user", "content": "is the hall lit?"},
        {"type": "function_call", "call_id": "1", "name": "GetLiveContext", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": '{"hall": "20 %"}'},
    ]
    more = {"max_output_tokens": 400, "top_p": 1.0, "temperature": 1.0, "user": "01J", "service_tier": "auto", "store": False}
    with client_of(cloud) as client:
        events = list(
            client.responses.create(model="edge", input=turns, tools=tools, tool_choice="required", stream=True, **more)
        )
    assert events[-1].type == "response.completed"
    called = [item for item in events[-1].response.output if item.type == "function_call"]
    assert called
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [item.arguments for item in called]


def test_what_a_model_was_trained_for_is_called_in_the_compact_form_and_other_tools_in_the_templates():
    with Running(build(cloud_role(calling_tokenizer(), tools_of([SIT])), Settings(Keys(None, ())))) as server:
        own = ask(server, tools=[SIT], tool_choice="required", logprobs=True)
        other = ask(server, tools=HOME, tool_choice="required", logprobs=True)
    first = ["".join(entry.token for entry in each.choices[0].logprobs.content[:8]) for each in (own, other)]
    assert first[0].startswith("[Sit(")
    assert first[1].startswith('<call>{"name"')
    assert own.choices[0].message.tool_calls[0].function.name == "Sit"
    assert other.choices[0].message.tool_calls


def test_earlier_calls_stand_in_the_form_that_training_wrote():
    call = {"id": "1", "type": "function", "function": {"name": "Sit", "arguments": '{"seconds": 5}'}}
    turns = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    with Running(build(cloud_role(calling_tokenizer(), tools_of([SIT])), Settings(Keys(None, ())))) as server:
        answer = ask(server, messages=turns, tools=[SIT], max_tokens=2)
    written = [*ASK, {"role": "assistant", "content": "[Sit(seconds=5)]"}, {"role": "tool", "content": "done"}]
    prompt = calling_tokenizer().apply_chat_template(written, add_generation_prompt=True)["input_ids"]
    assert answer.usage.prompt_tokens == len(prompt)


@pytest.mark.parametrize("arguments", ["not json", '{"a": ', "5", "null", '["a"]'])
@pytest.mark.parametrize("choice", ["auto", "none"])
def test_earlier_calls_without_an_object_of_arguments_are_refused_by_name(cloud, arguments, choice):
    call = {"id": "1", "type": "function", "function": {"name": "GetLiveContext", "arguments": arguments}}
    turns = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, *ASK]
    with pytest.raises(openai.BadRequestError, match=r"GetLiveContext has the arguments .*, which are no JSON object"):
        ask(cloud, messages=turns, tool_choice=choice)


@pytest.mark.parametrize("words", ["Let me see.", ""])
def test_items_of_a_response_stand_in_the_order_of_the_answer(words):
    form = template_form(calling_tokenizer())
    text = f'{words}\n<call>{{"name": "GetLiveContext", "arguments": {{}}}}</call>'
    tokens = [Token(n, each, each, each.encode(), 0.0, 0.0, 0.0) for n, each in enumerate(text)]
    made = ResponseBuilder(True, "edge", 0, {}, TemplateCalls(tools_of(HOME), form)).whole(text, tokens, "stop", usage(3, 9))

    class Whole:
        note, began, counts, parts = {}, 0.0, made["usage"], ()

        async def whole(self):
            return made

    asked = ResponsesRequest(model="edge", input="a", include=["message.output_text.logprobs"])
    items = asyncio.run(ResponsesReply(asked, Whole()).whole())["output"]
    assert [item["type"] for item in items] == (["message"] if words else []) + ["function_call"]
    if words:
        (part,) = items[0]["content"]
        assert part["text"] == words == "".join(entry["token"] for entry in part["logprobs"])


def test_a_form_that_is_not_read_is_refused_by_name():
    tokenizer = calling_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace('"name": ', '"id": "{{ c.id }}", "name": ')
    with Running(build(cloud_role(tokenizer), Settings(Keys(None, ())))) as server:
        with pytest.raises(openai.BadRequestError, match="writes calls in a form that this server does not read"):
            ask(server)
        assert ask(server, tools=openai.NOT_GIVEN, max_tokens=3).choices[0].message.content


def test_an_adapter_that_learnt_its_templates_calls_is_not_held_to_the_compact_form(tmp_path):
    base = save_base(tmp_path / "base", vocab_size=261, max_position_embeddings=1024)
    calling_tokenizer().save_pretrained(base)
    (tmp_path / "actions.json").write_text(json.dumps([SIT]))
    call = {"id": "1", "type": "function", "function": {"name": "Sit", "arguments": '{"seconds": 5}'}}
    turns = [*ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 4)
    for form in ("template", "compact"):
        data = {"tools": str(tmp_path / "actions.json"), "call_form": form, "max_length": 1024}
        train(parse_run(run_file(tmp_path / form, base, rows, data=data, training={"max_steps": 1}), "run"))
    options = {"role": "cloud", "skills": str(tmp_path / "actions.json"), "auth": False, "device": "cpu"}
    assert command.application(Options(adapters=[str(tmp_path / "compact" / "adapter")], **options), Keys(None, ()))
    adapter, edge = tmp_path / "template" / "adapter", tmp_path / "edge"
    detach_command(str(adapter), str(edge))
    for folder, role in ((adapter, "cloud"), (adapter, "edge"), (edge, "cloud"), (edge, "edge")):
        given = Options(adapters=[str(folder)], **{**options, "role": role})
        with pytest.raises(ConfigError, match="has learnt to call tools as its base's chat template writes them but --skills"):
            command.application(given, Keys(None, ()))

"""Tools: definitions, calls in their compact form, rows, and what a grammar lets a model say."""

import itertools
import json
import random
import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatbase import calling_tokenizer, chat_model, chat_tokenizer, run_file, save_base, write_rows
from commands import call
from edges import tokenizer as byte_pairs
from shadowpeft.data import chat, robot, robot_tools
from shadowpeft.data.call_guide import Engine
from shadowpeft.data.calls import Call, CallParser, answered, calls_of, only_calls, ordered, written
from shadowpeft.data.number_patterns import integers, numbers
from shadowpeft.data.tool_rows import with_tools, writes_calls
from shadowpeft.data.tools import named, read_tools, takes_null, tools_of
from shadowpeft.data.writable import Writable
from shadowpeft.decode import decode
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate.calls import Patterns, judge, summary, with_digits
from shadowpeft.generate import answer
from shadowpeft.train.config import parse_run
from shadowpeft.train.rows import compact_calls, load_run_data, read_rows
from shadowpeft.train.sections import DataConfig

TOOLS = robot_tools.tools()


def tool(name, required=(), **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


MIXED = tools_of(
    [
        tool(
            "Go",
            ["to"],
            to={"type": "string", "maxLength": 5},
            fast={"type": "boolean"},
            level={"enum": [1, "a", True]},
        ),
        tool(
            "Set",
            n={"type": "integer", "minimum": -3, "maximum": 12},
            x={"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
        ),
        tool(
            "List",
            ["items"],
            items={"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 3}, "maxItems": 3},
        ),
        tool("Sit"),
    ]
)


# ------------------------------------------------------------------------------------------------------------ definitions


def test_names_are_the_short_form(tmp_path):
    (tmp_path / "names.txt").write_text("LampOn\nLampOff\n", encoding="utf-8")
    (tmp_path / "names.json").write_text('["LampOn", "LampOff"]', encoding="utf-8")
    (tmp_path / "tools.json").write_text(json.dumps([tool("LampOn"), {"name": "LampOff"}]), encoding="utf-8")
    read = [read_tools(tmp_path / name) for name in ("names.txt", "names.json", "tools.json")]
    assert read[0] == read[1] == named(["LampOn", "LampOff"])
    assert read[2].names == ("LampOn", "LampOff")
    assert all(each.plain for each in read)
    assert not TOOLS.plain


def test_the_robots_own_form_is_a_call_without_arguments():
    found = answered("[Sit()] I sit.", named(robot.SKILLS))
    assert found.calls == (Call("Sit", {}),)
    assert "[Sit()] I sit."[found.end :] == " I sit."


REFUSED = [
    ([], "no tool"),
    ({"a": 1}, "must be a list"),
    ([tool("a b")], "name 'a b'"),
    ([tool("REMOTE")], "always means handing on"),
    ([tool("A"), tool("A")], "'A' twice"),
    ([tool("A", ["x"])], "requires 'x'"),
    ([tool("A", x={"type": "float"})], "no JSON schema"),
    ([{"type": "function", "function": {"name": "A", "parameters": {"type": "array"}}}], "of an object"),
    ([{"name": "A", "schema": {}}], "must be an object with name"),
    ([tool("A", **{"a b": {}})], "an argument called 'a b'"),
    ([5], "must be an object"),
]


@pytest.mark.parametrize(("definitions", "problem"), REFUSED)
def test_what_is_no_tool_is_refused_by_place(definitions, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        tools_of(definitions, "the file")


def test_descriptions_do_not_tell_tools_apart_and_ranges_do():
    one = tool("A", x={"type": "integer", "maximum": 5, "description": "how many"})
    other = tool("A", x={"type": "integer", "maximum": 5, "title": "X"})
    assert tools_of([one]).lack(tools_of([other])) is None
    assert tools_of([one]).lack(tools_of([tool("A", x={"type": "integer", "maximum": 6})])) == "A"
    assert tools_of([one]).lack(tools_of([tool("B")])) == "B"


NUMBER, SIDES = {"type": "number", "minimum": 0}, {"type": "string", "enum": ["left", "right"]}
NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "same"),
    [
        ({"anyOf": [NUMBER, NULL], "default": None}, NUMBER),
        ({"type": ["null", "number"], "minimum": 0}, NUMBER),
        ({"type": ["string", "null"], "enum": ["right", None, "left"]}, SIDES),
        ({"anyOf": [NUMBER, SIDES, NULL]}, {"anyOf": [SIDES, NUMBER]}),
        ({**NUMBER, "nullable": True, "deprecated": True, "$id": "x"}, NUMBER),
        ({"const": "left", "type": "string"}, {"type": "string", "enum": ["left"]}),
        ({**SIDES, "enum": ["right", "left"]}, SIDES),
    ],
)
def test_libraries_write_the_same_argument_in_other_ways(schema, same):
    for first, second in ((schema, same), (same, schema)):
        own, other = tools_of([tool("A", x=first)]), tools_of([tool("A", x=second)])
        assert own.lack(other) is None
    if takes_null(schema):  # what has to be there may be null, or may not
        own, other = tools_of([tool("A", ["x"], x=schema)]), tools_of([tool("A", ["x"], x=same)])
        assert own.lack(other) == "A"
        assert own.lack(tools_of([tool("A", x=same)])) is None  # OpenAI's strict form requires all
    assert tools_of([tool("A", x=same)]).lack(tools_of([tool("A", x=NULL)])) == "A"


# ------------------------------------------------------------------------------------------------------------------ calls


@pytest.mark.parametrize("split", robot_tools.SPLITS)
def test_every_packaged_row_is_read_back_from_its_text(split):
    for row in robot_tools.load(split):
        calls = robot_tools.calls_of_row(row)
        found = answered(written(calls) + " and words", TOOLS)
        assert found.calls == calls == tuple(ordered(call, TOOLS) for call in calls)
        assert only_calls(written(calls) + " words", TOOLS) == written(calls)


UNREAD = [
    "", "[", "[Sit(", "[Sit()", "Sit()]", "[Fly()]", "[Set(n=13)]", "[Set(n=1, n=2)]", "[Set(n=1,)]", "[Set(n=1 )]",
    "[Set(n=NaN)]", "[Go()]", '[Go(to="abcdef")]', "[Sit() ]", "[Sit(), ]", "[Sit(),Sit()]", "ok [Sit()]", "[REMOTE()]",
    '[Set({"n": 1})]',
]  # fmt: skip


@pytest.mark.parametrize("text", UNREAD)
def test_what_is_no_valid_call_is_none(text):
    assert answered(text, MIXED) is None
    assert CallParser(MIXED)(text) is None


@given(st.data())
def test_a_parser_does_not_change_its_mind(data):
    row = data.draw(st.sampled_from(robot_tools.load("test")))
    text = written(robot_tools.calls_of_row(row)) + data.draw(st.text(max_size=5))
    parse = CallParser(TOOLS)
    said = [parse(text[:n]) for n in range(len(text) + 1)]
    decided = [one for one in said if one is not None]
    assert len(set(decided)) == 1
    assert said[-1] is not None


def test_arguments_have_one_order_and_numbers_one_form():
    call = {"function": {"name": "Walk", "arguments": '{"distance": 2.0, "direction": "left"}'}}
    assert written(calls_of([call], TOOLS)) == '[Walk(direction="left", distance=2)]'
    for given_, problem in [
        ({"name": "Walk", "arguments": "{"}, "no JSON"),
        ({"name": "Walk", "arguments": {"direction": "up"}}, "refuses"),
        ({"name": "Fly", "arguments": {}}, "none of the tools"),
        ({"arguments": {}}, "needs a function"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            calls_of([given_], TOOLS)


# ------------------------------------------------------------------------------------------------------------------- rows

CALL = [{"id": "1", "type": "function", "function": {"name": "Sit", "arguments": '{"seconds": 5}'}}]
WRITES = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% for c in m.get('tool_calls') or [] %}CALL {{ c['function']['name'] }}{% endfor %}<|im_end|>\n{% endfor %}"  # noqa: E501
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def row(**answer):
    turns = [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "Ok.", **answer}]
    return chat.check_row({"messages": turns}, "rows.jsonl, line 1")


def test_a_template_that_knows_calls_writes_them_and_others_get_the_compact_form():
    assert writes_calls(chat_tokenizer(template=WRITES))
    assert not writes_calls(chat_tokenizer())
    compact = with_tools(row(tool_calls=CALL), TOOLS, compact=True)
    assert compact["response"] == "[Sit(seconds=5)] Ok."
    (one,) = chat.encode([compact], chat_tokenizer(), max_length=512)
    assert chat_tokenizer().decode(one.ids[one.start :]) == "[Sit(seconds=5)] Ok.<|im_end|>"
    whole = with_tools(row(tool_calls=CALL), TOOLS, compact=False)
    (one,) = chat.encode([whole], chat_tokenizer(template=WRITES), max_length=20_000)
    assert chat_tokenizer().decode(one.ids[one.start :]) == "Ok.CALL Sit<|im_end|>"
    assert '"name": "SetTimer"' in chat_tokenizer().decode(one.ids[: one.start])


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize(
    ("data", "compact"),
    [
        ({"train": "rows.jsonl"}, None),
        ({"train": "rows.jsonl", "shadow_answers": "action"}, True),
        ({"train": "rows.jsonl", "call_form": "compact"}, True),
        ({"train": "robot_tools"}, True),
        ({"train": "robot_tools", "shadow_answers": "whole"}, None),
        ({"train": "rows.jsonl", "call_form": "template"}, False),
    ],
)
def test_which_form_a_run_trains(data, compact, writes):
    tokenizer = chat_tokenizer(template=WRITES) if writes else chat_tokenizer()
    section = DataConfig(**data)
    if compact is False and not writes:
        with pytest.raises(ConfigError, match=r"data\.call_form is 'template' but the base's chat template writes no calls"):
            compact_calls(section, TOOLS, tokenizer)
    else:
        assert compact_calls(section, TOOLS, tokenizer) is (not writes if compact is None else compact)
    if section.call_form is None:
        assert compact_calls(section, None, tokenizer)
    else:
        with pytest.raises(ConfigError, match=r"data\.call_form is '.*' but data\.tools names no tools"):
            compact_calls(section, None, tokenizer)


@pytest.mark.parametrize(
    ("data", "learnt"),
    [
        ({"shadow_answers": "action"}, "[Sit(seconds=5)]<|im_end|>"),
        ({"call_form": "compact"}, "[Sit(seconds=5)] Ok.<|im_end|>"),
        ({}, 'Ok.\n<call>{"name": "Sit", "arguments": {"seconds": 5}}</call><|im_end|>'),
    ],
)
def test_a_device_learns_the_compact_form_on_a_base_whose_template_writes_calls(tmp_path, data, learnt):
    turns = [{"role": "user", "content": "sit"}, {"role": "assistant", "content": "Ok.", "tool_calls": CALL}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 2)
    (tmp_path / "actions.json").write_text(json.dumps(TOOLS.definitions()))
    made = run_file(tmp_path / "run", "base", rows, data={"tools": str(tmp_path / "actions.json"), "max_length": 8192, **data})
    tokenizer = calling_tokenizer()
    (row, *_) = load_run_data(parse_run(made, "run"), tokenizer, lambda told: None).training
    assert tokenizer.decode(row.shadow_answer or row.learnt) == learnt
    assert ("SetTimer" in tokenizer.decode(row.ids[: row.start])) is (not data)


def test_actions_alone_are_of_the_compact_form():
    with pytest.raises(ValueError, match=r"data\.call_form is 'template' but the shadow path learns actions alone"):
        DataConfig(train="robot_tools", call_form="template")


def test_rows_with_other_tools_or_arguments_are_refused_by_line():
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: message 2 calls 'Fly', which is none of the tools"):
        with_tools(row(tool_calls=[{"function": {"name": "Fly", "arguments": "{}"}}]), TOOLS, compact=True)
    other = {**row(), "tools": [tool("Fly")]}
    with pytest.raises(DataError, match="has the tool 'Fly', which is none of the run's tools"):
        with_tools(other, TOOLS, compact=True)


ANY = tools_of(
    [
        tool(
            "Set",
            ["a"],
            a={"type": "string"},
            n={"type": "integer", "maximum": 2**63},
            x={"type": "number"},
            kind={"type": ["string", "null"], "enum": ["x", None]},
        ),
        tool("Sit"),
    ]
)
LONG = [
    ({"a": "x", "n": 1234567890}, 'n=123456789'),
    ({"a": "x", "x": 5.1234678}, "x=5.1234"),
    ({"a": "two\nlines"}, r"two"),
    ({"a": "x" * 201}, "xxx"),
]


@pytest.mark.parametrize(("arguments", "end"), LONG)
def test_calls_that_a_device_cannot_write_are_refused_before_it_is_trained(arguments, end):
    calls = [{"function": {"name": "Set", "arguments": json.dumps(arguments)}}]
    with pytest.raises(DataError, match=rf"rows.jsonl, line 1 calls 'Set\(.*a device cannot write it beyond .*{end}"):
        with_tools(row(tool_calls=calls), ANY, compact=True)
    five = [{"function": {"name": "Sit", "arguments": "{}"}}] * 5
    with pytest.raises(DataError, match="at most 4 calls"):
        with_tools(row(tool_calls=five), ANY, compact=True)
    with_tools(row(tool_calls=five), ANY, compact=False)  # a template writes them, and nothing holds the answer


@pytest.mark.parametrize(
    "text", ['[Set(a="x",n=1)] ok', "[Set(a='x')]", "[Sit( )]", "[sit()]", "Sit()", "[Fly()] hi", "[Set(a=1)]", "[ Sit()]"]
)
@pytest.mark.parametrize("key", ["response", "shadow_response"])
def test_text_that_looks_like_a_call_and_is_none_is_refused(text, key):
    given_ = chat.check_row({"prompt": "a", "response": "b", key: text}, "rows.jsonl, line 1")
    with pytest.raises(DataError, match=r"rows.jsonl, line 1 begins with .* which is no valid call of Set, Sit"):
        with_tools(given_, ANY, compact=True)


@pytest.mark.parametrize("text", ["[REMOTE]", "Sitting (down) now.", "[a note] yes", "fly(away)", ""])
def test_words_are_no_calls(text):
    given_ = chat.check_row({"prompt": "a", "response": text}, "here")
    assert with_tools(given_, ANY, compact=True)["response"] == text


def test_calls_in_text_get_their_one_form():
    given_ = chat.check_row({"prompt": "a", "response": '[Set(n=2.0, a="x")] ok'}, "here")
    assert with_tools(given_, ANY, compact=True)["response"] == '[Set(a="x", n=2)] ok'


def test_a_call_with_an_unknown_key_is_refused_and_null_is_absent_where_it_may_not_be():
    with pytest.raises(ConfigError, match="calls Sit with the key 'args'; its arguments stand under 'arguments'"):
        calls_of([{"name": "Sit", "args": {"zz": 1}}], ANY)
    (call,) = calls_of([{"name": "Set", "arguments": {"a": "x", "n": None, "kind": None}}], ANY)
    assert call.arguments == {"a": "x", "kind": None}
    with pytest.raises(ConfigError, match='"a" is a required property'):
        calls_of([{"name": "Set", "arguments": {"a": None}}], ANY)


ROOTS = [
    ({"minProperties": 1}, "'minProperties'"),
    ({"anyOf": [{"required": ["a"]}]}, "'anyOf'"),
    ({"not": {"required": ["a"]}}, "'not'"),
    ({"properties": {"a": {"type": "string", "format": "password"}}}, r"in its argument a \(Unknown format: password\)"),
    ({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 2}}, "required": ["a"]}, "in its argument a "),
    ({"properties": {"a": {"type": "string"}, "b": {"type": "string", "pattern": "(?<=x)y"}}}, "in its argument b "),
]


@pytest.mark.parametrize(("schema", "problem"), ROOTS)
def test_schemas_that_calls_cannot_be_held_to_are_refused_before_training(schema, problem):
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}, **schema}
    tools = tools_of([{"name": "T", "parameters": parameters}])
    with pytest.raises(ConfigError, match=f"has the tool T .*{problem}"):
        Writable(tools)


@pytest.mark.parametrize("command", [("data", "check"), ("train",)])
def test_a_schema_that_calls_cannot_be_held_to_is_no_fault_of_the_rows(command, monkeypatch, capsys, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"sit {i}", "response": "[Sit()]"} for i in range(3)])
    file = tmp_path / "actions.json"
    file.write_text(json.dumps([tool("Sit"), tool("Set", x={"type": "string"}, y={"type": "array", "uniqueItems": True})]))
    content = {"base": save_base(tmp_path / "base"), "output": str(tmp_path / "run")}
    content["data"] = {"train": str(tmp_path / "rows.jsonl"), "tools": str(file)}
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    code, out, err = call(monkeypatch, capsys, *command, tmp_path / "run.yaml")
    said = " ".join(err.split())
    assert code == 2
    assert f"the actions file '{file}' has the tool Set with a schema that calls cannot be held to in its argument y" in said
    assert "rows.jsonl" not in said + out
    assert "t0_" not in said  # a grammar that nobody sees


def test_references_are_written_out(machine):
    rooms = {"enum": ["hall", "kitchen"], "type": "string"}
    tree = {"type": "object", "properties": {"up": {"$ref": "#/$defs/Tree"}}, "additionalProperties": False}
    properties = {"room": {"$ref": "#/$defs/Room", "description": "where"}, "tree": {"$ref": "#/$defs/Tree"}}
    parameters = {"type": "object", "properties": properties, "required": ["room"], "$defs": {"Room": rooms, "Tree": tree}}
    tools = tools_of([{"name": "T", "parameters": parameters}])
    assert tools[0].properties["room"] == {**rooms, "description": "where"}
    grammar = Writable(tools)  # one that names itself stays a reference
    assert grammar.read('[T(room="hall", tree={"up": {}})]') is not None
    assert grammar.problem('[T(room="attic")]') is not None
    machine[2].calls(tools, hand_on=True)
    del properties["tree"], parameters["$defs"]["Tree"]
    assert tools_of([tool("U", ["room"], room=rooms)]).lack(tools_of([{"name": "U", "parameters": parameters}])) is None
    parameters["properties"]["room"] = {"$ref": "#/$defs/Nowhere"}
    with pytest.raises(ConfigError, match="the reference '#/\\$defs/Nowhere', which leads nowhere"):
        tools_of([{"name": "U", "parameters": parameters}])


@pytest.mark.parametrize("wide", [1, 2])
def test_references_that_grow_without_end_are_refused(wide):
    """A request can bring them: forty lines would be 2 ** 40 parts, or hundreds inside one another."""
    names = 400 if wide == 1 else 40
    ways = [{f"p{m}": {"$ref": f"#/$defs/D{n + 1}"} for m in range(wide)} for n in range(names)]
    definitions = {f"D{n}": {"type": "object", "properties": properties} for n, properties in enumerate(ways)}
    definitions[f"D{names}"] = {"type": "string"}
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/D0"}}, "$defs": definitions}
    with pytest.raises(ConfigError, match="once references are written out; simplify it"):
        tools_of([{"name": "T", "parameters": parameters}])


def test_the_shadow_of_the_packaged_set_learns_calls_alone():
    rows = read_rows("robot_tools", "validation", actions=True, tools=TOOLS)
    for given_, made in zip(robot_tools.load("validation"), rows, strict=True):
        calls = written(robot_tools.calls_of_row(given_))
        assert made["shadow_response"] == calls
        assert made["response"] == (f"{calls} {given_['reply']}" if given_["calls"] else given_["reply"])


def test_the_packaged_splits_are_what_the_card_says():
    counted = {
        "train": (800, 450, 250),
        "train_more": (4500, 2750, 1250),
        "validation": (160, 80, 60),
        "test": (240, 100, 60),
    }
    card = (robot_tools.ROWS.parent / "CARD.md").read_text(encoding="utf-8")
    prompts, parts = {}, {}
    for split, counts in counted.items():
        rows = robot_tools.load(split)
        assert tuple(sum(r["kind"] == kind for r in rows) for kind in ("one", "two", "cloud")) == counts
        assert {c["name"] for r in rows for c in r["calls"]} == set(TOOLS.names)
        prompts[split] = {r["prompt"].lower() for r in rows}
        parts[split] = {bare(part) for r in rows for part in re.split(r" \+ ", r["family"])}
        assert len(prompts[split]) == len(rows)
        languages = [sum(r["lang"] == lang for r in rows) for lang in ("en", "zh")]
        line = " | ".join(str(n) for n in (len(rows), *languages, *counts))
        assert f"| `{split}` | {line} |" in card
    for one, other in itertools.combinations(counted, 2):
        assert not prompts[one] & prompts[other]
        if (one, other) != ("train", "train_more"):
            assert not parts[one] & parts[other]
    large = read_rows("robot_tools_large", "train", actions=True, tools=TOOLS)
    whole = [row["prompt"] for split in ("train", "train_more") for row in robot_tools.load(split)]
    assert [row["messages"][-1]["content"] for row in large] == whole


def bare(part: str) -> str:
    """A phrasing or the words of a join without case, marks and what its slots mean."""
    return re.sub(r"[^\w{}]", "", part.partition(" | ")[0].lower())


def test_the_words_around_commands_are_apart_too():
    from scripts.robot_tools.more import MORE_FRAMES, MORE_JOINS
    from scripts.robot_tools.phrases import FRAMES, JOINS

    for table, more in ((FRAMES, MORE_FRAMES), (JOINS, MORE_JOINS)):
        for lang in ("en", "zh"):
            training = {bare(words) for words in (*table[lang, "train"], *more[lang])}
            held = {bare(words) for split in ("validation", "test") for words in table[lang, split]}
            assert not training & held


# --------------------------------------------------------------------------------------------------------------- grammars


@given(st.integers(-2000, 2000), st.integers(0, 300), st.integers(-2500, 2500))
@settings(max_examples=300)
def test_a_pattern_of_integers_is_their_range(low, width, value):
    pattern = re.compile(integers(low, low + width))
    assert bool(pattern.fullmatch(str(value))) == (low <= value <= low + width)
    assert pattern.fullmatch(str(low))
    assert pattern.fullmatch(str(low + width))


@given(st.integers(-900, 900), st.integers(0, 500), st.integers(-1500, 1500))
@settings(max_examples=300)
def test_a_pattern_of_numbers_is_their_range_in_one_form(low, width, value):
    pattern = re.compile(numbers(Decimal(low) / 100, Decimal(low + width) / 100, 2))
    text = format((Decimal(value) / 100).normalize(), "f")
    assert bool(pattern.fullmatch(text)) == (low <= value <= low + width)
    for other in (text + ".", text + "0" if "." in text else text + ".0", "0" + text, "-0", "+" + text):
        assert not pattern.fullmatch(other)


def generate(model, tokenizer, grammar, tools, seed, longest=1200):
    """Greedy or sampled tokens of an untrained model that is held to a grammar."""
    rng = np.random.default_rng(seed)
    guide, path = grammar.start(), []
    prompt = tokenizer("walk", add_special_tokens=False).input_ids
    # one pass for all logits: an untrained model's numbers are noise whatever it has read
    with torch.inference_mode():
        bias = model(torch.tensor([prompt])).logits[0, -1].numpy()
    while len(path) < longest:
        if forced := guide.forced(path):
            path += forced
            continue
        allowed = guide.allowed(path)
        if not len(allowed):
            return path
        index = np.asarray(allowed)
        path.append(int(index[(bias[index] + 3 * rng.random(len(index))).argmax()]))
    raise AssertionError(f"no end after {longest} tokens: {decode(tokenizer, path)[:200]!r}")


@pytest.fixture(scope="module", params=["bytes", "byte pairs"])
def machine(request):
    tokenizer = chat_tokenizer() if request.param == "bytes" else byte_pairs()
    return chat_model(vocab_size=460, max_position_embeddings=256), tokenizer, Engine(tokenizer, 460)


def count_invalid(machine, tools, rows, hand_on):
    model, tokenizer, engine = machine
    grammar = engine.calls(tools, hand_on=hand_on)
    invalid = 0
    for seed in range(rows):
        text = decode(tokenizer, generate(model, tokenizer, grammar, tools, seed))
        found = answered(text, tools)
        invalid += found is None or found.end != len(text)
    return invalid


@pytest.mark.parametrize("tools", [MIXED, TOOLS], ids=["mixed", "robot"])
def test_an_untrained_model_makes_no_invalid_call(machine, tools):
    assert count_invalid(machine, tools, 100, hand_on=tools is TOOLS) == 0


@pytest.mark.slow
def test_an_untrained_model_makes_no_invalid_call_in_ten_thousand():
    tokenizer = byte_pairs()
    machine = chat_model(vocab_size=460, max_position_embeddings=256), tokenizer, Engine(tokenizer, 460)
    assert (
        count_invalid(machine, TOOLS, 5_000, hand_on=False) + count_invalid(machine, MIXED, 5_000, hand_on=False) == 0
    )


def test_the_tokens_of_training_are_those_that_must_follow(machine):
    _, tokenizer, engine = machine
    grammar = engine.calls(TOOLS, hand_on=True)
    for each in robot_tools.load("validation")[:60]:
        ids = tokenizer(written(robot_tools.calls_of_row(each)), add_special_tokens=False).input_ids
        guide, path = grammar.start(), []
        while len(path) < len(ids):
            forced = guide.forced(path)
            assert forced == ids[len(path) : len(path) + len(forced)]
            path += forced
            if not forced:
                assert ids[len(path)] in guide.allowed(path)
                path.append(ids[len(path)])
        assert len(guide.allowed(path)) == 0


def test_an_answer_that_is_read_again_may_be_shorter(machine):
    _, tokenizer, engine = machine
    ids = tokenizer('[Walk(direction="left", distance=2)]', add_special_tokens=False).input_ids
    guide = engine.calls(TOOLS, hand_on=True).start()
    fresh = engine.calls(TOOLS, hand_on=True)
    rng = random.Random(0)
    for _ in range(60):
        path = ids[: rng.randrange(len(ids) + 1)] + ([5] if rng.random() < 0.2 else [])
        other = fresh.start()
        assert list(guide.allowed(path)) == list(other.allowed(path))
        assert guide.forced(path) == other.forced(path)


def test_a_schema_that_the_engine_does_not_know_is_refused(machine):
    _, _, engine = machine
    with pytest.raises(ConfigError, match="the engine refuses the schema"):
        engine.calls(
            tools_of([tool("A", x={"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}})]), hand_on=True
        )


# ---------------------------------------------------------------------------------------------------------------- judging


def test_answers_are_judged_as_a_whole_by_name_and_by_argument():
    right = (Call("Walk", {"direction": "left", "distance": 2}), Call("Sit", {}))
    other = (Call("Walk", {"direction": "left", "distance": 3}), Call("Sit", {}))
    assert judge(right, right).exact
    told = judge(other, right)
    assert (told.exact, told.names, told.arguments) == (False, True, (1, 2))
    assert judge((), right).handed_on
    assert not judge(None, ()).exact
    rows = [{"calls": [1], "kind": "two", "lang": "en"}, {"calls": [], "kind": "cloud", "lang": "en"}]
    shares = summary(rows, [told, judge((), ())])
    assert (shares["calls"]["accuracy"], shares["names"]["accuracy"], shares["arguments"]["accuracy"]) == (0, 1, 0.5)
    assert shares["cloud_handed_on"]["accuracy"] == 1


def test_the_rival_reads_numbers_in_words():
    assert with_digits("walk two hundred and five steps, twenty-three times") == "walk 205 steps, 23 times"
    assert with_digits("转一百二十度，三次") == "转120度，3次"
    rival = Patterns(robot_tools.load("train"))
    turn = Call("Turn", {"direction": "left", "angle": 90})
    asked = ["turn to the left by ninety degrees", "turn left 90 degrees. then sit down"]
    assert rival.answers(asked) == [(turn,), (turn, Call("Sit", {}))]


def test_generate_holds_answers_to_calls(machine):
    model, tokenizer, engine = machine
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        given_ = answer(
            model,
            tokenizer,
            ["a", "longer"],
            actions=engine.calls(MIXED.some(["Set", "Sit"]), hand_on=True),
            max_new_tokens=50,
            **options,
        )
        for each in given_:
            found = answered(each.text, MIXED)
            assert found is not None or each.tokens == 50

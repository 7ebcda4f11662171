"""Calls in the form of a chat template: read off from the template, held by a grammar, found in an answer."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from chatbase import CALLING, calling_tokenizer, chat_tokenizer
from shadowpeft.chat_template import render, render_prompt
from shadowpeft.data import chat
from shadowpeft.data.call_form import CallForm, template_form
from shadowpeft.data.call_guide import Engine
from shadowpeft.data.calls import Call, CallParser
from shadowpeft.data.template_calls import TemplateCalls
from shadowpeft.data.tools import tools_of
from shadowpeft.serve.answers import ResponseBuilder
from shadowpeft.serve.requests import Token

DEFINITIONS = [
    {
        "name": "Walk",
        "parameters": {
            "type": "object",
            "properties": {
                "direction": {"type": "string", "enum": ["left", "right", "上"]},
                "metres": {"type": "number", "minimum": 0.1, "maximum": 9},
                "note": {"type": "string", "maxLength": 6},
            },
            "required": ["direction"],
        },
    },
    {"name": "Sit"},
]
TOOLS = tools_of(DEFINITIONS)
ASKED = [{"role": "user", "content": "walk"}]
CALLS = (
    [Call("Sit", {})],
    [Call("Walk", {"direction": "left", "metres": 2})],
    [
        Call("Walk", {"direction": "上", "note": 'a"\\\n{}'}),
        Call("Sit", {}),
        Call("Walk", {"direction": "right", "metres": 0.5}),
    ],
)
HERMES = {
    "begin": '<tool_call>\n{"name": "',
    "opens": '", "arguments": {',
    "between": '}\n</tool_call>\n<tool_call>\n{"name": "',
    "end": "}\n</tool_call>",
    "key_begin": '"',
}
LLAMA = {"begin": '{"name": "', "opens": '", "parameters": {', "between": None, "end": "}"}
TAGS = {
    "begin": "<tool_call>\n<function=",
    "opens": ">\n",
    "key_begin": "<parameter=",
    "key_end": ">\n",
    "value_end": "\n</parameter>\n",
    "between": "</function>\n</tool_call>\n<tool_call>\n<function=",
    "end": "</function>\n</tool_call>",
}
PRODUCERS = {
    "qwen2_5": HERMES,
    "qwen3": HERMES,
    "qwen3_instruct_2507": HERMES,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "qwen3_5_think": TAGS,
    "qwen3_8": TAGS,
    "nemotron_3_nano": {**TAGS, "end": "</function>\n</tool_call>\n"},
    "glm4moe": {"begin": "<tool_call>", "opens": "\n", "between": "</tool_call>\n<tool_call>", "end": "</tool_call>"},
    "lfm2_2_5": None,  # with special tokens
    "gptoss": None,  # with special tokens
    "muse_glimmer": None,  # each name twice
    "gemma3": None,  # no calls
}


def producers(name):
    """A tokenizer with a template as TRL ships it."""
    trl = importlib.util.find_spec("trl")
    if trl is None:
        pytest.skip("TRL is not installed; this one's needs Python 3.11")
    folder = Path(trl.origin).parent / "chat_templates"
    if not (folder / f"{name}.jinja").exists():
        pytest.skip(f"this TRL ships no template of {name}")
    made = chat_tokenizer(template=(folder / f"{name}.jinja").read_text(encoding="utf-8"))
    made.add_special_tokens({"bos_token": "<eos>"})
    return made


def said(tokenizer, content, calls):
    """What the template writes for an answer, without the end of the turn."""
    openai = [call.openai(f"call0000{n}") for n, call in enumerate(calls)]
    answer = {"role": "assistant", "content": content, "tool_calls": openai}
    prompt = render_prompt(tokenizer, ASKED, tools=TOOLS.definitions())
    whole = render(tokenizer, [*ASKED, answer], tools=TOOLS.definitions())
    assert whole.startswith(prompt)
    return whole[len(prompt) :].rstrip("\n").removesuffix("<|im_end|>").removesuffix("<|eot_id|>")


@pytest.mark.parametrize("name", PRODUCERS)
def test_the_form_is_read_off_from_the_producers_template(name):
    found, expected = template_form(producers(name)), PRODUCERS[name]
    if expected is None:
        assert found is None
        return
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.raw, found.words) == (expected not in (HERMES, LLAMA), expected is not LLAMA)


@pytest.mark.parametrize("name", [name for name, form in PRODUCERS.items() if form is not None])
@pytest.mark.parametrize("content", ["", "First I walk."])
@pytest.mark.parametrize("calls", CALLS)
def test_what_a_template_writes_is_found_again(name, content, calls):
    tokenizer = producers(name)
    form = template_form(tokenizer)
    if form.between is None:
        calls = calls[-1:]
    if not form.words:
        content = ""
    text = said(tokenizer, content, calls)
    found = TemplateCalls(TOOLS, form).found(text)
    assert list(found.calls) == calls
    assert text[: found.start].strip() == content


def test_a_template_without_a_form_has_none():
    assert template_form(chat_tokenizer()) is None
    assert template_form(chat_tokenizer(template=None)) is None
    with_id = CALLING.replace('"name": ', '"id": "{{ c.id }}", "name": ')
    assert template_form(chat_tokenizer(template=with_id)) is None
    as_python = CALLING.replace("c.function.arguments | tojson", "c.function.arguments.keys() | list")
    assert template_form(chat_tokenizer(template=as_python)) is None
    quoted = CALLING.replace('"arguments": {{ c.function.arguments | tojson }}', "{% for k, v in c.function.arguments.items() %}<p={{ k }}>{{ v | tojson }}</p>{% endfor %}")  # noqa: E501
    assert template_form(chat_tokenizer(template=quoted)) is None
    counted = template_form(chat_tokenizer(template=CALLING.replace("<call>", "<call {{ loop.index }}>")))
    assert (counted.begin, counted.between) == ('<call 1>{"name": "', None)
    special = CALLING.replace("<call>", "<eos>")
    assert template_form(chat_tokenizer(template=special)) is None


def test_a_token_that_calls_begin_with_is_known():
    assert template_form(calling_tokenizer()).trigger == 260
    assert template_form(chat_tokenizer(template=CALLING)).trigger is None


@pytest.mark.parametrize("arguments", [{"seconds": 5}, '{"seconds": 5}'])
def test_arguments_are_written_once_whether_they_come_as_an_object_or_as_text(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "Sit", "arguments": arguments}}
    turns = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (row,) = chat.encode([chat.check_row({"messages": turns}, "x")], calling_tokenizer(), max_length=512)
    answer = calling_tokenizer().decode(row.ids[row.start :])
    assert answer == '<call>{"name": "Sit", "arguments": {"seconds": 5}}</call><|im_end|>'
    as_text = CALLING.replace("c.function.arguments | tojson", "'' + c.function.arguments")  # as DeepSeek's
    (row,) = chat.encode([chat.check_row({"messages": turns}, "x")], chat_tokenizer(template=as_text), max_length=512)
    assert chat_tokenizer().decode(row.ids[row.start :]) == answer


# ------------------------------------------------------------------------------------------------------------ the grammar


@pytest.fixture(scope="module", params=["a template of ours", "qwen3", "qwen3_5_think", "glm4moe"])
def machine(request):
    if request.param in PRODUCERS:
        tokenizer = producers(request.param)
        tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in ("<tool_call>", "</tool_call>")])
        if request.param == "glm4moe":
            tags = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
            tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in tags])
    else:
        tokenizer = calling_tokenizer()
    form = template_form(tokenizer)
    assert form.trigger == 260
    return tokenizer, form, Engine(tokenizer, 261)


def drawn(grammar, path, seed, longest=2000):
    """The path gone on with by an untrained model that is held to a grammar, up to where it ends."""
    rng, guide = np.random.default_rng(seed), grammar.start()
    likes = rng.random(270)  # an untrained model's numbers are noise
    while len(path) < longest:
        if forced := guide.forced(path):
            path += forced
            continue
        allowed = np.asarray(guide.allowed(path))
        assert len(allowed), "an answer with calls ends with the turn"
        token = int(allowed[(likes[allowed] + 3 * rng.random(len(allowed))).argmax()])
        if token == 3:
            return path
        path.append(token)
    raise AssertionError("no end")


@pytest.mark.parametrize("words", ["", "Let me see.\n"])
def test_an_untrained_model_makes_no_invalid_call(machine, words):
    tokenizer, form, engine = machine
    parser, grammar = TemplateCalls(TOOLS, form), engine.calls(TOOLS, hand_on=False, optional=bool(words), form=form)
    for seed in range(40):
        start = tokenizer(words, add_special_tokens=False).input_ids + ([260] if words else [])
        path = drawn(grammar, start, seed)
        text = tokenizer.decode(path)
        found = parser.found(text)
        assert found is not None, text
        assert text[: found.start].rstrip() == words.rstrip()
        assert 1 <= len(found.calls) <= 4


@pytest.mark.parametrize("optional", [False, True])
def test_what_a_template_writes_may_follow(machine, optional):
    tokenizer, form, engine = machine
    grammar = engine.calls(TOOLS, hand_on=False, optional=optional, form=form)
    for calls in CALLS:
        ids = tokenizer(said(tokenizer, "", calls), add_special_tokens=False).input_ids
        guide = grammar.start()
        begins = ids.index(260) + 1 if optional else 0
        for place, token in enumerate([*ids, 3]):
            allowed = guide.allowed(ids[:place])
            assert token in allowed if place >= begins else len(allowed) == 0


ODD = {
    "text": {"type": "string"},
    "short": {"type": "string", "maxLength": 40},
    "maybe": {"type": ["string", "null"]},
    "either": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
    "anything": {},
    "flag": {"type": "boolean"},
    "choice": {"enum": ["a b", 5, True, None]},
    "many": {"type": "array", "items": {"type": "string"}},
    "inner": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False},
}
VALUES = {
    "text": ["hello", "", "a\nb\n", 'x "y"', "上", "true", "5", "None"],
    "short": ["hello", "a\nb"],
    "maybe": ["hello", "5", None],
    "either": [7, "words", None],
    "anything": ["hello", 5, None],
    "flag": [True, False],
    "choice": ["a b", 5, True, None],
    "many": [[], ["a", "b\nc"]],
    "inner": [{}, {"x": 1.5}],
}


@pytest.mark.parametrize("key", ODD)
def test_any_value_that_a_template_writes_may_follow_and_is_read(machine, key):
    tokenizer, form, engine = machine
    tools = tools_of([{"name": "Say", "parameters": {"type": "object", "properties": {key: ODD[key]}, "required": [key]}}])
    grammar = engine.calls(tools, hand_on=False, form=form)
    for value in VALUES[key]:
        text = said(tokenizer, "", [Call("Say", {key: value})])
        ids, guide = tokenizer(text, add_special_tokens=False).input_ids, grammar.start()
        for place, token in enumerate([*ids, 3]):
            assert token in guide.allowed(ids[:place]), (value, tokenizer.decode(ids[:place]))
        assert TemplateCalls(tools, form).found(text).calls == (Call("Say", {key: value}),)


def test_words_are_free_until_a_call_begins(machine):
    tokenizer, form, engine = machine
    guide = engine.calls(TOOLS, hand_on=False, optional=True, form=form).start()
    words = tokenizer('I think {"name": "Sit"} <cal', add_special_tokens=False).input_ids
    assert all(len(guide.allowed(words[:n])) == 0 and not guide.forced(words[:n]) for n in range(len(words)))
    assert form.begin.startswith(tokenizer.decode([260, *guide.forced([*words, 260])]))


def test_a_form_without_words_is_held_from_its_first_token():
    tokenizer = producers("llama3_1")
    form, engine = template_form(tokenizer), Engine(tokenizer, 260)
    guide = engine.calls(TOOLS, hand_on=False, optional=True, form=form).start()
    assert len(guide.allowed([])) == 0
    text = tokenizer("Hello", add_special_tokens=False).input_ids
    assert all(len(guide.allowed(text[:n])) == 0 for n in range(1, 6))
    assert tokenizer.decode(guide.forced(tokenizer("{", add_special_tokens=False).input_ids)).startswith('"name": "')


# ------------------------------------------------------------------------------------------------------------- the answer

FORM = CallForm(
    begin='<call>{"name": "',
    opens='", "arguments": {',
    key_begin='"',
    key_end='": ',
    closes="}",
    between='}</call>\n<call>{"name": "',
    end="}</call>",
    words=True,
)
ONE = '<call>{"name": "Sit", "arguments": {}}</call>'
ANSWERS = {
    ONE: (None, ["Sit"]),
    f"Ok, I sit. \n{ONE}": ("Ok, I sit.", ["Sit"]),
    f"{ONE}\n{ONE}": (None, ["Sit", "Sit"]),
    "a <call of duty> b": ("a <call of duty> b", []),
    f"{ONE} and more": (f"{ONE} and more", []),  # which a held answer never is
    f"x {ONE[:-3]}": (f"x {ONE[:-3]}", []),  # cut
    '<call>{"name": "Fly", "arguments": {}}</call>': ('<call>{"name": "Fly", "arguments": {}}</call>', []),
    "  words  ": ("  words  ", []),
    "": ("", []),
}


def builder(form=FORM):
    return ResponseBuilder(True, "m", 0, {}, TemplateCalls(TOOLS, form))


@pytest.mark.parametrize("form", [FORM, replace(FORM, words=False)], ids=["words", "no words"])
@pytest.mark.parametrize("text", ANSWERS)
def test_a_stream_is_the_whole_answer_however_it_is_cut(text, form):
    content, names = ANSWERS[text]
    if content and names and not form.words:
        content, names = text, []
    whole = builder(form).whole(text, [], "stop", {})["choices"][0]
    message = whole["message"]
    assert (message["content"], [call["function"]["name"] for call in message.get("tool_calls", [])]) == (content, names)
    assert whole["finish_reason"] == ("tool_calls" if names else "stop")
    for size in range(1, len(text) + 1):
        pieces, made = [text[n : n + size] for n in range(0, len(text), size)], builder(form)
        tokens = [Token(n, piece, piece, piece.encode(), 0.0, 0.0, 0.0) for n, piece in enumerate(pieces)]
        chunks = [chunk for token in tokens for chunk in made.chunks(token.text, [token])] + made.chunks("", [], "stop")
        choices = [chunk["choices"][0] for chunk in chunks]
        deltas = [choice["delta"] for choice in choices]
        assert "".join(delta.get("content") or "" for delta in deltas) == (content or "")
        called = [call for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
        assert [call["function"]["name"] for call in called] == names
        assert choices[-1]["finish_reason"] == whole["finish_reason"]
        assert sum(len(choice["logprobs"]["content"]) for choice in choices) == len(tokens)


@pytest.mark.parametrize("parser", [TemplateCalls(TOOLS, FORM), CallParser(TOOLS)], ids=["template", "compact"])
@pytest.mark.parametrize("text", ["上x", f"上 {ONE}", "[Sit()] 上"])
def test_tokens_that_are_part_of_a_character_keep_their_log_probabilities(text, parser):
    made = ResponseBuilder(True, "m", 0, {}, parser)
    tokens, read = [], b""
    for n, byte in enumerate(text.encode()):
        read += bytes([byte])
        piece = read.decode("utf-8", "ignore")
        read = b"" if piece else read
        tokens.append(Token(n, piece, piece, bytes([byte]), 0.0, 0.0, 0.0))
    chunks = [chunk for token in tokens for chunk in made.chunks(token.text, [token])] + made.chunks("", [], "stop")
    entries = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == text.encode()


def test_words_come_before_the_end_of_the_answer():
    made = builder()
    chunks = [chunk for piece in ("Ok, ", "I sit.\n", "<cal") for chunk in made.chunks(piece, [])]
    sent = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert sent == "Ok, I sit."



"""What a request's tools mean on this server: how its answer is held to them, and how its prompt is written."""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from shadowpeft.chat_template import render_prompt
from shadowpeft.data.action_trie import Actions
from shadowpeft.data.call_form import COMPACT, CallForm, template_form
from shadowpeft.data.call_guide import Engine, Grammar, RefusedSchemaError
from shadowpeft.data.calls import CallParser
from shadowpeft.data.template_calls import TemplateCalls
from shadowpeft.data.tool_grammar import MOST_CALLS
from shadowpeft.data.tool_rows import compact_messages, writes_calls
from shadowpeft.data.tools import Tools
from shadowpeft.decode import decode
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.generate import request_of
from shadowpeft.serve.protocol import ChatRequest, CompletionRequest
from shadowpeft.serve.router import Scores, parts_probability
from shadowpeft.serve.tool_protocol import NamedTool

SURE = 0.9
"""Probability of a name from which on it is told to the cloud as a hint."""
_KEPT = 32
"""Compiled grammars that are kept."""
_SCHEMAS = {"schema": "response_format", "calls or schema": "tools or response_format"}
"""Kind of grammar -> the fields that it is made from; of others ``tools``."""


class Toolbox:
    """The tools that a server's model can call, and the engine that holds answers to them.

    Args:
        tokenizer: the model's. vocabulary: rows of its head.
        known: what its model was trained to call in the compact form; None: nothing.
        template: whether other tools are written into the prompt, and called, as the model's chat template does it.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, known: Tools | None, *, template: bool) -> None:
        self.known, self._tokenizer, self.vocabulary, self._template = known, tokenizer, vocabulary, template
        self._own_form = template_form(tokenizer) if template else None
        self._engine: Engine | None = None
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, asked: ChatRequest | CompletionRequest) -> None:
        """Raises:
        DataError: if the request has tools that the model was not trained for, and that its chat template cannot tell it.
        """
        lacks = self.lacks(asked)
        wanted = isinstance(asked, ChatRequest) and asked.tool_choice != "none"
        if lacks is not None and wanted and self.form(asked) is COMPACT:
            if self.known is None:
                raise DataError(
                    f"tools has '{lacks}', but this server was told of no tools that its model knows (serve --skills), and "
                    f"{self._why_not()}; leave tools out"
                )
            if lacks in self.known.names:
                own = json.dumps(self.known.by_name[lacks].parameters, ensure_ascii=False)
                raise DataError(
                    f"tools has '{lacks}' with other arguments than this server's model was trained for; send its parameters "
                    f"as {own[:700]}, or leave it out"
                )
            raise DataError(
                f"tools has '{lacks}', which this server's model was not trained to call (but "
                f"{', '.join(self.known.names)[:200]}), and "
                f"{self._why_not()}; send what it knows, or leave it out"
            )

    def _why_not(self) -> str:
        """Why the chat template does not tell the model of other tools."""
        if not self._template:
            return "a device has no room for tools in its prompt"
        if writes_calls(self._tokenizer):
            return "its chat template writes calls in a form that this server does not read"
        return "its chat template writes no calls"

    def form(self, asked: ChatRequest | CompletionRequest) -> CallForm:
        """How the calls of an answer are written."""
        if self.lacks(asked) is None or self._own_form is None:
            return COMPACT
        return self._own_form

    def lacks(self, asked: ChatRequest | CompletionRequest) -> str | None:
        """The first of the request's tools that the model was not trained for."""
        if not isinstance(asked, ChatRequest) or asked.offered is None:
            return None
        return asked.offered[0].name if self.known is None else self.known.lack(asked.offered)

    def parser(self, asked: ChatRequest | CompletionRequest) -> CallParser | None:
        """What reads the calls of an answer to ``asked``; None: it may have none."""
        if not isinstance(asked, ChatRequest) or asked.tools is None or asked.tool_choice == "none":
            return None
        form = self.form(asked)
        if form is COMPACT:
            return CallParser(self.chosen(asked), asked.offered)
        return TemplateCalls(self.chosen(asked), form, asked.offered)

    def narrows(self, asked: ChatRequest | CompletionRequest) -> bool:
        """Whether an answer may call some of what the model was trained for, and not all of it."""
        if not isinstance(asked, ChatRequest) or asked.offered is None or self.known is None or self.lacks(asked) is not None:
            return False
        return set(self.chosen(asked).names) != set(self.known.names)

    def actions(self, asked: ChatRequest | CompletionRequest, *, device: bool, widely: bool = False) -> Actions | None:
        """What an answer to ``asked`` is held to; None: to nothing. Compiling takes up to a second, so not in the event loop.

        Args:
            device: the answer calls, or hands the request on. Otherwise ``tool_choice`` says whether it has to call.
            widely: to all that the model was trained for, where the request narrows it.

        Raises:
            ConfigError: if a schema is more than the engine knows, or the engine is not installed.
        """
        if not isinstance(asked, ChatRequest):
            return None
        form = None if asked.response_format is None else asked.response_format.schema_
        if asked.tools is None or asked.tool_choice == "none":
            return None if form is None else self._grammar(["schema", form], lambda engine: engine.schema(form))
        once = asked.parallel_tool_calls is False or isinstance(asked.tool_choice, NamedTool)
        tools = self.known if widely and self.known is not None else self.chosen(asked)
        most, free = 1 if once else MOST_CALLS, asked.calling == "auto"
        written = self.form(asked)
        if form is not None and free:
            key = ["calls or schema", tools.definitions(), most, form, written == COMPACT]
            return self._grammar(key, lambda engine: engine.schema(form, tools=tools, most=most, form=written))
        return self.calls(tools, device=device, most=most, optional=not device and free, form=written)

    def of(self, asked: ChatRequest) -> Tools | None:
        """The request's tools with the schemas that the model was trained for, so with their order of arguments.

        Those of the request itself if it was trained for others, and what it was trained for if the request has none.
        """
        if asked.offered is None or self.known is None:
            return asked.offered or self.known
        return asked.offered if self.lacks(asked) is not None else self.known.some(asked.offered.names)

    def chosen(self, asked: ChatRequest) -> Tools:
        """The tools that an answer may call."""
        tools = self.of(asked)
        assert tools is not None
        return tools if asked.called is None else tools.some(asked.called)

    def calls(
        self, tools: Tools, *, device: bool, most: int = MOST_CALLS, optional: bool = False, form: CallForm = COMPACT
    ) -> Grammar:
        """Calls of ``tools``, or on a device ``[REMOTE]``."""
        options: dict[str, Any] = {"hand_on": device, "most": most, "optional": optional}
        key = [tools.definitions(), options, form == COMPACT]
        return self._grammar(key, lambda engine: engine.calls(tools, **options, form=form))

    def prompt(self, turns: list[dict[str, Any]], asked: ChatRequest) -> str:
        """The prompt of a chat; raises as :func:`prompt_text`."""
        called = any("tool_calls" in turn for turn in turns)
        if self.form(asked) is COMPACT or asked.offered is None:
            tools = self.known or asked.offered
            if called and tools is not None and (self.known is not None or not writes_calls(self._tokenizer)):
                turns = compact_messages(turns, tools, "messages", strict=False)  # as training writes them
            return prompt_text(self._tokenizer, turns)
        if asked.tool_choice == "none" and not called:  # nothing would hold the answer
            return prompt_text(self._tokenizer, turns)
        try:
            return render_prompt(self._tokenizer, turns, tools=asked.offered.definitions())
        except TypeError as error:
            raise DataError("messages and tools cannot be written by the model's chat template; leave the tools out") from error

    def _grammar(self, key: Any, make: Callable[[Engine], Grammar]) -> Grammar:
        text = json.dumps(key, sort_keys=False)
        with self._lock:
            if self._engine is None:
                self._engine = Engine(self._tokenizer, self.vocabulary)
            if text not in self._compiled:
                try:
                    self._compiled[text] = make(self._engine)
                except RefusedSchemaError as error:
                    field = _SCHEMAS.get(key[0], "tools") if isinstance(key[0], str) else "tools"
                    raise ConfigError(f"{field} has a schema that the engine refuses ({error.clause}); simplify it") from error
                if len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(text)
            return self._compiled[text]


def call_probabilities(
    pieces: Sequence[str], scores: Scores, parser: CallParser
) -> tuple[list[dict[str, Any]], str | None]:
    """What the device thinks of each part of its calls, and the one name that it is sure of though the calls are not.

    Args:
        pieces, scores: of the tokens up to the end of the calls.
    """
    found = parser.found("".join(pieces))
    if found is None or not found.parts:
        return [], None
    told: list[dict[str, Any]] = []
    chances = parts_probability(pieces, scores, [part.start for part in found.parts])
    for part, chance in zip(found.parts, chances, strict=True):
        if part.argument is None:
            told.append({"name": found.calls[part.call].name, "probability": round(chance, 4), "arguments": {}})
        else:
            told[-1]["arguments"][part.argument] = round(chance, 4)
    sure = len(told) == 1 and bool(told[0]["arguments"]) and told[0]["probability"] >= SURE
    return told, told[0]["name"] if sure else None


class Saying:
    """An answer that is known: it is held to these tokens, which cost the model nothing."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def allowed(self, path: Sequence[int]) -> list[int]:
        return self._tokens[len(path) :][:1]

    def forced(self, path: Sequence[int]) -> list[int]:
        return self._tokens[len(path) :]

    def leaning(self, path: Sequence[int]) -> None:
        return None


def result_of(asked: ChatRequest | CompletionRequest) -> str | None:
    """What the tools have said, if nothing was said after them."""
    if not isinstance(asked, ChatRequest) or asked.messages[-1].role != "tool":
        return None
    last = itertools.takewhile(lambda message: message.role == "tool", reversed(asked.messages))
    return "\n".join(reversed([message.content for message in last]))


def must_call(asked: ChatRequest | CompletionRequest) -> bool:
    """Whether words are no answer."""
    if not isinstance(asked, ChatRequest) or asked.tools is None:
        return False
    return asked.calling == "required"


def request_text(asked: ChatRequest | CompletionRequest, tokenizer: Any) -> str:
    """What is asked for: the last user message; of a completion its prompt."""
    if isinstance(asked, ChatRequest):
        return request_of([{"role": m.role, "content": m.content} for m in asked.messages])
    (prompt,) = asked.prompt
    return prompt if isinstance(prompt, str) else decode(tokenizer, prompt)


def prompt_text(tokenizer: Any, turns: list[dict[str, Any]]) -> str:
    """The prompt of a chat without tools.

    Raises:
        DataError: if the template does not write the calls of a turn.
    """
    try:
        text = render_prompt(tokenizer, turns)
    except TypeError as error:  # of a template that wants the arguments of a call in another form
        raise DataError(
            "messages have tool calls that the model's chat template cannot write; leave them out"
        ) from error
    if any("tool_calls" in turn for turn in turns):
        bare = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
        if text == render_prompt(tokenizer, bare):
            raise DataError("messages have tool calls that the model's chat template does not write; leave them out")
    return text

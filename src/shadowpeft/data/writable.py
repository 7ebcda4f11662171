"""Whether a device, whose answers are held to a grammar, can write the calls of given tools; looked at before it is trained."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from shadowpeft.data.calls import Answered, answered
from shadowpeft.data.tool_grammar import MOST_CALLS, calls_grammar, refusal
from shadowpeft.data.tools import ABOUT, Tool, Tools
from shadowpeft.errors import ConfigError
from shadowpeft.messages import quote
from shadowpeft.versions import require_llguidance

_KNOWN = ABOUT | {"type", "properties", "required", "additionalProperties"}
"""What the schema of a tool's arguments may say beside what it says of each argument."""
_CALL = re.compile(r"\s*(\[\s*)?([^\W\d][\w-]*)\s*\(")


def _with_one(tool: Tool, argument: str) -> Tool:
    """The tool with one of its arguments alone."""
    schema = {key: value for key, value in tool.parameters.items() if key != "required"}
    return Tool(tool.name, "", {**schema, "properties": {argument: tool.properties[argument]}})


class Writable:
    """The grammar of ``tools`` over bytes, without a model's tokenizer.

    Raises:
        ConfigError: naming what holds the tools, and the tool with its argument, if a schema says what calls cannot be held to;
            or if ``llguidance`` is not installed.
    """

    def __init__(self, tools: Tools) -> None:
        require_llguidance()
        from llguidance import LLMatcher, LLTokenizer

        self.tools = tools
        for tool in tools:
            other = sorted(tool.parameters.keys() - _KNOWN)
            if other:
                raise ConfigError(
                    f"{tools.where} has the tool {tool.name} with '{other[0]}' beside its properties, which a call cannot be "
                    "held to; say it in the schemas of the arguments, or leave it out"
                )
        bytewise = LLTokenizer("byte")

        def matcher(some: Iterable[Tool]) -> Any:
            return LLMatcher(bytewise, calls_grammar(Tools(some), hand_on=True), log_level=0)

        for tool in tools:  # alone, so that the one which is refused can be named, and its argument
            if matcher([tool]).is_error():
                alone = ((name, matcher([_with_one(tool, name)])) for name in tool.properties)
                name, refused = next(((name, each) for name, each in alone if each.is_error()), ("", matcher([tool])))
                problem = refusal(refused.get_error()).removeprefix("failed to compile JSON schema: ")
                raise ConfigError(
                    f"{tools.where} has the tool {tool.name} with a schema that calls cannot be held to"
                    f"{f' in its argument {name}' if name else ''} ({problem}); simplify the schema"
                )
        self._first = matcher(tools)

    def problem(self, text: str) -> str | None:
        """Why an answer cannot begin with ``text``, calls in the compact form; None if it can."""
        matcher, held = self._first.deep_copy(), text.encode()
        fits = matcher.try_consume_tokens(list(held))
        if fits == len(held):
            return None
        return f"a device cannot write it beyond {quote(held[:fits].decode(errors='ignore')[-60:])}"

    def read(self, text: str) -> Answered | None:
        """The calls that an answer of a row begins with; None: it begins with words.

        Raises:
            ConfigError: a clause that goes on after the place of the row, if it begins as a call does and is none, or is one
                that a device cannot write.
        """
        found = answered(text, self.tools)
        if found is None:
            begins = _CALL.match(text)
            if begins is not None and (begins[1] or begins[2] in self.tools.by_name):
                raise ConfigError(
                    f"begins with {quote(text[:60])}, which is no valid call of {', '.join(self.tools.names)[:200]} in the "
                    "compact form of docs/tools.md"
                )
            return None
        problem = self.problem(f"[{found.text}]")
        if problem is not None:
            limits = f"at most {MOST_CALLS} calls, and the lengths of docs/tools.md"
            raise ConfigError(f"calls {quote(found.text[:100])}, but {problem} ({limits})")
        return found

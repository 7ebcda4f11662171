"""Prompts, answers and ends as a tokenizer's chat template writes them; no model is needed, and nothing of a data file."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from shadowpeft.errors import DataError
from shadowpeft.json_text import parse_json
from shadowpeft.messages import quote

_PROBE = {"probe": 1}
_WANT_OBJECTS: dict[str, bool] = {}
"""Whether a chat template wants the arguments of a call as an object."""


class RefusedByTemplate(DataError):
    """A chat template refuses the messages that it was given."""


def render_prompt(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text up to where the assistant's answer begins, by the tokenizer's chat template.

    Args:
        options: for the template, such as ``tools``.

    Raises:
        DataError: if the tokenizer has no chat template or only named ones, or its template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, so prompts cannot be rendered or masked; set data.chat_template in the run "
            "file (plain, or a file with one), or tokenizer.chat_template, or use an instruction-tuned base"
        )
    return render(tokenizer, messages, add_generation_prompt=True, **options)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """The text of a whole chat.

    Raises:
        DataError: if the tokenizer has only named templates, its template refuses the messages, or a call has no object of
            arguments.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named and not (options.get("tools") and "tool_use" in named):
        raise DataError(
            f"the tokenizer has the chat templates {', '.join(sorted(named))} but none is called 'default'; set "
            f"tokenizer.chat_template = tokenizer.chat_template['{min(named)}'], or another of them, and save the tokenizer"
        )
    messages = _with_arguments(tokenizer, messages)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **{"enable_thinking": False, **options}))
    except TypeError as error:  # of what a template writes as JSON
        raise RefusedByTemplate(f"the chat template cannot write a message ({error}); correct it") from error
    except TemplateError as error:
        if isinstance(error, TemplateSyntaxError):
            raise DataError(f"the chat template of the tokenizer cannot be read ({error}); correct it") from error
        roles = ", ".join(m["role"] for m in messages)
        raise RefusedByTemplate(
            f"the chat template refuses messages with the roles {roles} ({error}); reorder them"
        ) from error


def _with_arguments(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as the template wants them: as an object, or as its JSON text.

    OpenAI's API has a text, and most templates write ``arguments | tojson``, which would quote it once more.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    key = str(tokenizer.chat_template)
    if key not in _WANT_OBJECTS:
        _WANT_OBJECTS[key] = _wants_objects(tokenizer)
    return [
        {**message, "tool_calls": [_wanted(call, as_object=_WANT_OBJECTS[key]) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _wanted(call: Any, *, as_object: bool) -> Any:
    """Raises:
    DataError: if the arguments are no object.
    """
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _wanted(call["function"], as_object=as_object)}
    given = arguments = call.get("arguments")
    if isinstance(given, str):
        try:
            arguments = parse_json(given or "{}")
        except ValueError:
            arguments = None
    if given is None:
        arguments = given = {}
    if not isinstance(arguments, dict):
        raise RefusedByTemplate(
            f"a call of {call.get('name')} has the arguments {quote(given)}, which are no JSON object; give an object, or its "
            "text"
        )
    if not as_object:
        arguments = given if isinstance(given, str) and given else json.dumps(arguments, ensure_ascii=False)
    return {**call, "arguments": arguments}


def _wants_objects(tokenizer: Any) -> bool:
    """Whether the template can write arguments that are an object, or else wants their text."""
    function = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "call00001", "type": "function", "function": {"name": "probe", "arguments": _PROBE}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, tools=[{"type": "function", "function": function}])
    except (TemplateError, TypeError):
        return False
    return str(_PROBE) not in str(text)  # as Python would show it


def written_answer_ids(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    prompt: str,
    answer: str,
    beside: dict[str, Any] | None = None,
    **options: Any,
) -> list[int]:
    """Tokens of the answer, and what it has ``beside`` its text, with what closes a turn, as the template writes it."""
    whole = render(tokenizer, [*messages, {"role": "assistant", "content": answer, **(beside or {})}], **options)
    if whole.startswith(prompt):
        tail = whole[len(prompt) :].rstrip("\n")
    elif beside:
        raise DataError(
            f"the tokenizer's chat template rewrites the prompt of an answer with {', '.join(beside)}, so where the answer "
            "begins is unknown; use another template or leave them out"
        )
    else:  # templates that rewrite what precedes the answer (thinking blocks): close the turn by hand
        tail = answer + (tokenizer.eos_token or "")
    ids = list(tokenizer(tail, add_special_tokens=False).input_ids)
    if (not ids or not is_special(tokenizer, ids[-1])) and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)  # a template that closes no turn: nothing else would teach where to stop
    return ids


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether a token is one that no text is made of, such as the end of a turn."""
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the model's own, and what the chat template closes a turn with."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "a"}]
        closing = written_answer_ids(tokenizer, turn, render_prompt(tokenizer, turn), "a")[-1]
        ends |= {closing} if is_special(tokenizer, closing) else set()
    return sorted(token for token in ends if token is not None)

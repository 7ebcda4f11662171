"""Ollama's ``Modelfile`` beside a GGUF file: chat template in Ollama's own language, system message, where an answer ends.

Ollama reads no Jinja; it wants a Go template. The pieces of text around each message are found by rendering chats with the
tokenizer's own template, and what the Go template will write is compared with that template on chats of every shape that
Ollama sends. Where the two differ, there is no Modelfile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shadowpeft.chat_template import render
from shadowpeft.errors import ConfigError, DataError, UnsupportedModelError
from shadowpeft.messages import quote
from shadowpeft.storage import written_whole

_SYSTEM, _USER, _ASSISTANT, _SECOND = ("Qsystemq", "Quserq", "Qassistantq", "Qsecondq")
"""Texts that stand for messages; nothing else in a template looks like them."""


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around messages."""

    no_system: str
    """Before the first message of a chat without a system message: often a default one."""
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    """Before and after the text of a message."""
    answer: str
    """After all messages: where the answer begins."""

    def text(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a chat, as :func:`go_template` writes it."""
        parts = [] if messages[0]["role"] == "system" else [self.no_system]
        for message in messages:
            before, after = getattr(self, message["role"])
            parts += [before, message["content"], after]
        return "".join([*parts, self.answer])


def pieces(tokenizer: Any) -> Pieces:
    """The pieces of the tokenizer's chat template.

    Raises:
        UnsupportedModelError: if it has none, or the pieces do not give what it writes.
    """
    if tokenizer.chat_template is None:
        raise UnsupportedModelError("the tokenizer has no chat template, so Ollama cannot be told how a chat is written")
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer, second = {"role": "assistant", "content": _ASSISTANT}, {"role": "user", "content": _SECOND}
    try:
        found = _pieces(tokenizer, system, user, answer, second)
        chats = [[user], [system, user], [user, answer, second], [system, user, answer, second]]
        same = all(found.text(chat) == _without_bos(tokenizer, _prompt(tokenizer, chat)) for chat in chats)
    except (DataError, ValueError) as error:
        raise UnsupportedModelError(
            f"the chat template cannot be taken apart ({error}), so Ollama cannot be told how a chat is written"
        ) from error
    if not same or any("{{" in piece or '"""' in piece for piece in _flat(found)):
        raise UnsupportedModelError(
            "the chat template writes more than a text before and after each message, which a Modelfile does not express"
        )
    return found


def _prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return render(tokenizer, messages, add_generation_prompt=True)


def _without_bos(tokenizer: Any, text: str) -> str:
    """Ollama puts the token that begins a text there itself, as the GGUF file says."""
    ids, bos = tokenizer("a").input_ids, tokenizer.bos_token
    return text.removeprefix(bos) if bos is not None and ids[0] == tokenizer.bos_token_id else text


def _pieces(tokenizer: Any, system: Any, user: Any, answer: Any, second: Any) -> Pieces:
    """ValueError where a message's text is not in what is rendered, or a piece is not where it was."""
    alone = _without_bos(tokenizer, render(tokenizer, [user]))
    head, after_user = alone.split(_USER)
    begin = _cut(_without_bos(tokenizer, _prompt(tokenizer, [user])), alone)
    _, rest = _prompt(tokenizer, [user, answer, second]).split(_USER)
    before_answer, rest = rest.split(_ASSISTANT)
    _, after_answer = render(tokenizer, [user, answer]).split(_ASSISTANT)
    before_user = _cut(rest.split(_SECOND)[0], after_answer)
    with_system = _without_bos(tokenizer, _prompt(tokenizer, [system, user]))
    before_system, rest = with_system.split(_SYSTEM)
    return Pieces(
        no_system=_cut_end(head, before_user),
        system=(before_system, _cut_end(rest.split(_USER)[0], before_user)),
        user=(before_user, after_user),
        assistant=(_cut(before_answer, after_user), after_answer),
        answer=begin,
    )


def _cut(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text!r} does not begin with {start!r}")
    return text[len(start) :]


def _cut_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{text!r} does not end with {end!r}")
    return text[: len(text) - len(end)]


def _flat(found: Pieces) -> list[str]:
    return [found.no_system, *found.system, *found.user, *found.assistant, found.answer]


def go_template(found: Pieces) -> str:
    """The pieces as a template of Go's text/template over Ollama's ``.Messages``."""
    roles = "".join(
        f'{{{{ {"else if" if place else "if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for place, (role, (before, after)) in enumerate(
            (("system", found.system), ("user", found.user), ("assistant", found.assistant))
        )
    )
    first = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{found.no_system}{{{{ end }}}}' if found.no_system else ""
    return f"{{{{ range $i, $m := .Messages }}}}{first}{roles}{{{{ end }}}}{{{{ end }}}}{found.answer}"


def system_line(tokenizer: Any, found: Pieces, system: str | None) -> str:
    """The line that gives chats which bring no system message the one of the training; empty if it had none.

    Raises:
        UnsupportedModelError: if the message holds what ends a quotation, or the template changes it.
    """
    if not system:
        return ""
    user = {"role": "user", "content": _USER}
    expected = _without_bos(tokenizer, _prompt(tokenizer, [{"role": "system", "content": system}, user]))
    for text in (system, system.strip()):  # which many templates do, and Ollama's does not
        if '"""' not in text and found.text([{"role": "system", "content": text}, user]) == expected:
            return f'SYSTEM """{text}"""\n'
    raise UnsupportedModelError(
        f"the model was trained with the system message {quote(system)}, which a Modelfile does not express: it holds "
        'three quotation marks in a row (""") or the chat template changes it'
    )


def modelfile(gguf: str, found: Pieces, ends: Sequence[str], system: str = "") -> str:
    """The text of a Modelfile for the file ``gguf`` beside it.

    Args:
        ends: the tokens at which an answer ends. system: what :func:`system_line` gave.
    """
    stops = "".join(f'PARAMETER stop "{end}"\n' for end in ends)
    return f'FROM ./{gguf}\nTEMPLATE """{go_template(found)}"""\n{system}{stops}PARAMETER temperature 0\n'


def place(file: Path, tokenizer: Any, ends: Sequence[str], system: str | None = None) -> tuple[Path, str]:
    """Where the Modelfile of the GGUF ``file`` belongs (``edge.gguf``: ``edge.Modelfile``, beside it), and its text.

    Args:
        system: the message of chats that bring none, with which the model was trained.

    Raises:
        ConfigError: if another file stands there.
        UnsupportedModelError: if the tokenizer's chat template or the system message cannot be written for Ollama.
    """
    found = pieces(tokenizer)
    text = modelfile(file.name, found, ends, system_line(tokenizer, found, system))
    path = file.with_suffix(".Modelfile")
    if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
        raise ConfigError(
            f"'{path}', where the Modelfile of '{file.name}' goes, exists and says something else; move it away, or choose "
            "another name for the export"
        )
    return path, text


def write(file: Path, tokenizer: Any, ends: Sequence[str], system: str | None = None) -> Path:
    """Write the Modelfile of the GGUF ``file`` beside it and return its path; one that is the same is left as it is.

    Raises:
        ConfigError, UnsupportedModelError: as :func:`place`.
        ShadowPeftError: if it cannot be written.
    """
    path, text = place(file, tokenizer, ends, system)
    if path.exists():
        return path
    remedy = "free some space or choose another folder"
    with written_whole(path, "the Modelfile", remedy, folder=False, replace=False) as beside:
        beside.write_text(text, encoding="utf-8")
    return path

"""The tokenizer of a base, an edge model or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.aliases import looked_up, source_of
from shadowpeft.messages import shorten

PLAIN = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)
"""A chat template for bases that have none: a heading for each turn, and the end of text after an answer. Where a tokenizer
begins every text with a token, that comes first."""


class Readable:
    """Turns what a damaged tokenizer raises into a :class:`ConfigError` that starts with ``what``.

    The library behind the fast tokenizers raises ``Exception`` itself, which no ``except`` can name without naming all.

    Args:
        private: a path that is nobody's business and is left out of the message. advice: what follows it.
    """

    def __init__(self, what: str, private: str = "", advice: str = "") -> None:
        self.what, self.private, self.advice = what, private, advice

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and (kind is Exception or isinstance(error, (OSError, ValueError, KeyError, TypeError))):
            reason = shorten(error).replace(self.private, "its folder") if self.private else shorten(error)
            raise ConfigError(f"{self.what} could not be loaded: {reason}{self.advice}") from error


def load_tokenizer(name: str, template: str | None = None) -> Any:
    """The tokenizer of an alias, a folder or a Hub id, with a pad token.

    Args:
        template: a chat template in the place of its own: "plain" (:data:`PLAIN`), or a file with one.

    Raises:
        ConfigError: if it cannot be loaded, or has neither a pad nor an eos token; if the template cannot be read or used.
    """
    source = source_of(name)
    with Readable(f"the tokenizer of '{name}'", advice=looked_up(name)):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of '{name}' has neither a pad nor an eos token; give it one of them")
        tokenizer.pad_token = tokenizer.eos_token
    if template is not None:
        _give_template(tokenizer, template)
    return tokenizer


def _give_template(tokenizer: Any, name: str) -> None:
    if name == "plain":
        if tokenizer.eos_token is None:
            raise ConfigError("data.chat_template is 'plain' but the tokenizer has no eos token to end turns; give a file")
        first = tokenizer("a").input_ids[:1]
        begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        tokenizer.chat_template = "{{ bos_token }}" * begins + PLAIN
        return
    try:
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.chat_template is '{name}', which is no readable file ({shorten(error)}); give a file, or plain"
        ) from error
    turns = [{"role": "user", "content": "zebra 7"}, {"role": "assistant", "content": "quartz 9"}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise ConfigError(f"the chat template '{name}' cannot be used: {shorten(error)}; correct it") from error
    if not ("zebra 7" in text and "quartz 9" in text):
        raise ConfigError(f"the chat template '{name}' does not write what messages say; correct it")

"""Chat data: JSONL rows to token sequences with the prompt masked, and the collator that pads them.

A row is ``{"messages": [...]}`` or ``{"prompt": ..., "response": ...}``. Two optional keys address the two paths:
``"shadow_response"`` gives the shadow path another answer to the same prompt; ``"path"`` ("both", "base", "shadow") says
who learns the row. A row with both answers becomes two sequences, each masking the other path.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from shadowpeft.core.losses import IGNORE
from shadowpeft.data.padding import pad, pad_inputs
from shadowpeft.errors import DataError

PATHS = ("both", "base", "shadow")
_KEYS = ("messages", "prompt", "response", "shadow_response", "path")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, each a checked chat row.

    Raises:
        DataError: naming file and line, if the file is missing or empty or a row is malformed.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"data file '{file}' does not exist; check the path")
    rows = []
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                rows.append(check_row(_parse(line, f"{file}, line {number}"), f"{file}, line {number}"))
    if not rows:
        raise DataError(f"data file '{file}' holds no rows; each line must be one JSON object")
    return rows


def _parse(line: bytes, where: str) -> Any:
    try:
        content = json.loads(line.decode("utf-8-sig"))  # a byte-order mark, as some editors write, is no data
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where} holds half a surrogate pair (\\ud800 to \\udfff), which is no character") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error.msg} at column {error.colno})") from error
    return content


def check_row(row: Any, where: str) -> dict[str, Any]:
    """A row in the one normal form ``{"messages", "response", "shadow_response", "path"}``.

    Raises:
        DataError: starting with ``where``, if something is missing or of the wrong type.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is a JSON {type(row).__name__} but must be an object")
    for key in row:
        if key not in _KEYS and difflib.get_close_matches(key, ["shadow_response"], n=1, cutoff=0.85):
            raise DataError(f"{where} has the key '{key}'; did you mean 'shadow_response'?")
    if "messages" in row and ("prompt" in row or "response" in row):
        raise DataError(f"{where} has 'messages' and also 'prompt' or 'response'; keep one form")
    if "messages" in row:
        messages = row["messages"]
        good = isinstance(messages, list) and bool(messages)
        good = good and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not good:
            raise DataError(f"{where}: 'messages' must be a list of objects with string 'role' and 'content'")
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(f"{where}: 'messages' must end with an 'assistant' message after at least one other")
        history, response = messages[:-1], messages[-1]["content"]
    elif "prompt" in row and "response" in row:
        if not isinstance(row["prompt"], str) or not isinstance(row["response"], str):
            raise DataError(f"{where}: 'prompt' and 'response' must be strings")
        history, response = [{"role": "user", "content": row["prompt"]}], row["response"]
    else:
        raise DataError(f"{where} has the keys {sorted(row)[:6]} but needs 'messages', or 'prompt' and 'response'")
    shadow, path = row.get("shadow_response"), row.get("path", "both")
    if shadow is not None and not isinstance(shadow, str):
        raise DataError(f"{where}: 'shadow_response' must be a string")
    if path not in PATHS:
        raise DataError(f"{where}: 'path' is {path!r} but must be one of {', '.join(PATHS)}")
    if shadow is not None and path != "both":
        raise DataError(f"{where}: 'shadow_response' with path '{path}' contradicts itself; leave one out")
    return {"messages": history, "response": response, "shadow_response": shadow, "path": path}


def fingerprint(rows: Iterable[dict[str, Any]]) -> str:
    """sha256 over the rows, in order: identifies the data of a run."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def render_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The text up to where the assistant's answer begins, by the tokenizer's chat template.

    Raises:
        DataError: if the tokenizer has no chat template, or its template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, so prompts cannot be rendered or masked; set tokenizer.chat_template or "
            "use an instruction-tuned base"
        )
    return _render(tokenizer, messages, add_generation_prompt=True)


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **options))
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"the chat template refuses messages with the roles {roles} ({error}); reorder them") from error


@dataclass
class Sequence:
    """One training sequence: ``ids``, and where the answer starts; which paths learn it."""

    ids: list[int]
    start: int
    base: bool
    shadow: bool

    def features(self) -> dict[str, Any]:
        """``input_ids``, ``labels`` and ``shadow_labels``, prompt tokens masked with -100, and ``length``."""
        target = [IGNORE] * self.start + self.ids[self.start :]
        nothing = [IGNORE] * len(self.ids)
        return {
            "input_ids": self.ids,
            "labels": target if self.base else nothing,
            "shadow_labels": target if self.shadow else nothing,
            "length": len(self.ids),
        }


def encode(
    rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int, too_long: str = "error", system: str | None = None
) -> list[Sequence]:
    """Tokenise checked rows.

    Args:
        max_length: longest sequence in tokens. too_long: "error", or "skip" to leave longer rows out.
        system: a system message to put before rows that bring none.

    Raises:
        DataError: if a row is longer and ``too_long`` is "error", or nothing is left.
    """
    sequences: list[Sequence] = []
    skipped = 0
    for index, row in enumerate(rows):
        messages = with_system(row["messages"], system)
        prompt = render_prompt(tokenizer, messages)
        head = tokenizer(prompt, add_special_tokens=False).input_ids
        answers = [(row["response"], row["path"] in ("both", "base"), row["path"] in ("both", "shadow"))]
        if row["shadow_response"] is not None:
            answers = [(row["response"], True, False), (row["shadow_response"], False, True)]
        for text, base, shadow in answers:
            tail = _answer_ids(tokenizer, messages, prompt, text)
            if len(head) + len(tail) > max_length:
                if too_long == "error":
                    raise DataError(
                        f"row {index + 1} has {len(head) + len(tail)} tokens but data.max_length is {max_length}; raise "
                        "max_length, shorten the row, or set data.too_long: skip"
                    )
                skipped += 1
                continue
            sequences.append(Sequence(head + tail, len(head), base, shadow))
    if not sequences:
        raise DataError(f"no row is left: all {skipped} are longer than data.max_length = {max_length}")
    return sequences


def with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """``messages`` with ``system`` in front, unless they bring a system message of their own."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Tokens of :func:`render_prompt`."""
    return list(tokenizer(render_prompt(tokenizer, messages), add_special_tokens=False).input_ids)


def answer_ids(tokenizer: Any, messages: list[dict[str, str]], answer: str, *, closed: bool = True) -> list[int]:
    """Tokens of an answer to ``messages`` as training sees them; without ``closed``, those that end the turn left out."""
    ids = _answer_ids(tokenizer, messages, render_prompt(tokenizer, messages), answer)
    while not closed and len(ids) > 1 and _is_special(tokenizer, ids[-1]):
        ids = ids[:-1]
    return ids


def _answer_ids(tokenizer: Any, messages: list[dict[str, str]], prompt: str, answer: str) -> list[int]:
    """Tokens of the answer with what closes a turn, as the template writes it."""
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if whole.startswith(prompt):
        tail = whole[len(prompt) :].rstrip("\n")
    else:  # templates that rewrite what precedes the answer (thinking blocks): close the turn by hand
        tail = answer + (tokenizer.eos_token or "")
    ids = list(tokenizer(tail, add_special_tokens=False).input_ids)
    if (not ids or not _is_special(tokenizer, ids[-1])) and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)  # a template that closes no turn: nothing else would teach where to stop
    return ids


def _is_special(tokenizer: Any, token: int) -> bool:
    return token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the model's own, and what the chat template closes a turn with."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    if tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": "a"}]
        closing = _answer_ids(tokenizer, turn, render_prompt(tokenizer, turn), "a")[-1]
        ends |= {closing} if _is_special(tokenizer, closing) else set()
    return sorted(token for token in ends if token is not None)


class ChatCollator:
    """Pads a batch of :meth:`Sequence.features` on the right to its longest row.

    Args:
        pad_token_id: token for padding; padded positions are masked in attention and labels.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` and ``shadow_labels``; all ``(B, T)``."""
        batch = pad_inputs([f["input_ids"] for f in features], self.pad_token_id)
        return {**batch, **{key: pad([f[key] for f in features], IGNORE) for key in ("labels", "shadow_labels")}}


class ChatDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded sequences for a Trainer."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sequences[index].features()

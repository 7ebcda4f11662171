"""Every answer of a conversation as a target, where the chat template writes earlier turns as it writes the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shadowpeft.chat_template import is_special, render, render_prompt
from shadowpeft.errors import DataError


def turn_spans(
    tokenizer: Any, turns: list[dict[str, Any]], learnt: Sequence[int], where: str, options: dict[str, Any]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a whole conversation, and where each learnt answer begins and ends, the end of its turn included.

    Each piece between two borders is tokenised alone, as a prompt and its answer are, so a server that goes on with the
    conversation reads the same tokens.

    Args:
        turns: the messages, the last one an answer. learnt: indices of the answers that are learnt, ascending, not the first's.
        options: for the template, such as ``tools``.

    Raises:
        DataError: starting with ``where``, if the template writes an earlier turn otherwise than the last one.
    """
    ids: list[int] = []
    spans = []
    done = ""
    for n in learnt:
        prompt = render_prompt(tokenizer, turns[:n], **options)
        closed = render(tokenizer, turns[: n + 1], **options)
        if not prompt.startswith(done) or not closed.startswith(prompt):
            raise DataError(
                f"{where}: the tokenizer's chat template writes an answer otherwise once the conversation goes on (it may "
                "drop what was thought), so not every turn can be learnt; set data.assistant_only_loss: false, or "
                "make a row of each turn"
            )
        ids += tokenizer(prompt[len(done) :], add_special_tokens=False).input_ids
        begin, tail = len(ids), closed[len(prompt) :].rstrip("\n")
        ids += tokenizer(tail, add_special_tokens=False).input_ids
        if (len(ids) == begin or not is_special(tokenizer, ids[-1])) and tokenizer.eos_token_id is not None:
            if n < learnt[-1]:
                raise DataError(
                    f"{where}: the tokenizer's chat template does not close an answer, so an earlier turn has no end to learn; "
                    "set data.assistant_only_loss: false"
                )
            ids.append(tokenizer.eos_token_id)
        spans.append((begin, len(ids)))
        done = prompt + tail
    return ids, spans

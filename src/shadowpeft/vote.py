"""The vote of an attached model's own shadow on what an answer begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from shadowpeft.constrained import choose
from shadowpeft.data.action_trie import Actions, ActionTrie
from shadowpeft.data.declined import Beginnings, Vote
from shadowpeft.generate import chats_of
from shadowpeft.hf.forward.alone import ShadowAlone


def votes(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[list[dict[str, str]]],
    actions: ActionTrie,
    *,
    calls: Actions | None = None,
    system: str | None = None,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Vote]:
    """What the shadow of ``model`` would do, for :func:`shadowpeft.generate.answer`: ``answer(..., actions=votes(...))``.

    The attached model then answers freely, but an answer begins with an action as likely as both together say
    (:class:`~shadowpeft.data.declined.Voted`).

    Args:
        model: attached; see :class:`~shadowpeft.hf.forward.alone.ShadowAlone`.
        prompts, system: as they will be given to ``answer``. actions: the known ones; of tools with arguments their names.
        calls: of tools with arguments, what an answer that begins a call is held to
            (:meth:`~shadowpeft.data.call_guide.Engine.calls`, ``optional``). The shadow weighs whether there is a call.
        progress: called with the number of prompts done after each batch.

    Returns:
        the vote on each prompt, in their order.

    Raises:
        ConfigError: as :func:`~shadowpeft.constrained.choose`.
        DataError: if a prompt with the longest action does not fit the model.
    """
    alone, chats = ShadowAlone(model), chats_of(prompts, system)
    found = choose(alone, tokenizer, chats, actions, batch_size=batch_size, progress=progress)
    begin = Beginnings.of(tokenizer, alone.config.get_text_config().vocab_size)
    return [Vote(begin, actions, chosen.probabilities or {}, calls) for chosen in found]

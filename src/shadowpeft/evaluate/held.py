"""What answers are worth that are held to the known actions, or to calls of known tools, as the servers hold them."""

from __future__ import annotations

from typing import Any

from torch import nn

from shadowpeft.constrained import choose
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.call_form import COMPACT
from shadowpeft.data.call_guide import Engine, Grammar
from shadowpeft.data.declined import Vote
from shadowpeft.data.second_opinion import SecondOpinion
from shadowpeft.data.tasks import Example, Task
from shadowpeft.data.tasks.calling import Calling
from shadowpeft.evaluate.scores import wilson
from shadowpeft.generate import answer
from shadowpeft.vote import votes


def worth(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    examples: list[Example],
    batch_size: int,
    *,
    alone: bool,
    opinion: SecondOpinion | None = None,
) -> dict[str, Any]:
    """Scores of the action that is likeliest among all of the task's and ``[REMOTE]``, or of answers that are held to calls.

    Args:
        alone: as on a device, each answer calls or hands on. Otherwise it may be words, and is held from where it begins a
            call, as the cloud does with ``tool_choice: auto``. opinion: weighs actions.

    Raises:
        ConfigError: if an argument's schema says what the engine does not know, or the engine is not installed.
    """
    if not isinstance(task, Calling):
        actions = ActionTrie.of(tokenizer, task.actions, opinion)
        found = choose(model, tokenizer, [task.chat(e) for e in examples], actions, batch_size=batch_size)
        return _scored(task, [c.action for c in found], examples)
    grammar = _grammar(model, tokenizer, task, alone=alone)
    answers = answer(
        model,
        tokenizer,
        [task.chat(e) for e in examples],
        max_new_tokens=task.max_new_tokens,
        batch_size=batch_size,
        actions=grammar,
        template=[task.told] * len(examples),
    )
    return _scored(task, [task.parse(a.text) for a in answers], examples)


def voted(model: nn.Module, tokenizer: Any, task: Task, examples: list[Example]) -> list[Vote]:
    """The vote of an attached model's shadow on each example."""
    calls = _grammar(model, tokenizer, task, alone=False) if isinstance(task, Calling) else None
    names = task.tools.names if isinstance(task, Calling) else task.actions
    return votes(model, tokenizer, [task.chat(e) for e in examples], ActionTrie.of(tokenizer, names), calls=calls)


def may_vote(task: Task) -> bool:
    """Whether there is something that a shadow could weigh: actions, or calls that begin an answer."""
    return task.form is COMPACT if isinstance(task, Calling) else bool(task.actions)


def _grammar(model: nn.Module, tokenizer: Any, task: Calling, *, alone: bool) -> Grammar:
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return Engine(tokenizer, vocabulary).calls(task.tools, hand_on=alone, optional=not alone, form=task.form)


def holds(task: Task, mode: str) -> bool:
    """Whether a server holds the answers of this mode: a device those to actions, both halves those to calls."""
    if isinstance(task, Calling):
        return mode == "attached" or (mode == "detached" and task.form is COMPACT)  # no edge writes tools into a prompt
    return bool(task.actions) and mode == "detached"


def _scored(task: Task, predictions: list[Any], examples: list[Example]) -> dict[str, Any]:
    scores = task.score(predictions, examples)
    values = [task.per_example(p, e) for p, e in zip(predictions, examples, strict=True)]
    return {"score": scores["score"], "interval": list(wilson(int(sum(values)), len(values))), "scores": scores}

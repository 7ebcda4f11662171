"""Whether the exported file says what the source says: greedy tokens and logits on a fixed list of prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shadowpeft.data.chat import prompt_ids

PROMPTS = (
    "Sit down, please.",
    "What is the capital of France?",
    "站起来,好吗?",
    "Dance for the guests!",
    "Why is the sky blue?",
    "Please say hello to my friend Anna.",
    "12 + 30 =",
    "Turn left and then lie down.",
)
NEW_TOKENS = 16


def encode_prompts(tokenizer: Any, prompt: str, system: str | None = None) -> list[int]:
    """Token ids of a prompt: a user's turn after ``system`` where the tokenizer has a chat template, else the bare text."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt).input_ids)
    first = [{"role": "system", "content": system}] if system else []
    return prompt_ids(tokenizer, [*first, {"role": "user", "content": prompt}])


@torch.no_grad()
def weight_error(source: nn.Module, target: nn.Module) -> float:
    """The largest ``||W' - W|| / ||W||`` of a matrix, ``W`` of ``source`` and ``W'`` of ``target``, by name."""
    theirs, largest = target.state_dict(), 0.0
    for name, weight in source.state_dict().items():
        if weight.dim() == 2:
            other = theirs[name]
            plain = other.dequantize() if hasattr(other, "qdata") else other  # torchao's
            norm = weight.float().norm().clamp(min=1e-12)
            largest = max(largest, float((plain.float().cpu() - weight.float().cpu()).norm() / norm.cpu()))
    return largest


@torch.inference_mode()
def compare(
    source: Any,
    target: Any,
    tokenizer: Any,
    kept: Tensor | None = None,
    *,
    prompts: tuple[str, ...] = PROMPTS,
    new_tokens: int = NEW_TOKENS,
    system: str | None = None,
) -> dict[str, Any]:
    """Let ``source`` continue every prompt greedily and ask ``target``, which is given the same tokens, for its choices.

    While the choices agree, they are what ``target`` would have generated itself: a prompt whose choices are all equal has an
    equal greedy continuation. The end of a turn does not end a continuation.

    Args:
        source: a transformers model. target: what :func:`shadowpeft.export.read` gave.
        tokenizer: the exported one. kept: ``(V')`` ids of the source that the exported ids 0 .. V'-1 stand for; None: all.
            The source then chooses among the kept ids alone.
        system: the message before each prompt; None: none.

    Returns:
        prompts, prompts_equal (all choices equal), tokens, tokens_equal, max_logit_difference (kept ids, generated positions),
        and with ``kept`` tokens_kept: how many of the choices the source would have made among all ids too.
    """
    tokens = equal = prompts_equal = free = 0
    largest = 0.0
    device = next(source.parameters()).device
    for prompt in prompts:
        ids = encode_prompts(tokenizer, prompt, system)
        old = torch.tensor(ids) if kept is None else kept[torch.tensor(ids)]
        logits, unrestricted = _continue(source, old.to(device), kept, new_tokens)
        choices = logits.argmax(-1)
        whole = torch.cat([torch.tensor(ids), choices[:-1]])[None]
        theirs = target(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, len(ids) - 1 :].float().cpu()
        theirs = theirs[:, : logits.shape[1]]
        same = theirs.argmax(-1) == choices
        tokens, equal = tokens + len(same), equal + int(same.sum())
        prompts_equal += bool(same.all())
        free += unrestricted
        largest = max(largest, float((theirs - logits).abs().max()))
    counts: dict[str, Any] = {"prompts": len(prompts), "prompts_equal": prompts_equal}
    counts |= {"tokens": tokens, "tokens_equal": equal, "max_logit_difference": largest}
    return counts if kept is None else {**counts, "tokens_kept": free}


def _continue(source: Any, ids: Tensor, kept: Tensor | None, steps: int) -> tuple[Tensor, int]:
    """Logits ``(steps, V')`` over the kept ids along the greedy continuation, and how many choices no restriction changed."""
    rows, past, read, free = [], None, ids[None], 0
    for _ in range(steps):
        out = source(input_ids=read, past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[0, -1].float().cpu()
        rows.append(logits if kept is None else logits[kept])
        choice = rows[-1].argmax() if kept is None else kept[rows[-1].argmax()]
        free += int(choice == logits.argmax())
        read = choice.reshape(1, 1).to(ids.device)
    return torch.stack(rows), free

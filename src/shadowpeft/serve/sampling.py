"""From logits to tokens, and from tokens to the text that is certain."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.serve.requests import GREEDY, Finish, Request, SamplingParams, Token

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Choice:
    """One row's next token, and what the model thought of it; natural logarithms."""

    id: int
    logprob: float
    margin: float
    entropy: float
    top: list[tuple[int, float]]


def choose(requests: list[Request], logits: Tensor) -> list[Choice]:
    """The next token of every row of ``logits`` ``(B, V)``."""
    log_p = logits.log_softmax(-1)
    best = log_p.topk(2, dim=-1).values
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    greedy = log_p.argmax(-1).tolist()
    ids = [
        greedy[i] if request.generator is None else sample_token(logits[i], request.sampling, request.generator)
        for i, request in enumerate(requests)
    ]
    picked = log_p[torch.arange(len(requests)), torch.tensor(ids, device=log_p.device)]
    numbers = torch.stack([picked, best[:, 0] - best[:, 1], entropy], dim=1).tolist()
    choices = []
    for i, request in enumerate(requests):
        top = log_p[i].topk(min(request.sampling.top_logprobs, log_p.shape[1]))
        logprob, margin, surprise = numbers[i]
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        choices.append(Choice(ids[i], logprob, margin, surprise, likeliest))
    return choices


def sample_token(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """One token from ``softmax(logits / temperature)`` ``(V,)``, cut to the likeliest that together have ``top_p``.

    The random number comes from the row's own generator on the CPU, so it does not depend on the batch or the device.
    """
    if sampling.temperature < GREEDY:
        return int(logits.argmax())
    logits = logits.double().cpu()
    # the largest becomes 0 before the division, which for the smallest temperatures would be infinite
    p = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    sorted_p, order = p.sort(descending=True, stable=True)
    total = sorted_p.cumsum(-1)
    if sampling.top_p < 1.0:
        dropped = total - sorted_p >= sampling.top_p
        dropped[0] = False  # the likeliest stays, also where a processor takes the smallest ``top_p`` for 0
        sorted_p = sorted_p.masked_fill(dropped, 0.0)
        total = sorted_p.cumsum(-1)
    u = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    place = int(torch.searchsorted(total, u, right=True))
    return int(order[min(place, int((sorted_p > 0).sum()) - 1)])


def append_token(request: Request, choice: Choice, decode: Callable[..., str], stop_token_ids: Collection[int]) -> bool:
    """Add a token to an answer and tell its reader; whether the answer goes on."""
    ended = choice.id in stop_token_ids
    request.new.append(choice.id)
    if request.cancelled:
        return False
    text = decode(request.new[:-1] if ended else request.new, skip_special_tokens=True)
    cut = min((at for at in (text.find(s) for s in request.sampling.stop) if at >= 0), default=-1)
    if cut >= 0:
        text = text[:cut]
    over = ended or cut >= 0
    certain = max(request.sent, len(text) if over else certain_length(text, request.sampling.stop))
    delta, request.sent = text[request.sent : certain], certain
    if not ended:
        piece = decode([choice.id])
        request.pieces.append(piece)
        request.scores.append(choice)
        top = tuple((decode([token]), logprob) for token, logprob in choice.top)
        request.emit(Token(choice.id, delta, piece, choice.logprob, choice.margin, choice.entropy, top))
        delta = ""
    if over:
        reason = "stop"
    elif len(request.new) >= request.sampling.max_tokens:
        reason = "length"
    elif request.until is not None and request.until(request.pieces, request.scores):
        reason = "until"
    elif time.monotonic() >= request.deadline:
        reason = "time"
    else:
        return True
    request.emit(Finish(reason, delta + text[request.sent :], len(request.ids), len(request.new)))
    return False


def certain_length(text: str, stops: tuple[str, ...]) -> int:
    """How many characters of an unfinished text can be given away: no half ones, nothing that may become a stop text."""
    end = len(text)
    while end and text[end - 1] == _REPLACEMENT:
        end -= 1
    held = 0
    for stop in stops:
        held = max(held, next((n for n in range(min(len(stop) - 1, end), 0, -1) if text.endswith(stop[:n], 0, end)), 0))
    return end - held

"""From logits to tokens, and from tokens to the text that is certain."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowpeft.decode import Decoder
from shadowpeft.serve.requests import GREEDY, Finish, Request, SamplingParams, Token


@dataclass(frozen=True)
class Choice:
    """One row's next token, and what the model thought of it; natural logarithms.

    Of a row that chooses an action all numbers are of the distribution over the tokens that may follow, at temperature 1.
    """

    id: int
    logprob: float
    margin: float
    entropy: float
    top: list[tuple[int, float]]
    judges: tuple[float, float] = (0.0, 0.0)
    """See :class:`~shadowpeft.serve.router.Scores`."""


def choose(requests: list[Request], logits: Tensor) -> list[Choice]:
    """The next token of every row of ``logits`` ``(B, V)``; a row that has no action yet takes a token of one."""
    held = [request.next_tokens() for request in requests]
    free = [row for row, (tokens, _) in enumerate(held) if not len(tokens)]
    rest = iter(_choose_freely([requests[row] for row in free], logits if len(free) == len(requests) else logits[free]))
    return [
        _choose_among(torch.as_tensor(tokens), leaning, request, row) if len(tokens) else next(rest)
        for (tokens, leaning), request, row in zip(held, requests, logits, strict=True)
    ]


def _choose_among(tokens: Tensor, leaning: Any, request: Request, logits: Tensor) -> Choice:
    """One of ``tokens`` ``(C,)``, from logits ``(V,)`` and what leans them, None, a list or a tensor.

    In float64, since the confidence of a sure action is close to one.
    """
    own = logits[tokens.to(logits.device)]
    alone, second = own.double(), None
    if leaning is not None:
        second = torch.as_tensor(leaning, dtype=torch.float64, device=own.device)
        own = alone + second
    log_p = own.double().log_softmax(-1)
    place = int(log_p.argmax()) if request.generator is None else sample_token(own, request.sampling, request.generator)
    sure = log_p.topk(min(len(tokens), max(2, request.sampling.top_logprobs)))
    values = sure.values.tolist()
    margin = values[0] - values[1] if len(values) > 1 else math.inf
    entropy = float(torch.special.entr(log_p.exp()).sum())
    top = [(int(tokens[n]), value) for n, value in zip(sure.indices.tolist(), values, strict=True)]
    judges = (0.0, 0.0) if second is None else (float(alone.log_softmax(-1)[place]), float(second[place]))
    return Choice(int(tokens[place]), float(log_p[place]), margin, entropy, top[: request.sampling.top_logprobs], judges)


def _choose_freely(requests: list[Request], logits: Tensor) -> list[Choice]:
    if not requests:
        return []
    greedy = logits.argmax(-1).tolist()
    ids = [
        greedy[i] if request.generator is None else sample_token(logits[i], request.sampling, request.generator)
        for i, request in enumerate(requests)
    ]
    return choices_of(requests, logits, ids)


def choices_of(requests: list[Request], logits: Tensor, ids: list[int]) -> list[Choice]:
    """What the model thinks of the tokens ``ids``, one for each row of ``logits`` ``(B, V)`` and its request."""
    log_p = logits.log_softmax(-1)
    best = log_p.topk(2, dim=-1).values
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    picked = log_p[torch.arange(len(requests)), torch.tensor(ids, device=log_p.device)]
    numbers = torch.stack([picked, best[:, 0] - best[:, 1], entropy], dim=1).tolist()
    choices = []
    for i, request in enumerate(requests):
        top = log_p[i].topk(min(request.sampling.top_logprobs, log_p.shape[1]))
        logprob, margin, surprise = numbers[i]
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        choices.append(Choice(ids[i], logprob, margin, surprise, likeliest))
    return choices


def certain(token: int, top_logprobs: int) -> Choice:
    """The only token that may follow."""
    return Choice(token, 0.0, math.inf, 0.0, [(token, 0.0)][:top_logprobs])


def sample_token(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    """One token from ``softmax(logits / temperature)`` ``(V,)``, cut to the likeliest that together have ``top_p``.

    The random number comes from the row's own generator on the CPU, so it does not depend on the batch or the device.
    """
    if sampling.temperature < GREEDY:
        return int(logits.argmax())
    sorted_p, order = _likeliest_first(logits, sampling)
    total = sorted_p.cumsum(-1)
    u = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
    place = int(torch.searchsorted(total, u, right=True))
    return int(order[min(place, int((sorted_p > 0).sum()) - 1)])


def distribution(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """What :func:`sample_token` draws from, ``(V,)`` float64 on the CPU."""
    sorted_p, order = _likeliest_first(logits, sampling)
    p = torch.zeros_like(sorted_p).index_copy(0, order, sorted_p)
    return p / p.sum()


def _likeliest_first(logits: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Probabilities at a temperature, the largest first, those beyond ``top_p`` 0; and whose they are."""
    logits = logits.double().cpu()
    # the largest becomes 0 before the division, which for the smallest temperatures would be infinite
    p = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    sorted_p, order = p.sort(descending=True, stable=True)
    if sampling.top_p < 1.0:
        cut = sorted_p.cumsum(-1) - sorted_p >= sampling.top_p
        cut[0] = False  # a processor that flushes the smallest numbers reads such a top_p as 0
        sorted_p = sorted_p.masked_fill(cut, 0.0)
    return sorted_p, order


def append_token(request: Request, choice: Choice, tokenizer: Any, stop_token_ids: Collection[int]) -> bool:
    """Add a token to an answer and tell its reader; whether the answer goes on."""
    ended = choice.id in stop_token_ids
    request.new.append(choice.id)
    if request.cancelled:
        return False
    if request.decoder is None:
        request.decoder = Decoder(tokenizer)
    piece = "" if ended else request.decoder.push(choice.id)
    full = len(request.new) >= request.sampling.max_tokens
    request.text += piece + (request.decoder.finish() if ended or full else "")
    text = request.text
    cut = min((at for at in (text.find(s, request.sent) for s in request.sampling.stop) if at >= 0), default=-1)
    if cut >= 0:
        text = text[:cut]
    over = ended or cut >= 0
    certain = max(request.sent, len(text) if over else certain_length(text, request.sampling.stop))
    delta, request.sent = text[request.sent : certain], certain
    if not ended:
        request.pieces.append(piece)
        request.scores.append(choice)
        top = tuple((request.decoder.bytes(token), logprob) for token, logprob in choice.top)
        own = request.decoder.bytes(choice.id)
        request.emit(Token(choice.id, delta, piece, own, choice.logprob, choice.margin, choice.entropy, top, choice.judges))
        delta = ""
    if over:
        reason = "stop"
    elif full:
        reason = "length"
    elif request.until is not None and request.until(request.pieces, request.scores):
        reason = "until"
    elif time.monotonic() >= request.deadline:
        reason = "time"
    else:
        return True
    if not (over or full):
        text += request.decoder.finish()
    counts = (len(request.ids), len(request.new), request.drafted, request.accepted)
    request.emit(Finish(reason, delta + text[request.sent :], *counts))
    return False


def certain_length(text: str, stops: tuple[str, ...]) -> int:
    """How many characters of an unfinished text can be given away: nothing that may become a stop text."""
    end, held = len(text), 0
    for stop in stops:
        held = max(held, next((n for n in range(min(len(stop) - 1, end), 0, -1) if text.endswith(stop[:n])), 0))
    return end - held

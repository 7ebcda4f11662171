"""Model x data -> record: exact match, robot-intent accuracy, loss per answer token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shadowpeft.data.chat import ChatCollator, Sequence
from shadowpeft.data.robot import parse_action
from shadowpeft.generate import Answer, answer, evaluating


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, correct / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def accuracy(hits: list[bool]) -> dict[str, Any]:
    """``accuracy``, its 95 % interval, and ``n``."""
    low, high = wilson(sum(hits), len(hits))
    return {
        "accuracy": sum(hits) / len(hits) if hits else float("nan"),
        "interval": [round(low, 4), round(high, 4)],
        "n": len(hits),
    }


def intents(
    model: nn.Module,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    *,
    system: str | None,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[str | None], list[Answer]]:
    """Generated actions of robot-set rows (see :func:`shadowpeft.data.robot.parse_action`) and the answers they came from."""
    answers = answer(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    return [parse_action(a.text) for a in answers], answers


@torch.inference_mode()
def answer_loss(
    model: nn.Module, sequences: list[Sequence], pad_token_id: int, *, batch_size: int = 8
) -> dict[str, float]:
    """Cross-entropy per answer token of a model, and its perplexity.

    Works for adapted, detached and bare models alike: only the model's own loss in eval mode is read.
    """
    collate, device = ChatCollator(pad_token_id), next(model.parameters()).device
    total, count = 0.0, 0
    ordered = sorted(sequences, key=lambda s: len(s.ids))
    with evaluating(model):
        for start in range(0, len(ordered), batch_size):
            features = [Sequence(s.ids, s.start, True, False).features() for s in ordered[start : start + batch_size]]
            batch = {k: v.to(device) for k, v in collate(features).items() if k != "shadow_labels"}
            n = int((batch["labels"][:, 1:] != -100).sum())
            out = model(**batch, use_cache=False)
            total += float(out.loss) * n
            count += n
    mean = total / max(count, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": float(count)}


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    *,
    system: str | None,
    max_new_tokens: int,
    batch_size: int,
    detached: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[bool]:
    """Whether the greedy answer equals the row's response (of the path that ``detached`` says), white space aside."""
    answers = answer(
        model,
        tokenizer,
        [row["messages"] for row in rows],
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    wanted = [target(row, detached) for row in rows]
    return [a.text.split() == text.split() for a, text in zip(answers, wanted, strict=True)]


def target(row: dict[str, Any], detached: bool) -> str:
    """The answer of a checked row that the base path or, for ``detached``, the shadow path should give."""
    own = row["shadow_response"] if detached else None
    return str(row["response"] if own is None else own)

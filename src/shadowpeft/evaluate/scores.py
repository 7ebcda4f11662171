"""A share with its interval, and the loss per answer token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shadowpeft.data.chat import ChatCollator, Sequence
from shadowpeft.generate import evaluating


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, correct / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # where all or none are hits, rounding may put an end beyond 0 or 1
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def accuracy(hits: list[bool]) -> dict[str, Any]:
    """``accuracy`` (None of nothing), its 95 % interval, and ``n``."""
    low, high = wilson(sum(hits), len(hits))
    return {
        "accuracy": sum(hits) / len(hits) if hits else None,
        "interval": [round(low, 4), round(high, 4)],
        "n": len(hits),
    }


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
            some = ordered[start : start + batch_size]
            features = [replace(s, base=True, shadow=False, shadow_answer=None).features() for s in some]
            batch = {k: v.to(device) for k, v in collate(features).items() if k != "shadow_labels"}
            n = int((batch["labels"][:, 1:] != -100).sum())
            out = model(**batch, use_cache=False)
            total += float(out.loss) * n
            count += n
    mean = total / max(count, 1)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": float(count)}

"""What the parity tests share: greedy decoding over a plain forward, and comparing with another package's model."""

import copy

import torch

from shadowpeft.hf.base.structure import find_decoder
from tiny import randomise, tokens

TOLERANCE = 1e-5
"""Absolute, float32: the same sums in another order; logits of the tiny models are of order 1."""


def labels_for(ids):
    """Labels with a masked start, so that masking is compared too."""
    labels = ids.clone()
    labels[:, :3] = -100
    return labels


@torch.no_grad()
def greedy(forward, ids, new=8):
    """Greedy tokens from a forward without a cache."""
    for _ in range(new):
        ids = torch.cat([ids, forward(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def train_steps(model, batches, steps=4):
    """A few steps of plain training with the package's own loss, from random weights."""
    randomise(model)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        model(**batches(step)).loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    model.eval()


def lm_batch(step=0):
    ids = tokens(seed=20 + step)
    return {"input_ids": ids, "labels": labels_for(ids)}


def assert_gradients(adapted, expected, skip=()):
    """Every trainable tensor of ``adapted`` has the mapped gradient (by file name) of the producer's model."""
    found = {
        n.replace(".default", ""): p.grad
        for n, p in adapted.named_parameters()
        if p.requires_grad and "shadowpeft_" in n
    }
    assert set(found) == {n for n in expected if not n.endswith("shadowpeft_embedding.weight")}
    largest = max(float(g.norm()) for g in expected.values())
    assert largest > 0
    for name, gradient in found.items():
        # relative by norm; a gradient that cancels to almost nothing is measured on the scale of the largest
        scale = max(float(expected[name].norm()), 1e-4 * largest)
        assert float((gradient - expected[name]).norm()) <= 2e-4 * scale, name


def parts_of(base):
    return find_decoder(copy.deepcopy(base))

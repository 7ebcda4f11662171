"""Rows about generation, and what an architecture must let an implementation do."""

from __future__ import annotations

import copy
from typing import Any

import torch
import zoo
from transformers import set_seed

import tiny
from benchmarks.comparison.peers import CLOSE, NEW, Row, attach, detach, generate, greedy, logits


def mode_greedy(kind: str) -> bool:
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, use_cache=True), greedy(model, ids))


def _same_uncached(kind: str, **options: Any) -> bool:
    """On several prompts: a beam that was reordered wrongly changes only some of the tokens."""
    model = attach(kind, tiny.base())
    for seed in range(4):
        answers = []
        for use_cache in (True, False):
            set_seed(3)
            answers.append(
                generate(model, tiny.tokens(2, 9, seed=seed), use_cache=use_cache, max_new_tokens=16, **options)
            )
        if not torch.equal(*answers):
            return False
    return True


def mode_sampling(kind: str) -> bool:
    return _same_uncached(kind, do_sample=True, temperature=0.8, top_k=20)


def mode_beams(kind: str) -> bool:
    return _same_uncached(kind, num_beams=3)


def mode_left_padding(kind: str) -> bool:
    ids, model = tiny.tokens(2, 6), attach(kind, tiny.base())
    padded, mask = tiny.padded(torch.cat([ids[:, :4], ids], 1), [4, 4], side="left")
    return torch.equal(generate(model, padded, attention_mask=mask)[:, 10:], greedy(model, ids)[:, 6:])


def mode_static(kind: str) -> bool:
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), greedy(model, ids))


def mode_assisted(kind: str) -> bool:
    ids, model = tiny.tokens(1, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, assistant_model=detach(kind, model)), greedy(model, ids))


def mode_lookup(kind: str) -> bool:
    ids, model = tiny.tokens(1, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, prompt_lookup_num_tokens=2), greedy(model, ids))


def mode_chunked(kind: str) -> bool:
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, prefill_chunk_size=3), greedy(model, ids))


def mode_embeddings(kind: str) -> bool:
    base = tiny.base()
    ids, model = tiny.tokens(2, 9), attach(kind, copy.deepcopy(base))
    with torch.no_grad():
        embedded = base.get_input_embeddings()(ids)
        new = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    return torch.equal(new, greedy(model, ids)[:, 9:])


def mode_interleaved(kind: str) -> bool:
    """Two sequences with a cache each, a token of each in turn."""
    model, pair = attach(kind, tiny.base()), [tiny.tokens(1, 7, seed=s) for s in (1, 2)]
    alone, caches = [logits(model, i, use_cache=False) for i in pair], [None, None]
    worst = 0.0
    for step in range(7):
        for n, ids in enumerate(pair):
            with torch.no_grad():
                out = model(input_ids=ids[:, step : step + 1], past_key_values=caches[n], use_cache=True)
            caches[n] = out.past_key_values
            worst = max(worst, float((out.logits - alone[n][:, step : step + 1]).abs().max()))
    return worst < CLOSE


MODES = {
    "greedy": Row("greedy, cached", mode_greedy),
    "sampling": Row("sampling with a seed", mode_sampling),
    "beams": Row("beam search", mode_beams, (19,)),
    "left_padding": Row("left padding", mode_left_padding),
    "static": Row("static cache", mode_static),
    "assisted": Row("assisted by the detached model", mode_assisted, (19,)),
    "lookup": Row("prompt lookup", mode_lookup, (19,)),
    "chunked": Row("chunked prefill", mode_chunked, (19,)),
    "embeddings": Row("from inputs_embeds", mode_embeddings, (19,)),
    "interleaved": Row("two interleaved cached sequences", mode_interleaved, (19,)),
}


# -------------------------------------------------------------------------------------------------------- architectures


def architecture(kind: str, name: str) -> bool | str:
    """Attach, train with a finite loss, cached = uncached ("attached only" up to here), and a detached model that generates."""
    base = zoo.build(name)
    ids = torch.randint(2, zoo.VOCAB - 2, (2, 12), generator=torch.Generator().manual_seed(3))
    if kind == "base":
        options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        return torch.equal(
            base.generate(ids, use_cache=True, **options), base.generate(ids, use_cache=False, **options)
        )
    model = attach(kind, base, trained=False, weight=0.5)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
    if not (bool(torch.isfinite(loss)) and torch.isfinite(logits(model.eval(), ids)).all()):
        return False
    same = torch.equal(generate(model, ids, use_cache=True), generate(model, ids, use_cache=False))
    if not same:
        return False
    try:
        done = generate(detach(kind, model), ids).shape == (2, 12 + NEW)
    except Exception as error:  # noqa: BLE001  (as in forked: how a peer fails is what is recorded)
        return f"attached only, detached {type(error).__name__}: {error}"[:200]
    return done or "attached only, detached tokens are missing"


DECODERS = {
    "mamba": Row("a purely recurrent decoder (Mamba)", lambda kind: architecture(kind, "mamba"), (12,)),
    "qwen3_next": Row("a hybrid decoder (Qwen3-Next)", lambda kind: architecture(kind, "qwen3_next"), (12,)),
}

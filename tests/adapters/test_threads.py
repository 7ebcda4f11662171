"""Property 10 with mixed batches: 400 interleaved forwards and generations with different names, none wrong."""

from concurrent.futures import ThreadPoolExecutor

import torch

from several import ADAPTERS, BASE, several
from tiny import PAD, base, tokens

ASSIGNMENTS = [
    ["default", BASE, "late"],
    ["late", "explicit", "default"],
    ["explicit"] * 3,
    [BASE, BASE, BASE],
    ["deep", "deep", "early"],
    ["early", "default", BASE],
    None,
]


@torch.no_grad()
def test_400_interleaved_forwards():
    model = several(base("llama"))
    ids = tokens()

    def work(i):
        with torch.no_grad():  # of this thread
            names = ASSIGNMENTS[i % len(ASSIGNMENTS)]
            if i % 3:
                return model(input_ids=ids, adapter_names=names).logits
            cache = model(input_ids=ids[:, :6], use_cache=True, adapter_names=names).past_key_values
            return model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True, adapter_names=names).logits

    expected = {i: work(i) for i in range(3 * len(ASSIGNMENTS))}
    assert len({float(out[:, 6:].sum()) for i, out in expected.items() if i % 3}) == len(ASSIGNMENTS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(400)))
    wrong = [i for i, out in enumerate(found) if not torch.equal(out, expected[i % len(expected)])]
    assert not wrong


def test_interleaved_generations():
    model = several(base("llama"))
    ids = tokens()

    def work(i):
        names = ASSIGNMENTS[i % len(ASSIGNMENTS)]
        options = {"num_beams": 2} if i % 2 else {}
        return model.generate(
            input_ids=ids, adapter_names=names, max_new_tokens=4, do_sample=False, pad_token_id=PAD, **options
        )

    expected = [work(i) for i in range(2 * len(ASSIGNMENTS))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(42)))
    assert all(torch.equal(out, expected[i % len(expected)]) for i, out in enumerate(found))


def test_the_assignments_cover_every_adapter():
    assert {name for names in ASSIGNMENTS if names for name in names} == {*ADAPTERS, BASE}

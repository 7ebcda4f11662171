"""What goes in: padding on either side, packed sequences, embeddings, deep-copied prefixes, 16-bit bases, threads."""

import copy
import threading

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from naive import NaiveShadow, assert_same_gradients
from products import covering, usual
from tiny import KINDS, WINDOW, adapt, adapter_config, base, padded, randomise, tokens

CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32 sums in another order


@pytest.mark.parametrize(("name", "kind", "side"), covering(["llama", "gemma3", "gpt2"], KINDS, ["left", "right"]))
def test_padding_on_either_side_equals_the_row_alone(name, kind, side):
    adapted = adapt(base(name), **KINDS[kind])
    ids, mask = padded(tokens(3, 9), [0, 4, 2], side)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = adapted(input_ids=ids, attention_mask=mask, position_ids=position, return_shadow=True)
        for row in range(3):
            alone = adapted(input_ids=ids[row][mask[row].bool()][None], return_shadow=True)
            for key in ("logits", "shadow_logits"):
                torch.testing.assert_close(getattr(found, key)[row][mask[row].bool()], getattr(alone, key)[0], **CLOSE)


def flattened():
    rows = [tokens(1, n, 50 + n)[0] for n in (4, 7, 5)]
    features = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
    return rows, DataCollatorWithFlattening(return_tensors="pt")(features)


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "gemma3", "qwen3"], KINDS))
def test_packed_sequences_equal_the_rows_alone(name, kind):
    adapted = adapt(base(name), **KINDS[kind])
    rows, packed = flattened()
    with torch.no_grad():
        found = adapted(**packed, use_cache=False, return_shadow=True)
        alone = [adapted(input_ids=row[None], return_shadow=True) for row in rows]
    for key in ("logits", "shadow_logits"):
        torch.testing.assert_close(getattr(found, key), torch.cat([getattr(a, key) for a in alone], 1), **CLOSE)


@pytest.mark.parametrize("kind", ["mirror", "explicit"])
def test_packed_training_equals_the_rows_alone(kind):
    model = base("llama")
    adapted = adapt(model, auxiliary_loss_weight=0.5, **KINDS[kind]).train()
    rows, packed = flattened()
    adapted(**packed, use_cache=False).loss.backward()
    naive = NaiveShadow(model, adapted)
    count = sum(len(row) - 1 for row in rows)
    for row in rows:
        (naive(row[None], row[None]).loss * (len(row) - 1) / count).backward()
    assert_same_gradients(adapted, naive)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_inputs_embeds_equal_input_ids(name):
    adapted = adapt(base(name))
    with torch.no_grad():
        embeds = adapted.get_input_embeddings()(tokens())
        found = adapted(inputs_embeds=embeds, return_shadow=True)
        expected = adapted(input_ids=tokens(), return_shadow=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.shadow_logits, expected.shadow_logits)


@pytest.mark.parametrize("dtype", usual([torch.bfloat16, torch.float16], [torch.bfloat16]))
@pytest.mark.parametrize(
    ("name", "attention", "form"),
    [
        ("llama", "sdpa", "added"),
        ("llama", "sdpa", "chosen"),  # "eager" adds every mask
        ("llama", "eager", "added"),
        ("gemma3", "sdpa", "by layer type"),
    ],
)
def test_prepared_masks_on_a_16_bit_base_equal_those_on_a_float32_base(name, attention, form, dtype):
    """The shadow computes in float32, whatever the dtype of a mask that is added to the base's scores."""
    model = base(name)
    model.set_attn_implementation(attention)
    ids, mask = padded(tokens(3, 9), [0, 4, 2], "right")
    seen = torch.ones(9, 9, dtype=torch.bool).tril() & mask[:, None, None].bool()

    def prepare(to):
        full, window = (
            torch.zeros(each.shape, dtype=to).masked_fill(~each, torch.finfo(to).min)
            for each in (seen, seen & torch.ones_like(seen).triu(1 - WINDOW))
        )
        return {"full_attention": full, "sliding_attention": window} if form == "by layer type" else full

    def run(adapted, prepared):
        with torch.no_grad():
            return adapted(input_ids=ids, attention_mask=prepared, use_cache=False, return_shadow=True)

    exact, rounded = adapt(model, shadow_alpha=0.1), adapt(model.to(dtype), shadow_alpha=0.1)
    wanted, plain = run(exact, prepare(torch.float32)), run(rounded, mask)
    found = run(rounded, seen if form == "chosen" else prepare(dtype))
    real = mask.bool()
    for key in ("logits", "shadow_logits"):
        of_mask, of_plain = getattr(found, key)[real].float(), getattr(plain, key)[real].float()
        # of all logits together, at ten times the unit roundoff: how far a single one is rounded depends on the processor
        exactly = getattr(wanted, key)[real]
        error = (of_mask - exactly).square().mean().sqrt() / exactly.square().mean().sqrt()
        assert float(error) < 5 * torch.finfo(dtype).eps
        torch.testing.assert_close(of_mask, of_plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "gemma3", "mistral"], KINDS))
def test_a_deep_copied_prefix_continued_twice_equals_uncached(name, kind):
    adapted = adapt(base(name), **KINDS[kind])
    prefix, cache = tokens(2, 8), DynamicCache(config=adapted.config)
    with torch.no_grad():
        adapted(input_ids=prefix, past_key_values=cache, use_cache=True)
        for seed in (61, 62):
            rest = tokens(2, 4, seed)
            found = adapted(input_ids=rest, past_key_values=copy.deepcopy(cache), use_cache=True).logits
            whole = adapted(input_ids=torch.cat([prefix, rest], 1), use_cache=False).logits[:, 8:]
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)  # cached attention adds up in another order
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize(
    ("name", "task", "dtype", "autocast"),
    covering(
        ["llama", "gemma3"],
        ["CAUSAL_LM", "SEQ_CLS"],
        [torch.float32, torch.bfloat16, torch.float16],
        [False, True],
        strength=2,
    ),
)
def test_untrained_adapter_on_16_bits_and_under_autocast_gives_the_bases_bits(name, task, dtype, autocast):
    model = base(name, task=task).to(dtype)
    adapted = adapt(model, trained=False, task_type=task)
    ids, mask = padded(tokens(), [0, 3, 1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(input_ids=ids, attention_mask=mask).logits
        found = adapted(input_ids=ids, attention_mask=mask).logits
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_under_autocast(use_cache, kind):
    adapted = adapt(base("llama"), **KINDS[kind])
    prompt = tokens(4, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = adapted.generate(prompt, use_cache=use_cache, pad_token_id=0, **options)
        whole = adapted(out.sequences, use_cache=False).logits[:, 5:-1].float()
        with adapted.disable_adapter():
            without = adapted(out.sequences, use_cache=False).logits[:, 5:-1].float()
    # One row at a time or all at once, a product's float32 sum comes out in another order on processors without AVX-512,
    # and may round to the neighbouring bfloat16 number. Each layer of base and shadow adds two such products to its
    # stream, the head is one more; first order, each moves the logits by one unit in the last place.
    layers = adapted.config.num_hidden_layers + KINDS[kind].get("shadow_num_hidden_layers", 1 + (kind == "explicit"))
    bound = (2 * layers + 1) * torch.finfo(torch.bfloat16).eps * float(whole.abs().max())
    assert (whole - without).abs().amax(-1).min() > bound  # a step without its shadow would be seen
    torch.testing.assert_close(torch.stack(out.logits, 1).float(), whole, rtol=0, atol=bound)
    top = whole.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * bound  # either of the two may have moved by the bound
    assert clear.any()
    assert torch.equal(out.sequences[:, 6:][clear], whole.argmax(-1)[clear])


def test_threads_generate_and_run_without_mixing():
    # set_adapter is a setting of the whole model, so each of two models with its own adapter serves half of the threads
    models = [adapt(base("llama")) for _ in range(2)]
    models[1].add_adapter("second", adapter_config(r=2))
    models[1].set_adapter("second")
    randomise(models[1], seed=8)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    texts = [tokens(1, 6, 200 + i) for i in range(4)]
    with torch.no_grad():
        expected = [
            (models[i % 2].generate(input_ids=t, **options), models[i % 2](t).logits) for i, t in enumerate(texts)
        ]
    wrong = []

    def work(i):
        with torch.no_grad():
            for turn in range(20):
                if turn % 2:
                    same = torch.equal(models[i % 2].generate(input_ids=texts[i], **options), expected[i][0])
                else:
                    same = torch.equal(models[i % 2](texts[i]).logits, expected[i][1])
                if not same:
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

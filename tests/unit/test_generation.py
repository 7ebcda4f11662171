"""Property 3: with a cache and without, generation gives the same tokens in every mode; foreign caches are refused."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from products import covering, usual
from shadowpeft import detach
from shadowpeft.errors import CacheMismatchError, UnsupportedModelError
from tiny import ARCHITECTURES, KINDS, PAD, WINDOW, V, adapt, base, padded, tokens

WIDER = (*ARCHITECTURES, "mixtral", "qwen3_next")
NEW = 12
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
# float32: cached and uncached attention add up in another order
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def prompts(side="left"):
    return padded(tokens(3, 7), [0, 3, 1], side)


def last_logits(model, ids, mask):
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, -1]


@torch.no_grad()
def uncached(model, ids, mask, steps=NEW):
    """Greedy decoding by re-reading everything: no cache, no generate()."""
    for _ in range(steps):
        token = last_logits(model, ids, mask).argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    return ids


@pytest.mark.parametrize(("name", "kind"), covering(WIDER, KINDS))
def test_greedy_with_left_padding_and_beyond_the_window(name, kind):
    model = adapt(base(name), **KINDS[kind])
    ids, mask = prompts()
    assert ids.shape[1] + NEW > 2 * WINDOW
    expected = uncached(model, ids, mask)
    assert len(set(expected[0, 7:].tolist())) > 2, "the tokens must differ for this to say anything"
    found = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, attention_mask=mask, **GREEDY), expected)


MODES = {
    "beam": {"num_beams": 3},
    "beam_returning_all": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_k": 20},
    "sampling_returning_several": {"do_sample": True, "num_return_sequences": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
    "repetition": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize(("name", "kind", "mode"), covering(["llama", "gemma3", "mistral"], ["mirror", "explicit"], MODES))
def test_modes_with_and_without_cache(name, kind, mode):
    model = adapt(base(name), **KINDS[kind])
    ids, mask = prompts()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        options = {**GREEDY, **MODES[mode], "use_cache": use_cache}
        found.append(model.generate(input_ids=ids, attention_mask=mask, **options))
    assert torch.equal(*found)
    assert len(found[0]) == 3 * MODES[mode].get("num_return_sequences", 1)


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "qwen3", "gemma3", "mistral", "gpt2", "mixtral"], KINDS))
def test_static_cache(name, kind):
    model = adapt(base(name), **KINDS[kind])
    ids, mask = prompts()
    expected = uncached(model, ids, mask)
    if (name, kind) == (
        "mistral",
        "explicit",
    ):  # a window's worth of slots, and nothing says how long the text may grow
        with pytest.raises(UnsupportedModelError, match="dynamic cache"):
            model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
        return
    found = model.generate(
        input_ids=ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3"])
def test_assisted_by_the_edge_model_is_greedy(name):
    model = adapt(base(name))
    edge = detach(model)
    ids = tokens(1, 7)
    expected = uncached(model, ids, torch.ones_like(ids))
    found = model.generate(input_ids=ids, assistant_model=edge, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "gemma3", "mistral"], ["mirror", "explicit"]))
def test_assisted_beyond_the_window_by_another_model(name, kind):
    model = adapt(base(name), **KINDS[kind])
    ids = tokens(1, 9)
    expected = uncached(model, ids, torch.ones_like(ids), 20)
    found = model.generate(input_ids=ids, assistant_model=base("llama", seed=9), **{**GREEDY, "max_new_tokens": 20})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_prompt_lookup_is_greedy(name):
    model = adapt(base(name))
    ids = tokens(1, 5).repeat(1, 3)
    expected = uncached(model, ids, torch.ones_like(ids))
    assert torch.equal(model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **GREEDY), expected)


@pytest.mark.parametrize(("chunk", "name"), covering([1, 3], ["llama", "gemma3", "gpt2"]))
def test_chunked_prefill(name, chunk):
    model = adapt(base(name))
    ids = tokens(2, 8)
    expected = uncached(model, ids, torch.ones_like(ids))
    assert torch.equal(model.generate(input_ids=ids, prefill_chunk_size=chunk, **GREEDY), expected)


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "gemma3", "gpt2", "qwen3_next"], KINDS))
def test_continuing_from_a_returned_cache(name, kind):
    model = adapt(base(name), **KINDS[kind])
    ids = tokens(2, 7)
    expected = uncached(model, ids, torch.ones_like(ids))
    first = model.generate(input_ids=ids, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 5})
    cache = first.past_key_values
    second = model.generate(input_ids=first.sequences, past_key_values=cache, **{**GREEDY, "max_new_tokens": NEW - 5})
    assert torch.equal(second, expected)


@pytest.mark.parametrize("make", [lambda c: DynamicCache(), lambda c: DynamicCache(config=c)], ids=["lazy", "config"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_step_by_step_with_a_cache_of_ones_own(name, make):
    model = adapt(base(name))
    ids = tokens(2, 14)
    whole = model(input_ids=ids, use_cache=False).logits
    cache, parts = make(model.config), []
    for start, stop in ((0, 4), (4, 5), (5, 9), (9, 10), (10, 14)):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        assert out.past_key_values is cache
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_cache_that_the_model_makes_itself():
    model = adapt(base("llama"))
    ids = tokens(2, 8)
    first = model(input_ids=ids[:, :5], use_cache=True)
    second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(second.logits, model(input_ids=ids).logits[:, 5:], **CLOSE)
    assert first.past_key_values.get_seq_length() == 8


def test_explicit_static_cache():
    model = adapt(base("llama"))
    ids = tokens(2, 8)
    cache = StaticCache(config=model.config, max_cache_len=16)
    first = model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True).logits
    second = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first, second], 1), model(input_ids=ids, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_deep_copied_prefix_serves_several_continuations(name):
    model = adapt(base(name))
    prefix = tokens(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache, use_cache=True)
    for seed in (21, 22):
        ids = torch.cat([prefix, tokens(1, 3, seed)], 1)
        found = model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(found, uncached(model, ids, torch.ones_like(ids)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generation_from_embeddings(name):
    model = adapt(base(name))
    ids = tokens(2, 7)
    expected = uncached(model, ids, torch.ones_like(ids))
    embeds = model.get_input_embeddings()(ids).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected[:, 7:])


def test_embeddings_without_ids_are_refused_by_a_shadow_with_its_own_table():
    model = adapt(base("llama"), shadow_model="small_llama")
    embeds = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=embeds)


def test_two_interleaved_generations_do_not_mix():
    model = adapt(base("llama"))
    texts = [tokens(1, 6, seed) for seed in (31, 32)]
    caches = [DynamicCache(config=model.config) for _ in texts]
    current = list(texts)
    grown = list(texts)
    with torch.no_grad():
        for _ in range(NEW):
            for i in range(2):
                out = model(input_ids=current[i], past_key_values=caches[i], use_cache=True)
                current[i] = out.logits[:, -1].argmax(-1, keepdim=True)
                grown[i] = torch.cat([grown[i], current[i]], 1)
    for text, found in zip(texts, grown, strict=True):
        assert torch.equal(found, uncached(model, text, torch.ones_like(text)))


# ------------------------------------------------------------------------------------------------------ foreign caches


@pytest.mark.parametrize("static", [False, True])
def test_cache_filled_by_the_base_is_refused(static):
    plain = base("llama")
    model = adapt(plain)
    ids = tokens(1, 8)
    cache = StaticCache(config=plain.config, max_cache_len=16) if static else DynamicCache(config=plain.config)
    plain(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
    with pytest.raises(CacheMismatchError, match="without the shadow"):
        model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)


def test_cache_filled_with_the_adapter_disabled_is_refused():
    model = adapt(base("llama"))
    ids = tokens(1, 8)
    with model.disable_adapter():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with pytest.raises(CacheMismatchError):
        model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)


def test_cache_continued_with_the_adapter_disabled_in_between_is_refused():
    model = adapt(base("llama"))
    ids = tokens(1, 8)
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    with model.disable_adapter(), pytest.raises(CacheMismatchError, match="adapters are disabled"):
        model(input_ids=ids[:, 5:6], past_key_values=cache, use_cache=True)
    cache.layers[0].update(*(torch.zeros(1, 2, 1, 8) for _ in range(2)))  # the base read a token behind the adapter's back
    with pytest.raises(CacheMismatchError, match="disabled"):
        model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)


def test_cache_of_another_adapter_is_refused():
    model = adapt(base("llama"))
    from tiny import adapter_config

    model.add_adapter("other", adapter_config())
    ids = tokens(1, 8)
    cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
    model.set_adapter("other")
    with pytest.raises(CacheMismatchError, match=r"'default'.*'other'"):
        model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)


# ------------------------------------------------------------------------------------------------------ hidden states


@pytest.mark.parametrize("name", usual(WIDER, ("llama", "gemma3", "gpt2", "qwen3_next")))
def test_as_many_hidden_states_as_the_base(name):
    plain = base(name)
    ids = tokens(2, 6)
    expected = plain(input_ids=ids, output_hidden_states=True).hidden_states
    for kind in KINDS:
        for when in ("fresh", "hooked before"):
            model = adapt(plain if when == "hooked before" else base(name), **KINDS[kind])
            found = model(input_ids=ids, output_hidden_states=True).hidden_states
            assert len(found) == len(expected), (kind, when)
            assert [h.shape for h in found] == [h.shape for h in expected]
            assert torch.equal(found[0], expected[0])


def test_attentions_are_the_bases():
    plain = base("llama", attn_implementation="eager")
    model = adapt(plain)
    ids = tokens(2, 6)
    out = model(input_ids=ids, output_attentions=True)
    assert len(out.attentions) == len(plain(input_ids=ids, output_attentions=True).attentions) == 4


def test_logits_are_over_the_vocabulary():
    assert adapt(base("llama"))(input_ids=tokens()).logits.shape == (3, 10, V)

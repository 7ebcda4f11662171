"""Generation of a mixed batch: each row's tokens are its own adapter's, in every mode; caches are not confused."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from products import usual
from several import BASE, NAMES, each_alone, rows_of, several
from shadowpeft.errors import CacheMismatchError, ConfigError, UnsupportedModelError
from tiny import PAD, base, padded, tokens

GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32: cached and uncached attention add up in another order


@pytest.fixture(scope="module")
def llama():
    plain = base("llama")
    return plain, several(plain)


def prompts(rows=8):
    return padded(tokens(rows, 7), [0, 3, 1, 0, 2, 0, 1, 0][:rows], "left")


def alone(model, plain, names, ids, mask, **options):
    """The tokens of each row from its own adapter's generation of the same batch; rows of one prompt stay together."""
    found, active = {}, model.active_adapter
    for name in dict.fromkeys(names):
        torch.manual_seed(11)
        if name == BASE:
            found[name] = plain.generate(input_ids=ids, attention_mask=mask, **options)
        else:
            model.set_adapter(name)
            found[name] = model.generate(input_ids=ids, attention_mask=mask, **options)
    model.set_adapter(active)
    per = len(next(iter(found.values()))) // len(names)
    width = max(out.shape[1] for out in found.values())
    fill = [torch.nn.functional.pad(found[n], (0, width - found[n].shape[1]), value=PAD) for n in names]
    return torch.cat([out[i * per : (i + 1) * per] for i, out in enumerate(fill)])


MODES = {
    "greedy": {},
    "without_cache": {"use_cache": False},
    "beam": {"num_beams": 3},
    "beam_returning_all": {"num_beams": 3, "num_return_sequences": 3},
    "beam_by_configuration": {"generation_config": GenerationConfig(num_beams=2, **GREEDY)},
    "repetition": {"repetition_penalty": 1.3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunked": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("mode", usual(MODES, ("greedy", "beam", "static", "chunked")))
def test_modes_with_left_padding(llama, mode):
    plain, model = llama
    ids, mask = prompts()
    options = {**GREEDY, **MODES[mode]}
    expected = alone(model, plain, NAMES, ids, mask, **options)
    found = model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, **options)
    assert torch.equal(found, expected)
    assert len({tuple(row[7:].tolist()) for row in found}) >= 6


@pytest.mark.slow  # together
@pytest.mark.parametrize("mode", ["greedy", "beam", "static"])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "gpt2", "qwen3_next"])
def test_other_architectures(name, mode):
    plain = base(name)
    adapters = {"default": {}, "deep": {"shadow_num_hidden_layers": 2}, "late": {"refined_layers": [2, 3]}}
    model = several(plain, adapters)
    names = ["late", BASE, "default", "deep", "default"]
    ids, mask = prompts(5)
    options = {**GREEDY, **MODES[mode]}
    expected = alone(model, plain, names, ids, mask, **options)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options), expected)


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3}, {"num_beams": 2}], ids=["one", "three", "beams"])
def test_sampling(llama, options):
    """Random numbers are drawn for the whole batch, so the same seed gives each row the draws it has alone."""
    plain, model = llama
    ids, mask = prompts()
    options = {**GREEDY, "do_sample": True, "temperature": 0.8, **options}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(11)
        found.append(
            model.generate(input_ids=ids, attention_mask=mask, adapter_names=NAMES, use_cache=use_cache, **options)
        )
    assert torch.equal(*found)
    if options.get("num_beams", 1) == 1:
        assert torch.equal(found[0], alone(model, plain, NAMES, ids, mask, **options))


@pytest.mark.parametrize("make", [lambda c: DynamicCache(), lambda c: DynamicCache(config=c), None])
@torch.no_grad()
def test_step_by_step(llama, make):
    plain, model = llama
    ids = tokens(len(NAMES), 14)
    cache = StaticCache(config=plain.config, max_cache_len=16) if make is None else make(plain.config)
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 9), (9, 14)):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, adapter_names=NAMES)
        parts.append(out.logits)
    expected = rows_of(each_alone(model, plain, NAMES, input_ids=ids), NAMES)
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


@torch.no_grad()
def test_continuing_from_a_returned_cache(llama):
    plain, model = llama
    ids, mask = prompts()
    expected = alone(model, plain, NAMES, ids, mask, **GREEDY)
    common = {"adapter_names": NAMES, "return_dict_in_generate": True, **GREEDY}
    first = model.generate(input_ids=ids, attention_mask=mask, **{**common, "max_new_tokens": 4})
    longer = torch.cat([mask, torch.ones(len(ids), 4, dtype=mask.dtype)], 1)
    second = model.generate(
        input_ids=first.sequences,
        attention_mask=longer,
        past_key_values=first.past_key_values,
        **{**common, "max_new_tokens": 6},
    )
    assert torch.equal(second.sequences, expected)


# --------------------------------------------------------------------------------------- what is done to a filled cache


@pytest.fixture
def filled(llama):
    plain, model = llama
    ids = tokens(4, 8)
    names = ["default", BASE, "explicit", "default"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :6], use_cache=True, adapter_names=names).past_key_values
    return plain, model, ids, names, cache


@torch.no_grad()
def expect(model, plain, ids, names, cache, start=6):
    found = model(input_ids=ids[:, start:], past_key_values=cache, use_cache=True, adapter_names=names).logits
    expected = rows_of(each_alone(model, plain, names, input_ids=ids, use_cache=False), names)[:, start:]
    torch.testing.assert_close(found, expected, **CLOSE)


def test_rows_repeated(filled):
    plain, model, ids, names, cache = filled
    cache.batch_repeat_interleave(2)
    expect(model, plain, ids.repeat_interleave(2, 0), [n for n in names for _ in range(2)], cache)


@pytest.mark.parametrize("kept", [[3, 1, 2], [0, 3], [2], [1, 0], [2, 1, 0, 3, 3]])
def test_rows_selected(filled, kept):
    plain, model, ids, names, cache = filled
    cache.batch_select_indices(torch.tensor(kept))
    expect(model, plain, ids[kept], [names[i] for i in kept], cache)


def test_rows_reordered_within_an_adapter(filled):
    plain, model, ids, names, cache = filled
    order = [3, 1, 2, 0]
    cache.reorder_cache(torch.tensor(order))
    expect(model, plain, ids[order], names, cache)


def test_rows_reordered_across_adapters_are_refused(filled):
    cache = filled[-1]
    with pytest.raises(CacheMismatchError, match=r"row 0 of adapter 'default'.*row 2 of adapter 'explicit'"):
        cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    with pytest.raises(CacheMismatchError, match="__base__"):
        filled[-1].reorder_cache(torch.tensor([1, 1, 2, 3]))


def test_cropped_copied_and_reset(filled):
    plain, model, ids, names, cache = filled
    copied = copy.deepcopy(cache)
    cache.crop(-2)
    expect(model, plain, ids, names, cache, start=4)
    expect(model, plain, ids, names, copied)
    copied.reset()
    expect(model, plain, ids, names, copied, start=0)
    copied.reset()
    other = names[::-1]
    expect(model, plain, ids, other, copied, start=0)  # an empty cache may take other names


@torch.no_grad()
def test_other_names_for_a_filled_cache_are_refused(filled):
    _, model, ids, names, cache = filled
    model.set_adapter("default")
    rest = {"input_ids": ids[:, 6:], "past_key_values": cache, "use_cache": True}
    for other in (
        {"adapter_names": ["default", BASE, "late", "default"]},
        {"adapter_names": ["default", BASE, "default", "explicit"]},
        {"adapter_names": ["default", "default", "explicit", "default"]},
        {"adapter_names": ["default", BASE, BASE, "default"]},
        {"adapter_names": ["default"] * 4},
        {"adapter_names": [BASE] * 4},
        {},
    ):
        with pytest.raises(CacheMismatchError, match=r"start from an empty cache"):
            model(**rest, **other)
    single = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(CacheMismatchError, match=r"'default' but .*in rows"):
        model(input_ids=ids[:, 6:], past_key_values=single, use_cache=True, adapter_names=names)
    based = model(input_ids=ids[:, :6], use_cache=True, adapter_names=[BASE] * 4).past_key_values
    with pytest.raises(CacheMismatchError, match="without the shadow"):
        model(input_ids=ids[:, 6:], past_key_values=based, use_cache=True, adapter_names=names)


@torch.no_grad()
def test_a_cache_whose_rows_became_one_adapters_continues_without_names(filled):
    _, model, ids, names, cache = filled
    kept = [0, 3]
    cache.batch_select_indices(torch.tensor(kept))
    model.set_adapter("default")
    expected = model(input_ids=ids[kept], use_cache=False).logits[:, 6:]
    found = model(input_ids=ids[kept, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, **CLOSE)
    assert names[0] == "default"


def test_a_compiled_static_cache_is_refused(llama):
    _, model = llama
    from transformers import CompileConfig

    compiles = CompileConfig()
    compiles._compile_all_devices = True
    with pytest.raises(ConfigError, match="disable_compile=True"):
        model.generate(
            input_ids=tokens(2),
            adapter_names=["default", BASE],
            cache_implementation="static",
            compile_config=compiles,
            max_new_tokens=2,
        )


def test_a_cache_class_of_an_architectures_own_is_refused(llama):
    _, model = llama

    class Own(DynamicCache):
        """Not transformers' own module, so how it counts its layers is not known."""

    with pytest.raises(UnsupportedModelError, match="several shadows"):
        model(input_ids=tokens(2), past_key_values=Own(), use_cache=True, adapter_names=["default", BASE])


def test_an_assistant_is_not_given_the_names(llama):
    """A generation's names belong to its model, not to another that carries adapters too."""
    plain, model = llama
    helper = several(base("llama", seed=9), {"default": {}, "explicit": {"shadow_model": "small_llama"}})
    ids = tokens(1, 7)
    expected = alone(model, plain, ["late"], ids, torch.ones_like(ids), **GREEDY)
    found = model.generate(input_ids=ids, adapter_names=["late"], assistant_model=helper.get_base_model(), **GREEDY)
    assert torch.equal(found, expected)

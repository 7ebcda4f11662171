"""Every path on a CUDA device; the same tests run on the CPU in the default run, so that they are right before a GPU runs them.

The oracle is the package itself in float64 on the CPU, which the default run compares with the naive loop.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

import shadowpeft
from chatbase import chat_tokenizer
from products import covering
from serving import ADAPTERS, ask, ending_model, engine_of
from several import each_alone, rows_of, several
from shadowpeft import Speculation, detach
from shadowpeft.hf.layer import find_hub
from shadowpeft.serve.backend import Attached
from tiny import ARCHITECTURES, KINDS, PAD, adapt, base, padded, tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FAMILIES = ["llama", "qwen3", "gemma3", "mistral"]
# of the error's root mean square beside the logits': ten times the unit roundoff, for the five layers that add up
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """The device, with float32 products in float32."""
    if request.param == "cuda":
        assert torch.cuda.is_available(), "the gpu tests need a CUDA device"
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return torch.device(request.param)


def prompts(device):
    ids, mask = padded(tokens(3, 7), [0, 3, 1], "left")
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@pytest.mark.parametrize(("name", "kind", "dtype"), covering(FAMILIES, KINDS, BOUNDS))
def test_logits_of_both_paths_are_those_of_float64(device, name, kind, dtype):
    model = adapt(base(name), **KINDS[kind])
    ids = tokens(2, 9)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_ids=ids, return_shadow=True)
        model.get_base_model().to(device)
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        found = model(input_ids=ids.to(device), return_shadow=True)
    for mine, theirs in ((found.logits, exact.logits), (found.shadow_logits, exact.shadow_logits)):
        assert mine.device.type == device.type
        error = (mine.double().cpu() - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert float(error) < BOUNDS[dtype]


@pytest.mark.parametrize(("name", "checkpointed"), covering(FAMILIES, [False, True]))
def test_losses_and_gradients_are_those_of_float64(device, name, checkpointed):
    model = adapt(base(name)).train()
    ids = tokens(2, 9)
    exact = copy.deepcopy(model).double()
    exact(input_ids=ids, labels=ids).loss.backward()
    model.to(device)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids.to(device), labels=ids.to(device)).loss.backward()
    wanted = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double().cpu(), value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_in_half_precision_moves_every_weight(device, name, dtype):
    model = adapt(base(name).to(dtype)).train().to(device)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-3)
    ids = tokens(2, 9).to(device)
    with torch.autocast(device.type, dtype=dtype):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    assert loss.isfinite()
    assert [n for n, p in trained.items() if torch.equal(p, before[n])] == []


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral"])
def test_generation_with_and_without_a_cache_and_with_drafts(device, name):
    model = adapt(base(name)).to(device)
    inputs = prompts(device)
    expected = model.generate(**inputs, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    for settings in (
        Speculation(),
        Speculation(max_draft=3, adaptive=False),
        Speculation(tokens=range(2, 30), adaptive=False),
    ):
        assert torch.equal(model.generate(**inputs, speculative=settings, **GREEDY), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_static_cache(device, name):
    """On a GPU generate compiles the forward pass for it."""
    model = adapt(base(name)).to(device)
    inputs = prompts(device)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **GREEDY), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_compiled_code_gives_the_logits_of_eager_code(name):
    model = adapt(base(name)).cuda()
    ids = tokens(2, 9).cuda()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(torch.compile(model)(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_rows_of_several_adapters_are_what_each_is_alone(device):
    plain = base("llama").to(device)
    model = several(plain)
    names = ["early", "__base__", "late", "early"]
    ids = tokens(4, 8).to(device)
    found = model(input_ids=ids, adapter_names=names).logits
    alone = each_alone(model, plain, names, input_ids=ids)
    torch.testing.assert_close(found, rows_of(alone, names), rtol=1e-4, atol=1e-4)


def test_a_detached_shadow_says_what_the_shadow_says(device):
    model = adapt(base("llama")).to(device)
    ids = tokens(2, 9).to(device)
    with torch.no_grad():
        expected = model(input_ids=ids, return_shadow=True).shadow_logits
        found = detach(model).to(device)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_saved_loaded_and_swapped_on_the_device(device, tmp_path):
    model, other = (adapt(base("llama"), trained=trained).to(device) for trained in (True, False))
    ids = tokens(2, 9).to(device)
    model.save_pretrained(tmp_path / "a")
    shadowpeft.swap(other, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert {p.device.type for p in find_hub(other).parameters()} == {device.type}


def test_served_answers_are_those_of_generate(device):
    model = several(ending_model(), ADAPTERS).to(device)
    tokenizer = chat_tokenizer()
    backend = Attached(model, tokenizer, {name: f"{name}-folder" for name in ADAPTERS}, "base")
    texts = ["sit", "stand up now", "turn left"]
    expected = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(device)
            cache = DynamicCache(config=model.config)
            out = model.generate(
                input_ids=ids,
                past_key_values=cache,
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            expected[name, text] = out[0, ids.shape[1] :].tolist()
    for speculative in (False, True):
        engine = engine_of(backend, speculative=speculative)
        readers = {key: ask(engine, key[1], key[0], max_tokens=12) for key in expected}
        for key, reader in readers.items():
            new = reader.wait().new_tokens
            got = [token.id for token in reader.tokens]
            assert got == expected[key][: len(got)]
            assert len(got) in (new, new - 1)
        assert engine.stop()

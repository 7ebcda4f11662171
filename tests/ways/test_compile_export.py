"""``torch.compile`` with caches and in the Trainer (property 9), and ``torch.export`` of attached and detached models."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim, export
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments

from shadowpeft import detach
from tiny import KINDS, adapt, base, padded, tokens

CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32 sums in another order
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prefill_and_decode(model, make):
    """Graphs of a prefill and three single-token steps, and the tokens."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    cache, ids = make(model.config), tokens(2, 6)
    out, found = ids, []
    with torch.no_grad():
        for _ in range(4):
            logits = compiled(input_ids=out, past_key_values=cache, use_cache=True).logits
            out = logits[:, -1].argmax(-1, keepdim=True)
            found.append(out)
    return counter.frame_count, torch.cat(found, 1)


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mirror", "explicit"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_as_many_graphs_with_a_cache_as_the_base(name, cache, kind):
    model = base(name)
    expected, _ = prefill_and_decode(model, CACHES[cache])
    adapted = adapt(model, **KINDS[kind])
    found, compiled = prefill_and_decode(adapted.get_base_model(), CACHES[cache])
    assert found == expected >= 1
    eager = adapted.generate(input_ids=tokens(2, 6), **{**GREEDY, "max_new_tokens": 4})
    assert torch.equal(compiled, eager[:, 6:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mirror", "explicit"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generation_with_a_compiled_step_and_a_static_cache(name, kind):
    adapted = adapt(base(name), **KINDS[kind])
    ids, mask = padded(tokens(3, 7), [0, 3, 1], "left")
    eager = adapted.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    model = adapted.get_base_model()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    found = adapted.generate(
        input_ids=ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GREEDY
    )
    assert torch.equal(found, eager)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mirror", "explicit"])
def test_inductor_decodes_with_a_static_cache_as_eager_does(kind):
    adapted = adapt(base("llama"), **KINDS[kind])
    ids = tokens(2, 6)
    eager = adapted.generate(input_ids=ids, **GREEDY)
    compiled = torch.compile(adapted.get_base_model())
    cache, out, found = StaticCache(config=adapted.config, max_cache_len=16), ids, [ids]
    with torch.no_grad():
        for _ in range(6):
            logits = compiled(input_ids=out, past_key_values=cache, use_cache=True).logits
            out = logits[:, -1].argmax(-1, keepdim=True)
            found.append(out)
    assert torch.equal(torch.cat(found, 1), eager)


@pytest.mark.slow
def test_compiled_bfloat16_base_in_the_trainer(tmp_path):
    weights = []
    for compiled in (False, True):
        adapted = adapt(base("llama").bfloat16(), auxiliary_loss_weight=0.5)
        before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            bf16=True,
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
            optim="sgd",
            seed=3,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens(4)]
        Trainer(model=adapted, args=arguments, train_dataset=data).train()
        after = {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}
        assert {p.dtype for p in after.values()} == {torch.float32}
        weights.append(torch.cat([(after[n] - before[n]).flatten() for n in before]))
    eager, found = weights
    assert float(eager.norm()) > 0
    # compiled bfloat16 code fuses, and rounds in other places
    assert float(torch.nn.functional.cosine_similarity(eager, found, dim=0)) > 0.99


@torch.no_grad()
def test_one_graph_of_the_base_alone():
    model = base("llama")
    adapted = adapt(model)
    compiled = torch.compile(adapted.get_base_model(), backend="eager", fullgraph=True)
    for _ in range(2):  # and back
        torch.testing.assert_close(compiled(input_ids=tokens()).logits, adapted(input_ids=tokens()).logits, **CLOSE)
        with adapted.disable_adapter():
            assert torch.equal(compiled(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


class Logits(torch.nn.Module):
    """Export takes a module of tensors only; a cache is no output of it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def exported(model, dynamic, strict=False):
    shapes = None
    if dynamic:
        each = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=128)}
        shapes = {"input_ids": each, "attention_mask": each}
    ids, mask = padded(tokens(3, 9), [0, 3, 1])
    return export(Logits(model), (ids, mask), dynamic_shapes=shapes, strict=strict)


def check_export(model, dynamic, strict=False):
    program = exported(model, dynamic, strict).module()
    for rows, length in ((3, 9), *(((2, 5), (5, 14)) if dynamic else ())):
        ids, mask = padded(tokens(rows, length, 40 + rows), [0, 2, *[0] * (rows - 2)])
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            torch.testing.assert_close(program(ids, mask), expected, **CLOSE)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("dynamic", [pytest.param(False, id="fixed", marks=SLOW), pytest.param(True, id="dynamic")])
@pytest.mark.parametrize("kind", ["mirror", *[pytest.param(kind, marks=SLOW) for kind in ("narrow", "explicit")]])
@pytest.mark.parametrize(
    "name", ["llama", *[pytest.param(n, marks=SLOW) for n in ("qwen3", "gemma3", "mistral", "gpt2")]]
)
def test_exported_attached_model_equals_eager(name, kind, dynamic):
    check_export(adapt(base(name), **KINDS[kind]).get_base_model(), dynamic)


@pytest.mark.parametrize("dynamic", [pytest.param(False, id="fixed", marks=SLOW), pytest.param(True, id="dynamic")])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "mirror"),
        *[
            pytest.param(*pair, marks=SLOW)
            for pair in (("llama", "explicit"), ("gemma3", "mirror"), ("gpt2", "mirror"))
        ],
    ],
)
def test_exported_detached_model_equals_eager(name, kind, dynamic):
    check_export(detach(adapt(base(name), **KINDS[kind])), dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mirror", "explicit"])
def test_strict_export_of_the_attached_model(kind):
    check_export(adapt(base("llama"), **KINDS[kind]).get_base_model(), dynamic=False, strict=True)

"""Property 5 (one process), 9 and 10: checkpointing, precision, compilation, threads."""

import copy
import threading
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from naive import NaiveShadow, assert_same_gradients
from products import covering
from shadowpeft.errors import UnsupportedModelError
from tiny import ARCHITECTURES, KINDS, adapt, base, padded, skip_reentrant, tokens

WIDER = [*ARCHITECTURES, "mixtral", "qwen3_next"]
CLOSE = dict(rtol=2e-4, atol=2e-5)  # noqa: C408


def batch():
    ids, mask = padded(tokens(), [0, 3, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# ------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize(("name", "kind", "reentrant"), covering(WIDER, KINDS, [True, False]))
def test_checkpointing_changes_nothing(name, kind, reentrant):
    skip_reentrant(reentrant)
    model = base(name)
    adapted = adapt(model, **KINDS[kind]).train()
    plain = copy.deepcopy(adapted)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    losses = []
    for each in (adapted, plain):
        out = each(**batch())
        out.loss.backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[0], losses[1])
    expected = dict(plain.named_parameters())
    for parameter_name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            torch.testing.assert_close(parameter.grad, expected[parameter_name].grad, msg=parameter_name)


def test_checkpointing_runs_the_layers_again():
    adapted = adapt(base("llama")).train()
    calls = []
    for layer in adapted.base_model.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # the replay may stop before its end
    adapted(**batch()).loss.backward()
    assert len(calls) == 4
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted(**batch()).loss.backward()
    assert len(calls) == 4 + 4 + 3  # not the layer below the first correction: no gradient goes there


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_checkpointed_together_with_their_hooks(reentrant):
    # as transformers did up to 5.22
    adapted = adapt(base("llama")).train()
    plain = copy.deepcopy(adapted)
    for layer in adapted.get_base_model().model.layers:
        kind = type(layer)

        class Whole(kind):
            def __call__(self, *args, _call=kind.__call__, **kwargs):
                return checkpoint(partial(_call, self, **kwargs), *args, use_reentrant=reentrant)

        layer.__class__ = Whole
    if reentrant:
        with pytest.raises(UnsupportedModelError, match=r"'use_reentrant': False"):
            adapted(**batch())
        return
    for each in (adapted, plain):
        each(**batch(), use_cache=False).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_checkpointing_with_dropout_draws_the_same_mask_again():
    adapted = adapt(base("llama"), shadow_dropout=0.5).train()
    plain = copy.deepcopy(adapted)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (adapted, plain):
        torch.manual_seed(3)
        each(**batch()).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)


def test_dropout_only_in_training():
    adapted = adapt(base("llama"), shadow_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(adapted(**batch()).logits, adapted(**batch()).logits)
        adapted.train()
        assert not torch.equal(adapted(**batch()).logits, adapted(**batch()).logits)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("kind", "task", "autocast"), covering(KINDS, ["CAUSAL_LM", "SEQ_CLS"], [False, True]))
def test_a_bfloat16_base_trains_float32_weights(kind, task, autocast):
    adapted = adapt(base("llama", task=task).bfloat16(), task_type=task, **KINDS[kind]).train()
    trainable = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for n, p in adapted.named_parameters() if "shadowpeft_" not in n and not p.requires_grad} == {
        torch.bfloat16
    }
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimiser = torch.optim.AdamW(list(trainable.values()), lr=1e-4, weight_decay=0.0)
    inputs = batch()
    if task == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 1, 2])
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = adapted(**inputs).loss
        loss.backward()
        optimiser.step()
    for name, parameter in trainable.items():  # docs/defects.md, 5: in bfloat16 16 % of the weights never move
        moved = (parameter != before[name])[parameter.grad != 0].float().mean()
        assert float(moved) > 0.99, name


@pytest.mark.parametrize(
    ("name", "dtype"),
    covering(
        ["llama", "gemma3", "gpt2", "qwen3_next", "mixtral"],
        [torch.bfloat16, torch.float16],
    ),
)
def test_half_precision_bases_run_and_generate(name, dtype):
    model = base(name).to(dtype)
    ids = tokens(2, 7)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(adapt(model, trained=False)(ids).logits, expected)
        adapted = adapt(model, shadow_alpha=0.1)
        out = adapted(ids, labels=ids)
    assert out.logits.dtype == expected.dtype
    assert bool(torch.isfinite(out.loss))
    assert adapted.generate(input_ids=ids, max_new_tokens=4, pad_token_id=0).shape == (2, 11)


@pytest.mark.parametrize("module", ["self_attn", "mlp", "input_layernorm"])
def test_any_module_of_a_bfloat16_base_may_train_beside_the_adapter(module):
    """Attention is called by keyword and answers with a tuple."""
    model = base("llama")
    wanted = adapt(model, modules_to_save=[f"layers.2.{module}"]).train()
    found = adapt(model.to(torch.bfloat16), modules_to_save=[f"layers.2.{module}"]).train()
    saved = [(n, p) for n, p in found.named_parameters() if "modules_to_save" in n]
    assert saved
    with torch.no_grad():
        expected = dict(wanted.named_parameters())
        for name, parameter in saved:
            parameter.copy_(expected[name])
    losses = [each(**batch()).loss for each in (found, wanted)]
    losses[0].backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for _, p in saved)
    torch.testing.assert_close(*losses, rtol=0.03, atol=0.03, check_dtype=False)


def test_bfloat16_is_near_float32():
    model = base("llama")
    with torch.no_grad():
        exact = adapt(model, shadow_alpha=0.1)(**batch())
        rounded = adapt(model.bfloat16(), shadow_alpha=0.1)(**batch())
    # 8 bits of mantissa through four layers of random weights
    assert abs(float(exact.task_loss) - float(rounded.task_loss)) < 0.05 * float(exact.task_loss)
    assert abs(float(exact.shadow_loss) - float(rounded.shadow_loss)) < 0.05 * float(exact.shadow_loss)


def test_float32_base_under_autocast():
    model = base("llama")
    adapted = adapt(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = adapted(**batch())
    out.loss.backward()
    naive = NaiveShadow(model, adapted)
    naive(**batch()).loss.backward()
    expected = naive.grads()
    found = torch.cat([p.grad.flatten() for n, p in adapted.named_parameters() if n in expected])
    wanted = torch.cat([expected[n].flatten() for n, _ in adapted.named_parameters() if n in expected])
    # bfloat16 has 8 bits: the direction stays
    assert float(torch.nn.functional.cosine_similarity(found, wanted, dim=0)) > 0.99


# --------------------------------------------------------------------------------------------------------- compilation


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs(model, inputs):
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(**inputs)
    return counter.frame_count


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "mirror"),
        pytest.param("gemma3", "explicit", marks=pytest.mark.slow),
        pytest.param("llama", "explicit", marks=pytest.mark.slow),
        pytest.param("gemma3", "mirror", marks=pytest.mark.slow),
    ],
)
def test_as_many_graphs_as_the_base(name, kind):
    model = base(name)
    inputs = {"input_ids": tokens(2, 8), "use_cache": False}
    expected = graphs(model, inputs)
    assert expected >= 1
    assert graphs(adapt(model, **KINDS[kind]).get_base_model(), inputs) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("kind", ["mirror", "explicit"])
def test_one_graph_gives_the_same_logits(kind):
    adapted = adapt(base("llama"), **KINDS[kind])
    ids = tokens(2, 8)
    compiled = torch.compile(adapted.get_base_model(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(found, adapted(input_ids=ids).logits, **CLOSE)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_equals_the_naive_loop(backend):
    model = base("llama")
    adapted = adapt(model, auxiliary_loss_weight=0.5).train()
    compiled = torch.compile(adapted.get_base_model(), backend=backend)
    out = compiled(**batch())
    out.loss.backward()
    naive = NaiveShadow(model, adapted)
    expected = naive(**batch())
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    assert_same_gradients(adapted, naive)


# ------------------------------------------------------------------------------------------------------------- threads


def test_threads_do_not_mix():
    adapted = adapt(base("llama"))
    texts = [tokens(1, 8, seed=100 + i) for i in range(8)]
    with torch.no_grad():
        expected = [adapted(input_ids=text, return_shadow=True) for text in texts]
    wrong = []
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        with torch.no_grad():
            for _ in range(50):
                out = adapted(input_ids=texts[i], return_shadow=True)
                same = torch.equal(out.logits, expected[i].logits)
                if not (same and torch.equal(out.shadow_logits, expected[i].shadow_logits)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_left_on_the_modules():
    adapted = adapt(base("llama")).train()
    adapted.generate(input_ids=tokens(1, 4), max_new_tokens=1, pad_token_id=0)  # PEFT keeps a method on its first call
    before = {n: set(vars(m)) for n, m in adapted.named_modules()}
    adapted(**batch()).loss.backward()
    adapted.eval().generate(input_ids=tokens(1, 4), max_new_tokens=3, pad_token_id=0)
    assert {n: set(vars(m)) for n, m in adapted.named_modules()} == before

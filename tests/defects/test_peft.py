"""Defects 1-12 of docs/defects.md, found in PEFT 0.21.2's own shadow: ours is right. `make compare` measures PEFT's."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig

import shadowpeft
from shadowpeft.errors import BaseMismatchError, CacheMismatchError, ShadowPeftError
from tiny import V, adapt, base, randomise, tokens

EXACT = 1e-5
"""Absolute, float32: the same sums in another order; logits of the tiny models are of order 1."""


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.slow  # a fresh interpreter; tests/unit/test_detach.py does the same by default, with seven models
def test_defect_01_a_detached_model_reloads_in_a_process_without_this_package(tmp_path):
    ids = tokens()
    edge = shadowpeft.detach(adapt(base("llama")))
    edge.save_pretrained(tmp_path / "ours")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "assert not {'shadowpeft', 'peft'} & set(sys.modules)\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])\n"
    )
    files = [str(tmp_path / name) for name in ("ours", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(edge, ids), atol=1e-6, rtol=0)


def _gap_between_threads(model, body):
    """How far the logits of a thread are off when another runs a whole forward while the first stands before layer 0."""
    first, second = tokens(2, 8, seed=1), tokens(2, 8, seed=2)
    expected = logits(model, first)
    reached, go = threading.Event(), threading.Event()
    found = []

    def stop(*_):
        if threading.current_thread() is worker and not reached.is_set():
            reached.set()
            assert go.wait(20)

    handle = body.rotary_emb.register_forward_pre_hook(stop)
    worker = threading.Thread(target=lambda: found.append(logits(model, first)))
    worker.start()
    try:
        assert reached.wait(20)
        logits(model, second)
    finally:
        go.set()
        worker.join(20)
        handle.remove()
    return float((found[0] - expected).abs().max()) if found else float("inf")


def test_defect_02_two_threads_do_not_mix():
    model = adapt(base("llama"))
    assert _gap_between_threads(model, model.get_base_model().model) == 0.0


def test_defect_03_the_loss_in_eval_mode_is_the_bases_own():
    ids = tokens()
    model = adapt(base("llama"), auxiliary_loss_weight=1.0)
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
        stock = nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(out.loss, stock, atol=EXACT, rtol=0)
    assert torch.equal(out.loss, out.task_loss)
    assert float(out.shadow_loss) > 0


def _accumulated(model, rows, parts):
    """Gradient over ``parts`` micro-batches with one ``num_items_in_batch``."""
    model.train()
    model.zero_grad()
    items = torch.tensor(rows.shape[0] * (rows.shape[1] - 1))
    for part in rows.chunk(parts):
        model(input_ids=part, labels=part, num_items_in_batch=items).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _relative(a, b):
    total = sum(float((a[n] - b[n]).norm() ** 2) for n in a) ** 0.5
    return total / sum(float(g.norm() ** 2) for g in a.values()) ** 0.5


def test_defect_04_lambda_does_not_grow_with_the_number_of_micro_batches():
    rows = tokens(4, 9)
    model = adapt(base("llama"), auxiliary_loss_weight=1.0)
    assert _relative(_accumulated(model, rows, 1), _accumulated(model, rows, 4)) < 1e-4  # float32 sums in another order


def _unmoved(model, steps=10, rate=2e-4):
    """Share of the shadow backbone's weights that no step has changed."""
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "layers" in n and p.dim() == 2]
    trained = [p for p in trained if p.numel() >= 32 * 16]
    start = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for step in range(steps):
        ids = tokens(4, 9, seed=step)
        optimiser.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    still = sum(int((p == s).sum()) for p, s in zip(trained, start, strict=True))
    return still / sum(p.numel() for p in trained)


def test_defect_05_on_a_bfloat16_base_every_weight_of_the_backbone_moves():
    model = adapt(base("llama").to(torch.bfloat16), auxiliary_loss_weight=1.0, trained=False)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert _unmoved(model) < 0.001


def test_defect_06_a_fully_masked_batch_is_finite_and_gives_zero_gradients():
    ids = tokens()
    labels = torch.full_like(ids, -100)
    model = adapt(base("llama")).train()
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters() if p.requires_grad)


def test_defect_07_adapter_names_is_never_ignored():
    ids = tokens(2)
    model = adapt(base("llama"))
    with pytest.raises((ShadowPeftError, ValueError), match="adapter"):
        logits(model, ids, adapter_names=["nobody", "default"])


def test_defect_08_a_cache_filled_by_the_plain_base_is_refused():
    ids = tokens(2, 9)

    def continued(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            base("llama")(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
            return model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True).logits

    with pytest.raises(CacheMismatchError, match="without the shadow"):
        continued(adapt(base("llama")))


def test_defect_09_an_adapter_on_another_base_of_the_same_shape_is_refused(tmp_path):
    adapt(base("llama")).save_pretrained(tmp_path / "ours")
    with pytest.raises(BaseMismatchError, match="other weights"):
        PeftModel.from_pretrained(base("llama", seed=9), tmp_path / "ours")


def _without_gradient(model):
    model.train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_defect_10_every_trainable_parameter_gets_a_gradient():
    assert _without_gradient(adapt(base("llama"))) == []


def test_defect_11_the_shadows_loss_keeps_no_logits_for_the_backward_pass():
    """The shadow's logits at every position would be most of a step's extra memory and time; none of them is kept."""
    ids = torch.randint(2, 900, (4, 33), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :25] = -100

    def kept(model):
        """Whole-batch tensors over the vocabulary that one training forward keeps for its backward pass."""
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            model.train()(input_ids=ids, labels=labels)
        return sum(1 for s in shapes if len(s) > 1 and s[-1] == 997 and s.numel() > ids.numel() * 997 // 2)

    big = base("llama", vocab_size=997)
    bare = copy.deepcopy(big).requires_grad_(False)
    bare.model.norm.weight.requires_grad_(True)
    own = kept(bare)
    assert own > 0
    assert kept(adapt(big)) == own


RECURRENT = ("mamba", "qwen3_next")
"""A purely recurrent decoder, and one that mixes recurrent layers with attention."""


@pytest.mark.parametrize("name", RECURRENT)
def test_defect_12_recurrent_and_hybrid_decoders_work(name):
    ids, made = tokens(2, 7), decoder(name)
    plain = logits(made, ids)
    model = adapt(made, trained=False)
    # not bit by bit: torch.matmul sums in another order for a weight that wants no gradient, and attaching freezes Mamba's
    assert float((logits(model, ids) - plain).abs().max()) < EXACT
    randomise(model)
    assert float((logits(model, ids) - plain).abs().max()) > 1e-2
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert _without_gradient(model) == []


def decoder(name):
    if name != "mamba":
        return base(name)
    torch.manual_seed(1)
    shape = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "initializer_range": 0.2}
    return AutoModelForCausalLM.from_config(
        MambaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    ).eval()

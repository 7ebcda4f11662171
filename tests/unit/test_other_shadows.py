"""Explicit shadows of other classes than the base's: recurrent ones, ones that attend otherwise, and bases with routers."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconH1Config,
    Gemma2Config,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    RecurrentGemmaConfig,
)

import shadowpeft
from shadowpeft.errors import ConfigError, UnsupervisedShadowError, UnsupportedModelError
from shadowpeft.hf.forward.speculation import Speculation
from shadowpeft.hf.forward.supervision import join_log_probs
from tiny import V, adapt, adapter_config, base, padded, randomise, tokens

OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def other(config):
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(config).eval()


SHAPE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}


def mamba():
    return other(MambaConfig(**SHAPE, state_size=8))


def gemma2():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    return other(Gemma2Config(vocab_size=V, num_attention_heads=4, num_key_value_heads=2, **shape))


@pytest.fixture(scope="module")
def with_mamba():
    return adapt(base("llama"), shadow_model=mamba())


def mamba2():
    return other(Mamba2Config(**SHAPE, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=4))


def falcon_h1():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    scan = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
    return other(FalconH1Config(**SHAPE, **heads, **scan, intermediate_size=48, mamba_chunk_size=4))


def jamba():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    scan = {"use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4}
    return other(JambaConfig(**SHAPE, **heads, **scan, intermediate_size=48, num_experts=2))


def qwen3_next():
    return base("qwen3_next", seed=2)


@pytest.mark.parametrize("make", [mamba, mamba2, falcon_h1, qwen3_next])
@torch.no_grad()
def test_a_recurrent_shadow_reads_padding_and_pieces_as_the_whole(make):
    """The second and third row begin with padding, which the first piece ends in one of them alone."""
    adapted = adapt(base("llama"), shadow_model=make())
    ids, mask = padded(tokens(3, 9), [0, 3, 6], side="left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = adapted(input_ids=ids, attention_mask=mask, position_ids=positions, return_shadow=True).shadow_state
    for cuts in ([4, 9], [8, 9], [4, 8, 9]):
        cache, states = DynamicCache(config=adapted.config), []
        for start, end in pairwise([0, *cuts]):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], "past_key_values": cache}
            states.append(adapted(input_ids=ids[:, start:end], return_shadow=True, **given).shadow_state)
        found = torch.cat(states, 1)[mask.bool()]
        torch.testing.assert_close(found, whole[mask.bool()], rtol=1e-4, atol=2e-5)


def test_a_recurrent_shadow_that_cannot_go_on_by_several_tokens_says_so():
    adapted = adapt(base("llama"), shadow_model=jamba())
    ids, plain = tokens(2, 9), {**OPTIONS, "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with pytest.raises(UnsupportedModelError, match="JambaModel is recurrent and cannot read 4 tokens behind a cache"):
        adapted.generate(input_ids=ids, prefill_chunk_size=4, **plain)


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 4}], ids=["whole", "pieces"])
def test_a_recurrent_shadow_goes_on_as_without_a_cache(with_mamba, more):
    ids, mask = padded(tokens(3, 9), [0, 3, 6], side="left")
    uncached = with_mamba.generate(input_ids=ids, attention_mask=mask, use_cache=False, **OPTIONS)
    cached = with_mamba.generate(input_ids=ids, attention_mask=mask, **OPTIONS, **more)
    assert torch.equal(cached, uncached)


def test_a_recurrent_shadow_reads_several_tokens_behind_a_cache(with_mamba):
    ids = tokens(2, 9)
    cache = DynamicCache(config=with_mamba.config)
    with torch.no_grad():
        whole = with_mamba(input_ids=ids).logits
        with_mamba(input_ids=ids[:, :4], past_key_values=cache)
        rest = with_mamba(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_drafts_of_a_recurrent_shadow_cannot_be_taken_back(with_mamba):
    draft = Speculation(max_draft=3, adaptive=False)
    with pytest.raises(UnsupportedModelError, match="recurrent shadow"):
        with_mamba.generate(input_ids=tokens(1, 9), speculative=draft, **OPTIONS)


def test_a_shadow_that_keeps_its_state_to_itself_is_refused():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8}
    griffin = other(RecurrentGemmaConfig(vocab_size=V, num_attention_heads=4, num_key_value_heads=1, **shape))
    with pytest.raises(UnsupportedModelError, match="RecurrentGemmaModel, which keeps its recurrent state in its modules"):
        adapt(base("llama"), shadow_model=griffin)


@pytest.mark.parametrize("make", [gemma2, mamba])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_shadow_that_attends_otherwise_is_loaded_as_it_was(tmp_path, make, attention):
    model = base("llama")
    model.set_attn_implementation(attention)
    adapted = adapt(model, shadow_model=make())
    ids = tokens(2, 9)
    before = adapted(input_ids=ids, return_shadow=True)
    adapted.save_pretrained(tmp_path)
    again = base("llama")
    again.set_attn_implementation(attention)
    loaded = shadowpeft.load(tmp_path, again).eval()
    after = loaded(input_ids=ids, return_shadow=True)
    # the same weights to the last bit; torch adds up Mamba's sums in an order that depends on where they lie in memory
    slack = 1e-6 if make is mamba else 0.0
    torch.testing.assert_close(after.shadow_state, before.shadow_state, rtol=slack, atol=slack)
    torch.testing.assert_close(after.logits, before.logits, rtol=slack, atol=slack)


def test_a_llama_shadow_on_a_base_that_attends_eagerly_is_bit_exact_when_loaded(tmp_path):
    model = base("llama")
    model.set_attn_implementation("eager")
    adapted = adapt(model, shadow_model=base("llama", num_hidden_layers=2, seed=5))
    before = adapted(input_ids=tokens(2, 9), return_shadow=True).shadow_state
    adapted.save_pretrained(tmp_path)
    again = base("llama")
    again.set_attn_implementation("eager")
    assert torch.equal(shadowpeft.load(tmp_path, again).eval()(input_ids=tokens(2, 9), return_shadow=True).shadow_state, before)


def test_a_base_whose_configuration_asks_for_its_router_s_loss(tmp_path):
    model = base("mixtral")
    model.config.output_router_logits = True
    ids = tokens(2, 9)
    alone = model(input_ids=ids, labels=ids)
    adapted = adapt(model, trained=False)
    out = adapted(input_ids=ids, labels=ids)
    assert out.task_loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)
    assert alone.aux_loss.item() != 0
    randomise(adapted)
    before = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    again = base("mixtral")
    again.config.output_router_logits = True
    assert torch.equal(shadowpeft.load(tmp_path, again).eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize(("weight", "refused"), [(1.0, False), (-1.0, True), (0.0, False)])
def test_one_sequence_with_a_negative_advantage_does_not_teach_the_shadow_the_opposite(weight, refused):
    log_probs = torch.randn(1, 4, requires_grad=True)
    shadow = torch.tensor(3.0, requires_grad=True)
    loss = -(weight * join_log_probs(log_probs, shadow * 2, torch.ones(1, 4, dtype=torch.bool), 0.5)).mean()
    if refused:
        with pytest.raises(UnsupervisedShadowError, match="weights the tokens"):
            loss.backward()
    else:
        loss.backward()
        assert shadow.grad.item() == pytest.approx(2 * 0.5 * weight / 4)


def test_the_loss_is_joint_in_training_mode_without_gradients_too():
    adapted = adapt(base("llama"), auxiliary_loss_weight=10.0, shadow_dropout=0.0).train()
    ids = tokens(2, 9)
    taught = adapted(input_ids=ids, labels=ids)
    with torch.no_grad():
        probed = adapted(input_ids=ids, labels=ids)
    assert probed.loss.item() == pytest.approx(taught.loss.item(), rel=1e-6)
    assert probed.loss.item() == pytest.approx((taught.task_loss + 10 * taught.shadow_loss).item(), rel=1e-6)


def test_what_is_said_of_widths_that_no_layer_has_and_of_a_recurrent_base():
    with pytest.raises(UnsupportedModelError, match=r"hidden size \(30\) is not a multiple"):
        adapt(base("llama"), shadow_hidden_size=30, share_embeddings=False)
    with pytest.raises(ConfigError, match="shadow_model is empty"):
        adapter_config(shadow_model="")
    recurrent = adapt(mamba())
    with pytest.raises(ConfigError, match="a base whose cache is a recurrent state"):
        recurrent.generate(input_ids=tokens(1, 9), speculative=True, **OPTIONS)

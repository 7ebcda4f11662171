"""Bases whose rotary frequencies depend on how long a text is, and a base whose first layers are linear."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from shadowpeft import ShadowPeftConfig, ShadowTrainer
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.rotary import limit_of, turns_by_length

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}


def longrope():
    return Phi3ForCausalLM(Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=LONG))


def dynamic():
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, rope_parameters=scaling))


def linear():
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})
    )


def adapted(made):
    torch.manual_seed(0)
    model = get_peft_model(made(), ShadowPeftConfig(task_type="CAUSAL_LM", r=4, shadow_dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(("made", "by_length", "limit"), [(longrope, True, 16), (dynamic, True, 16), (linear, False, None)])
def test_which_bases_they_are(made, by_length, limit):
    config = made().config
    assert (turns_by_length(config), limit_of(config)) == (by_length, limit)
    config.rope_parameters = {"full_attention": {"rope_type": "default"}, "sliding_attention": LONG}
    assert turns_by_length(config)
    assert limit_of(config) == 16  # the base's own may be larger
    config.rope_parameters = {"rope_type": "dynamic", "original_max_position_embeddings": 8}
    assert limit_of(config) == config.max_position_embeddings  # transformers reads no other


@pytest.mark.parametrize("made", [longrope, dynamic, linear])
def test_what_all_rows_begin_with_has_the_positions_of_whole_rows(made, tmp_path):
    model = adapted(made)
    start = torch.randint(3, 97, (12,))
    ids = torch.stack([torch.cat([start, torch.randint(3, 97, (12,))]) for _ in range(4)])
    labels = ids.clone()
    labels[:, :16] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def gradients(kind):
        model.zero_grad()
        model.train()
        trainer = kind(model=model, args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(32))
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (plain, expected), (ours, found) = gradients(Trainer), gradients(ShadowTrainer)
    assert ours == pytest.approx(plain, rel=1e-5)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("made", [longrope, dynamic])
def test_drafts_stay_below_the_limit(made):
    model = adapted(made).eval()
    prompt = torch.randint(3, 97, (1, 5))
    options = {"do_sample": False, "eos_token_id": None}
    below = [model.generate(prompt, max_new_tokens=11, **more, **options) for more in ({}, {"speculative": True})]
    assert torch.equal(*below)
    with pytest.raises(ConfigError, match="room for 17 tokens, but beyond 16 this base turns its positions in another way"):
        model.generate(prompt, max_new_tokens=12, speculative=True, **options)


def test_a_base_that_begins_with_linear_layers_generates():
    sizes = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    model = adapted(lambda: MiniMaxForCausalLM(MiniMaxConfig(**sizes, block_size=4, layer_types=kinds))).eval()
    prompt = torch.randint(3, 97, (1, 9))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))

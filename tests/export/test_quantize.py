"""int8 and int4: close to the source within their steps, and the same bytes after saving and loading."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import edges
from shadowpeft.export import quantize, verify


@torch.no_grad()
def dequantised(weight):
    return weight.dequantize() if hasattr(weight, "dequantize") else weight


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded(dtype, tied, tmp_path):
    source = edges.model("llama", tie_word_embeddings=tied)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    report = quantize.write(source, edges.tokenizer(), tmp_path / "q", dtype)
    assert report["quantised"] == 2 * 7 + 2
    assert source.config.tie_word_embeddings is tied
    assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())
    again = quantize.read(tmp_path / "q")
    assert not again.config.tie_word_embeddings
    layers = {n: m.weight for n, m in again.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2}
    assert len(layers) == report["quantised"]
    for name, weight in layers.items():
        assert type(weight.data).__name__ != "Tensor", f"{name} is not quantised"
        outer = name in ("lm_head", "model.embed_tokens")
        key = "model.embed_tokens.weight" if tied and outer else f"{name}.weight"
        plain = before[key].reshape(len(weight), -1, 32 if dtype == "int4" and not outer else weight.shape[1])
        steps = 7 if dtype == "int4" and not outer else 127
        error = (dequantised(weight).reshape(plain.shape) - plain).abs()
        assert (error <= plain.abs().amax(-1, keepdim=True) / steps * 0.6 + 1e-6).all(), name
    if dtype == "int8":
        found = verify.compare(source, again, edges.tokenizer())
        assert found["tokens_equal"] >= 0.85 * found["tokens"]


def test_what_no_group_divides_has_one_scale_a_row(tmp_path):
    source = edges.model("qwen3", hidden_size=72, tie_word_embeddings=True)
    quantize.write(source, edges.tokenizer(), tmp_path / "q", "int4")
    again = quantize.read(tmp_path / "q")
    plain = source.model.layers[0].self_attn.q_proj.weight
    error = (dequantised(again.model.layers[0].self_attn.q_proj.weight) - plain).abs()
    assert (error <= plain.abs().amax(-1, keepdim=True) / 7 * 0.6).all()
    assert float(error.max()) > 0


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize(("arch", "overrides"), [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True})])
def test_biases_stay_as_they_are(arch, overrides, dtype, tmp_path):
    source = edges.model(arch, **overrides)
    report = quantize.write(source, edges.tokenizer(), tmp_path / "q", dtype)
    assert report["quantised"] == 2 * 7 + 2
    again, before = quantize.read(tmp_path / "q"), source.state_dict()
    biases = [name for name in before if name.endswith(".bias")]
    assert len(biases) == 2 * (3 if arch == "qwen2" else 7)
    after = again.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in biases)
    assert verify.weight_error(source, again) <= (0.05 if dtype == "int8" else 0.25)
    assert type(again.model.layers[0].self_attn.q_proj.weight.data).__name__ != "Tensor"
    if dtype == "int8":
        found = verify.compare(source, again, edges.tokenizer())
        assert found["tokens_equal"] >= 0.85 * found["tokens"]


def test_a_table_that_scales_what_it_looks_up_is_left_alone(tmp_path):
    torch.manual_seed(1)
    shape = {
        **dict.fromkeys(("num_hidden_layers", "num_key_value_heads"), 2),
        **{"vocab_size": 452, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2},
    }
    source = Gemma3ForCausalLM(Gemma3TextConfig(**shape)).eval()
    report = quantize.write(source, edges.tokenizer(), tmp_path / "q", "int8")
    assert report["quantised"] == 2 * 7 + 1  # the head, not the table
    again = quantize.read(tmp_path / "q")
    assert torch.equal(again.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert float(again.model.embed_tokens.embed_scale) == float(source.model.embed_tokens.embed_scale) == 8
    found = verify.compare(source, again, edges.tokenizer())
    assert found["tokens_equal"] >= 0.85 * found["tokens"]

"""int8 and int4: close to the source within their steps, and the same bytes after saving and loading."""

import pytest
import torch

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

"""ONNX: onnxruntime gives torch's logits for any number of rows and tokens, with padding on the left."""

import onnxruntime
import pytest
import torch
from test_gguf import LINEAR, LLAMA3
from transformers import AutoTokenizer

import edges
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import genai, onnx


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_any_shape(arch, tmp_path):
    source = edges.model(arch, num_hidden_layers=1)
    words = edges.tokenizer()
    report = onnx.write(source, words, tmp_path / "o", "f32")
    graph = onnx.read(tmp_path / "o")
    session = onnxruntime.InferenceSession(tmp_path / "o" / "model.onnx")
    assert report["use"] == session.get_modelmeta().custom_metadata_map["use"]
    assert report["use"].startswith("scoring only")
    for rows, length, hidden in ((2, 7, 3), (1, 1, 0), (3, 40, 11)):
        ids = edges.ids(rows, length)
        mask = torch.ones_like(ids)
        mask[0, :hidden] = 0
        with torch.no_grad():
            expected = source(input_ids=ids, attention_mask=mask).logits
        found = graph(input_ids=ids, attention_mask=mask).logits
        assert found.shape == expected.shape
        real = mask.bool()
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-4)  # logits of about 30, in float32
    again = AutoTokenizer.from_pretrained(tmp_path / "o")
    assert again(edges.SENTENCES[0]).input_ids == words(edges.SENTENCES[0]).input_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "overrides"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"rope_parameters": LLAMA3}), ("qwen2", {}), ("qwen3", {})],
)
def test_with_a_cache(arch, overrides, tmp_path):
    """onnxruntime alone from an empty cache, and onnxruntime-genai with its cache, against transformers."""
    runtime = pytest.importorskip("onnxruntime_genai")
    source, words = edges.model(arch, **overrides), edges.tokenizer()
    genai.write(source, words, tmp_path / "o", "f32")
    graph, ids = genai.read(tmp_path / "o"), edges.ids(2, 30)
    with torch.no_grad():
        expected = source(input_ids=ids).logits
    torch.testing.assert_close(graph(ids, torch.ones_like(ids)).logits, expected, rtol=0, atol=2e-4)
    model = runtime.Model(str(tmp_path / "o"))
    tokenizer, parameters = runtime.Tokenizer(model), runtime.GeneratorParams(model)
    for text in edges.TEXTS:
        assert tokenizer.encode(text).tolist() == words(text).input_ids
    parameters.set_search_options(max_length=60, do_sample=False)
    generator = runtime.Generator(model, parameters)
    generator.append_tokens(ids[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    whole = source.generate(ids[:1], attention_mask=torch.ones(1, 30), max_length=60, do_sample=False)
    assert list(generator.get_sequence(0)) == whole[0].tolist()


@pytest.mark.slow
def test_what_the_builder_does_not_know_is_refused(tmp_path):
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UnsupportedModelError, match="llama3 RoPE style is not currently supported"):
        genai.write(edges.model("qwen2", rope_parameters=LLAMA3), edges.tokenizer(), tmp_path / "o", "f32")


def test_a_cache_with_scaling_that_the_builder_ignores_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="rotary scaling of type 'linear'"):
        genai.write(edges.model(rope_parameters=LINEAR), edges.tokenizer(), tmp_path / "o", "f32")
    assert not (tmp_path / "o").exists()

"""ONNX: onnxruntime gives torch's logits for any number of rows and tokens, with padding on the left."""

import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

import edges
from shadowpeft.export import onnx


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

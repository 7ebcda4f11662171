"""What onnxruntime-genai's builder would leave out of a graph, or fails at without a reason, is refused by name before."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

import edges
from edges import SHAPE
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import genai


@pytest.fixture
def nothing_built(monkeypatch):
    def called(*arguments, **options):
        raise AssertionError("the builder was started")

    monkeypatch.setattr(genai.subprocess, "run", called)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MistralConfig(**SHAPE, sliding_window=128), "MistralForCausalLM has a sliding window of 128 tokens"),
        (
            Qwen3Config(**SHAPE, head_dim=16, use_sliding_window=True, sliding_window=128, max_window_layers=1),
            "Qwen3ForCausalLM has a sliding window of 128 tokens",
        ),
        (
            Gemma3TextConfig(**SHAPE, head_dim=16, layer_types=["full_attention"] * 2),
            "Gemma3ForCausalLM has rotary positions of more than one kind",
        ),
        (Phi3Config(**SHAPE), "Phi3ForCausalLM has 512 positions but original_max_position_embeddings is 4096"),
    ],
    ids=["mistral", "qwen3", "gemma3", "phi3"],
)
def test_refused_before_anything_is_built(config, says, nothing_built, tmp_path):
    with pytest.raises(UnsupportedModelError, match=f"{says}.*; choose another format$"):
        genai.write(AutoModelForCausalLM.from_config(config), edges.tokenizer(), tmp_path / "o", "f32")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(**SHAPE, sliding_window=511), 511),
        (MistralConfig(**SHAPE, sliding_window=512), None),
        (MistralConfig(**SHAPE, sliding_window=None), None),
        (Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=128), None),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=128, max_window_layers=1), 128),
        (Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=128, max_window_layers=2), None),
    ],
)
def test_a_window_counts_where_a_layer_has_it_and_a_text_can_be_longer(config, window):
    assert genai.window_of(config) == window


def test_a_window_that_no_text_reaches_changes_nothing():
    source = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=512)).eval()
    plain = AutoModelForCausalLM.from_config(MistralConfig(**SHAPE, sliding_window=None)).eval()
    plain.load_state_dict(source.state_dict())
    ids = edges.ids(1, 512)
    with torch.no_grad():
        torch.testing.assert_close(source(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_the_builder_says_names_no_temporary_folder(tmp_path):
    pytest.importorskip("onnxruntime_genai")
    from transformers import Olmo2Config

    with pytest.raises(UnsupportedModelError, match=r"Olmo2ForCausalLM \(NotImplementedError: The model is not currently"):
        genai.write(AutoModelForCausalLM.from_config(Olmo2Config(**SHAPE)), edges.tokenizer(), tmp_path / "o", "f32")

"""GGUF: written, loaded back by transformers and compared; the tokenizer inside splits as the source's does."""

from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import edges
import tiny
from products import covering
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.export import gguf

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama own head_dim": ("llama", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama one head": ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 own head_dim": ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
}


@torch.no_grad()
def difference(source, other):
    """Largest difference of the logits, relative to the largest logit."""
    ids = edges.ids()
    expected = source(input_ids=ids).logits
    return float((other(input_ids=ids).logits - expected).abs().max() / expected.abs().max())


def reads_alike(source, folder):
    """Whether transformers by itself makes the same model of the file."""
    try:
        plain = AutoModelForCausalLM.from_pretrained(folder, gguf_file="m.gguf", dtype=torch.float32)
    except (ValueError, RuntimeError):  # of shapes
        return False
    return difference(source, plain.eval()) < 1e-4


@pytest.mark.parametrize("case", MODELS)
def test_float32_is_exact(case, tmp_path):
    arch, overrides = MODELS[case]
    source = edges.model(arch, **overrides)
    report = gguf.write(source, edges.tokenizer(), tmp_path / "m.gguf", "f32")
    again = gguf.read(tmp_path / "m.gguf")
    assert report["architecture"] == arch
    assert type(again) is type(source)
    assert again.config.tie_word_embeddings == source.config.tie_word_embeddings
    assert difference(source, again) < 1e-5  # the same numbers in another order of rows
    assert ("transformers' gguf_file" in report) is not reads_alike(source, tmp_path)


def test_the_named_file_is_read_whatever_stands_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    source = edges.model("llama")
    gguf.write(source, edges.tokenizer(), tmp_path / "mine" / "m.gguf", "f32")
    gguf.write(edges.model("qwen2", num_hidden_layers=1), edges.tokenizer(), tmp_path / "m.gguf", "f32")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "mine" / "m.gguf", Path("mine") / "m.gguf"):
        assert difference(source, gguf.read(path)) < 1e-5  # the same numbers in another order of rows


def step(weight, dtype):
    """The largest error that rounding a number of ``weight`` ``(o, i)`` may make, by the definition of each type."""
    if dtype == "f16":
        return weight.abs() * 2.0**-11 + 2.0**-25  # 11 bits; below 6e-5 a fixed step
    largest = weight.reshape(len(weight), -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(weight.shape)
    half = {"q8_0": 0.5 / 127, "q4_0": 1 / 8}[dtype]  # q4_0 has -8 .. 7, so the largest of the other sign is clipped
    return largest * (half + 2.0**-11) + 1e-6  # the scale itself is a f16


@pytest.mark.parametrize(("arch", "dtype"), covering(["llama", "qwen2", "qwen3"], ["f16", "q8_0", "q4_0"]))
def test_rounded_types(arch, dtype, tmp_path):
    source = edges.model(arch)
    report = gguf.write(source, edges.tokenizer(), tmp_path / "m.gguf", dtype)
    assert report["kept_f16"] == []
    again = gguf.read(tmp_path / "m.gguf")
    theirs = again.state_dict()
    for name, weight in source.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(theirs[name], weight)
        else:
            outer = name in ("model.embed_tokens.weight", "lm_head.weight")
            kind = "q8_0" if dtype == "q4_0" and outer else dtype
            assert ((theirs[name] - weight).abs() <= step(weight, kind)).all(), name
            assert not torch.equal(theirs[name], weight)
    if dtype == "f16":
        assert difference(source, again) < 3e-3  # 5e-4 a weight through two layers
    kinds = {t.name: t.tensor_type.name for t in package.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == ("Q8_0" if dtype == "q4_0" else dtype.upper())


def test_a_width_that_blocks_do_not_divide_stays_f16_and_is_named(tmp_path):
    source = edges.model(hidden_size=72, head_dim=16)
    report = gguf.write(source, edges.tokenizer(), tmp_path / "m.gguf", "q8_0")
    assert "blk.0.attn_q.weight" in report["kept_f16"]
    assert "blk.0.ffn_down.weight" not in report["kept_f16"]  # 96 wide
    weight, again = source.state_dict(), gguf.read(tmp_path / "m.gguf").state_dict()
    for name, kind in (("self_attn.q_proj", "f16"), ("mlp.down_proj", "q8_0")):
        key = f"model.layers.1.{name}.weight"
        assert ((again[key] - weight[key]).abs() <= step(weight[key], kind)).all()


def test_rows_of_neighbours_give_the_same_scores():
    heads, size = 3, 8
    generator = torch.Generator().manual_seed(0)
    weight = {n: torch.randn(heads * size, 10, generator=generator, dtype=torch.float64) for n in "qk"}
    x = torch.randn(5, 10, generator=generator, dtype=torch.float64)

    def turned(rows, pairs):
        states = (x @ rows.T).reshape(5, heads, size).clone()
        out = states.clone()
        for t in range(5):
            for j, (a, b) in enumerate(pairs):
                angle = torch.tensor(t * 10000.0 ** (-2 * j / size), dtype=torch.float64)
                out[t, :, a] = states[t, :, a] * angle.cos() - states[t, :, b] * angle.sin()
                out[t, :, b] = states[t, :, a] * angle.sin() + states[t, :, b] * angle.cos()
        return out

    halves = [(j, j + size // 2) for j in range(size // 2)]
    beside = [(2 * j, 2 * j + 1) for j in range(size // 2)]
    expected = torch.einsum("thi,shi->hts", turned(weight["q"], halves), turned(weight["k"], halves))
    moved = {n: gguf.neighbours(w, heads) for n, w in weight.items()}
    found = torch.einsum("thi,shi->hts", turned(moved["q"], beside), turned(moved["k"], beside))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rope_factors_of_llama3_against_the_formula():
    found = gguf.rope_factors(edges.model(rope_parameters=LLAMA3)).tolist()
    expected = []
    for j in range(8):
        wavelength = 2 * np.pi * 10000.0 ** (2 * j / 16)
        turns = 32 / wavelength
        if turns > 4:
            expected.append(1.0)
        elif turns < 1:
            expected.append(8.0)
        else:
            smooth = (turns - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) / 8 + smooth))
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) > 2


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_tokenizer_inside_splits_the_same(kind, tmp_path):
    words = edges.tokenizer(kind)
    gguf.write(edges.model("qwen2" if kind == "qwen2" else "llama"), words, tmp_path / "m.gguf", "f16")
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in [*edges.TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        assert again(text, add_special_tokens=False).input_ids == words(text, add_special_tokens=False).input_ids
    assert again.chat_template == words.chat_template
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("bos", [False, True])
def test_what_the_file_says(bos, tmp_path):
    words = edges.tokenizer("smollm", bos=bos)
    gguf.write(edges.model(), words, tmp_path / "m.gguf", "f16")
    fields = package.GGUFReader(tmp_path / "m.gguf").fields
    said = {
        k.removeprefix("tokenizer.ggml."): v.contents() for k, v in fields.items() if k.startswith("tokenizer.ggml")
    }
    assert said["pre"] == "smollm"
    assert said["add_bos_token"] is bos
    tool = words.convert_tokens_to_ids("<tool>")
    assert [said["token_type"][i] for i in (0, 2, 3, tool, 451)] == [3, 3, 1, 4, 5]
    assert [said["tokens"][i] for i in (2, tool, 451)] == ["<|im_end|>", "<tool>", "[PAD451]"]
    assert len(said["tokens"]) == len(set(said["tokens"])) == 452
    assert fields["tokenizer.chat_template"].contents() == words.chat_template


def test_a_second_stop_token_is_named(tmp_path):
    source = edges.model()
    source.generation_config.eos_token_id = [0, 2]
    gguf.write(source, edges.tokenizer(), tmp_path / "m.gguf", "f16")
    fields = package.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 0


def test_named_chat_templates(tmp_path):
    words = edges.tokenizer()
    words.chat_template = {"default": words.chat_template, "tool use": words.chat_template + "\n"}
    gguf.write(edges.model(), words, tmp_path / "m.gguf", "f16")
    fields = package.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == words.chat_template["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == words.chat_template["tool use"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: edges.model(hidden_act="gelu"), "activation 'gelu'"),
        (lambda: edges.model("qwen3", use_sliding_window=True, sliding_window=8), "sliding windows"),
        (lambda: edges.model("qwen2", rope_parameters=LLAMA3), "rotary scaling of type 'llama3'"),
        (lambda: edges.model(rope_parameters={**LINEAR, "rope_type": "dynamic"}), "type 'dynamic'"),
        (lambda: edges.model("qwen3", attention_bias=True), "a bias on model.layers.0.self_attn.q_proj"),
        (lambda: edges.model("qwen2", head_dim=32), "heads of 32 numbers"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=452)), "GPT2LMHeadModel"),
        (lambda: edges.model(vocab_size=300), "has the id"),
    ],
)
def test_models_that_llama_cpp_would_run_wrongly_are_refused(make, says, tmp_path):
    with pytest.raises(UnsupportedModelError, match=says):
        gguf.write(make(), edges.tokenizer(), tmp_path / "m.gguf", "f16")


def test_tokenizers_that_llama_cpp_would_run_wrongly_are_refused(tmp_path):
    words = edges.tokenizer()
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        gguf.write(edges.model(), tiny.tokenizer(), tmp_path / "m.gguf", "f16")
    for change, says in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text by"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"model": {"ignore_merges": True}}, "ignore_merges"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            gguf.write(edges.model(), changed(words, change), tmp_path / "m.gguf", "f16")


def changed(words, change):
    """``words`` with parts of its tokenizer.json replaced."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(words.backend_tokenizer.to_str())
    for key, value in change.items():
        content[key] = {**content[key], **value} if key == "model" else value
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>")


def test_values_beyond_f16_are_refused(tmp_path):
    source = edges.model()
    with torch.no_grad():
        source.lm_head.weight[0, 0] = 1e6
    with pytest.raises(UnsupportedModelError, match="beyond the range of f16"):
        gguf.write(source, edges.tokenizer(), tmp_path / "m.gguf", "f16")

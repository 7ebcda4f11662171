"""Exported files in llama.cpp itself: the same tokens of a text, the same logits, the same greedy continuation.

Needs llama-cpp-python, which builds from source: ``make llamacpp``.
"""

import numpy as np
import pytest
import torch
from test_gguf import LINEAR, LLAMA3, MODELS

import edges
from shadowpeft.export import gguf, verify, vocab

pytestmark = pytest.mark.llamacpp
F32 = 0  # the type of llama.cpp's key-value cache; its default is f16


def load(file, cache=F32):
    from llama_cpp import Llama

    return Llama(
        str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=cache, type_v=cache, flash_attn=False
    )


class Runner:
    """llama.cpp, called like a transformers model with one row."""

    def __init__(self, file):
        self.llama = load(file)

    def __call__(self, input_ids, attention_mask=None):
        from types import SimpleNamespace

        self.llama.reset()
        ids = input_ids[0].tolist()
        self.llama.eval(ids)
        return SimpleNamespace(logits=torch.from_numpy(np.array(self.llama.scores[: len(ids)]))[None])


@pytest.mark.parametrize("case", MODELS)
def test_logits(case, tmp_path):
    arch, overrides = MODELS[case]
    source = edges.model(arch, **overrides)
    gguf.write(source, edges.tokenizer(), tmp_path / "m.gguf", "f32")
    ids = edges.ids(1, 60)
    with torch.no_grad():
        expected = source(input_ids=ids).logits
    found = Runner(tmp_path / "m.gguf")(ids).logits
    # two float32 programs that add in different orders; logits of about 30
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_scaled_rotary_angles_matter_here():
    """The cases above would pass with any rotary scaling if it changed nothing."""
    ids = edges.ids(1, 60)
    with torch.no_grad():
        plain = edges.model()(input_ids=ids).logits
        for rope in (LINEAR, LLAMA3):
            assert float((edges.model(rope_parameters=rope)(input_ids=ids).logits - plain).abs().max()) > 1


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_tokens(kind, tmp_path):
    words = edges.tokenizer(kind)
    small = vocab.trim(edges.model(), words, words(edges.SENTENCES[0]).input_ids)
    for name, model, tokenizer in (("m", edges.model(), words), ("s", small.model, small.tokenizer)):
        gguf.write(model, tokenizer, tmp_path / f"{name}.gguf", "f16")
        llama = load(tmp_path / f"{name}.gguf")
        for text in [*edges.TEXTS, "<|im_start|>user\nhi 1  23<|im_end|>\n<tool> x"]:
            expected = tokenizer(text, add_special_tokens=False).input_ids
            assert llama.tokenize(text.encode(), add_bos=False, special=True) == expected
            assert llama.detokenize(expected, special=True).decode() == tokenizer.decode(expected)


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_begins_as_the_tokenizer_says(bos, tmp_path):
    words = edges.tokenizer(bos=bos)
    gguf.write(edges.model(), words, tmp_path / "m.gguf", "f16")
    llama = load(tmp_path / "m.gguf")
    assert llama.tokenize(b"the dog", add_bos=True, special=True) == words("the dog").input_ids


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_rounded_files_run(dtype, tmp_path):
    """llama.cpp on the file against transformers on the same rounded numbers: what is left is arithmetic in 8 or 16 bits."""
    gguf.write(edges.model(), edges.tokenizer(), tmp_path / "m.gguf", dtype)
    found = verify.compare(gguf.read(tmp_path / "m.gguf"), Runner(tmp_path / "m.gguf"), edges.tokenizer())
    assert found["tokens_equal"] >= (0.95 if dtype == "f16" else 0.8) * found["tokens"]


def test_greedy_answers_to_a_chat(tmp_path):
    """llama.cpp renders the chat template of the file, tokenises, and answers as transformers' generate does."""
    source, words = edges.model(), edges.tokenizer()
    gguf.write(source, words, tmp_path / "m.gguf", "f32")
    chat = [{"role": "user", "content": "Sit down, please"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    out = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
        0, ids.shape[1] :
    ]
    expected = words.decode(out, skip_special_tokens=True).replace(
        "\ufffd", ""
    )  # bytes that are no text: left out there
    said = load(tmp_path / "m.gguf").create_chat_completion(chat, max_tokens=12, temperature=0.0, repeat_penalty=1.0)
    assert said["choices"][0]["message"]["content"] == expected
    assert len(expected) > 5

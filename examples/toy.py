"""What the examples run on: a tiny random Llama with a byte tokenizer, or any real base, and a few questions."""

import argparse

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

QUESTIONS = [
    {"prompt": f"Turn {way} {n} times", "response": f"[Turn{way}()] x{n}"}
    for way in ("Left", "Right")
    for n in range(8)
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def arguments():
    """``--base`` (alias such as smollm2-135m, folder or Hub id; default: the toy), ``--steps`` and ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="toy")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", default="example-output")
    return parser.parse_args()


def load(name):
    """Base and tokenizer."""
    torch.manual_seed(0)
    if name != "toy":
        from shadowpeft.hf.base.load import load_base
        from shadowpeft.tokenizer import load_tokenizer

        return load_base(name), load_tokenizer(name)
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    words = {word: i for i, word in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    size["initializer_range"] = 0.2  # the head stays frozen: at the usual 0.02 a random one could hardly say anything
    ids = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**size, **ids)), tokenizer

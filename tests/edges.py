"""Tiny edge models and real byte-pair tokenizers for them, trained here on a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import shadowpeft
from chatbase import CHATML

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = [
    "Sit down, please, and then stand up again. The dog sits down and the dog stands up.",
    "What is the capital of France? The capital of France is Paris, and 12 + 30 = 42.",
    "I'm sure you'll say hello to my friend Anna; they've waited 123 days.",
    "站起来,好吗? 站起来 站起来 坐下 坐下",
]
TEXTS = [
    *SENTENCES,
    "Completely other words: zebra  xylophone\n\n\tquartz 98765 ünïcödé 🐕!",
    "  don't  stop  ",
    "\r\n a\r\n",
]
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(kind: str) -> Any:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "gpt-2":
        return whole
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(_QWEN2 if kind == "qwen2" else _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def tokenizer(kind: str = "gpt-2", size: int = 420, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer of ``size`` tokens with chat template; with ``bos`` it begins every text with one."""
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    made.pre_tokenizer = _split(kind)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES * 3, trainer)
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    words = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    words.chat_template = CHATML
    return words


SHAPE: dict[str, Any] = {
    "vocab_size": 452,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def model(arch: str = "llama", **overrides: Any) -> Any:
    """A random model of two layers with 32 rows more than :func:`tokenizer` has tokens, every tensor non-zero."""
    shape = {
        **SHAPE,
        "initializer_range": 0.2,  # wide enough that every layer matters and greedy choices are clear
        **({"head_dim": 16} if arch == "qwen3" else {}),
        **overrides,
    }
    kinds: dict[str, Any] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, whole = kinds[arch]
    torch.manual_seed(1)
    made = whole(config(**shape)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * (0.3 if name.endswith("bias") else 0.1))
    return made


def ids(rows: int = 2, length: int = 40, high: int = 420) -> torch.Tensor:
    """Random token ids, long enough that rotary angles matter."""
    return torch.randint(3, high, (rows, length), generator=torch.Generator().manual_seed(4))


def save_pair(folder: Path, made: Any) -> None:
    """An adapted model as ``adapter`` and the edge model it detaches to as ``edge``, both with a tokenizer."""
    made.save_pretrained(folder / "adapter")
    shadowpeft.detach(made).save_pretrained(folder / "edge")
    for name in ("adapter", "edge"):
        tokenizer().save_pretrained(folder / name)

"""A tiny chat model with its tokenizer in a folder, and data files for it, so that whole runs take a second or two."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import shadowpeft
from shadowpeft.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALLING = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for c in m.get('tool_calls') or [] %}{{ '\n' if m['content'] or not loop.first }}<call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes tools and calls, as most do."""
SPECIALS = ("<pad>", "<eos>", "<|im_start|>", "<|im_end|>")


def chat_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>", pad: str | None = "<pad>") -> Any:
    """One token a byte, so that any text round-trips, and the four special tokens 0 to 3."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*SPECIALS, *letters])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    made = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, pad_token=pad)
    made.chat_template = template
    return made


def calling_tokenizer() -> Any:
    """With :data:`CALLING`, in which a call begins with a token of its own, 260."""
    made = chat_tokenizer(template=CALLING)
    made.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    return made


def save_sitting_adapter(folder: Path) -> Path:
    """The folder of an adapter both halves of which say ``[Sit()]``, beside its base in ``folder / "base"``."""
    base = save_sitting_base(folder / "base")
    config = shadowpeft.ShadowPeftConfig.preset("tuned", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / "adapter")
    load_tokenizer(base).save_pretrained(folder / "adapter")
    return folder / "adapter"


def chat_model(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama of three layers over :func:`chat_tokenizer`'s vocabulary."""
    torch.manual_seed(1)
    shape = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # wide enough that greedy choices are clear
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()


def save_base(folder: Path, **overrides: Any) -> str:
    """Base and tokenizer as a transformers folder."""
    chat_model(**overrides).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def plain_rows(n: int = 12) -> list[dict[str, Any]]:
    """Rows of very different lengths, both paths."""
    return [{"prompt": "say " + "ab" * (1 + i % 4), "response": "ok " + "x" * (i % 5)} for i in range(n)]


def mixed_rows() -> list[dict[str, Any]]:
    """Rows for both paths, one path, and with an answer for each path."""
    return [
        {"prompt": "sit", "response": "[Sit()] fine"},
        {"prompt": "why?", "response": "because of reasons", "path": "base"},
        {"prompt": "how?", "response": "[REMOTE]", "path": "shadow"},
        {"prompt": "what?", "response": "a long real answer", "shadow_response": "[REMOTE] no"},
        {"prompt": "站起来", "response": "[StandUp()] 好", "path": "both"},
        {"prompt": "when?", "response": "[REMOTE] later", "path": "shadow"},
    ]


def other_rows() -> list[dict[str, Any]]:
    """The same kinds of rows with other requests."""
    return [{**row, "prompt": row["prompt"] + "!"} for row in mixed_rows()]


def save_run_data(folder: Path, plain: int = 10) -> dict[str, str]:
    """A base, training rows of all kinds (``plain`` of them plain), and validation rows, as the paths of their files."""
    return {
        "base": save_base(folder / "base"),
        "train": write_rows(folder / "train.jsonl", plain_rows(plain) + mixed_rows()),
        "validation": write_rows(folder / "validation.jsonl", mixed_rows()),
    }


def run_file(folder: Path, base: str, train: str, /, **sections: Any) -> dict[str, Any]:
    """The content of a run file for the tiny base; ``sections`` extend or replace parts of it."""
    content: dict[str, Any] = {
        "base": base,
        "data": {"train": train, "max_length": 128},
        "shadow": {"r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.1},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "threads": 1},
        "output": str(folder),
    }
    for section, values in sections.items():
        content[section] = {**content[section], **values} if isinstance(values, dict) else values
    return content


def save_sitting_base(folder: Path, answer: str = "[Sit()]", **overrides: Any) -> str:
    """A base that gives ``answer`` to any chat: its layers do next to nothing, and its head makes one byte follow another.

    No byte may stand twice in ``answer``. A mirrored shadow that copies its layers says the same, so that the
    detached model has known actions without training.
    """
    words = chat_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024, **overrides}
    made = chat_model(**shape)
    said = [*words(f"\n{answer}", add_special_tokens=False).input_ids, 3]
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-4)  # not 0: DoRA divides by the norm of a row
            layer.mlp.down_proj.weight.mul_(1e-4)
        rows = torch.nn.functional.normalize(made.model.embed_tokens.weight, dim=-1)
        made.lm_head.weight.zero_()
        for before, after in pairwise(said):
            made.lm_head.weight[after] += 3.0 * rows[before]
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)

"""GGUF, llama.cpp's file: weights, tokenizer and chat template in one, for Llama- and Qwen-like shadows.

What llama.cpp expects of these architectures is in its file format's key names (the ``gguf`` package has them) and in two
conventions: Llama's rotary embedding turns neighbouring numbers, transformers' turns the two halves of a head, so the rows of
W_q and W_k change places; and a one-dimensional tensor is always float32.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shadowpeft.data.chat import stop_tokens
from shadowpeft.errors import ConfigError, UnsupportedModelError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BIASES = {
    "llama": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "qwen2": {"attn_q", "attn_k", "attn_v"},
    "qwen3": set(),
}
"""Which layers may have a bias: what llama.cpp's graph of the architecture adds."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_QWEN2: "qwen2", _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe"}
_BYTES_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of the format."""


def write(model: PreTrainedModel, tokenizer: Any, file: Path, dtype: str) -> dict[str, Any]:
    """Write ``file``; matrices as ``dtype`` (f32, f16, q8_0 or q4_0), with the token table and the head of q4_0 as q8_0.

    Returns:
        what loads it, the names of its parts, and the matrices whose width no block of 32 divides and that stayed f16.

    Raises:
        ConfigError: if the ``gguf`` package is missing.
        UnsupportedModelError: if llama.cpp cannot express the model or the tokenizer, naming what.
    """
    gguf = _package()
    arch = _check(model)
    words = token_tables(tokenizer, int(model.config.vocab_size))
    writer = gguf.GGUFWriter(file, arch)
    try:
        _describe(writer, model, dtype, gguf)
        _write_words(writer, model, tokenizer, words)
        kept = _write_tensors(writer, model, arch, dtype, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return {"loads with": "llama.cpp", "architecture": arch, "pre_tokenizer": words["pre"], "kept_f16": kept}


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError("the format gguf needs the package gguf; run: pip install 'shadowpeft[export]'") from error
    return gguf


# --------------------------------------------------------------------------------------------------------------- model


def _check(model: PreTrainedModel) -> str:
    config: Any = model.config
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the model is a {name} and GGUF is written for {', '.join(ARCHITECTURES)}; choose another format"
        )
    arch = ARCHITECTURES[name]
    rope = config.rope_parameters["rope_type"]
    heads = int(config.num_attention_heads)
    found = {
        f"the activation '{config.hidden_act}' (not silu)": config.hidden_act != "silu",
        "sliding windows": bool(getattr(config, "use_sliding_window", False)),
        f"rotary scaling of type '{rope}'": rope not in ("default", "linear", *(["llama3"] if arch == "llama" else [])),
        f"heads of {_head_dim(config)} numbers on a width of {config.hidden_size}": arch == "qwen2"
        and _head_dim(config) * heads != config.hidden_size,
    }
    wrong = [what for what, there in found.items() if there]
    wrong += [
        f"a bias on {n}"
        for n in model.state_dict()
        if n.endswith(".bias") and _gguf_name(n)[:-5] not in _allowed(arch, n)
    ]
    if wrong:
        raise UnsupportedModelError(
            f"the model has {wrong[0]}, which llama.cpp's {arch} has not; choose another format"
        )
    return arch


def _allowed(arch: str, name: str) -> set[str]:
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return {f"blk.{layer[1]}.{part}" for part in _BIASES[arch]} if layer else set()


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _describe(writer: Any, model: PreTrainedModel, dtype: str, gguf: Any) -> None:
    config: Any = model.config
    kinds = gguf.LlamaFileType
    types = {
        "f32": kinds.ALL_F32,
        "f16": kinds.MOSTLY_F16,
        "q8_0": kinds.MOSTLY_Q8_0,
        "q4_0": kinds.MOSTLY_Q4_0,
    }
    writer.add_type("model")
    writer.add_name("shadowpeft edge model")
    writer.add_file_type(types[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _gguf_name(name: str) -> str:
    """The name of a tensor in the file, for example ``blk.0.attn_q.weight``."""
    part, _, kind = name.rpartition(".")
    layer = re.match(r"model\.layers\.(\d+)\.(.*)", part)
    found = _INNER.get(layer[2]) if layer else _OUTER.get(part)
    if found is None:
        raise UnsupportedModelError(f"the tensor {name} has no place in llama.cpp's file; choose another format")
    return f"blk.{layer[1]}.{found}.{kind}" if layer else f"{found}.{kind}"


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of ``W_q`` or ``W_k`` ``(heads * head_dim, d)``, or of their bias, in llama.cpp's order.

    transformers turns the pairs ``(i, i + head_dim / 2)`` of a head, llama.cpp the pairs ``(2 i, 2 i + 1)``.
    """
    pairs = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_tensors(writer: Any, model: PreTrainedModel, arch: str, dtype: str, gguf: Any) -> list[str]:
    config: Any = model.config
    kept: list[str] = []
    tied = bool(config.tie_word_embeddings)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        target, value = _gguf_name(name), tensor.detach().float().cpu()
        if arch == "llama" and ".attn_q." in target:
            value = neighbours(value, config.num_attention_heads)
        elif arch == "llama" and ".attn_k." in target:
            value = neighbours(value, config.num_key_value_heads)
        kind = "f32" if value.dim() == 1 else dtype
        if kind == "q4_0" and target in ("token_embd.weight", "output.weight"):
            kind = "q8_0"
        if kind.startswith("q") and value.shape[1] % 32:
            kind, kept = "f16", [*kept, target]
        stored = gguf.GGMLQuantizationType[kind.upper()]
        if kind == "f16" and not bool((value.abs() < 65504).all()):
            raise UnsupportedModelError(f"the tensor {name} has values beyond the range of f16; choose --dtype f32")
        writer.add_tensor(target, gguf.quants.quantize(np.ascontiguousarray(value.numpy()), stored), raw_dtype=stored)
    if config.rope_parameters["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(model).numpy())
    return kept


def rope_factors(model: PreTrainedModel) -> Tensor:
    """``(head_dim / 2)``: what llama.cpp divides each rotary frequency by, from the model's own scaled frequencies."""
    scaled = next(m for m in model.modules() if hasattr(m, "inv_freq")).inv_freq.float()
    config: Any = model.config
    size = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).float()


# ----------------------------------------------------------------------------------------------------------- tokenizer


def token_tables(tokenizer: Any, rows: int) -> dict[str, Any]:
    """Tokens, types, merges and the name of the pre-tokenizer of a byte-level BPE tokenizer.

    Args:
        rows: rows of the token table; ids without a token become unused ones.

    Raises:
        UnsupportedModelError: if llama.cpp has no tokenizer that splits and merges like this one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = {"model": {"type": type(tokenizer).__name__}}
    if backend is not None:
        content = json.loads(backend.to_str())
    bpe = content["model"]
    if bpe["type"] != "BPE" or bpe.get("byte_fallback") or bpe.get("continuing_subword_prefix"):
        raise UnsupportedModelError(
            f"the tokenizer is a {bpe['type']} and GGUF is written for byte-level BPE ones; choose another format"
        )
    pre = pre_tokenizer_name(content.get("pre_tokenizer"))
    kind = (content.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC"):  # Qwen's NFC is left out by llama.cpp's own converter too
        raise UnsupportedModelError(
            f"the tokenizer normalises text ({kind}), which llama.cpp does not; choose another format"
        )
    if bool(bpe.get("ignore_merges")) != (pre == "llama-bpe"):
        raise UnsupportedModelError(
            f"the tokenizer has ignore_merges = {bool(bpe.get('ignore_merges'))}, which llama.cpp's '{pre}' has not; choose "
            "another format"
        )
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    added = {t["id"]: t for t in content.get("added_tokens", [])}
    for text, i in [*bpe["vocab"].items(), *((t["content"], i) for i, t in added.items())]:
        if i >= rows:
            raise UnsupportedModelError(
                f"the token {text!r} has the id {i} but the model has {rows} rows; resize its embeddings first"
            )
        tokens[i] = text
        types[i] = (CONTROL if added[i]["special"] else USER_DEFINED) if i in added else NORMAL
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "pre": pre}


def pre_tokenizer_name(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name of a way to split text into words, by what ``tokenizer.json`` says, not by the model's name.

    Raises:
        UnsupportedModelError: if it has none.
    """
    parts = (pre or {}).get("pretokenizers", [pre or {}]) if (pre or {}).get("type") == "Sequence" else [pre or {}]
    bare = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts]
    if bare == [_BYTES_SPLIT]:
        return "gpt-2"
    if bare == [{"type": "Digits", "individual_digits": True}, _BYTES_SPLIT]:
        return "smollm"
    if len(bare) == 2 and bare[0].get("type") == "Split" and bare[1] == {**_BYTES_SPLIT, "use_regex": False}:
        regex = bare[0]["pattern"].get("Regex")
        if regex in _SPLITS and bare[0]["behavior"] == "Isolated" and not bare[0]["invert"]:
            return _SPLITS[regex]
    raise UnsupportedModelError(
        f"the tokenizer splits text by {json.dumps(bare, ensure_ascii=False)[:120]}, which is none of llama.cpp's ways "
        "known here (gpt-2, smollm, qwen2, llama-bpe); choose another format"
    )


def _write_words(writer: Any, model: PreTrainedModel, tokenizer: Any, words: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["types"])
    writer.add_token_merges(words["merges"])
    ids = list(tokenizer("a").input_ids)
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    ends = [i for i in stop_tokens(model, tokenizer) if i != tokenizer.eos_token_id]
    named |= {"unk": tokenizer.unk_token_id, **dict(zip(("eot", "eom"), ends, strict=False))}
    for name, i in named.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(int(i))
    template = tokenizer.chat_template
    if template is not None:
        writer.add_chat_template(template if isinstance(template, str) else template["default"])


# ------------------------------------------------------------------------------------------------------------- reading


def read(file: Path) -> PreTrainedModel:
    """The file as a transformers model, its numbers widened to float32.

    transformers does not read every key of the format: heads of another size than ``d / heads``, biases of a Llama and rotary
    scaling are taken from the file here.
    """
    gguf = _package()
    reader = gguf.GGUFReader(file)
    names = {t.name: t for t in reader.tensors}
    arch = reader.fields["general.architecture"].contents()
    extra: dict[str, Any] = {}
    if arch != "qwen2":  # whose heads are always d / heads wide
        extra["head_dim"] = int(reader.fields[f"{arch}.attention.key_length"].contents())
    if arch == "llama":
        extra["attention_bias"] = "blk.0.attn_q.bias" in names
        extra["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    theta = float(reader.fields[f"{arch}.rope.freq_base"].contents())
    if f"{arch}.rope.scaling.type" in reader.fields:
        factor = float(reader.fields[f"{arch}.rope.scaling.factor"].contents())
        extra["rope_parameters"] = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **extra)
    if "rope_freqs.weight" in names:
        factors = torch.from_numpy(np.array(names["rope_freqs.weight"].data))
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq / factors
    for holder, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, mark):  # the weights are plain float32 now
            delattr(holder, mark)
    return model.eval()  # type: ignore[no-any-return]

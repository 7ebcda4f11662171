"""GGUF, llama.cpp's file: weights, tokenizer and chat template in one, for Llama- and Qwen-like shadows.

The ``gguf`` package has the names of keys and tensors. Two conventions are llama.cpp's own: Llama's rotary embedding turns
neighbouring numbers where transformers turns the two halves of a head, so the rows of W_q and W_k change places; and a
one-dimensional tensor is always float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from shadowpeft.ends import end_tokens
from shadowpeft.errors import UnsupportedModelError

_ARCH, _PART = gguf.MODEL_ARCH, gguf.MODEL_TENSOR
ARCHITECTURES = {"LlamaForCausalLM": _ARCH.LLAMA, "Qwen2ForCausalLM": _ARCH.QWEN2, "Qwen3ForCausalLM": _ARCH.QWEN3}
_QKV = {_PART.ATTN_Q, _PART.ATTN_K, _PART.ATTN_V}
_BIASES = {
    _ARCH.LLAMA: {*_QKV, _PART.ATTN_OUT, _PART.FFN_GATE, _PART.FFN_UP, _PART.FFN_DOWN},
    _ARCH.QWEN2: _QKV,
    _ARCH.QWEN3: set(),
}
"""Which layers may have a bias: what llama.cpp's graph of the architecture adds. The ``gguf`` package does not say."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDS = ("eos", "eot", "eom")
"""What the format calls the tokens that end an answer; llama.cpp stops at each."""
_SPLIT_AND_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {**_SPLIT_AND_BYTES, "use_regex": False}


def _regex(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_SPLIT_AND_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _SPLIT_AND_BYTES],
    "qwen2": [_regex(_QWEN2), _BYTES],
    "llama-bpe": [_regex(_QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), _BYTES],
}
"""llama.cpp's name of a way to split text -> what ``tokenizer.json`` says of it."""


def write(model: PreTrainedModel, tokenizer: Any, file: Path, dtype: str) -> dict[str, Any]:
    """Write ``file``; matrices as ``dtype`` (f32, f16, q8_0 or q4_0), with the token table and the head of q4_0 as q8_0.

    Returns:
        what loads it, the names of its parts, and the matrices that stay f16 because their width is no multiple of 32.

    Raises:
        UnsupportedModelError: if llama.cpp cannot express the model or the tokenizer, naming what.
    """
    arch, places = _check(model)
    vocabulary = token_tables(tokenizer, int(model.config.vocab_size))
    _ends(model, tokenizer)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    try:
        _write_config(writer, model, dtype)
        _write_vocabulary(writer, model, tokenizer, vocabulary)
        kept = _write_tensors(writer, model, arch, places, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    misread = misread_by_transformers(model.config, arch)
    return {
        "loads with": "llama.cpp",
        **({"transformers' gguf_file": f"no, it does not read the {' and the '.join(misread)}"} if misread else {}),
        "architecture": gguf.MODEL_ARCH_NAMES[arch],
        "pre_tokenizer": vocabulary["pre"],
        "kept_f16": kept,
    }


# --------------------------------------------------------------------------------------------------------------- model


def _check(model: PreTrainedModel) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """The architecture, and for every tensor the part of it that it is and its name in the file (``blk.0.attn_q.weight``)."""
    config: Any = model.config
    name = type(model).__name__
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the model is a {name} but GGUF is written for {', '.join(ARCHITECTURES)}; choose another format"
        )
    arch = ARCHITECTURES[name]
    rope = config.rope_parameters["rope_type"]
    scalings = ("default", "linear", "llama3") if arch is _ARCH.LLAMA else ("default", "linear")
    odd_heads = _head_dim(config) * config.num_attention_heads != config.hidden_size
    refused = {
        f"the activation '{config.hidden_act}' (not silu)": config.hidden_act != "silu",
        "sliding windows": bool(getattr(config, "use_sliding_window", False)),
        f"rotary scaling of type '{rope}'": rope not in scalings,
        f"heads of {_head_dim(config)} numbers on a width of {config.hidden_size}": arch is _ARCH.QWEN2 and odd_heads,
    }
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    places = {key: names.get_type_and_name(key, try_suffixes=(".weight", ".bias")) for key in model.state_dict()}
    refused |= {f"{key}, a tensor without a place in its file": place is None for key, place in places.items()}
    refused |= {
        f"a bias on {key}": key.endswith(".bias") and p[0] not in _BIASES[arch] for key, p in places.items() if p
    }
    for feature, present in refused.items():
        if present:
            raise UnsupportedModelError(
                f"the model has {feature}, which llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]} does not support; choose another "
                "format"
            )
    return arch, places


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_config(writer: Any, model: PreTrainedModel, dtype: str) -> None:
    config: Any = model.config
    kind = "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"
    writer.add_type("model")
    writer.add_name("shadowpeft edge model")
    writer.add_file_type(gguf.LlamaFileType[kind])
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


def misread_by_transformers(config: Any, arch: Any) -> list[str]:
    """What transformers' ``gguf_file=`` does not take from the file, so that its model would say something else."""
    found = {
        "rotary scaling": config.rope_parameters["rope_type"] != "default",
        "size of its heads": arch is _ARCH.QWEN3 and _head_dim(config) != 128,  # the default of its class
        "biases": arch is _ARCH.LLAMA and (config.attention_bias or config.mlp_bias),
    }
    return [name for name, is_so in found.items() if is_so]


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of ``W_q`` or ``W_k`` ``(heads * head_dim, d)``, or of their bias, in llama.cpp's order.

    transformers turns the pairs ``(i, i + head_dim / 2)`` of a head, llama.cpp the pairs ``(2 i, 2 i + 1)``.
    """
    pairs = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_tensors(
    writer: Any, model: PreTrainedModel, arch: Any, places: dict[str, tuple[Any, str]], dtype: str
) -> list[str]:
    config: Any = model.config
    kept: list[str] = []
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part, name = places[key]
        value, kind = tensor.detach().float().cpu(), dtype
        if arch is _ARCH.LLAMA and part in (_PART.ATTN_Q, _PART.ATTN_K):
            queries = part is _PART.ATTN_Q
            value = neighbours(value, config.num_attention_heads if queries else config.num_key_value_heads)
        if value.dim() == 1:
            kind = "f32"
        elif dtype == "q4_0" and part in (_PART.TOKEN_EMBD, _PART.OUTPUT):
            kind = "q8_0"
        if kind.startswith("q") and value.shape[1] % 32:
            kind, kept = "f16", [*kept, name]
        if kind == "f16" and not bool((value.abs() < 65504).all()):
            raise UnsupportedModelError(f"the tensor {key} has values beyond the range of f16; choose --dtype f32")
        stored = gguf.GGMLQuantizationType[kind.upper()]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value.numpy()), stored), raw_dtype=stored)
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

    By hand, since ``gguf.BpeVocab`` takes every added token for a control token and refuses ids that do not follow the
    vocabulary's, which a trimmed one's do not.

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
            f"the tokenizer is a {bpe['type']} but GGUF is written for byte-level BPE; choose another format"
        )
    pre = pre_tokenizer_name(content.get("pre_tokenizer"))
    kind = (content.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC"):  # Qwen's NFC is left out by llama.cpp's own converter too
        raise UnsupportedModelError(
            f"the tokenizer normalises text ({kind}), which llama.cpp does not; choose another format"
        )
    ignores = bool(bpe.get("ignore_merges"))
    if ignores != (pre == "llama-bpe"):
        raise UnsupportedModelError(
            f"the tokenizer has ignore_merges = {ignores} but llama.cpp's '{pre}' needs {not ignores}; choose another format"
        )
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    added = {t["id"]: t for t in content.get("added_tokens", [])}
    for text, i in [*bpe["vocab"].items(), *((t["content"], i) for i, t in added.items())]:
        if i >= rows:
            raise UnsupportedModelError(
                f"the token {text!r} has the id {i} but the model has {rows} rows; resize its embeddings first"
            )
        tokens[i], types[i] = text, gguf.TokenType.NORMAL
        if i in added:
            types[i] = gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "pre": pre}


def pre_tokenizer_name(pre: dict[str, Any] | None) -> str:
    """llama.cpp's name of a way to split text into words, by what ``tokenizer.json`` says, not by the model's name.

    Raises:
        UnsupportedModelError: if it has none.
    """
    whole = pre or {}
    parts = whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole]
    parts = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in parts]
    for name, split in _SPLITS.items():
        if parts == split:
            return name
    raise UnsupportedModelError(
        f"the tokenizer splits text by {json.dumps(parts, ensure_ascii=False)[:120]}, but GGUF is written for llama.cpp's "
        f"{', '.join(_SPLITS)}; choose another format"
    )


def _ends(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, the tokenizer's own first."""
    ends = sorted(end_tokens(model, tokenizer), key=lambda i: i != tokenizer.eos_token_id)
    if len(ends) > len(_ENDS):
        raise UnsupportedModelError(
            f"{len(ends)} tokens end an answer ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(ends)))}) but a GGUF file "
            f"names at most {len(_ENDS)}; shorten eos_token_id in the source's generation_config.json"
        )
    return ends


def _write_vocabulary(writer: Any, model: PreTrainedModel, tokenizer: Any, vocabulary: dict[str, Any]) -> None:
    """By hand, since ``gguf.SpecialVocab`` guesses from tokenizer.json whether a text begins with bos; here it is tried."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    ids = list(tokenizer("a").input_ids)
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "pad", "unk")}
    ends = dict(zip(_ENDS, _ends(model, tokenizer), strict=False))
    for name, i in {**named, **ends}.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(int(i))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        writer.add_chat_template(template)


# ------------------------------------------------------------------------------------------------------------- reading


def read(file: Path) -> PreTrainedModel:
    """The file as a transformers model, its numbers widened to float32.

    transformers does not read every key of the format: heads of another size than ``d / heads``, biases of a Llama and rotary
    scaling are taken from the file here.
    """
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
    whole = str(file.absolute())  # transformers looks for a bare name in the working directory first
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=whole, dtype=torch.float32, **extra)
    if "rope_freqs.weight" in names:
        factors = torch.from_numpy(np.array(names["rope_freqs.weight"].data))
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq = module.inv_freq / factors
    for holder, mark in ((model.config, "quantization_config"), (model, "hf_quantizer")):
        if hasattr(holder, mark):  # the weights are plain float32 now
            delattr(holder, mark)
    return model.eval()  # type: ignore[no-any-return]

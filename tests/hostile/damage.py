"""Ways to damage an adapter folder, as hypothesis strategies: each draws a function that damages a folder in place."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Damage = Callable[[Path], None]
DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]
HUGE = [10**6, 10**9, 10**12, 2**31, 2**40 - 1, 2**60, 2**63, 10**30, -1, -(10**12), 0, 1, 2, 3, 7]
ODD = [
    None,
    True,
    False,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "owner/name",
    "a\0b",
    "\ud800",
    "os.system",
    [],
    {},
    [1],
    [[]],
    {"a": 1},
    0.5,
    -0.0,
    float("inf"),
    float("nan"),
    "y" * 5000,
    *HUGE,
]


class Bomb:
    """A pickle that writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.touch, (self.canary,))


def canary(folder: Path) -> Path:
    """The file that appears if anything in the folder is executed."""
    return folder.parent / "executed"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def write(folder: Path, content: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(content))


def edit(change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(folder: Path) -> None:
        content = read(folder)
        change(content)
        write(folder, content)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor], str], None], which: int) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        change(content, sorted(content)[which % len(content)])
        save_file(content, folder / WEIGHTS)

    return damage


def header(change: Callable[[dict[str, Any], str], None], which: int) -> Damage:
    """Rewrite the safetensors header; the data stay."""

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        content = json.loads(raw[8 : 8 + length])
        names = sorted(k for k in content if k != "__metadata__")
        change(content, names[which % len(names)])
        text = json.dumps(content).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return damage


# ---------------------------------------------------------------------------------------------------------- bytes

FILES = st.sampled_from([CONFIG, WEIGHTS])
SHARE = st.floats(0, 1, exclude_max=True, allow_subnormal=False)  # a training run may have switched denormals off


@st.composite
def truncated(draw: Any) -> Damage:
    name, share = draw(FILES), draw(SHARE)

    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * share)])

    return damage


@st.composite
def flipped(draw: Any) -> Damage:
    """Up to eight bits, anywhere or in the first 4 KiB of a file (the header)."""
    name, places, near = draw(FILES), draw(st.lists(SHARE, min_size=1, max_size=8)), draw(st.booleans())
    bit = draw(st.integers(0, 7))

    def damage(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        for place in places:
            raw[int(place * (min(len(raw), 4096) if near else len(raw)))] ^= 1 << bit
        (folder / name).write_bytes(raw)

    return damage


@st.composite
def inserted(draw: Any) -> Damage:
    name, share = draw(FILES), draw(SHARE)
    piece = draw(
        st.one_of(
            st.binary(min_size=1, max_size=64), st.sampled_from([b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"{", b'"'])
        )
    )

    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        at = int(len(raw) * share)
        (folder / name).write_bytes(raw[:at] + piece + raw[at:])

    return damage


@st.composite
def replaced(draw: Any) -> Damage:
    """A file becomes something else altogether."""
    name = draw(FILES)
    kind = draw(
        st.sampled_from(["empty", "garbage", "folder", "missing", "pickle", "bin", "loop", "outside", "fifo", "json"])
    )
    garbage = draw(st.binary(max_size=200))

    def damage(folder: Path) -> None:
        path = folder / name
        original = path.read_bytes()
        path.unlink()
        bomb = pickle.dumps(Bomb(canary(folder)))
        if kind == "empty":
            path.write_bytes(b"")
        elif kind == "garbage":
            path.write_bytes(garbage)
        elif kind == "json":
            path.write_bytes(b"[" * 100_000)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pickle":
            path.write_bytes(bomb)
        elif kind == "bin":
            (folder / "adapter_model.bin").write_bytes(bomb)
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "outside":
            outside = folder.parent / f"outside-{name}"
            outside.write_bytes(original)
            path.symlink_to(outside)

    return damage


# --------------------------------------------------------------------------------------------------- configuration

KEYS = [
    "r",
    "shadow_alpha",
    "shadow_dropout",
    "update_hidden_size",
    "use_update",
    "shadow_model",
    "shadow_num_hidden_layers",
    "shadow_intermediate_size",
    "shadow_num_attention_heads",
    "shadow_head_dim",
    "shadow_hidden_size",
    "shadow_init",
    "projection_init",
    "share_embeddings",
    "auxiliary_loss_weight",
    "variant",
    "modules_to_save",
    "shadow_backbone_config",
    "base_fingerprint",
    "base_alias",
    "format_version",
    "task_type",
    "peft_type",
    "base_model_name_or_path",
    "inference_mode",
    "auto_mapping",
    "revision",
    "peft_version",
]
RECORD = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "pad_token_id",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "layer_types",
    "attention_dropout",
    "tie_word_embeddings",
    "model_type",
    "num_labels",
    "id2label",
    "torch_dtype",
    "dtype",
    "n_positions",
    "n_layer",
    "n_embd",
    "is_decoder",
    "output_attentions",
    "use_cache",
    "_attn_implementation",
    "attn_implementation",
    "auto_map",
    "trust_remote_code",
    "quantization_config",
    "num_local_experts",
    "text_config",
    "chunk_size_feed_forward",
    "problem_type",
    "pruned_heads",
]
ADDED = [
    "auto_map",
    "trust_remote_code",
    "target_modules",
    "shadow_alpah",
    "runtime_config",
    "__class__",
    "",
    "x" * 3000,
]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(HUGE),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
PATHS = [
    "..",
    "../../x",
    "/",
    "",
    ".",
    "model",
    "model.layers",
    "model.layers.1",
    "lm_head",
    "model.norm",
    "score",
    "shadow_hub",
    "model.shadow_hub",
    "base_layer",
    "__class__",
    "a" * 1000,
]


@st.composite
def other_setting(draw: Any) -> Damage:
    key, value, drop = draw(st.sampled_from(KEYS + ADDED)), draw(VALUES), draw(st.integers(0, 5)) == 0
    which = draw(st.none() | st.integers(0, 60))  # one of the keys that are there, whatever the format

    def change(content: dict[str, Any]) -> None:
        name = key if which is None else sorted(content)[which % len(content)]
        content.pop(name, None)
        if not drop:
            content[name] = value

    return edit(change)


@st.composite
def other_record(draw: Any) -> Damage:
    """A value inside the recorded configuration of the shadow, or inside the fingerprint of the base."""
    part = draw(st.sampled_from(["shadow_backbone_config"] * 3 + ["base_fingerprint"]))
    names = RECORD if part == "shadow_backbone_config" else ["architecture", "shapes", "values", "x"]
    key, value, drop = draw(st.sampled_from(names)), draw(VALUES), draw(st.integers(0, 7)) == 0
    kinds = ["gpt2", "bert", "t5", "mamba", "timm_backbone", "rag", "llama", "qwen3", "clip", "auto", "mixtral"]
    if key == "model_type":
        value = draw(st.sampled_from(kinds))

    def change(content: dict[str, Any]) -> None:
        record = content.setdefault(part, {})  # other packages have no such record
        record.pop(key, None)
        if not drop:
            record[key] = value

    return edit(change)


@st.composite
def code_names(draw: Any) -> Damage:
    """Every place that elsewhere makes a loader import and call something."""
    target = draw(
        st.sampled_from(["os.system", "pathlib.Path.touch", "owner/name--modeling.Model", "kernels-community/x"])
    )
    place = draw(
        st.sampled_from(["auto_map", "_attn_implementation", "attn_implementation", "torch_dtype", "hidden_act"])
    )
    value = {"AutoModel": target, "AutoConfig": target} if place == "auto_map" else target

    def change(content: dict[str, Any]) -> None:
        record = content.setdefault("shadow_backbone_config", {})
        record.update({place: value, "trust_remote_code": True, "model_type": draw_kind})

    draw_kind = draw(st.sampled_from(["llama", "custom", "causal_lm_with_hidden_projection"]))
    return edit(change)


@st.composite
def saved_whole(draw: Any) -> Damage:
    names = draw(st.lists(st.sampled_from(PATHS), min_size=1, max_size=3))
    return edit(lambda content: content.update({"modules_to_save": names}))


@st.composite
def text(draw: Any) -> Damage:
    """What a JSON writer would not write: a key twice, deep nesting, endless digits, NaN, another top level."""
    kind = draw(
        st.sampled_from(["twice", "deep", "deep value", "digits", "nan", "list", "number", "string", "null", "bom"])
    )
    key = draw(st.sampled_from(KEYS))

    def damage(folder: Path) -> None:
        body = (folder / CONFIG).read_text()
        made = {
            "twice": body.rstrip()[:-1] + f', "{key}": 3}}',
            "deep": '{"a":' * 50_000,
            "deep value": body.rstrip()[:-1] + ', "auto_mapping": ' + "[" * 3000 + "]" * 3000 + "}",
            "digits": body.rstrip()[:-1] + f', "{key}": ' + "9" * 6000 + "}",
            "nan": body.replace("0.7", "NaN", 1),
            "list": f"[{body}]",
            "number": "17",
            "string": json.dumps(body),
            "null": "null",
            "bom": "\ufeff" + body,
        }[kind]
        (folder / CONFIG).write_text(made, encoding="utf-8")

    return damage


# --------------------------------------------------------------------------------------------------------- tensors


@st.composite
def other_tensor(draw: Any) -> Damage:
    """One tensor with another shape, dtype, value or name, or gone, or twice."""
    which, kind = (
        draw(st.integers(0, 200)),
        draw(st.sampled_from(["shape", "dtype", "value", "drop", "rename", "add", "empty", "one", "base", "named"])),
    )
    dtype, value = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e39, 1e30])),
    )
    name = draw(
        st.sampled_from(
            ["../../x", "", "base_model.model.lm_head.weight", "__class__", "a\0b", "x" * 2000, "модель", "a.b"]
        )
    )
    axis = draw(st.integers(0, 1))

    def change(content: dict[str, torch.Tensor], key: str) -> None:
        tensor = content[key]
        if kind == "shape":
            content[key] = torch.cat([tensor, tensor], dim=min(axis, tensor.dim() - 1)).contiguous()
        elif kind == "dtype":
            content[key] = tensor.to(dtype)
        elif kind == "value":
            kept = tensor.double() if value == 1e39 else tensor
            kept.view(-1)[which % kept.numel()] = value
            content[key] = kept
        elif kind == "drop":
            del content[key]
        elif kind == "rename":
            content[name] = content.pop(key)
        elif kind == "add":
            content[name] = tensor.clone()
        elif kind == "empty":
            content[key] = tensor[:0].contiguous()
        elif kind == "one":
            content[key] = tensor.reshape(-1).contiguous()
        elif kind == "base":
            content["base_model.model.model.embed_tokens.weight"] = torch.zeros(61, 32)
        else:  # the same tensor once more, under the name that it has inside a model
            for part in ("injection", "update", "norm", "backbone"):
                key = key.replace(f"shadowpeft_{part}.", f"shadowpeft_{part}.default.")
            content[key] = tensor * 2

    return tensors(change, which)


@st.composite
def other_header(draw: Any) -> Damage:
    """Sizes, offsets and dtypes that the data do not have."""
    which, kind = (
        draw(st.integers(0, 200)),
        draw(st.sampled_from(["shape", "offsets", "dtype", "entry", "extra", "metadata"])),
    )
    numbers = draw(st.lists(st.sampled_from([*HUGE, 32, 61]), min_size=1, max_size=3))
    dtype = draw(st.sampled_from(["F64", "F16", "I64", "BOOL", "F8_E4M3", "U8", "X", "", "F4", "F32 ", "C64"]))
    entry = draw(VALUES)

    def change(content: dict[str, Any], key: str) -> None:
        if kind == "shape":
            content[key]["shape"] = numbers
        elif kind == "offsets":
            begin, end = content[key]["data_offsets"]
            content[key]["data_offsets"] = [numbers[0], end] if which % 2 else [begin, begin + numbers[0]]
        elif kind == "dtype":
            content[key]["dtype"] = dtype
        elif kind == "entry":
            content[key] = entry
        elif kind == "extra":
            content["extra"] = {"dtype": "F32", "shape": [0, numbers[0]], "data_offsets": [0, 0]}
        else:
            content["__metadata__"] = entry

    return header(change, which)


@st.composite
def header_length(draw: Any) -> Damage:
    length = draw(st.sampled_from([0, 1, 8, 2**20, 10**8, 2**31, 2**62, 2**63, 2**64 - 1]))

    def damage(folder: Path) -> None:
        raw = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + raw[8:])

    return damage


def nothing(folder: Path) -> None:
    """No damage."""


DAMAGES = st.one_of(
    truncated(),
    flipped(),
    flipped(),
    inserted(),
    replaced(),
    other_setting(),
    other_setting(),
    other_record(),
    other_record(),
    code_names(),
    saved_whole(),
    text(),
    other_tensor(),
    other_tensor(),
    other_header(),
    other_header(),
    header_length(),
    st.just(nothing),
)

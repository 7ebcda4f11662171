"""Projected checkpoints: a small pretrained backbone, its projection to a large model's width, and that model's LM head.

The authors publish pretrained shadows in this format (``model_type: causal_lm_with_hidden_projection``). Its configuration
names Python classes by import path; here nothing that a file names is imported: the inner configuration's ``model_type`` is
looked up among those transformers knows, and the class names must be the ones that belong to it (docs/defects.md, 20).
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version

from shadowpeft.core import fold_projection
from shadowpeft.errors import AdapterFileError, ConfigError
from shadowpeft.hf.files.kinds import PROJECTED as MODEL_TYPE
from shadowpeft.hf.files.locate import find_file
from shadowpeft.hf.files.reading import WHOLE, check_tensors, read_json, read_tensors, weight_files
from shadowpeft.hf.files.records import config_from_record, record_of
from shadowpeft.messages import quote

CONFIG = "config.json"
_BACKBONE, _PROJECTION, _HEAD = "shadow_model.", "shadow_hidden_projection.weight", "lm_head.weight"


@dataclass
class Projected:
    """The parts of a projected checkpoint."""

    backbone: PreTrainedModel
    """Float32, with its own token table."""
    projection: Tensor
    """``W_p`` ``(d, d_s)`` (Eq. 10)."""
    head: Tensor
    """``W_lm`` ``(V, d)``, the large model's."""


def is_projected(name: str | Path) -> bool:
    """Whether a folder or Hub id holds a projected checkpoint; False where there is no readable configuration."""
    try:
        return read_json(find_file(name, CONFIG)).get("model_type") == MODEL_TYPE
    except AdapterFileError:
        return False  # whoever loads it as a plain model says what is wrong with it


def projected_config(name: str | Path) -> PreTrainedConfig:
    """The backbone's configuration, every claim about its class checked against its ``model_type``.

    Raises:
        AdapterFileError: if the file is damaged or names other classes.
        ConfigError: if transformers knows no such model type.
    """
    return _read_config(name)[0]


def _read_config(name: str | Path) -> tuple[PreTrainedConfig, int, int]:
    path = find_file(name, CONFIG)
    content = read_json(path)
    missing = [k for k in ("shadow_model_config", "base_hidden_size", "vocab_size") if not content.get(k)]
    if content.get("model_type") != MODEL_TYPE or missing:
        raise AdapterFileError(
            f"{path} has model_type {quote(content.get('model_type'))} and lacks {missing}; a projected checkpoint has "
            f"model_type {MODEL_TYPE!r}, shadow_model_config, base_hidden_size and vocab_size"
        )
    inner = config_from_record(content["shadow_model_config"], None)
    if type(inner) not in MODEL_MAPPING or type(inner) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{path} describes a {inner.model_type} backbone, which has no causal language model")
    body, whole = MODEL_MAPPING[type(inner)], MODEL_FOR_CAUSAL_LM_MAPPING[type(inner)]
    for key, allowed in (("shadow_model_class", (body, whole)), ("shadow_model_config_class", (type(inner),))):
        named = str(content.get(key, ""))
        module, _, symbol = re.sub(":", ".", named, count=1).rpartition(".")
        if named and (module.partition(".")[0] != "transformers" or symbol not in {c.__name__ for c in allowed}):
            raise AdapterFileError(
                f"{path} names {key} = {quote(named)}, but a {inner.model_type} backbone has "
                f"{' or '.join(c.__name__ for c in allowed)}; nothing that a file names is imported"
            )
    return inner, int(content["base_hidden_size"]), int(content["vocab_size"])


def read_projected(name: str | Path) -> Projected:
    """Read a projected checkpoint from a folder or the Hub.

    Raises:
        AdapterFileError: a file is missing or damaged, or a tensor is missing, unknown, not finite or of a wrong shape.
        ConfigError: if transformers knows no such model type.
    """
    inner, width, vocabulary = _read_config(name)
    files = sorted(set(weight_files(name).values()))
    tensors = {k: v for file in files for k, v in read_tensors(find_file(name, file)).items()}
    backbone: Any = MODEL_MAPPING[type(inner)]._from_config(copy.deepcopy(inner), dtype=torch.float32)
    expected = {_BACKBONE + k: tuple(v.shape) for k, v in backbone.state_dict().items()}
    expected[_PROJECTION] = (width, int(inner.hidden_size))
    expected[_HEAD] = (vocabulary, width)
    check_tensors(
        tensors, expected, f"the projected checkpoint '{name}'", "configuration and weights do not belong together"
    )
    backbone.load_state_dict({k[len(_BACKBONE) :]: v for k, v in tensors.items() if k.startswith(_BACKBONE)})
    backbone.config._name_or_path = str(name)
    return Projected(backbone.eval(), tensors[_PROJECTION], tensors[_HEAD])


# -------------------------------------------------------------------------------------------------------------- writing


def write_projected(
    folder: str | Path,
    backbone: nn.Module,
    table: Tensor,
    projection: Tensor,
    head: Tensor,
    *,
    ids: PreTrainedConfig | None = None,
) -> None:
    """Write a projected checkpoint into ``folder``; the authors' package and :func:`read_projected` load it.

    Args:
        backbone: with or without its token table. table: that table ``(V, d_s)``. projection: ``W_p`` ``(d, d_s)``.
        head: ``W_lm`` ``(V, d)``. ids: a configuration to take the pad, bos and eos ids from; None: the backbone's.

    Raises:
        ConfigError: if the shapes do not belong together.
    """
    config: Any = backbone.config
    d, d_s = projection.shape
    if (d_s, d) != (int(config.hidden_size), int(head.shape[1])) or table.shape != (head.shape[0], d_s):
        raise ConfigError(
            f"the projection has shape {(d, d_s)}, the head {tuple(head.shape)} and the table {tuple(table.shape)}; a "
            "projected checkpoint needs (d, d_s), (V, d) and (V, d_s)"
        )
    inner = {**record_of(config), "vocab_size": int(head.shape[0])}
    body = MODEL_MAPPING[type(config)]
    content = {
        "architectures": ["AutoModelForCausalLMWithHiddenProjection"],
        "model_type": MODEL_TYPE,
        "shadow_model_class": f"{body.__module__}:{body.__name__}",
        "shadow_model_config_class": f"{type(config).__module__}:{type(config).__name__}",
        "shadow_model_config": inner,
        "base_hidden_size": int(d),
        "hidden_size": int(d),
        "vocab_size": int(head.shape[0]),
        "dtype": "float32",
        "transformers_version": transformers_version,
        **{k: getattr(ids or config, k, None) for k in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
    with torch.device("meta"):
        whole: Any = body(type(config)(**{k: v for k, v in inner.items() if k != "model_type"}))
    tables = {f"{n}.weight" for n, m in whole.named_modules() if m is whole.get_input_embeddings()}
    state = backbone.state_dict()
    tensors = {_BACKBONE + k: table if k in tables else state[k] for k in whole.state_dict()}
    tensors.update({_PROJECTION: projection, _HEAD: head})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().to(device="cpu", dtype=torch.float32).contiguous().clone() for k, v in tensors.items()}
    save_file(plain, folder / WHOLE, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def to_stock(projected: Projected) -> PreTrainedModel:
    """An ordinary causal language model with the projection folded into its head, ``W_lm W_p`` (Eq. 11).

    The product is rounded; everything else is exact.
    """
    config = copy.deepcopy(projected.backbone.config)
    config.tie_word_embeddings = False
    config.vocab_size = int(projected.head.shape[0])
    config.architectures = None
    stock: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stock.base_model.load_state_dict(projected.backbone.state_dict())
    head: Any = stock.get_output_embeddings()
    if head.bias is not None:
        head.bias.zero_()
    head.weight.copy_(fold_projection(projected.head, projected.projection))
    return stock.eval()

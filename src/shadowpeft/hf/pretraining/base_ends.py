"""Single tensors of a model's checkpoint: what a shadow needs of its base, without the base's layers.

The base is built on the meta device only, to learn the names; from its files (or the Hub's shards) just the named tensors
are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from shadowpeft.errors import AdapterFileError, ConfigError, UnsupportedModelError
from shadowpeft.hf.base.aliases import source_of
from shadowpeft.hf.base.fingerprint import fingerprint
from shadowpeft.hf.base.head import scales_or_caps
from shadowpeft.hf.base.structure import DecoderParts, find_decoder, name_of
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.locate import find_file
from shadowpeft.hf.files.reading import BUILD_ERRORS, check_tensors, read_values, weight_files
from shadowpeft.hf.shadow.mirror import LayerChoice, mirror_config
from shadowpeft.messages import quote, shorten


class Checkpoint:
    """The safetensors files of a model, opened by tensor.

    Args:
        source: folder or Hub id. prefix: of the backbone in its model's class, which old checkpoints leave out.

    Raises:
        AdapterFileError: if it has no safetensors files, or their index is damaged.
    """

    def __init__(self, source: str, prefix: str = "") -> None:
        self.source, self.prefix, self.files = source, prefix, weight_files(source)

    def find(self, name: str) -> str | None:
        """The name under which the tensor ``name`` of the model is stored, or None."""
        bare = name.removeprefix(f"{self.prefix}.")
        return next((n for n in (name, bare, f"{self.prefix}.{name}") if n in self.files), None)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names``, in their stored dtype; only their files are opened, only they are read.

        Raises:
            AdapterFileError: if one is missing, damaged, or not finite.
        """
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            stored = self.find(name)
            if stored is None:
                raise AdapterFileError(
                    f"'{self.source}' has no tensor {quote(name)}; its file is incomplete, or stores this architecture under "
                    "other names: load it with transformers and save it again"
                )
            by_file.setdefault(self.files[stored], []).append((name, stored))
        tensors = {}
        for file, pairs in by_file.items():
            values = dict(read_values(find_file(self.source, file), {stored for _, stored in pairs}))
            tensors.update({name: values[stored] for name, stored in pairs})
        for name, value in tensors.items():
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise AdapterFileError(f"tensor {quote(name)} of '{self.source}' is not floating point and finite")
        return tensors


@dataclass
class BaseEnds:
    """What is on either side of a base's layers, and the base itself as names and shapes."""

    model: Any
    """The whole model, on the meta device."""
    parts: DecoderParts
    """Its parts."""
    checkpoint: Checkpoint
    embedding_name: str
    head_name: str

    @property
    def config(self) -> PreTrainedConfig:
        """The text configuration."""
        return self.parts.config

    @property
    def name_or_path(self) -> str:
        """Where its files and its tokenizer are."""
        return self.checkpoint.source

    @property
    def hidden_size(self) -> int:
        """``d``."""
        return self.parts.hidden_size

    def read_head(self) -> Tensor:
        """``W_lm`` ``(V, d)``, in its stored dtype."""
        return self.checkpoint.read([self.head_name])[self.head_name]

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of the loaded base, from the few tensors that it samples."""

        @contextmanager
        def read(module: nn.Module) -> Iterator[Tensor]:
            name = f"{name_of(self.model, module)}.weight"
            yield self.checkpoint.read([name])[name]

        return fingerprint(self.model, self.parts, read)


def stored_name(name: str, layers: str, indices: list[int]) -> str:
    """The base's name of what a model of its layers ``indices`` calls ``name``: ``layers.i`` there is ``layers.indices[i]``."""
    return re.sub(rf"^{re.escape(layers)}\.(\d+)\.", lambda match: f"{layers}.{indices[int(match[1])]}.", name)


def open_base(name: str) -> BaseEnds:
    """Find embedding and head of a base by alias, folder or Hub id; nothing is read yet.

    Raises:
        ConfigError: if there is no such model, or it is no decoder.
        UnsupportedModelError: if its head is more than a matrix, which a projected checkpoint cannot express.
        AdapterFileError: if its files are damaged.
    """
    source = source_of(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except BUILD_ERRORS as error:
        raise ConfigError(f"base '{name}' could not be opened: {shorten(error)}") from error
    checkpoint, parts = Checkpoint(source, getattr(model, "base_model_prefix", "")), find_decoder(model)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "bias", None) is not None or table is None:
        raise UnsupportedModelError(
            f"the head of {type(model).__name__} is not a matrix without bias, which a projected checkpoint cannot express; "
            "use another base"
        )
    if scales_or_caps(parts.config):
        raise UnsupportedModelError(
            f"{type(model).__name__} scales or caps its logits, which a projected checkpoint cannot express; use another base"
        )
    embedding, output = (f"{name_of(model, module)}.weight" for module in (table, head))
    tied = any(getattr(each, "tie_word_embeddings", False) for each in (config, parts.config))
    if checkpoint.find(output) is None and tied:
        output = embedding
    return BaseEnds(model, parts, checkpoint, embedding, output)


def pruned_backbone(base: BaseEnds, indices: list[int], *, copy: bool) -> Any:
    """A backbone of the base's class with the base's layers ``indices``, its final norm and its token embedding, in float32.

    Args:
        copy: whether the layers' weights are copied; otherwise they start at random, as the class does it.

    Raises:
        AdapterFileError: if the base's files lack a tensor.
    """
    wanted = ShadowPeftConfig(task_type="CAUSAL_LM", shadow_num_hidden_layers=len(indices))
    config = mirror_config(base.config, wanted, LayerChoice(indices))
    kind: Any = type(base.parts.backbone)
    backbone = kind._from_config(config, dtype=torch.float32)
    stem = f"{base.parts.backbone_name}." if base.parts.backbone_name else ""
    names = {key: stored_name(stem + key, base.parts.layers_name, indices) for key in backbone.state_dict() if copy}
    names[f"{name_of(backbone, backbone.get_input_embeddings())}.weight"] = base.embedding_name
    tensors = base.checkpoint.read(set(names.values()))
    expected = {names[key]: value for key, value in backbone.state_dict().items() if key in names}
    check_tensors(tensors, expected, f"'{base.checkpoint.source}'", "configuration and weights do not belong together")
    backbone.load_state_dict({key: tensors[name].float() for key, name in names.items()}, strict=False)
    return backbone

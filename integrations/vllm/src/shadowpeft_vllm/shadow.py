"""Everything that an adapter adds to a base in vLLM, as one module: the shadow backbone and the links between base layers.

The shadow's layers are vLLM's own decoder layers. Each has a name with a number that no layer of the base has, which is how it
gets a key-value cache of its own; the scheduler, prefix cache and tensor parallelism then treat it as one more layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeModel
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.transformers_utils.config import patch_rope_parameters

from shadowpeft_vllm import step
from shadowpeft_vllm.adapter import LINK, Adapter, AdapterError


def _with_config(kind: Callable[..., nn.Module]) -> Callable[[VllmConfig, Any, str], nn.Module]:
    return lambda vllm, config, prefix: kind(vllm, prefix=prefix, config=config)


def _from_parts(kind: Callable[..., nn.Module]) -> Callable[[VllmConfig, Any, str], nn.Module]:
    return lambda vllm, config, prefix: kind(config, vllm.cache_config, None, prefix=prefix)


LAYERS: dict[str, Callable[[VllmConfig, Any, str], nn.Module]] = {
    "llama": _with_config(LlamaDecoderLayer),
    "mistral": _with_config(MistralDecoderLayer),
    "qwen2": _from_parts(Qwen2DecoderLayer),
    "qwen3": _from_parts(Qwen3DecoderLayer),
    "gemma3_text": _from_parts(Gemma3DecoderLayer),
    "qwen3_moe": lambda vllm, config, prefix: Qwen3MoeDecoderLayer(vllm, prefix=prefix),
}
"""``model_type`` of a shadow -> its decoder layer."""


class Link(nn.Module):
    """The parameters of the step before one base layer (:mod:`shadowpeft_vllm.step`); each rank has all of them."""

    def __init__(self, adapter: Adapter, layer: int) -> None:
        super().__init__()
        shapes = adapter.link_shapes(layer)
        for name in LINK:
            parameter = nn.Parameter(torch.empty(shapes[name]), requires_grad=False) if name in shapes else None
            self.register_parameter(name, parameter)
        self.mathematics = adapter.mathematics

    def forward(self, h: Tensor, s: Tensor, norm: step.Norm | None) -> tuple[Tensor, Tensor]:
        """Base state ``h`` and shadow state ``s``, both ``(T, d)``, to the corrected state and the next shadow state; both in
        place."""
        kind, own = self.mathematics, self._parameters  # a module's attributes are slow to look up, and a step is short
        w_in = own["w_in"]
        if w_in is not None:
            s = step.advance(
                s,
                h,
                w_in,
                own["w_t"],
                own["w_g"],
                b_in=own["b_in"],
                b_t=own["b_t"],
                b_g=own["b_g"],
                norm=norm,
                gate_start=kind.gate_start,
                activation=kind.update_activation,
            )
        return step.inject(h, s, own["w_down"], own["w_up"], normalised=kind.normalised), s


class Shadow(nn.Module):
    """The shadow backbone ``F_shadow`` with its projection (Eqs. 1 and 10), and the links.

    Args:
        vllm_config: of the base. adapter: what to build. prefix: the name of this module. base_layers: how many the base has.

    Raises:
        AdapterError: if the shadow's configuration is impossible in vLLM.
    """

    def __init__(self, vllm_config: VllmConfig, adapter: Adapter, prefix: str, base_layers: int) -> None:
        super().__init__()
        self.adapter = adapter
        config = shadow_config(adapter, base_layers)
        check_parts(config, vllm_config)
        own = copy.copy(vllm_config)  # the shadow's weights are not quantised, whatever the base's are
        own.quant_config, own.model_config = None, copy.copy(vllm_config.model_config)
        own.model_config.hf_config = own.model_config.hf_text_config = config
        start = first_number(config, base_layers)
        make = LAYERS[config.model_type]
        self.layers = nn.ModuleList(
            make(own, config, f"{prefix}.layers.{start + i}") for i in range(adapter.record["num_hidden_layers"])
        )
        gemma = config.model_type == "gemma3_text"
        self.norm = (GemmaRMSNorm if gemma else RMSNorm)(config.hidden_size, eps=config.rms_norm_eps)
        self.embed_tokens: VocabParallelEmbedding | None = None
        self.scale = config.hidden_size**0.5 if gemma else 1.0
        if adapter.own_embedding:
            self.embed_tokens = VocabParallelEmbedding(
                int(adapter.record["vocab_size"]), config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.projection = nn.Linear(adapter.d_s, adapter.d, bias=False) if adapter.d_s != adapter.d else None
        self.links = nn.ModuleDict({str(layer): Link(adapter, layer) for layer in adapter.layers})
        self.link_norm = nn.LayerNorm(adapter.d) if adapter.has_norm else None
        self.stacked = (Qwen3MoeModel if config.model_type == "qwen3_moe" else LlamaModel).hf_to_vllm_mapper

    def forward(self, input_ids: Tensor | None, positions: Tensor, embedded: Tensor) -> Tensor:
        """``s^(0) = P(F_shadow(x))`` (Eqs. 1 and 10): tokens ``(T,)`` and their embeddings ``(T, d)`` to ``(T, d)``."""
        # a layer adds to its residual in place, and the base reads its embeddings after this
        hidden = embedded.clone() if self.embed_tokens is None else self.embed_tokens(input_ids) * self.scale
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        s, _ = self.norm(hidden, residual)
        return s if self.projection is None else F.linear(s, self.projection.weight)

    def step_norm(self) -> step.Norm | None:
        """What the steps of one pass take of the norm that they share."""
        norm = self.link_norm
        return None if norm is None else (norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill in ``adapter.tensors()``."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.stacked)
        return loaded


def first_number(config: Any, base_layers: int) -> int:
    """The number of the shadow's first layer: beyond the base's, and a multiple of what decides which layers have experts."""
    every = int(getattr(config, "decoder_sparse_step", 1) or 1)
    return -(-base_layers // every) * every


def shadow_config(adapter: Adapter, base_layers: int) -> Any:
    """The shadow's configuration, with its per-layer lists moved to the numbers that its layers have in vLLM."""
    values = dict(adapter.record)
    kind = values.pop("model_type")
    try:
        config = AutoConfig.for_model(kind, **values)
        patch_rope_parameters(config)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"shadow_backbone_config is no {kind} configuration that vLLM's transformers reads: {error}"
        ) from error
    start = first_number(config, base_layers)
    types = list(getattr(config, "layer_types", None) or ())
    if types:
        config.layer_types = types[:1] * start + types
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [start + layer for layer in config.mlp_only_layers]
    return config


def check_parts(config: Any, vllm_config: VllmConfig) -> None:
    """Refuse a shadow that vLLM would run in another way than it was trained.

    Raises:
        AdapterError: naming the setting.
    """
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if config.num_attention_heads % ranks:
        raise AdapterError(
            f"the shadow has {config.num_attention_heads} attention heads, which {ranks} ranks cannot share; use fewer"
        )
    cache = vllm_config.cache_config
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    everywhere = cache.sliding_window if cache is not None else None
    if window != everywhere:
        raise AdapterError(
            f"the shadow's sliding window is {window} but vLLM gives every layer of this base {everywhere}; "
            "this is not supported"
        )

"""The families of bases: vLLM's own model classes with the shadow beside their layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM, Gemma3Model
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.mistral import MistralForCausalLM, MistralModel
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM, Qwen3Model
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from shadowpeft_vllm.adapter import Adapter, AdapterError, read_adapter
from shadowpeft_vllm.shadow import Shadow

_log = init_logger("vllm.shadowpeft")
_DYNAMIC = {"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
_DRAFTS = ("draft_model", "ngram", "ngram_gpu", "suffix")
"""Ways to draft that only ask the attached model for its choices."""


def base_facts(vllm_config: VllmConfig) -> dict[str, Any]:
    """What :func:`read_adapter` asks about a base."""
    config = vllm_config.model_config.hf_text_config
    return {key: getattr(config, key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}


def adapter_of(vllm_config: VllmConfig) -> Adapter:
    """The adapter that the configuration names, judged before anything of the base is read.

    Raises:
        AdapterError: if it does not fit, or vLLM is asked for something that does not go with a shadow.
    """
    model = vllm_config.model_config
    named = getattr(model.hf_config, "shadowpeft_adapter", None)
    if not named:
        raise AdapterError(
            'the base\'s configuration names no adapter; pass --hf-overrides with "shadowpeft_adapter": "FOLDER"'
        )
    speculative = vllm_config.speculative_config
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise AdapterError(
            "pipeline parallelism was asked for but a shadow's state cannot pass between stages; use tensor parallelism"
        )
    if vllm_config.lora_config is not None:
        raise AdapterError("LoRA was asked for together with a shadow, which is not supported; leave out --enable-lora")
    if speculative is not None and speculative.method not in _DRAFTS:
        raise AdapterError(
            f"speculative decoding by {speculative.method} is not supported with a shadow; use {', '.join(_DRAFTS)}"
        )
    folder = Path(named) if Path(named).is_absolute() else Path(model.model) / named
    adapter = read_adapter(folder, base_facts(vllm_config))
    if adapter.own_embedding and model.enable_prompt_embeds:
        raise AdapterError(
            "prompt embeddings were asked for but this shadow has a token table of its own and needs token ids"
        )
    return adapter


class ShadowBeside:
    """A decoder of vLLM whose layers are corrected by a shadow; stands before the decoder's class among the bases."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        adapter = adapter_of(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.shadow = Shadow(vllm_config, adapter, f"{prefix}.shadow" if prefix else "shadow", len(self.layers))
        before: dict[int, Any] = {int(layer): link for layer, link in self.shadow.links.items()}
        self.steps = [before.get(layer) for layer in range(len(self.layers))]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``(T,)`` to the state that the head reads, ``(T, d)``: update, inject, layer (Eqs. 2-7), for each layer."""
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        s, norm, residual = self.shadow(input_ids, positions, hidden), self.shadow.step_norm(), None
        for link, layer in zip(self.steps, islice(self.layers, self.start_layer, self.end_layer), strict=True):
            if link is not None:  # vLLM carries a state as a sum of two, so that a layer's norm can add them
                # in place in the one that vLLM keeps; the other may lie in a buffer that the next layer writes to
                h, s = link(hidden if residual is None else residual.add_(hidden), s, norm)
                hidden, residual = h, None
            hidden, residual = layer(positions, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class Attached:
    """A causal language model of vLLM whose decoder has a shadow; stands before the model's class among the bases."""

    decoder: type[nn.Module]
    """The family's decoder with a shadow."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # what vLLM's own classes do, in one form for all of them: most name their decoder's class in the middle of it
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_text_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = self.decoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(
            config.vocab_size,
            scale=getattr(config, "logit_scale", 1.0),
            soft_cap=getattr(config, "final_logit_softcapping", None),
        )
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.num_moe_layers = 0  # nothing here moves experts between ranks

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The base's weights from vLLM's loader, compared with the adapter's record of them; the adapter's from its file."""
        shadow: Shadow = self.model.shadow
        compared = 0

        def checked() -> Iterator[tuple[str, Tensor]]:
            nonlocal compared
            for name, value in weights:
                compared += shadow.adapter.check_value(name, value)
                yield name, value

        loaded = super().load_weights(checked())
        if not compared:
            _log.warning("no weight of the base could be compared with what the adapter was trained on")
        return loaded | {f"model.shadow.{name}" for name in shadow.load_weights(shadow.adapter.tensors())}

    def swap_shadow(self, folder: str, vllm_config: VllmConfig) -> None:
        """Fill in the weights of another adapter of the same shape; see :class:`shadowpeft_vllm.swap.SwapShadow`."""
        shadow: Shadow = self.model.shadow
        new = read_adapter(folder, base_facts(vllm_config))
        new.check_replaces(shadow.adapter)
        with set_current_vllm_config(vllm_config):
            reload_weights(vllm_config, shadow, new.tensors(), None, True)
        shadow.adapter = new


@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class ShadowLlamaModel(ShadowBeside, LlamaModel):
    pass


class ShadowPeftLlamaForCausalLM(Attached, LlamaForCausalLM):
    decoder = ShadowLlamaModel


@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class ShadowMistralModel(ShadowBeside, MistralModel):
    pass


class ShadowPeftMistralForCausalLM(Attached, MistralForCausalLM):
    decoder = ShadowMistralModel


@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class ShadowQwen2Model(ShadowBeside, Qwen2Model):
    pass


class ShadowPeftQwen2ForCausalLM(Attached, Qwen2ForCausalLM):
    decoder = ShadowQwen2Model


@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class ShadowQwen3Model(ShadowBeside, Qwen3Model):
    pass


class ShadowPeftQwen3ForCausalLM(Attached, Qwen3ForCausalLM):
    decoder = ShadowQwen3Model


@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class ShadowGemma3Model(ShadowBeside, Gemma3Model):
    pass


class ShadowPeftGemma3ForCausalLM(Attached, Gemma3ForCausalLM):
    decoder = ShadowGemma3Model


@support_torch_compile(dynamic_arg_dims=_DYNAMIC)
class ShadowQwen3MoeModel(ShadowBeside, Qwen3MoeModel):
    pass


class ShadowPeftQwen3MoeForCausalLM(Attached, Qwen3MoeForCausalLM):
    decoder = ShadowQwen3MoeModel

"""The PEFT tuner: :class:`ShadowModel` puts hub, links and hooks into a base model and takes them out again."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn

from shadowpeft.errors import AdapterFileError, ConfigError, UnsupportedModelError
from shadowpeft.hf.base.fingerprint import check_bare, check_fingerprint, fingerprint
from shadowpeft.hf.base.head import HeadFacts, examine_head
from shadowpeft.hf.base.signature import Signature, hands_down
from shadowpeft.hf.base.structure import DecoderParts, classifier_of, find_decoder, full_names
from shadowpeft.hf.base.tables import new_rows, tables_among, take
from shadowpeft.hf.base.weights import device_of, is_offloaded, weighted
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.dry_run import check_file
from shadowpeft.hf.files.reading import FLOATS, check_tensors, check_value
from shadowpeft.hf.forward import call as calls
from shadowpeft.hf.forward import hooks, rows
from shadowpeft.hf.forward.decoding import speculate
from shadowpeft.hf.forward.speculation import Speculation, stopped_by_texts
from shadowpeft.hf.layer import (
    HANDLES,
    ShadowHub,
    ShadowLink,
    ShadowTunerLayer,
    check_adapter_name,
    check_one_adapter,
    clean_on_failure,
    keep_in_float32,
    remove,
)
from shadowpeft.hf.shadow.build import build_shadow
from shadowpeft.hf.shadow.source import resolve

PREFIX = "shadowpeft_"
_LIVING: WeakSet[ShadowHub] = WeakSet()


class ShadowModel(BaseTuner):
    """Adapts a frozen decoder-only transformers model with a shadow network (ShadowPEFT, arXiv 2604.19254).

    Made by ``get_peft_model(base, ShadowPeftConfig(...))``. The base's modules stay as they are: ``shadow_hub`` is added to
    its backbone, ``shadow_link`` to every refined layer, and hooks do the rest (:mod:`shadowpeft.hf.forward.hooks`).
    """

    prefix = PREFIX
    tuner_layer_cls = ShadowTunerLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with clean_on_failure(model):
            super().__init__(model, *args, **kwargs)
        # right after this, PeftModel (0.21) asks transformers (5.23) by the old name of is_activation_checkpointing
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

    # ---------------------------------------------------------------------------------------------------- attaching

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)
        kwargs.pop("state_dict", None)  # PEFT finds its targets in it; those of a shadow follow from its configuration
        with torch.inference_mode(False), torch.enable_grad():  # a trial finds out which weights gradients reach
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: ShadowPeftConfig, model_config: dict[str, Any]) -> ShadowPeftConfig:
        if peft_config.task_type is None:
            raise ConfigError("task_type is missing; set it to 'CAUSAL_LM' or 'SEQ_CLS'")
        inside = self.model.peft_config.values() if isinstance(self.model, PeftModel) else ()
        if inside and (peft_config.weights_file is not None or any(isinstance(c, ShadowPeftConfig) for c in inside)):
            raise ConfigError(
                "the base is a PeftModel, which holds adapters already; add this one with its load_adapter(folder, name) or "
                "add_adapter(name, config), or pass the base that its unload() gives"
            )
        parts = self._parts = find_decoder(self.model)  # for all layers of this adapter
        check_bare(self.model)
        if not peft_config._loaded:
            self._take_over(peft_config)
        if peft_config.task_type == "SEQ_CLS":
            peft_config.note_classes(self.model.config)
        identity = fingerprint(self.model, parts)
        if peft_config._loaded and peft_config.base_fingerprint is not None:
            check_fingerprint(peft_config.base_fingerprint, identity)
        else:
            peft_config.base_fingerprint = identity
        names = [f"{parts.layers_name}.{i}" for i in peft_config.refined(parts.num_layers)]
        targets = [*([parts.backbone_name] if parts.backbone_name else []), *names]
        if not parts.backbone_name:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} is a bare backbone; load it with a head (AutoModelForCausalLM or "
                "AutoModelForSequenceClassification)"
            )
        peft_config.target_modules = "|".join(re.escape(name) for name in targets)
        if peft_config.modules_to_save:
            saved = full_names(self.model, peft_config.modules_to_save, strict=not peft_config._loaded)
            peft_config.note("modules_to_save", saved)
            for name in peft_config.modules_to_save:
                if any(f"{target}.".startswith(f"{name}." if name else "") for target in targets):
                    raise ConfigError(
                        f"modules_to_save names '{name}', which holds the shadow's own parts; name modules inside a layer, "
                        "the head or the final norm"
                    )
            for name, module in self.model.named_modules():
                if name in saved and is_offloaded(self.model) and any(p.is_meta for p in module.parameters()):
                    raise ConfigError(
                        f"modules_to_save names {name}, whose weights are offloaded and cannot train; keep it on a device in "
                        "device_map"
                    )
        if peft_config.weights_file is not None:
            check_file(type(self), self.model, peft_config, peft_config.weights_file)
            peft_config.weights_file = None  # once; what is attached later by this configuration need not be in the file
        return peft_config

    def _take_over(self, peft_config: ShadowPeftConfig) -> None:
        """A configuration may be used for one model after another; those before keep a copy of what it says of them."""
        for hub in [hub for hub in _LIVING if hub.peft_configs is not self.peft_config]:
            for name in [name for name, config in hub.configs.items() if config is peft_config]:
                hub.configs[name] = hub.peft_configs[name] = copy.copy(peft_config)
        peft_config.as_given()

    def _create_and_replace(
        self,
        peft_config: ShadowPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        parts = self._parts
        if current_key == parts.backbone_name:
            self._add_hub(parts, peft_config, adapter_name)
        else:
            link = getattr(target, "shadow_link", None)
            if link is None:
                link = ShadowLink(int(current_key.rpartition(".")[2]))
                link._disable_adapters = self._hub(parts)._disable_adapters
                target.shadow_link = link
            link.add(adapter_name, peft_config, parts.hidden_size, device_of(target))
            link.train(target.training)

    def _facts(self, parts: DecoderParts) -> HeadFacts:
        """What stands behind the base's backbone; found out once, with the first adapter."""
        hub = getattr(parts.backbone, "shadow_hub", None)
        if hub is not None:
            return hub.facts  # type: ignore[no-any-return]
        if self.model.get_output_embeddings() is None:  # a classifier
            return HeadFacts()
        return examine_head(self.model, parts.backbone_name, parts.config)

    def _hub(self, parts: DecoderParts) -> ShadowHub:
        return parts.backbone.shadow_hub  # type: ignore[return-value]

    def _add_hub(self, parts: DecoderParts, config: ShadowPeftConfig, adapter: str) -> None:
        head = classifier_of(self.model) if config.task_type == "SEQ_CLS" else None
        if config.task_type == "CAUSAL_LM" and self.model.get_output_embeddings() is None:
            raise UnsupportedModelError(
                f"task_type is CAUSAL_LM but {type(self.model).__name__} has no LM head; load the base with "
                "AutoModelForCausalLM"
            )
        if config.own_shadow_head:
            if not self._facts(parts).is_linear:
                raise UnsupportedModelError(
                    f"own_shadow_head=True replaces the LM head's matrix, but the head of {type(self.model).__name__} is more "
                    "than a matrix; set own_shadow_head=False"
                )
            head = self.model.get_output_embeddings()
            head = getattr(head, "original_module", head)
        built = build_shadow(parts, config, resolve(config, parts, self.model))
        if getattr(parts.backbone, "shadow_hub", None) is None:
            facts = self._facts(parts)
            parts.backbone.shadow_hub = ShadowHub()
            parts.backbone.shadow_hub.facts, parts.backbone.shadow_hub.backbone_name = facts, parts.backbone_name
            parts.backbone.shadow_hub.peft_configs = self.peft_config
            _LIVING.add(parts.backbone.shadow_hub)
            self._install_hooks(parts)
        steps = len(config.refined(parts.num_layers))
        self._hub(parts).add(adapter, config, built, parts.hidden_size, steps=steps, head=head)
        self._hub(parts).train(parts.backbone.training)

    def _install_hooks(self, parts: DecoderParts) -> None:
        name = parts.backbone_name
        whole, body = Signature(self.model), Signature(parts.backbone)
        layers = [Signature(layer) for layer in parts.layers]
        reach = all(signature.passes_on for signature in (whole, body, *layers))
        reach = reach and hands_down(self.model, parts.layers[1], calls.CALL, device_of(self.model))
        # what travels in a context variable cannot be traced: there, torch.compile leaves the hooks out of its graphs
        traced: Any = (lambda hook: hook) if reach else torch.compiler.disable

        def hook(function: Any, **known: Any) -> Any:
            return traced(partial(function, **known))

        before = hook(
            hooks.before_model,
            backbone=name,
            signature=whole,
            kwargs_reach_layers=reach,
            weighted=weighted(self.model),
        )
        inner = hook(hooks.before_backbone, signature=body, base_layers=parts.num_layers, kwargs_reach_layers=reach)
        leave = hook(hooks.after_forward, kwargs_reach_layers=reach)
        after = hook(hooks.after_model, backbone=name)
        handles = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, with_kwargs=True),
            self.model.register_forward_hook(leave, with_kwargs=True, always_call=True),
            parts.backbone.register_forward_pre_hook(inner, with_kwargs=True),
            parts.backbone.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        for index, (layer, signature) in enumerate(zip(parts.layers, layers, strict=True)):
            refine = hook(hooks.before_layer, hidden=signature.names[0], index=index)
            handles.append(layer.register_forward_pre_hook(refine, with_kwargs=True))
        setattr(self.model, HANDLES, handles)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for hub in (m for m in model.modules() if isinstance(m, ShadowHub)):
            hub.shadowpeft_embedding.requires_grad_(False)
            hub.freeze_unreached()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Every trainable part is made in float32 (docs/defects.md, 5); a frozen embedding keeps the dtype it came with. Weights
        # that were assigned from a file (low_cpu_mem_usage) may be on another device than the base.
        for name, module in list(self.model.named_modules()):
            if (
                isinstance(module, ModulesToSaveWrapper)
                and autocast_adapter_dtype
                and adapter_name in module.modules_to_save
            ):
                keep_in_float32(module.modules_to_save[adapter_name])
            if not isinstance(module, ShadowTunerLayer):
                continue
            beside = self.model.get_submodule(name.rpartition(".")[0])
            device = device_of(beside)
            for container in module.adapter_layer_names + module.other_param_names:
                parameters = getattr(module, container)
                if adapter_name not in parameters:
                    continue
                part = parameters[adapter_name]
                if not any(p.device.type == "meta" for p in part.parameters()) and device.type != "meta":
                    part.to(device)
                if autocast_adapter_dtype and container in module.adapter_layer_names:
                    part.float()

    # ---------------------------------------------------------------------------------------------------- forwarding

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Fix, for one forward or generate of a ``PeftModel``, ``adapter_names`` and the weights each adapter has now."""
        names = kwargs.get("adapter_names")
        if torch.compiler.is_compiling():
            if names is not None:
                raise ConfigError("adapter_names was passed to a compiled model; call the model itself")
            yield
            return
        scope = calls.Scope(self.model)
        if names is not None:
            hub = self._hub(find_decoder(self.model))
            rows.check_mode(self.model)
            scope.names = rows.check_names(names, hub)
            # PeftModel.forward keeps its inputs to itself; only generate shows them, whose beams repeat each prompt
            prompts = rows.batch_rows({"input_ids": args[0], **kwargs} if args else kwargs)
            if prompts is not None:
                rows.check_length(scope.names, prompts)
                rows.check_not_compiled(self.model, kwargs)
                scope.repeats = True
        with calls.within(scope):
            yield

    def generate(self, *args: Any, speculative: Any = False, **kwargs: Any) -> Any:
        """``generate`` of the base, adapted. With ``speculative`` the shadow drafts tokens that attached passes verify.

        Args:
            speculative: True, or a :class:`~shadowpeft.hf.forward.speculation.Speculation`, whose counts are filled.

        Raises:
            ConfigError: if drafts are wanted for what cannot have any (:func:`shadowpeft.hf.forward.decoding.speculate`).
        """
        if not isinstance(speculative, (bool, Speculation)):
            raise ConfigError(f"speculative is {speculative!r} but must be True or a Speculation")
        if speculative:
            settings = Speculation() if speculative is True else speculative
            if kwargs.get("assistant_model") is not None or kwargs.get("custom_generate") is not None:
                raise ConfigError("speculative=True was passed with assistant_model or custom_generate; leave one out")
            drafted = partial(speculate, settings=settings, streamer=kwargs.get("streamer"))
            kwargs = {**stopped_by_texts(self.model, kwargs), "custom_generate": drafted}
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base; the adapters on it are saved as those of a base with so many tokens."""
        before = self.model.get_input_embeddings().weight.shape  # type: ignore[operator]
        table = self.model.resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]
        if table.weight.shape != before:
            identity = fingerprint(self.model, find_decoder(self.model))
            for config in self.peft_config.values():
                config.base_fingerprint = identity  # type: ignore[attr-defined]
        return table

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching is refused: its paged cache has no room for a shadow's layers.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(hooks.NO_PAGES)

    # --------------------------------------------------------------------------------------------------- switching

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one.

        Raises:
            ConfigError: for more than one name; shadows do not add up.
        """
        check_one_adapter(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out; if it was active, the first by name of those that are left becomes active.

        PEFT lets each layer choose a successor among the adapters that it holds, so layers that hold different ones would
        disagree; here the choice is made before, for all of them.
        """
        hub: Any = self._hub(find_decoder(self.model))
        left = sorted(set(hub.configs) - {adapter_name})
        if adapter_name in hub.active_adapters and left:
            warnings.warn(f"adapter '{adapter_name}' was active and is deleted; '{left[0]}' is active now", stacklevel=2)
            self.set_adapter(left[0], inference_mode=not any(p.requires_grad for p in hub.parameters()))
        super().delete_adapter(adapter_name)
        self.active_adapter = list(hub.active_adapters)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(
            "a shadow depends on the input and cannot be merged into weights; use unload() for the base or "
            "shadowpeft.detach(model) for the stand-alone shadow"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._check_merge_allowed()

    unmerge_adapter = merge_adapter

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError("a weighted sum of shadows is no shadow; attach both, and choose with set_adapter or adapter_names")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        remove(self.model)
        return self.model

    # ------------------------------------------------------------------------------------------------- serialisation

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the adapter's name stands right after its container, in the middle of the key
        return re.sub(rf"(\.{PREFIX}[a-z]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        own_copy = f".modules_to_save.{adapter_name}."  # PEFT has put the trained modules under these names already
        tables = tables_among(model, (k for k in state_dict if own_copy not in k))
        stored = {k: v for k, v in state_dict.items() if k in tables}
        state_dict = {k: v for k, v in state_dict.items() if k not in tables}
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = re.compile(rf"\.{PREFIX}[a-z]+\.{re.escape(adapter_name)}(\.|$)")
        expected = {k: v for k, v in model.state_dict().items() if own.search(k)}
        # PEFT loads whatever it finds: a key of the base would overwrite the base
        expected.update({k: v for k, v in model.state_dict().items() if own_copy in k and k in mapped})
        what = "the adapter's weights do not fit its configuration"
        if len(mapped) < len(state_dict):
            raise AdapterFileError(f"{what}: a tensor stands under two names; the file is of another adapter")
        check_tensors(mapped, expected, what, "the file is truncated or of another adapter")
        for key, value in mapped.items():
            if value.dtype not in FLOATS.values():
                raise AdapterFileError(f"tensor {key} is {value.dtype} in the file but must be floating point")
            check_value(key, value, expected[key].dtype, "the file")
        hub = next((module for module in model.modules() if isinstance(module, ShadowHub)), None)
        take(new_rows(tables, stored, others=sorted(set(hub.configs if hub else ()) - {adapter_name})))
        if hub is not None:
            hub.renew(adapter_name)
        return mapped

"""Where an adapter's parameters sit in the base's module tree: one hub on the backbone, one link on every refined layer.

The base's modules are not wrapped. Each container is a ``ModuleDict`` keyed by adapter name whose attribute starts with
the registered prefix, which is how PEFT and transformers find, save, rename and load what belongs to an adapter.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowpeft.core import Injection, Update, refine
from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.head import HeadFacts
from shadowpeft.hf.base.signature import Signature
from shadowpeft.hf.base.weights import dense_weight, device_of, module_for_adapter
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.shadow.build import ShadowParts
from shadowpeft.messages import quote

STRUCTURE = threading.RLock()
"""Held while the weights of an adapter are collected or replaced, so that nobody collects half of a replacement."""
_versions = itertools.count(1)
HANDLES = "_shadowpeft_hook_handles"
"""Attribute of an adapted model: what takes its hooks out."""

Step = tuple[Injection, Update | None, float]
"""What happens before one base layer: injection, update (None at the first refined layer and in the ablation), alpha."""


def check_adapter_name(name: Any) -> str:
    """``name``, if an adapter may have it: it becomes the key of a torch ``ModuleDict`` and a part of tensor names.

    Raises:
        ConfigError: if it may not, with a name that may.
    """
    allowed = isinstance(name, str) and name.isprintable() and name.strip() == name != "" and len(name) <= 200
    taken = nn.ModuleDict()
    if not allowed or "." in name or "/" in name or hasattr(taken, name) or name == "__base__":
        plain = "".join(c if c.isalnum() or c in "_-" else "_" for c in str(name)[:60]).strip("_") or "adapter"
        plain = f"{plain}_adapter" if hasattr(taken, plain) or plain == "base" else plain
        raise ConfigError(
            f"the adapter name {quote(name)} cannot be used: it must be printable, without dots and slashes, and no "
            f"attribute of torch's ModuleDict; use another, such as '{plain}'"
        )
    return str(name)


def check_one_adapter(names: str | list[str]) -> None:
    """Shadows do not add up.

    Raises:
        ConfigError: for more than one name.
    """
    count = 1 if isinstance(names, str) else len(names)
    if count > 1:
        raise ConfigError(f"{count} adapters were given but only one shadow can be active at a time")


class ShadowTunerLayer(BaseTunerLayer):
    """What hub and link have in common."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter the active one; transformers' ``set_adapter`` comes straight to here."""
        check_one_adapter(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def active_name(self) -> str | None:
        """The adapter that takes part in a forward now, or None if there is none or adapters are disabled."""
        if self.disable_adapters or not self.active_adapters:
            return None
        return str(self.active_adapters[0])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Nothing: the tuner knows which base module stands beside this one and moves to its device."""

    @property
    def weight(self) -> Tensor:  # the inherited one asks the base layer, which here is this very module
        raise AttributeError(f"{type(self).__name__} has no weight of its own")

    @property
    def bias(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__} has no bias of its own")

    def get_base_layer(self) -> nn.Module:  # the parameters stand beside the base's, nothing is wrapped
        return self  # type: ignore[return-value]


class ShadowHub(nn.Module, ShadowTunerLayer):
    """Shadow backbone, projection, shared norm and (classification) shadow head of every adapter."""

    adapter_layer_names = ("shadowpeft_backbone", "shadowpeft_projection", "shadowpeft_norm", "shadowpeft_head")
    other_param_names = ("shadowpeft_embedding",)

    def __init__(self) -> None:
        super().__init__()
        self.shadowpeft_backbone: Any = nn.ModuleDict()
        self.shadowpeft_projection: Any = nn.ModuleDict()
        self.shadowpeft_norm: Any = nn.ModuleDict()
        self.shadowpeft_head: Any = nn.ModuleDict()
        self.shadowpeft_embedding: Any = nn.ModuleDict()
        self.configs: dict[str, ShadowPeftConfig] = {}
        self.peft_configs: dict[str, Any] = {}
        """PEFT's own, of the model that the hub is in."""
        self.signatures: dict[str, Signature] = {}
        self.facts = HeadFacts()
        self.backbone_name = ""
        self.versions: dict[str, int] = {}
        self.frozen: set[str] = set()
        """Adapters whose shadow does not train; see :meth:`freeze_shadow`."""
        self.records: dict[str, Any] = {}
        """What :func:`shadowpeft.hf.forward.rows.weights_of` has collected."""

    def active_name(self) -> str | None:
        """As every layer of the tuner says it.

        Raises:
            ConfigError: if it is no shadow, such as a LoRA that transformers' ``add_adapter`` put beside the shadows.
        """
        name = super().active_name()
        if name is not None and name not in self.configs:
            raise ConfigError(
                f"adapter '{name}' is active and no shadow; the shadows here are {', '.join(map(repr, self.configs))}, and "
                f"another kind of adapter cannot share their base: delete one of them (delete_adapter('{name}'))"
            )
        return name

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As ``nn.Module``; accelerate's ``compile_regions`` wraps a table of modules, which hides its keys."""
        super().add_module(name, getattr(module, "_orig_mod", module) if name.startswith("shadowpeft_") else module)

    def add(self, adapter: str, config: ShadowPeftConfig, parts: ShadowParts, d: int, *, steps: int, head: Any) -> None:
        """Put the parts of one adapter in place.

        Args:
            d: base width. steps: number of refined layers; with fewer than two there is no update and no norm.
            head: the base's head, which the shadow's own starts as a copy of (Eq. 9), or None if it reads the base's.
        """
        reference = next(parts.backbone.parameters())
        self.configs[adapter] = config
        self.versions[adapter] = next(_versions)
        self.records.clear()  # another adapter may bring a trained module of the base that all of them now pass
        self.shadowpeft_backbone[adapter] = parts.backbone
        self.signatures[adapter] = Signature(parts.backbone)
        d_s = int(parts.backbone.config.hidden_size)
        if d_s != d:
            projection = nn.Linear(d_s, d, bias=False, device=reference.device, dtype=torch.float32)
            if parts.projection is not None:
                with torch.no_grad():
                    projection.weight.copy_(parts.projection)
            self.shadowpeft_projection[adapter] = projection
        if parts.embedding is not None:
            # a mirrored shadow's own table is new and must learn; a pretrained one stays as it is (the paper)
            container = self.shadowpeft_backbone if config.is_mirror else self.shadowpeft_embedding
            embedding = parts.embedding.requires_grad_(config.is_mirror)
            if container is self.shadowpeft_embedding:
                container[adapter] = embedding
            else:
                parts.backbone.shadow_embedding = embedding
        if config.use_update and config.mathematics.update_norm and steps > 1:
            self.shadowpeft_norm[adapter] = nn.LayerNorm(d).to(device=reference.device)
        if head is not None:
            copy = nn.Linear(d, head.out_features, bias=getattr(head, "bias", None) is not None)
            with torch.no_grad():
                if "meta" in (device_of(head).type, copy.weight.device.type):  # low_cpu_mem_usage: a file fills it
                    copy = copy.to_empty(device="meta")
                else:
                    copy = copy.to(device=device_of(head))
                    with dense_weight(head) as weight:
                        copy.weight.copy_(weight)
                        if copy.bias is not None:
                            copy.bias.copy_(head.bias)
            self.shadowpeft_head[adapter] = copy

    def embedding(self, adapter: str) -> nn.Module | None:
        """The shadow's own token embedding, or None if it shares the base's."""
        if adapter in self.shadowpeft_embedding:
            return self.shadowpeft_embedding[adapter]
        return getattr(self.shadowpeft_backbone[adapter], "shadow_embedding", None)

    def is_classifier(self, adapter: str) -> bool:
        """Whether the adapter is one of a sequence classifier."""
        return bool(self.configs[adapter].task_type == "SEQ_CLS")

    def lm_head(self, adapter: str, model: Any) -> Any:
        """The LM head that reads ``s^(0)``: the shadow's own (``own_shadow_head``), else that of ``model``."""
        if adapter in self.shadowpeft_head:
            return self.shadowpeft_head[adapter]
        return module_for_adapter(model.get_output_embeddings(), adapter)

    def shadow_weights(self, adapter: str) -> dict[str, Tensor]:
        """All that ``s^(0)`` is computed with, but for an embedding that the base lends; tensors of the model itself."""
        containers = (self.shadowpeft_backbone, self.shadowpeft_projection, self.shadowpeft_embedding)
        modules = [(i, container[adapter]) for i, container in enumerate(containers) if adapter in container]
        return {f"{i}.{name}": value for i, module in modules for name, value in module.state_dict(keep_vars=True).items()}

    def shadow_path(self, adapter: str) -> list[Tensor]:
        """The adapter's own weights of the shadow path: :meth:`shadow_weights`, and its head if it has one."""
        head = self.shadowpeft_head[adapter].parameters() if adapter in self.shadowpeft_head else ()
        return [*self.shadow_weights(adapter).values(), *head]

    def freeze_shadow(self, adapter: str) -> None:
        """Train the injections and updates of ``adapter`` only, also after it was activated anew."""
        self.frozen.add(adapter)
        self.freeze_unreached()

    def freeze_unreached(self) -> None:
        """Tensors that no gradient can reach must not ask for one: DDP would wait for it, a saved optimiser hold it."""
        for adapter in self.frozen:
            for weight in self.shadow_path(adapter):
                weight.requires_grad_(False)
        for adapter, config in self.configs.items():
            for name in config.shadow_frozen or ():
                self.shadowpeft_backbone[adapter].get_parameter(name).requires_grad_(False)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.freeze_unreached()

    def renew(self, adapter: str) -> None:
        """The adapter's weights are others now: caches that the earlier ones have filled cannot go on."""
        self.versions[adapter] = next(_versions)
        self.records.pop(adapter, None)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.frozen.discard(adapter_name)
        self.configs.pop(adapter_name, None)
        self.signatures.pop(adapter_name, None)
        self.versions.pop(adapter_name, None)
        self.records.clear()


def keep_in_float32(module: nn.Module) -> None:
    """Make a half-precision module that trains (``modules_to_save``) float32; it takes and gives its old dtype still."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        module.float()
        module.register_forward_pre_hook(_to_float32, with_kwargs=True)
        module.register_forward_hook(partial(_to_dtype, dtype=dtype))


def _map_floats(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every floating-point tensor in it, inside tuples, lists and dictionaries too, given to ``function``."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_map_floats(function, each) for each in value)
    if type(value) is dict:
        return {key: _map_floats(function, each) for key, each in value.items()}
    return value


def _to_float32(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _map_floats(Tensor.float, args), _map_floats(Tensor.float, kwargs)


def _to_dtype(module: nn.Module, args: Any, output: Any, *, dtype: torch.dtype) -> Any:
    def back(x: Tensor) -> Tensor:
        kind = x.device.type
        as_the_base = torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind)
        return x if as_the_base else x.to(dtype)

    return _map_floats(back, output)


class ShadowLink(nn.Module, ShadowTunerLayer):
    """``update(l-1)`` and ``inject(l)``: what happens between base layers l-1 and l, for every adapter."""

    adapter_layer_names = ("shadowpeft_injection", "shadowpeft_update")

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.shadowpeft_injection: Any = nn.ModuleDict()
        self.shadowpeft_update: Any = nn.ModuleDict()
        self.alpha: dict[str, float] = {}

    def add(self, adapter: str, config: ShadowPeftConfig, d: int, device: torch.device) -> None:
        """Make the parameters of one adapter: ``2 d r``, and ``4 d m`` unless this is the first refined layer."""
        variant = config.mathematics
        dropout = float(config.shadow_dropout)
        self.alpha[adapter] = float(config.shadow_alpha)
        with torch.device(device):
            self.shadowpeft_injection[adapter] = Injection(
                d,
                config.r,
                dropout,
                dropout_first=variant.dropout_before_down,
                paper_init=variant.paper_init,
                normalised=variant.normalised,
            )
            if config.use_update and self.layer > variant.first_refined_layer:
                self.shadowpeft_update[adapter] = Update(
                    d,
                    config.update_width,
                    dropout if variant.dropout_in_update else 0.0,
                    activation=variant.update_activation,
                    bias=variant.update_bias,
                    gate_start=variant.gate_start,
                )

    def step(self, adapter: str) -> Step | None:
        """What this layer holds of ``adapter``, or None if it does not refine this layer."""
        if adapter not in self.shadowpeft_injection:
            return None
        update = self.shadowpeft_update[adapter] if adapter in self.shadowpeft_update else None  # noqa: SIM401
        return self.shadowpeft_injection[adapter], update, self.alpha[adapter]

    def forward(
        self, step: Step, h: Tensor, s: Tensor, norm: nn.LayerNorm | None, streams: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """One refinement step, see :func:`shadowpeft.core.refine`; all states ``(B, T, d)``."""
        injection, update, alpha = step
        return refine(h, s, injection, alpha, update, norm, streams)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.alpha.pop(adapter_name, None)


def find_hub(model: nn.Module) -> ShadowHub:
    """The hub of an adapted model.

    Raises:
        ConfigError: if ``model`` has no shadow adapter.
    """
    for module in model.modules():
        if isinstance(module, ShadowHub):
            return module
    raise ConfigError(f"{type(model).__name__} has no shadow adapter; make one with peft.get_peft_model")


def adapted_base(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel (or the model itself)."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model  # type: ignore[return-value]


@contextmanager
def clean_on_failure(model: nn.Module) -> Iterator[None]:
    """If a first adapter cannot be attached or loaded, take what exists of it out of ``model`` again."""
    first = not hasattr(model, "peft_config")
    try:
        yield
    except BaseException:
        if first:
            remove(model)
        raise


def remove(model: nn.Module) -> None:
    """Take hub, links, hooks and ``modules_to_save`` of every adapter out of ``model``; its own modules never changed."""
    for handle in getattr(model, HANDLES, []):
        handle.remove()
    for name in (HANDLES, "peft_config"):
        if hasattr(model, name):
            delattr(model, name)
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.original_module)
        for part in ("shadow_hub", "shadow_link"):
            if part in getattr(module, "_modules", {}):
                del module._modules[part]

"""Replace the weights of a loaded adapter while the model runs.

A forward pass takes an adapter's weights once, as one object (``AdapterWeights``). A swap makes new modules beside the old,
checks everything, and then puts one new object in the place of the old one. So a pass has entirely the old weights or
entirely the new; the old ones live until the last pass that holds them has ended.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowpeft.errors import AdapterFileError, ConfigError, UnsupportedModelError
from shadowpeft.hf import formats
from shadowpeft.hf.base.fingerprint import check_fingerprint, fingerprint
from shadowpeft.hf.base.structure import find_decoder
from shadowpeft.hf.base.tables import new_rows, tables_among, take
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.dry_run import check_file
from shadowpeft.hf.files.reading import check_tensors, check_value
from shadowpeft.hf.files.records import plain_record
from shadowpeft.hf.forward.rows import collect
from shadowpeft.hf.layer import STRUCTURE, ShadowHub, ShadowLink, ShadowTunerLayer
from shadowpeft.hf.load import check_weights, read_config
from shadowpeft.hf.model import ShadowModel
from shadowpeft.messages import did_you_mean, quote

_SHAPING = (
    "task_type",
    "r",
    "update_width",
    "use_update",
    "refined_layers",
    "own_shadow_head",
    "shares_embeddings",
    "shadow_reads_tokens",
)
_TAKEN_OVER = (
    "shadow_alpha",
    "shadow_dropout",
    "auxiliary_loss_weight",
    "shadow_loss",
    "shadow_model",
    "shadow_init",
    "projection_init",
    "trained_ends",
    "draft_tokens",
    "system_message",
    "shadow_answers",
    "call_form",
    "actions",
    "pad_token_id",
)


class _Slot:
    """One module of the adapter: where it is kept and what its tensors are called in a file."""

    def __init__(self, container: Any, key: str, path: str) -> None:
        self.container, self.key, self.path = container, key, path
        self.old: nn.Module = container[key]
        self.new: nn.Module = self.old


def swap(model: nn.Module, adapter: str | Path, adapter_name: str = "default") -> None:
    """Replace the weights of the loaded adapter ``adapter_name`` by those of ``adapter``, without rebuilding anything.

    Safe while other threads run forward passes of ``model``: each sees the old weights or the new, and a ``generate`` of a
    ``PeftModel`` ends with those it began with. ``shadow_alpha``, ``shadow_dropout``, ``auxiliary_loss_weight`` and
    ``shadow_loss`` may differ and are taken over; ``requires_grad`` and training mode stay. The parameters are new tensors:
    an optimiser that was made before the swap does not know them. To roll back, swap the previous folder in again.

    Args:
        model: a ``PeftModel``, or a transformers model that carries shadow adapters.
        adapter: folder or Hub id of an adapter of the same shape on the same base, in this package's format.

    Raises:
        AdapterFileError: a file is missing or damaged, or its tensors are not those of the loaded adapter.
        BaseMismatchError: the adapter belongs to another base.
        ConfigError: the adapter has another configuration, or nothing of that name is loaded.
        UnsupportedModelError: the loaded adapter's weights are sharded or not there (meta device).

    After an error the old weights are in place, to the bit.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else getattr(model, "model", model)
    base = base if isinstance(model, (PeftModel, ShadowModel)) else model
    parts = find_decoder(base)
    hub = getattr(parts.backbone, "shadow_hub", None)
    if not isinstance(hub, ShadowHub):
        raise ConfigError(f"{type(model).__name__} carries no shadow adapter; load one with shadowpeft.load")
    if adapter_name not in hub.configs:
        raise ConfigError(
            f"adapter '{adapter_name}' is not loaded{did_you_mean(adapter_name, list(hub.configs))}; loaded are "
            f"{sorted(hub.configs)}"
        )
    config = check_fits(base, adapter)
    path = check_weights(adapter)
    check_same_shape(hub.configs[adapter_name], config, adapter_name)
    check_file(ShadowModel, base, copy.deepcopy(config), path)
    slots = _slots(base, adapter_name)
    _fill(slots, load_file(path), path, parts.backbone, base)
    record = copy.copy(hub.configs[adapter_name])
    for name in _TAKEN_OVER:
        setattr(record, name, getattr(config, name))
    for slot in slots:
        _set_dropout(slot, record)
    _publish(base, hub, adapter_name, slots, record)


def check_fits(base: nn.Module, adapter: str | Path) -> ShadowPeftConfig:
    """The configuration of an adapter that is whole, in this package's format and made for ``base``, a transformers model.

    Raises:
        AdapterFileError: a file is missing or damaged, or another package's. BaseMismatchError: it belongs to another base.
    """
    if formats.detect(adapter) != formats.OURS:
        raise AdapterFileError(f"'{adapter}' is in another package's format; convert it first (shadowpeft convert)")
    config = read_config(adapter)
    config.weights_file = check_weights(adapter)
    check_fingerprint(config.base_fingerprint or {}, fingerprint(base, find_decoder(base)))
    return config


def check_same_shape(loaded: ShadowPeftConfig, other: ShadowPeftConfig, name: str) -> None:
    """Everything that shapes an adapter or its mathematics is equal in both configurations.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    pairs = [(field, getattr(loaded, field), getattr(other, field)) for field in _SHAPING]
    math, others = asdict(loaded.mathematics), asdict(other.mathematics)
    pairs += [(f"variant ({key})", math[key], others[key]) for key in math if key != "paper_init"]
    records = [plain_record(c.shadow_backbone_config or {}) for c in (loaded, other)]
    for key in sorted(set(records[0]) | set(records[1])):
        pairs.append((f"shadow_backbone_config.{key}", records[0].get(key), records[1].get(key)))
    if other.shadow_frozen is not None:  # None: not recorded, so what the loaded one has found out holds
        pairs.append(("shadow_frozen", sorted(loaded.shadow_frozen or ()), sorted(other.shadow_frozen)))
    if None not in (loaded.labels, other.labels):
        pairs.append(("labels", loaded.labels, other.labels))
    for field, ours, theirs in pairs:
        if ours != theirs:
            raise ConfigError(
                f"adapter '{name}' is loaded with {field} = {quote(ours)} but the new one has {quote(theirs)}; only weights "
                "can be swapped, load the new one under another name"
            )


def _slots(base: nn.Module, adapter: str) -> list[_Slot]:
    slots = []
    for name, module in base.named_modules():
        if isinstance(module, ShadowTunerLayer):
            for container in (*module.adapter_layer_names, *module.other_param_names):
                held = getattr(module, container)
                if isinstance(held, nn.ModuleDict) and adapter in held:
                    slots.append(_Slot(held, adapter, f"base_model.model.{name}.{container}"))
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            slots.append(_Slot(module.modules_to_save, adapter, f"base_model.model.{name}"))
    return slots


def _fill(slots: list[_Slot], tensors: dict[str, Tensor], path: Path, memo: nn.Module, base: nn.Module) -> None:
    """Give every slot a new module with the file's tensors. ``memo`` is what the modules refer to but do not own."""
    values: dict[str, Tensor] = {}
    for slot in slots:
        if any(p.is_meta or isinstance(p, DTensor) for p in slot.old.parameters()):
            raise UnsupportedModelError(
                f"the weights of adapter '{slot.key}' are sharded or not materialised and cannot be swapped; load it anew"
            )
        slot.new = copy.deepcopy(slot.old, {id(memo): memo})
        for parameter in slot.new.parameters():
            parameter.grad = None
        values.update({f"{slot.path}.{name}": value for name, value in slot.new.state_dict().items()})
    tables = tables_among(base, set(tensors) - set(values), "base_model.model.")
    take(new_rows(tables, tensors, others=[slots[0].key]))
    tensors = {name: value for name, value in tensors.items() if name not in tables}
    what = f"the weights in {path} are not those of the loaded adapter"
    check_tensors(tensors, values, what, "load the new one under another name")
    for name, value in values.items():
        check_value(name, tensors[name], value.dtype, str(path))
        with torch.no_grad():
            value.copy_(tensors[name])


def _set_dropout(slot: _Slot, config: ShadowPeftConfig) -> None:
    container = slot.path.rpartition(".")[2]
    if container == "shadowpeft_injection" or (
        container == "shadowpeft_update" and config.mathematics.dropout_in_update
    ):
        slot.new.dropout = float(config.shadow_dropout)  # type: ignore[assignment]


def _publish(base: nn.Module, hub: ShadowHub, adapter: str, slots: list[_Slot], config: ShadowPeftConfig) -> None:
    links = [module for module in base.modules() if isinstance(module, ShadowLink) and adapter in module.alpha]
    peft_configs: Any = base.peft_config
    with STRUCTURE:  # a pass that has no record of the adapter yet waits; one that has goes on with it
        before = hub.configs[adapter], hub.versions[adapter], hub.records.get(adapter)
        try:
            for slot in slots:
                slot.container[adapter] = slot.new
            _set_config(hub, links, peft_configs, adapter, config)
            hub.renew(adapter)
            hub.records[adapter] = collect(hub, base, adapter)
        except BaseException:
            for slot in slots:
                slot.container[adapter] = slot.old
            _set_config(hub, links, peft_configs, adapter, before[0])
            hub.versions[adapter] = before[1]
            hub.records.pop(adapter, None)
            if before[2] is not None:
                hub.records[adapter] = before[2]
            raise


def _set_config(
    hub: ShadowHub, links: list[ShadowLink], peft_configs: Any, adapter: str, config: ShadowPeftConfig
) -> None:
    hub.configs[adapter] = config
    peft_configs[adapter] = config
    for link in links:
        link.alpha[adapter] = float(config.shadow_alpha)

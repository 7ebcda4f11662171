"""The base's weights as plain tensors, however the base is held: quantised, offloaded by accelerate, or sharded.

The forward pass never needs this: it calls the base's own modules, whose hooks bring the weights. Whoever reads a weight
itself (the fingerprint, ``detach``, the pseudo-inverse start) reads it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import align_module_device
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shadowpeft.errors import UnsupportedModelError

_OWN = ("shadow_hub", "shadow_link")


@contextmanager
def dense_weight(module: nn.Module) -> Iterator[Tensor]:
    """The weight of ``module`` as a plain floating-point tensor, valid inside the context.

    A quantised weight is dequantised, an offloaded one is brought to its execution device, a sharded one is gathered (a
    collective call: every process must make it). A weight on the meta device without offloading stays meta.
    """
    with align_module_device(module):
        weight = dequantize_module_weight(module)
        yield gather(weight.detach())


def gather(tensor: Tensor) -> Tensor:
    """``tensor``, gathered if it is sharded (a collective call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def module_for_adapter(module: Any, adapter: str) -> Any:
    """What ``adapter`` runs in the place of ``module``: the copy that it trains (``modules_to_save``), or the base's own.

    The wrapper itself answers for the active adapter, and for none while adapters are disabled.
    """
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    return module.modules_to_save[adapter] if adapter in module.modules_to_save else module.original_module  # noqa: SIM401


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes: its parameters' device, or that of accelerate's hooks if its weights are offloaded.

    Parameters of adapters are left out of account. ``meta`` means that the weights do not exist yet.
    """
    device = next(p.device for n, p in module.named_parameters() if not any(own in n for own in _OWN))
    if device.type != "meta":
        return device
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if getattr(each, "offload", False) and getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return device


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps weights of ``model`` on the CPU or on disk and brings them for each forward pass."""
    return any(getattr(getattr(part, "_hf_hook", None), "offload", False) for part in model.modules())


def share_weight(a: Any, b: Any, tied_by_config: bool) -> bool:
    """Whether two modules use one tensor; offloaded copies of a tied tensor are only known by the configuration."""
    if "meta" in (a.weight.device.type, b.weight.device.type):
        return tied_by_config
    return a.weight is b.weight or (
        type(a.weight) is type(b.weight) and a.weight.data_ptr() == b.weight.data_ptr() != 0
    )


def weighted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of ``model`` that have a weight: what :func:`allow_gradients` looks at before each training step."""
    return [(name, module) for name, module in model.named_modules() if "weight" in module._parameters]


def allow_gradients(modules: list[tuple[str, nn.Module]]) -> None:
    """Make sure that gradients pass through a quantised base, which two libraries do not and do not say so.

    bitsandbytes 0.50.2, 4 bits, on a CPU with AVX512-BF16: the first forward pass in evaluation mode repacks a weight for an
    inference kernel without a backward pass, and training mode does not take that back: one evaluation between two training
    steps, and no gradient passes that layer any more. Reading a layer's ``state_dict`` restores the weight.

    torchao 0.18: weights whose activations are quantised too (``Int8DynamicActivation...``) have no backward pass at all.

    Raises:
        UnsupportedModelError: if a weight passes no gradient to its input.
    """
    probed = set()
    for name, module in modules:
        weight = module._parameters["weight"]
        if weight is None or type(weight) is nn.Parameter:
            continue
        if _is_packed(weight):
            module.state_dict()
            if _is_packed(weight):
                raise UnsupportedModelError(
                    f"the 4-bit weight of {name} is packed for inference and passes no gradient; load the base anew and do "
                    "not run it in evaluation mode before training"
                )
        kind = (type(weight), str(getattr(weight, "act_quant_kwargs", None)))
        if isinstance(module, nn.Linear) and kind[0].__module__.startswith("torchao.") and kind not in probed:
            probed.add(kind)
            probe = torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device, requires_grad=True)
            if not F.linear(probe, weight.detach()).requires_grad:
                raise UnsupportedModelError(
                    f"{name} is quantised with its activations ({kind[0].__name__}), which passes no gradient, so the adapter "
                    "cannot train; quantise the weights only (Int8WeightOnlyConfig) or with bitsandbytes"
                )


def _is_packed(weight: Tensor) -> bool:
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))

"""What an adapter's configuration implies on a base, found without allocating a weight.

The base is copied with every tensor on the meta device and the adapter is attached to the copy by the same code as to the
real one. Names, shapes and dtypes of the file are compared with what comes out before the base is touched.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn

from shadowpeft.errors import AdapterFileError, ConfigError, ShadowPeftError
from shadowpeft.hf.base.structure import CLASSIFIERS, find_decoder
from shadowpeft.hf.base.tables import new_rows, tables_among
from shadowpeft.hf.config import ShadowPeftConfig
from shadowpeft.hf.files.digests import check_weights_digest
from shadowpeft.hf.files.reading import BUILD_ERRORS, FLOATS, check_dtypes, check_tensors, check_values, read_header
from shadowpeft.hf.files.records import check_numbers
from shadowpeft.hf.layer import HANDLES
from shadowpeft.messages import quote, shorten

SPARE_BYTES = 64 * 2**20
"""Buffers (masks, tables of positions) that a shadow may have beyond as much as the base's buffers and its own weights."""
_WRAPPED = "base_model.model."
_TRIAL = "trial"


def skeleton(model: nn.Module) -> Any:
    """A copy of ``model`` whose parameters and buffers are on the meta device.

    Modules and their containers are new, so that the copy can be changed; every other attribute is shared, since it may be
    large (the weights that accelerate offloaded) or not copyable. The configurations of other adapters are left out, and so
    is what would take their hooks out of ``model`` if the copy turned out to be impossible.
    """
    bare = _clone(model, {})
    for name in ("peft_config", HANDLES):
        if hasattr(bare, name):
            delattr(bare, name)
    return bare


def _clone(module: nn.Module, seen: dict[int, Any]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]  # type: ignore[no-any-return]
    new = module.__class__.__new__(module.__class__)
    seen[id(module)] = new
    # containers of hooks, names and settings are copied one level deep: what is registered on the copy stays there
    new.__dict__ = {
        key: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for key, value in module.__dict__.items()
    }
    for name, parameter in module._parameters.items():
        new._parameters[name] = None if parameter is None else _empty(parameter, seen)
    for name, buffer in module._buffers.items():
        new._buffers[name] = None if buffer is None else _empty(buffer, seen)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _clone(child, seen)
    return new


def _empty(tensor: Tensor, seen: dict[int, Any]) -> Any:
    if id(tensor) not in seen:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        seen[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return seen[id(tensor)]


def implied(tuner: Any, model: nn.Module, config: ShadowPeftConfig) -> tuple[dict[str, Tensor], int]:
    """The tensors (on the meta device) that an adapter of ``config`` has on ``model``, by their names in a file.

    Args:
        tuner: the class that attaches it.

    Returns:
        the tensors, and the bytes of the buffers that no file holds.
    """
    bare = skeleton(model)
    trial = copy.copy(config)
    trial.weights_file = None
    before = {id(b) for b in bare.buffers()}
    whole = {
        f"{_WRAPPED}{name}.{key}": value
        for name in _saved_whole(bare, trial)
        for key, value in _original(bare.get_submodule(name)).state_dict().items()
    }
    try:
        tuner(bare, {_TRIAL: trial}, _TRIAL)
    except BUILD_ERRORS as error:
        if isinstance(error, ShadowPeftError):
            raise
        raise ConfigError(
            f"shadow_backbone_config describes no model that can be built ({type(error).__name__}: {shorten(error)}); it is "
            "damaged"
        ) from error
    buffers = sum(b.numel() * b.element_size() for b in bare.buffers() if id(b) not in before)
    own = f".{_TRIAL}"
    own_tensors = {
        _WRAPPED + tuner._remove_adapter_name_from_key(key, _TRIAL): value
        for key, value in bare.state_dict().items()
        if tuner.prefix in key and (f"{own}." in key or key.endswith(own))
    }
    return {**own_tensors, **whole}, buffers


def _saved_whole(bare: nn.Module, config: ShadowPeftConfig) -> list[str]:
    """Names of the base's modules that are in the file because they train; PEFT adds the classifier by itself."""
    heads = CLASSIFIERS if config.task_type == "SEQ_CLS" else ()
    names = {name for name, _ in bare.named_modules()}
    return sorted(names & {*(config.modules_to_save or []), *heads})


def _original(module: nn.Module) -> nn.Module:
    """The base's own module, if another adapter has put its trained copy around it."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module  # type: ignore[return-value]


def check_file(tuner: Any, model: nn.Module, config: ShadowPeftConfig, path: Path) -> None:
    """The weights file at ``path`` is what ``config`` describes on ``model``: every name, shape, dtype and value,
    and the digest of the file that it was saved with.

    Raises:
        AdapterFileError: naming the first difference; ``model`` was not touched and nothing large was allocated.
        ConfigError: if the configuration describes no model.
    """
    header = read_header(path)
    check_dtypes(path, header)
    check_numbers(config.shadow_backbone_config or {}, len(header))
    wanted, buffers = implied(tuner, model, config)
    advice = "the file is truncated, or of another adapter than its configuration"
    tables = tables_among(model, set(header) - set(wanted), _WRAPPED)
    check_tensors(
        {k: v for k, v in header.items() if k not in tables},
        wanted,
        f"the adapter's weights in {path} do not fit its configuration",
        advice,
    )
    for name, value in wanted.items():
        if not value.is_floating_point() and header[name].dtype in FLOATS:
            raise AdapterFileError(
                f"tensor {quote(name)} is {header[name].dtype} in {path} but {value.dtype} in the model"
            )
    theirs = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > SPARE_BYTES + theirs + path.stat().st_size:
        raise AdapterFileError(
            f"the configuration beside {path} asks for {buffers:,} bytes of buffers for a shadow of {path.stat().st_size:,} "
            "bytes; it is damaged"
        )
    check_values(path, header, wanted)
    if tables:
        others = getattr(find_decoder(model).backbone, "shadow_hub", None)
        with safe_open(path, framework="pt") as handle:
            new_rows(
                tables, {name: handle.get_tensor(name) for name in tables}, others=others.configs if others else ()
            )
    check_weights_digest(path, config.weights_sha256)  # last: what is wrong with a tensor says more

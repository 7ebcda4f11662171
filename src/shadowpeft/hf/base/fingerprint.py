"""Identity of a base model: architecture, shapes, vocabulary and a few weight values.

The values are compared with a tolerance, so that the same weights in bfloat16 or behind a quantiser still match, while a
model with other weights of the same shape does not.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from shadowpeft.errors import BaseMismatchError, UnsupportedModelError
from shadowpeft.hf.base.structure import DecoderParts
from shadowpeft.hf.base.weights import dense_weight

SAMPLES = 64
SAME = 0.02
"""Relative error up to which two samples are the same weights: bfloat16 rounding is at most 0.004."""
RELATED = 0.35
"""Up to here the weights are taken for a quantised or further trained relative; another model's error is about 1.4."""

Read = Callable[[nn.Module], AbstractContextManager[Tensor]]
"""Gives the weight of a module of the base."""


def fingerprint(model: nn.Module, parts: DecoderParts, read: Read = dense_weight) -> dict[str, Any]:
    """Architecture, shapes, vocabulary, and ``SAMPLES`` values of the token embedding and of each sampled norm.

    Of a base whose modules an adapter trains (``modules_to_save``), its own modules are looked at.

    Args:
        read: where the weights come from; a model on the meta device has none of its own.
    """
    config = parts.config
    names = sorted(
        name.replace(".original_module.", ".")
        for name, _ in parts.layers[0].named_parameters()
        if not name.startswith(("shadow_link", "base_layer")) and ".modules_to_save." not in name
    )
    shapes = {
        "hidden_size": parts.hidden_size,
        "num_hidden_layers": parts.num_layers,
        "vocab_size": int(config.vocab_size),
        "layer": hashlib.sha256(";".join(names).encode()).hexdigest()[:16],
    }
    return {"architecture": config.model_type, "shapes": shapes, "values": _sample(model, parts, read)}


def check_bare(model: nn.Module) -> None:
    """A shadow adapts a base that carries no other method's layers, which would be part of neither file, and whose weights
    are tensors.

    Raises:
        UnsupportedModelError: naming the method, or the layers without weights.
    """
    packed = next((name for name, m in model.named_modules() if _is_packed(m)), None)
    if packed is not None:
        raise UnsupportedModelError(
            f"{packed} of the base was quantised by torch.ao (quantize_dynamic), which leaves no weight to read; attach first "
            "and quantise the adapted model, or quantise the base with torchao's quantize_(base, Int8WeightOnlyConfig())"
        )
    modules = {type(m).__module__ for m in model.modules() if isinstance(m, BaseTunerLayer)}
    found = sorted(name.split(".")[2].upper() for name in modules if name.startswith("peft.tuners."))
    if found:
        raise UnsupportedModelError(
            f"the base carries {' and '.join(found)} adapters, but a shadow adapts a base that has none; merge them into it "
            "(merge_and_unload), or unload them"
        )


def _is_packed(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized")


def _sample(model: nn.Module, parts: DecoderParts, read: Read) -> dict[str, list[float]]:
    table = model.get_input_embeddings()  # type: ignore[operator]
    sources: dict[str, nn.Module] = {"embedding": getattr(table, "original_module", table)}
    for position, layer in (("first", parts.layers[0]), ("last", parts.layers[-1])):
        for name, weight in layer.named_parameters():
            if name.endswith("weight") and weight.dim() == 1 and "shadow_link" not in name:
                norm = layer.get_submodule(name.rpartition(".")[0])
                sources[f"{position}.{name.replace('.original_module.', '.')}"] = norm
                break
    values = {}
    for name, source in sources.items():
        with read(source) as real:
            if real.device.type == "meta" or not real.is_floating_point():
                continue
            flat = real.reshape(-1)
            index = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
            values[name] = [float(f"{v:.6g}") for v in flat[index.to(flat.device)].float().tolist()]
    return values


def check_fingerprint(recorded: dict[str, Any], actual: dict[str, Any]) -> None:
    """Compare the fingerprint in an adapter with that of the base it is put on.

    Raises:
        BaseMismatchError: if architecture, shapes or weights differ. Weights that are close but not the same (a
            quantised copy, a further trained sibling) give a warning with the measured distance.
    """
    problem = _mismatch(recorded, actual)
    if problem is not None:
        raise BaseMismatchError(
            f"{problem}; load the base that the adapter names, at the revision it was trained on, and pass it as base="
        )


def _mismatch(recorded: dict[str, Any], actual: dict[str, Any]) -> str | None:
    if not _is_fingerprint(recorded):
        return "the adapter's base_fingerprint is malformed, so its base cannot be checked"
    if recorded["architecture"] != actual["architecture"]:
        return f"the adapter was trained on a {recorded['architecture']} model, this base is {actual['architecture']}"
    for key, value in actual["shapes"].items():
        if recorded["shapes"].get(key) != value:
            return f"the adapter's base has {key} = {recorded['shapes'].get(key)}, this base has {value}"
    shared = sorted(set(recorded["values"]) & set(actual["values"]))
    if actual["values"] and not shared:
        return "the adapter's base_fingerprint holds no weight values of this base, so its base cannot be checked"
    for name in shared:
        theirs, ours = (torch.tensor(record["values"][name], dtype=torch.float64) for record in (recorded, actual))
        if theirs.shape != ours.shape:
            return f"the adapter's base_fingerprint has {theirs.numel()} values for {name} but needs {ours.numel()}"
        distance = _distance(theirs, ours)
        half = len(theirs) // 2
        grown = name == "embedding" and _distance(theirs[:half], ours[:half]) <= SAME  # each resize draws new rows anew
        if not (distance <= RELATED or grown):
            return (
                f"the adapter was trained on a base with other weights (relative difference {distance:.2g} in {name})"
            )
        if distance > SAME:
            warnings.warn(
                f"the base's weights differ from those the adapter was trained on by {distance:.2g} (relative, {name}); this "
                "is expected for a quantised copy or with added tokens, otherwise check that this is the right base",
                stacklevel=3,
            )
    return None


def _distance(theirs: Tensor, ours: Tensor) -> float:
    """Relative to what is recorded."""
    return float((theirs - ours).norm() / theirs.norm().clamp(min=1e-12))


def _is_fingerprint(recorded: Any) -> bool:
    """Whether a record from a file has the form that :func:`fingerprint` writes."""
    if not isinstance(recorded, dict) or not isinstance(recorded.get("architecture"), str):
        return False
    if not isinstance(recorded.get("shapes"), dict) or not isinstance(recorded.get("values"), dict):
        return False
    return all(
        isinstance(values, list) and all(type(v) in (int, float) and abs(v) < 1e300 for v in values)
        for values in recorded["values"].values()
    )

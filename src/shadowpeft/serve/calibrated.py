"""Whether the edge model is the one that its calibration was made for: the bound holds for that model only."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.fingerprint import SAME
from shadowpeft.hf.base.structure import decoder_layers
from shadowpeft.hf.base.weights import dense_weight
from shadowpeft.serve.backend import Backend
from shadowpeft.serve.router import Calibration

_LAYERS, _VALUES = 4, 8
"""Layers that are looked at, and values of each of their weights."""
_log = logging.getLogger("shadowpeft.serve")


def sketch(model: nn.Module) -> dict[str, Any]:
    """A few values of the weights of some layers, the first and the last among them; none of the token tables.

    Returns:
        ``layers``: how many there are. ``values``: by layer and module, such as ``3.mlp.up_proj``.
    """
    layers = decoder_layers(model)
    chosen = sorted({round(i) for i in torch.linspace(0, len(layers) - 1, _LAYERS).tolist()})
    values: dict[str, list[float]] = {}
    for place in chosen:
        for name, module in layers[place].named_modules():
            if isinstance(getattr(module, "weight", None), torch.Tensor):
                with dense_weight(module) as weight:
                    plain = weight if type(weight) in (torch.Tensor, nn.Parameter) else weight.dequantize()
                    flat = plain.reshape(-1)
                    index = torch.linspace(0, flat.numel() - 1, _VALUES, dtype=torch.float64).long()
                    found = flat[index.to(flat.device)].float().tolist()
                values[f"{place}.{name}"] = [float(f"{value:.5g}") for value in found]
    return {"layers": len(layers), "values": values}


def distance(recorded: dict[str, Any], live: dict[str, Any]) -> float:
    """The relative difference of the layer that differs most, over its weights by root mean square; infinite where the layers
    are not the same ones.

    Of a shadow with six layers of SmolLM2-135M: bfloat16 0.002, int8 0.009, a quarter more of the same training 0.03, another
    training run 0.06.
    """
    theirs, ours = recorded["values"], live["values"]
    if recorded["layers"] != live["layers"] or theirs.keys() != ours.keys():
        return math.inf
    squares: dict[str, list[float]] = {}
    for name, values in theirs.items():
        if len(values) != len(ours[name]):
            return math.inf
        gap = math.dist(values, ours[name]) / max(math.hypot(*values), 1e-12)
        squares.setdefault(name.partition(".")[0], []).append(gap * gap)
    return max(math.sqrt(sum(each) / len(each)) for each in squares.values())


class Calibrated:
    """Compares the edge model with the sketch of the one that was calibrated, at the start and after each change.

    Args:
        recorded: what :func:`sketch` found then.

    Attributes:
        problem: how the model differs; None: it is the same, whatever its numbers are rounded to.

    Raises:
        ConfigError: if ``recorded`` is damaged.
    """

    def __init__(self, recorded: Any, backend: Backend) -> None:
        _check(recorded)
        self._recorded, self._backend = recorded, backend
        self.problem: str | None = None
        self.look()

    @classmethod
    def of(cls, calibration: Calibration | None, backend: Backend) -> Calibrated | None:
        """None without a calibration, or with one from before models were sketched."""
        recorded = None if calibration is None else calibration.report.get("model")
        return None if recorded is None else cls(recorded, backend)

    def look(self) -> None:
        """Compare with the model that is there now, and log what differs."""
        gap = distance(self._recorded, sketch(self._backend.model))
        how = "it has other layers" if gap == math.inf else f"its weights differ by {gap:.2g}, relative"
        self.problem = None
        if not gap <= SAME:
            self.problem = (
                f"the edge model is not the one that the calibration was made for ({how}), so its bound does not hold; "
                "calibrate again with this model, or serve the other"
            )
            _log.warning("%s", self.problem)


def _check(recorded: Any) -> None:
    """
    Raises:
        ConfigError: if this is no sketch.
    """
    good = isinstance(recorded, dict) and recorded.keys() == {"layers", "values"}
    good = good and type(recorded["layers"]) is int and isinstance(recorded["values"], dict) and bool(recorded["values"])
    good = good and all(
        isinstance(values, list) and values and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        for values in recorded["values"].values()
    )
    if not good:
        raise ConfigError("a calibration has 'model' in its report that is damaged; calibrate again")

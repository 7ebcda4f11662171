"""Optimisers by the name that a run file gives them; torch's Muon beside its AdamW as one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from shadowpeft.errors import ConfigError
from shadowpeft.hf.base.structure import CLASSIFIERS

_PACKAGES = {"adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}
"""Whose optimiser it is, where it is neither torch's nor transformers'."""


def check_optimizer(name: str) -> None:
    """Whether an optimiser can be had here.

    Raises:
        ConfigError: naming the package or the version of torch that it needs.
    """
    package = _PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"training.optimizer is {name}, which needs {package}, and that is not installed; run: pip install "
            "'shadowpeft[quant]', or choose adamw"
        )
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"training.optimizer is muon, which torch has from 2.9 on, and this is torch {torch.__version__}; upgrade torch, "
            "or choose adamw"
        )


def of_matrices(model: nn.Module) -> set[int]:
    """``id`` of every parameter that Muon is for: trained matrices, but neither embeddings nor classifiers' heads."""
    heads = {"lm_head", "shadowpeft_head", *CLASSIFIERS}
    others = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) or heads & set(name.split("."))]
    aside = {id(p) for module in others for p in module.parameters()}
    return {id(p) for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in aside}


class MuonWithAdamW(Optimizer):
    """``torch.optim.Muon`` for the matrices of ``by_muon``, ``torch.optim.AdamW`` for all else, as one optimiser.

    Muon's steps are scaled to those of AdamW (``match_rms_adamw``), so one learning rate and weight decay serve both.

    Args:
        groups: as any optimiser takes them. by_muon: ``id`` of the parameters that are Muon's (:func:`of_matrices`).
        adamw: further settings of AdamW, such as ``betas``.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float, by_muon: set[int], **adamw: Any
    ) -> None:
        made = []
        for group in groups:
            for muon in (True, False):
                chosen = [p for p in group["params"] if (id(p) in by_muon) == muon]
                if chosen:
                    own = {**group, "params": chosen}
                    rest = {"lr": lr, "weight_decay": group.get("weight_decay", weight_decay)}
                    one: Optimizer = _muon([chosen], **rest) if muon else AdamW(chosen, **rest, **adamw)
                    made.append({**one.defaults, **own, "muon": muon})
        super().__init__(made, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for muon in (True, False):
            groups = [group for group in self.param_groups if group["muon"] == muon]
            if groups:
                first = groups[0]["params"][:1]
                one = _muon([first], lr=0.0, weight_decay=0.0) if muon else AdamW(first)
                # whose groups and state are this optimiser's: it saves and loads them, and a schedule changes them
                one.param_groups, one.state = groups, self.state
                one.step()
        return loss


def trainer_options(name: str, model: nn.Module, learning_rate: float, weight_decay: float) -> dict[str, Any]:
    """What a Trainer is given for an optimiser that ``TrainingArguments.optim`` does not know by name."""
    if name != "muon":
        return {}
    settings = {"lr": learning_rate, "weight_decay": weight_decay, "by_muon": of_matrices(model)}
    return {"optimizer_cls_and_kwargs": (MuonWithAdamW, settings)}


def _muon(params: list[list[Tensor]], **settings: Any) -> Optimizer:
    made: Optimizer = torch.optim.Muon(  # type: ignore[attr-defined]
        [{"params": each} for each in params], adjust_lr_fn="match_rms_adamw", **settings
    )
    return made

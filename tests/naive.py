"""An independent, naive transcription of Eqs. 1-9 (the paper): the paper's loop, written out layer by layer.

It takes an untouched copy of the base and the *values* of an adapter's parameters; it calls no arithmetic of the package.
Where the package fuses (two nets in one matrix, update and injection in one step, one loss for several rows) this does not.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The base's decoder layers."""
    body = model.base_model
    return body.h if hasattr(body, "h") else body.layers


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, int]:
    """Sum of -log p over the targets that are not -100 (taken one by one), and their number."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    total, count = logits.sum() * 0.0, 0
    for row, target in zip(log_p.flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target != -100:
            total = total - (1 - smoothing) * row[target] - smoothing * row.mean()
            count += 1
    return total, count


class NaiveShadow:
    """The adapted model as the paper's formulas, on leaves that are copies of the adapter's parameters."""

    def __init__(self, base: nn.Module, adapted: nn.Module, adapter: str = "default") -> None:
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.adapter = adapter
        self.config = adapted.peft_config[adapter]
        modules = dict(adapted.named_modules())
        self.hub_name = next(n for n in modules if n.endswith("shadow_hub"))
        hub = modules[self.hub_name]
        self.shadow = copy.deepcopy(hub.shadowpeft_backbone[adapter])
        self.leaves: dict[str, Tensor] = {}
        """The adapted model's trainable parameters by name, as leaves of the naive graph."""
        prefix = f"{self.hub_name}.shadowpeft_backbone.{adapter}."
        for name, parameter in self.shadow.named_parameters():
            self.leaves[prefix + name] = parameter
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and name not in self.leaves:
                self.leaves[name] = parameter.detach().clone().requires_grad_(True)
        for leaf in self.leaves.values():
            leaf.grad = None
        self.own_embedding = None
        if adapter in hub.shadowpeft_embedding:
            self.own_embedding = copy.deepcopy(hub.shadowpeft_embedding[adapter])
        elif hasattr(self.shadow, "shadow_embedding"):
            self.own_embedding = self.shadow.shadow_embedding

    def get(self, ending: str) -> Tensor | None:
        """The leaf whose name ends so."""
        found = [leaf for name, leaf in self.leaves.items() if name.endswith(ending)]
        assert len(found) <= 1, ending
        return found[0] if found else None

    def grads(self) -> dict[str, Tensor | None]:
        return {name: leaf.grad for name, leaf in self.leaves.items()}

    # ------------------------------------------------------------------------------------------------------ Eqs. 1-7

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Any) -> tuple[Any, Tensor]:
        """The base's output with the shadow's corrections, and ``s^(0)``."""
        c, a = self.config, self.adapter
        peft = c.variant == "peft"
        embed = self.own_embedding or self.base.get_input_embeddings()
        z = self.shadow(inputs_embeds=embed(input_ids), attention_mask=attention_mask, use_cache=False, **extra)
        z = z.last_hidden_state
        w_p = self.get(f"shadowpeft_projection.{a}.weight")
        s0 = z if w_p is None else z @ w_p.T  # Eqs. 1, 10
        state = {"s": s0}
        layers = decoder_layers(self.base)
        first, last = c.refined_layers or (0 if peft else 1, len(layers) - 1)

        def link(layer: int, name: str) -> Tensor | None:
            return self.get(f".{layer}.shadow_link.shadowpeft_{name}")

        def before(layer: int) -> Any:
            def inject(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                h = args[0]
                delta = h - state["s"]  # Eq. 2
                correction = delta @ link(layer, f"injection.{a}.w_down").T @ link(layer, f"injection.{a}.w_up").T  # 3
                return (h + c.shadow_alpha * correction, *args[1:])  # Eq. 4

            return inject

        def after(layer: int) -> Any:
            def update(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
                # the parameters of update l sit on layer l+1, which needs its result
                w_in, w_out = link(layer + 1, f"update.{a}.w_in"), link(layer + 1, f"update.{a}.w_out")
                b_in, b_out = link(layer + 1, f"update.{a}.b_in"), link(layer + 1, f"update.{a}.b_out")
                x = out[0] if isinstance(out, tuple) else out
                if not peft:  # one LayerNorm shared by all layers
                    weight, bias = self.get(f"shadowpeft_norm.{a}.weight"), self.get(f"shadowpeft_norm.{a}.bias")
                    mean = x.mean(-1, keepdim=True)
                    x = (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * weight + bias
                m = w_in.shape[0] // 2
                w1, w3, w2, w4 = w_in[:m], w_in[m:], w_out[0], w_out[1]
                one, three = x @ w1.T, x @ w3.T
                if b_in is not None:
                    one, three = one + b_in[:m], three + b_in[m:]
                if peft:
                    one, three = (v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) for v in (one, three))
                else:
                    one, three = (v / (1 + torch.exp(-v)) for v in (one, three))
                t, g = one @ w2.T, three @ w4.T  # Eqs. 5, 13, 14
                if b_out is not None:
                    t, g = t + b_out[0], g + b_out[1]
                g = 1 / (1 + torch.exp(-g))  # Eq. 6
                state["s"] = (1 - g) * state["s"] + g * t  # Eq. 7

            return update

        handles = []
        for layer in range(first, last + 1):
            handles.append(layers[layer].register_forward_pre_hook(before(layer)))
            if c.use_update and layer < last:
                handles.append(layers[layer].register_forward_hook(after(layer)))
        head = getattr(self.base, "score", None)
        trained = self.get(f"score.modules_to_save.{a}.weight")
        try:
            if head is not None and trained is not None:
                call = torch.func.functional_call
                out = call(self.base, {"score.weight": trained}, (), self._inputs(input_ids, attention_mask, extra))
            else:
                out = self.base(**self._inputs(input_ids, attention_mask, extra))
        finally:
            for handle in handles:
                handle.remove()
        return out, s0

    @staticmethod
    def _inputs(input_ids: Tensor, attention_mask: Tensor | None, extra: dict[str, Any]) -> dict[str, Any]:
        return dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)

    # ------------------------------------------------------------------------------------------------------ Eqs. 8-9

    def head(self, state: Tensor) -> Tensor:
        """The base's complete LM head, or the shadow's own."""
        lm = self.base.get_output_embeddings()
        own = self.get(f"shadowpeft_head.{self.adapter}.weight")
        logits = state @ (lm.weight if own is None else own).T
        if getattr(lm, "bias", None) is not None:
            logits = logits + lm.bias
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        shadow_labels: Tensor | None = None,
        items: int | None = None,
        shadow_items: int | None = None,
        smoothing: float = 0.0,
        **extra: Any,
    ) -> SimpleNamespace:
        """Losses, logits and ``s^(0)``; ``items`` normalises over a larger batch."""
        out, s0 = self.states(input_ids, attention_mask, **extra)
        shadow_labels = labels if shadow_labels is None else shadow_labels
        if self.config.task_type == "SEQ_CLS":
            last = [
                max(i for i, t in enumerate(row) if t != self.base.config.pad_token_id) for row in input_ids.tolist()
            ]
            pooled = torch.stack([s0[i, t] for i, t in enumerate(last)])
            shadow_logits = pooled @ self.get(f"shadowpeft_head.{self.adapter}.weight").T
            total, count = cross_entropy(out.logits, labels)
            shadow_total, shadow_count = cross_entropy(shadow_logits, shadow_labels)
        else:
            shadow_logits = self.head(s0)
            total, count = cross_entropy(out.logits[:, :-1], labels[:, 1:], smoothing)
            shadow_total, shadow_count = cross_entropy(shadow_logits[:, :-1], shadow_labels[:, 1:])
        task = total / max(items or count, 1)
        shadow = shadow_total / max(shadow_items or items or shadow_count, 1)
        return SimpleNamespace(
            logits=out.logits,
            task_loss=task,
            shadow_loss=shadow,
            loss=task + self.config.auxiliary_loss_weight * shadow,
            shadow_logits=shadow_logits,
            shadow_state=s0,
        )


def assert_same_gradients(adapted: nn.Module, naive: NaiveShadow, tolerance: float = 2e-4) -> None:
    """Every trainable tensor has the naive loop's gradient, by relative norm (float32 sums in another order)."""
    expected = naive.grads()
    found = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert set(found) == {n for n, leaf in naive.leaves.items() if leaf.requires_grad}
    largest = max(float(g.norm()) for g in expected.values() if g is not None)
    assert largest > 0
    for name, gradient in found.items():
        wanted = expected[name]
        assert gradient is not None, f"{name} has no gradient"
        assert wanted is not None, f"{name} has no gradient in the naive loop"
        # a tensor whose gradient cancels to almost nothing is compared on the scale of the largest one
        scale = max(float(wanted.norm()), 1e-4 * largest)
        assert float((gradient - wanted).norm()) <= tolerance * scale, f"{name}: {gradient.norm()} vs {wanted.norm()}"

"""ShadowPEFT (arXiv 2604.19254) written out, Eqs. 1-9: the page to read first, and the oracle of the tests.

The first half is the method and nothing else; docs/method.md walks through it. The second half puts an adapter's weights into
it, so that tests can compare logits, losses and every gradient with the package's. It calls no arithmetic of the package:
where the package fuses (two nets in one matrix, update and injection in one step, one loss for many rows), this does not.

``B`` batch, ``T`` tokens, ``d`` width of the base, ``d_s`` of the shadow, ``r`` rank of an injection, ``m`` hidden width of an
update, ``V`` vocabulary. Weights are ``(out, in)``; a product with ``W`` is ``x @ w.T``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------------------------------- the method


@dataclass
class Injection:
    """What corrects the input of one layer: down to rank r and up again."""

    w_down: Tensor  # (r, d)
    w_up: Tensor  # (d, r), zero before training: the adapted model starts as the base


@dataclass
class Update:
    """What moves the state on after one layer: T proposes a new state, G says how much of it to take."""

    w1: Tensor  # (m, d)
    w2: Tensor  # (d, m)
    w3: Tensor  # (m, d)
    w4: Tensor  # (d, m)
    b1: Tensor | float = 0.0  # the paper has no biases, PEFT's variant has
    b2: Tensor | float = 0.0
    b3: Tensor | float = 0.0
    b4: Tensor | float = 0.0


def initial_state(z: Tensor, w_p: Tensor | None) -> Tensor:
    """``s^(0)`` from the shadow backbone's last hidden state ``z``; without ``W_p`` both have the same width."""
    return z if w_p is None else z @ w_p.T  # Eqs. 1, 10


def inject(h: Tensor, s: Tensor, w: Injection, alpha: float) -> Tensor:
    """The input of a layer, corrected by its distance from the shadow's state."""
    delta = h - s  # Eq. 2
    correction = delta @ w.w_down.T @ w.w_up.T  # Eq. 3, without its dropout
    return h + alpha * correction  # Eq. 4


def update(s: Tensor, x: Tensor, w: Update, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """The next state from the layer's normalised output ``x``."""
    t = activation(x @ w.w1.T + w.b1) @ w.w2.T + w.b2  # Eqs. 5, 13, without its dropout
    g = sigmoid(activation(x @ w.w3.T + w.b3) @ w.w4.T + w.b4)  # Eqs. 6, 14
    return (1 - g) * s + g * t  # Eq. 7


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred**2).mean(-1, keepdim=True).add(1e-5).sqrt() * weight + bias


def attached(
    h: Tensor,
    s: Tensor,
    layers: list[Callable[[Tensor], Tensor]],
    injections: dict[int, Injection],
    updates: dict[int, Update],
    norm: Callable[[Tensor], Tensor],
    alpha: float,
    activation: Callable[[Tensor], Tensor] = silu,
    correct: Callable[[Tensor, Tensor, Injection, float], Tensor] = inject,
) -> Tensor:
    """The frozen layers of the base with the shadow beside them; layer 0 has no injection, the last needs no update."""
    for i, layer in enumerate(layers):
        if i in injections:
            h = correct(h, s, injections[i], alpha)
        h = layer(h)
        if i in updates:
            s = update(s, norm(h), updates[i], activation)
    return h


def cross_entropy(logits: Tensor, targets: Tensor, count: int | None = None, smoothing: float = 0.0) -> Tensor:
    """The mean of ``-log p(target)`` over the targets that are not -100; ``count`` replaces their number."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    total, number = logits.sum() * 0.0, 0
    for row, target in zip(log_p.flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target != -100:
            total = total - (1 - smoothing) * row[target] - smoothing * row.mean()
            number += 1
    return total / max(count or number, 1)


def joint_loss(task: Tensor, shadow: Tensor, weight: float) -> Tensor:
    """The base's cross-entropy and ``lambda`` times the shadow's."""
    return task + weight * shadow  # Eqs. 8, 9


# ------------------------------------------------------------------------------------ an adapter's weights put into it


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def rms(x: Tensor) -> Tensor:
    return (x**2).mean(-1, keepdim=True).sqrt()


def inject_scaled(h: Tensor, s: Tensor, w: Injection, alpha: float) -> Tensor:
    """Our variant "scaled": both states at equal size, the correction back at the base's."""
    return h + rms(h) * (inject(h / rms(h), s / rms(s), w, alpha) - h / rms(h))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The base's decoder layers."""
    body = model.base_model
    return body.h if hasattr(body, "h") else body.layers


def first(out: Any) -> Tensor:
    """The hidden state of what a decoder layer returns."""
    return out[0] if isinstance(out, tuple) else out


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class NaiveShadow:
    """An adapted model by the functions above, on leaves that are copies of the adapter's parameters."""

    def __init__(self, base: nn.Module, adapted: nn.Module, adapter: str = "default") -> None:
        self.base = copy.deepcopy(base).requires_grad_(False)
        self.adapter = adapter
        self.config = adapted.peft_config[adapter]
        modules = dict(adapted.named_modules())
        hub_name = next(n for n in modules if n.endswith("shadow_hub"))
        hub = modules[hub_name]
        self.shadow = copy.deepcopy(hub.shadowpeft_backbone[adapter])
        prefix = f"{hub_name}.shadowpeft_backbone.{adapter}."
        self.leaves: dict[str, Tensor] = {prefix + n: p for n, p in self.shadow.named_parameters()}
        """The adapted model's trainable parameters by name, as leaves of the naive graph."""
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
        leaves = [leaf for name, leaf in self.leaves.items() if name.endswith(ending)]
        assert len(leaves) <= 1, ending
        return leaves[0] if leaves else None

    def grads(self) -> dict[str, Tensor | None]:
        return {name: leaf.grad for name, leaf in self.leaves.items()}

    def injection(self, layer: int) -> Injection:
        link = f".{layer}.shadow_link.shadowpeft_injection.{self.adapter}"
        return Injection(self.get(f"{link}.w_down"), self.get(f"{link}.w_up"))

    def update(self, layer: int) -> Update:
        """The update after ``layer``; its parameters sit on the next layer, which needs its result."""
        link = f".{layer + 1}.shadow_link.shadowpeft_update.{self.adapter}"
        w_in, w_out = self.get(f"{link}.w_in"), self.get(f"{link}.w_out")
        b_in, b_out = self.get(f"{link}.b_in"), self.get(f"{link}.b_out")
        m = w_in.shape[0] // 2
        weights = (w_in[:m], w_out[0], w_in[m:], w_out[1])
        if self.config.variant == "scaled":
            return Update(*weights, b4=-4.0)  # the gate starts nearly closed
        return Update(*weights) if b_in is None else Update(*weights, b_in[:m], b_out[0], b_in[m:], b_out[1])

    def norm(self, x: Tensor) -> Tensor:
        """One LayerNorm for all layers, which the paper's text leaves out; PEFT's variant has none."""
        if self.config.variant == "peft":
            return x
        name = f"shadowpeft_norm.{self.adapter}"
        return layer_norm(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None, **extra: Any) -> tuple[Any, Tensor]:
        """The base's output with the shadow's corrections, and ``s^(0)``."""
        peft = self.config.variant == "peft"
        embed = self.own_embedding or self.base.get_input_embeddings()
        z = self.shadow(inputs_embeds=embed(input_ids), attention_mask=attention_mask, use_cache=False, **extra)
        s0 = initial_state(z.last_hidden_state, self.get(f"shadowpeft_projection.{self.adapter}.weight"))

        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **extra)
        h, layers = self._unrolled(inputs)
        begin, end = self.config.refined_layers or (0 if peft else 1, len(layers) - 1)
        h = attached(
            h,
            s0,
            layers,
            {i: self.injection(i) for i in range(begin, end + 1)},
            {i: self.update(i) for i in range(begin, end)} if self.config.use_update else {},
            self.norm,
            self.config.shadow_alpha,
            gelu if peft else silu,
            inject_scaled if self.config.variant == "scaled" else inject,
        )
        return self._finished(inputs, h), s0

    def _unrolled(self, inputs: dict[str, Any]) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
        """The input of layer 0, and each layer as a function of its hidden state alone (masks and positions bound)."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        layers = decoder_layers(self.base)
        record = [
            layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for layer in layers
        ]
        with hooked(*record), torch.no_grad():
            self.base(**inputs)

        def alone(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
            return lambda h: first(layer(h, *args[1:], **kwargs))

        return calls[0][0][0], [alone(layer, *call) for layer, call in zip(layers, calls, strict=True)]

    def _finished(self, inputs: dict[str, Any], h: Tensor) -> Any:
        """The base's output if its last layer gave ``h``: its own final norm, head and pooling."""

        def replace(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return (h, *out[1:]) if isinstance(out, tuple) else h

        trained = self.get(f"score.modules_to_save.{self.adapter}.weight")
        weights = {} if trained is None else {"score.weight": trained}
        with hooked(decoder_layers(self.base)[-1].register_forward_hook(replace)):
            return torch.func.functional_call(self.base, weights, (), inputs)

    def head(self, state: Tensor) -> Tensor:
        """The base's complete LM head, or the shadow's own (Eq. 11)."""
        lm = self.base.get_output_embeddings()
        own = self.get(f"shadowpeft_head.{self.adapter}.weight")
        logits = state @ (lm.weight if own is None else own).T
        if getattr(lm, "bias", None) is not None:
            logits = logits + lm.bias
        cap = getattr(self.base.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def classify(self, state: Tensor, input_ids: Tensor) -> Tensor:
        """The shadow's own classifier on the last token that is not padding."""
        padding = self.base.config.pad_token_id
        last = [max(i for i, token in enumerate(row) if token != padding) for row in input_ids.tolist()]
        pooled = torch.stack([state[row, i] for row, i in enumerate(last)])
        return pooled @ self.get(f"shadowpeft_head.{self.adapter}.weight").T

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
            logits, targets, shadow_targets = out.logits, labels, shadow_labels
            read = shadow_logits = self.classify(s0, input_ids)
        else:
            shadow_logits = self.head(s0)
            logits, targets, shadow_targets = out.logits[:, :-1], labels[:, 1:], shadow_labels[:, 1:]
            read = shadow_logits[:, :-1]
        task = cross_entropy(logits, targets, items, smoothing)
        shadow = cross_entropy(read, shadow_targets, shadow_items or items)
        return SimpleNamespace(
            logits=out.logits,
            task_loss=task,
            shadow_loss=shadow,
            loss=joint_loss(task, shadow, self.config.auxiliary_loss_weight),
            shadow_logits=shadow_logits,
            shadow_state=s0,
        )


def assert_same_gradients(adapted: nn.Module, naive: NaiveShadow, tolerance: float = 2e-4) -> None:
    """Every trainable tensor has the naive loop's gradient, by relative norm (float32 sums in another order)."""
    expected = naive.grads()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert set(gradients) == {n for n, leaf in naive.leaves.items() if leaf.requires_grad}
    largest = max(float(g.norm()) for g in expected.values() if g is not None)
    assert largest > 0
    for name, gradient in gradients.items():
        wanted = expected[name]
        assert gradient is not None, f"{name} has no gradient"
        assert wanted is not None, f"{name} has no gradient in the naive loop"
        # a tensor whose gradient cancels to almost nothing is compared on the scale of the largest one
        scale = max(float(wanted.norm()), 1e-4 * largest)
        assert float((gradient - wanted).norm()) <= tolerance * scale, f"{name}: {gradient.norm()} vs {wanted.norm()}"

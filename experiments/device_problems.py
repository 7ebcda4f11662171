"""The two problems of the device search: a detached shadow alone, its rows, its loss, and what it is worth on given rows.

The detached model is the base's frozen embedding, its first k layers, its norm and its frozen head. Rows never run the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from transformers import AutoModelForSequenceClassification, DynamicCache

import shadowpeft
from experiments import device_rows as rows_of
from shadowpeft.constrained import choose, equal_lengths
from shadowpeft.data.action_trie import ActionTrie
from shadowpeft.data.actions import REMOTE
from shadowpeft.data.chat import rows_digest
from shadowpeft.data.robot import SKILLS, SYSTEM, parse_action
from shadowpeft.data.tasks import class_ids, get_task
from shadowpeft.evaluate import wilson
from shadowpeft.generate import answer, evaluating
from shadowpeft.hf.base.load import load_base
from shadowpeft.hf.layer import find_hub
from shadowpeft.tokenizer import load_tokenizer

WRONG = 0.03
"""Share of wrong answers at which the commands kept on the device are counted."""


def detached(base: str, layers: int) -> Any:
    """A language model of the first ``layers`` layers of ``base``: a shadow that starts from them, detached."""
    config = shadowpeft.ShadowPeftConfig(
        task_type="CAUSAL_LM", shadow_num_hidden_layers=layers, shadow_init="base_layers"
    )
    return shadowpeft.detach(get_peft_model(load_base(base), config))


def corrected(base: Any, layers: int, *, last: int, **fields: Any) -> Any:
    """``base`` with a shadow that starts from its first ``layers`` layers and corrects its ``last`` ones (0: all).

    Args:
        fields: more of ``ShadowPeftConfig``.
    """
    whole = base.config.num_hidden_layers
    config = shadowpeft.ShadowPeftConfig(
        shadow_num_hidden_layers=layers,
        shadow_init="base_layers",
        refined_layers=[whole - last, whole - 1] if last else None,
        **fields,
    )
    return get_peft_model(base, config)


def place(model: Any, averaged: dict[str, Tensor]) -> Any:
    """Put the weights of a trained stock model, of a classifier with its head, into the shadow of ``model``; its hub."""
    hub = find_hub(model)
    own = {f"model.{name}": p for name, p in hub.shadowpeft_backbone["default"].named_parameters()}
    if "default" in hub.shadowpeft_head:
        own["score.weight"] = hub.shadowpeft_head["default"].weight
    with torch.no_grad():
        for name, mean in averaged.items():
            own[name].copy_(mean)
    return hub


def freeze(model: Any, layers: int) -> list[tuple[str, nn.Parameter]]:
    """Freeze embedding, LM head and the first ``layers`` layers; the names and tensors of what trains."""
    fixed = {id(p) for p in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    fixed |= {id(p) for p in head.parameters()} if head is not None else set()
    fixed |= {id(p) for layer in model.base_model.layers[:layers] for p in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in fixed)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


class Prefix:
    """The tokens that all sequences share, run once for a whole batch and within its graph, so gradients are exact."""

    def __init__(self, model: Any, ids: list[int]) -> None:
        self.model, self.ids = model, ids

    def cache(self, rows: int) -> DynamicCache:
        """Keys and values of the prefix for a batch of ``rows``."""
        cache = DynamicCache(config=self.model.config)
        if self.ids:
            self.model.base_model(torch.tensor([self.ids]), past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(rows)
        return cache

    def hidden(self, embedded: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden state ``(B, T, d)`` of what follows the prefix."""
        out = self.model.base_model(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        states: Tensor = out.last_hidden_state
        return states


class Robot:
    """Robot commands and open requests: the right ``[Skill()]``, or ``[REMOTE]``."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell
        self.tokenizer = load_tokenizer(cell.base)
        self.model = detached(cell.base, cell.layers)
        self.split = rows_of.split(open_rows=cell.open_rows, hold_out=cell.hold_out, more_rows=cell.more_rows)
        self.items = rows_of.encode(self.split.train, self.tokenizer, cell.target)
        self.trie = ActionTrie.of(self.tokenizer, SKILLS)
        self.prefix = Prefix(self.model, rows_of.shared_prefix(self.items))

    def data(self) -> dict[str, Any]:
        """What identifies the rows of a record."""
        parts = {"train": self.split.train, "development": self.split.development}
        found = {name: {"rows": len(rows), "sha256": rows_digest(rows)} for name, rows in parts.items()}
        return {**found, "tokens_of_a_pass": sum(len(item.ids) for item in self.items)}

    def loss(self, places: Sequence[int]) -> Tensor:
        """Cross-entropy per learnt token of some rows."""
        skip = len(self.prefix.ids)
        tokens, where, targets = rows_of.padded([self.items[i] for i in places], skip, int(self.tokenizer.pad_token_id))
        embedded = self.model.get_input_embeddings()(tokens)
        if self.cell.token_dropout:
            embedded = embedded * (torch.rand(embedded.shape[:2]) >= self.cell.token_dropout)[..., None]
        embedded = dropout(embedded, self.cell.dropout)
        states = self.prefix.hidden(embedded, self.prefix.cache(len(places)))
        return cross_entropy(self.model.get_output_embeddings()(states.flatten(0, 1)[where]), targets)

    def development(self, *, greedy: bool) -> dict[str, Any]:
        """What the model is worth on the rows that choose."""
        return self.worth(self.split.development, greedy=greedy)

    def test(self) -> dict[str, Any]:
        """What it is worth on the rows that no search looks at."""
        return self.worth(rows_of.test_rows(), greedy=True)

    def worth(self, rows: Sequence[dict[str, str]], *, greedy: bool) -> dict[str, Any]:
        """Scores of constrained choice and, with ``greedy``, of free greedy decoding as it would be served."""
        chances = self.chances(rows)
        found = {"constrained": judged(rows, list(self.trie.actions), chances)}
        if greedy:
            answers = answer(
                self.model, self.tokenizer, [r["prompt"] for r in rows], system=SYSTEM, max_new_tokens=10, batch_size=32
            )
            found["greedy"] = shares(rows, [parse_action(a.text) for a in answers])
        return found

    def chances(self, rows: Sequence[dict[str, str]], size: int = 32) -> Tensor:
        """Probabilities ``(N, A)`` of all actions."""
        chats = [rows_of.messages(row) for row in rows]
        chosen = choose(self.model, self.tokenizer, chats, self.trie, batch_size=size)
        return torch.tensor([list((c.probabilities or {}).values()) for c in chosen], dtype=torch.float64)


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """A share of rows with its 95 % Wilson interval."""
    low, high = wilson(sum(hits), len(hits))
    return {
        "score": round(sum(hits) / len(hits), 4) if hits else None,
        "interval": [round(low, 4), round(high, 4)],
        "n": len(hits),
    }


def shares(rows: Sequence[dict[str, str]], actions: Sequence[str | None]) -> dict[str, Any]:
    """Commands with the right skill, also by language and part, and open requests that run no skill."""
    pairs = list(zip(rows, actions, strict=True))
    commands = [(row, action == row["skill"]) for row, action in pairs if row["skill"] != REMOTE]
    groups = {"en": ("lang", "en"), "zh": ("lang", "zh"), "held_out": ("split", "train_normal")}
    parts = {name: share([hit for row, hit in commands if row[key] == value]) for name, (key, value) in groups.items()}
    return {
        "commands": share([hit for _, hit in commands]),
        **{name: found for name, found in parts.items() if found["n"]},
        "open_handed_on": share([a in (REMOTE, None) for row, a in pairs if row["skill"] == REMOTE]),
        "commands_handed_on": share([a in (REMOTE, None) for row, a in pairs if row["skill"] != REMOTE]),
    }


def judged(rows: Sequence[dict[str, str]], actions: list[str], chances: Tensor) -> dict[str, Any]:
    """:func:`shares` of the likeliest action, and what its probability is worth as a confidence.

    ``log_loss``: mean of minus the logarithm of the right action's probability. ``auroc``: chance that a command whose
    likeliest skill is right has a more probable skill than any other row (a wrong skill, or an open request). ``kept``: share
    of the commands kept on the device at the laxest threshold on that probability at which at most ``WRONG`` of what is kept
    is wrong; the threshold is chosen on the same rows, so this is a ceiling and no guarantee.
    """
    gold = torch.tensor([actions.index(row["skill"]) for row in rows])
    best = chances.argmax(-1).tolist()
    skills = chances.clone()
    skills[:, actions.index(REMOTE)] = 0.0
    confidence, skill = skills.max(-1)
    command = gold != actions.index(REMOTE)
    good = ((skill == gold) & command).numpy()
    order = np.argsort(-confidence.numpy(), kind="stable")
    wrong = np.cumsum(~good[order]) / np.arange(1, len(order) + 1)
    allowed = np.flatnonzero(wrong <= WRONG)
    kept = order[: allowed[-1] + 1] if len(allowed) else order[:0]
    nll = -chances.gather(1, gold[:, None]).clamp_min(1e-12).log().squeeze(1)
    return {
        **shares(rows, [actions[a] for a in best]),
        "log_loss": round(float(nll.mean()), 4),
        "log_loss_commands": round(float(nll[command].mean()), 4),
        "auroc": round(float(roc_auc_score(good, confidence)), 4) if 0 < good.sum() < len(good) else None,
        "kept": round(float(command.numpy()[kept].sum() / max(int(command.sum()), 1)), 4),
        "values": " ".join("1" if b == g else "0" for b, g in zip(best, gold.tolist(), strict=True)),
    }


class Clinc:
    """CLINC150: 150 intents and out of scope, as a stock classifier over the text alone."""

    def __init__(self, cell: Any) -> None:
        self.cell, self.task = cell, get_task("clinc150")
        self.tokenizer = load_tokenizer(cell.base)
        self.model = self.build()
        self.examples, origin = self.task.load_with_source("train")
        self.items = [rows_of.Item(class_ids(self.tokenizer, e.prompt, 64), 0) for e in self.examples]
        self.origin = {"train": {"rows": len(self.examples), "sha256": origin["fingerprint"]}}

    def build(self) -> Any:
        """The model that trains."""
        body = detached(self.cell.base, self.cell.layers)
        config = body.config
        config.num_labels, config.pad_token_id = len(self.task.labels), self.tokenizer.pad_token_id
        torch.manual_seed(self.cell.seed)
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(body.base_model.state_dict())
        return model

    def data(self) -> dict[str, Any]:
        """What identifies the rows of a record."""
        examples, origin = self.task.load_with_source("validation")
        development = {"rows": len(examples), "sha256": origin["fingerprint"]}
        tokens = sum(len(item.ids) for item in self.items)
        return {**self.origin, "development": development, "tokens_of_a_pass": tokens}

    def _logits(self, ids: Sequence[list[int]]) -> Tensor:
        width, pad = max(map(len, ids)), int(self.tokenizer.pad_token_id)
        tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
        mask = (torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]).long()
        embedded = self.model.get_input_embeddings()(tokens)
        if self.model.training and self.cell.token_dropout:
            embedded = embedded * (torch.rand(embedded.shape[:2]) >= self.cell.token_dropout)[..., None]
        embedded = dropout(embedded, self.cell.dropout, self.model.training)
        states = self.model.base_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        logits: Tensor = self.model.score(states[torch.arange(len(ids)), mask.sum(1) - 1])
        return logits

    def loss(self, places: Sequence[int]) -> Tensor:
        """Cross-entropy over the classes."""
        gold = torch.tensor([self.examples[i].gold for i in places])
        return cross_entropy(self._logits([self.items[i].ids for i in places]), gold)

    def development(self, *, greedy: bool) -> dict[str, Any]:
        """What the model is worth on the validation rows."""
        return self.worth("validation")

    def test(self) -> dict[str, Any]:
        """What it is worth on the test rows."""
        return self.worth("test")

    @torch.inference_mode()
    def worth(self, name: str) -> dict[str, Any]:
        """Shares of rows in scope and out of scope, and the cross-entropy, of a split."""
        examples = self.task.load(name)
        ids = [class_ids(self.tokenizer, e.prompt, 64) for e in examples]
        logits = torch.zeros(len(ids), len(self.task.labels))
        with evaluating(self.model):
            for group in equal_lengths([len(row) for row in ids], 128):
                logits[group] = self._logits([ids[i] for i in group])
        gold = torch.tensor([e.gold for e in examples])
        hits = (logits.argmax(-1) == gold).tolist()
        oos = len(self.task.labels) - 1
        loss = float(cross_entropy(logits, gold))
        if not math.isfinite(loss):
            raise ArithmeticError(f"the cross-entropy on '{name}' is {loss}")
        return {
            "constrained": {
                "in_scope": share([hit for hit, e in zip(hits, examples, strict=True) if e.gold != oos]),
                "oos_recall": share([hit for hit, e in zip(hits, examples, strict=True) if e.gold == oos]),
                "all": share(hits),
                "log_loss": round(loss, 4),
                "values": " ".join("1" if hit else "0" for hit in hits),
            }
        }


PROBLEMS: dict[str, Any] = {"robot": Robot, "clinc150": Clinc}

"""The part of ``shadowpeft doctor`` that runs the user's own model: a few forwards and backwards on a dozen tokens."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

from shadowpeft.apps.checks import FAILED, OK, WARNING, Check, Report
from shadowpeft.errors import ShadowPeftError, UnsupervisedShadowError
from shadowpeft.hf.detach import detach
from shadowpeft.hf.layer import find_hub
from shadowpeft.messages import shorten

ROWS, LENGTH, NEW = 2, 12, 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest gap between logits that are equal in exact arithmetic, relative to the largest logit: attention sums in another
order with and without a cache. float32 leaves 1e-6 to 1e-5 a layer; half precisions round each layer's output."""
_BROKEN = (ShadowPeftError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
"""What a defective layer, cache or head raises; everything else is a defect of this file and must show."""

Outcome = Optional[tuple[str, str, str]]
"""State, text and remedy of a step; None: there was nothing to test."""


def self_test(report: Report, model: Any, tokenizer: Any) -> None:
    """Identity, detached path, cache, left padding, lambda and targets; the model is unloaded at the end."""
    test = _SelfTest(report, model, tokenizer)
    steps: dict[str, Callable[[], Outcome]] = {
        "detached = shadow": test.detached,
        "cached = uncached": test.cached,
        "left padding": test.left_padding,
        "lambda": test.weight_of_the_shadow,
        "shadow targets": test.targets,
        "stock Trainer": test.stock_trainer,
        "TRL's SFTTrainer": test.trl,
        "disabled = base": test.identity,  # last: it takes the adapter out
    }
    for name, step in steps.items():
        if test.classifier and step in (test.cached, test.stock_trainer, test.trl):
            continue
        model.eval()
        try:
            outcome = step()
        except _BROKEN as error:
            text = f"{type(error).__name__}: {shorten(error)}"
            outcome = FAILED, text, "this architecture or set-up breaks the method here"
        if outcome is not None:
            state, text, fix = outcome
            report.add(Check(name, state, text, None if state == OK else fix))
        model.zero_grad(set_to_none=True)


class _SelfTest:
    """The steps, on one model and one drawn batch."""

    def __init__(self, report: Report, model: Any, tokenizer: Any) -> None:
        self.report, self.model, self.tokenizer = report, model, tokenizer
        self.base: Any = model.get_base_model()
        self.hub: Any = find_hub(model)
        self.config: Any = self.hub.configs["default"]
        self.classifier = self.hub.is_classifier("default")
        self.allowed = TOLERANCE.get(self.base.dtype, TOLERANCE[torch.bfloat16])
        self.ids = self._tokens()

    def _tokens(self) -> Tensor:
        """``(ROWS, LENGTH)`` ordinary tokens, drawn with a fixed seed."""
        rows, special = self.model.get_input_embeddings().weight.shape[0], {0, 1, 2}
        if self.tokenizer is not None:
            rows, special = min(rows, len(self.tokenizer)), set(self.tokenizer.all_special_ids)
        usable = [i for i in range(min(rows, 5000)) if i not in special]
        drawn = torch.randint(0, len(usable), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
        return torch.tensor(usable)[drawn].to(self.model.device)

    def _run(self, model: Any = None, ids: Tensor | None = None, **options: Any) -> Any:
        ids = self.ids if ids is None else ids
        return (model or self.model)(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def _generate(self, ids: Tensor, mask: Tensor, new: int, **options: Any) -> Any:
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "attention_mask": mask}
        return self.model.generate(ids, **settings, **options)

    def _labels(self, offset: int = 0) -> Tensor:
        if not self.classifier:
            return self.ids.roll(offset, 1)
        return (torch.arange(ROWS, device=self.ids.device) + offset) % self.base.config.num_labels

    @torch.no_grad()
    def identity(self) -> Outcome:
        with self.model.disable_adapter():
            disabled = self._run().logits
        enabled = self._run().logits
        plain = self._run(self.model.unload()).logits
        same, change = torch.equal(disabled, plain), _gap(enabled, plain)
        if change == 0.0:
            self.report.warn(
                "effect",
                "the adapter changes no logit: it was never trained",
                "train it, or check that this is the one",
            )
        difference = "bit-identical" if same else f"logits differ by {_gap(disabled, plain):.1e} (relative)"
        text = f"{difference}; the adapter changes them by {change:.1e}"
        return OK if same else FAILED, text, "another hook or patch on the base is active; take it off"

    @torch.no_grad()
    def detached(self) -> Outcome:
        edge = detach(self.model).to(self.ids.device)
        gap = _gap(self._run(edge).logits, self._run(return_shadow=True).shadow_logits)
        size = sum(p.numel() for p in edge.parameters())
        text = f"{type(edge).__name__}, {size:,} parameters, logits {gap:.1e} apart (relative)"
        fix = "do not ship the detached model; its class computes something else than the shadow"
        return OK if gap <= self.allowed else FAILED, text, fix

    @torch.no_grad()
    def cached(self) -> Outcome:
        whole = self._run(use_cache=False).logits
        out = self.model(input_ids=self.ids[:, :7], use_cache=True)
        parts, caches = [out.logits], _caches(out)
        if not caches:
            return WARNING, "this architecture has no cache", "expect generation to slow down with every token"
        for part in self.ids[:, 7:].split(1, dim=1):
            out = self.model(input_ids=part, use_cache=True, **caches)
            parts, caches = [*parts, out.logits], _caches(out)
        gap = _gap(torch.cat(parts, 1), whole)
        mask, pad = torch.ones_like(self.ids), int(self.ids[0, 0])
        cached, uncached = (
            self._generate(self.ids, mask, NEW, use_cache=use, pad_token_id=pad)[:, LENGTH:] for use in (True, False)
        )
        same = int((cached == uncached).sum())
        text = (
            f"logits {gap:.1e} apart (relative, at most {self.allowed:g}), {same} of {ROWS * NEW} greedy tokens equal"
        )
        if gap <= self.allowed and same < ROWS * NEW and self.base.dtype != torch.float32:
            return WARNING, text, "rounding decides between near ties; run it in float32 to see whether it is more"
        fix = "generate with use_cache=False, and report the architecture with the versions above"
        return OK if gap <= self.allowed and same == ROWS * NEW else FAILED, text, fix

    @torch.no_grad()
    def left_padding(self) -> Outcome:
        pad = getattr(self.base.config.get_text_config(decoder=True), "pad_token_id", None)
        pad = self.tokenizer.pad_token_id if pad is None and self.tokenizer is not None else pad
        pad = pad[0] if isinstance(pad, list) else pad
        if pad is None:
            return WARNING, "there is no pad token to test with", "give tokenizer and model a pad token"
        short, cut = self.ids[:, 4:], 4
        padded = torch.cat([torch.full_like(self.ids[:, :cut], pad), short], 1)
        mask = (torch.arange(LENGTH, device=self.ids.device) >= cut).long().expand(ROWS, -1)
        if self.classifier:
            alone = self._run(ids=short, return_shadow=True)
            beside = self.model(input_ids=padded, attention_mask=mask, return_shadow=True)
            gap = max(_gap(getattr(beside, k), getattr(alone, k)) for k in ("logits", "shadow_logits"))
        else:
            options = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": pad}
            alone = self._generate(short, torch.ones_like(short), 4, **options)
            beside = self._generate(padded, mask, 4, **options)
            gap = _gap(beside.logits[0], alone.logits[0])
        text = (
            f"a padded batch and the same rows without padding are {gap:.1e} apart (relative, at most {self.allowed:g})"
        )
        return OK if gap <= self.allowed else FAILED, text, "use batches without padding with this architecture"

    def _backbone_gradient(self, loss: Callable[[], Tensor], weight: float) -> Tensor:
        """Gradient of the shadow backbone under the lambda ``weight``; dropout draws from a fixed seed."""
        own = self.config.auxiliary_loss_weight
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        try:
            self.config.auxiliary_loss_weight = weight
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                loss().backward()
        finally:
            self.config.auxiliary_loss_weight = own
            self.model.eval()
        parameters = self.hub.shadowpeft_backbone["default"].parameters()
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])

    def _judge_lambda(self, loss: Callable[[], Tensor], where: str) -> Outcome:
        weight = self.config.auxiliary_loss_weight
        own, more = self._backbone_gradient(loss, weight), self._backbone_gradient(loss, weight + 1.0)
        moved = float((more - own).norm())
        if not (moved > 1e-3 * float(more.norm()) and moved > 0):
            text = f"lambda changes nothing in {where}: the shadow is never supervised"
            return FAILED, text, "use shadowpeft.ShadowTrainer"
        if weight == 0:
            fix = "set auxiliary_loss_weight above 0 (0.05 by default), unless only the attached model is wanted"
            return WARNING, f"lambda is 0, so nothing trains the detached path in {where}", fix
        sizes = f"{float(own.norm()):.2g}, {float(more.norm()):.2g} with 1 more"
        return OK, f"{weight:g} takes effect in {where}: backbone gradient {sizes}", ""

    def weight_of_the_shadow(self) -> Outcome:
        return self._judge_lambda(lambda: self._run(labels=self._labels()).loss, "a plain forward")

    @torch.no_grad()
    def targets(self) -> Outcome:
        same = self._run(labels=self._labels())
        other = self._run(labels=self._labels(), shadow_labels=self._labels(1))
        task, shadow = (
            (float(same.task_loss), float(other.task_loss)),
            (float(same.shadow_loss), float(other.shadow_loss)),
        )
        good = shadow[0] != shadow[1] and task[0] == task[1]
        moved = f"from {shadow[0]:.4g} to {shadow[1]:.4g}"
        text = f"shadow_labels move the shadow's loss {moved} and leave the task's at {task[0]:.4g}"
        fix = "the base's forward swallows shadow_labels; use shadowpeft.ShadowTrainer"
        return OK if good else FAILED, text, fix

    def stock_trainer(self) -> Outcome:
        """What transformers' Trainer does with label smoothing or an own loss: it takes the labels away from the model."""
        if self.config.auxiliary_loss_weight == 0:
            return None
        self.model.train()
        try:
            self._run().logits.float().logsumexp(-1).mean().backward()
        except UnsupervisedShadowError:
            return (
                OK,
                "joint loss; with label smoothing or compute_loss_func it is refused, use ShadowTrainer there",
                "",
            )
        return FAILED, "label smoothing would train without the shadow's loss", "use shadowpeft.ShadowTrainer"

    def trl(self) -> Outcome:
        if importlib.util.find_spec("trl") is None or self.tokenizer is None:
            return None
        from datasets import Dataset, disable_progress_bars
        from trl import SFTConfig, SFTTrainer

        if self.tokenizer.pad_token_id is None:
            return WARNING, "needs a pad token", "tokenizer.pad_token = tokenizer.eos_token"
        disable_progress_bars()
        rows = [{"input_ids": row} for row in self.ids.tolist()]
        forward = vars(self.base).get("forward")
        with tempfile.TemporaryDirectory() as folder:
            options = {"report_to": [], "use_cpu": True, "bf16": False, "max_length": None, "disable_tqdm": True}
            arguments = SFTConfig(output_dir=folder, **options)
            data = Dataset.from_list(rows)
            trainer = SFTTrainer(self.model, args=arguments, train_dataset=data, processing_class=self.tokenizer)
            batch, items = trainer.data_collator(rows), torch.tensor(ROWS * (LENGTH - 1))
            try:
                return self._judge_lambda(
                    lambda: trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items), "SFTTrainer"
                )
            finally:
                vars(self.base).pop("forward", None)  # TRL's own
                if forward is not None:
                    self.base.forward = forward


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


def _caches(output: Any) -> dict[str, Any]:
    return {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}

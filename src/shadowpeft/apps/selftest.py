"""The part of ``shadowpeft doctor`` that runs the user's own model: a few forwards and backwards on a dozen tokens."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shadowpeft.apps.checks import Report
from shadowpeft.errors import ShadowPeftError, UnsupervisedShadowError
from shadowpeft.hf.detach import detach
from shadowpeft.hf.layer import find_hub

ROWS, LENGTH, NEW = 2, 12, 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest gap between logits that are equal in exact arithmetic, relative to the largest logit: attention sums in another
order with and without a cache. float32 leaves 1e-6 to 1e-5 a layer; half precisions round each layer's output."""
_BROKEN = (ShadowPeftError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
"""What a defective layer, cache or head raises; everything else is a defect of this file and must show."""


def self_test(report: Report, model: Any, tokenizer: Any) -> None:
    """Identity, detached path, cache, left padding, lambda and targets; the model is unloaded at the end."""
    ids = _tokens(model, tokenizer)
    classifier = find_hub(model).is_classifier("default")
    steps: list[tuple[str, Callable[..., None]]] = [
        ("detached = shadow", _detached),
        ("cached = uncached", _cached),
        ("left padding", _left_padding),
        ("lambda", _lambda),
        ("shadow targets", _targets),
        ("stock Trainer", _stock_trainer),
        ("TRL's SFTTrainer", _trl),
        ("disabled = base", _identity),  # last: it takes the adapter out
    ]
    for name, step in steps:
        if classifier and step in (_cached, _stock_trainer, _trl):
            continue
        try:
            step(report, name, model.eval(), ids, tokenizer)
        except _BROKEN as error:
            first = (str(error).strip().splitlines() or ["no description"])[0]
            report.fail(
                name, f"{type(error).__name__}: {first}"[:300], "this architecture or set-up breaks the method here"
            )
        model.zero_grad(set_to_none=True)


def _tokens(model: Any, tokenizer: Any) -> Tensor:
    """``(ROWS, LENGTH)`` ordinary tokens, drawn with a fixed seed."""
    rows = min(model.get_input_embeddings().weight.shape[0], len(tokenizer) if tokenizer is not None else 10**9)
    special = set(tokenizer.all_special_ids) if tokenizer is not None else {0, 1, 2}
    usable = [i for i in range(min(rows, 5000)) if i not in special]
    drawn = torch.randint(0, len(usable), (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return torch.tensor(usable)[drawn].to(model.device)


def _gap(model: Any, a: Tensor, b: Tensor) -> tuple[float, float]:
    """Relative difference, and how large it may be in the base's dtype."""
    dtype = model.get_base_model().dtype
    return _relative(a, b), TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])


@torch.no_grad()
def _identity(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    with model.disable_adapter():
        disabled = model(input_ids=ids, **_mask(ids)).logits
    enabled = model(input_ids=ids, **_mask(ids)).logits
    plain = model.unload()(input_ids=ids, **_mask(ids)).logits
    same = torch.equal(disabled, plain)
    change = _relative(enabled, plain)
    report.require(
        same,
        name,
        f"{'bit-identical' if same else f'logits differ by {_relative(disabled, plain):.1e} (relative)'}; the adapter changes "
        f"them by {change:.1e}",
        "another hook or patch on the base is active; take it off",
    )
    if change == 0.0:
        report.warn(
            "effect", "the adapter changes no logit: it was never trained", "train it, or check that this is the one"
        )


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


def _mask(ids: Tensor) -> dict[str, Tensor]:
    return {"attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _detached(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    expected = model(input_ids=ids, **_mask(ids), return_shadow=True).shadow_logits
    edge = detach(model).to(ids.device)
    found = edge(input_ids=ids, **_mask(ids)).logits
    gap, allowed = _gap(model, found, expected)
    report.require(
        gap <= allowed,
        name,
        f"{type(edge).__name__}, {sum(p.numel() for p in edge.parameters()):,} parameters, logits {gap:.1e} apart (relative)",
        "do not ship the detached model; its class computes something else than the shadow",
    )


def _caches(output: Any) -> dict[str, Any]:
    return {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}


@torch.no_grad()
def _cached(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    whole = model(input_ids=ids, **_mask(ids), use_cache=False).logits
    out = model(input_ids=ids[:, :7], use_cache=True)
    parts, carried = [out.logits], _caches(out)
    if not carried:
        report.warn(name, "this architecture has no cache", "expect generation to take longer with every token")
        return
    for part in ids[:, 7:].split(1, dim=1):
        out = model(input_ids=part, use_cache=True, **carried)
        parts, carried = [*parts, out.logits], _caches(out)
    gap, allowed = _gap(model, torch.cat(parts, 1), whole)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **_mask(ids)}
    options["pad_token_id"] = int(ids[0, 0])
    cached, uncached = (model.generate(ids, use_cache=use, **options)[:, LENGTH:] for use in (True, False))
    same = int((cached == uncached).sum())
    text = f"logits {gap:.1e} apart (relative, at most {allowed:g}), {same} of {ROWS * NEW} greedy tokens equal"
    if gap <= allowed and same < ROWS * NEW and model.get_base_model().dtype != torch.float32:
        report.warn(name, text, "rounding of the base's dtype decides near ties; float32 settles whether it is more")
        return
    report.require(
        gap <= allowed and same == ROWS * NEW,
        name,
        text,
        "generate with use_cache=False, and report the architecture with the versions above",
    )


@torch.no_grad()
def _left_padding(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    pad = getattr(model.get_base_model().config.get_text_config(decoder=True), "pad_token_id", None)
    pad = tokenizer.pad_token_id if pad is None and tokenizer is not None else pad
    pad = pad[0] if isinstance(pad, list) else pad
    if pad is None:
        report.warn(name, "there is no pad token to test with", "give tokenizer and model a pad token")
        return
    short, cut = ids[:, 4:], 4
    padded = torch.cat([torch.full_like(ids[:, :cut], pad), short], 1)
    mask = (torch.arange(LENGTH, device=ids.device) >= cut).long().expand(ROWS, -1)
    if find_hub(model).is_classifier("default"):
        alone = model(input_ids=short, **_mask(short), return_shadow=True)
        beside = model(input_ids=padded, attention_mask=mask, return_shadow=True)
        gaps = [_gap(model, getattr(beside, k), getattr(alone, k)) for k in ("logits", "shadow_logits")]
    else:
        options = {
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "do_sample": False,
            "output_logits": True,
            "pad_token_id": pad,
        }
        options["return_dict_in_generate"] = True
        alone = model.generate(short, **_mask(short), **options)
        beside = model.generate(padded, attention_mask=mask, **options)
        gaps = [_gap(model, beside.logits[0], alone.logits[0])]
    gap, allowed = max(gaps)
    report.require(
        gap <= allowed,
        name,
        f"a padded batch and the same rows without padding are {gap:.1e} apart (relative, at most {allowed:g})",
        "use batches without padding with this architecture",
    )


def _backbone_gradient(model: Any, run: Callable[[], Tensor]) -> Tensor:
    """Gradient of the shadow backbone after the backward pass of what ``run`` returns; dropout draws from a fixed seed."""
    model.train()
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        run().backward()
    backbone = find_hub(model).shadowpeft_backbone["default"]
    model.eval()
    parts = [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in backbone.parameters()]
    return torch.cat(parts)


def _labels(model: Any, ids: Tensor, offset: int = 0) -> Tensor:
    if not find_hub(model).is_classifier("default"):
        return ids.roll(offset, 1) if offset else ids
    classes = model.get_base_model().config.num_labels
    return (torch.arange(ROWS, device=ids.device) + offset) % classes


def _by_lambda(model: Any, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The backbone's gradient with the adapter's lambda and with one more."""
    config = find_hub(model).configs["default"]
    weight = config.auxiliary_loss_weight
    try:
        own = _backbone_gradient(model, run)
        config.auxiliary_loss_weight = weight + 1.0
        return own, _backbone_gradient(model, run)
    finally:
        config.auxiliary_loss_weight = weight


def _judge_lambda(report: Report, name: str, model: Any, run: Callable[[], Tensor], where: str) -> None:
    weight = find_hub(model).configs["default"].auxiliary_loss_weight
    own, more = _by_lambda(model, run)
    moved = float((more - own).norm())
    if not (moved > 1e-3 * float(more.norm()) and moved > 0):
        report.fail(
            name, f"lambda changes nothing in {where}: the shadow is never supervised", "use shadowpeft.ShadowTrainer"
        )
    elif weight == 0:
        report.warn(
            name,
            f"lambda is 0, so nothing trains the detached path in {where}",
            "set auxiliary_loss_weight above 0 (0.05 by default), unless only the attached model is wanted",
        )
    else:
        sizes = f"{float(own.norm()):.2g}, {float(more.norm()):.2g} with 1 more"
        report.ok(name, f"{weight:g} takes effect in {where}: backbone gradient {sizes}")


def _lambda(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    labels = _labels(model, ids)
    _judge_lambda(
        report, name, model, lambda: model(input_ids=ids, **_mask(ids), labels=labels).loss, "a plain forward"
    )


def _targets(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    with torch.no_grad():
        same = model(input_ids=ids, **_mask(ids), labels=_labels(model, ids))
        other = model(input_ids=ids, **_mask(ids), labels=_labels(model, ids), shadow_labels=_labels(model, ids, 1))
    report.require(
        float(same.shadow_loss) != float(other.shadow_loss) and float(same.task_loss) == float(other.task_loss),
        name,
        f"shadow_labels move the shadow's loss from {float(same.shadow_loss):.4g} to {float(other.shadow_loss):.4g} and leave "
        f"the task's at {float(same.task_loss):.4g}",
        "the base's forward swallows shadow_labels; use shadowpeft.ShadowTrainer",
    )


def _stock_trainer(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    """What transformers' Trainer does with label smoothing or an own loss: it takes the labels away from the model."""
    if find_hub(model).configs["default"].auxiliary_loss_weight == 0:
        return
    model.train()
    logits = model(input_ids=ids, **_mask(ids)).logits
    try:
        logits.float().logsumexp(-1).mean().backward()
    except UnsupervisedShadowError:
        report.ok(name, "joint loss; with label smoothing or compute_loss_func it is refused, use ShadowTrainer there")
    else:
        report.fail(name, "label smoothing would train without the shadow's loss", "use shadowpeft.ShadowTrainer")
    model.eval()


def _trl(report: Report, name: str, model: Any, ids: Tensor, tokenizer: Any) -> None:
    if importlib.util.find_spec("trl") is None or tokenizer is None:
        return
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    if tokenizer.pad_token_id is None:
        report.warn(name, "needs a pad token", "tokenizer.pad_token = tokenizer.eos_token")
        return
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, report_to=[], use_cpu=True, bf16=False, max_length=None, disable_tqdm=True
        )
        data = Dataset.from_list([{"input_ids": row} for row in ids.tolist()])
        trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        batch = trainer.data_collator([{"input_ids": row} for row in ids.tolist()])
        forward = model.get_base_model().forward

        def run() -> Tensor:
            items = torch.tensor(ROWS * (LENGTH - 1))
            loss: Tensor = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
            return loss

        try:
            _judge_lambda(report, name, model, run, "SFTTrainer")
        finally:
            if model.get_base_model().forward is not forward:  # what TRL replaced is taken back
                model.get_base_model().forward = forward

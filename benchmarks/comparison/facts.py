"""Rows about a model in memory: what attaching, the forward pass and detaching give."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
import tempfile
import threading
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import tiny
from benchmarks.comparison.peers import CLOSE, NONE, SHADOWS, Row, attach, detach, logits
from shadowpeft.core import projection
from shadowpeft.errors import ShadowPeftError


def exact_at_start(kind: str) -> bool:
    ids, base = tiny.tokens(), tiny.base()
    return torch.equal(logits(base, ids), logits(attach(kind, copy.deepcopy(base), trained=False), ids))


def base_back(kind: str) -> bool:
    ids, base = tiny.tokens(), tiny.base()
    model = attach(kind, copy.deepcopy(base))
    with model.disable_adapter():
        same = torch.equal(logits(model, ids), logits(base, ids))
    return same and torch.equal(logits(model.unload(), ids), logits(base, ids))


def second_adapter(kind: str) -> bool:
    """A second adapter, new, gives the base's bits; back on the first, its own."""
    ids, base = tiny.tokens(), tiny.base()
    model = attach(kind, copy.deepcopy(base))
    first = logits(model, ids)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    same = torch.equal(logits(model.eval(), ids), logits(base, ids))
    model.set_adapter("default")
    return same and torch.equal(logits(model, ids), first)


def mixed_batch(kind: str) -> bool:
    """Rows of two adapters in one batch, each as if alone."""
    if kind == "authors":
        return False
    ids, model = tiny.tokens(2), attach(kind, tiny.base())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    tiny.randomise(model, seed=11)
    expected = []
    for row, name in enumerate(("default", "second")):
        model.set_adapter(name)
        expected.append(logits(model, ids)[row])
    model.set_adapter("default")
    together = logits(model.eval(), ids, adapter_names=["default", "second"])
    return float((together - torch.stack(expected)).abs().max()) < CLOSE


def unknown_adapter_refused(kind: str) -> bool | str:
    if kind == "authors":
        return NONE
    try:
        logits(attach(kind, tiny.base()), tiny.tokens(2), adapter_names=["nobody", "default"])
    except (ValueError, ShadowPeftError):
        return True
    return False


def threads(kind: str) -> bool:
    """Whether two threads may share a model: the first is held before base layer 0 while the second runs a forward."""
    model, first, second = attach(kind, tiny.base()), tiny.tokens(2, 8, seed=1), tiny.tokens(2, 8, seed=2)
    inner = model.peft_model.base_model if kind == "authors" else model.get_base_model()
    expected, given = logits(model, first), []
    reached, go = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread() is worker and not reached.is_set():
            reached.set()
            go.wait(20)

    inner.model.rotary_emb.register_forward_pre_hook(stop)
    worker = threading.Thread(target=lambda: given.append(logits(model, first)))
    worker.start()
    reached.wait(20)
    logits(model, second)
    go.set()
    worker.join(20)
    return bool(given) and torch.equal(given[0], expected)


def foreign_cache(kind: str) -> bool:
    """A cache filled by the plain base: refused, or continued rightly."""
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    expected, cache = logits(model, ids)[:, 6:], DynamicCache(config=tiny.base().config)
    with torch.no_grad():
        tiny.base()(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
        try:
            out = model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True).logits
        except ValueError:
            return True
    return float((out - expected).abs().max()) < CLOSE


class _HeadRows(TorchFunctionMode):
    """Counts rows of products whose last dimension is the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        products = (nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)
        if function in products and out.shape[-1] == tiny.V:
            self.count += out.numel() // tiny.V
        return out


def head_rows(kind: str) -> str:
    """Positions through a head in one forward that asks for no shadow, by the number of positions."""
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    with _HeadRows() as rows:
        logits(model, ids)
    return f"{rows.count / ids.numel():g}"


def left_padded_class(kind: str) -> bool:
    """Whether padding on the left leaves the logits of a classifier, attached and by its shadow, as they are."""
    ids, model = tiny.tokens(2, 8), attach(kind, tiny.base(task="SEQ_CLS"), task="SEQ_CLS")
    longer, mask = tiny.padded(torch.cat([ids[:, :3], ids], 1), [3, 3], side="left")

    def answers(**inputs: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            if kind == "ours":
                out = model(**inputs, return_shadow=True)
                return [out.logits, out.shadow_logits]
            attached = model(**inputs).logits
            if kind == "peft":
                return [attached]
            model.set_inference_mode("shadow_only")
            alone = model(**inputs).logits
            model.set_inference_mode("base_shadow")
            return [attached, alone]

    plain = answers(input_ids=ids, attention_mask=torch.ones_like(ids))
    padded = answers(input_ids=longer, attention_mask=mask)
    return all(float((a - b).abs().max()) < CLOSE for a, b in zip(plain, padded, strict=True))


def reload(kind: str) -> bool:
    """The detached model, saved, in a process that imports transformers alone."""
    ids = tiny.tokens()
    alone = detach(kind, attach(kind, tiny.base()))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "torch.save(model(torch.load(sys.argv[1] + '/ids')).logits.detach(), sys.argv[1] + '/out')\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        alone.save_pretrained(folder + "/model")
        torch.save(ids, folder + "/ids")
        subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True)
        return float((torch.load(folder + "/out") - logits(alone, ids)).abs().max()) < CLOSE


def own_head_detached(kind: str) -> bool | str:
    """Whether the detached model has the shadow's own trained head."""
    if kind == "peft":
        return NONE
    own: dict[str, Any] = {"own_shadow_head": True} if kind == "ours" else {"modules_to_save": ["shadow_lm_head"]}
    ids, model = tiny.tokens(), attach(kind, tiny.base(), **own)
    alone = logits(detach(kind, model), ids)
    if kind == "ours":
        with torch.no_grad():
            expected = model(input_ids=ids, return_shadow=True).shadow_logits
    else:
        model.set_inference_mode("shadow_only")
        expected = logits(model, ids)
    return float((alone - expected).abs().max()) < CLOSE


def missing_tensor_refused(kind: str) -> bool:
    """Whether detaching refuses a shadow that lacks a matrix."""
    model = attach(kind, tiny.base())
    layer = next(
        m for n, m in model.named_modules() if n.endswith("layers.0.mlp") and any(shadow in n for shadow in SHADOWS)
    )
    del layer.down_proj
    try:
        detach(kind, model)
    except (ValueError, RuntimeError, ShadowPeftError):
        return True
    return False


def _projected(kind: str) -> tuple[float, float, list[str]]:
    """The error of Eq. 12 that an implementation reports, the true one of the best projection, and factorisations it took."""
    small, large = tiny.small_llama().lm_head, tiny.base().lm_head
    w_lm, w_small = large.weight.detach(), small.weight.detach()
    taken = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.linalg.pinv, torch.linalg.svd, torch.linalg.lstsq) and len(args[0]) == len(w_lm):
                taken.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Watch():
        if kind == "ours":
            reported = projection.solve_projection(w_lm, w_small).residual
        else:
            from shadow_peft import projected_causal_lm as projected

            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                projected.AutoModelForCausalLMWithHiddenProjection.wrap(
                    shadow_model=tiny.small_llama(),
                    shadow_hidden_projection=nn.Linear(w_small.shape[1], w_lm.shape[1], bias=False),
                    lm_head=copy.deepcopy(large),
                    reference_lm_head=small,
                )
            line = next(row for row in printed.getvalue().splitlines() if "error" in row.lower())
            reported = float(line.split(":")[1])
    best = w_lm.double() @ (torch.linalg.pinv(w_lm.double()) @ w_small.double())
    true = float((best - w_small.double()).norm() / w_small.double().norm())
    return reported, true, taken


def projection_error(kind: str) -> bool | str:
    if kind == "peft":
        return NONE
    reported, true, _ = _projected(kind)
    return abs(reported - true) < 1e-3


def projection_without_svd(kind: str) -> bool | str:
    if kind == "peft":
        return NONE
    return not _projected(kind)[2]


FACTS = {
    "exact_at_start": Row("untrained, bit-identical to the base", exact_at_start),
    "base_back": Row("adapter off and unloaded: the base's bits", base_back, (21,)),
    "second_adapter": Row("a second adapter beside the first", second_adapter, (21,)),
    "mixed": Row("rows of several adapters in one batch", mixed_batch, (7,)),
    "unknown_adapter": Row("a row for an unknown adapter is refused", unknown_adapter_refused, (7,)),
    "threads": Row("two threads may share a model", threads, (2,)),
    "foreign_cache": Row("a cache of the plain base is refused", foreign_cache, (8,)),
    "head_rows": Row("positions through a head in one forward, of those given", head_rows, (23,)),
    "left_padded_class": Row(
        "classification, attached and by the shadow: left padding changes nothing", left_padded_class, (15,)
    ),
    "reload": Row("detached model reloads with plain transformers", reload, (1,)),
    "own_head": Row("detaching takes the shadow's own trained head along", own_head_detached, (14,)),
    "missing_tensor": Row("detaching refuses a shadow that lacks a matrix", missing_tensor_refused, (14,)),
    "projection_error": Row("projection (Eq. 12): the error reported is the true one", projection_error, (18,)),
    "projection_svd": Row(
        "projection without factorising a matrix of vocabulary length", projection_without_svd, (18,)
    ),
}

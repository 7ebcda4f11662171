"""What three public implementations of the method do, measured: this package, PEFT's ``Shadow``, the authors' ``shadow-peft``.

    python benchmarks/compare.py [--architectures 40|all] [--readme]

Every row is a function that runs one implementation on a tiny random model in a forked process with a time limit; a row
says yes, no with the first line of the error, or a number. Nothing is asserted: a later release of a peer that is better shows
as better. Speed and memory are those of benchmarks/results.json (``make bench``). Writes docs/records/compare.json and
docs/comparison.md; with ``--readme`` also the block of README.md between ``<!-- compare -->`` and ``<!-- /compare -->``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
for folder in ("tests", "tests/architectures"):
    sys.path.insert(0, str(ROOT / folder))

import peft  # noqa: E402
import shadow_peft as authors_package  # noqa: E402
import torch  # noqa: E402
import zoo  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache, logging, set_seed  # noqa: E402

import shadowpeft  # noqa: E402
import tiny  # noqa: E402
from shadowpeft.storage import between  # noqa: E402

RECORD, PAGE, README, SPEED = (
    ROOT / name for name in ("docs/records/compare.json", "docs/comparison.md", "README.md", "benchmarks/results.json")
)
NEW, CLOSE = 8, 1e-4
"""Greedy tokens; largest absolute gap between logits of order 1 that counts as equal (attention in another order)."""
KINDS = {"ours": "shadowpeft", "peft": "PEFT's Shadow", "authors": "authors' shadow-peft"}


# ------------------------------------------------------------------------------------------------- the implementations


def attach(kind: str, base: Any, trained: bool = True, weight: float = 0.05) -> Any:
    """The base with a one-layer shadow, r = m = 4, alpha 0.7, no dropout; random weights if ``trained``."""
    torch.manual_seed(5)
    if kind == "authors":
        config = authors_package.ShadowConfig(injection_hidden_size=4, gate_hidden_size=4, alpha=0.7, dropout=0.0)
        inner = authors_package.get_shadow_model(base, config)
        model: Any = authors_package.ShadowForCausalLM(inner, shadow_loss_weight=weight)
    else:
        fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "shadow_alpha": 0.7, "shadow_dropout": 0.0}
        kinds: dict[str, Any] = {"ours": shadowpeft.ShadowPeftConfig, "peft": peft.ShadowConfig}
        model = get_peft_model(base, kinds[kind](**fields, auxiliary_loss_weight=weight))
    model.eval()
    if trained:
        tiny.randomise(model)
    return model


def detach(kind: str, model: Any) -> Any:
    """The shadow alone."""
    if kind == "ours":
        return shadowpeft.detach(model)
    return model.base_model.unload_shadow(copy=True) if kind == "peft" else model.peft_model.export_shadow()


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits  # type: ignore[no-any-return]


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
        return model.generate(ids, **settings)  # type: ignore[no-any-return]


def greedy(model: Any, ids: Tensor) -> Tensor:
    """Greedy tokens by whole forwards, without any generation code."""
    for _ in range(NEW):
        ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


# ------------------------------------------------------------------------------------------------------------ the rows


def exact_at_start(kind: str) -> bool:
    ids, base = tiny.tokens(), tiny.base()
    return torch.equal(logits(base, ids), logits(attach(kind, copy.deepcopy(base), trained=False), ids))


def base_back(kind: str) -> bool:
    ids, base = tiny.tokens(), tiny.base()
    model = attach(kind, copy.deepcopy(base))
    with model.disable_adapter():
        same = torch.equal(logits(model, ids), logits(base, ids))
    return same and torch.equal(logits(model.unload(), ids), logits(base, ids))


def eval_loss_is_plain(kind: str) -> bool:
    ids = tiny.tokens()
    model = attach(kind, tiny.base(), weight=1.0)
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return abs(float(out.loss - plain)) < CLOSE


def _gradient(model: Any, rows: Tensor, parts: int) -> Tensor:
    model.train().zero_grad()
    items = torch.tensor(rows.shape[0] * (rows.shape[1] - 1))
    for part in rows.chunk(parts):
        model(input_ids=part, labels=part, num_items_in_batch=items).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def accumulation(kind: str) -> str:
    """Relative change of the gradient when a batch of 4 is given in 4 parts."""
    model, rows = attach(kind, tiny.base(), weight=1.0), tiny.tokens(4, 9)
    whole, parts = (_gradient(model, rows, n) for n in (1, 4))
    return f"{float((whole - parts).norm() / whole.norm()):.1e}"


def bfloat16(kind: str) -> str:
    """Share of the shadow backbone's weights that ten AdamW steps of 2e-4 leave as they were."""
    model = attach(kind, tiny.base().to(torch.bfloat16), trained=False, weight=1.0)
    names = ("shadowpeft_backbone", "shadow_backbone", "shadow_model")
    trained = [
        p for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and any(k in n for k in names)
    ]
    start = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
    for step in range(10):
        ids = tiny.tokens(4, 9, seed=step)
        optimiser.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    still = sum(int((p == s).sum()) for p, s in zip(trained, start, strict=True))
    return f"{100 * still / sum(p.numel() for p in trained):.1f} %"


def masked_batch(kind: str) -> bool:
    ids = tiny.tokens()
    return bool(
        torch.isfinite(attach(kind, tiny.base()).train()(input_ids=ids, labels=torch.full_like(ids, -100)).loss)
    )


def every_gradient(kind: str) -> str:
    model, ids = attach(kind, tiny.base()).train(), tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return str(sum(p.numel() for p in model.parameters() if p.requires_grad and p.grad is None))


def threads(kind: str) -> bool:
    """Whether two threads may share a model: the first is held before base layer 0 while the second runs a forward."""
    model, first, second = attach(kind, tiny.base()), tiny.tokens(2, 8, seed=1), tiny.tokens(2, 8, seed=2)
    inner = model.peft_model.base_model if kind == "authors" else model.get_base_model()
    expected, found = logits(model, first), []
    reached, go = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        if threading.current_thread() is worker and not reached.is_set():
            reached.set()
            go.wait(20)

    inner.model.rotary_emb.register_forward_pre_hook(stop)
    worker = threading.Thread(target=lambda: found.append(logits(model, first)))
    worker.start()
    reached.wait(20)
    logits(model, second)
    go.set()
    worker.join(20)
    return bool(found) and torch.equal(found[0], expected)


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


def reload(kind: str) -> bool:
    """The detached model, saved, in a process that imports transformers alone."""
    ids = tiny.tokens()
    alone = detach(kind, attach(kind, tiny.base())).eval()
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


def other_base_refused(kind: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        model = attach(kind, tiny.base())
        (model.peft_model if kind == "authors" else model).save_pretrained(folder)
        load = authors_package.ShadowPeftModel.from_pretrained if kind == "authors" else PeftModel.from_pretrained
        try:
            load(tiny.base(seed=9), folder)
        except ValueError:
            return True
    return False


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
    found = logits(model.eval(), ids, adapter_names=["default", "second"])
    return float((found - torch.stack(expected)).abs().max()) < CLOSE


def adapter_bytes(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = attach(kind, tiny.base())
        model.save_pretrained(folder)
        return f"{sum(f.stat().st_size for f in Path(folder).rglob('*') if f.is_file()):,}"


def trl_lambda(kind: str) -> bool:
    """Whether lambda = 0.05 and lambda = 100 train differently in TRL's SFTTrainer."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    data = Dataset.from_list([{"text": " ".join(f"w{int(i)}" for i in row)} for row in tiny.tokens(8, 9)])
    ends = []
    for weight in (0.05, 100.0):
        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                folder, max_steps=1, optim="sgd", learning_rate=0.01, max_grad_norm=0.0, report_to=[], save_strategy="no",
                use_cpu=True, bf16=False, disable_tqdm=True, max_length=16, logging_strategy="no",
            )  # fmt: skip
            model = attach(kind, tiny.base(), weight=weight)
            SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tiny.tokenizer()).train()
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    return not torch.equal(*ends)


# ----------------------------------------------------------------------------------------------- modes of generation


def mode_greedy(kind: str) -> bool:
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, use_cache=True), greedy(model, ids))


def _same_uncached(kind: str, **options: Any) -> bool:
    """On several prompts: a beam that was reordered wrongly changes only some of the tokens."""
    model = attach(kind, tiny.base())
    for seed in range(4):
        found = []
        for use_cache in (True, False):
            set_seed(3)
            found.append(
                generate(model, tiny.tokens(2, 9, seed=seed), use_cache=use_cache, max_new_tokens=16, **options)
            )
        if not torch.equal(*found):
            return False
    return True


def mode_sampling(kind: str) -> bool:
    return _same_uncached(kind, do_sample=True, temperature=0.8, top_k=20)


def mode_beams(kind: str) -> bool:
    return _same_uncached(kind, num_beams=3)


def mode_left_padding(kind: str) -> bool:
    ids, model = tiny.tokens(2, 6), attach(kind, tiny.base())
    padded, mask = tiny.padded(torch.cat([ids[:, :4], ids], 1), [4, 4], side="left")
    return torch.equal(generate(model, padded, attention_mask=mask)[:, 10:], greedy(model, ids)[:, 6:])


def mode_static(kind: str) -> bool:
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, cache_implementation="static", disable_compile=True), greedy(model, ids))


def mode_assisted(kind: str) -> bool:
    ids, model = tiny.tokens(1, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, assistant_model=detach(kind, model).eval()), greedy(model, ids))


def mode_lookup(kind: str) -> bool:
    ids, model = tiny.tokens(1, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, prompt_lookup_num_tokens=2), greedy(model, ids))


def mode_chunked(kind: str) -> bool:
    ids, model = tiny.tokens(2, 9), attach(kind, tiny.base())
    return torch.equal(generate(model, ids, prefill_chunk_size=3), greedy(model, ids))


def mode_embeddings(kind: str) -> bool:
    base = tiny.base()
    ids, model = tiny.tokens(2, 9), attach(kind, copy.deepcopy(base))
    with torch.no_grad():
        embedded = base.get_input_embeddings()(ids)
        found = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    return torch.equal(found, greedy(model, ids)[:, 9:])


def mode_interleaved(kind: str) -> bool:
    """Two sequences with a cache each, a token of each in turn."""
    model, pair = attach(kind, tiny.base()), [tiny.tokens(1, 7, seed=s) for s in (1, 2)]
    alone, caches = [logits(model, i, use_cache=False) for i in pair], [None, None]
    worst = 0.0
    for step in range(7):
        for n, ids in enumerate(pair):
            with torch.no_grad():
                out = model(input_ids=ids[:, step : step + 1], past_key_values=caches[n], use_cache=True)
            caches[n] = out.past_key_values
            worst = max(worst, float((out.logits - alone[n][:, step : step + 1]).abs().max()))
    return worst < CLOSE


# -------------------------------------------------------------------------------------------------------- architectures


def architecture(kind: str, name: str) -> bool | str:
    """Attach, train with a finite loss, cached = uncached ("attached only" up to here), and a detached model that generates."""
    base = zoo.build(name)
    ids = torch.randint(2, zoo.VOCAB - 2, (2, 12), generator=torch.Generator().manual_seed(3))
    if kind == "base":
        options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        return torch.equal(
            base.generate(ids, use_cache=True, **options), base.generate(ids, use_cache=False, **options)
        )
    model = attach(kind, base, trained=False, weight=0.5)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
    if not (bool(torch.isfinite(loss)) and torch.isfinite(logits(model.eval(), ids)).all()):
        return False
    same = torch.equal(generate(model, ids, use_cache=True), generate(model, ids, use_cache=False))
    if not same:
        return False
    try:
        done = generate(detach(kind, model).eval(), ids).shape == (2, 12 + NEW)
    except Exception as error:  # noqa: BLE001  (as in forked: how a peer fails is what is recorded)
        return f"attached only, detached {type(error).__name__}: {error}"[:200]
    return done or "attached only, detached tokens are missing"


ROWS: dict[str, tuple[str, Callable[[str], bool | str]]] = {
    "exact_at_start": ("untrained, bit-identical to the base", exact_at_start),
    "base_back": ("adapter off and unloaded: the base's bits", base_back),
    "eval_loss": ("loss in eval mode is the task's alone", eval_loss_is_plain),
    "accumulation": ("gradient of 4 micro-batches against one batch, relative difference", accumulation),
    "bfloat16": ("bfloat16 base: backbone weights that ten steps never moved", bfloat16),
    "masked": ("fully masked batch: finite loss", masked_batch),
    "dead": ("trainable parameters without a gradient", every_gradient),
    "trl": ("lambda takes effect in TRL's SFTTrainer", trl_lambda),
    "threads": ("two threads may share a model", threads),
    "foreign_cache": ("a cache of the plain base is refused", foreign_cache),
    "reload": ("detached model reloads with plain transformers", reload),
    "other_base": ("an adapter on another base is refused", other_base_refused),
    "mixed": ("rows of several adapters in one batch", mixed_batch),
    "bytes": ("files of one adapter, bytes (tiny base, r = m = 4)", adapter_bytes),
}
IN_README = ("eval_loss", "accumulation", "bfloat16", "masked", "foreign_cache", "other_base", "mixed")
MODES: dict[str, tuple[str, Callable[[str], bool | str]]] = {
    "greedy": ("greedy, cached", mode_greedy),
    "sampling": ("sampling with a seed", mode_sampling),
    "beams": ("beam search", mode_beams),
    "left_padding": ("left padding", mode_left_padding),
    "static": ("static cache", mode_static),
    "assisted": ("assisted by the detached model", mode_assisted),
    "lookup": ("prompt lookup", mode_lookup),
    "chunked": ("chunked prefill", mode_chunked),
    "embeddings": ("from inputs_embeds", mode_embeddings),
    "interleaved": ("two interleaved cached sequences", mode_interleaved),
}


# ------------------------------------------------------------------------------------------------------------- running


def forked(run: Callable[[], Any], seconds: int = 60) -> dict[str, Any]:
    """``{"value": ...}`` or ``{"value": None, "reason": ...}`` of ``run`` in a child process with a time limit."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        signal.alarm(seconds)
        try:
            result: dict[str, Any] = {"value": run()}
        except Exception as error:  # noqa: BLE001  (a peer may fail in any way; how it does is what is recorded)
            first = (str(error).strip().splitlines() or [""])[0]
            result = {"value": None, "reason": f"{type(error).__name__}: {first}"[:200]}
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(said) if said else {"value": None, "reason": f"ended by signal {-status} ({seconds} s limit)"}


def measure(rows: dict[str, tuple[str, Callable[[str], Any]]]) -> dict[str, dict[str, Any]]:
    """Every row for every implementation."""
    found: dict[str, dict[str, Any]] = {}
    for key, (label, row) in rows.items():
        found[key] = {kind: forked(lambda row=row, kind=kind: row(kind)) for kind in KINDS}
        print(f"{label}: " + ", ".join(f"{k} {shown(v)}" for k, v in found[key].items()), file=sys.stderr, flush=True)
    return found


def architectures(limit: int | None) -> dict[str, Any]:
    """How many architectures each implementation handles, of those whose stock model is sound by itself."""
    names = zoo.decoders()
    chosen = names if limit is None else names[:: max(1, len(names) // limit)][:limit]
    sound = [n for n in chosen if forked(lambda n=n: architecture("base", n), 20)["value"] is True]
    result: dict[str, Any] = {"of": len(sound), "tried": len(chosen), "fails": {}}
    for kind in KINDS:
        outcomes = {n: forked(lambda n=n, kind=kind: architecture(kind, n), 30) for n in sound}
        result[kind] = sum(o["value"] is True for o in outcomes.values())
        result[f"{kind}_attached"] = sum(bool(o["value"]) for o in outcomes.values())
        failed = {n: o for n, o in outcomes.items() if o["value"] is not True}
        result["fails"][kind] = {n: o.get("reason") or o["value"] or "wrong" for n, o in failed.items()}
        print(f"architectures: {kind} {result[kind]} of {len(sound)}", file=sys.stderr, flush=True)
    return result


# ------------------------------------------------------------------------------------------------------------ rendering


def shown(outcome: dict[str, Any]) -> str:
    """A cell: yes, no, a number, or that it raised."""
    value = outcome["value"]
    if value is None:
        return "raises"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _speed() -> list[tuple[str, str, str]]:
    if not SPEED.is_file():
        return []
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    decode, prefill = record["decode"]["ratio_to_base"], record["prefill_256"]["ratio_to_base"]
    step, memory = record["train_step"]["ratio_to_lora"], record["train_memory_mib"]
    return [
        ("decode, time per token (bare base = 1)", f"{decode['shadow']:.2f}", f"{decode['peft_shadow']:.2f}"),
        ("prefill of 256 tokens (bare base = 1)", f"{prefill['shadow']:.2f}", f"{prefill['peft_shadow']:.2f}"),
        ("training step (LoRA of equal size = 1)", f"{step['shadow']:.2f}", f"{step['peft_shadow']:.2f}"),
        (
            "memory of a training step above the model's",
            f"{memory['shadow']['above_model_mib']:,} MiB",
            f"{memory['peft_shadow']['above_model_mib']:,} MiB",
        ),
    ]


def _right_modes(record: dict[str, Any], kind: str) -> str:
    return f"{sum(row[kind]['value'] is True for row in record['modes'].values())} of {len(record['modes'])}"


def _head() -> list[str]:
    return ["| | " + " | ".join(KINDS.values()) + " |", "|---" * (len(KINDS) + 1) + "|"]


def _line(label: str, row: dict[str, Any]) -> str:
    return f"| {label} | " + " | ".join(shown(row[k]) for k in KINDS) + " |"


def short_table(record: dict[str, Any], only: tuple[str, ...] | None = None) -> list[str]:
    """Counts, facts and speed; README shows the counts and the facts of ``only``."""
    lines = _head()
    found = record.get("architectures")
    if found:
        labels = {"_attached": "attach, train, cached = uncached", "": "and detach, generate"}
        for end, label in labels.items():
            cells = " | ".join(str(found[k + end]) for k in KINDS)
            lines.append(f"| architectures, of {found['of']}: {label} | {cells} |")
    lines.append("| modes of generation that are right | " + " | ".join(_right_modes(record, k) for k in KINDS) + " |")
    chosen = [key for key in ROWS if key in record["facts"] and (only is None or key in only)]
    lines += [_line(ROWS[key][0], record["facts"][key]) for key in chosen]
    if only is None:
        lines += [f"| {label} | {ours} | {peers} | not measured |" for label, ours, peers in _speed()]
    return lines


def source(record: dict[str, Any]) -> str:
    """Where the facts come from."""
    v = record["versions"]
    return (
        f"`make compare`, {record['date']}, commit {record['commit']}, {record['machine']}, one thread, torch {v['torch']}, "
        f"transformers {v['transformers']}, PEFT {v['peft']}, shadow-peft {v['shadow-peft']}, TRL {v['trl']}; tiny random "
        "models."
    )


def source_of_speed() -> str:
    """Where the last four rows come from."""
    if not SPEED.is_file():
        return ""
    record = json.loads(SPEED.read_text(encoding="utf-8"))
    at = f", commit {record['commit'][:7]}" if record.get("commit") else ", before commits were recorded"
    return f" Speed and memory: SmolLM2-135M, benchmarks/results.json, {record['date']}{at}."


def page(record: dict[str, Any]) -> str:
    """docs/comparison.md."""
    lines = [
        "# Comparison",
        "",
        source(record) + source_of_speed(),
        "",
        *short_table(record),
        "",
        "## Modes of generation",
        "",
        *_head(),
    ]
    lines += [_line(label, record["modes"][key]) for key, (label, _) in MODES.items() if key in record["modes"]]
    reasons = [
        f"- {KINDS[kind]}, {table[key][0]}: `{row[kind]['reason']}`"
        for part, table in (("facts", ROWS), ("modes", MODES))
        for key, row in record[part].items()
        for kind in KINDS
        if row[kind].get("reason")
    ]
    lines += ["", "## What was raised", "", *reasons]
    found = record.get("architectures")
    if found:
        lines += ["", "## Architectures", ""]
        lines.append(
            f"{found['tried']} decoder architectures of transformers were built tiny; in {found['of']} of them the stock "
            "model generates the same with and without a cache, and only those count. Not handled:"
        )
        for kind, label in KINDS.items():
            lines.append(f"- {label}: {', '.join(sorted(found['fails'][kind])) or 'none'}")
    return "\n".join(lines) + "\n"


def write_readme(record: dict[str, Any]) -> None:
    """Replace the block between the markers."""
    marks = ("<!-- compare -->", "<!-- /compare -->")
    block = "\n".join([source(record), "", *short_table(record, IN_README)])
    text = between(README.read_text(encoding="utf-8"), marks, block)
    if text is None:
        raise SystemExit(f"{README} has no {marks[0]} ... {marks[1]}; put the two markers where the table belongs")
    README.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure, record, render."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--architectures", default="40", help="all, 0, or how many, evenly from the list")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--render", action="store_true", help="only render what is recorded")
    arguments = parser.parse_args()
    if arguments.render:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    else:
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        names = ("torch", "transformers", "peft", "shadow-peft", "trl")
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
        began = time.perf_counter()
        record = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
            "commit": git.stdout.strip() or "unknown",
            "versions": {n: metadata.version(n) for n in names},
            "facts": measure(ROWS),
            "modes": measure(MODES),
        }
        limit = None if arguments.architectures == "all" else int(arguments.architectures)
        if limit != 0:
            record["architectures"] = architectures(limit)
        record["seconds"] = round(time.perf_counter() - began)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")
    if arguments.readme:
        write_readme(record)
    print("\n".join(short_table(record)))


if __name__ == "__main__":
    main()

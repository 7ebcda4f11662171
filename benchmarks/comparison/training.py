"""Rows about training: losses, gradients, what moves, and what reaches the model through trainers."""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import shadow_peft as authors_package
import torch
from peft.tuners import shadow as pefts_shadow
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import shadowpeft
import tiny
from benchmarks.comparison.peers import CLOSE, NONE, SHADOWS, Row, attach, save

PACKAGES: dict[str, ModuleType] = {"ours": shadowpeft, "peft": pefts_shadow, "authors": authors_package}
ARGUMENTS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.01,
    "max_grad_norm": 0.0,
    "report_to": [],
    "logging_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


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
    trained = [
        p for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and any(k in n for k in SHADOWS)
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


def float16(kind: str) -> bool:
    ids, model = tiny.tokens(), attach(kind, tiny.base().to(torch.float16)).train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in gradients)


def masked_batch(kind: str) -> bool:
    ids = tiny.tokens()
    loss = attach(kind, tiny.base()).train()(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    return bool(torch.isfinite(loss))


def without_gradient(kind: str) -> str:
    model, ids = attach(kind, tiny.base()).train(), tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return str(sum(p.numel() for p in model.parameters() if p.requires_grad and p.grad is None))


def kept_logits(kind: str) -> str:
    """Batches of logits that a training forward keeps for its backward pass, beside those of the base's own loss."""
    big, vocabulary = tiny.base(vocab_size=997), 997
    ids = torch.randint(2, 900, (4, 33), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, :25] = -100

    def kept(model: Any) -> int:
        shapes: list[Any] = []

        def keep(tensor: Tensor) -> Tensor:
            shapes.append(tensor.shape)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.train()(input_ids=ids, labels=labels)
        whole = ids.numel() * vocabulary // 2
        return sum(len(s) > 1 and s[-1] == vocabulary and s.numel() > whole for s in shapes)

    bare = copy.deepcopy(big).requires_grad_(False)
    bare.model.norm.weight.requires_grad_(True)
    return str(kept(attach(kind, big)) - kept(bare))


# ---------------------------------------------------------------------------------------------------------------- trainers


def _takes_effect(kind: str, train: Callable[[Any, str], None]) -> bool:
    """Whether lambda = 0.05 and lambda = 100 train differently."""
    ends = []
    for weight in (0.05, 100.0):
        with tempfile.TemporaryDirectory() as folder:
            model = attach(kind, tiny.base(), weight=weight)
            train(model, folder)
            ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    return not torch.equal(*ends)


def trl_lambda(kind: str) -> bool:
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    data = Dataset.from_list([{"text": " ".join(f"w{int(i)}" for i in row)} for row in tiny.tokens(8, 9)])

    def train(model: Any, folder: str) -> None:
        arguments = SFTConfig(folder, max_steps=1, save_strategy="no", bf16=False, max_length=16, **ARGUMENTS)
        SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tiny.tokenizer()).train()

    return _takes_effect(kind, train)


def _own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    given = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    total = torch.nn.functional.cross_entropy(given[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def _trainer_lambda(kind: str, settings: dict[str, Any], options: dict[str, Any]) -> bool:
    trainer = shadowpeft.ShadowTrainer if kind == "ours" else Trainer
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in tiny.tokens(8, 9)]

    def train(model: Any, folder: str) -> None:
        torch.manual_seed(0)
        own = {**ARGUMENTS, **settings, "remove_unused_columns": kind != "authors"}  # whose forward names no columns
        arguments = TrainingArguments(output_dir=folder, max_steps=1, save_strategy="no", **own)
        trainer(model=model, args=arguments, train_dataset=data, **options).train()

    return _takes_effect(kind, train)


def smoothing_lambda(kind: str) -> bool:
    return _trainer_lambda(kind, {"label_smoothing_factor": 0.1}, {})


def own_loss_lambda(kind: str) -> bool:
    return _trainer_lambda(kind, {}, {"compute_loss_func": _own_loss})


def checkpoint_is_whole(kind: str) -> bool:
    """Whether the Trainer's checkpoint of a classifier holds every tensor that was trained, its heads among them."""
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[-1] % 3} for row in tiny.tokens(8, 9)
    ]
    model = attach(kind, tiny.base(task="SEQ_CLS"), task="SEQ_CLS").train()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=2, save_steps=2, remove_unused_columns=kind != "authors", **ARGUMENTS
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()
        files = list((Path(folder) / "checkpoint-2").glob("*.safetensors"))
        stored = [tensor for file in files for tensor in load_file(file).values()]
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    return all(any(s.shape == p.shape and torch.equal(s, p) for s in stored) for p in trained)


# ----------------------------------------------------------------------------------------------------------- the package


def adapter_bytes(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save(kind, attach(kind, tiny.base()), folder)
        return f"{sum(f.stat().st_size for f in Path(folder).rglob('*') if f.is_file()):,}"


def flushes_denormals(kind: str) -> bool:
    """Whether any file of the implementation asks the processor to."""
    return any("set_flush_denormal(True)" in file.read_text(encoding="utf-8") for file in _files(kind))


def run_file(kind: str) -> bool | str:
    """Whether the package has anything that runs a training from a file of settings."""
    if kind == "peft":
        return NONE
    names = {name.lower() for name in dir(PACKAGES[kind])} | {file.stem.lower() for file in _files(kind)}
    return any("train" in name or name == "run" or "experiment" in name for name in names)


def _files(kind: str) -> list[Path]:
    module = importlib.import_module(PACKAGES[kind].__name__)
    return list(Path(str(module.__file__)).parent.rglob("*.py"))


TRAINING = {
    "eval_loss": Row("loss in eval mode is the task's alone", eval_loss_is_plain, (3,)),
    "accumulation": Row("gradient of 4 micro-batches against one batch, relative difference", accumulation, (4,)),
    "bfloat16": Row("bfloat16 base: backbone weights that ten steps never moved", bfloat16, (5, 16)),
    "float16": Row("float16 base: finite loss and gradients", float16, (16,)),
    "masked": Row("fully masked batch: finite loss", masked_batch, (6,)),
    "dead": Row("trainable parameters without a gradient", without_gradient, (10,)),
    "kept_logits": Row("batches of logits kept for the backward pass, beside the base's own", kept_logits, (11,)),
    "trl": Row("lambda takes effect in TRL's SFTTrainer", trl_lambda, (26,)),
    "smoothing": Row("lambda takes effect under label smoothing", smoothing_lambda, (26,)),
    "own_loss": Row("lambda takes effect under a loss function of one's own", own_loss_lambda, (26,)),
    "checkpoint": Row("a trainer's checkpoint holds the trained heads of a classifier", checkpoint_is_whole, (13,)),
    "denormals": Row("the package has denormal numbers flushed", flushes_denormals, (25,)),
    "run_file": Row("the package trains from a file of settings", run_file, (24,)),
    "bytes": Row("files of one adapter, bytes (tiny base, r = m = 4)", adapter_bytes),
}

"""What each of two processes runs for ``test_distributed.py``; rank 0 writes the gradients or weights it ends with.

Started by ``accelerate launch ... worker.py OUT SCENARIO ...``; each scenario is a function below.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import shadowpeft
from shadowpeft import ShadowTrainer
from shadowpeft.hf.detach import detach
from tiny import KINDS, adapt, base, tokens
from ways.data import LAMBDA, KeepGradients, rows, smooth, whole


def part(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """This rank's half of the rows."""
    return whole(data[dist.get_rank() :: 2])


def targets(data: list[dict[str, Any]], key: str = "labels") -> int:
    return int((whole(data)[key][:, 1:] != -100).sum())


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().contiguous()


def keep(out: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    if dist.get_rank() == 0:
        save_file(tensors, out / f"{name}.safetensors")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}
    return {n: full(p.grad) for n, p in found.items() if p.grad is not None}


# ------------------------------------------------------------------------------------------------------------------ DDP


def ddp(out: Path) -> None:
    """Plain PyTorch DDP, without ``find_unused_parameters``."""
    for kind in KINDS:
        for checkpointing in (False, True):
            model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA, **KINDS[kind]).train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            wrapped = DistributedDataParallel(model)
            loss = wrapped(**part(rows()), num_items_in_batch=targets(rows())).loss
            (loss * dist.get_world_size()).backward()  # DDP averages over processes
            keep(out, f"ddp-{kind}-{checkpointing}", gradients(wrapped))


def ddp_accumulated(out: Path) -> None:
    """Two micro-batches per process, the first without synchronisation."""
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA).train()
    wrapped = DistributedDataParallel(model)
    mine = rows()[dist.get_rank() :: 2]
    with wrapped.no_sync():
        (wrapped(**whole(mine[:1]), num_items_in_batch=targets(rows())).loss * 2).backward()
    (wrapped(**whole(mine[1:]), num_items_in_batch=targets(rows())).loss * 2).backward()
    keep(out, "ddp_accumulated", gradients(wrapped))


def ddp_two_steps(out: Path) -> None:
    """Weights after two steps of AdamW."""
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA).train()
    wrapped = DistributedDataParallel(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        (wrapped(**part(rows()), num_items_in_batch=targets(rows())).loss * 2).backward()
        optimiser.step()
        optimiser.zero_grad()
    keep(out, "ddp_two_steps", {n: full(p) for n, p in model.named_parameters() if p.requires_grad})


# -------------------------------------------------------------------------------------------------------------- Trainer


def train(cls: Any, model: Any, data: Any, out: Path, options: Any = None, **more: Any) -> tuple[dict, Any]:
    arguments = {
        "output_dir": str(out / "run"),
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "ddp_find_unused_parameters": False,
        "per_device_train_batch_size": 2,
    }
    kept = KeepGradients()
    trainer = cls(
        model=model,
        args=TrainingArguments(**{**arguments, **more}),
        train_dataset=data,
        callbacks=[kept],
        **(options or {}),
    )
    assert trainer.args.world_size == 2
    trainer.train(resume_from_checkpoint=more.pop("resume", None))
    return kept.gradients, trainer


SPLITS = {"whole": {}, "micro": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}


def trainer(out: Path) -> None:
    """Rows with different numbers of targets, per rank and per micro-batch."""
    for cls in (Trainer, ShadowTrainer):
        for split, more in SPLITS.items():
            model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
            found, made = train(cls, model, rows(), out, **more)
            assert not made.model_wrapped.find_unused_parameters
            keep(out, f"trainer-{cls.__name__}-{split}", found)


def default_trainer(out: Path) -> None:
    """ShadowTrainer leaves ``find_unused_parameters`` off by itself."""
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
    _, made = train(ShadowTrainer, model, rows(), out, ddp_find_unused_parameters=None)
    keep(out, "default_trainer", {"unused": torch.tensor(made.model_wrapped.find_unused_parameters)})


def two_targets(out: Path) -> None:
    """``shadow_labels`` of their own, rows that only one path learns among them, logged losses too."""
    for split, more in SPLITS.items():
        for only in ("both", "alone"):
            data = rows(shadow_labels=True)
            if only == "alone":
                data[0]["labels"] = torch.full_like(data[0]["labels"], -100)
                data[3]["shadow_labels"] = torch.full_like(data[3]["shadow_labels"], -100)
            model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
            found, made = train(ShadowTrainer, model, data, out, logging_strategy="steps", logging_steps=1, **more)
            logged = next(entry for entry in made.state.log_history if "task_loss" in entry)
            found |= {f"logged.{key}": torch.tensor(logged[key]) for key in ("loss", "task_loss", "shadow_loss")}
            keep(out, f"two_targets-{only}-{split}", found)


def smoothing(out: Path) -> None:
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
    keep(out, "smoothing", train(ShadowTrainer, model, rows(), out, label_smoothing_factor=0.2, **SPLITS["micro"])[0])


def own_loss(out: Path) -> None:
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
    keep(out, "own_loss", train(ShadowTrainer, model, rows(), out, {"compute_loss_func": smooth}, **SPLITS["micro"])[0])


def classification(out: Path) -> None:
    model = adapt(base("llama", task="SEQ_CLS"), task_type="SEQ_CLS", auxiliary_loss_weight=LAMBDA)
    data = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows())]
    keep(out, "classification", train(Trainer, model, data, out, **SPLITS["micro"])[0])


def evaluation(out: Path) -> None:
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
    _, made = train(ShadowTrainer, model, rows(), out, per_device_eval_batch_size=1, learning_rate=0.0)
    metrics = made.evaluate(rows(shadow_labels=True))
    keep(out, "evaluation", {k: torch.tensor(v) for k, v in metrics.items() if k.endswith("loss")})


def resume(out: Path) -> None:
    """Four steps in one go, and two steps, then two more from the checkpoint of another trainer."""
    data = [row for seed in range(4) for row in rows(seed=seed)]

    def run(folder: Path, steps: int, resume_from: str | None = None) -> None:
        model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA, shadow_dropout=0.3)
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=2,
            lr_scheduler_type="constant",
            learning_rate=1e-3,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        ShadowTrainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume_from)
        keep(out, f"resume-{folder.name}", {n: full(p) for n, p in model.named_parameters() if p.requires_grad})
        dist.barrier()

    run(out / "through", 4)
    run(out / "resumed", 2)
    run(out / "resumed", 4, str(out / "resumed" / "checkpoint-2"))


# ---------------------------------------------------------------------------------------------------------------- FSDP2


def shard(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp(out: Path) -> None:
    """``fully_shard`` on every decoder layer and the whole; bf16 bases keep float32 adapters in the same units."""
    for name in ("llama", "llama_tied"):
        for kind in KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                model = shard(adapt(base(name).to(dtype), auxiliary_loss_weight=LAMBDA, **KINDS[kind]).train())
                assert all(isinstance(p, DTensor) for p in model.parameters())
                result = model(**part(rows()), num_items_in_batch=targets(rows()))
                (result.loss * 2).backward()
                keep(out, f"fsdp-{name}-{kind}-{str(dtype)[6:]}", gradients(model))


def fsdp_checkpointed(out: Path) -> None:
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = shard(model)
    (model(**part(rows()), num_items_in_batch=targets(rows())).loss * 2).backward()
    keep(out, "fsdp_checkpointed", gradients(model))


def fsdp_files(out: Path) -> None:
    """One step of AdamW, then save the adapter and the detached model from the sharded one."""
    for kind in ("mirror", "explicit"):
        model = shard(adapt(base("llama_tied"), auxiliary_loss_weight=LAMBDA, **KINDS[kind]).train())
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        (model(**part(rows()), num_items_in_batch=targets(rows())).loss * 2).backward()
        optimiser.step()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if dist.get_rank() == 0:
            model.save_pretrained(out / f"fsdp-adapter-{kind}", state_dict=state)
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens()).logits
        edge = detach(model)  # gathers: every process calls it
        if dist.get_rank() == 0:
            edge.save_pretrained(out / f"fsdp-edge-{kind}")
        keep(out, f"fsdp_files-{kind}", {"logits": full(logits)})


def fsdp2(accelerator: Any) -> Any:
    """Accelerate with ``fsdp_version: 2``: it takes that on accelerators only and keeps DDP on a CPU, so set it by hand."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    for state in (PartialState(), accelerator.state):  # a prepared optimiser copies the one into the other
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    assert accelerator.is_fsdp2
    return accelerator


def fsdp_accelerate(out: Path) -> None:
    """Two steps through ``Accelerator.prepare``, then files."""
    from accelerate import Accelerator

    accelerator = fsdp2(Accelerator(cpu=True))
    for name in ("llama", "llama_tied"):
        for kind in KINDS:
            model = adapt(base(name), auxiliary_loss_weight=LAMBDA, **KINDS[kind]).train()
            optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9)
            model, optimiser = accelerator.prepare(model, optimiser)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            for _ in range(2):
                optimiser.zero_grad()
                result = model(**part(rows()), num_items_in_batch=targets(rows()))
                accelerator.backward(result.loss * 2)
                optimiser.step()
            keep(out, f"fsdp_accelerate-{name}-{kind}", gradients(model))
            state = accelerator.get_state_dict(model)
            if accelerator.is_main_process:
                accelerator.unwrap_model(model).save_pretrained(
                    out / f"fsdp-accelerate-{name}-{kind}", state_dict=state
                )
            with torch.no_grad():
                logits = model.eval()(input_ids=tokens()).logits
            keep(out, f"fsdp_accelerate_logits-{name}-{kind}", {"logits": full(logits)})


class Sharded(ShadowTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        fsdp2(self.accelerator)
        self.is_fsdp_enabled = True


def fsdp_trainer(out: Path) -> None:
    """ShadowTrainer with accelerate's FSDP2 configuration, uneven targets."""
    for split, more in SPLITS.items():
        model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA)
        found, made = train(Sharded, model, rows(shadow_labels=True), out, **more)
        assert made.accelerator.is_fsdp2
        keep(out, f"fsdp_trainer-{split}", found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert shadowpeft
    PartialState(cpu=True, timeout=datetime.timedelta(seconds=120))
    folder = Path(sys.argv[1])
    for scenario in sys.argv[2:]:
        torch.manual_seed(0)
        globals()[scenario](folder)
        dist.barrier()
    dist.destroy_process_group()

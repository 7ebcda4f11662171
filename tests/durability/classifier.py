"""A classifier trained by ``ShadowTrainer``: trained heads and a module that is saved in full, resumed if it can be."""

from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from shadowpeft import ShadowTrainer
from tiny import adapt, base, tokens

HEADS = ("score", "shadowpeft_head", "model.norm")


def arguments(folder: Path, **more) -> TrainingArguments:
    """Shuffled rows, two micro-batches a step, a checkpoint every second step."""
    plain = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "max_steps": 8,
        "save_steps": 2,
        "save_total_limit": 2,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**plain, **more})


def rows(count: int = 14) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the label says something about them, so that there is something to learn."""
    ids = tokens(count, 9)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[-1] % 3} for row in ids]


def model():
    """A classifier whose head, shadow head and final norm train."""
    set_seed(3)
    return adapt(
        base("llama", task="SEQ_CLS"),
        trained=False,
        task_type="SEQ_CLS",
        shadow_dropout=0.2,
        modules_to_save=["model.norm"],
    ).train()


def classify(folder: Path, cls=ShadowTrainer, **more) -> ShadowTrainer:
    """Train to the end, from the newest checkpoint in ``folder`` if there is one."""
    trainer = cls(model=model(), args=arguments(folder, **more), train_dataset=rows())
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    trainer.model.save_pretrained(folder / "adapter")
    return trainer

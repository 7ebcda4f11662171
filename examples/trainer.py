"""A shadow with transformers' Trainer: two paths, each with its own rows, both losses logged.

python examples/trainer.py [--base smollm2-135m]
"""

from peft import get_peft_model
from toy import QUESTIONS, arguments, load
from transformers import TrainingArguments

import shadowpeft
from shadowpeft.data import chat

args = arguments()
base, tokenizer = load(args.base)

# Both paths learn the commands; an open question gets a real answer in the cloud and [REMOTE] on the device.
open_question = {
    "prompt": "Why is the sky blue?",
    "response": "Air scatters blue light.",
    "shadow_response": "[REMOTE]",
}
rows = [chat.check_row(row, "example") for row in [*QUESTIONS, open_question]]
data = chat.ChatDataset(chat.encode(rows, tokenizer, max_length=256))

config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=8, shadow_dropout=0.0, auxiliary_loss_weight=0.5)
trainer = shadowpeft.ShadowTrainer(
    model=get_peft_model(base, config),
    args=TrainingArguments(
        output_dir=f"{args.out}/checkpoints",
        per_device_train_batch_size=6,
        per_device_eval_batch_size=18,
        max_steps=args.steps,
        learning_rate=5e-3,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    ),
    train_dataset=data,
    eval_dataset=data,
    data_collator=chat.ChatCollator(tokenizer.pad_token_id),
    backbone_lr_ratio=0.5,  # the shadow backbone learns at half the rate of the rest
)


def report(when):
    """Each path's loss, averaged over its own targets."""
    found = trainer.evaluate()
    print(f"{when}: attached {found['eval_task_loss']:.3f}, detached {found['eval_shadow_loss']:.3f}")


report("before")
trainer.train()
report("after")
trainer.save_model(f"{args.out}/adapter")
shadowpeft.detach(trainer.model).save_pretrained(f"{args.out}/edge")

"""A shadow with TRL's own SFTTrainer: nothing but another ``peft_config``.

python examples/sft_trainer.py [--base smollm2-135m]
"""

from datasets import Dataset
from toy import QUESTIONS, arguments, load
from trl import SFTConfig, SFTTrainer

import shadowpeft
from shadowpeft.data import chat
from shadowpeft.evaluate import answer_loss

args = arguments()
base, tokenizer = load(args.base)


def turn(role, content):
    """One message in the form that TRL reads."""
    return [{"role": role, "content": content}]


data = Dataset.from_list(
    [{"prompt": turn("user", q["prompt"]), "completion": turn("assistant", q["response"])} for q in QUESTIONS]
)
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(
        output_dir=f"{args.out}/checkpoints",
        per_device_train_batch_size=8,
        max_steps=args.steps,
        learning_rate=5e-3,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        bf16=False,
        dataloader_pin_memory=False,
    ),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=8, shadow_dropout=0.0, auxiliary_loss_weight=0.5),
)


def report(when):
    """Cross-entropy of the answers' tokens from the adapted model and from the shadow alone."""
    rows = [chat.check_row(row, "example") for row in QUESTIONS]
    losses = [
        answer_loss(m, chat.encode(rows, tokenizer, max_length=256), tokenizer.pad_token_id)["loss"]
        for m in (trainer.model, shadowpeft.detach(trainer.model))
    ]
    print(f"{when}: attached {losses[0]:.3f}, detached {losses[1]:.3f}")


report("before")
trainer.train()
report("after")
trainer.save_model(f"{args.out}/adapter")

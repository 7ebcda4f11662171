"""A shadow in a plain PyTorch loop: train with ``out.loss``, save, load, detach.

python examples/plain_pytorch.py [--base smollm2-135m]
"""

import torch
from peft import get_peft_model
from toy import QUESTIONS, arguments, load

import shadowpeft
from shadowpeft.data import chat

args = arguments()
base, tokenizer = load(args.base)

rows = [chat.check_row(row, "example") for row in QUESTIONS]
sequences = chat.encode(rows, tokenizer, max_length=256)
batch = chat.ChatCollator(tokenizer.pad_token_id)([s.features() for s in sequences])  # prompts are masked in the labels

config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=8, shadow_dropout=0.0, auxiliary_loss_weight=0.5)
model = get_peft_model(base, config)
model.print_trainable_parameters()


@torch.no_grad()
def report(when):
    """In eval mode ``out.loss`` is the task loss; both losses are always there."""
    out = model.eval()(**batch)
    print(f"{when}: attached {out.task_loss:.3f}, detached {out.shadow_loss:.3f}")


report("before")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.train()
for step in range(1, args.steps + 1):
    out = model(**batch)  # out.loss = out.task_loss + auxiliary_loss_weight * out.shadow_loss
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {out.loss:.3f} = task {out.task_loss:.3f} + 0.5 * shadow {out.shadow_loss:.3f}")
report("after")

model.save_pretrained(f"{args.out}/adapter")  # the adapter alone, no base weight
edge = shadowpeft.detach(model)  # a stock model that needs neither the base nor this package
edge.save_pretrained(f"{args.out}/edge")
tokenizer.save_pretrained(f"{args.out}/edge")
print(f"saved the adapter and a {type(edge).__name__} with {edge.num_parameters():,} parameters to {args.out}")

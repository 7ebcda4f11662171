"""TRL's trainers on a shadow adapter: SFT in all its forms, preference and policy trainers with lambda = 0, or a refusal."""

import pytest
import torch
from datasets import Dataset

from naive import NaiveShadow, assert_same_gradients
from shadowpeft import ShadowLossMixin
from shadowpeft.errors import ConfigError, UnsupervisedShadowError
from tiny import adapt, adapter_config, base, tokenizer, tokens
from ways.data import LAMBDA, KeepGradients

trl = pytest.importorskip("trl", reason="TRL 1.16 is not installed; it needs Python 3.11")
SILENT = {
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "optim": "sgd",
    "learning_rate": 0.01,
    "logging_steps": 1,
}


def words(ids):
    return " ".join(f"w{int(i)}" for i in ids)


def texts(rows=4, length=6):
    ids = tokens(rows, 2 * length)
    return [(words(row[:length]), " " + words(row[length:])) for row in ids]


def data(kind):
    pairs = texts()
    if kind == "preference":
        rejected = [pairs[(i + 1) % 4][1] for i in range(4)]
        return [{"prompt": p, "chosen": a, "rejected": b} for (p, a), b in zip(pairs, rejected, strict=True)]
    if kind == "unpaired":
        return [{"prompt": p, "completion": a, "label": i % 2 == 0} for i, (p, a) in enumerate(pairs)]
    if kind == "implicit":
        return [{"chosen": p + a, "rejected": p + pairs[(i + 1) % 4][1]} for i, (p, a) in enumerate(pairs)]
    return [{"prompt": p} for p, _ in pairs]


def reward(completions, **kwargs):
    return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]


PREFERENCE = {
    "DPO": (trl.DPOTrainer, trl.DPOConfig, "preference", {}, {"per_device_train_batch_size": 4}),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, "unpaired", {}, {"per_device_train_batch_size": 4}),
    "GRPO": (
        trl.GRPOTrainer,
        trl.GRPOConfig,
        "prompts",
        {"reward_funcs": reward},
        {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5},
    ),
    "RLOO": (
        trl.RLOOTrainer,
        trl.RLOOConfig,
        "prompts",
        {"reward_funcs": reward},
        {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 5},
    ),
}


def run(name, folder, weight, model=None, **more):
    cls, config, kind, options, arguments = PREFERENCE[name]
    keep = KeepGradients()
    made = cls(
        model=base("llama") if model is None else model,
        args=config(str(folder), **{**SILENT, **arguments, **more}),
        train_dataset=Dataset.from_list(data(kind)),
        processing_class=tokenizer(),
        callbacks=[keep],
        **({"peft_config": adapter_config(auxiliary_loss_weight=weight)} if model is None else {}),
        **options,
    )
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.train()
    return made, before, keep


@pytest.mark.parametrize("name", PREFERENCE)
def test_lambda_zero_trains_the_adapter_alone(tmp_path, name):
    made, before, keep = run(name, tmp_path, 0.0)
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("shadowpeft_" in n for n in moved)
    assert sum(float(g.norm()) for g in keep.gradients.values()) > 0
    with torch.no_grad(), made.model.disable_adapter():  # what these trainers take for their reference model
        assert torch.equal(made.model(tokens()).logits, base("llama")(tokens()).logits)


@pytest.mark.parametrize("name", PREFERENCE)
def test_lambda_above_zero_is_refused_with_the_remedy(tmp_path, name):
    with pytest.raises(UnsupervisedShadowError, match="auxiliary_loss_weight=0"):
        run(name, tmp_path, 0.05)


def test_dpo_of_an_adapter_that_is_trained_already_refers_to_its_start(tmp_path):
    model = adapt(base("llama"), auxiliary_loss_weight=0.0)
    made, _, keep = run("DPO", tmp_path, 0.0, model=model)
    logged = made.state.log_history[0]
    assert logged["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy = reference at the first step
    assert sum(float(g.norm()) for g in keep.gradients.values()) > 0


def test_dpo_gradients_equal_a_plain_loop(tmp_path):
    start = adapt(base("llama"), auxiliary_loss_weight=0.0)
    made, _, keep = run("DPO", tmp_path, 0.0, model=adapt(base("llama"), auxiliary_loss_weight=0.0))
    made.model.load_state_dict({n.replace("module.", ""): p for n, p in start.state_dict().items()}, strict=False)
    batch = next(iter(made.get_train_dataloader()))
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logps = start(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    chosen = (logps.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(-1)
    good, bad = chosen.chunk(2)
    difference = good - bad
    loss = -torch.nn.functional.logsigmoid(0.1 * (difference - difference.detach())).mean()  # reference = start
    loss.backward()
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(keep.gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_reward_trainer_with_lambda_zero(tmp_path):
    model = base("llama", task="SEQ_CLS", labels=1)
    made = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(str(tmp_path), per_device_train_batch_size=4, **SILENT),
        train_dataset=Dataset.from_list(data("implicit")),
        processing_class=tokenizer(),
        peft_config=adapter_config(task_type="SEQ_CLS", auxiliary_loss_weight=0.0),
    )
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    made.train()
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("shadowpeft_" in n for n in moved)
    assert all("shadowpeft_" in n or "modules_to_save" in n for n in moved)


def test_reward_trainer_with_a_tokenizer_that_pads_with_its_end(tmp_path):
    """SmolLM2's does, and TRL ends each text with it, so the stock classifier reads the token before."""

    def train(pad):
        model, words = base("llama", task="SEQ_CLS", labels=1), tokenizer()
        words.pad_token, model.config.pad_token_id = pad, words.convert_tokens_to_ids(pad)
        trl.RewardTrainer(
            model=model,
            args=trl.RewardConfig(str(tmp_path), per_device_train_batch_size=4, **SILENT),
            train_dataset=Dataset.from_list(data("implicit")),
            processing_class=words,
            peft_config=adapter_config(task_type="SEQ_CLS", auxiliary_loss_weight=0.0),
        ).train()

    end = tokenizer().eos_token
    with pytest.raises(ConfigError, match=r"RewardTrainer writes one.*set tokenizer\.pad_token to another token"):
        train(end)
    train("<pad>")


# ----------------------------------------------------------------------------------------------------------------- SFT


def sft(cls, model, folder, rows, options=None, **more):
    keep = KeepGradients()
    arguments = {**SILENT, "max_length": None, "per_device_train_batch_size": 4, **more}
    made = cls(
        model=model,
        args=trl.SFTConfig(str(folder), **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[keep],
        **(options or {}),
    )
    made.train()
    return made, keep.gradients


def language_rows():
    ids = tokens(4, 10)
    return [{"input_ids": ids[i][: 10 if i % 2 else 5].tolist()} for i in range(4)]


def check(model, start, gradients, rows, completion_only=False):
    """Gradients of the naive loop over ``rows``, each alone, weighted by its targets: packing must change nothing."""
    naive = NaiveShadow(model, start)
    count = sum(sum(r.get("completion_mask", [0] + [1] * (len(r["input_ids"]) - 1))[1:]) for r in rows)
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        keep = torch.tensor(row.get("completion_mask", [1] * ids.shape[1]))[None].bool()
        labels = ids.masked_fill(~keep, -100)
        (naive(ids, labels).loss * ((labels[:, 1:] != -100).sum() / count)).backward()
    for name, parameter in start.named_parameters():
        parameter.grad = gradients.get(name)
    assert_same_gradients(start, naive)


def pair(**fields):
    model = base("llama")
    return model, *(adapt(model, auxiliary_loss_weight=LAMBDA, **fields) for _ in range(2))


def test_sft_on_completions_only(tmp_path):
    model, start, adapted = pair()
    rows = [{**row, "completion_mask": [int(i > 1) for i in range(len(row["input_ids"]))]} for row in language_rows()]
    _, gradients = sft(trl.SFTTrainer, adapted, tmp_path, rows, completion_only_loss=True)
    check(model, start, gradients, rows)


@pytest.mark.parametrize("micro", [1, 4])
def test_sft_mixin_logs_both_losses_of_the_accumulated_batch(tmp_path, micro):
    cls = type("Mixed", (ShadowLossMixin, trl.SFTTrainer), {})
    model, _, adapted = pair()
    options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 4 // micro}
    made, _ = sft(cls, adapted, tmp_path, language_rows(), **options)
    logged = made.state.log_history[0]
    ids = torch.zeros(4, 10, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(language_rows()):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[i, : len(row["input_ids"])] = 1
    start = adapt(model, auxiliary_loss_weight=LAMBDA)
    with torch.no_grad():
        out = start(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    assert logged["task_loss"] == pytest.approx(float(out.task_loss), rel=1e-4)
    assert logged["shadow_loss"] == pytest.approx(float(out.shadow_loss), rel=1e-4)


def test_sft_with_packing_equals_the_rows_alone(tmp_path):
    model, start, adapted = pair()
    _, gradients = sft(trl.SFTTrainer, adapted, tmp_path, language_rows(), packing=True, max_length=16)
    check(model, start, gradients, language_rows())


def test_sft_padding_free_equals_the_rows_alone(tmp_path):
    model, start, adapted = pair()
    _, gradients = sft(trl.SFTTrainer, adapted, tmp_path, language_rows(), padding_free=True)
    check(model, start, gradients, language_rows())

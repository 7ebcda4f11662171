"""Rows packed into one: gradients of both paths are those of the rows alone, recurrent models are refused, runs say so."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconH1Config, MambaConfig, TrainingArguments

import shadowpeft
from chatbase import run_file, save_run_data
from commands import call
from products import covering
from shadowpeft.core.losses import IGNORE
from shadowpeft.data import chat
from shadowpeft.data.packed import PackedCollator, pack, pack_stream
from shadowpeft.errors import UnsupportedModelError
from shadowpeft.train.config import parse_run
from shadowpeft.train.packing import check_packing
from shadowpeft.train.progress import read_metrics
from shadowpeft.train.run import train
from tiny import KINDS, adapt, base, tokens


def sequences():
    """Of both paths, one path, and with less for the shadow; of lengths 4 to 9."""
    ids = [tokens(1, n, 50 + n)[0].tolist() for n in (9, 4, 7, 5, 6, 8)]
    return [
        chat.Sequence(ids[0], 3, True, True),
        chat.Sequence(ids[1], 2, True, False),
        chat.Sequence(ids[2], 1, True, True),
        chat.Sequence(ids[3], 1, False, True),
        chat.Sequence(ids[4], 2, True, True, shadow_answer=[ids[4][2], 5]),
        chat.Sequence(ids[5], 1, False, True, turns=[(1, 3), (5, 8)]),
    ]


def test_rows_are_full_and_each_sequence_is_in_one():
    packed = pack(sequences(), 18)
    assert [len(row.ids) for row in packed] == [16, 10, 13]
    assert [row.base for row in packed] == [True, True, False]
    assert all(len(row.ids) <= 18 for row in packed)
    assert sorted(part.ids for row in packed for part in row.parts) == sorted(s.ids for s in sequences())
    assert [len(row.ids) for row in pack(sequences(), 9)] == [9, 7, 6, 4, 8, 5]
    many = [chat.Sequence([1] * (1 + i % 7), 1, True, True) for i in range(200)]
    assert len(pack(many, 20)) == -(-sum(len(s.ids) for s in many) // 20)  # no room is lost
    assert [part.ids for row in pack_stream(many, 20) for part in row.parts] == [s.ids for s in many]
    assert max(len(row.ids) for row in pack_stream(many, 20)) <= 20


def test_the_first_token_of_a_row_is_no_target_and_padding_is_apart():
    bare = chat.Sequence(sequences()[2].ids, 0, True, True)  # nothing before its answer
    (row,) = pack([sequences()[0], bare], 16)
    made = row.features()
    assert made["position_ids"] == [*range(9), *range(7)]
    assert made["labels"][9] == made["shadow_labels"][9] == IGNORE
    assert made["labels"][10:] == sequences()[2].ids[1:]
    batch = PackedCollator(0)([made, pack([sequences()[1]], 16)[0].features()])
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3] + [0] * 12
    assert batch["labels"][1].tolist() == [IGNORE, IGNORE, *sequences()[1].ids[2:]] + [IGNORE] * 12


def gradients(model, rows, collator, folder, size):
    """Of a training step of ``ShadowTrainer``, in batches of ``size`` rows."""
    trainer = shadowpeft.ShadowTrainer(
        model=model, args=TrainingArguments(folder, report_to=[], use_cpu=True), data_collator=collator
    )
    model.train()
    model.zero_grad()
    batches = [collator([row.features() for row in rows[i : i + size]]) for i in range(0, len(rows), size)]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.training_step(model, batch, num_items_in_batch=items)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), covering(["llama", "qwen3", "gemma3", "mistral", "gpt2", "mixtral"], KINDS))
def test_gradients_are_those_of_the_rows_alone(tmp_path, name, kind):
    compare(tmp_path, adapt(base(name), auxiliary_loss_weight=0.5, **KINDS[kind]))


@pytest.mark.parametrize("shadow_loss", ["kl", "both"])
def test_what_the_attached_path_teaches_stays_inside_a_row_too(tmp_path, shadow_loss):
    compare(tmp_path, adapt(base("llama"), auxiliary_loss_weight=0.5, shadow_loss=shadow_loss))


def compare(tmp_path, model):
    check_packing(model)
    plain = gradients(model, sequences(), chat.ChatCollator(0), tmp_path, 1)
    packed = gradients(model, pack(sequences(), 18), PackedCollator(0), tmp_path, 3)
    assert plain.keys() == packed.keys()
    scale = max(float(value.norm()) for value in plain.values())
    for key, value in plain.items():
        assert float((packed[key] - value).norm()) <= 1e-5 * scale, key  # float32 sums in another order


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_way_of_attention_keeps_rows_apart(attention):
    model = adapt(AutoModelForCausalLM.from_config(base("llama").config, attn_implementation=attention))
    assert model.config._attn_implementation == attention
    check_packing(model)


def recurrent(name):
    if name == "mamba":
        shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.2}
        return AutoModelForCausalLM.from_config(MambaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    if name == "falcon_h1":
        shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "mamba_d_ssm": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 8}
        return AutoModelForCausalLM.from_config(FalconH1Config(**shape, **heads, mamba_d_state=8, mamba_n_groups=1))
    return base(name)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "falcon_h1"])
def test_recurrent_models_are_refused_by_name(name):
    model = recurrent(name)
    with pytest.raises(UnsupportedModelError, match=rf"data\.packing is set but .*{type(model).__name__}"):
        check_packing(adapt(model.eval()))


def test_a_recurrent_shadow_is_refused_too():
    torch.manual_seed(2)
    with pytest.raises(UnsupportedModelError, match="the base and the shadow carry something from a packed row"):
        check_packing(adapt(base("llama"), shadow_model=base("qwen3_next"), shadow_init="random"))


# ------------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_run_data(tmp_path_factory.mktemp("made"), 20)


def run(made, folder, **sections):
    return parse_run(run_file(folder, made["base"], made["train"], **sections), "here")


def test_a_packed_run_evaluates_what_a_plain_one_does(made, tmp_path):
    data = {"validation": made["validation"], "packing": True}
    still = {"max_steps": 2, "learning_rate": 1e-12}
    packed = train(run(made, tmp_path / "packed", data=data, training=still), quiet=True)
    plain = train(run(made, tmp_path / "plain", data={**data, "packing": False}, training=still), quiet=True)
    for key in ("eval_task_loss", "eval_shadow_loss"):
        assert packed[key] == pytest.approx(plain[key], rel=1e-5)


def test_a_packed_run_learns_with_the_shadow_first_and_resumes(made, tmp_path):
    training = {"max_steps": 12, "shadow_epochs": 1, "save_every": 6, "batch_size": 2}
    sections = {"data": {"packing": True}, "training": training}
    summary = train(run(made, tmp_path / "run", **sections), quiet=True)
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert summary["steps"] == 12
    assert "task_loss" not in records[0]  # the shadow alone
    assert records[-1]["task_loss"] < records[6]["task_loss"]
    whole = shadowpeft.load(summary["adapter"]).state_dict()
    for path in (tmp_path / "run" / "checkpoint-12").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-12").rmdir()
    train(run(made, tmp_path / "run", **sections), resume=True, quiet=True)
    again = shadowpeft.load(summary["adapter"]).state_dict()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_the_plan_says_so(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(run_file(tmp_path / "run", made["base"], made["train"])))
    plans = {}
    for name, more in (("plain", []), ("packed", ["data.packing=true"])):
        code, out, _ = call(monkeypatch, capsys, "plan", tmp_path / "run.yaml", "training.max_steps=null", *more, "--json")
        assert code == 0
        plans[name] = json.loads(out)
    assert plans["packed"]["sequences"] == plans["plain"]["sequences"]
    assert plans["packed"]["packed_rows"] < plans["plain"]["sequences"] / 2
    assert plans["packed"]["steps"] < plans["plain"]["steps"]
    assert "attention stays inside each sequence" in plans["packed"]["packing"]
    assert "packed_rows" not in plans["plain"]

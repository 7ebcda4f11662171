"""Property 5: two gloo processes (DDP, FSDP2) train as one process on the whole batch, without ``find_unused_parameters``.

``accelerate launch`` starts ``worker.py`` twice per fixture; the tests compare what rank 0 wrote with the naive loop.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import shadowpeft
from naive import NaiveShadow, assert_same_gradients
from processes import launch_two
from tiny import KINDS, adapt, base, tokens
from ways.data import LAMBDA, rows, whole

pytestmark = pytest.mark.slow  # each fixture starts two processes, 10 to 20 s
TESTS = Path(__file__).parents[1]


def launch(folder, *scenarios):
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    worker = [str(Path(__file__).parent / "worker.py"), str(folder), *scenarios]
    done = launch_two(*worker, timeout=400, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp"), "ddp", "ddp_accumulated", "ddp_two_steps")


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    scenarios = ["trainer", "default_trainer", "two_targets", "smoothing", "own_loss", "classification", "evaluation"]
    return launch(tmp_path_factory.mktemp("trainers"), *scenarios, "resume")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    scenarios = ["fsdp", "fsdp_checkpointed", "fsdp_files", "fsdp_accelerate", "fsdp_trainer"]
    return launch(tmp_path_factory.mktemp("fsdp"), *scenarios)


def check(folder, name, *, model="llama", smoothing=0.0, data=None, task="CAUSAL_LM", tolerance=2e-4, **fields):
    """What rank 0 kept under ``name`` are the gradients of one naive pass over all rows."""
    found = load_file(folder / f"{name}.safetensors")
    plain = base(model, task=task)
    start = adapt(plain, task_type=task, auxiliary_loss_weight=LAMBDA, **fields)
    batch = whole(rows() if data is None else data)
    naive = NaiveShadow(plain, start)
    naive(batch.pop("input_ids"), batch.pop("labels"), smoothing=smoothing, **batch).loss.backward()
    parameters = dict(start.named_parameters())
    assert {n for n, p in parameters.items() if p.requires_grad} <= set(found)
    for key, parameter in parameters.items():
        parameter.grad = found.get(key)
    assert_same_gradients(start, naive, tolerance)
    return found


# ------------------------------------------------------------------------------------------------------------------ DDP


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ddp_equals_one_process(ddp, kind, checkpointing):
    check(ddp, f"ddp-{kind}-{checkpointing}", **KINDS[kind])


def test_ddp_with_accumulation_equals_one_process(ddp):
    check(ddp, "ddp_accumulated")


def test_ddp_weights_after_two_steps_equal_one_process(ddp):
    model = adapt(base("llama"), auxiliary_loss_weight=LAMBDA).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        model(**whole(rows())).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    found, start = load_file(ddp / "ddp_two_steps.safetensors"), adapt(base("llama"))
    for (name, parameter), (_, before) in zip(model.named_parameters(), start.named_parameters(), strict=True):
        if parameter.requires_grad:
            assert not torch.equal(found[name], before), name
            # AdamW divides by the gradient's own size: where it is nearly 0, rounding decides a step of up to 1e-3
            close = (found[name] - parameter).abs() < 1e-5
            assert float(close.float().mean()) > 0.99, name


# -------------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("split", ["whole", "micro"])
@pytest.mark.parametrize("cls", ["Trainer", "ShadowTrainer"])
def test_trainer_with_different_numbers_of_targets_per_rank(trainers, cls, split):
    check(trainers, f"trainer-{cls}-{split}")


def test_shadow_trainer_needs_no_find_unused_parameters(trainers):
    assert not load_file(trainers / "default_trainer.safetensors")["unused"]


@pytest.mark.parametrize("split", ["whole", "micro"])
@pytest.mark.parametrize("only", ["both", "alone"])
def test_two_targets_on_two_ranks(trainers, only, split):
    data = rows(shadow_labels=True)
    if only == "alone":
        data[0]["labels"] = torch.full_like(data[0]["labels"], -100)
        data[3]["shadow_labels"] = torch.full_like(data[3]["shadow_labels"], -100)
    found = check(trainers, f"two_targets-{only}-{split}", data=data)
    plain = base("llama")
    batch = whole(data)
    out = NaiveShadow(plain, adapt(plain, auxiliary_loss_weight=LAMBDA))(
        batch.pop("input_ids"), batch.pop("labels"), **batch
    )
    for key in ("loss", "task_loss", "shadow_loss"):  # what is logged is of the whole batch, not of rank 0
        assert float(found[f"logged.{key}"]) == pytest.approx(float(getattr(out, key)), rel=1e-4), key


def test_label_smoothing_on_two_ranks(trainers):
    check(trainers, "smoothing", smoothing=0.2)


def test_compute_loss_func_on_two_ranks(trainers):
    check(trainers, "own_loss")


def test_classification_on_two_ranks(trainers):
    data = [{**row, "labels": torch.tensor(i % 3)} for i, row in enumerate(rows())]
    check(trainers, "classification", data=data, task="SEQ_CLS")


def test_evaluation_on_two_ranks_reports_both_losses_of_all_rows(trainers):
    found = load_file(trainers / "evaluation.safetensors")
    with torch.no_grad():
        out = adapt(base("llama"))(**whole(rows(shadow_labels=True)))
    assert float(found["eval_task_loss"]) == pytest.approx(float(out.task_loss), rel=1e-4)
    assert float(found["eval_shadow_loss"]) == pytest.approx(float(out.shadow_loss), rel=1e-4)


def test_resumed_on_two_ranks_equals_running_through(trainers):
    through, resumed = (load_file(trainers / f"resume-{name}.safetensors") for name in ("through", "resumed"))
    assert set(through) == set(resumed)
    assert all(torch.equal(through[key], resumed[key]) for key in through)
    start = {n: p for n, p in adapt(base("llama"), shadow_dropout=0.3).named_parameters() if p.requires_grad}
    assert all(not torch.equal(through[key], start[key]) for key in through)


def test_checkpoints_of_two_ranks_are_whole(trainers):
    for name in ("through", "resumed"):
        assert sorted(p.name for p in (trainers / name).iterdir()) == ["checkpoint-2", "checkpoint-4"]
        for folder in (trainers / name).iterdir():
            files = {p.name for p in folder.iterdir()}
            wanted = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"}
            assert wanted | {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= files


# ---------------------------------------------------------------------------------------------------------------- FSDP2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_fsdp2_equals_one_process(fsdp, name, kind):
    check(fsdp, f"fsdp-{name}-{kind}-float32", model=name, **KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_fsdp2_with_a_bfloat16_base_and_a_float32_adapter(fsdp, name, kind):
    found = load_file(fsdp / f"fsdp-{name}-{kind}-bfloat16.safetensors")
    model = adapt(base(name).bfloat16(), auxiliary_loss_weight=LAMBDA, **KINDS[kind]).train()
    model(**whole(rows())).loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    assert {g.dtype for g in found.values()} == {torch.float32}
    mine, one = (torch.cat([grads[n].flatten() for n in expected]) for grads in (found, expected))
    # the base rounds to 8 bits, and a batch of two rows is summed in another order than one of four
    assert float(torch.nn.functional.cosine_similarity(mine, one, dim=0)) > 0.999
    assert float((mine - one).norm() / one.norm()) < 0.02


def test_fsdp2_with_checkpointing_equals_one_process(fsdp):
    check(fsdp, "fsdp_checkpointed")


@pytest.mark.parametrize("kind", ["mirror", "explicit"])
def test_adapter_and_edge_model_saved_from_fsdp2(fsdp, kind):
    expected = load_file(fsdp / f"fsdp_files-{kind}.safetensors")["logits"]
    model = shadowpeft.load(fsdp / f"fsdp-adapter-{kind}", base("llama_tied"))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        edge = AutoModelForCausalLM.from_pretrained(fsdp / f"fsdp-edge-{kind}")
        reference = shadowpeft.detach(model)
        assert torch.equal(edge(tokens()).logits, reference(tokens()).logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_accelerates_fsdp2_equals_one_process(fsdp, name, kind):
    # the second step: accelerate puts head and last norm in one unit that counts its calls (hf/head.py)
    check(fsdp, f"fsdp_accelerate-{name}-{kind}", model=name, **KINDS[kind])
    expected = load_file(fsdp / f"fsdp_accelerate_logits-{name}-{kind}.safetensors")["logits"]
    model = shadowpeft.load(fsdp / f"fsdp-accelerate-{name}-{kind}", base(name))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", ["whole", "micro"])
def test_shadow_trainer_with_fsdp2_equals_one_process(fsdp, split):
    check(fsdp, f"fsdp_trainer-{split}", data=rows(shadow_labels=True))

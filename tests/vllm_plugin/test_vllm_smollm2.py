"""SmolLM2-135M in vLLM with a shadow whose weights change every answer, alone and with its edge model as draft (marker
``vllm``)."""

import pytest
import torch
from peft import get_peft_model
from vllm_cases import expected
from vllm_runs import SAME, assert_same, job, run_engine, vllm_python

import shadowpeft
from shadowpeft.hf.base.aliases import source_of
from shadowpeft.hf.base.load import load_base
from shadowpeft.tokenizer import load_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
ALIAS, NEW = "smollm2-135m", 16
TEXTS = (
    "sit down",
    "Why is the sky blue? Answer in one sentence.",
    "Write a short poem about a robot dog that learns to sit, to stand up and to walk to the kitchen and back.",
    "Name three rivers.",
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What vLLM and ``model.generate`` answer, and the bare base."""
    vllm_python()
    folder, tokenizer = tmp_path_factory.mktemp("smollm2"), load_tokenizer(ALIAS)
    rows = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
        for text in TEXTS
    ]
    base = load_base(ALIAS)
    bare = expected(base, rows, NEW)
    config = shadowpeft.ShadowPeftConfig(task_type="CAUSAL_LM", r=16, shadow_num_hidden_layers=1, shadow_dropout=0.0)
    model = get_peft_model(base, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "shadow" in name and "norm" not in name:  # with 0.02 two answers are the base's
                value.normal_(std=0.03)
    model.save_pretrained(folder / "adapter")
    shadowpeft.detach(model).save_pretrained(folder / "edge")
    steps = [{"how": how, "prompts": rows, "new": NEW} for how in ("together", "one by one")]
    drafts = {"method": "draft_model", "model": str(folder / "edge"), "num_speculative_tokens": 3}
    at = source_of(ALIAS)
    jobs = {
        "alone": job(model, at, folder / "adapter", steps),
        "drafts": job(model, at, folder / "adapter", steps[:1], speculative_config=drafts, disable_log_stats=False),
    }
    return run_engine(jobs, folder), expected(model, rows, NEW), bare


def test_the_shadow_changes_every_answer(answers):
    _, wanted, bare = answers
    assert all(a["tokens"] != b["tokens"] for a, b in zip(wanted, bare, strict=True))
    assert min(row["gap"] for row in wanted) > 2 * SAME  # so that rounding cannot change a choice


def test_the_answers_are_those_of_generate(answers):
    results, wanted, _ = answers
    assert "refused" not in results["alone"], results["alone"]["refused"]
    for got in results["alone"]["steps"]:
        assert_same(got, wanted)


def test_so_are_those_that_the_edge_model_drafts(answers):
    results, wanted, _ = answers
    assert "refused" not in results["drafts"], results["drafts"]["refused"]
    assert_same(results["drafts"]["steps"][0], wanted)
    assert results["drafts"]["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0

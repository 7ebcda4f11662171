"""vLLM's compiler on a base with a shadow: the tokens of ``model.generate`` (markers ``vllm`` and ``slow``; the command is in
docs/vllm.md)."""

import pytest
from vllm_cases import expected, make_case, prompts
from vllm_runs import assert_same, job, run_engine, vllm_python

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]
NEW = 12


def test_a_compiled_model_gives_the_same_tokens(tmp_path):
    vllm_python()
    model, base, adapter = make_case("llama", tmp_path)
    other, _, second = make_case("llama", tmp_path, seed=8)
    rows = prompts()
    asked = {"how": "together", "prompts": rows, "new": NEW}
    steps = [asked, {"how": "one by one", "prompts": rows, "new": NEW}, {"how": "swap", "adapter": str(second)}, asked]
    jobs = {"compiled": job(model, base, adapter, steps, enforce_eager=False)}
    # a cache of its own: what is tested is what this code compiles to, not what an earlier one did
    results = run_engine(jobs, tmp_path, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    assert "refused" not in results["compiled"], results["compiled"]["refused"]
    together, alone, _, swapped = results["compiled"]["steps"]
    wanted = expected(model, rows, NEW)
    assert_same(together, wanted)
    assert_same(alone, wanted)
    assert_same(swapped, expected(other, rows, NEW))  # the compiled code reads the new weights
    assert list((tmp_path / "cache" / "torch_compile_cache").rglob("*.py"))  # it was compiled

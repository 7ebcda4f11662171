"""vLLM gives the tokens of ``model.generate``, and their log-probabilities (marker ``vllm``; run with: make vllm).

vLLM and shadowpeft ask for different releases of transformers, so vLLM runs in an environment of its own:
``SHADOWPEFT_VLLM_PYTHON`` names its Python. All engines run in one process of it, one after the other; only tensor
parallelism has processes of its own.
"""

import json

import pytest
from vllm_cases import CASES, expected, make_case, prompts
from vllm_runs import assert_same, job, run_engine, vllm_python

import shadowpeft

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]
NEW = 12
HOW = ("together", "one by one", "staggered")


def changed(adapter, to, **values):
    """A copy of an adapter's folder with other settings."""
    to.mkdir()
    for file in adapter.iterdir():
        if file.suffix in (".json", ".safetensors"):
            (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, **values}))
    return to


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """What vLLM answered for every family and kind of shadow, and what ``model.generate`` did."""
    vllm_python()
    folder, rows = tmp_path_factory.mktemp("families"), prompts()
    jobs, wanted = {}, {}
    for name in CASES:
        model, base, adapter = make_case(name, folder)
        wanted[name] = expected(model, rows, NEW)
        jobs[name] = job(model, base, adapter, [{"how": how, "prompts": rows, "new": NEW} for how in HOW])
    return run_engine(jobs, folder), wanted


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """The same for one adapter, in each way that vLLM runs a model; and the models that it refuses."""
    vllm_python()
    folder = tmp_path_factory.mktemp("ways")
    rows, long = prompts(), prompts(4, 560)
    jobs, wanted = {}, {}
    for name in ("llama-scaled", "qwen3", "mistral"):
        make_case(name, folder)
    model, base, adapter = make_case("llama", folder)
    wanted["llama"] = expected(model, rows, NEW)
    wanted["chunked"] = expected(model, long, NEW)
    jobs["chunked"] = job(
        model,
        base,
        adapter,
        [{"how": "together", "prompts": long, "new": NEW}],
        max_num_batched_tokens=64,
        max_model_len=512,
    )
    edge = shadowpeft.detach(model)
    edge.save_pretrained(folder / "edge")
    drafts = {"method": "draft_model", "model": str(folder / "edge"), "num_speculative_tokens": 3}
    wanted["draft"] = wanted["llama"]
    jobs["draft"] = job(
        model,
        base,
        adapter,
        [{"how": "together", "prompts": rows, "new": NEW}],
        speculative_config=drafts,
        disable_log_stats=False,
    )
    other, _, second = make_case("llama", folder, seed=8)
    wanted["second"] = expected(other, rows, NEW)
    scaled = folder / "llama-scaled-7"
    steps = [{"how": "together", "prompts": rows, "new": NEW}]
    for to in (second, adapter, scaled):
        steps += [{"how": "swap", "adapter": str(to)}, {"how": "together", "prompts": rows, "new": NEW}]
    jobs["swap"] = job(model, base, adapter, steps)
    refused = {
        "variant": ("llama", changed(adapter, folder / "variant", variant="other"), {}),
        "base": ("llama", folder / "qwen3-7", {}),
        "pipeline": ("llama", adapter, {"pipeline_parallel_size": 2}),
        "lora": ("llama", adapter, {"enable_lora": True}),
        "window": ("mistral", window(folder), {}),
    }
    for name, (at, path, arguments) in refused.items():
        jobs[f"refuse {name}"] = job(model, folder / at, path, [], **arguments)
        jobs[f"refuse {name}"]["model_type"] = at
    results = run_engine(jobs, folder)
    return results, {**wanted, "log": (folder / "log.txt").read_text()}


def window(folder):
    """A Mistral adapter whose shadow sees further than vLLM would let it."""
    source = folder / "mistral-7"
    record = json.loads((source / "adapter_config.json").read_text())["shadow_backbone_config"]
    return changed(source, folder / "window", shadow_backbone_config={**record, "sliding_window": None})


@pytest.mark.parametrize("name", CASES)
def test_batched_alone_and_staggered(name, families):
    results, wanted = families
    assert "refused" not in results[name], results[name]["refused"]
    for got in results[name]["steps"]:
        assert_same(got, wanted[name])
    # block size 32: the second pass finds the beginning of each longer prompt in the cache
    assert sum(row["cached"] for row in results[name]["steps"][1]) >= 32


def test_long_prompts_in_chunks(ways):
    results, wanted = ways
    assert_same(results["chunked"]["steps"][0], wanted["chunked"])


def test_the_edge_model_drafts(ways):
    results, wanted = ways
    assert_same(results["draft"]["steps"][0], wanted["draft"])
    assert results["draft"]["metrics"]["vllm:spec_decode_num_draft_tokens"] > 0


def test_a_swap_and_back(ways):
    results, wanted = ways
    assert all(a["tokens"] != b["tokens"] for a, b in zip(wanted["llama"], wanted["second"], strict=True))
    first, _, second, _, back, refusal, still = results["swap"]["steps"]
    assert_same(first, wanted["llama"])
    assert_same(second, wanted["second"])
    assert_same(back, wanted["llama"])
    assert "differs from the running one" in refusal
    assert_same(still, wanted["llama"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("variant", "the adapter's variant is other but must be one of paper"),
        ("base", "the adapter was trained on a qwen3 model but this base is llama"),
        ("pipeline", "pipeline parallelism was asked for"),
        ("lora", "LoRA was asked for together with a shadow"),
        ("window", "the shadow's sliding window is None but vLLM gives every layer of this base 16"),
    ],
)
def test_refusals_name_their_reason(name, message, ways):
    results, wanted = ways
    told = results[f"refuse {name}"]["refused"]
    # stages are processes of their own, and vLLM tells what one says only in its log
    assert message in (wanted["log"] if name == "pipeline" else told)


def test_two_ranks(tmp_path):
    model, base, adapter = make_case("qwen3-explicit", tmp_path)
    rows = prompts()
    wanted = expected(model, rows, NEW)
    steps = [{"how": "together", "prompts": rows, "new": NEW}]
    results = run_engine({"two": job(model, base, adapter, steps, tensor_parallel_size=2)}, tmp_path)
    assert "refused" not in results["two"], results["two"]["refused"]
    assert_same(results["two"]["steps"][0], wanted)
